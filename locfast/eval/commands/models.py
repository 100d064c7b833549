"""The models of an evaluation: each --model, and the one that it is set against."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from locfast.engine.run_folder import RunFolder
from locfast.errors import UserError
from locfast.subject import Subject, open_start, open_subject, own_start


class Models:
    """Subjects by their names in tables, those set against first; every one is opened once.

    `against` says of a model which other it is set against. `aligned` are the names of runs. Raises UserError as
    `open_subject` does, and for a model given twice.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.subjects: dict[str, Subject] = {}
        self.against: dict[str, str] = {}
        self.aligned: set[str] = set()
        self._names: dict[tuple[Any, ...], str] = {}
        self._paths: dict[str, str] = {}
        if twice := [name for name in args.model if args.model.count(name) > 1]:
            raise UserError(f"--model {twice[0]}: it was given twice. Give every model once.")
        plain = {"pretrained": args.pretrained, "image_size": args.image_size, "seed": args.seed}
        is_run = {given: RunFolder(Path(given)).is_run() for given in args.model}
        others: dict[str, str] = {}
        for given in args.model:  # first, so that the originals stand on the left
            if args.against == "none":
                break
            if args.against is not None:
                runs = RunFolder(Path(args.against)).is_run()
                others[given] = self._open(args.against, **({"ema": args.ema} if runs else plain))
            elif is_run[given]:
                others[given] = self._open_start(given)
        for given in args.model:
            # A run with flags that are none of its business is refused by open_subject.
            own = {"pretrained": args.pretrained, "image_size": args.image_size, "softcap": args.softcap}
            name = self._open(given, **own, **({"ema": args.ema} if is_run[given] else {"seed": args.seed}))
            if is_run[given]:
                self.aligned.add(name)
            if given in others and others[given] != name:
                self.against[name] = others[given]

    def _open(self, given: str, **how: Any) -> str:
        return self._keep(_key(given, how), given, lambda: open_subject(given, **how))

    def _open_start(self, run: str) -> str:
        """What a run is set against: the model that it started from."""
        config = RunFolder(Path(run)).read_config()
        how = {"pretrained": config.pretrained, "image_size": config.image_size, "seed": config.seed}
        key = (run, "start") if own_start(config) else _key(config.model, how)
        return self._keep(key, config.model, lambda: open_start(run))

    def _keep(self, key: tuple[Any, ...], given: str, open_it: Callable[[], Subject]) -> str:
        """The name of what was opened for `key`, once."""
        if key not in self._names:
            subject = open_it()
            free = [name for name in (subject.name, given) if name not in self.subjects]
            name = free[0] if free else f"{given} ({len(self.subjects)})"
            self.subjects[name], self._names[key], self._paths[name] = subject, name, given
        return self._names[key]

    def __iter__(self) -> Iterator[tuple[str, Subject]]:
        return iter(self.subjects.items())

    def leave_out(self, name: str) -> None:
        """Judge a model no more, and set none against it."""
        del self.subjects[name]
        self.against = {one: other for one, other in self.against.items() if name not in (one, other)}

    def described(self) -> dict[str, dict[str, Any]]:
        """What each is, for the results."""
        return {
            name: {
                "model": self._paths[name],
                "backbone": subject.backbone.name,
                "softcap": subject.softcap,
                "image_size": list(subject.backbone.image_size),
                "aligned": name in self.aligned,
                "against": self.against.get(name),
            }
            for name, subject in self
        }


def _key(given: str, how: Mapping[str, Any]) -> tuple[Any, ...]:
    return (given, *sorted((name, value) for name, value in how.items() if value is not None))
