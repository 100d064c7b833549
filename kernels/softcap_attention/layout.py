"""How results lie in memory: heads inside tokens, as the projection behind attention wants them."""

import torch
from torch import Tensor


def heads_inside_tokens(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty, of the shape of `like` [B, H, T, D], laid out as a contiguous [B, T, H, D]. dtype: that of `like`."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty(batch, tokens, heads, head_dim, dtype=dtype).transpose(1, 2)
