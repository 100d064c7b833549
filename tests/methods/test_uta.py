"""UTA's arithmetic against the paper's words, with timm's and open_clip's own forward passes as the teacher's truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from locfast.config.uta import UTAConfig
from locfast.errors import UserError
from locfast.methods import create_method
from locfast.methods.uta import UTA, Draw
from locfast.models.export import write_timm_export
from locfast.models.joint import load_tower
from locfast.random import Keys
from locfast.subject import open_subject
from tests.methods.clip_towers import JOINT, SIZE, lively, open_clip_config, timm_clip

STUDENT = "eva02_tiny_patch14_224"
OBJECTIVES = ("uta", "distillation", "mim", "uta_mim")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return timm_clip(tmp_path_factory.mktemp("clip") / "teacher")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An EVA-02 in a size that tests can afford: RoPE, SwiGLU with its norm, patches of 16 px."""
    args = {"patch_size": 16, "depth": 2, "embed_dim": 48, "num_heads": 4, "ref_feat_shape": (4, 4)}
    return timm_clip(tmp_path_factory.mktemp("student") / "eva", STUDENT, **args)


def make(teacher: str, student: str = "vit_tiny_patch16_224", image_size: int | None = SIZE, **fields) -> UTA:
    config = UTAConfig(teacher=teacher, projection="head", **fields)
    method = create_method("uta", config, model=student, image_size=image_size, pretrained=True)
    assert isinstance(method, UTA)
    lively(method.student)
    return method.train()


def images(samples: int = 3) -> torch.Tensor:
    return torch.randn(samples, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def keys(samples: int = 3, seed: int = 0) -> Keys:
    return Keys(seed, torch.zeros(samples, dtype=torch.int64), torch.arange(samples))


def test_loss_is_the_negative_cosine_of_kept_tokens_and_cls_written_out(teacher: str, student: str) -> None:
    method = make(teacher, student)
    draw, x = method.draw(keys()), images()
    loss = method({"views": {"image": x}}, draw)["loss"]

    clip = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    targets = clip.head(clip.forward_features(x))
    found = []
    for sample in range(3):
        kept = draw.visible[sample].nonzero()[:, 0]
        tokens = method.student.backbone.forward_features(x[sample : sample + 1], kept=kept[None])[0]
        predicted = method.student.backbone.model.head(tokens)
        wanted = targets[sample, torch.cat([torch.zeros(1, dtype=torch.int64), kept + 1])]
        found.append(F.cosine_similarity(predicted, wanted, dim=-1))
    assert len(found[0]) == 1 + method.kept == 1 + 10  # 0.4 of 16 patches are hidden
    torch.testing.assert_close(loss, -torch.cat(found).mean())


@pytest.mark.parametrize(
    ("objective", "compared", "shown"),
    [("uta", 11, 10), ("distillation", 17, 16), ("mim", 6, 16), ("uta_mim", 17, 16)],
)
def test_objectives_of_table_six_compare_these_tokens(teacher: str, objective: str, compared: int, shown: int) -> None:
    method = make(teacher, objective=objective)
    lengths = []
    method.student.backbone.blocks[0].norm1.register_forward_hook(lambda m, i, o: lengths.append(o.shape[1]))
    x, draw = images(), method.draw(keys())
    places = method.aligned(draw.visible)
    predicted = method.tokens(x, draw.visible, places)
    assert places.shape == (3, compared) and predicted.shape[:2] == (3, compared)
    assert set(lengths) == {1 + shown}
    is_hidden = ~F.pad(draw.visible, (1, 0), value=True).gather(1, places)
    assert int(is_hidden[0].sum()) == {"uta": 0, "mim": 6}.get(objective, 6)
    loss = method({"views": {"image": x}}, draw)["loss"]
    loss.backward()
    assert -1 <= loss.item() <= 1
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


@pytest.mark.parametrize("objective", ["mim", "uta_mim"])
def test_a_mask_token_stands_for_what_is_hidden(teacher: str, objective: str) -> None:
    """Hidden pixels reach no token; the [MASK] token reaches all."""
    method = make(teacher, objective=objective).eval()
    x, draw = images(), method.draw(keys())
    places = method.aligned(draw.visible)
    pixels = draw.visible.view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    told = method.tokens(x, draw.visible, places)
    assert torch.equal(method.tokens(torch.where(pixels, x, float("nan")), draw.visible, places), told)
    with torch.no_grad():
        method.mask_token += 1
    assert not torch.allclose(method.tokens(x, draw.visible, places), told)


def test_dropped_pixels_reach_no_token(teacher: str, student: str) -> None:
    method = make(teacher, student).eval()
    x, draw = images(), method.draw(keys())
    pixels = draw.visible.view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    places = method.aligned(draw.visible)
    told = method.tokens(x, draw.visible, places)
    assert torch.equal(method.tokens(torch.where(pixels, x, float("nan")), draw.visible, places), told)


def test_registers_of_the_student_have_no_target(teacher: str, tmp_path: Path) -> None:
    student = timm_clip(tmp_path / "reg", "vit_base_patch14_reg4_dinov2", patch_size=16)
    method = make(teacher, student)
    assert method.student.num_prefix_tokens == 5
    x, draw = images(), method.draw(keys())
    kept = method.aligned(draw.visible)[:, 1:] - 1
    tokens = method.student.backbone.forward_features(x, kept=kept)
    expected = torch.cat([tokens[:, :1], tokens[:, 5:]], 1)
    assert torch.equal(method.tokens(x, draw.visible, method.aligned(draw.visible)), expected)


def test_teacher_target_is_the_projection_of_every_token_and_timms_own_embedding_for_cls(teacher: str) -> None:
    method, x = make(teacher), images()
    clip = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    target = method.target(x)
    assert target.shape == (3, 17, JOINT) and not target.requires_grad
    torch.testing.assert_close(target[:, 0], clip(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target, clip.head(clip.forward_features(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("outputs", "projection"), [(24, "auto"), (0, "auto"), (0, "none"), (24, "none")])
def test_a_checkpoint_file_teaches_with_the_projection_that_it_has(outputs: int, projection: str, tmp_path: Path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=outputs)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    name = f"vit_tiny_patch16_224@{tmp_path / 'w.pth'}"
    if outputs and projection == "auto":
        projection = "head"  # timm calls this one no CLIP
    tower = load_tower(name, projection=projection, flag="--uta.teacher")
    assert tower.joint_dim == (outputs if projection == "head" else 192)


def test_teacher_is_frozen_stays_in_eval_mode_and_is_saved_once(teacher: str) -> None:
    method = make(teacher)
    assert not method.teacher.training and method.student.training
    assert not any(p.requires_grad for p in method.teacher.parameters())
    frozen = method.frozen_state()
    assert frozen and all(key.startswith("teacher.") for key in frozen)
    assert not any(key.startswith("teacher.") for key in method.training_state())


def test_a_pretrained_student_keeps_its_own_normalisation_and_the_teacher_sees_its_own(teacher: str, student: str):
    method = make(teacher, student, image_size=None, init="pretrained")
    method.student.mean, method.student.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    raw = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))

    def normalised(tower) -> torch.Tensor:
        return (raw - torch.tensor(tower.mean).view(3, 1, 1)) / torch.tensor(tower.std).view(3, 1, 1)

    direct = method.teacher(normalised(method.teacher))
    torch.testing.assert_close(method.target(normalised(method.student)), direct, rtol=1e-4, atol=1e-4)
    fresh = make(teacher, student, image_size=None)
    assert (fresh.student.mean, fresh.student.std) == (fresh.teacher.mean, fresh.teacher.std)
    assert fresh.image_spec().views["image"].mean == fresh.teacher.mean


def test_every_image_keeps_as_many_patches_and_masks_come_from_the_keys(teacher: str) -> None:
    method = make(teacher)
    visible = method.draw(keys(50)).visible
    assert (visible.sum(1) == method.kept).all()
    assert torch.equal(method.draw(keys(50)).visible, visible)
    assert not torch.equal(method.draw(keys(50, seed=1)).visible, visible)
    assert make(teacher, mask_ratio=0.75).kept == 4


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_open_clip_towers_teach_and_their_cls_token_is_encode_image(kind: str, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = open_clip_config(tmp_path, kind)
    tower = load_tower(f"open_clip:{config}@none", seed=3, flag="--uta.teacher")
    open_clip.add_model_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip = open_clip.create_model(Path(config).stem, pretrained=None).eval()
    x = torch.randn(2, 3, *tower.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = tower(x)
        torch.testing.assert_close(tokens[:, 0], clip.encode_image(x), rtol=1e-4, atol=1e-5)
    patches = tower.grid[0] * tower.grid[1]
    assert tokens.shape == (2, 1 + patches, JOINT) and tower.joint_dim == JOINT
    assert (tokens[:, 1] - tokens[:, 0]).abs().max() > 1e-3


def test_an_export_is_a_timm_model_whose_output_is_the_joint_embedding(teacher: str, student: str, tmp_path: Path):
    method = make(teacher, student).eval()
    made = method.artifacts()
    write_timm_export(made["backbone"], tmp_path / "out", softcap=None, card={"method": "uta"})
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = images(2)
    expected = made["embed"](made["backbone"].forward_features(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    again = make(str(tmp_path / "out"))  # and so it can teach in its turn
    torch.testing.assert_close(again.teacher(x)[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "student", "told"),
    [
        ({"teacher": None}, "vit_tiny_patch16_224", "learns from a frozen CLIP image tower"),
        ({"teacher": "vit_base_patch16_siglip_224"}, "vit_tiny_patch16_224", "attn_pool"),
        ({"teacher": "open_clip:ViT-B-16"}, "vit_tiny_patch16_224", "give the weights too"),
        (
            {"teacher": "vit_base_patch16_clip_224", "projection": "auto"},
            "vit_tiny_patch16_224",
            "fine-tuned to name classes",
        ),
        ({"teacher": "nonsense"}, "vit_tiny_patch16_224", "unknown model 'nonsense'"),
        ({}, "vit_base_patch16_siglip_224", "has no CLS token"),
        ({}, "vit_base_patch32_224", "tokens are aligned place by place"),
        ({"mask_ratio": 0.01}, "vit_tiny_patch16_224", "some must be kept"),
    ],
    ids=[
        "no teacher",
        "attention pooling",
        "no weights",
        "classifier",
        "unknown",
        "no cls",
        "other patches",
        "nothing hidden",
    ],
)
def test_what_cannot_be_aligned_is_refused(fields: dict, student: str, told: str, teacher: str) -> None:
    config = UTAConfig(**{"teacher": teacher, "projection": "head", **fields})
    with pytest.raises(UserError, match=told):
        create_method("uta", config, model=student, image_size=SIZE, pretrained=False)


@pytest.mark.parametrize(
    "fields", [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"drop_path": 1.0}, {"crop_scale": (0.5, 0.2)}]
)
def test_config_refuses_impossible_values(fields: dict) -> None:
    with pytest.raises(UserError):
        UTAConfig(**fields)


def test_drawn_masks_can_be_replaced_by_a_callers_own(teacher: str) -> None:
    method = make(teacher)
    visible = torch.zeros(3, 16, dtype=torch.bool)
    visible[:, :10] = True
    assert method.aligned(Draw(visible).visible)[0].tolist() == [0, *range(1, 11)]


def test_biases_norms_positions_and_prefix_tokens_do_not_decay(teacher: str, student: str) -> None:
    method = make(teacher, student)
    decays, spared = (set(map(id, group["params"])) for group in method.parameter_groups())
    names = {id(p): n.removeprefix("student.backbone.model.") for n, p in method.named_parameters() if p.requires_grad}
    assert decays | spared == set(names) and not decays & spared
    told = {names[one] for one in spared}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "patch_embed.proj.bias"} <= told
    assert {names[one] for one in decays} >= {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.proj.weight"}


def test_an_export_is_judged_by_the_projection_that_it_has(teacher: str, student: str, tmp_path: Path) -> None:
    method = make(teacher, student).eval()
    made = method.artifacts()
    write_timm_export(made["backbone"], tmp_path / "out", softcap=None, card={"method": "uta"})
    subject, x = open_subject(str(tmp_path / "out")), images(2)
    assert subject.embed is not None
    expected = made["embed"](made["backbone"].forward_features(x))
    torch.testing.assert_close(subject.embed(subject.backbone.forward_features(x)), expected, rtol=1e-4, atol=1e-5)
    assert open_subject(teacher).embed is None  # a folder of timm's, whose head may be anything
