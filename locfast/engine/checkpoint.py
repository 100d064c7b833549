"""Checkpoints: safetensors and a JSON state, written aside and renamed, checked for tears when read. No pickle."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from locfast.errors import UserError

STATE = "state.json"
FROZEN = "frozen.safetensors"
KEEP = 3
"""How many checkpoints a run keeps."""
_ASIDE = ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `state` as JSON holds it, tensors read when asked for."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files (`model`, `optimizer`, `ema`), on the CPU; empty if there is no such file."""
        path = self.folder / f"{name}.safetensors"
        return read_tensors(path) if path.name in self.state["files"] else {}


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def save(checkpoints: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write checkpoints/step-... : one safetensors file for each entry of `tensors`, and the state, written last.

    The folder appears under its name only when every byte of it is on the disk. OSError (a full disk) leaves what was
    there before untouched.
    """
    return write_folder(step_folder(checkpoints, step), tensors, {**state, "step": step})


def write_folder(target: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write a folder of tensors and a state aside, make it durable, and rename it to `target`."""
    aside = target.parent / (_ASIDE + target.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        files = {f"{name}.safetensors": write_tensors(aside / f"{name}.safetensors", t) for name, t in tensors.items()}
        with open(aside / STATE, "w", encoding="utf-8") as file:
            json.dump({**state, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        error.add_note(str(target))
        raise
    _sync_folder(aside)
    if target.exists():
        _remove(target)
    os.rename(aside, target)
    _sync_folder(target.parent)
    return target


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write one safetensors file and make it durable; gives what `intact` wants to know of it."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # the format refuses two names for one memory (tied weights)
        plain[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    save_file(plain, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return fingerprint(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, in memory of their own."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def write_frozen(checkpoints: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write the frozen weights of a run, once, aside and renamed."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    aside = checkpoints / (_ASIDE + FROZEN)
    try:
        entry = write_tensors(aside, tensors)
    except Exception as error:
        aside.unlink(missing_ok=True)
        error.add_note(str(checkpoints / FROZEN))
        raise
    os.replace(aside, checkpoints / FROZEN)
    _sync_folder(checkpoints)
    return entry


def fingerprint(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file: what tells a torn one."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def damage(path: Path, expected: dict[str, int]) -> str | None:
    """What is wrong with a file whose fingerprint should be `expected`, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path.name} has {size} bytes instead of {expected['bytes']}"
    return None if fingerprint(path) == expected else f"{path.name} has changed since it was written (checksum)"


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every file of it checked. UserError says what is missing or torn."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files = state["files"]
        int(state["step"])
    except FileNotFoundError:
        raise UserError(f"{folder}: {STATE} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: {STATE} is torn") from None
    for name, expected in files.items():
        if wrong := damage(folder / name, expected):
            raise UserError(f"{folder}: {wrong}")
    return Checkpoint(folder, state)


def newest(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, or None; and what was wrong with each one that is newer."""
    complaints: list[str] = []
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            return read(folder), complaints
        except UserError as error:
            complaints.append(str(error))
    return None, complaints


def put_aside_newer(checkpoints: Path, step: int) -> None:
    """Rename what stands after `step` (damaged folders) to damaged-..., and clear away what a kill left half done."""
    for folder in checkpoints.glob("step-*"):
        if folder.name > step_folder(checkpoints, step).name:
            damaged = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
    for left in checkpoints.glob(_ASIDE + "*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def prune(checkpoints: Path, keep: int = KEEP) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for folder in sorted(checkpoints.glob("step-*"), reverse=True)[keep:]:
        _remove(folder)


def restore(method: torch.nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Load a whole state dict. UserError when it is not of this method around this model."""
    own = method.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if missing or unknown or shapes:
        example = (
            f"{shapes[0]} is {list(tensors[shapes[0]].shape)} there and {list(own[shapes[0]].shape)} here"
            if shapes
            else f"{missing[0]} is missing there"
            if missing
            else f"{unknown[0]} is unknown here"
        )
        raise UserError(
            f"{origin} is a checkpoint of another model: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(shapes)} of another shape ({example}). Give the run's own --method and --model, or another --out."
        )
    method.load_state_dict(tensors)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves no torn one under its name."""
    aside = folder.with_name(f"{_ASIDE}removed-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
