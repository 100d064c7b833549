"""What a part of a colour policy is."""

from __future__ import annotations

from typing import Protocol

from PIL import Image


class Policy(Protocol):
    """Made of its text and the view that it is for; raises ValueError for a text that is none of its kind."""

    words: int
    """Random 32-bit words that one image takes, whatever is done with it."""

    def __call__(self, image: Image.Image, words: list[int]) -> Image.Image:
        """Change an RGB image as `words` say."""
        ...


def uniform(word: int, low: float = 0.0, high: float = 1.0) -> float:
    """A random word as a number in [low, high)."""
    return low + (high - low) * (word * 2.0**-32)
