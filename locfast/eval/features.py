"""Frozen features for the probe, computed once and kept in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from locfast.data.spec import Source
from locfast.errors import UserError
from locfast.models.backbone import Backbone

Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""images [B, 3, H, W] fp32 in 0 .. 1 -> (patch tokens [B, N, C], prefix tokens [B, P, C]); P may be 0."""


@dataclass(frozen=True)
class Labelled:
    """Images and their label maps, all of one size, on the CPU."""

    images: Tensor  # [M, 3, H, W] uint8
    label_map: Tensor  # [M, H, W] uint8

    def __len__(self) -> int:
        return len(self.images)


def read_labelled(source: Source, indices: Sequence[int], size: tuple[int, int]) -> Labelled:
    """Samples of a labelled source: the largest centre square, resized (images bicubic, label maps nearest).

    Raises UserError where a sample has no label map.
    """
    images, labels = [], []
    for index in indices:
        record = source.read(index)
        if record.label_map is None:
            raise UserError(
                f"The probe was asked to read {record.name or f'sample {index}'}, which has no label map. It needs one "
                "class id per pixel for every image: use a folder with images/ and annotations/, or --data demo."
            )
        images.append(_square(record.image, size, "RGB", Image.Resampling.BICUBIC))
        labels.append(_square(record.label_map, size, None, Image.Resampling.NEAREST))
    return Labelled(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels)))


def _square(file: bytes, size: tuple[int, int], mode: str | None, how: Image.Resampling) -> np.ndarray:
    opened = Image.open(io.BytesIO(file))
    image = opened if mode is None else opened.convert(mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    height, width = size
    return np.asarray(image.resize((width, height), how, box=(left, top, left + side, top + side)))


def backbone_features(backbone: Backbone, softcap: float | None = None) -> Features:
    """The features of a backbone after its final norm; `softcap` as in its aligned forward pass."""

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (backbone.mean, backbone.std))
        tokens = backbone.forward_features((images - mean) / std, softcap=softcap)
        return tokens[:, backbone.num_prefix_tokens :], tokens[:, : backbone.num_prefix_tokens]

    return features


@torch.inference_mode()
def extract(
    features: Features, images: Tensor, device: torch.device | str = "cpu", batch_size: int = 128
) -> tuple[Tensor, int]:
    """All tokens of all images, prefix first: uint8 images [M, 3, H, W] -> (fp32 [M, P + N, C] on `device`, P)."""
    parts, prefix_tokens = [], 0
    for batch in images.split(batch_size):
        patches, prefix = features(batch.to(device).float() / 255)
        prefix_tokens = prefix.shape[1]
        parts.append(torch.cat([prefix, patches], dim=1).float())
    return torch.cat(parts), prefix_tokens
