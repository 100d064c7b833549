"""select_views by the compiled op of mask_embeddings, with nothing added to visible rows."""

from torch import Tensor

from ..mask_embeddings.cuda import mask_embeddings, mask_embeddings_backward


def select_views(shown: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
    """shown [B, N, C] fp32, fp16 or bf16, hidden [P + N, C], visible [B, V, N]  ->  [B, V, P + N, C]."""
    return mask_embeddings(shown, visible, hidden, added=False)


def select_views_backward(grad: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """grad [B, V, P + N, C]  ->  gradients of shown [B, N, C] in grad's dtype, of hidden [P + N, C] in fp32."""
    return mask_embeddings_backward(grad, visible, grad.shape[2] - visible.shape[2], added=False)
