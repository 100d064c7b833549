"""`python -m locfast.data preview`: the picture shows what a run's networks see."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from locfast.config.maskembed import MaskEmbedConfig
from locfast.config.registry import make_config
from locfast.data.__main__ import main
from locfast.data.commands.preview import look
from locfast.data.commands.sheet import VEIL, Sheet, fit, pictures, veil
from locfast.data.crop import Plan, geometry
from locfast.data.regions.paint import COLOURS, paint_regions
from locfast.data.spec import Record, Region, View
from locfast.engine.run import train
from locfast.methods.maskembed import MaskEmbed

HALF = View((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_it_shows_the_first_batches_of_a_run(folder, tmp_path, monkeypatch):
    trained = []

    def watched(self, batch, draw):  # in place of the networks, which take their time
        if self.training:
            trained.append((batch, draw, self.image_spec().views["image"]))
        return {"loss": self.head.bias.square().sum()}

    monkeypatch.setattr(MaskEmbed, "forward", watched)
    config = make_config(
        model="demo",
        pretrained=False,
        data=str(folder(30)),  # one of them is held out
        out=str(tmp_path / "run"),
        seed=3,
        steps=2,
        batch_size=6,
        workers=0,
        device="cpu",
        maskembed=MaskEmbedConfig(target_scale=False),
    )
    train(config)
    assert len(trained) == 2
    for step, (batch, draw, view) in enumerate(trained):
        sheet = look(config, 6 * step, 6)
        assert [int(caption.split("#")[1].split()[0]) for caption in sheet.captions] == batch["index"].tolist()
        seen = pictures(batch["views"]["image"], view)
        assert [as_bytes(fit(one)) for one in seen] == [as_bytes(one) for one in sheet.columns["image"]]
        grid = draw.visible[:, 1].unflatten(-1, (6, 6)).numpy()
        hidden = [as_bytes(fit(veil(one, kept))) for one, kept in zip(seen, grid, strict=True)]
        assert hidden == [as_bytes(one) for one in sheet.columns["image, complement"]]


def as_bytes(image: Image.Image) -> bytes:
    return image.tobytes()


def test_the_command_takes_the_flags_of_a_run_and_writes_a_picture(folder, tmp_path, monkeypatch, capsys):
    asked = ["preview", "--data", str(folder(5)), "--out", str(tmp_path / "p.png"), "--count", "7", "--device", "cpu"]
    asked += ["--model", "demo", "--maskembed.crop", "random_resized"]
    monkeypatch.setattr(sys, "argv", ["data", *asked])
    with pytest.raises(SystemExit, match="^0$"):
        main()
    with Image.open(tmp_path / "p.png") as picture:
        assert f"({picture.width} x {picture.height} pixels)" in capsys.readouterr().out
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000  # not a blank page


@pytest.mark.parametrize("flags", [["--out", "runs/a"], ["--count", "0"], ["--model"], ["--colour", "red"]])
def test_mistakes_end_with_code_2(flags, tmp_path):
    asked = [sys.executable, "-m", "locfast.data", "preview", "--data", "demo", *flags]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pixels_come_back_from_their_normalised_form():
    pixels = torch.arange(256).repeat(3)[: 8 * 8 * 3 * 4].view(4, 3, 8, 8).byte()
    normalised = (pixels / 255 - 0.5) / 0.5
    shown = np.stack(pictures(normalised, HALF))
    assert np.array_equal(shown, pixels.permute(0, 2, 3, 1).numpy())


def test_hidden_patches_are_veiled_and_visible_ones_are_untouched():
    pixels = np.full((4, 8, 3), 255, dtype=np.uint8)
    veiled = veil(pixels, np.array([[True, False], [False, False]]))
    assert (veiled[:2, :4] == 255).all()
    assert (veiled[:2, 4:] == np.round(0.2 * 255 + 0.8 * np.array(VEIL))).all()
    assert (veiled[2:] < 150).all()


def test_a_mask_that_hides_nothing_gets_no_column():
    sheet, images = Sheet("two masks"), torch.zeros(2, 3, 8, 8)
    visible = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    visible[1, 0, 0, 0] = False
    sheet.add_view("image", images, HALF, visible, ("masked", "all_visible"))
    assert list(sheet.columns) == ["image", "image, masked"]


def test_every_sample_has_its_place_on_the_page():
    sheet = Sheet("five colours")
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    sheet.columns["image"] = [Image.new("RGB", (150, 150), colour) for colour in colours]
    sheet.captions = ["a caption that is far too long for the picture it stands under"] * 5
    found = {colour: count for count, colour in sheet.draw().getcolors(2**24)}
    assert all(found[colour] == 150 * 150 for colour in colours)  # whole: neither cut off nor written over


def test_boxes_are_framed_where_they_lie_in_the_view_and_dropped_ones_are_not():
    """The right half of an image of 400 x 200, shown 8 pixels wide and pictured at 224."""
    sheet, records = (
        Sheet("one"),
        [Record(b"", regions=(Region((0, 0, 9, 9), "gone"), Region((300, 50, 400, 200), "i")))],
    )
    sheet.add_view("image", torch.zeros(1, 3, 8, 8), HALF)
    plan = Plan((8, 8), (200, 0, 400, 200), (0, 0, 8, 8), True, "bilinear")
    sheet.add_regions("image", records, geometry([plan], [(200, 400)]))
    pixels = np.asarray(sheet.columns["image"][0])
    framed = (pixels == COLOURS[0]).all(-1)
    places = np.argwhere(framed)
    assert places.min(0).tolist() == [56, 0] and places.max(0).tolist() == [223, 111]  # flipped: on the left
    assert framed[80:, 110].all() and framed[222, :112].all() and not framed[80:220, 10:100].any()
    assert not (pixels == COLOURS[1]).all(-1).any()


def coloured(picture: Image.Image) -> list[np.ndarray]:
    """Where the colours of the first and the second box are, letters with their soft rims among them."""
    red, _, blue = np.asarray(picture).astype(int).transpose(2, 0, 1)
    return [red - blue > 100, blue - red > 100]


def test_a_phrase_moves_down_where_another_one_stands():
    picture = Image.new("RGB", (120, 120))
    paint_regions(picture, [(0.1, 0.1, 0.9, 0.9), (0.1, 0.1, 0.8, 0.8)], ["a kite", "a kite"])
    # inside of both frames only phrases are left
    rows = [np.argwhere(each[16:80, 16:80])[:, 0] for each in coloured(picture)]
    assert len(rows[0]) and len(rows[1]) and rows[0].max() < rows[1].min()


def test_phrases_stay_in_the_picture():
    picture = Image.new("RGB", (120, 40))
    paint_regions(picture, [(0.95, 0.9, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)], ["a kite", "a kite"])
    assert min(np.ptp(np.argwhere(each)[:, 1]) for each in coloured(picture)) > 20


def test_a_method_that_learns_from_regions_sees_them_framed(tmp_path, monkeypatch):
    config = make_config(model="demo", pretrained=False, data="demo:40", out=str(tmp_path), seed=3, device="cpu")
    bare, spec = look(config, 0, 6), MaskEmbed.image_spec
    monkeypatch.setattr(MaskEmbed, "image_spec", lambda self: dataclasses.replace(spec(self), regions=True))
    framed = look(config, 0, 6)
    for without, under in zip(bare.columns["image"], framed.columns["image"], strict=True):
        assert under.size == without.size
        assert (np.asarray(under) == COLOURS[0]).all(-1).any() and not (np.asarray(without) == COLOURS[0]).all(-1).any()
    others = [name for name in bare.columns if name != "image"]
    for name in others:
        assert [as_bytes(one) for one in framed.columns[name]] == [as_bytes(one) for one in bare.columns[name]]
