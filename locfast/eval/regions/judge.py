"""From embeddings of regions to scores: texts are encoded once a text tower, and readings stand side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locfast.data.labelled.split import some
from locfast.eval.global_ability.results import Score
from locfast.eval.global_ability.retrieval import retrieval_scores
from locfast.eval.global_ability.text_tower import TextTower
from locfast.eval.regions.reading import RegionFeatures
from locfast.eval.regions.scores import recognise, recognition_scores, region_retrieval_scores


@dataclass(frozen=True)
class Judge:
    """What was read, the text tower of every model, and which model is set against which other."""

    read: RegionFeatures
    texts: Mapping[str, TextTower]
    against: Mapping[str, str]
    device: torch.device
    seed: int = 0

    def recognition(self, labels: Tensor, classes: Sequence[str], sentences: Sequence[str]) -> list[Score]:
        """labels [R] int64; what stands for each class is its sentence."""
        encoded = self._encode(sentences)
        regions = self.read.regions.items()
        predicted = {label(*key): recognise(x, encoded[key[0]], device=self.device) for key, x in regions}
        return recognition_scores(
            predicted, labels, self.read.image_of, classes, self._readings_against(), seed=self.seed
        )

    def retrieval(self) -> list[Score]:
        """Of regions and their phrases."""
        distinct = list(dict.fromkeys(self.read.phrases))
        number = {phrase: place for place, phrase in enumerate(distinct)}
        encoded = self._encode(distinct)
        return region_retrieval_scores(
            {label(*key): x for key, x in self.read.regions.items()},
            {label(*key): encoded[key[0]] for key in self.read.regions},
            torch.tensor([number[phrase] for phrase in self.read.phrases]),
            self.read.image_of,
            self._readings_against(),
            seed=self.seed,
            device=self.device,
        )

    def captions(self) -> list[Score]:
        """Of images that have captions, and these."""
        rows = torch.tensor([row for row, own in enumerate(self.read.texts) if own])
        image_of = torch.repeat_interleave(torch.tensor([len(own) for own in self.read.texts if own]))
        images = {name: x[rows] for name, x in self.read.features.items()}
        encoded = self._encode([text for own in self.read.texts for text in own])
        return retrieval_scores(images, encoded, image_of, self.against, seed=self.seed, device=self.device)

    def _encode(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """[K, E] for every model; models that share a text tower share these."""
        towers = {id(text): text for text in self.texts.values()}
        found = {key: text.encode(sentences, self.device) for key, text in towers.items()}
        return {name: found[id(text)] for name, text in self.texts.items()}

    def _readings_against(self) -> dict[str, str]:
        """A reading is set against the same one of the other model, or against its only one."""
        of: dict[str, list[str]] = {}
        for name, how in self.read.regions:
            of.setdefault(name, []).append(how)
        return {
            label(name, how): label(other, how if how in of[other] else of[other][-1])
            for name, other in self.against.items()
            for how in of[name]
        }


def label(model: str, reading: str) -> str:
    """How a model's reading is called in tables and results."""
    return f"{model}, {reading}"


def classes_without(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """A note where classes have no region."""
    there = torch.bincount(labels, minlength=len(classes))
    gone = [name for name, count in zip(classes, there.tolist(), strict=True) if not count]
    if not gone:
        return []
    return [
        f"{len(gone)} of {len(classes)} classes have no region here and are left out of mAcc, though their names are "
        f"among the answers: {some(gone)}"
    ]
