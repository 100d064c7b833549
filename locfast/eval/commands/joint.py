"""What zero-shot and retrieval share: every model's way into a joint space, and the text tower on its other side."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from locfast.errors import UserError
from locfast.eval.commands.models import Models
from locfast.eval.global_ability.features import Tower
from locfast.eval.global_ability.text_tower import (
    TextTower,
    check_open_clip,
    open_text_tower,
    projection,
    same_origin,
    tuned_text_tower,
)
from locfast.subject import Subject

EXPECTED = (
    "Expected: alignment does not train the path from the CLS token to the text space, so an aligned backbone loses "
    "{what}; whether its global ability is kept, kNN and linear say."
)


@dataclass(frozen=True)
class Joint:
    """By model: its tower into the joint space, the text tower there, and where that is from, for the results."""

    towers: dict[str, Tower]
    texts: dict[str, TextTower]
    described: dict[str, dict[str, Any]]
    notes: list[str]


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError where one of --text-model and --text-pretrained is given without the other."""
    if (args.text_model is None) != (args.text_pretrained is None):
        lacking = "--text-model" if args.text_model is None else "--text-pretrained"
        raise UserError(f"{lacking} is missing: give both, e.g. --text-model ViT-B-16 --text-pretrained openai.")


class TextTowers:
    """Text towers of open_clip, each opened once. The one that the flags name is opened at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_flags(args)
        check_open_clip()
        self.seed = args.seed
        self.asked = (args.text_model, args.text_pretrained) if args.text_model is not None else None
        self._open: dict[tuple[str, str], TextTower] = {}
        if self.asked:
            self.open(*self.asked)

    def open(self, name: str, pretrained: str) -> TextTower:
        """Raises UserError as `open_text_tower` does."""
        key = (name, pretrained)
        if key not in self._open:
            self._open[key] = open_text_tower(name, pretrained, seed=self.seed)
        return self._open[key]

    def of(self, name: str, models: Models) -> tuple[TextTower, dict[str, Any]]:
        """The text tower for a model, and where it is from.

        The one that its run trained with it; else what the flags name; else what its run names, or the run that is
        set against it. Raises UserError where nothing names one.
        """
        text = models.subjects[name].text
        if text is not None and text.tower is not None:
            model = text.model or (self.asked and self.asked[0])
            if model is None:
                raise UserError(f"--text-model is missing: {name} does not say whose tokenizer its text tower takes.")
            source = "trained by the run" if name in models.aligned else text.pretrained
            return tuned_text_tower(model, text.tower), {"model": model, "pretrained": source}
        pair = self.asked or _named(name, models)
        if pair is None:
            raise UserError(
                f"--text-model is missing: {name} names no text tower. Type the open_clip model whose joint space it "
                "reaches, e.g. --text-model ViT-B-16 --text-pretrained openai."
            )
        return self.open(*pair), {"model": pair[0], "pretrained": pair[1]}


def _named(name: str, models: Models) -> tuple[str, str] | None:
    """What the run says whose model it is, or else a run that it is set against."""
    for one in (name, *(run for run, other in models.against.items() if other == name)):
        text = models.subjects[one].text
        if text is not None and text.model is not None and text.pretrained is not None:
            return text.model, text.pretrained
    return None


def open_joint(texts: TextTowers, models: Models, given: list[str], what: str, device: torch.device) -> Joint:
    """Towers of all `models`, text towers on `device`. given: models that flags name; what: what the figures judge.

    A starting model that nobody named and that reaches no joint space is left out, where its run learnt to reach one.
    Raises UserError where a model and a text tower do not fit.
    """
    joint = Joint({}, {}, {}, [])
    for name, subject in list(models):
        try:
            text, told = texts.of(name, models)
            embed = subject.embed or projection(text, subject.backbone, name)
        except UserError as error:
            if not _is_bare_start(name, models, given):
                raise
            models.leave_out(name)
            joint.notes.append(f"{name}, from which the run started, is left out: {error}")
            continue
        if subject.embed:
            _check_dimension(name, subject, text)
        text.model.to(device)
        joint.towers[name] = Tower(subject.backbone, subject.softcap, embed)
        joint.texts[name], joint.described[name] = text, told
    if any(models.subjects[name].embed is None for name in {*models.aligned, *models.against}):
        joint.notes.append(EXPECTED.format(what=what))
    joint.notes.extend(_of_other_origin(models, joint.texts, joint.described))
    return joint


def _is_bare_start(name: str, models: Models, given: list[str]) -> bool:
    """Whether a model is there only because runs that reach a joint space by themselves started from it."""
    runs = [run for run, other in models.against.items() if other == name]
    return name not in given and bool(runs) and all(models.subjects[run].embed for run in runs)


def _check_dimension(name: str, subject: Subject, text: TextTower) -> None:
    assert subject.embed is not None
    tokens = torch.zeros(1, subject.backbone.num_tokens, subject.backbone.embed_dim)
    with torch.inference_mode():
        ours, theirs = subject.embed(tokens).shape[-1], text.encode(["a photo"]).shape[-1]
    if ours != theirs:
        raise UserError(
            f"--text-model {text.name}: its joint space has {theirs} dimensions, and {name} was trained for one of "
            f"{ours}. Type the open_clip model that taught it, or leave out --text-model where the run names it."
        )


def _of_other_origin(
    models: Models, texts: Mapping[str, TextTower], described: Mapping[str, dict[str, Any]]
) -> list[str]:
    plain = [(n, s) for n, s in models if s.embed is None and n not in models.aligned and n not in models.against]
    return [
        f"{name} is not the image tower of {texts[name].name} ({described[name]['pretrained']}): their patch "
        "embeddings differ, so these figures say nothing unless it was trained further."
        for name, subject in plain
        if not same_origin(texts[name], subject.backbone)
    ]
