"""Captions that lie beside an image, in a text file of its name."""

from __future__ import annotations

import os

TEXT = ".txt"


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
