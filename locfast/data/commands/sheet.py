"""A contact sheet: samples in rows, one column for every view and for every mask over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from locfast.data.regions.in_view import regions_in_view
from locfast.data.regions.paint import paint_regions
from locfast.data.spec import Geometry, Record, View

SMALLEST, LARGEST = 144, 224
"""Sides of a picture in pixels: smaller ones are enlarged by a whole factor, larger ones are shrunk."""
MARGIN, GAP, LINE = 12, 4, 18
"""Pixels around the sheet and between samples; between the pictures of a sample; of a line of text."""
PAPER, INK, QUIET = (255, 255, 255), (34, 38, 46), (110, 116, 128)
VEIL, VEILED = (58, 62, 74), 0.8
"""Colour over hidden patches and its share. Not black: a dark part of a photograph would look hidden, too."""
SHAPE = 1.4
"""Width by height that a sheet comes as near to as whole samples allow."""


@dataclass
class Sheet:
    """Columns of pictures, one picture a sample each, and a caption for each sample."""

    title: str
    columns: dict[str, list[Image.Image]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)

    def add_view(
        self, name: str, images: Tensor, view: View, visible: Tensor | None = None, masks: tuple[str, ...] = ()
    ) -> None:
        """Columns of a view: images [B, 3, h, w] as `view` normalises them, and masks over it.

        visible [B, V, rows, columns] bool, or None. A mask that hides nothing anywhere is the view itself, and gets no
        column of its own.
        """
        pixels = pictures(images, view)
        self.columns[name] = [fit(one) for one in pixels]
        for i, mask in enumerate(masks if visible is not None else ()):
            assert visible is not None
            if not visible[:, i].all():
                veils = visible[:, i].numpy()
                self.columns[f"{name}, {mask}".replace("_", " ")] = [
                    fit(veil(one, kept)) for one, kept in zip(pixels, veils, strict=True)
                ]

    def add_regions(self, name: str, records: Sequence[Record], geometry: Geometry) -> None:
        """Draw the regions of `records` that are in sight in view `name` on its pictures."""
        found = regions_in_view(records, geometry)
        for picture, record, boxes, which in zip(self.columns[name], records, found.boxes, found.which, strict=True):
            shown = which[which >= 0].tolist()
            phrases = [record.regions[number].text for number in shown] if record.regions else []
            paint_regions(picture, boxes[: len(shown)].tolist(), phrases)

    def draw(self) -> Image.Image:
        """All of it on one page."""
        cells = [(max(one.width for one in column), column[0].height) for column in self.columns.values()]
        width = sum(w for w, _ in cells) + GAP * (len(cells) - 1)
        height = max(h for _, h in cells) + LINE
        across = self._across(width + MARGIN, height + MARGIN)
        down = math.ceil(len(self.captions) / across)
        top = MARGIN + LINE + LINE
        size = (MARGIN + across * (width + MARGIN), top + down * (height + MARGIN))
        page = Image.new("RGB", size, PAPER)
        pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
        pen.text((MARGIN, MARGIN - 4), shorten(self.title, size[0] - 2 * MARGIN, font), INK, font)
        for sample, caption in enumerate(self.captions):
            row, group = divmod(sample, across)
            x, y = MARGIN + group * (width + MARGIN), top + row * (height + MARGIN)
            for (heading, column), (w, _) in zip(self.columns.items(), cells, strict=True):
                if row == 0:
                    pen.text((x, top - LINE), shorten(heading, w, font), QUIET, font)
                page.paste(column[sample], (x, y))
                x += w + GAP
            place = (MARGIN + group * (width + MARGIN), y + height - LINE + 1)
            pen.text(place, shorten(caption, width, font), INK, font)
        return page

    def _across(self, width: int, height: int) -> int:
        """How many samples stand beside each other."""
        count = len(self.captions)
        shapes = {n: n * width / (math.ceil(count / n) * height) for n in range(1, count + 1)}
        return min(shapes, key=lambda n: abs(math.log(shapes[n] / SHAPE)))


def pictures(images: Tensor, view: View) -> list[np.ndarray]:
    """Normalised images [B, 3, h, w] as uint8 [h, w, 3], the pixels that the loader had before it normalised them."""
    mean, std = images.new_tensor(view.mean), images.new_tensor(view.std)
    pixels = (images.detach().permute(0, 2, 3, 1) * std + mean) * 255
    return list(pixels.round().clamp(0, 255).byte().numpy())


def veil(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] with a veil over all patches that `kept` [rows, columns] does not keep."""
    height, width = pixels.shape[:2]
    rows = np.arange(height) * kept.shape[0] // height
    columns = np.arange(width) * kept.shape[1] // width
    hidden = ~kept[rows[:, None], columns][..., None]
    veiled = pixels * (1 - VEILED) + np.array(VEIL) * VEILED
    return np.where(hidden, veiled.round(), pixels).astype(np.uint8)


def fit(pixels: np.ndarray) -> Image.Image:
    """As a picture whose longer side lies within SMALLEST and LARGEST as far as that can be."""
    image = Image.fromarray(pixels)
    longest = max(image.size)
    if longest < SMALLEST:
        factor = LARGEST // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longest > LARGEST:
        size = (max(1, round(side * LARGEST / longest)) for side in image.size)
        return image.resize(tuple(size), Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    return image


def shorten(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, without its middle where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    for left in range(len(text) - 1, 0, -1):
        cut = f"{text[: left // 2]}…{text[len(text) - (left - left // 2) :]}"
        if font.getlength(cut) <= width:
            return cut
    return ""
