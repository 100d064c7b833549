"""Distances of reconstructions from targets in plain PyTorch: what every faster backend must equal."""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_distance(prediction: Tensor, target: Tensor, scale: Tensor, loss: str) -> Tensor:
    """prediction, target [B, V, T, C], scale []  ->  per token, the mean over the width: [B, V, T] in fp32 (fp64).

    loss: mse, l1, or cosine (one minus the cosine, which is no mean). Computes in fp32, or in fp64 for fp64 inputs.
    """
    compute = torch.float64 if torch.float64 in (prediction.dtype, target.dtype) else torch.float32
    prediction, target = prediction.to(compute), target.to(compute) * scale.to(compute)
    if loss == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1)
    difference = prediction - target
    return (difference.square() if loss == "mse" else difference.abs()).mean(-1)
