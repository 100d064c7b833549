"""What Prismatic gets keeps its contract of a vision backbone, and computes what was trained."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from locfast.errors import UserError
from locfast.models.exporters.adapter import AdapterKind, make_adapter
from locfast.models.exporters.folder import standalone
from locfast.models.exporters.prismatic import write_prismatic_export
from tests.models.exporters.small import CAP, artifacts, noise, student

BASE = """
from abc import ABC, abstractmethod
from torch import nn
class VisionBackbone(nn.Module, ABC):
    def __init__(self, vision_backbone_id, image_resize_strategy, default_image_size=224):
        super().__init__()
        self.identifier = vision_backbone_id
        self.image_resize_strategy = image_resize_strategy
        self.default_image_size = default_image_size
        self.featurizer = None
        self.image_transform = None
    def get_image_transform(self): return self.image_transform
    @abstractmethod
    def get_fsdp_wrapping_policy(self): ...
    @abstractmethod
    def forward(self, pixel_values): ...
    @property
    @abstractmethod
    def default_image_resolution(self): ...
    @property
    @abstractmethod
    def embed_dim(self): ...
    @property
    @abstractmethod
    def num_patches(self): ...
    @property
    @abstractmethod
    def half_precision_dtype(self): ...
"""
"""The abstract members that Prismatic asks for (prismatic/models/backbones/vision/base_vision.py, commit 4fcd061)."""


def write(folder: Path, kind: str, adapter: AdapterKind | None = None, cap: float | None = CAP) -> Any:
    backbone = student(kind)
    made = make_adapter(adapter, artifacts(backbone), cap, 96, "prismatic")
    write_prismatic_export(backbone, folder, softcap=cap, card={}, adapter=made, images=noise(backbone))
    return backbone


@pytest.mark.parametrize(
    "kind, adapter, cap",
    [
        ("clip_quickgelu", None, CAP),
        ("siglip", "truncated", CAP),
        ("dinov2_reg", "mlp", CAP),
        ("eva02", None, CAP),
        ("eva_fused", None, CAP),
        ("beit", None, None),
    ],
)
@torch.no_grad()
def test_features_tokens_and_widths_fit_the_adapter_beside_them(
    kind: str, adapter: AdapterKind | None, cap: float | None, tmp_path: Path
) -> None:
    backbone = write(tmp_path, kind, adapter, cap)
    vit = standalone("aligned_vit").AlignedViT("aligned", folder=tmp_path)
    projector = standalone("maskembed_adapter").load_adapter(tmp_path)
    images = noise(backbone)
    features = vit(images)
    assert features.shape == (2, vit.num_patches, vit.embed_dim)
    assert vit.default_image_resolution == (3, *backbone.image_size)
    assert projector(features).shape == (2, vit.num_patches, 96)
    expected = backbone(images, softcap=cap)
    if adapter == "truncated":
        features = projector.tokens(features)
    expected = expected[:, backbone.num_prefix_tokens :] if adapter == "mlp" else expected
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    if cap is not None:
        assert "`AlignedViT` bounds attention logits to 2 * tanh" in (tmp_path / "README.md").read_text()


def test_a_truncated_export_holds_the_weights_of_the_blocks_that_are_left(tmp_path: Path) -> None:
    write(tmp_path, "clip_quickgelu", "truncated")
    vit = standalone("aligned_vit").AlignedViT("aligned", folder=tmp_path).featurizer.vit
    assert len(vit.blocks) == 2 and isinstance(vit.norm, nn.Identity)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["depth"] == 2


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_every_resize_strategy_makes_a_square_of_an_odd_image(strategy: str, tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    vit = standalone("aligned_vit").AlignedViT("aligned", strategy, folder=tmp_path)
    pixels = vit.get_image_transform()(Image.new("RGB", (91, 40), (255, 255, 255)))
    assert pixels.shape == (3, 64, 64)
    white, mean_colour = pixels[0, 32, 32].item(), pixels[0, 0, 32].item()
    assert white == pytest.approx(1.0)  # SigLIP's mean and deviation are 0.5
    # letterbox puts the mean colour, 127 of 255, above the picture
    assert mean_colour == pytest.approx((127 / 255 - 0.5) / 0.5 if strategy == "letterbox" else 1.0, abs=1e-6)


def test_an_unknown_strategy_and_another_size_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    aligned = standalone("aligned_vit").AlignedViT
    with pytest.raises(ValueError, match="'stretch' is none of resize-naive"):
        aligned("aligned", "stretch", folder=tmp_path)
    with pytest.raises(ValueError, match="aligned at 64 px, and 224 px"):
        aligned("aligned", default_image_size=224, folder=tmp_path)


def test_fsdp_is_told_to_wrap_the_featurizer_and_each_block(tmp_path: Path) -> None:
    write(tmp_path, "clip_quickgelu")
    vit = standalone("aligned_vit").AlignedViT("aligned", folder=tmp_path)
    policy = vit.get_fsdp_wrapping_policy()
    wrapped = [name for name, module in vit.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=1)]
    assert wrapped == ["featurizer", *(f"featurizer.vit.blocks.{index}" for index in range(4))]
    assert vit.half_precision_dtype == torch.bfloat16
    assert vit.folder == tmp_path  # where Prismatic's four lines look for the adapter


def test_inside_prismatic_it_is_one_of_its_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "clip_quickgelu")
    package = tmp_path / "prismatic/models/backbones/vision"
    package.mkdir(parents=True)
    for folder in (package, *list(package.parents)[:3]):
        (folder / "__init__.py").touch()
    (package / "base_vision.py").write_text(BASE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "out")
    spec: Any = importlib.util.spec_from_file_location("aligned_vit_inside", tmp_path / "out/aligned_vit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    base = sys.modules["prismatic.models.backbones.vision.base_vision"].VisionBackbone
    vit = module.AlignedViT("aligned-clip", "letterbox", folder=tmp_path / "out")  # no abstract member is missing
    assert isinstance(vit, base) and vit.identifier == "aligned-clip"
    for name in [name for name in sys.modules if name.partition(".")[0] == "prismatic"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_cap_on_attention_that_the_plain_file_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="soft cap on attention that the exported code does not hold.*--to timm"):
        write(tmp_path / "out", "beit")
    assert not (tmp_path / "out").exists()
