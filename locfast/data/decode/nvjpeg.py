"""nvJPEG through torchvision: decodes batches on a GPU where DALI is not installed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from locfast.data.decode.device import BatchFailed, Encoded, Unavailable, check_spec, constants, normalise
from locfast.data.decode.filters import resample_all
from locfast.data.decode.jpeg import decode, decode_jpeg
from locfast.data.spec import ImageSpec


class NvjpegDecoder:
    """Whole images by torchvision's batched nvJPEG, resized by `filters` on the GPU. Raises Unavailable without one."""

    name = "nvjpeg"

    def __init__(self, spec: ImageSpec, device: torch.device) -> None:
        check_spec(spec)
        if device.type != "cuda":
            raise Unavailable("nvJPEG needs a GPU; take --decoder cpu")
        self.decoder = TorchvisionDecoder(spec, device)
        if decode_jpeg is None or not hasattr(torch.ops.image, "decode_jpegs_cuda"):
            raise Unavailable("this torchvision has no nvJPEG; install DALI, or a torchvision for CUDA below 0.30")
        self.begin, self.end, self.forget = self.decoder.begin, self.decoder.end, self.decoder.forget


class TorchvisionDecoder:
    """What `NvjpegDecoder` does on a GPU, on any device: on the CPU, torchvision decodes with libjpeg-turbo."""

    name = "torchvision"

    def __init__(self, spec: ImageSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.constants = constants(spec, device)
        self.begun: deque[dict[str, Tensor] | BatchFailed] = deque()

    def begin(self, images: Sequence[Encoded]) -> None:
        try:
            self.begun.append(self._views(images))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.begun.append(BatchFailed(str(error).splitlines()[0][:200]))

    def end(self) -> dict[str, Tensor]:
        views = self.begun.popleft()
        if isinstance(views, BatchFailed):
            raise views
        return views

    def forget(self) -> None:
        self.begun.clear()

    def _views(self, images: Sequence[Encoded]) -> dict[str, Tensor]:
        if self.device.type == "cuda":
            # torchvision decodes on a stream of its own, into memory that work queued on this one may still read
            torch.cuda.current_stream(self.device).synchronize()
        decoded = decode([image.data for image in images], self.device)
        upright = [_upright(pixels, image.turn) for pixels, image in zip(decoded, images, strict=True)]
        return {
            name: normalise(resample_all(upright, [image.plans[name] for image in images]), *self.constants[name])
            for name in self.spec.views
        }


def _upright(pixels: Tensor, turn: tuple[bool, bool, bool]) -> Tensor:
    transpose, mirror_x, mirror_y = turn
    pixels = pixels.mT if transpose else pixels
    return pixels.flip([axis for axis, mirrored in ((1, mirror_y), (2, mirror_x)) if mirrored]) if any(turn) else pixels
