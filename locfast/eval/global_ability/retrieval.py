"""Image-text retrieval: by the rank that the right answer has among all answers, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.eval.global_ability.results import Score, compare

KS = (1, 5, 10)
BLOCK = 1 << 24
"""Cosines that lie on the device at a time: 64 MiB of them. 5,000 images and 25,000 captions make 1.25e8."""


@torch.inference_mode()
def ranks(
    queries: Tensor,
    answers: Tensor,
    query_image: Tensor,
    answer_image: Tensor,
    *,
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> Tensor:
    """How many wrong answers lie at least as near a query as the nearest right one: [Q] int64, on the CPU; 0: found.

    queries [Q, E], answers [A, E]; an answer is right where its image, answer_image [A], is that of the query,
    query_image [Q]; every query must have a right one. Near is by cosine, in fp32. A tie counts against: a wrong answer
    with the very cosine of the right one stands before it, so that embeddings which are all alike find nothing.
    """
    answers = F.normalize(answers.to(device).float(), dim=-1)
    answer_image = answer_image.to(device)
    found = []
    step = max(1, block // len(answers))
    for some, image in zip(queries.split(step), query_image.split(step), strict=True):
        cosine = F.normalize(some.to(device).float(), dim=-1) @ answers.T
        right = answer_image == image.to(device)[:, None]
        nearest = cosine.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(((cosine >= nearest) & ~right).sum(1).cpu())
    return torch.cat(found)


def retrieval_scores(
    images: Mapping[str, Tensor],
    texts: Mapping[str, Tensor],
    image_of: Tensor,
    against: Mapping[str, str],
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Score]:
    """Recall at each k, from images to texts and from texts to images, one score a model.

    images {model: [M, E]}, texts {model: [K, E]}, image_of [K] int64: the image of every text; every image has one.
    From an image any of its texts is right; every text is a query of its own for its image. Intervals resample images,
    each with all of its texts.
    """
    everyone = torch.arange(len(next(iter(images.values()))))
    texts_of = torch.bincount(image_of)
    to_text = {n: ranks(x, texts[n], everyone, image_of, device=device) for n, x in images.items()}
    to_image = {n: ranks(texts[n], x, image_of, everyone, device=device) for n, x in images.items()}
    found: list[Score] = []
    for k in ks:
        right = {name: rank < k for name, rank in to_text.items()}
        found += compare(f"image to text, R@{k}", right, against, seed=seed)
    for k in ks:
        right = {n: torch.bincount(image_of[rank < k], minlength=len(everyone)) for n, rank in to_image.items()}
        found += compare(f"text to image, R@{k}", right, against, of=texts_of, seed=seed)
    return found
