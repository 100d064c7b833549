"""Numbers on their way from the device to the host, which goes on meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """The copy of `numbers` [N] to the host, started now; on a CPU it is there at once."""

    def __init__(self, numbers: Tensor) -> None:
        self.host = numbers.to("cpu", non_blocking=True)  # into pinned memory, where it comes from a GPU
        self.arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(numbers.device))

    def values(self) -> list[float]:
        """Wait for these numbers, and for nothing that was queued behind them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()
