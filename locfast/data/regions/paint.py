"""Boxes and phrases drawn on a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

COLOURS = ((255, 196, 0), (0, 200, 255), (255, 96, 160), (120, 230, 80), (190, 130, 255), (255, 130, 40))
"""Bright ones that photographs have little of; boxes take them in turn."""
LABEL, SIZE, LINE = (24, 27, 33), 10, 14
"""Colour behind a phrase; height of its letters and of its line in pixels."""


def paint_regions(picture: Image.Image, boxes: Iterable[Sequence[float]], phrases: Sequence[str]) -> None:
    """Draw boxes (left, top, right, bottom in [0, 1] of the picture), each with its phrase at its upper left corner.

    Frames come first, so that none hides a phrase. A phrase moves left where the picture ends, and down where another
    one stands.
    """
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(SIZE)
    width, height = picture.size
    corners = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        x0, y0 = round(left * width), round(top * height)
        # a box ends behind its last pixel, a rectangle of PIL's on it
        frame = (x0, y0, max(x0, round(right * width) - 1), max(y0, round(bottom * height) - 1))
        pen.rectangle(frame, outline=COLOURS[number % len(COLOURS)], width=2)
        corners.append((x0, y0))
    taken: list[tuple[int, int, int]] = []
    for number, ((left, top), phrase) in enumerate(zip(corners, phrases, strict=True)):
        long = round(font.getlength(phrase)) + 4
        x, y = max(0, min(left, width - long)), min(top, height - LINE)
        while y + LINE <= height and any(abs(y - v) < LINE and x < end and start < x + long for start, end, v in taken):
            y += 1
        taken.append((x, x + long, y))
        pen.rectangle((x, y, x + long - 1, y + LINE - 1), fill=LABEL)
        pen.text((x + 2, y + 1), phrase, COLOURS[number % len(COLOURS)], font)
