"""NVIDIA DALI: decodes, cuts, resizes, flips and normalises a batch in one pass, on a GPU or, for tests, on none."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locfast.data.crop import Plan, border_of
from locfast.data.decode.device import BatchFailed, Encoded, Unavailable, check_spec
from locfast.data.decode.filters import seen
from locfast.data.decode.reflect import fill, is_reflected
from locfast.data.spec import ImageSpec, View

THREADS = 4
"""CPU threads of the pipeline: on a GPU they parse headers and decode what the chip's JPEG engine leaves to them."""


class DaliDecoder:
    """The same pipeline on a GPU (`mixed` decoding: nvJPEG and the chip's own JPEG engine) and on the CPU.

    Workers read and plan; the crops are theirs, so DALI draws nothing. Images are decoded whole: of a part nvJPEG below
    13.2 (CUDA 13.0 has 13.0) does not make libjpeg's chroma, and DALI refuses (an H200). Batches leave DALI by
    DLPack, without a copy unless some view reaches outside of its image. Raises Unavailable where DALI is not there.
    """

    name = "dali"

    def __init__(self, spec: ImageSpec, device: torch.device) -> None:
        check_spec(spec)
        try:
            from nvidia.dali import types
        except ImportError:
            extra = f"dali-cu{(torch.version.cuda or '13').split('.')[0]}"
            raise Unavailable(f"NVIDIA DALI is not installed; pip install 'locfast[{extra}]'") from None
        self.spec, self.device = spec, device
        self.filters = {
            "bilinear": int(types.INTERP_LINEAR),
            "bicubic": int(types.INTERP_CUBIC),
            "lanczos": int(types.INTERP_LANCZOS3),
        }
        self.pipeline: Any = None
        self.largest = 0
        self.begun: deque[list[Encoded]] = deque()

    def begin(self, images: Sequence[Encoded]) -> None:
        if self.pipeline is None or len(images) > self.largest:
            # rounded up, for the number of images that are handed on differs from batch to batch
            self._build(1 << (len(images) - 1).bit_length())
        self.begun.append(list(images))
        self._feed(self.begun[-1])

    def end(self) -> dict[str, Tensor]:
        images = self.begun.popleft()
        # on a GPU, memory of these goes back to DALI in the order of this stream: behind the gather of `fill`
        stream = {"cuda_stream": torch.cuda.current_stream(self.device)} if self.device.type == "cuda" else {}
        try:
            outputs = self.pipeline.outputs(**stream)
        except Exception as error:  # DALI's own types, by what failed inside of it
            self._build(self.largest)  # a pipeline that failed stays broken
            raise BatchFailed(_what(error)) from None
        views = {}
        for name, output in zip(self.spec.views, outputs, strict=True):
            view = torch.from_dlpack(output.as_tensor())
            views[name] = fill(view, [image.plans[name] for image in images])
        return views

    def forget(self) -> None:
        if self.begun:
            self.begun.clear()
            self.pipeline = None  # it would hand them out first; the next batch builds another

    def _build(self, largest: int) -> None:
        """A new pipeline for batches of up to `largest`; what is under way begins again in it."""
        self.largest = largest
        # exec_dynamic: an output lives as long as somebody holds it. One batch ahead is what the loader asks for.
        self.pipeline = _define(
            self.spec,
            batch_size=self.largest,
            num_threads=max(1, min(THREADS, len(os.sched_getaffinity(0)))),
            device_id=_number(self.device),
            exec_dynamic=True,
            prefetch_queue_depth=1,
        )
        self.pipeline.build()
        for waiting in self.begun:
            self._feed(waiting)

    def _feed(self, images: list[Encoded]) -> None:
        feed = self.pipeline.feed_input
        feed("encoded", [image.data.numpy() for image in images])
        whole = [(0, 0)] * len(images)
        for name in self.spec.views:
            plans = [image.plans[name] for image in images]
            cut = [seen(plan, image.size) for plan, image in zip(plans, images, strict=True)]
            # what this view's filter may see, and in it the box that becomes the view
            feed(f"{name}.cut_start", _yx([c[:2] for c in cut], whole, np.int32))
            feed(f"{name}.cut_end", _yx([c[2:] for c in cut], whole, np.int32))
            feed(f"{name}.start", _yx([plan.box[:2] for plan in plans], cut, np.float32))
            feed(f"{name}.end", _yx([plan.box[2:] for plan in plans], cut, np.float32))
            shown = [(p.inside[3] - p.inside[1], p.inside[2] - p.inside[0]) for p in plans]
            feed(f"{name}.size", np.array(shown, np.float32))
            feed(f"{name}.filter", np.array([self.filters[plan.interpolation] for plan in plans], np.int32))
            # where a view reflects its image, the gather that does so turns it as well
            feed(f"{name}.mirror", np.array([plan.flip and not is_reflected(plan) for plan in plans], np.int32))
            for axis in (0, 1):
                feed(f"{name}.place_{'yx'[axis]}", np.array([_place(plan, axis) for plan in plans], np.float32))
        self.pipeline.schedule_run()


def _number(device: torch.device) -> int | None:
    """DALI's name of a device; None: no GPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _yx(corners: Sequence[Sequence[float]], origins: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    """Corners (x, y) relative to the left and top of `origins`, as DALI's [y, x]."""
    return np.array([(y - o[1], x - o[0]) for (x, y), o in zip(corners, origins, strict=True)], dtype)


def _place(plan: Plan, axis: int) -> float:
    """Where DALI puts the shown part in a view along `axis` (0: y, 1: x), as a share of the room around it.

    A part that `fill` reflects from has its place at the top left.
    """
    before, end = plan.inside[1 - axis], plan.inside[3 - axis]
    return 0.0 if is_reflected(plan) or not before else before / (plan.size[axis] - (end - before))


def _normalised_border(view: View) -> list[float]:
    """What DALI puts around the shown part: it does not normalise that."""
    if view.crop != "pad":
        return [0.0] * 3
    return [(level / 255 - mean) / std for level, mean, std in zip(border_of(view), view.mean, view.std, strict=True)]


def _define(spec: ImageSpec, **options: Any) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = options["device_id"] is not None

    def numbers(name: str, dtype: Any, ndim: int = 1) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    @pipeline_def(**options)
    def views() -> tuple[Any, ...]:
        pixels = fn.decoders.image(
            numbers("encoded", types.UINT8),
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # chroma as libjpeg makes it
        )
        outputs = []
        for name, view in spec.views.items():
            seen = fn.slice(
                pixels,
                start=numbers(f"{name}.cut_start", types.INT32),
                end=numbers(f"{name}.cut_end", types.INT32),
                axes=(0, 1),
            )
            resized = fn.resize(
                seen,
                size=numbers(f"{name}.size", types.FLOAT),
                roi_start=numbers(f"{name}.start", types.FLOAT),
                roi_end=numbers(f"{name}.end", types.FLOAT),
                interp_type=fn.reinterpret(numbers(f"{name}.filter", types.INT32, 0), dtype=types.INTERP_TYPE),
                antialias=True,
            )
            outputs.append(
                fn.crop_mirror_normalize(
                    resized,
                    crop=view.size,
                    crop_pos_y=numbers(f"{name}.place_y", types.FLOAT, 0),
                    crop_pos_x=numbers(f"{name}.place_x", types.FLOAT, 0),
                    out_of_bounds_policy="pad",
                    fill_values=_normalised_border(view),
                    mirror=numbers(f"{name}.mirror", types.INT32, 0),
                    mean=[255 * mean for mean in view.mean],
                    std=[255 * std for std in view.std],
                    dtype=types.FLOAT,
                    output_layout="CHW",
                )
            )
        return tuple(outputs)

    return views()


def _what(error: Exception) -> str:
    """What an error of DALI says, without the trace of its operators."""
    told = re.split("C\\+\\+ context|Stacktrace|Current pipeline", str(error).rpartition("encountered:")[2])[0]
    return " ".join(told.split())[:200] or type(error).__name__
