"""The published recipes: files that a user can read, and that the config can."""

from __future__ import annotations

import pytest
import timm

from locfast.config.files import from_dict, read_recipe, recipe_names
from locfast.config.registry import run_config_class

PUBLISHED = [name for name in recipe_names() if name != "demo" and read_recipe(name)["method"] == "maskembed"]
LUT = {"lut_s16": 1.0, "lut_b16": 0.25, "lut_l16": 0.25}
"""Recipes of LUT and the weight of its context loss."""
CONTRASTIVE = {"clip_uta_b16": (2e-4, 0.75, 2e9), "clip_uta_l14": (4e-4, 0.85, 4e9)}
UTA = {"uta_b14": (0.4, 0.0), "uta_l14": (0.5, 0.1), "uta_g14": (0.5, 0.1)}
"""Recipes of UTA, the share they hide and the paths they drop."""
CLOC = {"cloc_b16": ("ViT-B-16", 224), "cloc_l14": ("ViT-L-14", 336), "cloc_h14": ("ViT-H-14", 336)}
"""Recipes of CLOC, the text tower and the pixels of a side."""
UNCAPPED = {"beit_b16", "beitv2_b16", "eva02_b16"}
FIFTY_EPOCHS = {"mocov3_b16", "mae_b16", "dino_b16"}
LARGE = {"in1k_l16", "clip_l14", "clip_l14_336", "siglip_so400m_224", "siglip_so400m_384"}


def config_of(name: str):
    values = read_recipe(name)
    return from_dict(run_config_class(values["method"]), values, name)


def test_there_is_a_recipe_for_each_of_the_papers_backbones() -> None:
    assert len(PUBLISHED) == 19


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_follows_table_six(name: str) -> None:
    config = config_of(name)
    assert config.batch_size == 1024
    assert config.lr == (2e-4 if name in LARGE else 3e-4)
    assert (config.epochs, config.maskembed.optim.warmup_epochs) == ((50, 1) if name in FIFTY_EPOCHS else (5, 0))
    assert config.maskembed.softcap == (None if name in UNCAPPED else 30.0)
    assert 1024 % (4 * config.micro_batch) == 0


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "mocov3_b16"])
def test_recipe_names_weights_that_timm_can_fetch(name: str) -> None:
    model = config_of(name).model
    architecture, _, tag = model.partition(".")
    assert tag and timm.models.get_pretrained_cfg(model) is not None
    assert architecture in timm.list_models()


def test_there_is_a_recipe_for_each_of_luts_backbones() -> None:
    assert {name for name in recipe_names() if read_recipe(name)["method"] == "lut"} - {"demo_lut"} == set(LUT)


@pytest.mark.parametrize("name", LUT)
def test_recipe_of_lut_follows_its_section_five(name: str) -> None:
    config = config_of(name)
    assert (config.epochs, config.batch_size, config.lr) == (1600, 4096, 2.4e-3)
    assert 4096 % (8 * config.micro_batch) == 0
    assert config.lut.context_weight == LUT[name]
    assert (config.lut.form, config.lut.hidden_share, config.lut.last_momentum) == ("paper", 0.75, 0.996)
    assert (config.lut.optim.weight_decay, config.lut.optim.warmup_epochs) == (0.05, 40)
    assert config.model in timm.list_models()


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_recipe_follows_appendix_a1_of_uta_and_its_table_one(name: str) -> None:
    config, (rate, decay, samples) = config_of(name), CONTRASTIVE[name]
    assert (config.batch_size, config.lr, config.clip.layer_decay) == (49152, rate, decay)
    assert config.steps * config.batch_size == pytest.approx(samples, rel=1e-4)
    assert (config.clip.temperature, config.clip.learn_temperature) == (0.01, False)
    optim = config.clip.optim
    assert (optim.name, optim.weight_decay, optim.final_lr_ratio) == ("lamb", 0.05, 0.0)
    assert 49152 % (16 * config.micro_batch) == 0


@pytest.mark.parametrize("name", UTA)
def test_recipe_of_uta_follows_its_section_three(name: str) -> None:
    config = config_of(name)
    assert (config.epochs, config.batch_size, config.lr) == (150, 4096, 1.5e-3)
    assert (config.uta.mask_ratio, config.uta.drop_path) == UTA[name]
    optim = config.uta.optim
    assert (optim.weight_decay, optim.warmup_epochs, optim.final_lr_ratio * config.lr) == (0.05, 1, pytest.approx(1e-5))
    assert timm.models.get_pretrained_cfg(config.uta.teacher).num_classes == 1024


@pytest.mark.parametrize("name", CLOC)
def test_recipe_of_cloc_follows_its_table_a(name: str) -> None:
    config = config_of(name)
    assert (config.steps, config.batch_size, config.lr) == (439087, 32768, 5e-4)
    assert config.steps * config.batch_size == pytest.approx(14e9, rel=0.03)
    assert (config.cloc.text, config.image_size) == CLOC[name]
    optim = config.cloc.optim
    assert (optim.name, optim.betas, optim.weight_decay, optim.warmup_steps) == ("adamw", (0.9, 0.98), 0.2, 2000)
    assert (config.cloc.regions, config.cloc.filter_threshold, config.cloc.crop) == (4, 0.9, "pad")
    assert config.cloc.from_scratch and 32768 % (8 * config.micro_batch) == 0
    assert config.model in timm.list_models()
