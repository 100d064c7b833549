"""open_clip's own loader takes the export, and its tower gives the trained tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from locfast.errors import UserError
from locfast.models.exporters.folder import standalone
from locfast.models.exporters.open_clip import write_open_clip_export
from tests.models.exporters.small import CAP, noise, student

open_clip = pytest.importorskip("open_clip")


@pytest.mark.parametrize("kind", ["clip_quickgelu", "clip_gelu"])
@torch.no_grad()
def test_a_clip_loads_as_open_clips_own_vision_transformer_with_the_trained_tokens(kind: str, tmp_path: Path) -> None:
    backbone = student(kind)
    off = write_open_clip_export(backbone, tmp_path, softcap=CAP, card={}, images=noise(backbone))
    tower = standalone("open_clip_tower")
    visual = tower.load_model(tmp_path).eval().visual
    trained = backbone(noise(backbone), softcap=CAP)
    assert type(visual).__name__ == "VisionTransformer"
    torch.testing.assert_close(tower.image_tokens(visual, noise(backbone)), trained, rtol=1e-4, atol=1e-4)
    visual.output_tokens = True  # open_clip's own way to tokens: patches behind the final norm
    torch.testing.assert_close(visual(noise(backbone))[1], trained[:, 1:], rtol=1e-4, atol=1e-4)
    assert off is not None and off > 0.01
    assert f"off by a relative L2 of {off:.2e}" in " ".join((tmp_path / "README.md").read_text().split())


@torch.no_grad()
def test_open_clips_own_call_takes_the_file(tmp_path: Path) -> None:
    backbone = student("clip_quickgelu")
    write_open_clip_export(backbone, tmp_path, softcap=None, card={})
    (config,) = tmp_path.glob("aligned-*-64.json")
    open_clip.add_model_config(config)
    model = open_clip.create_model(config.stem, pretrained_image_path=str(tmp_path / "visual.safetensors")).eval()
    tokens = standalone("open_clip_tower").image_tokens(model.visual, noise(backbone))
    torch.testing.assert_close(tokens, backbone(noise(backbone)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_another_architecture_loads_as_a_timm_tower(tmp_path: Path) -> None:
    backbone = student("classifier", depth=12, embed_dim=192, num_heads=3, img_size=224)
    write_open_clip_export(backbone, tmp_path, softcap=CAP, card={}, images=noise(backbone))
    tower = standalone("open_clip_tower")
    visual = tower.load_model(tmp_path).eval().visual
    assert type(visual).__name__ == "TimmModel"
    trained = backbone(noise(backbone), softcap=CAP)
    torch.testing.assert_close(tower.image_tokens(visual, noise(backbone)), trained, rtol=1e-3, atol=1e-3)


def test_a_model_of_open_clip_keeps_its_text_tower_and_projection(tmp_path: Path) -> None:
    write_open_clip_export(student("clip_quickgelu"), tmp_path / "out", softcap=CAP, card={})
    (config,) = (tmp_path / "out").glob("aligned-*-64.json")
    values = json.loads(config.read_text())
    (tmp_path / "theirs-64.json").write_text(json.dumps({**values, "embed_dim": 32}))
    open_clip.add_model_config(tmp_path / "theirs-64.json")
    torch.manual_seed(0)
    before = open_clip.create_model("theirs-64").state_dict()
    torch.manual_seed(0)
    after = standalone("open_clip_tower").load_model(tmp_path / "out", "theirs-64").state_dict()
    kept = [key for key in before if not key.startswith("visual.") or key == "visual.proj"]
    assert "text_projection" in kept and all(torch.equal(before[key], after[key]) for key in kept)
    assert not torch.equal(before["visual.ln_post.weight"], after["visual.ln_post.weight"])


def test_a_tower_that_does_not_fit_is_refused_where_open_clip_would_load_nothing(tmp_path: Path) -> None:
    write_open_clip_export(student("clip_quickgelu"), tmp_path / "out", softcap=None, card={})
    (config,) = (tmp_path / "out").glob("aligned-*-64.json")
    values = json.loads(config.read_text())
    vision: dict[str, Any] = {**values["vision_cfg"], "layers": 3}
    (tmp_path / "shallow-64.json").write_text(json.dumps({**values, "vision_cfg": vision}))
    open_clip.add_model_config(tmp_path / "shallow-64.json")
    with pytest.raises(ValueError, match=r"does not fit this image tower: \['transformer.resblocks.3"):
        standalone("open_clip_tower").load_model(tmp_path / "out", "shallow-64")


@pytest.mark.parametrize(
    "change, found",
    [
        ({"quick_gelu": False}, "this is {'act': 'GELU', 'heads': 4, 'eps': 1e-05}"),
        ({"vision_cfg": {"head_width": 32}}, "'heads': 2"),
        ({"vision_cfg": {"norm_kwargs": {"eps": 1e-6}}}, "'eps': 1e-06"),
    ],
)
def test_a_tower_of_the_same_shapes_that_computes_something_else_is_refused(
    change: dict[str, Any], found: str, tmp_path: Path
) -> None:
    """ViT-B-16 for ViT-B-16-quickgelu: every key and shape fits."""
    write_open_clip_export(student("clip_quickgelu"), tmp_path / "out", softcap=None, card={})
    (config,) = (tmp_path / "out").glob("aligned-*-64.json")
    values = json.loads(config.read_text())
    vision = {**values["vision_cfg"], **change.get("vision_cfg", {})}
    (tmp_path / "alike-64.json").write_text(json.dumps({**values, **change, "vision_cfg": vision}))
    open_clip.add_model_config(tmp_path / "alike-64.json")
    with pytest.raises(ValueError, match="does not fit this image tower") as refused:
        standalone("open_clip_tower").load_model(tmp_path / "out", "alike-64")
    assert found in str(refused.value)


def test_an_architecture_that_its_name_alone_does_not_build_is_refused(tmp_path: Path) -> None:
    for kind, found in (("siglip", "depth=4"), ("beit", "img_size=64")):
        with pytest.raises(UserError, match=f"by its name alone.*{found}.*--to timm"):
            write_open_clip_export(student(kind), tmp_path / "out", softcap=None, card={})
    assert not (tmp_path / "out").exists()
