"""Training the heads of one seed, all of them on the same batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.errors import UserError
from locfast.eval.heads import HeadKind, Intervention, ProbeHead, Task
from locfast.eval.probing.scoring import Scores, Tally
from locfast.eval.probing.settings import Settings
from locfast.eval.probing.targets import Targets
from locfast.eval.probing.tokens import Tokens

PREDICTED = 128
"""Images that heads see at a time when they are scored."""


@dataclass(frozen=True)
class Part:
    """Some images of a split: those that heads train on, those that choose, or those that are reported."""

    tokens: Tokens
    targets: Targets
    rows: Tensor
    """[M] int64, on the CPU."""


@dataclass
class Trained:
    """One head, what it went through, and how it does."""

    task: Task
    kind: HeadKind
    intervention: Intervention
    head: ProbeHead
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    highest: float = -1.0
    """Recall on the images that choose, of the epochs that may be chosen."""
    selection: Scores | None = None
    validation: Scores | None = None


@contextmanager
def _deterministic() -> Iterator[None]:
    """Ask for one order of all sums, of attention's backward on a GPU above all; where there is none, go on."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@_deterministic()
def train_heads(
    make: Callable[[Task, HeadKind, Intervention], ProbeHead],
    settings: Settings,
    seed: int,
    train: Part,
    selection: Part,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
) -> list[Trained]:
    """All heads of a seed, each with the state of the epoch whose macro recall on `selection` was highest.

    make: (task, kind, intervention) -> ProbeHead with weights from torch's generator, which is seeded for each alike.
    Of equal epochs the first counts. A fresh head says yes to half of everything, a recall that training first loses:
    under the held-out protocol only an epoch counts whose loss on `selection` is below that of saying how frequent
    every class is; if there is none, the last one does. Raises UserError where a loss is not finite.
    """
    heads = []
    for task, kind, intervention in settings.forms():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads.append(Trained(task, kind, intervention, make(task, kind, intervention).to(device)))
    parameters = [p for one in heads for p in one.head.parameters()]
    fused = device.type == "cuda"
    # One optimiser for all: AdamW treats every tensor alone, and so a head trains as it would without the others.
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
    generator = torch.Generator().manual_seed(seed)
    least = [math.inf if settings.protocol == "paper" else _loss_of_frequencies(one, selection) for one in heads]
    steps = settings.epochs * _batches(len(train.rows), settings.batch_size)
    step = 0
    for epoch in range(1, settings.epochs + 1):
        losses = torch.zeros(len(heads), device=device)
        for one in heads:
            one.head.train()
        order = train.rows[torch.randperm(len(train.rows), generator=generator)]
        count = 0
        for rows, tokens in train.tokens.batches(_whole(order, settings.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = rate(settings, step, steps)
            wanted = {task: _wanted(task, train.targets, rows.to(device)) for task in settings.tasks}
            with autocast():
                found = torch.stack([_loss(one.head(tokens).float(), wanted[one.task]) for one in heads])
            optimizer.zero_grad()
            found.sum().backward()
            optimizer.step()
            losses += found.detach()
            step, count = step + 1, count + 1
        chosen = evaluate(heads, selection, device, autocast, ranked=False)
        if not all(map(math.isfinite, [*losses.tolist(), *(unseen for _, unseen in chosen)])):
            raise UserError(
                f"seed {seed}, epoch {epoch}: a head's loss is not finite, so its figures would mean nothing. Try a "
                f"smaller --lr than {settings.lr}, or --precision fp32."
            )
        for one, loss, (scores, unseen), limit in zip(heads, (losses / count).tolist(), chosen, least, strict=True):
            recall = scores.macro["recall"]
            one.epochs.append({"loss": loss, "selection_loss": unseen, "selection": recall})
            better = unseen < limit and recall > one.highest
            if better or (epoch == settings.epochs and one.selection is None):
                one.selection, one.best_epoch, one.highest = scores, epoch, recall
                one.best = copy.deepcopy(one.head.state_dict())
    for one in heads:
        one.head.load_state_dict(one.best)
    return heads


def rate(settings: Settings, step: int, steps: int) -> float:
    """The learning rate of update `step` (from 0): up from 0, then a cosine to a tenth."""
    warmup = min(settings.warmup_steps, steps // 10)
    if step < warmup:
        return settings.lr * step / warmup
    through = (step - warmup) / max(1, steps - warmup)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * through)))


@torch.no_grad()
def evaluate(
    heads: list[Trained],
    part: Part,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    ranked: bool = True,
) -> list[tuple[Scores, float]]:
    """Scores and mean losses of all heads on a part, in one pass over its tokens. ranked: average precision too."""
    tallies, losses, weights = [Tally(ranked) for _ in heads], [0.0] * len(heads), [0] * len(heads)
    for one in heads:
        one.head.eval()
    tasks = {one.task for one in heads}
    for rows, tokens in part.tokens.batches(part.rows.split(PREDICTED)):
        wanted = {task: _wanted(task, part.targets, rows.to(device)) for task in tasks}
        for i, one in enumerate(heads):
            asked = wanted[one.task]
            with autocast():
                logits = one.head(tokens).float()
            count = int(asked.counted.sum())
            losses[i] += _loss(logits, asked).item() * count
            weights[i] += count
            ranks = logits if asked.one_of is None else logits.log_softmax(-1)
            tallies[i].add(asked.told(logits), ranks, asked.classes, asked.counted)
    return [(tally.scores(device), loss / max(1, w)) for tally, loss, w in zip(tallies, losses, weights, strict=True)]


@dataclass(frozen=True)
class Wanted:
    """What a head should say: `classes` [B, N, K] (or [B, K] of whole images) bool, of majority labels `one_of` [B, N]
    int64 too, and which patches (images) count: those of which any pixel has a class."""

    classes: Tensor
    counted: Tensor
    one_of: Tensor | None = None

    def told(self, logits: Tensor) -> Tensor:
        """The classes that a head with these logits names: bool, as `classes`."""
        if self.one_of is None:
            return logits > 0
        return torch.zeros_like(self.classes).scatter_(-1, logits.argmax(-1, keepdim=True), True)


def _wanted(task: Task, targets: Targets, rows: Tensor) -> Wanted:
    classes = targets.images(rows) if task == "global" else targets.unions(rows)
    majority = task == "local" and targets.local.ndim == 2
    return Wanted(classes, classes.any(-1), targets.local[rows].long() if majority else None)


def _loss(logits: Tensor, wanted: Wanted) -> Tensor:
    """The mean over what counts; 0 where nothing does."""
    if wanted.one_of is None:
        each = F.binary_cross_entropy_with_logits(logits, wanted.classes.float(), reduction="none").mean(-1)
    else:
        each = F.cross_entropy(logits.mT, wanted.one_of.clamp(min=0), reduction="none")
    return (each * wanted.counted).sum() / wanted.counted.sum().clamp(min=1)


def _loss_of_frequencies(one: Trained, part: Part) -> float:
    """The loss of a head that knows how frequent every class is on a part, and nothing of its images."""
    rows = part.rows.to(part.targets.whole.device)
    wanted = [_wanted(one.task, part.targets, some) for some in rows.split(PREDICTED)]
    count = sum(int(some.counted.sum()) for some in wanted)
    present = torch.stack([some.classes.flatten(0, -2).sum(0, dtype=torch.float64) for some in wanted]).sum(0)
    share = present / max(1, count)
    if wanted[0].one_of is not None:
        return -torch.special.xlogy(share, share).sum().item()
    return -(torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share)).mean().item()


def _batches(count: int, batch_size: int) -> int:
    return max(1, count // batch_size)


def _whole(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """An epoch's batches; the last one is left out where it is not full, unless it is the only one."""
    yield from order[: _batches(len(order), batch_size) * batch_size].split(batch_size)
