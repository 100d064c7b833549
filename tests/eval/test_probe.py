"""The probe finds what is planted in features, and nothing of the test split reaches the choice."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from locfast.data.sources import ImageFolder
from locfast.errors import UserError
from locfast.eval.features import Labelled, read_labelled
from locfast.eval.heads import ProbeHead
from locfast.eval.probe import ProbeConfig, Split, predict, probe, train_head

CLASSES, PATCH, SIDE = 4, 4, 16
QUICK = ProbeConfig(lr=3e-2, max_epochs=12, warmup_steps=5)


def planted(count: int, seed: int) -> Labelled:
    """Images whose every patch is filled with its class id, in the label map and (times 40) in the red channel."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(CLASSES, (count, SIDE // PATCH, SIDE // PATCH), generator=generator, dtype=torch.uint8)
    label = ids.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    images = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8)
    images[:, 0] = label * 40
    return Labelled(images, label)


def one_hot_features(images):
    """Patch tokens that hold the class of their patch, and a prefix that holds which classes the image has."""
    ids = (images[:, 0, ::PATCH, ::PATCH] * 255 / 40).round().long().flatten(1)
    patches = torch.nn.functional.one_hot(ids, 32).float()
    return patches, patches.amax(1, keepdim=True)


def blind_features(images):
    """Tokens that are the same for every image."""
    return torch.ones(len(images), (SIDE // PATCH) ** 2, 32), torch.ones(len(images), 1, 32)


SPLITS = {"train": planted(192, 0), "validation": planted(64, 1), "test": planted(128, 2)}


def test_all_heads_find_a_planted_signal():
    found = probe(one_hot_features, SPLITS, CLASSES, (PATCH, PATCH), num_heads=4, config=QUICK)
    assert set(found) == {"local/linear", "local/transformer", "global/linear", "global/transformer"}
    assert all(one.test.recall > 0.95 for one in found.values()), {k: v.test.recall for k, v in found.items()}


def test_no_head_finds_what_features_do_not_hold():
    config = replace(QUICK, tasks=("local",))
    found = probe(blind_features, SPLITS, CLASSES, (PATCH, PATCH), num_heads=4, config=config)
    # Four classes at random: none ever passes one half.
    assert all(one.test.recall < 0.1 for one in found.values())


def test_features_without_a_prefix_are_averaged_for_the_global_task():
    def no_prefix(images):
        patches, _ = one_hot_features(images)
        return patches, patches[:, :0]

    config = replace(QUICK, tasks=("global",), heads=("linear",))
    assert probe(no_prefix, SPLITS, CLASSES, (PATCH, PATCH), 4, config)["global/linear"].test.recall > 0.9


def test_the_test_split_has_no_say_in_the_choice():
    config = replace(QUICK, tasks=("local",), heads=("linear",))
    garbage = Labelled(SPLITS["test"].images.flip(0), SPLITS["test"].label_map)
    honest = probe(one_hot_features, SPLITS, CLASSES, (PATCH, PATCH), 4, config)["local/linear"]
    fooled = probe(one_hot_features, {**SPLITS, "test": garbage}, CLASSES, (PATCH, PATCH), 4, config)["local/linear"]
    assert (honest.epochs, honest.best_epoch) == (fooled.epochs, fooled.best_epoch)
    assert honest.validation == fooled.validation
    assert all(torch.equal(a, b) for a, b in zip(honest.head.parameters(), fooled.head.parameters(), strict=True))
    assert fooled.test.recall < honest.test.recall


def test_the_state_that_is_scored_is_the_best_one_and_not_the_last():
    """Labels that cannot be learned: the head overfits, and the state that counts is an early one."""
    generator = torch.Generator().manual_seed(0)

    def noise(count):
        tokens = torch.randn(count, 4, 16, generator=generator)
        targets = torch.rand(count, 4, 3, generator=generator) < 0.3
        return Split(tokens, {"local": targets})

    splits = {"train": noise(64), "validation": noise(64), "test": noise(64)}
    torch.manual_seed(0)
    head = ProbeHead("transformer", "local", 16, 3, 0, 4, 2)
    done = train_head(head, "local", splits, replace(QUICK, lr=3e-3, max_epochs=40, patience=2))
    assert done.best_epoch < done.epochs < 40
    logits, targets = predict(done.head, splits["validation"].tokens), splits["validation"].targets["local"]
    kept = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.float())
    assert kept < 0.72  # about the entropy of the labels' share, 0.61; an overfitted state is far above


def test_the_probe_repeats_with_its_seed():
    config = replace(QUICK, heads=("transformer",), tasks=("local",), max_epochs=2)
    first, second = (probe(one_hot_features, SPLITS, CLASSES, (PATCH, PATCH), 4, config) for _ in range(2))
    assert first["local/transformer"].test == second["local/transformer"].test


def test_a_source_without_label_maps_is_refused(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "grey.png")
    with pytest.raises(UserError, match="label map"):
        read_labelled(ImageFolder(tmp_path), [0], (16, 16))
