"""UTA's table 6: the student's FLOPs by objective, counted on its own networks, beside the teacher's."""

from __future__ import annotations

import pytest
import uta_objectives
from uta_objectives import OBJECTIVES, PAPER, STUDENTS, Counted, count


@pytest.fixture(scope="module")
def base() -> dict[str, Counted]:
    return {objective: count(STUDENTS["B/14"], objective) for objective in OBJECTIVES}


def test_the_students_flops_round_to_the_papers_column(base) -> None:
    whole = base["distillation"].student
    assert {name: round(one.student / whole, 1) for name, one in base.items()} == PAPER
    assert base["uta"].kept == 154  # 0.4 of 256 patches are hidden


def test_the_teacher_is_the_same_for_all_and_most_of_a_base_students_step(base) -> None:
    assert len({one.teacher for one in base.values()}) == 1
    assert base["uta"].teacher > 5 * base["uta"].student


def test_the_page_holds_what_is_counted(base, monkeypatch) -> None:
    monkeypatch.setattr(uta_objectives, "count", lambda student, objective: base[objective])
    page = uta_objectives.PAGE.read_text(encoding="utf-8")
    counted = page.partition(uta_objectives.BEGIN)[2].partition(uta_objectives.END)[0]
    for line in uta_objectives.rows(["B/14"]):
        assert line in counted
