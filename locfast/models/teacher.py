"""The frozen teacher over masked views: in smaller chunks where memory asks for it, as a CUDA graph where asked to."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from locfast.errors import UserError
from locfast.models.backbone import Backbone
from locfast.models.uncapped_attention import Implementation

log = logging.getLogger(__name__)

Run = Callable[[Tensor, Tensor], Tensor]
"""(images [B, 3, H, W], visible [B, V, N]) -> features [B, V, T, C]."""


class TeacherPass:
    """Calls `Backbone.masked_features` without gradients: (images, visible) -> [B, V, T, C].

    stop: the last block that runs. chunk: images at a time; None for all. Whenever a chunk does not fit into the GPU's
    memory, half of it is taken from there on. graph: replay the whole pass as one CUDA graph, captured for the shape of
    the first call with gradients on, i.e. of the first training step: what comes before it (the target scale) and other
    shapes run without. One that does not fit into memory is given up, and the log says so.
    """

    def __init__(
        self, backbone: Backbone, stop: int, uncapped: Implementation, chunk: int | None = None, graph: bool = False
    ) -> None:
        self.backbone, self.stop, self.uncapped, self.chunk, self.graph = backbone, stop, uncapped, chunk, graph
        self.captured: CapturedPass | None = None

    def check(self, device: torch.device) -> None:
        """Raise UserError where the pass cannot run on `device`."""
        if self.graph and device.type != "cuda":
            raise UserError(
                f"a CUDA graph of the teacher was asked for, but the run is on {device}. Leave "
                "--maskembed.teacher-graph off, or type --device cuda."
            )

    def __call__(self, images: Tensor, visible: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        with torch.no_grad():
            run = self._captured(images, visible, training) if self.graph else None
            return self._run_in_chunks(images, visible) if run is None else run(images, visible)

    def _captured(self, images: Tensor, visible: Tensor, training: bool) -> CapturedPass | None:
        """The graph, where there is one for these inputs."""
        if _get_current_dispatch_mode() is not None:  # who counts operators sees none inside a graph
            return None
        if self.captured is None and training:
            try:
                self.captured = CapturedPass(self._run, images, visible)
            except torch.OutOfMemoryError:
                self.graph = False
                log.warning("a CUDA graph of the teacher does not fit into memory: going on without")
        return self.captured if self.captured is not None and self.captured.fits(images, visible) else None

    def _run(self, images: Tensor, visible: Tensor) -> Tensor:
        return self.backbone.masked_features(images, visible, self.stop, uncapped=self.uncapped, chunk=self.chunk)

    def _run_in_chunks(self, images: Tensor, visible: Tensor) -> Tensor:
        while True:
            try:
                return self._run(images, visible)
            except torch.OutOfMemoryError:
                size = min(self.chunk or len(images), len(images))
                if size == 1:
                    raise
            # outside of the handler, whose traceback holds what the failed pass had allocated
            self.chunk = math.ceil(size / 2)
            log.warning("%d images at a time do not fit into the teacher; from here on it takes %d", size, self.chunk)
            torch.cuda.empty_cache()


class CapturedPass:
    """A CUDA graph of `run` on inputs of one shape. Its result is overwritten by the next call."""

    def __init__(self, run: Run, images: Tensor, visible: Tensor) -> None:
        self.images, self.visible, self.autocast = images.clone(), visible.clone(), _autocast(images)
        self.graph = torch.cuda.CUDAGraph()
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights cast inside the graph live no longer than its replay
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are chosen, compiled and warmed up before the capture
                for _ in range(2):
                    run(self.images, self.visible)
            torch.cuda.current_stream().wait_stream(side)
            # the loader's thread may pin memory meanwhile, which a capture of the whole process would forbid
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.features = run(self.images, self.visible)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def fits(self, images: Tensor, visible: Tensor) -> bool:
        """Whether inputs and autocast are those of the capture."""
        return (images.shape, visible.shape, images.dtype, _autocast(images)) == (
            self.images.shape,
            self.visible.shape,
            self.images.dtype,
            self.autocast,
        )

    def __call__(self, images: Tensor, visible: Tensor) -> Tensor:
        self.images.copy_(images)
        self.visible.copy_(visible)
        self.graph.replay()
        return self.features


def _autocast(tensor: Tensor) -> torch.dtype | None:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
