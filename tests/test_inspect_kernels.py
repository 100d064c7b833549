"""`python -m locfast.inspect` without a MODEL: the command around the listing of kernels."""

import json
import sys
from pathlib import Path

import pytest

from locfast import inspect
from locfast.machine_code import listing, sass
from locfast.machine_code.listing import Listing, Row
from locfast.machine_code.occupancy import Occupancy

GOOD = Row(
    "attention forward bf16 D 64",
    "triton",
    90,
    dtype="bf16",
    head_dim=64,
    needs_tensor_cores=True,
    registers=168,
    spill_bytes=0,
    shared_bytes=49152,
    threads=128,
    occupancy=Occupancy(2, 8, "registers"),
    products=2,
    products_on_fma=0,
    instructions={"HGMMA": 24, "FFMA": 5},
)
CUDA = Row(
    "op::kernel<float, 4>", "cuda", 90, registers=32, spill_bytes=0, threads=256, occupancy=Occupancy(8, 64, "warps")
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command on rows given instead of compiled: (exit code, stdout, stderr)."""

    def run(*arguments: str, rows: tuple[Row, ...] = (GOOD, CUDA)) -> tuple[int, str, str]:
        monkeypatch.setattr(listing, "list_kernels", lambda *_, **__: Listing(list(rows), ["nothing else"], "3.9.0"))
        monkeypatch.setattr(sys, "argv", ["inspect", *arguments])
        code = 0
        try:
            inspect.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_line_for_each_kernel_and_architecture(command) -> None:
    code, out, _ = command()
    header, triton, cuda, note, *_ = out.splitlines()
    assert code == 0 and header.split()[:4] == ["kernel", "by", "arch", "regs"]
    words = [" ".join(line.split()) for line in (triton, cuda)]
    assert words[0] == "attention forward bf16 D 64 triton sm_90 168 0 48.0 128 2 8 24 HGMMA registers"
    assert words[1] == "op::kernel<float, 4> cuda sm_90 32 0 dynamic 256 <=8 <=64 - warps"
    assert note == "note: nothing else"


def test_columns_are_aligned_whatever_a_failed_row_says(command) -> None:
    failed = Row("broken", "triton", 90, "CompilationError: " + "x" * 300)
    code, out, err = command(rows=(GOOD, failed, CUDA))
    lines = out.splitlines()
    assert code == 1 and "1 of 3 rows did not compile" in err
    assert lines[2].split(maxsplit=3)[3] == "failed: CompilationError: " + "x" * 300
    assert len({line.index("sm_90") for line in lines[1:4]}) == 1
    assert len(lines[1]) < 160


def test_an_unknown_architecture_is_no_failure(command) -> None:
    code, out, _ = command(rows=(GOOD, Row("(all)", "triton", 123, "Triton 3.9.0 knows no sm_123", known=False)))
    assert code == 0 and "Triton 3.9.0 knows no sm_123" in out


def test_json_holds_instruction_counts(command, tmp_path: Path) -> None:
    command("--json", str(tmp_path / "kernels.json"))
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["triton"] == "3.9.0"
    assert content["kernels"][0]["instructions"] == {"HGMMA": 24, "FFMA": 5}
    assert content["kernels"][0]["tensor_core"] == {"HGMMA": 24}
    assert content["kernels"][0]["occupancy"] == {"blocks": 2, "warps": 8, "limited_by": "registers"}


def test_check_passes_what_is_right_and_names_what_is_not(command) -> None:
    code, out, _ = command("--check")
    assert code == 0 and "check: 1 forms on sm_90" in out
    bad = Row("attention backward", "triton", 90, dtype="fp16", head_dim=72, needs_tensor_cores=True, spill_bytes=8)
    code, _, err = command("--check", rows=(GOOD, bad))
    assert code == 1
    assert "locfast: attention backward: spills 8 bytes a thread" in err.splitlines()
    assert "locfast: attention backward: has no tensor-core instructions" in err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--check", "--arch", "80", "100"], "--check looks at sm_90"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json"),
        (["demo", "--check", "--only", "x"], "--only --check"),
        (["--image-size", "64"], "name it, as MODEL"),
    ],
)
def test_mistakes_end_with_two_and_one_message(command, arguments, told) -> None:
    code, out, err = command(*arguments)
    assert code == 2 and out == "" and told in err and "Traceback" not in err


def test_a_name_that_nothing_has_and_a_check_of_nothing_end_with_two(command) -> None:
    code, _, err = command("--only", "nonesuch", rows=())
    assert code == 2 and "no kernel has that in its name" in err
    code, _, err = command("--check", rows=(CUDA,))
    assert code == 2 and "none of the kernels listed" in err


def test_an_architecture_that_triton_does_not_know_is_no_fault_of_the_name(command) -> None:
    unknown = Row("(all Triton kernels)", "triton", 77, "Triton 3.9.0 knows no sm_77", known=False)
    code, out, _ = command("--arch", "77", "--only", "forward", rows=(unknown,))
    assert code == 0 and "knows no sm_77" in out


def test_no_triton_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["inspect"])
    with pytest.raises(SystemExit) as stop:
        inspect.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Triton is not installed" in err and "pip install torch" in err
