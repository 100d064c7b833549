"""The loader: the same bits whatever the workers and the batch size, batches that keep their size, and clean ends."""

import logging
import multiprocessing
import random
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from locfast.data.geometry import apply_to_label_map
from locfast.data.loader import JOB_SIZE, Loader
from locfast.data.order import Order
from locfast.data.sources import ImageFolder, LabelledFolder, open_source
from locfast.data.spec import ImageSpec, Record, View
from locfast.errors import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIEW = View((32, 32), *IMAGENET, crop="zoom_center", interpolation="random", flip=True)
SPEC = ImageSpec({"image": VIEW})


def positions(first: int, batch: int, count: int):
    return (torch.arange(first + k * batch, first + (k + 1) * batch) for k in range(count))


def joined(batches) -> dict[str, torch.Tensor]:
    """All samples of some batches, in one tensor a field."""
    batches = list(batches)
    fields = {name: torch.cat([batch[name] for batch in batches]) for name in ("position", "epoch", "index")}
    for name in batches[0]["views"]:
        fields[name] = torch.cat([batch["views"][name] for batch in batches])
        for part in ("box", "inside", "flip", "source_size"):
            fields[f"{name}.{part}"] = torch.cat([getattr(batch["geometry"][name], part) for batch in batches])
    return fields


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_batch_holds_what_was_asked_for(folder):
    source = ImageFolder(folder(12))
    loader = Loader(source, SPEC, seed=3, workers=0)
    batch = next(loader.batches(positions(6, 4, 1)))
    epoch, index = Order(12, 3)(torch.arange(6, 10))
    assert batch["views"]["image"].shape == (4, 3, 32, 32)
    assert batch["views"]["image"].dtype == torch.float32
    assert batch["views"]["image"].is_contiguous()
    assert torch.equal(batch["position"], torch.arange(6, 10))
    assert torch.equal(batch["index"], index)
    assert torch.equal(batch["epoch"], epoch)
    assert "records" not in batch
    assert "label_map" not in batch


def test_pixels_are_normalised_as_torchvision_does(folder):
    source = ImageFolder(folder(3))
    plain = ImageSpec({"image": replace(VIEW, crop="squash", flip=False, mean=(0.0,) * 3, std=(1 / 255,) * 3)})
    wanted = ImageSpec({"image": replace(VIEW, crop="squash", flip=False)})
    (raw,) = Loader(source, plain, seed=0, workers=0).sequential(0, [torch.arange(3)])
    (made,) = Loader(source, wanted, seed=0, workers=0).sequential(0, [torch.arange(3)])
    pixels = raw["views"]["image"].round()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    assert torch.equal(made["views"]["image"], (pixels / 255 - mean) / std)


def test_workers_and_batch_size_change_no_bit(folder):
    """Three views, two of them coloured: 40 samples over the end of two epochs of 17."""
    source = ImageFolder(folder(17))
    color = replace(VIEW, color="rand-m9-mstd0.5-inc1", crop="random_resized")
    context = replace(VIEW, color="jitter-0.4-0.4-0.2-0.1+three", crop="simple_resized")
    spec = ImageSpec({"image": VIEW, "second": color, "context": context})
    base = joined(Loader(source, spec, seed=1, workers=0).batches(positions(0, 4, 10)))
    assert_equal(base, joined(Loader(source, spec, seed=1, workers=2).batches(positions(0, 8, 5))))
    assert not torch.equal(base["image"][:17], base["image"][17:34])
    again = joined(Loader(source, spec, seed=2, workers=0).batches(positions(0, 40, 1)))
    assert not torch.equal(base["index"], again["index"])


def test_a_batch_larger_than_a_job_comes_in_one_piece(folder):
    source = ImageFolder(folder(10))
    (batch,) = Loader(source, SPEC, seed=0, workers=2).batches(positions(0, 2 * JOB_SIZE + 3, 1))
    assert (
        len(batch["index"]) == len(batch["views"]["image"]) == len(batch["geometry"]["image"].box) == 2 * JOB_SIZE + 3
    )
    assert batch["position"].tolist() == list(range(2 * JOB_SIZE + 3))


def test_a_resume_jumps_to_where_an_unbroken_run_would_be(folder):
    source = ImageFolder(folder(17))
    unbroken = list(Loader(source, SPEC, seed=5, workers=0).batches(positions(0, 4, 9)))
    resumed = list(Loader(source, SPEC, seed=5, workers=2).batches(positions(6 * 4, 4, 3)))
    assert_equal(joined(unbroken[6:]), joined(resumed))


def test_two_ranks_see_what_one_sees(folder):
    source = ImageFolder(folder(17))
    one = joined(Loader(source, SPEC, seed=0, workers=0).batches(positions(0, 8, 3)))
    halves = [
        list(Loader(source, SPEC, seed=0, workers=0).batches(p[rank * 4 : rank * 4 + 4] for p in positions(0, 8, 3)))
        for rank in range(2)
    ]
    assert_equal(one, joined(batch for pair in zip(*halves, strict=True) for batch in pair))


def test_sequential_batches_keep_the_order_asked_for_and_draw_in_their_own_epoch(folder):
    source = ImageFolder(folder(9))
    loader = Loader(source, SPEC, seed=0, workers=0)
    indices = [torch.tensor([4, 2]), torch.tensor([8])]
    first = joined(loader.sequential(0xFFFFFFFF, indices))
    assert first["index"].tolist() == first["position"].tolist() == [4, 2, 8]
    assert first["epoch"].tolist() == [0xFFFFFFFF] * 3
    assert_equal(first, joined(loader.sequential(0xFFFFFFFF, indices)))
    assert not torch.equal(first["image"], joined(loader.sequential(0, indices))["image"])
    with pytest.raises(IndexError):
        next(loader.sequential(0, [torch.tensor([9])]))


def test_ten_damaged_files_among_a_hundred_are_replaced_named_and_counted(folder, damage, caplog):
    root = folder(100)
    bad = damage(root)
    source = ImageFolder(root)
    runs = []
    for workers, batch in ((0, 25), (2, 10)):
        caplog.clear()
        loader = Loader(source, SPEC, seed=0, workers=workers)
        with caplog.at_level(logging.WARNING, "locfast"):
            made = joined(loader.batches(positions(0, batch, 200 // batch)))
        assert made["image"].shape == (200, 3, 32, 32)
        assert made["image"].isfinite().all()
        assert not {source.name(i) for i in made["index"].tolist()} & set(bad)
        assert set(loader.replaced.names) == set(bad)
        assert loader.replaced.count == 20  # two epochs
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 10
        assert all(sum(name in message for message in messages) == 1 for name in bad)
        assert "so far 10 files" in messages[-1]
        runs.append((made, loader.state(), messages))
    assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_what_was_named_before_a_resume_is_not_named_again(folder, damage, caplog):
    root = folder(100)
    damage(root)
    first = Loader(ImageFolder(root), SPEC, seed=0, workers=0)
    list(first.batches(positions(0, 50, 2)))
    second = Loader(ImageFolder(root), SPEC, seed=0, workers=0)
    second.load_state(first.state())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "locfast"):
        list(second.batches(positions(100, 50, 2)))
    assert second.replaced.count == 20
    assert not caplog.records


def test_a_replacement_is_drawn_with_its_own_index(folder, damage):
    root = folder(100)
    bad = damage(root)
    source, loader = ImageFolder(root), Loader(ImageFolder(root), SPEC, seed=0, workers=0)
    order = Order(100, 0)
    asked = order(torch.arange(100))[1].tolist()
    place = next(p for p in range(100) if source.name(asked[p]) in bad)
    batch = next(loader.batches([torch.tensor([place])]))
    shown = batch["index"].item()
    assert shown == next(i for i in order.replacements(place) if source.name(i) not in bad)
    alone = next(loader.sequential(0, [torch.tensor([shown])]))
    assert torch.equal(batch["views"]["image"], alone["views"]["image"])


def test_a_source_without_any_readable_image_is_a_mistake_of_the_user(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(UserError, match="all|replacements"):
            next(Loader(ImageFolder(tmp_path), SPEC, seed=0, workers=workers).batches(positions(0, 4, 1)))


def test_label_maps_and_records_come_along(tmp_path, jpeg, encode):
    for kind in ("images", "annotations"):
        (tmp_path / kind).mkdir()
    maps = np.random.default_rng(0).integers(0, 9, (4, 48, 64), dtype=np.uint8)
    for i in range(4):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(jpeg(seed=i))
        (tmp_path / "annotations" / f"{i}.png").write_bytes(encode(_grey(maps[i]), "PNG"))
    spec = ImageSpec({"image": VIEW}, label_map=True, records=True)
    (batch,) = Loader(LabelledFolder(tmp_path), spec, seed=0, workers=1).sequential(7, [torch.arange(4)])
    for i in range(4):
        expected = apply_to_label_map(batch["geometry"]["image"], i, torch.from_numpy(maps[i]))
        assert torch.equal(batch["label_map"]["image"][i], expected)
        assert batch["records"][i] == Record(b"", str(tmp_path / "images" / f"{i}.jpg"))


def _grey(pixels):
    from PIL import Image

    return Image.fromarray(pixels)


def test_global_random_generators_are_left_alone(folder):
    spec = ImageSpec({"image": replace(VIEW, color="rand-m9-mstd0.5-inc1+jitter-0.4-0.4-0.2-0.1+three")})
    loader = Loader(ImageFolder(folder(8)), spec, seed=0, workers=0)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    list(loader.batches(positions(0, 8, 2)))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_a_bad_colour_policy_is_a_mistake_of_the_user(folder):
    with pytest.raises(UserError, match="rand-m9"):
        Loader(ImageFolder(folder(2)), ImageSpec({"image": replace(VIEW, color="rand-q9")}), seed=0, workers=0)


def wait_until(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_closing_an_iterator_ends_its_workers(folder):
    before = set(multiprocessing.active_children())
    batches = Loader(ImageFolder(folder(8)), SPEC, seed=0, workers=2).batches(positions(0, 4, 1000))
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    batches.close()
    assert wait_until(lambda: not any(worker.is_alive() for worker in workers))


KILLS = """
import multiprocessing, os, signal, sys
import torch
from locfast.cli import command
from locfast.data.loader import Loader, explain_dead_worker
from locfast.data.sources import ImageFolder
from locfast.data.spec import ImageSpec, View

@command
def main():
    spec = ImageSpec({"image": View((32, 32), (0.5,) * 3, (0.5,) * 3)})
    try:
        loader = Loader(ImageFolder(sys.argv[1]), spec, seed=0, workers=2)
        batches = loader.batches(torch.arange(4) for _ in range(10**6))
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in batches:
            pass
    except RuntimeError as error:  # torch tells wherever the main thread happens to be
        raise explain_dead_worker(error) or error from None

main()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_reaches_the_gpu_while_that_computes_and_holds_the_cpus_bits(folder, workers):
    source = ImageFolder(folder(12))
    wanted = joined(Loader(source, SPEC, seed=0, workers=0).batches(positions(0, 4, 3)))
    loader = Loader(source, SPEC, seed=0, workers=workers, device="cuda", decoder="cpu")
    batches = loader.batches(positions(0, 4, 3))
    made = [next(batches)]
    torch.cuda._sleep(20_000_000_000)  # ten seconds: the GPU is busy with the batch before
    done = torch.cuda.Event()
    done.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.append(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    copied = torch.cuda.Event()
    copied.record(loader._stream)
    copied.synchronize()
    assert not done.query()
    made += batches
    assert_equal(wanted, {name: value.cpu() for name, value in joined(made).items()})


def test_a_killed_worker_ends_the_run_with_one_message(folder):
    done = subprocess.run([sys.executable, "-c", KILLS, str(folder(8))], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "a decoding process (pid" in done.stderr
    assert "--workers 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_shards_and_their_folder_give_the_same_batches(tmp_path, folder, write_tar):
    root = folder(12)
    files = sorted(root.iterdir())
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", {file.name: file.read_bytes() for file in files[4 * i : 4 * i + 4]})
    one, other = open_source(str(root)), open_source(str(tmp_path / "{0..2}.tar"))
    assert_equal(
        joined(Loader(one, SPEC, seed=0, workers=0).batches(positions(0, 6, 3))),
        joined(Loader(other, SPEC, seed=0, workers=2, shuffle="full").batches(positions(0, 6, 3))),
    )


def test_original_photographs_all_load(shared):
    source = open_source(str(shared("photos_original")))
    loader = Loader(source, SPEC, seed=0, workers=2)
    made = joined(loader.sequential(0, torch.arange(len(source)).split(16)))
    assert made["image"].isfinite().all()
    assert len(made["image"]) == len(source) > 100
    assert loader.replaced.count == 0
    sides = made["image.source_size"]
    assert sides.min() < 100
    assert sides.max() > 1800


def test_street_scenes_bring_their_label_maps(shared):
    source = LabelledFolder(shared("camvid"), "val")
    spec = ImageSpec({"image": replace(VIEW, crop="center", flip=False)}, label_map=True)
    (batch,) = Loader(source, spec, seed=0, workers=0).sequential(0, [torch.arange(8)])
    ids = batch["label_map"]["image"].unique().tolist()
    assert len(source.classes) == 11
    assert set(ids) <= {*range(11), 255}
    assert len(ids) > 5
