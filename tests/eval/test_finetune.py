"""Fine-tuning: classifiers that share nothing with their backbone, rates by layer, mixed labels, and a toy learnt."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from locfast.errors import UserError
from locfast.eval.finetuning.mixing import mix, torch_seed
from locfast.eval.finetuning.recipe import SIZES, Recipe, size_of
from locfast.eval.finetuning.training import parameter_groups
from locfast.evaluate import main
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.classifier import make_classifier, write_classifier
from locfast.models.softcap import set_softcap
from tests.eval.tiny_clip import TINY
from tests.models.model_families import SMALL, images, small
from tests.test_evaluate_command import HUES, class_folders

RECIPE = Recipe(epochs=100, base_lr=2.5e-4, layer_decay=0.65)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take ten times as long when two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pooled(backbone: Backbone, x: torch.Tensor, pool: str, softcap: float | None) -> torch.Tensor:
    """What the head gets, without the classifier: mean of patches behind the blocks, or CLS behind the norm."""
    tokens = backbone.add_prefix_and_position(backbone.embed_patches(x))
    tokens = backbone.run_blocks(tokens, softcap=softcap)
    if pool == "cls":
        return backbone.final_norm(tokens)[:, 0]
    mean = tokens[:, backbone.num_prefix_tokens :].mean(1)
    return torch.nn.functional.layer_norm(mean, mean.shape[-1:], eps=backbone.norm_eps)  # a fresh norm


CASES = [
    *itertools.product(SMALL, ["mean"], [None, 2.0]),
    *itertools.product(["clip", "dinov2_reg", "eva02"], ["cls"], [None, 2.0]),
]


@pytest.mark.parametrize(("kind", "pool", "softcap"), CASES)
@torch.no_grad()
def test_a_classifier_is_the_backbone_pooled_with_a_linear_head(kind: str, pool: str, softcap: float | None) -> None:
    backbone = small(kind)
    classifier = make_classifier(backbone, softcap, 7, pool=pool).eval()
    x = images(backbone)
    torch.nn.init.normal_(classifier.head.weight)
    classifier.head.bias.uniform_()
    expected = pooled(backbone, x, pool, softcap) @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(classifier(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SMALL)
def test_every_weight_learns_and_the_backbone_stays(kind: str) -> None:
    backbone = small(kind).requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    classifier = make_classifier(backbone, 2.0, 3, pool="mean", seed=1).train()
    torch.nn.init.normal_(classifier.head.weight)
    optimizer = torch.optim.SGD(classifier.parameters(), 1.0)
    classifier(images(backbone)).square().sum().backward()
    # a bias on keys shifts all logits of a query alike, and BEiT's is a buffer of zeros
    still = [n for n, p in classifier.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in still if "k_proj.bias" not in name] == []
    optimizer.step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
    assert backbone.softcap is None and classifier.blocks[0].attn.softcap == 2.0


def test_drop_path_rises_from_nothing_at_the_first_block_to_the_rate_at_the_last() -> None:
    for kind in ("clip", "eva02", "beit"):
        classifier = make_classifier(small(kind), None, 3, pool="mean", drop_path=0.2)
        rates = [[getattr(getattr(b, f"drop_path{i}"), "drop_prob", 0.0) for i in (1, 2)] for b in classifier.blocks]
        assert rates == pytest.approx(np.array([[0, 0], [0.1, 0.1], [0.2, 0.2]]))
        x = images(small(kind), 16)
        torch.nn.init.normal_(classifier.head.weight)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            one, two = classifier.train()(x), classifier(x)
        assert not torch.equal(one, two) and torch.equal(classifier.eval()(x), classifier(x))


@pytest.mark.parametrize("kind", ["clip", "eva02", "beit", "dinov2_reg"])
def test_rates_fall_by_layer_and_vectors_do_not_decay(kind: str) -> None:
    """MAE's scales for three blocks: head 1, blocks 0.65, 0.65^2, 0.65^3, patch embedding and positions 0.65^4."""
    classifier = make_classifier(small(kind), None, 3, pool="mean")
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    seen = {}
    for group in parameter_groups(classifier, RECIPE):
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"], parameter.ndim)
    assert set(seen) == set(names.values())
    for name, (scale, decay, ndim) in seen.items():
        part = name.split(".")
        power = 3 - int(part[1]) if part[0] == "blocks" else 0 if part[0] in ("head", "fc_norm", "norm") else 4
        assert scale == pytest.approx(0.65**power), name
        placed = ("pos_embed", "cls_token", "reg_token", "relative_position_bias_table")
        assert decay == (0.0 if ndim <= 1 or part[-1] in placed else 0.05), name


def test_recipe_follows_table_d_by_width() -> None:
    assert {width: size_of(width) for width in (192, 384, 768, 1024, 1152)} == {
        192: "S",
        384: "S",
        768: "B",
        1024: "L",
        1152: "L",
    }
    assert SIZES == {"S": (300, 5e-4, 0.75), "B": (100, 2.5e-4, 0.65), "L": (50, 1e-3, 0.65)}
    assert RECIPE.lr == pytest.approx(1e-3)  # base rate 2.5e-4, batch 1024
    # ImageNet-1k: 1,281,167 images
    assert RECIPE.steps(1_281_167) == (round(100 * 1_281_167 / 1024), round(5 * 1_281_167 / 1024))
    assert (RECIPE.weight_decay, RECIPE.smoothing, RECIPE.mixup, RECIPE.cutmix, RECIPE.drop_path) == (
        0.05,
        0.1,
        0.8,
        1.0,
        0.1,
    )
    assert RECIPE.betas == (0.9, 0.999) and RECIPE.color == "rand-m9-mstd0.5-inc1"
    with pytest.raises(UserError, match="--warmup 5"):
        Recipe(epochs=5, base_lr=1, layer_decay=1)


def test_mixed_labels_sum_to_one_and_say_what_is_in_the_image() -> None:
    """Images of a constant each: a mixed pixel's mean tells the share of both, and the target says the same."""
    labels = torch.arange(8) % 4
    kinds = set()
    for step in range(20):
        pictures = labels.float().view(8, 1, 1, 1).expand(8, 3, 32, 32).clone()
        mixed, targets = mix(pictures, labels, 4, RECIPE, 0, step)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        shares = (targets - 0.1 / 4) / 0.9
        # pixels of 1 / 1024 of the image each, in CutMix's box
        torch.testing.assert_close(shares @ torch.arange(4.0), mixed.mean((1, 2, 3)), rtol=1e-4, atol=1e-4)
        kinds.add("cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0} else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_mixing_follows_from_seed_and_step_and_leaves_numpys_generator_alone() -> None:
    pictures, labels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])

    def mixed(seed: int, step: int) -> torch.Tensor:
        return torch.cat([part.flatten() for part in mix(pictures.clone(), labels, 2, RECIPE, seed, step)])

    state = np.random.get_state()[1].tolist()
    assert torch.equal(mixed(0, 3), mixed(0, 3))
    assert not torch.equal(mixed(0, 3), mixed(0, 4)) and not torch.equal(mixed(0, 3), mixed(1, 3))
    assert np.random.get_state()[1].tolist() == state
    plain = Recipe(epochs=9, base_lr=1, layer_decay=1, mixup=0, cutmix=0)
    same, targets = mix(pictures.clone(), labels, 2, plain, 0, 0)
    assert torch.equal(same, pictures) and targets[0].tolist() == pytest.approx([0.95, 0.05])
    seeds = {torch_seed(seed, step, part) for seed, step, part in itertools.product(range(2), range(4), range(2))}
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["locfast.evaluate", "finetune", *map(str, words), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photograph-like JPEGs of three classes; one of the training files is damaged."""
    root = tmp_path_factory.mktemp("classes")
    train, val = class_folders(root / "train", 12, 0), class_folders(root / "val", 8, 1)
    (train / "leaf" / "04.jpg").write_bytes(b"<html>404</html>")
    return train, val


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small CLIP towers of other seeds."""
    found = []
    for seed in (4, 5):
        found.append(tmp_path_factory.mktemp("models") / f"clip{seed}")
        model = load_backbone("vit_base_patch16_clip_224", False, image_size=32, seed=seed, **TINY).model
        save_for_hf(model, str(found[-1]), model_args=model._model_args, safe_serialization=True)
    return found


TOY = ("--epochs", 20, "--warmup", 2, "--batch-size", 12, "--lr", 0.04, "--rand-augment", "none", "--workers", 0)
"""Hues tell the classes, and RandAugment changes hues."""


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluate.json").read_text())


def test_a_separable_toy_is_learnt_and_the_same_seed_gives_the_same_figures(
    data, models, tmp_path, monkeypatch, capsys
) -> None:
    words = ("--model", models[1], "--against", models[0], "--train", data[0], "--val", data[1], *TOY)
    for out in ("a", "b"):
        assert call(monkeypatch, *words, "--out", tmp_path / out, "--save") == 0
    told, again = result(tmp_path / "a"), result(tmp_path / "b")
    for one, two in zip(told["scores"], again["scores"], strict=True):
        assert {**one, "details": 0} == {**two, "details": 0}
        assert one["details"]["last_loss"] == two["details"]["last_loss"]  # the same bits
    assert list(told["data"]["train"]["unreadable"]) == [str(data[0] / "leaf" / "04.jpg")]
    assert told["evaluation"] == "finetune" and told["settings"]["pool"] == "mean"
    first, second = told["scores"]
    assert [first["model"], second["model"]] == [str(model) for model in models]
    assert first["accuracy"] > 0.9 and second["accuracy"] > 0.9  # 1/3 by chance
    low, high = first["interval"]
    assert low <= first["accuracy"] <= high
    assert second["difference"]["against"] == str(models[0]) and set(first["per_class"]) == set(HUES)
    assert first["details"]["recipe"]["layer_decay"] == 0.75 and first["details"]["steps"] == 60
    assert first["details"]["lr"] == pytest.approx(0.04 * 12 / 256)
    assert "difference from" in capsys.readouterr().out
    folder = Path(first["details"]["saved"])
    assert folder == tmp_path / "a" / "weights" / "clip4"
    saved = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert saved.num_classes == 3 and json.loads((folder / "config.json").read_text())["label_names"] == sorted(HUES)
    assert accuracy(saved.eval(), data[1]) == pytest.approx(first["accuracy"])


def accuracy(model: Any, root: Path) -> float:
    """By timm's own transform."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({}, model=model))
    right = [
        model(transform(Image.open(file))[None]).argmax().item() == number
        for number, name in enumerate(sorted(HUES))
        for file in (root / name).iterdir()
    ]
    return sum(right) / len(right)


def test_models_side_by_side_learn_from_the_same_pixels_and_targets(data, models, tmp_path, monkeypatch) -> None:
    import locfast.eval.finetuning.training as training

    step, seen = training._step, []

    def watched(classifier: Any, images: torch.Tensor, targets: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((images.clone(), targets.clone()))
        return step(classifier, images, targets, *rest)

    monkeypatch.setattr(training, "_step", watched)
    words = ("--model", *models, "--train", data[0], "--val", data[1], *TOY, "--epochs", 3)
    assert call(monkeypatch, *words, "--out", tmp_path / "out", "--rand-augment", "rand-m9-mstd0.5-inc1") == 0
    first, second = seen[:9], seen[9:]
    assert len(second) == 9 and not torch.equal(first[0][0], first[1][0])
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_micro_batches_change_only_the_rounding(data, models, tmp_path, monkeypatch) -> None:
    """Without drop path, whose draws are made for each micro-batch."""
    words = ("--model", models[0], "--train", data[0], "--val", data[1], *TOY, "--epochs", 3, "--drop-path", 0)
    losses = []
    for out, more in (("whole", ()), ("parts", ("--micro-batch", 5))):
        assert call(monkeypatch, *words, *more, "--out", tmp_path / out) == 0
        losses.append(result(tmp_path / out)["scores"][0]["details"]["last_loss"])
    # nine steps of AdamW, whose first ones turn rounding of tiny gradients into whole steps of the rate
    assert losses[0] != 0 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_model_that_is_done_is_in_the_results_when_ctrl_c_ends_the_next(data, models, tmp_path, monkeypatch) -> None:
    import locfast.eval.finetuning.training as training

    whole, calls = training.finetune, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(training, "finetune", interrupted)
    words = ("--model", *models, "--train", data[0], "--val", data[1], *TOY, "--epochs", 3, "--save")
    assert call(monkeypatch, *words, "--out", tmp_path / "out") == 130
    told = result(tmp_path / "out")
    assert [one["model"] for one in told["scores"]] == [str(models[0])]
    assert (Path(told["scores"][0]["details"]["saved"]) / "model.safetensors").is_file()


def test_mistakes_end_with_one_message_and_exit_code_2(data, models, tmp_path, monkeypatch, capsys) -> None:
    base = ("--model", models[0], "--train", data[0], "--val", data[1])

    def told(*words: object, out: str = "never") -> str:
        assert call(monkeypatch, *base, *words, "--out", tmp_path / out) == 2
        shown = capsys.readouterr()
        assert shown.err.count("locfast: ") == 1 and "Traceback" not in shown.err
        assert not (tmp_path / "never").exists()
        return " ".join(shown.err.split())

    assert "--batch-size 1024: there are 36 training images" in told()
    assert "--batch-size 11: mixup pairs images" in told("--batch-size", 11)
    assert "--warmup 5: the rate rises" in told("--batch-size", 12, "--epochs", 5)
    assert "--layer-decay 1.5" in told("--batch-size", 12, "--layer-decay", 1.5)
    assert "--lr must be positive" in told("--batch-size", 12, "--lr", 0)
    assert "--drop-path 1.0" in told("--batch-size", 12, "--drop-path", 1)
    assert "begins with none of" in told("--batch-size", 12, "--rand-augment", "autoaugment")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "evaluate.json").write_text("{}")
    assert "Add --overwrite" in told("--batch-size", 12, out="there")


def test_a_written_classifier_that_differs_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small("clip")
    classifier = make_classifier(backbone, None, 3, pool="mean")
    torch.nn.init.normal_(classifier.head.weight)
    write_classifier(classifier, backbone, tmp_path / "out", "abc", "A test.")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    classifier.blocks[0].norm1.eps = 1e3  # no weight, so no file holds it
    with pytest.raises(RuntimeError, match="does not compute"):
        write_classifier(classifier, backbone, tmp_path / "out", "abc", "A test.")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@torch.no_grad()
def test_a_capped_classifier_computes_the_same_when_its_readme_is_followed(tmp_path: Path) -> None:
    backbone = small("clip")
    classifier = make_classifier(backbone, 0.5, 3, pool="mean").eval()
    torch.nn.init.normal_(classifier.head.weight)
    write_classifier(classifier, backbone, tmp_path / "out", "abc", "A test.")
    assert "model = set_softcap(model, 0.5)" in (tmp_path / "out" / "README.md").read_text()
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = images(backbone)
    assert (again(x) - classifier(x)).abs().max() > 1e-3  # without the cap
    torch.testing.assert_close(set_softcap(again, 0.5)(x), classifier(x))


@pytest.mark.gpu
def test_a_gpu_in_bf16_learns_the_toy_too(data, models, tmp_path, monkeypatch) -> None:
    words = ("finetune", "--model", models[0], "--train", data[0], "--val", data[1], *TOY, "--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["locfast.evaluate", *map(str, words), "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = result(tmp_path / "out")
    assert ended.value.code == 0 and told["settings"]["precision"] == "bf16" and told["scores"][0]["accuracy"] > 0.9
