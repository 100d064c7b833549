"""The MLP that maps pooled tokens to where two views of an image are compared."""

from __future__ import annotations

from torch import Tensor, nn

from locfast.models.batch_norm import GlobalBatchNorm1d


class ProjectionHead(nn.Module):
    """Two linear layers without biases, batch norm over all ranks and a ReLU between them (LUT, section 5.1)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden_width, bias=False)
        self.norm = GlobalBatchNorm1d(hidden_width)
        self.contract = nn.Linear(hidden_width, width, bias=False)
        for layer in (self.expand, self.contract):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]; all leading dimensions are rows to the batch norm."""
        rows = self.contract(self.norm(self.expand(x.flatten(0, -2))).relu())
        return rows.unflatten(0, x.shape[:-1])
