"""What a conversion kept and what it dropped, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

NO_FILE = "no such image file"


@dataclass
class Tally:
    """Counts of one run, or of one shard of it."""

    images: int = 0
    captioned: int = 0
    """Images with a caption."""
    regions: int = 0
    lost_images: Counter[str] = field(default_factory=Counter)
    lost_regions: Counter[str] = field(default_factory=Counter)
    """Reason -> how many were dropped for it."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first image that was dropped for it."""
    broken: list[str] = field(default_factory=list)
    """Files that could not be converted at all, each with what is wrong."""

    def keep(self, texts: int, regions: int) -> None:
        """Count an image that is kept, with so many captions and regions."""
        self.images += 1
        self.captioned += bool(texts)
        self.regions += regions

    def lose(self, reason: str, name: str) -> None:
        """Count an image that is dropped."""
        self.lost_images[reason] += 1
        self.examples.setdefault(reason, name)

    def add(self, other: Tally) -> None:
        self.images += other.images
        self.captioned += other.captioned
        self.regions += other.regions
        self.lost_images += other.lost_images
        self.lost_regions += other.lost_regions
        self.examples = other.examples | self.examples
        self.broken += other.broken

    def counts(self) -> dict[str, Any]:
        """The numbers as JSON, which `Tally.of` reads."""
        return {
            "images": self.images,
            "captioned": self.captioned,
            "regions": self.regions,
            "lost_images": dict(self.lost_images),
            "lost_regions": dict(self.lost_regions),
            "examples": self.examples,
        }

    @classmethod
    def of(cls, counts: dict[str, Any]) -> Tally:
        """Raises KeyError or TypeError where `counts` are not those of a tally."""
        kept = counts["images"], counts["captioned"], counts["regions"]
        lost = Counter(counts["lost_images"]), Counter(counts["lost_regions"])
        return cls(*kept, *lost, examples=dict(counts["examples"]))

    def lines(self) -> Iterator[str]:
        """What a run prints at its end."""
        mean = f"{self.regions / self.images:.2f}" if self.images else "0"
        yield f"{self.images} images, {self.regions} regions ({mean} an image), {self.captioned} with a caption"
        for what, lost in (("image", self.lost_images), ("region", self.lost_regions)):
            for reason, number in sorted(lost.items(), key=lambda one: (-one[1], one[0])):
                example = f", e.g. {self.examples[reason]}" if what == "image" and reason in self.examples else ""
                yield f"  dropped {number} {what}{'s' if number > 1 else ''}: {reason}{example}"
