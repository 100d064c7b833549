"""What kNN and linear share: features of a training and a validation split, by pooled tokens."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locfast.eval.commands import shared

if TYPE_CHECKING:
    from locfast.data.sources import ClassFolder
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.features import ImageFeatures, Reading
    from locfast.eval.global_ability.results import Score


@dataclass(frozen=True)
class Splits:
    """Both splits, read with every model."""

    models: Models
    reading: Reading
    pools: dict[str, str]
    sources: tuple[ClassFolder, ClassFolder]
    train: ImageFeatures
    val: ImageFeatures

    def finish(
        self, args: argparse.Namespace, evaluation: str, found: list[Score], notes: list[str], **how: Any
    ) -> None:
        settings = {"device": str(self.reading.device), "precision": self.reading.precision, "pools": self.pools, **how}
        splits = {"train": (self.sources[0], self.train), "val": (self.sources[1], self.val)}
        shared.finish(args, evaluation, found, self.models, splits, settings, notes)


def read_splits(args: argparse.Namespace, check: Callable[[int], None]) -> Splits:
    """Check folders and flags, open the models, and read everything once.

    check: raises UserError where there are too few training images, called before anything is read.
    """
    from locfast.data.sources import ClassFolder
    from locfast.data.sources.class_folder import check_same_classes
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.features import Tower, image_features
    from locfast.eval.global_ability.pooling import pick_pool, pooled
    from locfast.eval.global_ability.results import check_out

    shared.tell_progress()
    reading = shared.reading(args)
    train, val = ClassFolder(args.train), ClassFolder(args.val)
    check_same_classes(train, val)
    check(len(train))
    check_out(args.out, args.overwrite)
    models = Models(args)
    pools = {name: pick_pool(subject.backbone, args.pool, name) for name, subject in models}
    towers = {
        name: Tower(subject.backbone, subject.softcap, pooled(subject.backbone, pools[name]))
        for name, subject in models
    }
    read = [image_features(source, towers, reading) for source in (train, val)]
    return Splits(models, reading, dict(pools), (train, val), *read)
