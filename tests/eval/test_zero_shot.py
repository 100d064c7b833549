"""Zero-shot of an unaligned backbone is open_clip's own, for every family that is not refused."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from locfast.data.sources import ClassFolder
from locfast.errors import UserError
from locfast.eval.global_ability.prompts import class_names, templates
from locfast.eval.global_ability.text_tower import TextTower, open_text_tower, projection, same_origin
from locfast.models.backbone import Backbone, load_backbone
from tests.eval.tiny_clip import CONFIGS, TINY

open_clip = pytest.importorskip("open_clip")

PROMPTS = ["a photo of a {}.", "a drawing of the {}."]
NAMES = ["cat", "dog", "traffic light"]


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TextTower]:
    """A real open_clip model with random weights, from a config file; stirred, so that biases and norms count."""
    folder, made = tmp_path_factory.mktemp("configs"), {}

    def make(kind: str) -> TextTower:
        if kind not in made:
            file = folder / f"locfast-{kind}.json"  # a name with "siglip" would ask the hub for its tokenizer
            file.write_text(json.dumps(CONFIGS[kind]))
            made[kind] = tower = open_text_tower(str(file), "none", seed=1)
            generator = torch.Generator().manual_seed(2)
            for parameter in tower.model.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return made[kind]

    return make


def as_backbone(kind: str, tower: TextTower) -> Backbone:
    """The image tower as timm has it: CLIP through timm's own converter, the others as open_clip's trunk."""
    if kind != "clip":
        trunk = copy.deepcopy(tower.model.visual.trunk)
        trunk.reset_classifier(0)
        return Backbone(trunk, kind).eval()
    model = timm.create_model("vit_base_patch16_clip_224", img_size=32, num_classes=24, **TINY)
    state = checkpoint_filter_fn(dict(tower.model.state_dict()), model)
    model.load_state_dict(state)
    model.reset_classifier(0)
    return Backbone(model, kind).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "sigmoid", "eva"])
def test_logits_of_an_unaligned_backbone_are_open_clips_own(kind: str, text_tower) -> None:
    tower = text_tower(kind)
    backbone = as_backbone(kind, tower)
    images = torch.randn(5, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    ours = tower.logits(projection(tower, backbone, kind)(backbone.forward_features(images)),
                        tower.classifier(NAMES, PROMPTS))  # fmt: skip

    encoded = tower.model.encode_image(images, normalize=True)
    prompts = [[prompt.format(name) for prompt in PROMPTS] for name in NAMES]
    means = torch.stack([tower.model.encode_text(tower.tokenizer(p), normalize=True).mean(0) for p in prompts])
    theirs = encoded @ torch.nn.functional.normalize(means, dim=-1).T * tower.model.logit_scale.exp()
    theirs = theirs + tower.model.logit_bias if kind == "sigmoid" else theirs
    assert theirs.std() > 0.1  # random towers still tell images and names apart
    # another order of the same fp32 sums: 1e-6 of a cosine, and the scale multiplies it by 14 (CLIP) or 10
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert same_origin(tower, backbone)


def test_other_weights_are_noticed(text_tower) -> None:
    other = load_backbone("vit_base_patch16_clip_224", pretrained=False, image_size=32, **TINY)
    assert not same_origin(text_tower("clip"), other)


def test_towers_that_do_not_fit_are_refused(text_tower) -> None:
    clip = as_backbone("clip", text_tower("clip"))
    deeper = load_backbone("vit_base_patch16_clip_224", False, image_size=32, **{**TINY, "depth": 3})
    with pytest.raises(UserError, match=r"width 64, depth 2, .* is not the architecture of x \(width 64, depth 3"):
        projection(text_tower("clip"), deeper, "x")
    with pytest.raises(UserError, match="not the architecture of clip"):
        projection(text_tower("sigmoid"), clip, "clip")
    with pytest.raises(UserError, match="works for CLIP with a CLS token.*kNN and linear"):
        projection(text_tower("average"), clip, "clip")
    headless = load_backbone("vit_base_patch16_siglip_224", False, image_size=32, **TINY)
    with pytest.raises(UserError, match="works for CLIP with a CLS token"):
        projection(text_tower("clip"), headless, "siglip without CLS")


def test_checkpoint_file_on_disk_is_loaded(text_tower, tmp_path: Path) -> None:
    tower = text_tower("clip")
    save_file(
        {name: value.contiguous() for name, value in tower.model.state_dict().items()}, tmp_path / "w.safetensors"
    )
    loaded = open_text_tower("locfast-clip", str(tmp_path / "w.safetensors"))
    assert loaded.classifier(NAMES, PROMPTS).equal(tower.classifier(NAMES, PROMPTS))


def test_mistakes_in_names_and_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean 'ViT-B-16'"):
        open_text_tower("ViT-B_16", "openai")
    with pytest.raises(UserError, match="neither a file nor weights.*did you mean 'openai'"):
        open_text_tower("ViT-B-16", "openia")
    with pytest.raises(UserError, match="no such file"):
        open_text_tower(str(tmp_path / "gone.json"), "none")
    (tmp_path / "torn.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="open_clip could not load it.*--text-pretrained FILE"):
        open_text_tower("ViT-B-16", str(tmp_path / "torn.pt"))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'locfast\[open-clip\]'"):
        open_text_tower("ViT-B-16", "openai")


def folders(root: Path, *names: str) -> ClassFolder:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "x.jpg").write_bytes(b"")
    return ClassFolder(root)


def test_names_of_classes(tmp_path: Path) -> None:
    assert class_names(folders(tmp_path / "plain", "traffic_light", "cat")) == ["cat", "traffic light"]
    wnids = folders(tmp_path / "wnids", "n01443537", "n01440764", "n15075141")  # the first two and the last of the 1000
    assert class_names(wnids) == ["tench", "goldfish", "toilet paper"]
    with pytest.raises(UserError, match=r"1 are not of ImageNet-1k, first n00000001.*--names FILE"):
        class_names(folders(tmp_path / "unknown", "n01443537", "n00000001"))
    (tmp_path / "names.txt").write_text("fish\npaper\nroll\n")
    assert class_names(wnids, str(tmp_path / "names.txt")) == ["fish", "paper", "roll"]


def test_prompts_are_open_clips_or_of_a_file(tmp_path: Path) -> None:
    assert len(templates("imagenet")) == 80 and "a photo of the large {}." in templates("simple")
    file = tmp_path / "prompts.txt"
    file.write_text("a {} from above\n\nmy {}\n")
    assert templates(str(file)) == ["a {} from above", "my {}"]
    file.write_text("no place for a name\n")
    with pytest.raises(UserError, match="every line needs one {}"):
        templates(str(file))
    with pytest.raises(UserError, match="not one of imagenet, simple"):
        templates("imagnet")
