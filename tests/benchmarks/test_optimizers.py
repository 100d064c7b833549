import json
import sys

import optimizers
import pytest
import torch


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["optimizers.py", "--device", "cpu", "--out", str(tmp_path)])
    optimizers.main()
    return {row["who"]: row for row in json.loads((tmp_path / "cpu" / "optimizers.json").read_text())["rows"]}


def test_every_form_has_a_time_and_apex_has_one_or_the_reason(table):
    for who in ("AdamW loop", "AdamW foreach", "AdamW fused", "clip loop", "clip foreach"):
        assert table[who]["ms"] is not None, table[who]["note"]
        assert table[who]["unit"] == "GB/s"
    for who in ("apex FusedAdam", "apex FusedLAMB"):
        assert table[who]["ms"] is not None or table[who]["note"]


def test_a_form_that_is_off_is_refused():
    weights = [torch.ones(4, 3), torch.ones(3)]
    right = optimizers.after_three_steps(lambda p: torch.optim.AdamW(p, **optimizers.SETTINGS), weights)
    wrong = optimizers.after_three_steps(
        lambda p: torch.optim.AdamW(p, **{**optimizers.SETTINGS, "weight_decay": 0.1}), weights
    )
    optimizers.assert_close(right, right)
    with pytest.raises(AssertionError, match="tensor 0 is off by"):
        optimizers.assert_close(wrong, right)


def test_the_shapes_are_those_of_timms_vit():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    shapes = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(optimizers.vit_shapes(*optimizers.CASES["ViT-B/16@224"])) == shapes
