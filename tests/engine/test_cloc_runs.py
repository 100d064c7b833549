"""What holds for the engine's toy method holds for CLOC: seeds, resume, ranks, micro-batches, bad input."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image

from locfast.config.base import TrainConfig
from locfast.config.cloc import ClocConfig, ClocOptim
from locfast.config.registry import make_config
from locfast.data.regions.shards import write_shard
from locfast.data.spec import Record, Region
from locfast.engine.run import train
from locfast.engine.run_folder import RunFolder
from locfast.eval.global_ability.features import evaluation_view
from locfast.export import export
from locfast.subject import open_subject
from tests.engine.processes import finish, kill_when, start, start_ranks
from tests.engine.test_loss_curve import RANKS_AGREE, STEPS
from tests.engine.toy import losses
from tests.methods.region_pairs import tiny_towers

pytest.importorskip("open_clip")

COLOURS = {"red": (220, 30, 30), "green": (20, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
PARTS = ("loss", "clip", "region", "grounding", "region_weight", "regions", "grad_norm")
COUNT = 24


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_regions(folder: Path, with_regions: bool = True, broken: bool = False) -> Path:
    """Two shards of JPEGs, none square: some coloured rectangles and what they are; every fourth has no region."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(COUNT):
        width, height = (60, 40) if number % 2 else (36, 64)
        pixels, regions = random.integers(0, 60, (height, width, 3), dtype=np.uint8), []
        for name in random.permutation(list(COLOURS))[: 1 + number % 3]:
            left, top = (int(random.integers(0, side - 16)) for side in (width, height))
            pixels[top : top + 14, left : left + 14] = COLOURS[name]
            regions.append(Region((left, top, left + 14, top + 14), f"a {name} thing"))
        if number == 5:
            regions.append(Region((float("nan"), 0, 1, 1), "no box"))
        caption = f"{' and '.join(region.text for region in regions)}, number {number}"
        found = tuple(regions) if with_regions and number % 4 else None
        image = b"\xff\xd8 cut off" if broken and number == 7 else jpeg(pixels)
        samples.append((f"{number:03}", "jpg", Record(image, text=caption, regions=found)))
    for shard in range(2):
        write_shard(folder / f"regions-{shard}.tar", samples[shard * COUNT // 2 : (shard + 1) * COUNT // 2])
    return folder


def cloc_config(data: Path, text: str, out: Path, cloc: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {"model": "open_clip", "data": str(data), "out": str(out), "val": "none"}
    settings |= {"device": "cpu", "workers": 0, "log_every": 1, "batch_size": 8, "steps": 4, "lr": 1e-3}
    own = ClocConfig(**{"text": text, "optim": ClocOptim(warmup_steps=0), **(cloc or {})})
    return make_config("cloc", **{**settings, **fields}, cloc=own)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cloc")
    return {"data": write_regions(folder / "shards"), "text": tiny_towers(folder)}


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(cloc_config(**given, out=tmp_path_factory.mktemp("alone") / "run", steps=STEPS))


def curves(run: Path) -> dict[str, list[float]]:
    entries = RunFolder(run).read_metrics()
    return {name: [entry[name] for entry in entries if name in entry] for name in PARTS}


def test_the_same_seed_gives_the_same_curves_bit_for_bit_and_another_seed_others(given, alone, tmp_path):
    again, other = (cloc_config(**given, out=tmp_path / str(s), steps=STEPS, seed=s) for s in (0, 1))
    assert curves(train(again)) == curves(alone)
    assert all(a != b for a, b in zip(curves(train(other))["loss"], curves(alone)["loss"], strict=True))
    assert 0 < sum(curves(alone)["region_weight"]) / STEPS < 1


def test_regions_and_boxes_are_learnt_in_a_few_epochs(given, tmp_path):
    cloc = {"region_temperature": 0.2, "temperature": 0.2}
    curve = curves(train(cloc_config(**given, out=tmp_path / "run", cloc=cloc, steps=120, lr=3e-3, batch_size=12)))
    for part, share in (("region", 0.8), ("grounding", 0.6), ("clip", 0.8)):
        first, last = (sum(curve[part][cut]) / 5 for cut in (slice(0, 5), slice(-5, None)))
        assert last < share * first, part


def test_a_run_killed_and_resumed_repeats_the_curves_bit_for_bit(given, tmp_path):
    settings = {"steps": STEPS, "save_every": 2, "micro_batch": 4}
    whole = train(cloc_config(**given, out=tmp_path / "whole", **settings))
    run = tmp_path / "run"
    process = start(cloc_config(**given, out=run, **settings), tmp_path / "out")
    assert kill_when(process, lambda: len(losses(run)) >= 7)
    assert 7 <= len(losses(run)) < STEPS
    train(cloc_config(**given, out=run, resume=True, **settings))
    assert curves(run) == curves(whole)


def agree(run: Path, other: Path) -> None:
    ours, theirs = curves(run), curves(other)
    assert len(ours["loss"]) == STEPS
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name], rel=RANKS_AGREE), name


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_give_the_curves_of_one_large_batch(given, alone, tmp_path, micro_batch):
    agree(train(cloc_config(**given, out=tmp_path / "run", steps=STEPS, micro_batch=micro_batch)), alone)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_two_ranks_give_the_curves_of_one(given, alone, tmp_path, micro_batch):
    config = cloc_config(**given, out=tmp_path / "two", steps=STEPS, micro_batch=micro_batch)
    assert finish(*start_ranks(config, tmp_path / "out", 2)) == [0, 0], (tmp_path / "out.0").read_text()
    agree(tmp_path / "two", alone)


def test_a_broken_image_is_replaced_and_named_and_held_out_losses_are_told(given, tmp_path):
    data = write_regions(tmp_path / "shards", broken=True)
    run = train(cloc_config(data, given["text"], tmp_path / "run", steps=6, val=str(given["data"]), max_bad=0.2))
    assert "007" in (run / "train.log").read_text()
    held = [entry for entry in RunFolder(run).read_metrics() if "val/loss" in entry]
    assert held and {"val/region", "val/grounding", "val/clip"} <= set(held[-1])


def test_held_out_images_may_all_be_without_regions(given, tmp_path):
    val = write_regions(tmp_path / "bare", with_regions=False)
    run = train(cloc_config(**{**given, "out": tmp_path / "run"}, steps=1, val=str(val)))
    (held,) = (entry for entry in RunFolder(run).read_metrics() if "val/loss" in entry)
    assert held["val/regions"] == 0 and held["val/loss"] == held["val/clip"] > 0


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda given, folder: {"data": write_regions(folder / "bare", with_regions=False)}, "region"),
        (lambda given, folder: {"text": "ViT-B-61"}, "--cloc.text ViT-B-61: open_clip .* has no such model"),
        (
            lambda given, folder: {"cloc": {"init": "pretrained", "text_pretrained": "opennai"}},
            "--cloc.text-pretrained opennai: neither",
        ),
        (lambda given, folder: {"batch_size": 1}, "--batch-size 1"),
    ],
    ids=["no regions", "no such tower", "no such weights", "one image"],
)
def test_what_cannot_be_trained_is_told_in_one_message(given, tmp_path, make, told):
    config = cloc_config(**{**given, "out": tmp_path / "run", **make(given, tmp_path)})
    assert finish(start(config, tmp_path / "out")) == [2]
    output = " ".join((tmp_path / "out").read_text().split())
    assert re.search(told, output), output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_and_its_export_are_judged_on_padded_images_as_they_were_trained(given, tmp_path):
    run = train(cloc_config(**given, out=tmp_path / "run", steps=1))
    export(run, tmp_path / "timm", ema=None)
    plain = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    told = timm.data.resolve_model_data_config(plain)
    assert (told["crop_mode"], told["crop_pct"]) == ("border", 1.0)
    for name in (run, tmp_path / "timm"):
        view = evaluation_view(open_subject(str(name)).backbone)
        assert (view.crop, view.crop_pct) == ("pad", 1.0)
    other = train(cloc_config(**given, out=tmp_path / "other", steps=1, cloc={"crop": "random_resized"}))
    assert evaluation_view(open_subject(str(other)).backbone).crop == "center"
