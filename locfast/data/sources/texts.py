"""Captions that lie beside an image, in a text file of its name."""

from __future__ import annotations

import os
from collections.abc import Sequence

from locfast.data.spec import Source
from locfast.errors import UserError

TEXT = ".txt"
LOOKED_AT = 8
"""Samples, spread over a source, that tell whether it has texts at all."""


def lines(text: str | None) -> tuple[str, ...]:
    """The captions of a text file, one a line; blank lines do not count."""
    return tuple(line.strip() for line in (text or "").splitlines() if line.strip())


def text_beside(image: str) -> str | None:
    """What the text file beside an image says, None where there is none. Raises OSError where it cannot be read."""
    try:
        with open(os.path.splitext(image)[0] + TEXT, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise OSError("its text is not UTF-8") from None


def check_texts(source: Source) -> None:
    """Raise UserError where none of a few samples has a text: one message, before every sample counts as unreadable."""
    places = sorted({i * (len(source) - 1) // max(1, LOOKED_AT - 1) for i in range(LOOKED_AT)})
    if not any(_texts_of(source, place) for place in places):
        raise UserError(
            f"asked for images with texts, found {source!r}; of each of the {len(places)} samples looked at: it has no "
            "text. Give a .jsonl of images and captions, or a folder or tar shards with KEY.txt beside every image"
        )


def _texts_of(source: Source, place: int) -> Sequence[str]:
    try:
        return source.read(place).texts
    except Exception:  # whatever is wrong with it, the loader tells
        return ()
