"""Recognition and retrieval of regions, a score for every model and reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.eval.global_ability.intervals import bootstrap_per_class
from locfast.eval.global_ability.results import Score, compare, resampled
from locfast.eval.global_ability.retrieval import BLOCK, KS, ranks

RECOGNITION = "region recognition"
TO_PHRASE, TO_REGION = "region to phrase", "phrase to region"


@torch.inference_mode()
def recognise(regions: Tensor, classes: Tensor, *, device: torch.device | str = "cpu", block: int = BLOCK) -> Tensor:
    """Regions [R, E], classes' names [K, E] -> [R] int64, on the CPU: the class of the largest cosine, in fp32."""
    classes = F.normalize(classes.to(device).float(), dim=-1)
    parts = regions.split(max(1, block // len(classes)))
    return torch.cat([(F.normalize(some.to(device).float(), dim=-1) @ classes.T).argmax(1).cpu() for some in parts])


def recognition_scores(
    predicted: Mapping[str, Tensor],
    labels: Tensor,
    image_of: Tensor,
    classes: Sequence[str],
    against: Mapping[str, str],
    *,
    seed: int = 0,
) -> list[Score]:
    """mAcc, the mean over classes of the accuracy in each, and the accuracy over all regions.

    predicted {model: [R] int64}, labels [R] int64, image_of [R] int64. A class that no region has is left out of the
    mean. Intervals resample images, each with all of its regions.
    """
    right = {name: each == labels for name, each in predicted.items()}
    counts = torch.bincount(labels, minlength=len(classes))
    there = counts.nonzero()[:, 0].tolist()
    per_class, means = {}, {}
    for name, one in right.items():
        shares = (torch.bincount(labels[one], minlength=len(classes)) / counts.double()).tolist()
        per_class[name] = {classes[i]: shares[i] for i in there}
        means[name] = sum(per_class[name].values()) / len(there)
    drawn = bootstrap_per_class(right, labels, image_of, seed)
    found = resampled(f"{RECOGNITION}, mAcc", means, drawn, against, per_class=per_class)
    return found + _over_images(f"{RECOGNITION}, accuracy", right, image_of, against, seed)


def region_retrieval_scores(
    regions: Mapping[str, Tensor],
    phrases: Mapping[str, Tensor],
    phrase_of: Tensor,
    image_of: Tensor,
    against: Mapping[str, str],
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Score]:
    """Recall at each k, from a region to its phrase and from a phrase to its region, among those of all images.

    regions {model: [R, E]}, phrases {model: [U, E]} distinct ones, phrase_of [R] int64 and image_of [R] int64. A phrase
    stands once in the list that regions search, however many have it. Every region asks with its phrase, and any region
    of an equal phrase is right. Intervals resample images, each with all of its regions.
    """
    everyone = torch.arange(int(phrase_of.max()) + 1)
    to_phrase = {n: ranks(x, phrases[n], phrase_of, everyone, device=device) for n, x in regions.items()}
    to_region = {n: ranks(phrases[n], x, everyone, phrase_of, device=device)[phrase_of] for n, x in regions.items()}
    found: list[Score] = []
    for way, rank in ((TO_PHRASE, to_phrase), (TO_REGION, to_region)):
        for k in ks:
            right = {name: one < k for name, one in rank.items()}
            found += _over_images(f"{way}, R@{k}", right, image_of, against, seed)
    return found


def _over_images(
    setting: str, right: Mapping[str, Tensor], image_of: Tensor, against: Mapping[str, str], seed: int
) -> list[Score]:
    """`compare` of questions [R] bool that are drawn with their images."""
    _, image, of = image_of.unique(return_inverse=True, return_counts=True)
    counts = {name: torch.bincount(image[one], minlength=len(of)) for name, one in right.items()}
    return compare(setting, counts, against, of=of, seed=seed)
