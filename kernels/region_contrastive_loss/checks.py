"""What callers can get wrong, told before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EXCHANGES = ("auto", "ring", "gather")
MAX_REGIONS = 2**20
"""Of one rank, which fp32 sums of their exponentials allow for (docs/kernels/region_contrastive_loss.md)."""
MAX_WIDTH = 2**16
"""Of embeddings: a row is worked on in one piece."""

_agreed: set[tuple[str, str]] = set()


def check(
    regions: Any,
    texts: Any,
    logit_scale: Any,
    threshold: Any,
    valid: Any,
    group: Any,
    exchange: str,
    keep_filter: Any,
) -> None:
    """Raises ValueError with what was wanted and what was found."""
    for name, x in (("regions", regions), ("texts", texts), ("valid", valid)):
        if not isinstance(x, Tensor) and not (name == "valid" and x is None):
            raise ValueError(f"region losses: {name} must be a tensor, got {type(x).__name__}")
    if regions.ndim != 2 or regions.shape != texts.shape or 0 in regions.shape:
        raise ValueError(
            f"region losses: regions and texts must be [R, E] both, and not empty, got {list(regions.shape)} "
            f"and {list(texts.shape)}"
        )
    if len(regions) > MAX_REGIONS or regions.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"region losses: at most 2^20 regions on a rank, of width 2^16 at most, got {list(regions.shape)}"
        )
    if regions.dtype not in DTYPES or regions.dtype != texts.dtype:
        raise ValueError(
            f"region losses: regions and texts must share one of fp64, fp32, fp16 and bf16, got {regions.dtype} "
            f"and {texts.dtype}"
        )
    check_number("logit_scale", logit_scale, regions.device)
    if texts.device != regions.device:
        raise ValueError(
            f"region losses: regions and texts must be on one device, got {regions.device} and {texts.device}"
        )
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if threshold is not None and not (number and -1 <= threshold <= 1):
        raise ValueError(
            f"region losses: filter_threshold is a cosine, -1 to 1, or None for no filter, got {threshold!r}"
        )
    if valid is not None and (
        valid.dtype != torch.bool or valid.shape != regions.shape[:1] or valid.device != regions.device
    ):
        raise ValueError(
            f"region losses: valid must be bool [R] = [{len(regions)}] on {regions.device}, got {valid.dtype} "
            f"{list(valid.shape)} on {valid.device}"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "region losses: group must be a process group that this rank belongs to, or None for this process alone, "
            f"got {group!r}"
        )
    if exchange not in EXCHANGES:
        raise ValueError(f"region losses: exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    if not isinstance(keep_filter, bool):
        raise ValueError(f"region losses: keep_filter must be True or False, got {keep_filter!r}")


def check_number(name: str, value: Any, device: torch.device) -> None:
    """Raises ValueError for what is neither a real number nor a tensor of one on `device`."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point() or value.device != device:
            raise ValueError(
                f"region losses: {name} must be one floating number on {device}, got {value.dtype} "
                f"{list(value.shape)} on {value.device}"
            )
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"region losses: {name} must be a number or a tensor of one, got {value!r}")


@torch.compiler.assume_constant_result  # asked of other ranks once, when a graph is made: nothing for the graph itself
def agree_once(group: dist.ProcessGroup, facts: dict[str, Any]) -> None:
    """Compare facts with the other ranks' the first time that a group meets them. Raises ValueError where they differ.

    Else ranks would send each other tensors of other sizes, or wait for ever for one that another rank does not send.
    """
    key = group.group_name, repr(facts)
    if key in _agreed:
        return
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, facts, group=group)
    for name in facts:
        found = [other[name] for other in every]
        if any(one != found[0] for one in found):
            told = "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(found))
            raise ValueError(f"region losses: all ranks of a group must call with the same {name}, got {told}")
    _agreed.add(key)
