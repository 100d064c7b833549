"""Image towers of a joint space: open_clip's own in timm's modules, and timm's with the projection they came with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from locfast.errors import UserError
from locfast.models.backbone import load_backbone
from locfast.models.image_tower import load_image_tower
from locfast.models.open_clip_image import open_clip_image_tower
from locfast.models.open_clip_model import load_open_clip
from tests.eval.tiny_clip import CONFIGS, TINY

pytest.importorskip("open_clip")

LINEAR: dict[str, Any] = {**CONFIGS["eva"], "vision_cfg": {**CONFIGS["eva"]["vision_cfg"], "timm_proj": "linear"}}
KINDS = {
    "clip": CONFIGS["clip"],
    "quick": {**CONFIGS["clip"], "quick_gelu": True},
    "eva": CONFIGS["eva"],
    "linear": LINEAR,
    "sigmoid": CONFIGS["sigmoid"],
    "average": CONFIGS["average"],
    "scaled": {**CONFIGS["clip"], "vision_cfg": {**CONFIGS["clip"]["vision_cfg"], "ls_init_value": 0.1}},
}


def visual_of(kind: str, folder: Path) -> Any:
    """The image tower of a small open_clip model, stirred, so that biases and norms count."""
    file = folder / f"locfast-tower-{kind}.json"
    file.write_text(json.dumps(KINDS[kind]))
    visual = load_open_clip(str(file), "none", seed=1, flags=("--clip.text", "--clip.text-pretrained"))[0].visual
    generator = torch.Generator().manual_seed(2)
    for parameter in visual.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return visual


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "quick", "eva", "linear"])
def test_open_clips_image_tower_in_timms_modules_computes_the_same(kind, tmp_path):
    visual = visual_of(kind, tmp_path)
    tower = open_clip_image_tower(visual, kind).eval()
    images = torch.randn(3, 3, *tower.backbone.image_size, generator=torch.Generator().manual_seed(0))
    theirs = visual.eval()(images)
    assert theirs.std() > 0.1
    torch.testing.assert_close(tower(images)[:, 0], theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert tower.backbone.mean == pytest.approx(visual.preprocess_cfg["mean"])


@torch.no_grad()
def test_another_image_size_resamples_positions(tmp_path):
    visual = visual_of("clip", tmp_path)
    tower, small = open_clip_image_tower(visual, "clip", image_size=64), open_clip_image_tower(visual, "clip")
    assert tower.backbone.grid == (4, 4) and small.backbone.grid == (2, 2)
    assert tower(torch.randn(1, 3, 64, 64)).shape == (1, 17, 24)
    prefix = "backbone.model.cls_token"
    assert torch.equal(tower.state_dict()[prefix], small.state_dict()[prefix])


@pytest.mark.parametrize("kind", ["sigmoid", "average", "scaled"])
def test_towers_that_project_no_cls_token_are_refused(kind, tmp_path):
    with pytest.raises(UserError, match=f"--clip.text {kind}: its image tower .* has no CLS token"):
        open_clip_image_tower(visual_of(kind, tmp_path), kind)


@pytest.fixture
def timm_folder(tmp_path) -> tuple[Path, Any]:
    """A timm model with a head of 24 outputs, saved as timm saves it."""
    args = {"img_size": 32, **TINY}
    model: Any = timm.create_model("vit_base_patch16_224", num_classes=24, **args).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    save_for_hf(model, str(tmp_path / "timm"), model_args=args, safe_serialization=True)
    return tmp_path / "timm", model


@torch.no_grad()
def test_a_timm_folder_brings_its_projection(timm_folder):
    folder, model = timm_folder
    images = torch.randn(2, 3, 32, 32)
    tower = load_image_tower(str(folder), 24).eval()
    torch.testing.assert_close(tower(images)[:, 0], model(images), rtol=1e-5, atol=1e-5)
    assert not torch.equal(
        load_image_tower(str(folder), 24, new_head=True).backbone.model.head.weight, model.head.weight
    )
    with pytest.raises(UserError, match="projects to 24 dimensions, and the text tower has 16.*--clip.projection new"):
        load_image_tower(str(folder), 16)
    assert load_image_tower(str(folder), 16, new_head=True).eval()(images).shape == (2, 5, 16)


def test_a_folder_whose_saved_arguments_name_its_head_is_a_backbone_without_one_unless_asked(tmp_path):
    args = {"img_size": 32, **TINY, "num_classes": 24}  # as an export with a projection has them
    save_for_hf(timm.create_model("vit_base_patch16_224", **args), str(tmp_path), model_args=args)
    assert isinstance(load_backbone(str(tmp_path)).model.head, torch.nn.Identity)
    assert load_backbone(str(tmp_path), num_classes=None).model.head.out_features == 24


@torch.no_grad()
def test_a_checkpoint_file_brings_its_projection(tmp_path):
    file = tmp_path / "w.pth"
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=24)
    torch.save(model.state_dict(), file)
    tower = load_image_tower(f"vit_tiny_patch16_224@{file}", 24)
    assert torch.equal(tower.backbone.model.head.weight, model.head.weight)


def test_a_classifiers_head_is_no_projection_and_a_new_one_depends_on_the_seed_alone():
    towers = [load_image_tower("vit_tiny_patch16_224", 24, False, seed=seed) for seed in (1, 1, 2)]
    one, two, other = (tower.backbone.model.head for tower in towers)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.bias.abs().max() == 0
    assert one.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)


def test_a_clip_of_timm_has_its_own_width_without_its_weights():
    with pytest.raises(UserError, match="vit_base_patch32_clip_224.openai projects to 512 dimensions"):
        load_image_tower("vit_base_patch32_clip_224.openai", 24, False)


def test_a_clip_without_a_tag_has_a_new_head_where_timms_weights_are_a_classifiers():
    name = "vit_base_patch32_clip_224"
    assert timm.get_pretrained_cfg(name).num_classes == 1000
    assert load_image_tower(name, 24, False).joint_dim == 24


@pytest.mark.parametrize("text", ["{bad", "[1]"])
def test_a_folder_with_a_broken_config_is_told(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not a timm model config"):
        load_image_tower(str(tmp_path), 24)
