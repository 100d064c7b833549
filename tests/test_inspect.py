"""`python -m locfast.inspect`."""

import sys

import pytest

from locfast.inspect import main


def test_the_shapes_of_a_model_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect", "vit_tiny_patch16_224", "--image-size", "64"])
    main()
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    assert facts["tokens"] == "1 prefix + 16 patches = 17"
    assert facts["patches"] == "4 x 4 of 16 px"
    assert facts["blocks"] == "12 of width 192, 3 heads, mlp"
    assert facts["final norm"] == "eps 1e-06"
    assert facts["soft cap"] == "yes"


def test_an_unknown_model_ends_with_two(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect", "vit_tinny_patch16_224"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "did you mean 'vit_tiny_patch16_224'?" in capsys.readouterr().err
