"""What decoders have in common that take whole batches of encoded images to the device where training runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from locfast.data.crop import Plan
from locfast.data.decode.cpu import ORIENTATIONS, CpuPicture
from locfast.data.decode.jpeg import is_whole, plain_orientation
from locfast.data.spec import ImageSpec

FILTERS = ("bilinear", "bicubic", "lanczos", "random")
"""Interpolations that all decoders have."""


class Unavailable(Exception):
    """This decoder cannot run here, or not for this ImageSpec; the message says why and what to type instead."""


class BatchFailed(Exception):
    """A batch could not be decoded, and it is not known which of its images is to blame."""


@dataclass(frozen=True)
class Encoded:
    """An image that a worker process has read and planned, but not decoded."""

    data: Tensor  # [bytes] uint8
    size: tuple[int, int]  # height, width, after EXIF rotation
    turn: tuple[bool, bool, bool]  # how stored pixels become upright: see cpu.ORIENTATIONS
    plans: dict[str, Plan]  # by view


class DeviceDecoder(Protocol):
    """Turns encoded images into views; two batches may be under way, and end in the order in which they began."""

    name: str

    def begin(self, images: Sequence[Encoded]) -> None:
        """Start decoding a batch of at least one image."""
        ...

    def end(self) -> dict[str, Tensor]:
        """The views of the oldest batch under way: {name: [B, 3, h, w] fp32, normalised, on the device}, complete on
        torch's current stream. Raises BatchFailed; the batches that began after it stay under way."""
        ...

    def forget(self) -> None:
        """Give up all batches under way: nobody will ask for their end."""
        ...


def why_not(picture: CpuPicture) -> str:
    """Why an image is decoded by the worker that read it, and not on the device: its kind; "" where it is not.

    All device decoders hand on the same images, so whichever runs, the CPU decoder judges the same damaged ones.
    """
    if not picture.is_jpeg:
        return str(picture.image.format)
    if picture.image.mode not in ("RGB", "L"):
        return f"{picture.image.mode} JPEG"
    if picture.image.info.get("adobe_transform") == 0:  # RGB inside: not every GPU decoder looks at that mark
        return "JPEG of RGB components"
    if not is_whole(picture.data):
        return "damaged or unusual JPEG"
    # DALI turns images by its own reading of EXIF; PIL also knows XMP, which would have the view cut out elsewhere
    orientation = plain_orientation(picture.data)
    agreed = orientation is not None and ORIENTATIONS.get(orientation, ORIENTATIONS[1]) == picture.turn
    return "" if agreed else "JPEG with an unusual mark of its orientation"


def check_spec(spec: ImageSpec) -> None:
    """Raise Unavailable for what only the CPU decoder can give."""
    for name, view in spec.views.items():
        if view.color is not None:
            raise Unavailable(f"view {name} has a colour policy, which is applied in the workers; take --decoder cpu")
        if view.interpolation not in FILTERS:
            raise Unavailable(f"view {name} is resized with {view.interpolation}; take --decoder cpu")


def constants(spec: ImageSpec, device: torch.device) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """White, mean and standard deviation of each view as tensors: by a Python number, CUDA would multiply with a
    rounded reciprocal."""

    def three(values: tuple[float, float, float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)

    white = torch.tensor(255.0, device=device)
    return {name: (white, three(view.mean), three(view.std)) for name, view in spec.views.items()}


def normalise(pixels: Tensor, white: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Levels 0 .. 255, fp32 [..., 3, h, w], as a network takes them; overwrites `pixels`."""
    return pixels.div_(white).sub_(mean).div_(std)


class InUse:
    """Keeps what was handed out alive until the GPU has done what was queued on it: its memory may be another's than
    torch's, whose allocator would know."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.handed_out: deque[tuple[torch.cuda.Event, object]] = deque()
        self.last: object = None

    def hand_out(self, tensors: object) -> None:
        """Called when the next batch is asked for: all work on the one before is queued by then."""
        if self.device.type != "cuda":
            return
        if self.last is not None:
            self.handed_out.append((torch.cuda.current_stream(self.device).record_event(), self.last))
        while self.handed_out and self.handed_out[0][0].query():
            self.handed_out.popleft()
        self.last = tensors
