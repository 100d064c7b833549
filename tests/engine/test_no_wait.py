"""A training step queues its work and waits for none of it: neither numbers nor shapes come back from the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from locfast.config.maskembed import MaskEmbedConfig
from locfast.config.registry import make_config
from locfast.engine import loop, optim
from locfast.engine.reading import Reading
from locfast.engine.run import train
from tests.engine import processes
from tests.engine.test_nonfinite import POISONED, _stopped
from tests.engine.toy import ToyConfig, losses, toy_config

WAITS = {"_local_scalar_dense", "item", "equal", "nonzero", "masked_select", "unique_dim", "unique_consecutive"}
WAITS |= {"_unique2", "unique", "is_nonzero", "argwhere", "repeat_interleave", "allclose", "bincount"}


class Watch(TorchDispatchMode):
    """Notes what would make the host wait for a GPU: values read, shapes that depend on values, copies to a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.ops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops += 1
        name = function.overloadpacket.__name__
        indices = [i for i in (args[1] if name in ("index", "index_put", "index_put_") else ()) if i is not None]
        if name in WAITS or any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fused_everywhere(monkeypatch):
    """The optimiser that a GPU gets; a CPU has that kernel too."""
    monkeypatch.setattr(optim, "FUSED_ON", ("cuda", "cpu"))


def demo(out: Path, **fields: object):
    few = {"data": "demo:12", "val": "none", "batch_size": 4, "steps": 3, "log_every": 100, "ema": 0.5}
    return make_config("maskembed", out=str(out), workers=0, **{"device": "cpu", "save_every": 100, **few, **fields})


@pytest.mark.parametrize(
    "maskembed",
    [{}, {"masking": "bernoulli"}, {"masking": "block"}, {"loss_on": "hidden"}, {"loss_on": "visible"}],
    ids=["default", "bernoulli", "block", "hidden patches", "visible patches"],
)
def test_a_step_of_maskembed_reads_no_value(maskembed, tmp_path, monkeypatch, fused_everywhere):
    watch, step = Watch(), loop.Trainer.train_step

    def watched(self, number, batches):
        batches = iter([next(batches)])  # decoding is the host's own work
        with watch if number == 1 else torch.no_grad():
            torch.set_grad_enabled(True)
            step(self, number, batches)

    monkeypatch.setattr(loop.Trainer, "train_step", watched)
    train(demo(tmp_path / "run", maskembed=MaskEmbedConfig(**maskembed)))
    assert watch.ops > 500
    assert watch.seen == []


def test_the_watch_sees_what_waits():
    x = torch.arange(4.0)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.unique(),
        lambda: x.masked_select(x > 1),
    ):
        with Watch() as watch:
            wait()
        assert watch.seen != []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_nothing_on_a_gpu(tmp_path, monkeypatch):
    step = loop.Trainer.train_step

    def strict(self, number, batches):
        # the first step compiles kernels, allocates and counts FLOPs
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            step(self, number, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Trainer, "train_step", strict)
    assert len(losses(train(demo(tmp_path / "run", device="cuda")))) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_reading_waits_for_what_was_queued_before_it_alone():
    numbers = torch.arange(3.0, device="cuda", dtype=torch.float64)
    reading = Reading(numbers)
    torch.cuda._sleep(2_000_000_000)  # a second or more
    behind = torch.cuda.Event()
    behind.record()
    assert reading.values() == [0.0, 1.0, 2.0]
    assert not behind.query()


def test_a_curve_is_the_same_whether_every_step_is_told_or_none(images, tmp_path, fused_everywhere):
    every = train(toy_config(images, tmp_path / "every", steps=6, ema=0.5))
    none = train(toy_config(images, tmp_path / "none", steps=6, ema=0.5, log_every=100))
    assert {step: losses(every)[step] for step in (1, 6)} == losses(none)
    one, other = (run / "checkpoints/step-00000006" for run in (every, none))
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (other / file.name).read_bytes()


@pytest.mark.parametrize("told", [1, 100])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_gated_update_leaves_weights_state_and_average_as_they_were(
    images, tmp_path, monkeypatch, fused_everywhere, gradient, told
):
    monkeypatch.setattr("tests.engine.test_nonfinite.SETTINGS", {"ema": 0.5, "log_every": told})
    message, saved = _stopped(images, tmp_path / "run", poison_gradient=gradient)
    assert f"Image indices {POISONED} " in message
    found = loop.checkpoint.read(saved)
    assert found.step > 1
    settings = {"steps": 6, "save_every": found.step, "ema": 0.5, "log_every": told}
    sound = train(toy_config(images, tmp_path / "sound", **settings))
    expected = loop.checkpoint.read(sound / "checkpoints" / saved.name)
    for name in ("model", "optimizer", "ema"):
        for key, tensor in expected.tensors(name).items():
            assert torch.equal(found.tensors(name)[key], tensor), (name, key)


def _train_fused(*arguments) -> None:
    optim.FUSED_ON = ("cpu",)
    processes._train(*arguments)


def test_two_ranks_learn_of_a_step_that_is_not_finite_at_the_same_moment(images, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_train", _train_fused)
    config = toy_config(images, tmp_path / "run", ToyConfig(poison=POISONED), steps=6, micro_batch=2, log_every=100)
    assert processes.finish(*processes.start_ranks(config, tmp_path / "out", 2)) == [2, 2]
    told = (tmp_path / "out.0").read_text()
    assert f"Image indices {POISONED} " in told
    assert "Traceback" not in told + (tmp_path / "out.1").read_text()
    (saved,) = (tmp_path / "run/nonfinite").glob("step-*")
    found = loop.checkpoint.read(saved)
    assert any(name.startswith("exp_avg/") for name in found.tensors("optimizer"))
    assert all(bool(t.isfinite().all()) for name in ("model", "optimizer") for t in found.tensors(name).values())
