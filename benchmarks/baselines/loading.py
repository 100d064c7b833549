"""What feeds other trainers: torch's DataLoader over PIL or over torchvision's JPEG decoder, and webdataset.

All do the same work, the recipe of most training scripts: a random resized crop of 8 to 100 % of the area (bicubic,
antialiased), a flip, fp32 between 0 and 1, normalised, all of it in the worker processes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines._library import library
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

EPOCH = 2**16
"""Samples of a DataLoader's epoch: more than a run takes, as a new epoch would start new workers."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the image."""


@dataclass(frozen=True)
class Peer:
    """One way to make batches of `size` x `size` pixels."""

    name: str
    start: Callable[[int, int, torch.device], Iterator[Tensor]]
    """(workers, batch, device) -> endless batches [B, 3, size, size]."""
    pixels: Callable[[bytes, Box], Tensor]
    """The recipe's own decoding and resizing of one box of an image: [3, size, size] in 0 .. 1, to check it."""


class Files(Dataset):
    """Images of a folder, over and over, as (image, label): what torchvision's ImageFolder gives."""

    def __init__(self, files: Sequence[Path], read: Callable[[str], Any], transform: Callable[[Any], Tensor]) -> None:
        self.files, self.read, self.transform = [str(file) for file in files], read, transform

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.read(self.files[index % len(self.files)])), 0


def pil(files: Sequence[Path], size: int, mean: Sequence[float], std: Sequence[float]) -> Peer:
    """torch DataLoader, PIL, torchvision.transforms. Raises NotInstalledError."""
    transforms, functional = library("torchvision.transforms"), library("torchvision.transforms.functional")
    dataset = Files(files, _pil_file, _pil_recipe(transforms, size, mean, std))

    def pixels(data: bytes, box: Box) -> Tensor:
        return functional.to_tensor(_cut(functional, _pil_image(io.BytesIO(data)), box, size))

    return Peer("DataLoader, PIL", lambda *how: _loaded(dataset, *how), pixels)


def torchvision_jpeg(files: Sequence[Path], size: int, mean: Sequence[float], std: Sequence[float]) -> Peer:
    """torch DataLoader, torchvision.io.decode_jpeg, torchvision.transforms.v2. Raises NotInstalledError."""
    io_, v2 = library("torchvision.io"), library("torchvision.transforms.v2")
    bicubic = v2.InterpolationMode.BICUBIC
    recipe = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )

    def decode(data: Tensor) -> Tensor:
        return io_.decode_jpeg(data, mode=io_.ImageReadMode.RGB)

    def pixels(data: bytes, box: Box) -> Tensor:
        image = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return _cut(v2.functional, image, box, size).float() / 255

    dataset = Files(files, lambda path: decode(io_.read_file(path)), recipe)
    return Peer("DataLoader, torchvision", lambda *how: _loaded(dataset, *how), pixels)


def webdataset(shards: Sequence[Path], size: int, mean: Sequence[float], std: Sequence[float]) -> Peer:
    """webdataset over tar shards, PIL, torchvision.transforms. Raises NotInstalledError."""
    wds, transforms = library("webdataset"), library("torchvision.transforms")
    functional = library("torchvision.transforms.functional")
    recipe = _pil_recipe(transforms, size, mean, std)

    def start(workers: int, batch: int, device: torch.device) -> Iterator[Tensor]:
        # Shards drawn with replacement have no end; repeat() would cut a batch short at the end of every epoch.
        samples = wds.WebDataset([str(shard) for shard in shards], resampled=True, shardshuffle=False)
        samples = samples.shuffle(100).decode("pilrgb").to_tuple("jpg").map_tuple(recipe).batched(batch)
        return _moved(wds.WebLoader(samples, batch_size=None, num_workers=workers, pin_memory=_pinned(device)), device)

    def pixels(data: bytes, box: Box) -> Tensor:
        return functional.to_tensor(_cut(functional, _pil_image(io.BytesIO(data)), box, size))

    return Peer("webdataset", start, pixels)


def _pil_recipe(
    transforms: Any, size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def _pil_file(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return _pil_image(file)


def _pil_image(file: Any) -> Image.Image:
    return Image.open(file).convert("RGB")


def _cut(functional: Any, image: Any, box: Box, size: int) -> Any:
    left, top, right, bottom = box
    bicubic = functional.InterpolationMode.BICUBIC
    return functional.resized_crop(image, top, left, bottom - top, right - left, [size, size], bicubic)


def _loaded(dataset: Dataset, workers: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    options = {"prefetch_factor": 4} if workers else {}
    loader = DataLoader(
        dataset, batch, shuffle=True, num_workers=workers, pin_memory=_pinned(device), drop_last=True, **options
    )
    return _moved(loader, device)


def _moved(loader: Any, device: torch.device) -> Iterator[Tensor]:
    batches = iter(loader)
    try:
        for images, *_ in batches:
            yield images.to(device, non_blocking=True)
    finally:
        del batches  # ends the workers


def _pinned(device: torch.device) -> bool:
    return device.type == "cuda"
