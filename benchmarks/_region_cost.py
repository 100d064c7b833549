"""What one rank of the region losses sends, stores and computes, worked out; and what plainer losses would need.

`benchmarks/region_bytes.py` counts what real ranks send and keep, and holds it to this. Each formula names the line of
kernels/region_contrastive_loss that it counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import _harness  # noqa: F401  (puts the checkout on the path)

from locfast.kernels.region_contrastive_loss.block import padded
from locfast.kernels.region_contrastive_loss.filter import WORD
from locfast.kernels.region_contrastive_loss.tiles import PANEL

FP64, FP32 = 8, 4
NUMBER = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number of the unit rows, in the dtype of the products."""


@dataclass(frozen=True)
class Call:
    """One line that makes ranks talk: how often it runs, and the bytes of the tensor that a rank hands over."""

    what: str
    kind: str
    """send (to the next rank, while as much comes in from the one behind), all_gather, all_reduce or reduce."""
    nbytes: int
    times: int = 1

    def wire(self, ranks: int) -> float:
        """Bytes that leave a rank, and that reach it, the ranks being a ring as gloo's and NCCL's are.

        An all-gather passes every block on but the last. An all-reduce is a reduce-scatter and an all-gather of shares.
        A reduce is a reduce-scatter whose shares then go to the owner: of as many as there are ranks, each owning one.
        (NCCL's reduce has no last step and needs 1 / ranks less.)
        """
        share = {
            "send": 1,
            "all_gather": ranks - 1,
            "all_reduce": 2 * (ranks - 1) / ranks,
            "reduce": (ranks - 1) * (1 + 1 / ranks) / ranks,
        }
        return self.times * self.nbytes * share[self.kind]


@dataclass(frozen=True)
class Setting:
    """What one rank is given: `rows` of its own, of `width`. One that is alone sends nothing, and stores."""

    ranks: int
    rows: int
    width: int
    exchange: str = "ring"
    dtype: str = "bfloat16"
    form: str = "contrastive"
    filters: bool = True
    keeps_filter: bool = True
    trains_texts: bool = True
    backend: str = "triton"

    @property
    def _padded(self) -> tuple[int, int]:
        """Rows and width as they travel: filled up to whole tiles by Triton (block.py, `padded`)."""
        return padded((self.rows, self.width), self.backend)

    @property
    def texts(self) -> int:
        """Bytes of a rank's unit rows of texts: a block that travels."""
        rows, width = self._padded
        return rows * width * NUMBER[self.dtype]

    @property
    def gradients(self) -> int:
        """Bytes of one rank's share of the gradient of a block, in fp32 (products.py, `product`)."""
        rows, width = self._padded
        return rows * width * FP32

    @property
    def flops(self) -> int:
        """Of forward and backward: as the benchmarks count them, 2 for a multiply-add, whatever is executed."""
        return (10 if self.filters else 8) * self.rows**2 * self.ranks * self.width


def forward_calls(at: Setting) -> list[Call]:
    """Of ops.py, `_forward`, in its order."""
    rows, _ = at._padded
    calls = [Call("positives and which rows are valid", "all_gather", 2 * rows * FP64)]  # ranks.all(torch.stack(...))
    calls.append(_texts(at))
    if at.form == "contrastive":  # _log2_of_sum: ranks.max(own.clone()), ranks.sum(...), of [ranks, rows] each
        calls.append(Call("sums by column", "all_reduce", at.ranks * rows * FP64, times=2))
    return [*calls, Call("loss", "all_reduce", FP64)]  # ranks.sum(loss + ...)


def backward_calls(at: Setting) -> list[Call]:
    """Of ops.py, `_backward`. A share of a gradient goes round the whole ring and home again: `ranks` sends."""
    calls = [_texts(at)]
    if at.trains_texts:  # ranks.give(owner, part), once for every owner
        calls.append(Call("gradients of texts", "send" if at.exchange == "ring" else "reduce", at.gradients, at.ranks))
    return calls


def _texts(at: Setting) -> Call:
    """ranks.blocks(text_units): in a ring none goes on in the last step."""
    if at.exchange == "ring":
        return Call("texts", "send", at.texts, at.ranks - 1)
    return Call("texts", "all_gather", at.texts)


def wire(calls: list[Call], ranks: int) -> float:
    """Bytes that leave a rank, and as many reach it."""
    return sum(call.wire(ranks) for call in calls)


def kept(at: Setting) -> dict[str, int]:
    """Bytes between forward and backward, beyond the inputs: what `_forward` returns beside the loss."""
    rows, _ = at._padded
    found = {
        "unit rows": 2 * at.texts,  # region_units, text_units
        # inverse [2, R] in fp32; rows [3, R], columns [2, ranks, R] and count in fp64
        "sums and norms": 2 * rows * FP32 + (3 + 2 * at.ranks) * rows * FP64 + FP64,
    }
    if at.filters and at.keeps_filter:
        found["filter"] = at.ranks * rows * -(-rows // WORD) * 4  # bits [ranks, R, R / 32] int32
    return found


def forward_travelling(at: Setting) -> int:
    """Bytes of other ranks' texts in memory at the most (exchange.py, `blocks`).

    Round a ring: the block that is worked on and the one that comes in; the one before is let go once that is started.
    """
    if at.ranks == 1:
        return 0
    return at.texts * (min(3, at.ranks - 1) if at.exchange == "ring" else at.ranks)


def backward_travelling(at: Setting) -> int:
    """The same with shares of gradients (exchange.py, `give`); they weigh more than the third block of texts.

    Round a ring: what was sent last and what came in for it, the share it is added to, and room for the next to come.
    Gathered: three sums under way, and the own share, which is the result.
    """
    if not at.trains_texts:
        return forward_travelling(at)
    if at.ranks == 1:
        return at.gradients
    if at.exchange == "ring":
        return at.texts * min(2, at.ranks - 1) + 4 * at.gradients
    return at.texts * at.ranks + min(4, at.ranks) * at.gradients


def peak(at: Setting) -> int:
    """Bytes beyond the inputs that a rank needs at the most, in its backward; vectors and what is freed at once aside.

    In a ring the weights of a panel (triton.py, `gradients`) are gone when room is made for the next share to come.
    """
    rows, _ = at._padded
    weights = min(PANEL["rows"], rows) * rows * NUMBER[at.dtype]
    makes_room = at.ranks > 1 and at.trains_texts and at.exchange == "ring"
    beside = max(0, weights - at.gradients) if makes_room else weights
    return sum(kept(at).values()) + backward_travelling(at) + at.gradients + beside  # the third: regions_grad


@dataclass(frozen=True)
class Plain:
    """Another way to compute the same loss (or SigLIP's): bytes on a rank at the least, and bytes that leave it."""

    name: str
    stored: int
    sent: int


def plain_ways(at: Setting) -> list[Plain]:
    """What is stored is a lower bound: matrices of pairs that a backward reads, or makes, and gathered embeddings."""
    own, number = at.rows * at.width, NUMBER[at.dtype]
    every, share = (at.rows * at.ranks) ** 2, at.rows**2 * at.ranks
    both = 2 * own * at.ranks * number  # regions and texts of all ranks
    gathered = 2 * 2 * (at.ranks - 1) * own * number  # both of them, and both gradients scattered back in their dtype
    passed = (at.ranks - 1) * own * number
    mask = int(at.filters)  # a bool a pair
    return [
        # Logits of all pairs and their gradient, in fp32, on every rank, which differentiates its own rows alone:
        # open_clip's ClipLoss by default.
        Plain("all pairs on every rank", (2 * FP32 + mask) * every + both, 2 * passed),
        # Own regions with all texts, own texts with all regions; in the backward the gradient of one of them beside.
        Plain("own rows of the logits, both ways", (3 * FP32 + mask) * share + both, gathered),
        # A block of logits and its gradient, made anew in the backward: texts pass on twice, gradients once. No filter.
        Plain("SigLIP's, block by block", 2 * FP32 * at.rows**2 + 2 * own * number, 3 * passed),
        # As open_clip's SigLipLoss, which leaves blocks and texts to autograd.
        Plain("SigLIP's, all blocks kept", FP32 * share + at.ranks * own * number, 2 * passed),
    ]
