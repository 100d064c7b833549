"""The patch probe: how much do frozen features tell of what is where? (Locality Alignment, section 4.1)

Heads learn to name the union of classes in every patch (local) or in the whole image (global) from frozen features.
Three splits: heads train on the first, the second decides when a head is done and which of its states counts, and
only that state ever meets the third, whose scores are reported. (The public reference reports the best epoch by the
very split that it reports.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locfast.eval.features import Features, Labelled, extract
from locfast.eval.heads import HeadKind, LinearHead, ProbeHead, Task
from locfast.eval.labels import classes_in_image, classes_in_patches
from locfast.eval.metrics import Scores, macro_scores


@dataclass(frozen=True)
class ProbeConfig:
    """How heads are trained. Learning rate, weight decay and batch are the public reference's."""

    heads: tuple[HeadKind, ...] = ("linear", "transformer")
    tasks: tuple[Task, ...] = ("local", "global")
    lr: float = 1e-3
    """Peak learning rate of transformer heads."""
    linear_lr: float = 3e-2
    """Of linear heads, which at the rate above need hundreds of epochs."""
    weight_decay: float = 0.01
    batch_size: int = 32
    warmup_steps: int = 100
    patience: int = 3
    """Epochs without a lower validation loss after which the rate is cut, or at the lowest rate a head is done."""
    cuts: int = 1
    """How often the rate is cut to a tenth, from the best state so far, before a head counts as done."""
    max_epochs: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Probed:
    """One trained head."""

    test: Scores
    validation: Scores
    epochs: int
    """Epochs trained."""
    best_epoch: int
    """The epoch (from 1) whose state was kept, chosen on the validation split."""
    head: ProbeHead


@dataclass(frozen=True)
class Split:
    """Frozen tokens [M, P + N, C] of a split, and what heads must say of them."""

    tokens: Tensor
    targets: dict[Task, Tensor]  # local [M, N, K], global [M, K], bool

    def __len__(self) -> int:
        return len(self.tokens)


def probe(
    features: Features,
    splits: dict[str, Labelled],
    num_classes: int,
    patch_size: tuple[int, int],
    num_heads: int,
    config: ProbeConfig | None = None,
    unlabeled: int | None = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Probed]:
    """Probe frozen features: {"local/linear": Probed, "local/transformer": ..., "global/linear": ..., ...}.

    splits: "train", "validation" and "test". num_heads: attention heads of the transformer head (the backbone's).
    unlabeled: the class id that drops out of patches with any other class, or None.
    """
    config = config or ProbeConfig()
    ready: dict[str, Split] = {}
    num_prefix = 0
    for name in ("train", "validation", "test"):
        data = splits[name]
        tokens, num_prefix = extract(features, data.images, device)
        labels = data.label_map.to(device)
        targets: dict[Task, Tensor] = {
            "local": classes_in_patches(labels, patch_size, num_classes, unlabeled),
            "global": classes_in_image(labels, num_classes),
        }
        ready[name] = Split(tokens, targets)
    done = {}
    for task in config.tasks:
        for kind in config.heads:
            torch.manual_seed(config.seed)
            width, tokens_per_image = ready["train"].tokens.shape[-1], ready["train"].tokens.shape[1]
            head = ProbeHead(kind, task, width, num_classes, num_prefix, tokens_per_image - num_prefix, num_heads)
            done[f"{task}/{kind}"] = train_head(head.to(device), task, ready, config)
    return done


def train_head(head: ProbeHead, task: Task, splits: dict[str, Split], config: ProbeConfig) -> Probed:
    """Train until the validation loss stops falling, keep the best state, and score that one on the test split.

    Not the validation recall: a fresh head says yes to half of everything, which is a recall that training first loses.
    """
    train, validation = splits["train"], splits["validation"]
    peak = config.linear_lr if isinstance(head.head, LinearHead) else config.lr
    optimizer = torch.optim.AdamW(head.parameters(), lr=peak, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    lowest, state, best_epoch = float("inf"), head.state_dict(), 0
    cuts = stale = step = epoch = 0
    while epoch < config.max_epochs:
        epoch += 1
        head.train()
        for rows in _shuffled(len(train), config.batch_size, generator):
            step += 1
            rate = peak * 0.1**cuts * min(1.0, step / config.warmup_steps)
            optimizer.param_groups[0]["lr"] = rate
            loss = F.binary_cross_entropy_with_logits(head(train.tokens[rows]), train.targets[task][rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits = predict(head, validation.tokens)
        held_out = F.binary_cross_entropy_with_logits(logits, validation.targets[task].float()).item()
        if held_out < lowest:
            lowest, best_epoch, stale, state = held_out, epoch, 0, copy.deepcopy(head.state_dict())
            continue
        stale += 1
        if stale < config.patience:
            continue
        if cuts == config.cuts:
            break
        cuts, stale = cuts + 1, 0
        head.load_state_dict(state)
    head.load_state_dict(state)
    scores = {
        name: macro_scores(predict(head, s.tokens), s.targets[task]) for name, s in splits.items() if s is not train
    }
    return Probed(scores["test"], scores["validation"], epoch, best_epoch, head)


@torch.no_grad()
def predict(head: nn.Module, tokens: Tensor, batch_size: int = 512) -> Tensor:
    """Logits of a head for all tokens [M, P + N, C], in evaluation mode: [M, N, K] or [M, K]."""
    head.eval()
    return torch.cat([head(batch) for batch in tokens.split(batch_size)])


def _shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch's batches in random order; the last one is left out where it is not full, unless it is the only one."""
    order = torch.randperm(count, generator=generator)
    whole = count // batch_size * batch_size or count
    yield from order[:whole].split(batch_size)
