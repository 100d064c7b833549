"""`--compile` compiles each kind of block once, in the first step, and changes no number beyond rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from locfast.config.maskembed import MaskEmbedConfig
from locfast.config.registry import make_config
from locfast.engine import loop
from locfast.engine.run import train
from locfast.methods import create_method
from locfast.models import compiled
from locfast.models.blocks import is_known_block
from tests.engine.test_loss_curve import RANKS_AGREE
from tests.engine.toy import losses

KINDS = 7
"""First, middle and last block of the teacher (no gradient), middle and last of the capped encoder, first and last of
the decoder: all but the last end with the norm of the next, and the first one over views has a form of its own."""


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """aot_eager traces as inductor does, and then runs PyTorch's own kernels: seconds instead of minutes."""
    monkeypatch.setattr(compiled, "BACKEND", request.param)
    compiled.compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield request.param
    compiled.compiled.cache_clear()
    torch._dynamo.reset()


def _config(out: Path, **fields: object):
    few = {"data": "demo:12", "val": "none", "batch_size": 4, "steps": 4, "log_every": 1}
    return make_config("maskembed", out=str(out), device="cpu", workers=0, **few, **fields)


def test_nothing_is_compiled_after_the_first_step_and_the_curve_is_that_of_eager(backend, tmp_path, monkeypatch):
    eager = losses(train(_config(tmp_path / "eager")))
    assert not counters["stats"]
    graphs, step = [], loop.Trainer.train_step

    def counted(self, number, batches):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            step(self, number, batches)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(loop.Trainer, "train_step", counted)
    found = losses(train(_config(tmp_path / "run", compile=True)))
    assert graphs == [KINDS] * 4
    assert not counters["graph_break"]
    assert found == pytest.approx(eager, rel=RANKS_AGREE)


def test_state_dict_keys_stay_and_every_block_is_compiled(backend):
    method = create_method("maskembed", MaskEmbedConfig(), model="demo", pretrained=False, seed=0)
    before = list(method.state_dict())
    count = compiled.compile_blocks(method, is_known_block)
    assert list(method.state_dict()) == before
    blocks = [*method.teacher.blocks, *method.encoder.blocks, *method.decoder.blocks]
    assert count == len(blocks) > KINDS  # each once, though timm's model and the backbone around it both hold it
    assert all(block.compiled for block in blocks)
