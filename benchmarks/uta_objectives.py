"""FLOPs of UTA's objectives (table 6) for its three students: the student's, relative to each other, and the teacher's.

Counted operation by operation on the meta device, so neither weights nor a GPU are needed. Prints the table and puts
it into docs/uta.md between its marks (`--check`: change nothing, say whether it is up to date).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from _results import ROOT
from torch.utils.flop_counter import FlopCounterMode

from locfast.config.uta import UTAConfig
from locfast.methods import create_method
from locfast.methods.uta import UTA

PAGE = ROOT / "docs" / "uta.md"
BEGIN, END = "<!-- counted by benchmarks/uta_objectives.py -->", "<!-- end -->"
STUDENTS = {"B/14": "eva02_base_patch14_224", "L/14": "eva02_large_patch14_224", "g/14": "eva02_giant_patch14_224"}
TEACHER = "eva_giant_patch14_clip_224"
OBJECTIVES = ("distillation", "mim", "uta_mim", "uta")
PAPER = {"distillation": 1.0, "mim": 1.0, "uta_mim": 1.0, "uta": 0.6}
"""Table 6, for B/14 at a mask ratio of 0.4."""


@dataclass(frozen=True)
class Counted:
    """GFLOPs an image; the student's forward and backward, the teacher's forward."""

    student: float
    teacher: float
    kept: int


def count(student: str, objective: str) -> Counted:
    """One objective for one student, with the paper's mask ratio for its width and the paper's teacher."""
    with torch.device("meta"):
        config = UTAConfig(teacher=TEACHER, objective=objective)  # type: ignore[arg-type]
        method = create_method("uta", config, model=student, pretrained=False)
        assert isinstance(method, UTA)
        images = torch.zeros(1, 3, *method.student.image_size)
        with FlopCounterMode(display=False) as counter:
            method.target(images)
        return Counted(method.student_flops() / 1e9, counter.get_total_flops() / 1e9, method.kept)


def rows(names: list[str]) -> list[str]:
    """Lines of the table for the students called `names`."""
    lines = []
    for name in names:
        counted = {objective: count(STUDENTS[name], objective) for objective in OBJECTIVES}
        whole = counted["distillation"]
        for objective, one in counted.items():
            paper = f"{PAPER[objective]:.1f}" if name == "B/14" else ""
            step, full = one.student + one.teacher, whole.student + whole.teacher
            lines.append(
                f"| {name} | {objective} | {one.student:.1f} | {one.student / whole.student:.2f} | {paper} "
                f"| {one.teacher:.1f} | {100 * one.teacher / step:.0f} % | {step / full:.2f} |"
            )
    return lines


def render() -> str:
    heads = "student | objective | GFLOPs | relative | paper | teacher, GFLOPs | teacher's share | step, relative"
    return "\n".join([f"| {heads} |", "|---|---|---|---|---|---|---|---|", *rows(list(STUDENTS))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page is not up to date")
    args = parser.parse_args()
    table, page = render(), PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    made = f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"
    print(table)
    if args.check:
        sys.exit(made != page)
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
