"""mask_embeddings through locfast/_C.so: CUDA tensors, and CPU tensors by the same arithmetic."""

import torch
from torch import Tensor

from .tiles import CUDA


def mask_embeddings(x: Tensor, visible: Tensor, position: Tensor, added: bool = True) -> Tensor:
    """x [B, N, C] fp32, fp16 or bf16, visible [B, V, N], position [P + N, C]  ->  [B, V, P + N, C].

    added: whether positions are added to visible patches too; if not, this is select_views.
    """
    position = position.to(torch.float32).contiguous()  # a few hundred rows: not worth a template in its dtype
    cut = CUDA["forward"]
    return torch.ops.locfast_C.mask_embeddings(x.contiguous(), visible.contiguous(), position, cut.images, added)


def mask_embeddings_backward(
    grad: Tensor, visible: Tensor, num_prefix_tokens: int, added: bool = True
) -> tuple[Tensor, Tensor]:
    """grad [B, V, P + N, C]  ->  gradients of x [B, N, C] in grad's dtype, and of position [P + N, C] in fp32."""
    backward = torch.ops.locfast_C.mask_embeddings_backward
    cut = CUDA["backward"]
    return backward(grad.contiguous(), visible.contiguous(), num_prefix_tokens, cut.rows, cut.images, added)
