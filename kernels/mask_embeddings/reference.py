"""Masking of patch embeddings in plain PyTorch: what every faster backend must equal."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_embeddings(x: Tensor, visible: Tensor, position: Tensor) -> Tensor:
    """x [B, N, C], visible [B, V, N] bool, position [P + N, C]  ->  [B, V, P + N, C] in x's dtype.

    Computes in fp32, or in fp64 for fp64 inputs. Hidden embeddings are selected away, so a NaN there cannot leak.
    """
    compute = torch.float64 if torch.float64 in (x.dtype, position.dtype) else torch.float32
    num_prefix_tokens = position.shape[0] - x.shape[1]
    patches = torch.where(visible[..., None], x[:, None].to(compute), 0.0)
    return (F.pad(patches, (0, 0, num_prefix_tokens, 0)) + position.to(compute)).to(x.dtype)


def mask_embeddings_backward(grad: Tensor, visible: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """grad [B, V, P + N, C]  ->  gradients of x [B, N, C] in grad's dtype, of position [P + N, C] in fp32 (fp64)."""
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    wide = grad.to(compute)
    x_grad = torch.where(visible[..., None], wide[:, :, num_prefix_tokens:], 0.0).sum(1)
    return x_grad.to(grad.dtype), wide.sum((0, 1))
