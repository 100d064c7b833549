"""A locality-aligned backbone for Prismatic VLMs. Written by locfast, which it does not need.

Registered in prismatic/models/materialize.py:

    "aligned-clip-l-336px": {"cls": AlignedViT, "kwargs": {"folder": FOLDER}}

It keeps the contract of Prismatic's VisionBackbone: `forward(pixel_values)` [B, 3, H, W] -> [B, num_patches,
embed_dim], `default_image_resolution`, `image_transform`, an FSDP wrapping policy and `half_precision_dtype`. Unlike
Prismatic's own, which take patches of the penultimate block without norm, it gives what alignment trained: the last
block behind the final norm, prefix tokens in front (aligned.json may say otherwise). Without Prismatic installed it is
a plain module. timm_softcap.py must lie beside it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm_softcap import set_softcap
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import _module_wrap_policy, _or_policy, transformer_auto_wrap_policy
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Pad, Resize, ToTensor

if importlib.util.find_spec("prismatic") is not None:
    from prismatic.models.backbones.vision.base_vision import VisionBackbone
else:

    class VisionBackbone(nn.Module):  # type: ignore[no-redef]
        """What Prismatic's base class keeps."""

        def __init__(self, vision_backbone_id: str, image_resize_strategy: str, default_image_size: int = 224) -> None:
            super().__init__()
            self.identifier = vision_backbone_id
            self.image_resize_strategy = image_resize_strategy
            self.default_image_size = default_image_size
            self.image_transform: Any = None

        def get_image_transform(self) -> Any:
            return self.image_transform


class Featurizer(nn.Module):
    """The ViT as FSDP sees it: everything runs inside one `forward`, as its unsharding needs."""

    def __init__(self, vit: Any, prefix: bool) -> None:
        super().__init__()
        self.vit, self.prefix = vit, prefix

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.vit.forward_features(pixel_values)
        return tokens if self.prefix else tokens[:, self.vit.num_prefix_tokens :]


class AlignedViT(VisionBackbone):
    """folder: an export by `python -m locfast.export RUN --to prismatic`. default_image_size: the export's, if given.

    Raises ValueError for another image size, for an unknown resize strategy, and where the weights do not fit.
    """

    def __init__(
        self,
        vision_backbone_id: str,
        image_resize_strategy: str = "resize-naive",
        default_image_size: int | None = None,
        folder: str | Path = Path(__file__).parent,
    ) -> None:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        aligned = json.loads(Path(folder, "aligned.json").read_text(encoding="utf-8"))
        data = config["pretrained_cfg"]
        size = aligned["image_size"]
        if default_image_size not in (None, size):
            raise ValueError(f"{folder} was aligned at {size} px, and {default_image_size} px were asked for")
        super().__init__(vision_backbone_id, image_resize_strategy, default_image_size=size)
        self.folder = Path(folder)
        self.dtype = torch.bfloat16
        vit: Any = timm.create_model(
            config["architecture"], pretrained=False, **{**config["model_args"], "num_classes": 0}
        )
        vit.load_state_dict(load_file(Path(folder, "model.safetensors")), strict=True)
        vit = set_softcap(vit, aligned["softcap"])
        vit.blocks = vit.blocks[: aligned["blocks"]]
        if not aligned["norm"]:
            vit.norm = nn.Identity()
        self.featurizer = Featurizer(vit, aligned["prefix"]).eval()
        self.image_transform = _transform(image_resize_strategy, size, data)

    def get_fsdp_wrapping_policy(self) -> Callable[..., bool]:
        """Every block is a unit, and the featurizer."""
        blocks = {type(block) for block in self.featurizer.vit.blocks}
        return partial(
            _or_policy,
            policies=[
                partial(_module_wrap_policy, module_classes={Featurizer}),
                partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks),
            ],
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, H, W], as `image_transform` makes them -> [B, num_patches, embed_dim]."""
        return self.featurizer(pixel_values)

    @property
    def default_image_resolution(self) -> tuple[int, int, int]:
        return 3, self.default_image_size, self.default_image_size

    @property
    def embed_dim(self) -> int:
        return self.featurizer.vit.embed_dim

    @property
    def num_patches(self) -> int:
        """How many tokens `forward` gives, prefix tokens among them."""
        vit = self.featurizer.vit
        return vit.patch_embed.num_patches + (vit.num_prefix_tokens if self.featurizer.prefix else 0)

    @property
    def half_precision_dtype(self) -> torch.dtype:
        return self.dtype


def _transform(strategy: str, size: int, data: dict[str, Any]) -> Compose:
    """Prismatic's three ways from an image of any shape to a square, with the backbone's own resampling and colours."""
    interpolation = InterpolationMode(data["interpolation"])
    square = Resize((size, size), interpolation=interpolation)
    first: dict[str, list[Any]] = {
        "resize-naive": [square],
        "resize-crop": [Resize(size, interpolation=interpolation), CenterCrop(size)],
        "letterbox": [PadToSquare(tuple(int(255 * part) for part in data["mean"])), square],
    }
    if strategy not in first:
        raise ValueError(f"image_resize_strategy {strategy!r} is none of {', '.join(first)}")
    return Compose([*first[strategy], ToTensor(), Normalize(mean=data["mean"], std=data["std"])])


class PadToSquare:
    """Borders of the mean colour around an image, both sides alike."""

    def __init__(self, fill: tuple[int, ...]) -> None:
        self.fill = fill

    def __call__(self, image: Any) -> Any:
        side = max(image.size)
        left, top = ((side - length) // 2 for length in image.size)
        right, bottom = side - image.size[0] - left, side - image.size[1] - top
        return Pad((left, top, right, bottom), fill=self.fill)(image)
