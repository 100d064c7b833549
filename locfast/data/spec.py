"""The words of the data room: what a source yields, what a method asks for, and where a crop came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    from torch import Tensor

CropPolicy = Literal["center", "zoom_center", "random_resized", "simple_resized", "squash", "pad"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
PADDING = 4
"""Pixels that simple_resized reflects beyond each side of the resized image before it crops."""


@dataclass(frozen=True)
class Region:
    """A part of an image and what is said of it."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the image (after EXIF rotation); as the source has it, unchecked."""
    text: str
    score: float = 1.0
    """How sure whoever labelled it was, in [0, 1]."""


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its source, nothing decoded yet."""

    image: bytes
    """An encoded image file (JPEG, PNG, PPM, ...)."""
    name: str = ""
    """What to call it in a log: a path, or shard/member."""
    text: str | None = None
    regions: tuple[Region, ...] | None = None
    """None: nobody looked for any; empty: none was found."""
    label_map: bytes | None = None
    """An encoded 8-bit image with one channel (or a palette): one class id per pixel, 255 = ignore."""
    texts: tuple[str, ...] = ()
    """Every caption, where the source tells several apart; given one of `text` and `texts`, the other follows."""

    def __post_init__(self) -> None:
        if self.text is None and self.texts:
            object.__setattr__(self, "text", self.texts[0])
        elif self.text is not None and not self.texts:
            object.__setattr__(self, "texts", (self.text,))


class Source(Protocol):
    """A dataset with random access. `read` may raise; the loader replaces the sample and names it in the log."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record: ...


@dataclass(frozen=True)
class View:
    """One image view that a method wants of every sample."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: CropPolicy = "center"
    """center: the backbone's evaluation transform (resize the short side by 1/crop_pct, centre crop);
    zoom_center: random zoom and aspect, centre crop or reflect pad; random_resized: random resized crop;
    simple_resized: resize the short side, reflect-pad by 4 pixels, crop at random (DeiT III's simple random crop);
    squash: resize both sides, aspect lost;
    pad: resize the long side to the view, the image in the middle, the rest in the colour of `mean` (CLOC)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the area of a random resized crop, or of a zoom, as a share of the image; MAE and UTA take (0.2, 1)."""
    crop_pct: float = 1.0
    """For center and squash: the share of each side that is left of the resized image."""
    interpolation: Interpolation = "bicubic"
    """A filter of PIL; random: bilinear or bicubic, drawn for each sample."""
    flip: bool = False
    color: str | None = None
    """None, or what `locfast.data.augment` takes: a timm RandAugment string such as "rand-m9-mstd0.5-inc1", whose
    rotations and shifts of pixels are not part of the view's Geometry; "jitter-0.4-0.4-0.2-0.1" (ColorJitter);
    "three" (grey, solarised or blurred); several joined by +."""

    def __post_init__(self) -> None:
        if min(self.size) < 1 or not 0 < self.crop_pct <= 1:
            raise ValueError(f"a view needs a positive size and 0 < crop_pct <= 1, got {self.size}, {self.crop_pct}")
        if self.crop not in get_args(CropPolicy):
            raise ValueError(f"a view's crop is one of {get_args(CropPolicy)}, got {self.crop!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"a view's scale is a range of shares, 0 < low <= high <= 1, got {self.scale}")
        if self.crop == "simple_resized" and min(self.size) <= 2 * PADDING:
            raise ValueError(f"simple_resized pads by {PADDING} pixels and needs more than twice that, got {self.size}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"a view's interpolation is one of {get_args(Interpolation)}, got {self.interpolation!r}")


@dataclass(frozen=True)
class ImageSpec:
    """All views a method wants, by name."""

    views: dict[str, View] = field(default_factory=dict)
    label_map: bool = False
    """Also decode `Record.label_map`, carried through the geometry of each view."""
    records: bool = False
    """Also hand on every sample's `Record` (name, texts, regions), without the bytes of image and label map."""
    text: bool = False
    """Every sample must have a text that is not blank: one without counts as unreadable."""
    regions: bool = False
    """Some samples must have regions (in `records`); one without is as good as any."""


@dataclass(frozen=True)
class Geometry:
    """How the pixels of a view lie in its source image; every tensor has one row a sample.

    A view pixel (x, y) comes from the source: undo the flip, then scale the `box` onto the unpadded view.
    """

    box: Tensor  # [B, 4] fp32: left, top, right, bottom of the shown part, in source pixels (after EXIF rotation)
    inside: Tensor  # [B, 4] fp32: left, top, right, bottom of that part in view pixels, before the flip
    flip: Tensor  # [B] bool: mirrored left to right, last of all
    source_size: Tensor  # [B, 2] int64: height, width of the source (after EXIF rotation)
    size: tuple[int, int]  # height, width of the view
