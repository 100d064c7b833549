"""Tokens and labels of a split in a folder, keyed by weights and data; whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from locfast.errors import UserError
from locfast.eval.probing.targets import Targets
from locfast.models.backbone import Backbone

VERSION = 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def model_key(backbone: Backbone) -> str:
    """Of all parameters and buffers of a backbone by name, and of its layers: other weights, another activation or
    another number of heads, another key."""
    model = backbone.model
    digest = hashlib.sha256(f"{type(model).__name__} {backbone.num_heads} {model}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def folder_of(cache: Path, **facts: object) -> Path:
    """Where the tokens that `facts` describe lie."""
    told = json.dumps({"version": VERSION, **facts}, sort_keys=True, default=str)
    return cache / hashlib.sha256(told.encode()).hexdigest()[:24]


class Writer:
    """Writes tokens [M, T, C] in fp16, row by row, into a folder that takes its name when everything is there.

    Raises UserError where the folder cannot be made, or has no room for the tokens.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder, self.shape = folder, shape
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(folder.parent)
            self.aside = Path(tempfile.mkdtemp(prefix=f"{_aside()}{os.getpid()}-", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"--cache {folder.parent}: nothing can be written there ({error.strerror}); give another folder."
            ) from None
        try:
            self.values = np.lib.format.open_memmap(self.aside / "tokens.npy", "w+", np.float16, shape)
            _reserve(self.aside / "tokens.npy")
        except OSError as error:
            self.abandon()
            if error.errno not in NO_ROOM:
                raise
            raise UserError(
                f"--cache {folder.parent}: no room for tokens of {math.prod(shape) * 2 / 1e9:.2f} GB; free some, give "
                "another folder, or probe with --features live."
            ) from None
        self.written = 0

    def write(self, rows: Tensor, tokens: Tensor) -> None:
        self.values[rows.cpu().numpy()] = tokens.cpu().numpy()
        self.written += len(rows)

    def finish(self, targets: Targets) -> None:
        """Raises RuntimeError where rows are missing."""
        if self.written != self.shape[0]:
            raise RuntimeError(f"{self.written} of {self.shape[0]} images were written")
        self.values.flush()
        tensors = {name: getattr(targets, name).cpu() for name in ("local", "whole", "shares")}
        save_file(tensors, self.aside / "labels.safetensors")
        facts = {"shape": self.shape, "classes": targets.num_classes, "bytes": self.values.nbytes}
        (self.aside / "whole.json").write_text(json.dumps(facts), encoding="utf-8")
        for file in self.aside.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        if read(self.folder) is not None:  # another process was first
            self.abandon()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)  # what is there is not whole
            os.replace(self.aside, self.folder)

    def abandon(self) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)


def read(folder: Path) -> tuple[np.ndarray, Targets] | None:
    """Tokens [M, T, C], mapped into memory, and their labels; None where `folder` is not there or not whole."""
    try:
        facts = json.loads((folder / "whole.json").read_text(encoding="utf-8"))
        values = np.load(folder / "tokens.npy", mmap_mode="c")  # writable to torch, and never to the file
        tensors = load_file(folder / "labels.safetensors")
    except Exception:  # a file that is missing or cut short: numpy, json and safetensors each say so in their way
        return None
    if list(values.shape) != facts["shape"] or len(tensors["local"]) != len(values):
        return None
    return values, Targets(**tensors, num_classes=facts["classes"])


def _reserve(file: Path) -> None:
    """Take the file's bytes from the disk at once: where it fills up later, a write into mapped memory is a SIGBUS."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with open(file, "r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno in NO_ROOM:  # others: a file system that reserves nothing
                raise


def _aside() -> str:
    return f".partial-{platform.node()}-"


def _sweep(cache: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote."""
    for folder in cache.glob(f"{_aside()}*"):
        process = folder.name.removeprefix(_aside()).partition("-")[0]
        if process.isdecimal() and not os.path.exists(f"/proc/{process}"):
            shutil.rmtree(folder, ignore_errors=True)
