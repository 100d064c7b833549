"""Contrastive fine-tuning with a stand-in for open_clip's text tower: what a machine without that package can run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locfast.engine.run import train
from locfast.kernels import _backend
from locfast.methods import clip
from tests.engine.toy import losses
from tests.methods.pairs import clip_config, write_pairs

WIDTH, LENGTH = 64, 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class StandIn(nn.Module):
    """The parts of an open_clip model that the method uses: a transformer over the bytes of a caption, and a scale."""

    def __init__(self, width: int, depth: int, joint: int) -> None:
        super().__init__()
        self.visual = nn.Identity()
        self.token_embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.text_projection = nn.Linear(width, joint)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.text_projection(x.mean(1))


def tokenize(texts: list[str]) -> Tensor:
    rows = [text.encode()[:LENGTH].ljust(LENGTH, b"\0") for text in texts]
    return torch.tensor([list(row) for row in rows])


@pytest.fixture
def stand_in(monkeypatch) -> None:
    def load(name: str, pretrained: str, *, seed: int, flags: Any) -> tuple[StandIn, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return StandIn(WIDTH, 2, 32), tokenize

    monkeypatch.setattr(clip, "load_open_clip", load)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_follow_the_curve_of_one_large_batch(stand_in, tmp_path, device, precision):
    def run(name: str, **fields: Any) -> dict[int, float]:
        own = {"learn_temperature": True, "temperature": 0.1}
        given: dict[str, Any] = {"model": "demo", "device": device, "precision": precision, "steps": 6, "clip": own}
        return losses(train(clip_config(data, "stand-in", tmp_path / name, **given, **fields)))

    data = write_pairs(tmp_path / "pairs")
    whole, rounds = run("whole"), run("rounds", micro_batch=2)
    assert len(whole) == 6
    assert min(whole.values()) > 1.5  # log 8 at the start; of two pairs it would be log 2
    # fp32: another order of sums. bf16: 8 bits an operation, and weights' gradients rounded a micro-batch at a time
    assert rounds == pytest.approx(whole, rel=1e-4 if precision == "fp32" else 0.02)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_the_fused_one_and_its_backends_agree(stand_in, tmp_path: Path):
    data = write_pairs(tmp_path / "pairs")
    given: dict[str, Any] = {"model": "demo", "device": "cuda", "precision": "fp32", "steps": 3}
    fused = losses(train(clip_config(data, "stand-in", tmp_path / "fused", kernels="triton", **given)))
    with _backend.use_backend("reference"):
        plain = losses(train(clip_config(data, "stand-in", tmp_path / "plain", **given)))
    assert fused == pytest.approx(plain, rel=1e-3)  # a temperature of 0.01 makes 100 of one rounding of a cosine
