"""A run's folder: what lies where in it, when it may be used, and how a method is rebuilt from it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locfast import __version__
from locfast.cli import NO_ROOM
from locfast.config.base import TrainConfig
from locfast.config.files import from_dict, read_yaml, write_config
from locfast.config.registry import method_config, run_config_class
from locfast.engine import checkpoint, lock
from locfast.errors import UserError
from locfast.methods.base import Method

_MARK = "# locfast"
_ASIDE = ".config.yaml"


@dataclass(frozen=True)
class RunFolder:
    """RUN/config.yaml, train.log, metrics.jsonl, checkpoints/, exported/, nonfinite/, and .lock while it trains."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exported(self) -> Path:
        return self.path / "exported"

    @property
    def frozen(self) -> Path:
        return self.checkpoints / checkpoint.FROZEN

    def is_run(self) -> bool:
        """Whether locfast wrote this folder: its config.yaml begins with our mark."""
        try:
            return self.config.read_text(encoding="utf-8").startswith(_MARK)
        except (OSError, UnicodeDecodeError):
            return False

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """UserError when something is there that neither flag allows to touch. Changes nothing."""
        if resume and overwrite:
            raise UserError("--resume keeps what is in the run folder and --overwrite removes it: give one of them.")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: this is a file; give a folder.")
        try:
            used = self.path.is_dir() and any(entry.name not in (lock.NAME, _ASIDE) for entry in self.path.iterdir())
        except OSError as error:
            raise self._unusable(error) from None
        if used and not self.is_run():
            raise UserError(
                f"--out {self.path}: the folder holds files that are not of a locfast run, so locfast neither writes "
                "there nor removes them. Give another --out."
            )
        if used and not (resume or overwrite):
            raise UserError(
                f"--out {self.path}: a run is already there. Add --resume to go on with it, --overwrite to replace it, "
                "or give another --out."
            )

    def open(self, guard: lock.Lock, *, resume: bool, overwrite: bool) -> None:
        """`check`, then make the folder ready and take `guard`: with `overwrite`, remove the run that is there."""
        self.check(resume=resume, overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            guard.take()
            self.check(resume=resume, overwrite=overwrite)  # another run may have come and gone meanwhile
            for entry in list(self.path.iterdir()) if overwrite else ():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != lock.NAME:
                    entry.unlink()
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"--out {self.path}: locfast cannot make or write this folder: {error.strerror} "
            f"({error.filename or self.path}). Give a folder that you may write to."
        )

    def write_config(self, config: TrainConfig) -> None:
        """Write the resolved config, aside and renamed: it also marks the folder as a run."""
        aside = self.config.with_name(_ASIDE)
        header = f"locfast {__version__}; repeat with: python -m locfast.train --config THIS-FILE --out ANOTHER-RUN"
        write_config(config, aside, header)
        os.replace(aside, self.config)

    def read_config(self) -> TrainConfig:
        """The config of the run. UserError when this is no run folder."""
        if not self.is_run():
            raise UserError(f"{self.path} is not a run folder of locfast: it has no config.yaml that locfast wrote.")
        values = read_yaml(self.config)
        kind = run_config_class(str(values.get("method", TrainConfig.method)))
        return from_dict(kind, {**values, "out": str(self.path)}, str(self.config))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to the first one that a kill or a power cut spoilt."""
        lines = self.metrics.read_bytes().splitlines() if self.metrics.is_file() else []
        entries = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # JSON cut short, or bytes that are no text, as a power cut leaves them
                break
            if not isinstance(entry, dict) or "step" not in entry:
                break
            entries.append(entry)
        return entries

    def cut_metrics(self, step: int) -> None:
        """Drop what metrics.jsonl says about steps after `step`, which a resumed run writes again."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_metrics() if entry["step"] <= step]
        aside = self.metrics.with_name(".metrics.jsonl")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, self.metrics)


def load_method(run: Path, ema: bool | None = None) -> Method:
    """The method of a run with the weights of its newest complete checkpoint, on the CPU, in eval mode.

    ema: True for the averaged weights (UserError when the run has none), False for the plain ones, None for the
    averaged ones where there are any.
    """
    from locfast.methods import create_method

    folder = RunFolder(Path(run))
    config = folder.read_config()
    found, complaints = checkpoint.newest(folder.checkpoints)
    if found is None:
        raise UserError(f"{run} has no complete checkpoint. " + " ".join(complaints))
    averaged = found.tensors("ema") if ema is not False else {}
    if ema and not averaged:
        raise UserError(f"{run} kept no moving average of its weights; train with --ema 0.9998, or leave --ema out.")
    frozen_ok = folder.frozen.is_file() and not checkpoint.damage(folder.frozen, found.state["frozen"])
    method = create_method(
        config.method,
        method_config(config),
        model=config.model,
        pretrained=config.pretrained and not frozen_ok,
        image_size=config.image_size,
        seed=config.seed,
    )
    frozen = checkpoint.read_tensors(folder.frozen) if frozen_ok else method.frozen_state()
    checkpoint.restore(method, {**frozen, **found.tensors("model"), **averaged}, found.folder)
    return method.eval()
