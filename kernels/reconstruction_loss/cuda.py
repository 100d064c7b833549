"""reconstruction_loss through locfast/_C.so: CUDA tensors, and CPU tensors by the same arithmetic."""

import torch
from torch import Tensor

from .layout import merged


def token_distance(prediction: Tensor, target: Tensor, scale: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """prediction and target [B, V, T, C], scale one number  ->  distances [B, V, T], slopes for the backward."""
    distance, slopes = torch.ops.locfast_C.reconstruction_loss(*merged(prediction, target), scale.float(), loss)
    tokens = prediction.shape[:3]
    return distance.view(tokens), slopes.view(2, *tokens) if loss == "cosine" else slopes


def token_distance_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, scale: Tensor, slopes: Tensor, loss: str
) -> Tensor:
    """grad [B, V, T] fp32, the forward's inputs and slopes  ->  gradient of prediction [B, V, T, C], contiguous."""
    shape = prediction.shape
    prediction, target, grad = merged(prediction, target, grad[..., None])
    backward = torch.ops.locfast_C.reconstruction_loss_backward
    return backward(grad, prediction, target, scale.float(), slopes, loss).view(shape)
