"""A probe of real files: same seed, same figures; validation images choose nothing; a cache is whole or not there."""

import errno
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from locfast.data.labelled import open_labelled
from locfast.errors import UserError
from locfast.eval.probing import cache
from locfast.eval.probing.images import Images, whole_view
from locfast.eval.probing.results import Counts, ProbeResult, read_result
from locfast.eval.probing.run import probe_backbone
from locfast.eval.probing.scoring import summarise
from locfast.eval.probing.settings import Settings
from locfast.models.backbone import load_backbone
from tests.data.labelled_files import png, put
from tests.eval.labelled_folder import write_data

QUICK = Settings(heads=("linear",), tasks=("local",), epochs=3, batch_size=8, lr=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("labelled"))


def run(data: Path, out: Path, settings: Settings = QUICK, seed: int | None = None, **options) -> ProbeResult:
    backbone = load_backbone("demo", pretrained=seed is None, seed=seed or 0)
    splits = [open_labelled(str(data), split) for split in ("train", "validation")]
    device = torch.device("cpu")
    machine = {"device": "cpu"}
    options = {"workers": 0, "device": device, "precision": "fp32", "machine": machine, **options}
    return probe_backbone(backbone, None, "demo", *splits, settings, out, **options)


def same_figures(one: ProbeResult, other: ProbeResult) -> bool:
    return [replace(head, counts="") for head in one.heads] == [replace(head, counts="") for head in other.heads]


def test_a_probe_leaves_everything_that_its_figures_follow_from(data, tmp_path):
    settings = replace(QUICK, heads=("transformer", "linear"), tasks=("local", "global"), seeds=(0, 1))
    result = run(data, tmp_path, settings)
    assert read_result(tmp_path) == result
    assert result.images == {"train": 22, "selection": 2, "validation": 10}
    assert result.keys() == ["local/transformer", "local/linear", "global/transformer", "global/linear"]
    for head in result.heads:
        counts = Counts.read(tmp_path / head.counts)
        again = summarise(counts, [value or 0.0 for value in head.classes["ap"]])
        assert again.macro["recall"] == head.validation["recall"] and again.classes["f1"] == head.classes["f1"]
    shares = np.load(tmp_path / "shares.npz")["shares"]
    assert shares.shape == (10, 3) and np.allclose(shares.sum(1), 1)
    assert len(result.pictures) == 8
    picture = result.pictures[0]
    with Image.open(tmp_path / picture.image) as image:
        assert image.size == (48, 48)
    assert len(picture.truth) == len(picture.likeliest["linear"]) == 36


def test_the_same_seed_gives_the_same_figures_and_another_one_others(data, tmp_path):
    first, second = run(data, tmp_path / "a"), run(data, tmp_path / "b", workers=1)
    assert same_figures(first, second)
    other = run(data, tmp_path / "c", replace(QUICK, seeds=(1,)))
    assert not same_figures(first, replace(other, heads=[replace(head, seed=0) for head in other.heads]))


def test_validation_images_have_no_say_in_training_and_choice(data, tmp_path):
    other = write_data(tmp_path / "other", validation=4)
    for file in (other / "annotations/val").iterdir():  # and labels turned around
        Image.fromarray(2 - np.array(Image.open(file))).save(file)
    honest, fooled = run(data, tmp_path / "a"), run(other, tmp_path / "b")
    assert honest.heads[0].epochs == fooled.heads[0].epochs
    assert honest.heads[0].selection == fooled.heads[0].selection
    ours, theirs = (load_file(tmp_path / name / "heads/local-linear-0.safetensors") for name in "ab")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert honest.heads[0].validation != fooled.heads[0].validation


def test_images_held_out_are_trained_on_by_no_head(data, tmp_path):
    """Those of them that no file can be read of any more are missed by the choice alone."""
    settings = replace(QUICK, held_out=0.5)
    result = run(data, tmp_path / "a", settings)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    changed = write_data(tmp_path / "changed")
    names = sorted((changed / "annotations/train").iterdir())
    for row in order[:12].tolist():
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(names[row])
    again = run(changed, tmp_path / "b", settings)
    assert [epoch["loss"] for epoch in again.heads[0].epochs] == [epoch["loss"] for epoch in result.heads[0].epochs]
    assert again.heads[0].selection != result.heads[0].selection


def test_the_papers_protocol_trains_on_all_and_chooses_by_what_it_reports(data, tmp_path):
    result = run(data, tmp_path, replace(QUICK, protocol="paper"))
    assert result.images == {"train": 24, "selection": 10, "validation": 10}
    head = result.heads[0]
    assert head.selection == {name: head.validation[name] for name in ("recall", "precision", "f1")}
    assert head.validation["recall"] == max(epoch["selection"] for epoch in head.epochs)


def test_tokens_from_memory_and_from_a_cache_give_the_same_figures(data, tmp_path):
    lines: list[str] = []
    options = {"cache_folder": tmp_path / "cache", "tell": lines.append}
    memory = run(data, tmp_path / "a", keep="memory")
    written, read = (run(data, tmp_path / name, keep="cache", **options) for name in "bc")
    assert same_figures(memory, written) and same_figures(memory, read)
    assert ["written" in line for line in lines if "features" in line] == [True, True, False, False]
    live = run(data, tmp_path / "d", keep="live")
    # fp32 tokens instead of fp16 ones: a few patches near one half may change sides
    assert live.heads[0].validation["ap"] == pytest.approx(memory.heads[0].validation["ap"], abs=0.02)


def test_a_cache_of_other_weights_or_of_changed_images_is_not_used(data, tmp_path):
    lines: list[str] = []
    options = {"keep": "cache", "cache_folder": tmp_path / "cache", "tell": lines.append}
    own = write_data(tmp_path / "own")
    run(own, tmp_path / "a", **options)
    run(own, tmp_path / "b", seed=3, **options)
    run(own, tmp_path / "c", replace(QUICK, control="position"), **options)
    os.utime(own / "images/train/train3.jpg", ns=(1, 1))
    os.utime(own / "annotations/val/val3.png", ns=(1, 1))
    run(own, tmp_path / "d", **options)
    assert ["written" in line for line in lines if "features" in line] == [True] * 8


def test_models_that_differ_in_weights_heads_or_activation_have_caches_of_their_own():
    tiny = {"image_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
    names = ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224")
    models = [load_backbone(name, False, seed=1, **tiny) for name in (*names, names[0])]
    gelu, quick, again = models
    quick.load_state_dict(gelu.state_dict())
    other = load_backbone(names[0], False, seed=1, **{**tiny, "num_heads": 4})
    assert all(torch.equal(one, gelu.state_dict()[key]) for key, one in other.state_dict().items())
    assert cache.model_key(gelu) == cache.model_key(again)
    with torch.no_grad():
        again.model.cls_token += 1e-3
    assert len({cache.model_key(one) for one in (gelu, quick, again, other)}) == 4


@pytest.mark.parametrize("harm", ["cut tokens", "no mark", "cut labels", "killed"])
def test_an_interrupted_cache_is_not_taken_for_a_whole_one(data, tmp_path, harm, monkeypatch):
    lines: list[str] = []
    options = {"keep": "cache", "cache_folder": tmp_path / "cache", "tell": lines.append}
    first = run(data, tmp_path / "a", **options)
    folders = sorted((tmp_path / "cache").iterdir())
    for folder in folders:
        if harm == "cut tokens":
            os.truncate(folder / "tokens.npy", (folder / "tokens.npy").stat().st_size - 100)
        elif harm == "no mark":
            (folder / "whole.json").unlink()
        elif harm == "cut labels":
            os.truncate(folder / "labels.safetensors", 40)
        else:  # as a killed process leaves it
            folder.rename(folder.with_name(f".partial-{platform.node()}-{2**22 + 1}-{folder.name}"))
    again = run(data, tmp_path / "b", **options)
    assert sorted((tmp_path / "cache").iterdir()) == folders  # what was left of the first is gone
    assert same_figures(first, again)
    assert ["written" in line for line in lines if "features" in line] == [True] * 4


def test_a_changed_json_of_coco_has_a_cache_of_its_own(tmp_path):
    pytest.importorskip("pycocotools")
    image = {"id": 1, "file_name": "a.jpg", "height": 6, "width": 8}
    kinds = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    one = {"id": 1, "image_id": 1, "iscrowd": 0, "segmentation": [[1, 1, 5, 1, 5, 5]]}
    keys = []
    for kind in (1, 2):
        content = {"images": [image], "categories": kinds, "annotations": [{**one, "category_id": kind}]}
        put(tmp_path, {"val2017/a.jpg": png([[0] * 8] * 6), "annotations/instances_val2017.json": json.dumps(content)})
        for file in ("val2017/a.jpg", "annotations/instances_val2017.json"):
            os.utime(tmp_path / file, ns=(0, kind if file.endswith("json") else 0))
        split = open_labelled(str(tmp_path), "validation")
        view = whole_view((8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear")
        keys.append(Images(split, view, torch.device("cpu"), 0, None).key())
    assert keys[0] != keys[1]


def test_a_disk_without_room_for_the_tokens_is_told_before_they_are_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for tokens of 0.01 GB"):
        cache.Writer(tmp_path / "tokens", (100, 50, 1000))
    assert not list(tmp_path.iterdir())


def test_a_cache_takes_its_bytes_from_the_disk_at_once(tmp_path):
    writer = cache.Writer(tmp_path / "tokens", (100, 50, 100))
    assert (writer.aside / "tokens.npy").stat().st_blocks * 512 >= 100 * 50 * 100 * 2


def test_a_pass_that_fails_leaves_no_cache(tmp_path):
    bad = write_data(tmp_path / "bad")
    (bad / "images/val/val9.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"val9\.jpg"):
        run(bad, tmp_path / "out", keep="cache", cache_folder=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the training split, which was whole


def test_tokens_beyond_fp16_are_not_kept(data, tmp_path, monkeypatch):
    backbone = load_backbone("demo", False)
    with torch.no_grad():
        backbone.model.norm.weight.mul_(1e6)
    monkeypatch.setitem(globals(), "load_backbone", lambda *arguments, **options: backbone)
    with pytest.raises(UserError, match="--features live"):
        run(data, tmp_path, keep="memory")
    run(data, tmp_path, keep="live")


def test_tokens_that_say_nothing_are_at_the_floor(data, tmp_path):
    settings = replace(QUICK, epochs=12, batch_size=4, lr=3e-2)
    found = {
        control: run(data, tmp_path / control, replace(settings, control=control)).heads[0].validation["recall"]
        for control in ("none", "position")
    }
    # Three classes, each in a third of all patches: who knows no more never finds one likelier than not.
    assert found["none"] > 0.8 and found["position"] == 0, found
