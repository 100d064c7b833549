"""Views put together from tokens in plain PyTorch: what every faster backend must equal."""

import torch
from torch import Tensor


def select_views(shown: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
    """shown [B, N, C], hidden [P + N, C], visible [B, V, N] bool  ->  [B, V, P + N, C], rows of one or the other."""
    batch, views, patches = visible.shape
    prefix = hidden[: hidden.shape[0] - patches].expand(batch, views, -1, -1)
    picked = torch.where(visible[..., None], shown[:, None], hidden[hidden.shape[0] - patches :])
    return torch.cat([prefix, picked], dim=2)


def select_views_backward(grad: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """grad [B, V, P + N, C]  ->  gradients of shown [B, N, C] in grad's dtype, of hidden [P + N, C] in fp32 (fp64)."""
    wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    num_prefix_tokens = grad.shape[2] - visible.shape[2]
    patches, seen = wide[:, :, num_prefix_tokens:], visible[..., None]
    shown_grad = torch.where(seen, patches, 0.0).sum(1).to(grad.dtype)
    hidden_grad = torch.cat([wide[:, :, :num_prefix_tokens], torch.where(seen, 0.0, patches)], dim=2).sum((0, 1))
    return shown_grad, hidden_grad
