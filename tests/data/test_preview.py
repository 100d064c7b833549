"""`python -m locfast.data preview`: the picture shows what a run's networks see."""

from __future__ import annotations

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
from locfast.data.spec import View
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
