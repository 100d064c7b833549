"""Batch norm over the images of all ranks, on any backend: PyTorch's SyncBatchNorm refuses gloo on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from locfast.models.ranks import num_ranks, sum_over_ranks


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d whose statistics in training are those of all ranks' rows together; same state-dict keys.

    Every rank must bring the same number of rows. Computed in fp32 at least, whatever autocast says: the variance from
    differences to the mean and not from squares, of which little would be left in features with a large mean.
    Under gradient accumulation the rows are those of one round.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [R, C] -> [R, C], fp32 (fp64 for fp64). Raises ValueError for a single row in training."""
        x = x if x.dtype == torch.float64 else x.float()
        ranks = num_ranks()
        if not self.training or ranks == 1:
            return super().forward(x)
        rows = ranks * len(x)
        mean = sum_over_ranks(x.sum(0)) / rows
        centred = x - mean
        variance = sum_over_ranks(centred.square().sum(0)) / rows
        self._remember(mean.detach(), variance.detach() * rows / (rows - 1))
        out = centred * torch.rsqrt(variance + self.eps)
        return out * self.weight + self.bias if self.affine else out

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
