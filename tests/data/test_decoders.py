"""Device decoders: whichever runs, the same images come in the same order with the same crops.

DALI runs here on the CPU, by the pipeline that a GPU runs too; what nvJPEG's pixels go through, on libjpeg-turbo's.
"""

import gc
import io
import logging
import multiprocessing
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locfast.data.crop import draw_numbers, plan
from locfast.data.decode import check, choice
from locfast.data.decode.cpu import CpuDecoder
from locfast.data.decode.device import BatchFailed, DeviceDecoder, Encoded, Unavailable, why_not
from locfast.data.decode.nvjpeg import TorchvisionDecoder
from locfast.data.loader import Loader
from locfast.data.reader import REFUSED
from locfast.data.sources import open_source
from locfast.data.spec import ImageSpec, View
from locfast.engine.run import train
from locfast.errors import UserError
from locfast.random import Keys
from tests.engine.toy import losses, toy_config

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)
POLICIES = {
    "center": View((224, 224), HALF, HALF, crop_pct=0.9),
    "zoom_center": View((224, 224), HALF, HALF, crop="zoom_center", interpolation="random", flip=True),
    "random_resized": View((224, 160), HALF, HALF, crop="random_resized", flip=True),
    "simple_resized": View((224, 224), HALF, HALF, crop="simple_resized", flip=True),
    "squash": View((96, 128), HALF, HALF, crop="squash", interpolation="lanczos"),
    "pad": View((224, 160), HALF, HALF, crop="pad", flip=True),
}
WITHIN = {"dali": 0.35, "torchvision": 0.05}
"""Mean difference of a view from the CPU decoder's, over photographs, in levels of 255. The JPEG library is the same
here; what is left is the resizing: PIL rounds to 8 bits between rows and columns and DALI does not, which alone makes
0.18 levels (bicubic) and 0.12 (bilinear), and the filters' own weights have 8 to 16 bits. Bilinear and bicubic filters
differ by 1.6 levels in such views, a view one pixel beside its place by 9.5 (last test of this file)."""


def make(name: str, spec: ImageSpec) -> DeviceDecoder:
    if name == "torchvision":
        return TorchvisionDecoder(spec, CPU)
    pytest.importorskip("nvidia.dali")
    return choice.MAKERS[name](spec, CPU)


decoders = pytest.mark.parametrize("name", WITHIN)


def planned(spec: ImageSpec, files: list[bytes]) -> tuple[list[Encoded], dict[str, torch.Tensor]]:
    """Files as workers hand them on, and the views that the CPU decoder makes of them, in levels."""
    keys = Keys(3, torch.zeros(len(files), dtype=torch.int64), torch.arange(len(files)))
    numbers = {name: draw_numbers(view, name, keys) for name, view in spec.views.items()}
    images, views = [], []
    for i, data in enumerate(files):
        picture = CpuDecoder().open(data)
        plans = {name: plan(view, picture.size, numbers[name][i].tolist()) for name, view in spec.views.items()}
        images.append(Encoded(torch.frombuffer(bytearray(data), dtype=torch.uint8), picture.size, picture.turn, plans))
        views.append(picture.render(list(plans.values())))
    expected = {
        name: torch.stack([torch.from_numpy(each[place].copy()) for each in views]).permute(0, 3, 1, 2)
        for place, name in enumerate(spec.views)
    }
    return images, expected


def levels(views: torch.Tensor) -> torch.Tensor:
    return (views * 0.5 + 0.5) * 255


def photographs(shared, count: int) -> list[bytes]:
    """Those that device decoders are given, of all sizes."""
    files = [path.read_bytes() for path in sorted(shared("photos_original").iterdir())]
    given = [data for data in files if not why_not(CpuDecoder().open(data))]
    assert len(given) > 0.9 * len(files)
    return given[:count]


@decoders
@pytest.mark.parametrize("policy", POLICIES)
def test_decoders_agree_on_photographs(shared, name, policy):
    spec = ImageSpec({"image": POLICIES[policy]})
    images, expected = planned(spec, photographs(shared, 12))
    decoder = make(name, spec)
    decoder.begin(images)
    off = (levels(decoder.end()["image"]) - expected["image"]).abs().mean((1, 2, 3))
    # a large photograph that is shown small is decoded at a fraction on the CPU, and in full elsewhere
    drafted = torch.tensor([image.plans["image"].shrink >= 4 for image in images])
    assert off[~drafted].max() <= WITHIN[name] * 2
    assert off[~drafted].mean() <= WITHIN[name]
    assert (off[drafted] < 1).all()


@decoders
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (30, 20), (20, 31), (257, 256), (9, 900), (900, 3), (64, 96)])
@pytest.mark.parametrize("wanted", [(96, 96), (64, 97), (97, 64)])
def test_decoders_pad_to_the_same_place_and_colour(picture, encode, name, orientation, size, wanted):
    """Larger and smaller images than the view, wide and tall, with an odd and an even number of pixels around them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    mean, std = (0.31, 0.5, 0.72), (0.2, 0.3, 0.25)
    spec = ImageSpec({"image": View(wanted, mean, std, crop="pad", flip=True)})
    images, expected = planned(spec, [encode(picture(*size, i), quality=95, exif=exif) for i in range(6)])
    assert {image.plans["image"].flip for image in images} == {True, False}
    decoder = make(name, spec)
    decoder.begin(images)
    views = decoder.end()["image"]
    for image, view, pixels in zip(images, views, expected["image"], strict=True):
        made = image.plans["image"]
        x0, y0, x1, y1 = made.inside
        if made.flip:
            x0, x1 = wanted[1] - x1, wanted[1] - x0
        around = torch.ones(wanted, dtype=torch.bool)
        around[y0:y1, x0:x1] = False
        found = (view * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)) * 255
        if min(size) > 9:  # of a line of pixels a decoder's filter and the CPU's, which may be given 1/4, have little
            drafted = made.shrink >= 4
            assert (found - pixels)[:, ~around].abs().mean() <= (1 if drafted else WITHIN[name] * 2)
        assert (found - torch.tensor([79, 128, 184]).view(3, 1, 1))[:, around].abs().sum() < 1e-3 * around.sum() + 1e-9
        assert (pixels[:, around] == torch.tensor([[79], [128], [184]])).all()
        # half a level, in standard deviations
        assert not around.any() or view[:, around].abs().max() < 0.51 / 255 / min(std)


@decoders
def test_two_views_of_an_image_come_from_one_decoding(shared, name):
    spec = ImageSpec({"wide": POLICIES["center"], "close": POLICIES["random_resized"]})
    images, expected = planned(spec, photographs(shared, 4))
    decoder = make(name, spec)
    decoder.begin(images)
    views = decoder.end()
    for view in spec.views:
        assert (levels(views[view]) - expected[view]).abs().mean() <= WITHIN[name]


@decoders
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_stand_upright(picture, encode, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    spec = ImageSpec({"image": POLICIES["random_resized"]})
    images, expected = planned(spec, [encode(picture(300, 200, i), quality=95, exif=exif) for i in range(2)])
    decoder = make(name, spec)
    decoder.begin(images)
    assert (levels(decoder.end()["image"]) - expected["image"]).abs().mean() <= WITHIN[name]


def exif(order: str, kind: int, orientation: int) -> bytes:
    """An EXIF segment with one entry: 16 bits (kind 3) or 32 (4), in Intel's ("<") or Motorola's (">") order."""
    value = struct.pack(f"{order}HH", orientation, 0) if kind == 3 else struct.pack(f"{order}I", orientation)
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    block = b"Exif\0\0" + start + struct.pack(f"{order}HHHI", 1, 0x0112, kind, 1) + value + bytes(4)
    return b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block


XMP = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="3"/>'
MARKS = {
    "xmp": b"\xff\xe1" + struct.pack(">H", len(XMP) + 2) + XMP,
    "32 bits, Motorola": exif(">", 4, 3),
    "two": exif("<", 3, 3) + exif("<", 3, 1),
    "broken": exif("<", 3, 3)[:-14].replace(struct.pack(">H", 34), struct.pack(">H", 20)),
}


@pytest.mark.parametrize("mark", MARKS)
def test_an_orientation_that_readers_see_differently_is_left_to_the_cpu(jpeg, mark):
    plain = jpeg(60, 50)
    picture = CpuDecoder().open(plain[:2] + MARKS[mark] + plain[2:])
    assert why_not(picture) == "JPEG with an unusual mark of its orientation"


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("order", "<>")
def test_a_plain_mark_of_the_orientation_is_handed_on(jpeg, order, orientation):
    plain = jpeg(60, 50)
    assert why_not(CpuDecoder().open(plain[:2] + exif(order, 3, orientation) + plain[2:])) == ""


@decoders
def test_two_batches_may_be_under_way_and_end_in_order(jpeg, name):
    spec = ImageSpec({"image": POLICIES["center"]})
    images, expected = planned(spec, [jpeg(300, 250, seed) for seed in range(7)])
    decoder = make(name, spec)
    decoder.begin(images[:2])
    decoder.begin(images[2:6])
    first = decoder.end()["image"]
    decoder.begin(images[6:])
    rest = [decoder.end()["image"], decoder.end()["image"]]
    together = levels(torch.cat([first, *rest]))
    assert (together - expected["image"]).abs().mean() <= WITHIN[name]


@decoders
def test_a_batch_that_fails_takes_no_other_with_it(jpeg, name):
    spec = ImageSpec({"image": POLICIES["center"]})
    images, expected = planned(spec, [jpeg(300, 250, seed) for seed in range(4)])
    cut_off = Encoded(images[0].data[: len(images[0].data) // 2], images[0].size, images[0].turn, images[0].plans)
    decoder = make(name, spec)
    decoder.begin([cut_off, images[1]])
    decoder.begin(images[2:])
    with pytest.raises(BatchFailed, match="sample #0|[Jj]peg|[Ii]mage") as failure:
        decoder.end()
    assert "pipeline object" not in str(failure.value)
    decoder.begin(images[:2])
    for rows in (slice(2, 4), slice(0, 2)):
        assert (levels(decoder.end()["image"]) - expected["image"][rows]).abs().mean() <= WITHIN[name]


@decoders
def test_a_decoder_that_agrees_passes_the_test_of_auto(name):
    for view in POLICIES.values():
        spec = ImageSpec({"image": view})
        assert check.difference(make(name, spec), spec) is None


@decoders
def test_a_decoder_that_lies_beside_its_place_does_not(name):
    spec = ImageSpec({"image": POLICIES["center"]})
    decoder = make(name, spec)
    right = decoder.end
    decoder.end = lambda: {view: pixels.roll(1, -1) for view, pixels in right().items()}
    assert "levels off the CPU's" in check.difference(decoder, spec)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dali", "nvjpeg"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_agrees_with_the_cpu_on_photographs(shared, name, policy):
    """By the limit that auto has: what a GPU makes of the JPEG itself, of its chroma above all, comes on top."""
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    spec = ImageSpec({"image": POLICIES[policy]})
    images, expected = planned(spec, photographs(shared, 12))
    decoder = choice.MAKERS[name](spec, torch.device("cuda"))
    decoder.begin(images)
    off = (levels(decoder.end()["image"].cpu()) - expected["image"]).abs().mean((1, 2, 3))
    assert off.mean() < check.LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dali", "nvjpeg"])
def test_batches_decoded_on_a_gpu_stay_as_they_are_while_the_next_ones_come(mixed, name):
    """Held until all have come, and read by a kernel that is queued behind long work: memory must not be used again."""
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    spec = ImageSpec({"image": View((224, 224), HALF, HALF, crop="random_resized", flip=True)})
    stream = [torch.arange(start, start + 13) for start in range(0, 13 * 8, 13)]
    on_cpu, on_gpu = (
        Loader(open_source(str(mixed)), spec, seed=1, workers=1, decoder=decoder, device=device)
        for decoder, device in (("cpu", "cpu"), (name, "cuda"))
    )
    busy, sums = torch.randn(4096, 4096, device="cuda"), []
    for batch in on_gpu.batches(stream):
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        sums.append((batch["index"], batch["views"]["image"].double().mean((1, 2, 3)) + 0 * busy[0, 0]))
    for (index, mean), batch in zip(sums, on_cpu.batches(stream), strict=True):
        assert torch.equal(index.cpu(), batch["index"])
        assert (mean.cpu() - batch["views"]["image"].double().mean((1, 2, 3))).abs().max() < 0.02


@pytest.fixture
def mixed(tmp_path, picture, encode, jpeg) -> Path:
    """A folder of what turns up: most are plain JPEGs, some no GPU decoder reads, some nothing reads."""
    root = tmp_path / "mixed"
    root.mkdir()
    for i in range(20):
        (root / f"{i:02}.jpg").write_bytes(jpeg(60 + i, 50 + 2 * i, i))
    (root / "20.png").write_bytes(encode(picture(70, 60, 20), "PNG"))
    (root / "21.webp").write_bytes(encode(picture(70, 60, 21), "WEBP"))
    (root / "22.jpg").write_bytes(encode(picture(70, 60, 22).convert("CMYK"), quality=90))
    (root / "23.jpg").write_bytes(encode(picture(70, 60, 23), quality=90, progressive=True))
    (root / "24.jpg").write_bytes(jpeg(90, 80, 24)[:-300])
    (root / "25.jpg").write_bytes(b"")
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_dali_gives_the_batches_of_the_cpu_and_says_what_it_is_not_given(mixed, caplog, workers):
    pytest.importorskip("nvidia.dali")
    caplog.set_level(logging.INFO, "locfast")
    spec = ImageSpec({"image": View((32, 40), HALF, HALF, crop="zoom_center", interpolation="random", flip=True)})
    loaders = {
        name: Loader(open_source(str(mixed)), spec, seed=1, workers=workers, decoder=name) for name in ("cpu", "dali")
    }
    stream = [torch.arange(start, start + 13) for start in range(0, 52, 13)]
    cpu, dali = (list(loader.batches(stream)) for loader in loaders.values())
    assert len(cpu) == len(dali) == 4
    for ours, theirs in zip(dali, cpu, strict=True):
        assert torch.equal(ours["index"], theirs["index"])
        for field in ("box", "inside", "flip", "source_size"):
            assert torch.equal(getattr(ours["geometry"]["image"], field), getattr(theirs["geometry"]["image"], field))
        off = (levels(ours["views"]["image"]) - levels(theirs["views"]["image"])).abs()
        # small views of noisy pictures, a third of them with reflected margins
        assert off.mean() < 0.5
    assert loaders["dali"].state() == loaders["cpu"].state()
    assert len(loaders["dali"].replaced.names) == 2
    assert loaders["cpu"].on_cpu == {}
    shown = torch.cat([batch["index"] for batch in cpu]).tolist()
    assert loaders["dali"].on_cpu == {"PNG": shown.count(20), "WEBP": shown.count(21), "CMYK JPEG": shown.count(22)}
    told = [record.message for record in caplog.records if "the CPU decodes every" in record.message]
    assert sorted(told) == [f"the CPU decodes every {kind} (first: {mixed / name})" for kind, name in (
        ("CMYK JPEG", "22.jpg"), ("PNG", "20.png"), ("WEBP", "21.webp"))]  # fmt: skip


def test_a_run_that_decodes_with_dali_resumes_bit_for_bit(folder, tmp_path):
    pytest.importorskip("nvidia.dali")
    settings = {"data": folder(20), "decoder": "dali", "epochs": 2, "save_every": 2}
    train(toy_config(out=tmp_path / "whole", **settings))
    train(toy_config(out=tmp_path / "broken", **settings))
    for later in (tmp_path / "broken/checkpoints").glob("step-*"):
        if later.name > "step-00000002":
            shutil.rmtree(later)
    train(toy_config(out=tmp_path / "broken", **settings, resume=True))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert "decoder: dali, as asked for" in (tmp_path / "whole/train.log").read_text()


def test_of_a_batch_that_the_decoder_refuses_the_cpu_decodes_the_culprit_alone(folder, caplog):
    pytest.importorskip("nvidia.dali")
    spec = ImageSpec({"image": POLICIES["center"]})
    source = open_source(str(folder(6)))
    stream = [torch.arange(6), torch.arange(6, 12)]
    expected = list(Loader(source, spec, seed=1, workers=0).batches(stream))
    loader = Loader(source, spec, seed=1, workers=0, decoder="dali")
    begin, culprit = loader._decoder.begin, len(source.read(3).image)

    def cut(images: list[Encoded]) -> None:
        """What libjpeg cannot make a picture of, as another decoder may see a file that the CPU's reads."""
        lengths = [400 if len(image.data) == culprit else len(image.data) for image in images]
        begin([replace(image, data=image.data[:length]) for image, length in zip(images, lengths, strict=True)])

    loader._decoder.begin = cut
    for ours, theirs in zip(loader.batches(stream), expected, strict=True):
        assert torch.equal(ours["index"], theirs["index"])
        same = [torch.equal(*pair) for pair in zip(ours["views"]["image"], theirs["views"]["image"], strict=True)]
        assert ours["index"][same].tolist() == [3]  # the very bits of the CPU decoder
        assert (levels(ours["views"]["image"]) - levels(theirs["views"]["image"])).abs().mean() < WITHIN["dali"]
    assert loader.on_cpu == {REFUSED: 2}
    assert "dali refused a batch (" in caplog.text


def test_a_loader_with_a_device_decoder_iterates_once_at_a_time(folder):
    pytest.importorskip("nvidia.dali")
    loader = Loader(
        open_source(str(folder(6))), ImageSpec({"image": POLICIES["center"]}), seed=1, workers=0, decoder="dali"
    )
    first = loader.batches([torch.arange(3)] * 4)
    next(first)
    with pytest.raises(RuntimeError, match="close the other first"):
        next(loader.batches([torch.arange(3)]))
    first.close()
    assert len(list(loader.batches([torch.arange(3)]))) == 1


def test_a_forked_process_does_not_wait_for_a_pipeline_that_its_parent_dropped(jpeg):
    spec = ImageSpec({"image": POLICIES["squash"]})
    decoder = make("dali", spec)
    decoder.begin(planned(spec, [jpeg(300, 250)])[0])
    decoder.end()
    decoder.cycle = decoder  # so that only the garbage collector ends it
    gc.disable()
    try:
        del decoder
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(20)
        assert child.exitcode == 0
    finally:
        gc.enable()
        child.kill()


def test_a_view_that_fits_leaves_dali_without_a_copy(jpeg):
    pytest.importorskip("nvidia.dali")
    spec = ImageSpec({"image": POLICIES["squash"]})
    images, _ = planned(spec, [jpeg(300, 250, seed) for seed in range(2)])
    decoder = make("dali", spec)
    decoder.begin(images)
    outputs, pipeline = [], decoder.pipeline
    take = pipeline.outputs
    pipeline.outputs = lambda: outputs.extend(take()) or outputs
    view = decoder.end()["image"]
    assert view.data_ptr() == outputs[0].as_tensor().data_ptr()


def test_without_a_gpu_auto_takes_the_cpu_and_says_why():
    decoder, why = choice.choose("auto", ImageSpec({"image": POLICIES["center"]}), CPU)
    assert decoder is None
    assert why == "cpu (there is no GPU to decode on)"


class _Gpu:
    type = "cuda"


def test_auto_passes_over_what_is_not_there_and_what_is_wrong(monkeypatch):
    def missing(spec, device):
        raise Unavailable("it is not installed")

    class Wrong(TorchvisionDecoder):
        def end(self):
            return {name: -view for name, view in super().end().items()}

    spec = ImageSpec({"image": POLICIES["center"]})
    monkeypatch.setattr(choice, "MAKERS", {"a": missing, "b": lambda spec, device: Wrong(spec, CPU)})
    monkeypatch.setattr(choice, "AUTO", ["a", "b"])
    decoder, why = choice.choose("auto", spec, _Gpu())
    assert decoder is None
    assert why.startswith("cpu; not a: it is not installed; not b: view image of trial image")
    choice.MAKERS["c"] = lambda spec, device: TorchvisionDecoder(spec, CPU)
    choice.AUTO.append("c")
    decoder, why = choice.choose("auto", spec, _Gpu())
    assert isinstance(decoder, TorchvisionDecoder)
    assert why.startswith("c (its test images agree with the CPU's); not a: ")


@pytest.mark.parametrize(
    ("name", "view", "told"),
    [
        ("cpuu", {}, "found auto, cpu, dali, nvjpeg; did you mean 'cpu'?"),
        ("nvjpeg", {}, "nvJPEG needs a GPU; take --decoder cpu"),
        ("dali", {"color": "rand-m9"}, "view image has a colour policy, which is applied in the workers"),
        ("nvjpeg", {"color": "three"}, "view image has a colour policy, which is applied in the workers"),
        ("dali", {"interpolation": "hamming"}, "view image is resized with hamming; take --decoder cpu"),
    ],
)
def test_a_decoder_that_cannot_run_is_a_mistake_of_the_user(name, view, told):
    with pytest.raises(UserError) as error:
        choice.choose(name, ImageSpec({"image": View((8, 8), HALF, HALF, **view)}), CPU)
    assert told in str(error.value)


def test_a_decoder_that_breaks_when_it_starts_is_refused_before_a_run_begins(monkeypatch):
    def broken(spec, device):
        raise RuntimeError("the driver is too old")

    monkeypatch.setitem(choice.MAKERS, "dali", broken)
    with pytest.raises(UserError, match="--decoder dali, which cannot run here: RuntimeError: the driver is too old"):
        choice.choose("dali", ImageSpec({"image": POLICIES["center"]}), CPU)


def test_plain_jpegs_have_the_bits_that_pil_gives(shared):
    for data in photographs(shared, 20):
        image = CpuDecoder().open(data)
        assert np.array_equal(image._fast(), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_bilinear_and_bicubic_views_differ_by_more_than_decoders_do(shared):
    spec = {
        name: ImageSpec({"image": View((224, 224), HALF, HALF, interpolation=name)}) for name in ("bilinear", "bicubic")
    }
    files = photographs(shared, 20)
    linear, cubic = (planned(each, files)[1]["image"].float() for each in spec.values())
    assert 1.4 < (linear - cubic).abs().mean() < 1.8
    assert (cubic - cubic.roll(1, -1)).abs().mean() > 9
