"""The engine's small parts: schedule, optimiser state, moving average, device, trackers, FLOPs, progress."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from locfast.config.base import OptimConfig
from locfast.engine import checkpoint, precision
from locfast.engine.ema import Average
from locfast.engine.flops import ceiling, count_flops
from locfast.engine.optim import build_optimizer, load_state_tensors, set_learning_rate, state_tensors
from locfast.engine.progress import Display, Meter
from locfast.engine.run import train
from locfast.engine.run_folder import RunFolder
from locfast.engine.schedule import Plan, learning_rate
from locfast.engine.trackers import open_trackers
from locfast.errors import UserError
from locfast.methods import create_method
from tests.engine.toy import SIDE, Toy, ToyConfig, toy_config


def _toy(**settings: object) -> Toy:
    return create_method("toy", ToyConfig(optim=OptimConfig(**settings)), model="small", pretrained=True, seed=0)


def _step(method: Toy, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(4, 3 * SIDE * SIDE, dtype=torch.bool)
    method({"views": {"image": images}, "index": torch.arange(4)}, keep)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 12), (1, 3), (2, 6), (2, 2), (3, 4), (4, 1)])
def test_every_position_of_a_step_is_taken_once(ranks, micro_batch):
    plans = [Plan.of(100, 12, micro_batch, ranks, rank, steps=5) for rank in range(ranks)]
    parts = [list(plan.micro_batches(2)) for plan in plans]
    for step in range(3):
        rounds = plans[0].accumulation
        taken = torch.cat([m for part in parts for m in part[step * rounds : (step + 1) * rounds]])
        assert sorted(taken.tolist()) == list(range((step + 2) * 12, (step + 3) * 12))


@pytest.mark.parametrize(
    ("batch", "micro_batch", "ranks", "told"),
    [(10, None, 4, "--batch-size 8 or 12"), (3, None, 4, "--batch-size 4"), (24, 5, 2, "--micro-batch 4")],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch, micro_batch, ranks, told):
    with pytest.raises(UserError, match=told):
        Plan.of(100, batch, micro_batch, ranks, steps=1)


def test_epochs_become_steps_and_end_where_the_data_ends():
    plan = Plan.of(100, 8, None, epochs=2.0)
    assert plan.steps == 25
    assert [step for step in range(1, 26) if plan.ends_epoch(step)] == [13, 25]


def test_the_cosine_starts_at_the_peak_and_ends_at_its_ratio():
    rates = [learning_rate(step, 100, 2.0, 0, 0.1) for step in range(101)]
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(1.1)
    assert rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_warm_up_is_linear_and_reaches_the_peak():
    rates = [learning_rate(step, 100, 1.0, 10, 0.0) for step in range(12)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0 > rates[11]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "adafactor"])
def test_optimiser_state_goes_through_a_checkpoint_bit_for_bit(tmp_path, name):
    straight, resumed = _toy(name=name), _toy(name=name)
    optimizer = build_optimizer(straight, straight.optim, 1e-2)
    for seed in range(3):
        _step(straight, optimizer, seed)
    tensors, plain = state_tensors(optimizer, straight)
    folder = checkpoint.save(tmp_path, 3, {"model": straight.training_state(), "optimizer": tensors}, {"plain": plain})
    found = checkpoint.read(folder)
    checkpoint.restore(resumed, {**resumed.frozen_state(), **found.tensors("model")}, folder)
    again = build_optimizer(resumed, resumed.optim, 1e-2)
    load_state_tensors(again, resumed, found.tensors("optimizer"), found.state["plain"])
    for seed in (3, 4):
        _step(straight, optimizer, seed)
        _step(resumed, again, seed)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_unknown_optimisers_and_impossible_settings_are_told():
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        build_optimizer(method := _toy(name="adamww"), method.optim, 1e-3)
    with pytest.raises(UserError, match="does not take"):
        build_optimizer(method := _toy(eps=-1.0), method.optim, 1e-3)


def test_a_group_keeps_its_own_scale_of_the_learning_rate():
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr_scale": 0.5}, {"params": weights[1:]}], lr=1.0)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_the_average_follows_the_weights_and_leaves_them_alone():
    method = _toy()
    weight = method.student[0].weight
    first = weight.detach().clone()
    average = Average(method, decay=0.75)
    with torch.no_grad():
        weight.add_(1.0)
    average.update()
    expected = first + 0.25
    torch.testing.assert_close(average.tensors["student.0.weight"], expected)
    with average.in_place():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, first + 1.0)
    assert "teacher.weight" not in average.tensors


@pytest.mark.parametrize("asked", ["gpu0", "tpu:0", "cpux", "meta"])
def test_a_device_that_locfast_does_not_know_is_refused(asked):
    with pytest.raises(UserError, match="locfast trains on cpu, cuda or cuda:NUMBER"):
        precision.pick_device(asked)


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="no such device"):
        precision.pick_device("cuda:99")


def test_on_a_cpu_mkl_keeps_its_threads_and_its_bits():
    """In a process of its own: this one has set its threads, as pytest began."""
    program = """
import ctypes, os, torch
from locfast.engine.precision import pick_device

library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
chooses = getattr(library, "mkl_serv_get_dynamic", None)
print(chooses() if chooses else 1)
pick_device("cpu")
print(chooses() if chooses else 0, os.environ["MKL_CBWR"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0", "AUTO,STRICT"]


def test_precision_is_fp32_on_the_cpu_unless_asked():
    cpu = torch.device("cpu")
    assert precision.pick_precision("auto", cpu) == "fp32"
    assert precision.pick_precision("bf16", cpu) == "bf16"
    with precision.autocast(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_without_its_package_is_told_before_training(images, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails as if it were not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f"--track {name}.*pip install {name}"):
        train(toy_config(images, tmp_path / "run", steps=1, track=(name,)))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(("tensorboard",), tmp_path, {}, 0)
    for step in (1, 2):
        tracker.write(step, {"loss": 1.0 / step, "lr": 0.1})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [1.0, 0.5]


def test_flops_are_counted_without_touching_gradients():
    method = _toy()
    batch = {"views": {"image": torch.randn(4, 3, SIDE, SIDE)}, "index": torch.arange(4)}
    flops = count_flops(method, batch, torch.ones(4, 3 * SIDE * SIDE, dtype=torch.bool), "fp32")
    inputs, width, outputs = 3 * SIDE * SIDE, 16, 8
    forward = 2 * 4 * (inputs * width + width * outputs + inputs * outputs)
    # backward: gradients of both trained layers' weights, and of what lies between them; none of the frozen layer
    assert flops == forward + 2 * 4 * (inputs * width + 2 * width * outputs)
    assert all(parameter.grad is None for parameter in method.parameters())
    assert ceiling(torch.device("cpu"), "fp32") is None


def test_a_terminal_sees_a_bar_and_a_file_does_not(tmp_path):
    plan = Plan.of(100, 10, None, steps=4)
    for terminal in (True, False):
        with open(tmp_path / f"{terminal}", "w+") as file:
            console = Console(file=file, force_terminal=terminal, width=100)
            with Display(plan, console, enabled=True) as display:
                display.advance(2)
                display.bar.refresh()
            file.seek(0)
            assert ("2/4" in file.read()) is terminal


def test_validation_and_saving_are_no_training_time():
    meter = Meter(Plan.of(100, 10, None, steps=4), torch.device("cpu"), None)
    meter.start(0)
    with meter.paused():
        until = time.perf_counter() + 0.2
        while time.perf_counter() < until:
            pass
    assert meter.read(2)["images_per_second"] > 2 * 10 / 0.2


def test_held_out_images_are_never_trained_on_and_judged_the_same_way_each_time(images, tmp_path):
    # at this learning rate the weights stand still: the held-out loss then shows its own noise, of which it has none
    run = train(toy_config(images, tmp_path / "run", val=None, steps=13, lr=1e-30, ema=0.5))
    entries = RunFolder(run).read_metrics()
    judged = [entry for entry in entries if "val/loss" in entry]
    assert [entry["step"] for entry in judged] == [6, 12, 13]  # 47 images, 8 a step: an epoch ends inside step 6 and 12
    assert len({entry["val/loss"] for entry in judged}) == 1
    assert judged[0]["val_ema/loss"] == judged[0]["val/loss"]
    assert len({entry["loss"] for entry in entries if "loss" in entry}) == 13
    assert "47 images, 1 held out" in (run / "train.log").read_text()


def test_the_first_step_and_the_last_are_always_logged(images, tmp_path):
    run = train(toy_config(images, tmp_path / "run", steps=11, log_every=4))
    assert [entry["step"] for entry in RunFolder(run).read_metrics()] == [1, 4, 8, 11]


def test_deterministic_runs_where_nothing_is_random(images, tmp_path):
    try:
        run = train(toy_config(images, tmp_path / "run", steps=2, deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert math.isfinite(RunFolder(run).read_metrics()[-1]["loss"])
