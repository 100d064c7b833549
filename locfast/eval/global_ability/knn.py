"""Weighted k-nearest-neighbour classification as in DINO: cosine similarity, votes exp(similarity / 0.07)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from locfast.errors import UserError

TEMPERATURE = 0.07
KS = (10, 20, 100, 200)
TRAIN_CHUNK, QUERY_CHUNK = 65536, 512
"""Images whose similarities are held at a time: 0.4 GB with the keys by which they are ranked."""
VOTES = 1 << 25
"""Numbers (neighbours x classes x queries) that a vote holds at a time, 8 bytes each."""
LARGEST = (1 << 31) - 1


def check_ks(ks: Sequence[int], train: int) -> None:
    """Raise UserError for a k that is not positive or larger than the `train` images."""
    if bad := [k for k in ks if not 1 <= k <= train]:
        fits = [k for k in KS if k <= train] or [train]
        raise UserError(
            f"--k {' '.join(map(str, bad))}: a vote needs 1 to {train} neighbours, for the training split has {train} "
            f"readable images. Type --k {' '.join(map(str, fits))}."
        )


@torch.inference_mode()
def knn_predict(
    train: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    ks: Sequence[int] = KS,
    *,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """The class of every query by its k nearest training images, for each k.

    train [N, C], train_labels [N] int64, queries [M, C] -> {k: [M] int64, on the CPU}. Search is exact. Of equally
    similar images the first ones count, and of classes with equal votes the first. Raises UserError as `check_ks`.
    """
    check_ks(ks, len(train))
    nearest = neighbours(train, queries, max(ks), device=device)
    predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
    labels = train_labels.to(device)
    step = max(1, VOTES // (max(ks) * num_classes))
    for similarity, index in zip(nearest[0].split(step), nearest[1].split(step), strict=True):
        votes = _votes(similarity, labels[index], num_classes, ks, temperature)
        for place, k in enumerate(ks):
            predicted[k].append(votes[:, place].argmax(-1).cpu())
    return {k: torch.cat(parts) for k, parts in predicted.items()}


def _votes(similarity: Tensor, labels: Tensor, num_classes: int, ks: Sequence[int], temperature: float) -> Tensor:
    """similarity, labels [Q, K], nearest first -> [Q, len(ks), num_classes] fp64.

    A product with one-hot labels, because adding up by index has no fixed order on a GPU.
    """
    weight = ((similarity.double() - 1) / temperature).exp()  # less one: the same shares, and no overflow
    rank = torch.arange(similarity.shape[1], device=similarity.device)
    counts = rank < torch.tensor(ks, device=rank.device)[:, None]
    return (weight[:, None] * counts) @ F.one_hot(labels, num_classes).double()


def neighbours(train: Tensor, queries: Tensor, k: int, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices of the k nearest rows of `train`, nearest first: [M, k] fp32, [M, k] int64.

    Every chunk of `train` goes to the device once; there lie one chunk, the queries and their best k so far.
    """
    queries = F.normalize(queries.to(device).float(), dim=-1)
    best = torch.full((len(queries), k), torch.iinfo(torch.int64).min, device=device)
    for start in range(0, len(train), TRAIN_CHUNK):
        chunk = F.normalize(train[start : start + TRAIN_CHUNK].to(device).float(), dim=-1)
        index = torch.arange(start, start + len(chunk), device=device)
        for row in range(0, len(queries), QUERY_CHUNK):
            rows = slice(row, row + QUERY_CHUNK)
            keys = _keys(queries[rows] @ chunk.T, index).topk(min(k, len(chunk))).values
            best[rows] = torch.cat([best[rows], keys], dim=1).topk(k).values
    return _similarity(best), LARGEST - (best & 0xFFFFFFFF)


def _keys(similarity: Tensor, index: Tensor) -> Tensor:
    """Integers ordered by similarity, then by the smaller index; no two are equal, so topk has no ties to break.

    The bits of a float, read as an integer, grow with it where it is positive and shrink with it where it is negative.
    """
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0 makes one zero of two
    ordered = torch.where(bits < 0, bits ^ LARGEST, bits)
    return (ordered.long() << 32) | (LARGEST - index)


def _similarity(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ LARGEST, ordered).view(torch.float32)
