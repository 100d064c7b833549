"""The tower as LLaVA uses its own: same attributes, same calls, aligned tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

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


@torch.no_grad()
def test_tower_and_adapter_run_where_locfast_cannot_be_imported(tmp_path: Path) -> None:
    backbone, folder = student("clip_quickgelu"), tmp_path / "out"
    adapter = make_adapter(None, artifacts(backbone), CAP, 96, "llava")
    write_llava_export(backbone, folder, softcap=CAP, card={}, adapter=adapter)
    images = noise(backbone)
    save_file({"images": images, "expected": backbone(images, softcap=CAP)}, tmp_path / "case.safetensors")
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "locfast":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from aligned_tower import AlignedTower
from maskembed_adapter import load_adapter
from safetensors.torch import load_file
case = load_file("case.safetensors")
features = AlignedTower({str(folder)!r})(case["images"])
print(float((features - case["expected"]).abs().max()), list(load_adapter({str(folder)!r})(features).shape))
"""
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    difference, _, shape = told.stdout.strip().partition(" ")
    assert float(difference) < 1e-4 and shape == f"[2, {backbone.num_tokens}, 96]"
