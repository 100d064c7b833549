"""Both towers of a contrastive run load through open_clip's own calls, and embed as they were trained to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from locfast.models.backbone import Backbone
from locfast.models.exporters.folder import standalone
from locfast.models.exporters.open_clip import no_pair, write_open_clip_export
from locfast.models.exporters.open_clip_pair import TextHalf
from locfast.models.text_encoder import TextEncoder
from tests.models.exporters.small import noise, one_thread, stir, student

__all__ = ["one_thread"]

open_clip = pytest.importorskip("open_clip")

JOINT = 24


def pair(folder: Path, kind: str = "clip_gelu", joint: int = JOINT, **more: Any) -> tuple[Backbone, TextHalf]:
    """An image tower with a projection and its bias, and a text tower of its own size; both stirred."""
    text = {"context_length": 9, "vocab_size": 500, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    file = folder / "locfast-pair.json"
    file.write_text(json.dumps({"embed_dim": joint, "vision_cfg": vision, "text_cfg": text, **more}))
    open_clip.add_model_config(file)
    tower = open_clip.create_model(file.stem).eval()
    tower.visual = nn.Identity()
    stir(tower, seed=3)
    if kind == "tiny":
        backbone = student("classifier", depth=12, embed_dim=192, num_heads=3, img_size=224)
    else:
        backbone = student(kind)
    backbone.model.head = nn.Linear(backbone.embed_dim, joint)
    stir(backbone.model.head, seed=4)
    backbone.model.num_classes = joint
    return backbone.eval(), TextHalf(str(file), tower)


def captions() -> Tensor:
    return torch.randint(1, 500, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("more", [{}, {"custom_text": True}, {"init_logit_bias": -10.0}])
@torch.no_grad()
def test_open_clip_loads_both_towers_by_folder_and_by_file(more: dict[str, Any], tmp_path: Path) -> None:
    backbone, text = pair(tmp_path, **more)
    folder, images = tmp_path / "out", noise(backbone)
    write_open_clip_export(backbone, folder, softcap=None, card={"joint": "text"}, images=images, text=text)
    (config,) = folder.glob("aligned-*-64.json")
    open_clip.add_model_config(config)
    file = str(folder / "open_clip_model.safetensors")
    models = [
        open_clip.create_model_and_transforms(f"local-dir:{folder}")[0],
        open_clip.create_model_and_transforms(config.stem, pretrained=file)[0],
        standalone("open_clip_tower").load_model(folder),
    ]
    trained = backbone.model.head(backbone(images)[:, 0])
    assert trained.std() > 0.1 and backbone.model.head.bias.abs().max() > 0.1
    for model in models:
        torch.testing.assert_close(model.eval().encode_image(images), trained, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.encode_text(captions()), text.tower.encode_text(captions()))
        assert torch.equal(model.logit_scale, text.tower.logit_scale)
    card = (folder / "README.md").read_text()
    assert "open_clip_model.safetensors` holds image tower" in card and "What is not kept" not in card


@torch.no_grad()
def test_tokens_keep_their_norm_though_the_checkpoint_has_the_projections_bias_in_it(tmp_path: Path) -> None:
    backbone, text = pair(tmp_path)
    write_open_clip_export(backbone, tmp_path / "out", softcap=None, card={}, images=noise(backbone), text=text)
    tower = standalone("open_clip_tower")
    model = tower.load_model(tmp_path / "out").eval()
    trained = backbone(noise(backbone))
    torch.testing.assert_close(tower.image_tokens(model.visual, noise(backbone)), trained, rtol=1e-4, atol=1e-4)
    model.visual.output_tokens = True
    pooled, patches = model.visual(noise(backbone))
    torch.testing.assert_close(patches, trained[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled, backbone.model.head(trained[:, 0]), rtol=1e-4, atol=1e-4)
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    moved = tower.image_tokens(plain.visual, noise(backbone)) - trained
    torch.testing.assert_close(moved, moved[:1, :1].expand_as(moved), rtol=0, atol=1e-4)  # by one vector, all of them
    assert moved.abs().max() > 0.01


@torch.no_grad()
def test_a_timm_tower_keeps_its_bias_where_it_is(tmp_path: Path) -> None:
    backbone, text = pair(tmp_path, "tiny", custom_text=True)
    folder, images = tmp_path / "out", noise(backbone)
    write_open_clip_export(backbone, folder, softcap=None, card={}, images=images, text=text)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    assert type(model.visual).__name__ == "TimmModel"
    assert torch.equal(
        load_file(folder / "open_clip_model.safetensors")["visual.head.proj.bias"], model.visual.head.proj.bias
    )
    torch.testing.assert_close(
        model.encode_image(images), backbone.model.head(backbone(images)[:, 0]), rtol=1e-3, atol=1e-3
    )


def test_padded_images_are_padded_by_open_clips_transform_too(tmp_path: Path) -> None:
    from PIL import Image

    backbone, text = pair(tmp_path)
    padded = TextHalf(text.name, text.tower, padded=True)
    for half, around in ((padded, 0.0), (text, 1.0)):
        folder = tmp_path / str(around)
        write_open_clip_export(backbone, folder, softcap=None, card={}, text=half)
        transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
        pixels = transform(Image.new("RGB", (90, 30), (255, 255, 255)))
        assert pixels.shape == (3, 64, 64) and pixels[0, 32, 32] > 1
        # half a level of 255 over the deviation, 0.27, is the mean colour; white lies near 2
        assert bool(pixels[:, 0, 0].abs().max() < 0.01) == (around == 0.0)


def test_towers_that_open_clip_cannot_hold_in_one_model_are_told_apart(tmp_path: Path) -> None:
    backbone, text = pair(tmp_path, "clip_quickgelu")
    assert "runs QuickGELU and the text tower GELU" in str(no_pair(backbone, text))
    write_open_clip_export(backbone, tmp_path / "out", softcap=None, card={}, text=text)
    assert not (tmp_path / "out/open_clip_model.safetensors").exists()
    assert standalone("open_clip_tower").load_model(tmp_path / "out") is not None
    backbone, text = pair(tmp_path, "clip_quickgelu", quick_gelu=True)
    assert no_pair(backbone, text) is None
    wide, text = pair(tmp_path, joint=96)
    assert "cannot take it over" in str(no_pair(wide, text))
    wide.model.head.bias = None
    assert no_pair(wide, text) is None


@torch.no_grad()
def test_the_text_tower_of_a_run_is_the_module_that_the_export_reads(tmp_path: Path) -> None:
    """`TextEncoder` takes the image tower out, which the checkpoint then fills with ours."""
    _, text = pair(tmp_path)
    encoder = TextEncoder(text.tower, lambda texts: captions()[: len(texts)])
    assert not [key for key in encoder.model.state_dict() if key.startswith("visual")]
