"""The tower as LLaVA uses its own: same attributes, same calls, aligned tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from locfast.models.exporters.adapter import make_adapter
from locfast.models.exporters.folder import standalone
from locfast.models.exporters.hf import write_llava_export
from tests.models.exporters.small import CAP, artifacts, noise, student

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["clip_quickgelu", "siglip"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    backbone = student(request.param)
    folder = tmp_path_factory.mktemp("llava") / "out"
    adapter = make_adapter(None, artifacts(backbone), CAP, 96, "llava")
    write_llava_export(backbone, folder, softcap=CAP, card={}, adapter=adapter, images=noise(backbone))
    return backbone, folder


@torch.no_grad()
def test_batches_and_lists_of_images_give_the_trained_tokens_in_their_own_dtype(export: tuple[Any, Path]) -> None:
    backbone, folder = export
    tower = standalone("aligned_tower").AlignedTower(str(folder), args=SimpleNamespace(mm_vision_select_layer=-2))
    images = noise(backbone)
    trained = backbone(images, softcap=CAP)
    torch.testing.assert_close(tower(images), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(tower(list(images))), trained, rtol=1e-4, atol=1e-4)
    assert tower(images.bfloat16()).dtype == torch.bfloat16
    projector = standalone("maskembed_adapter").load_adapter(folder, llm_width=80)
    assert projector(tower(images)).shape == (2, backbone.num_tokens, 80)


def test_it_has_what_llava_asks_of_a_tower(export: tuple[Any, Path]) -> None:
    backbone, folder = export
    tower = standalone("aligned_tower").AlignedTower(str(folder), delay_load=True)
    assert not tower.is_loaded and tower.hidden_size == 64 and tower.num_patches == 16
    tower.load_model()
    tower.load_model()  # LLaVA calls it again
    assert tower.is_loaded and tower.dummy_feature.shape == (1, 64)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    crop = tower.image_processor.crop_size
    assert (crop["height"], crop["width"]) == backbone.image_size
    assert list(tower.image_processor.image_mean) == pytest.approx(list(backbone.mean))
    assert (tower.num_patches_per_side, tower.config.image_size) == (4, 64)


@torch.no_grad()
def test_a_truncated_tower_hands_on_what_stands_before_the_blocks_it_lacks(tmp_path: Path) -> None:
    backbone = student("clip_quickgelu")
    adapter = make_adapter("truncated", artifacts(backbone), CAP, 96, "llava")
    write_llava_export(backbone, tmp_path, softcap=CAP, card={}, adapter=adapter)
    tower = standalone("aligned_tower").AlignedTower(tmp_path)
    projector = standalone("maskembed_adapter").load_adapter(tmp_path)
    assert tower.config.num_hidden_layers == 2
    tokens = projector.tokens(tower(noise(backbone)))
    torch.testing.assert_close(tokens, backbone(noise(backbone), softcap=CAP), rtol=1e-4, atol=1e-4)
