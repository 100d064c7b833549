"""On photographs (CamVid): a head that sees no image finds what places alone tell, and no more."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locfast.data.decode.cpu import decode_label_map
from locfast.data.labelled import open_labelled
from locfast.eval.probing.run import probe_backbone
from locfast.eval.probing.settings import Settings
from locfast.models.backbone import load_backbone

TRAIN, VALIDATION = 160, 100
SETTINGS = Settings(heads=("transformer",), tasks=("local",), epochs=12, batch_size=16, held_out=0.2)


@pytest.fixture(scope="module")
def splits():
    root = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "camvid"
    if not root.is_dir():
        pytest.skip("no CamVid beside the checkout")
    return [open_labelled(str(root), split) for split in ("train", "validation")]


def recall(splits, out: Path, **changed) -> float:
    """Macro recall of a local transformer head on a backbone with random weights."""
    settings = Settings(**{**vars(SETTINGS), **changed})
    options = {"device": torch.device("cpu"), "precision": "fp32", "machine": {}, "limit": TRAIN, "workers": 1}
    backbone = load_backbone("demo", pretrained=False, seed=0)
    return probe_backbone(backbone, None, "demo", *splits, settings, out, **options).heads[0].validation["recall"]


def painted(splits, root: Path):
    """The same label maps, and as images the label maps in a colour for each class."""
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    (root / "classes.txt").write_text("\n".join(splits[0].classes))
    for split, name in zip(splits, ("train", "val"), strict=True):
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True)
        for i in range(min(TRAIN, len(split.source))):
            ids = decode_label_map(split.source.read(i).label_map)[::4, ::4]
            Image.fromarray(colours[ids]).save(root / "images" / name / f"{name}{i}.png")
            Image.fromarray(ids).save(root / "annotations" / name / f"{name}{i}.png")
    return [open_labelled(str(root), split) for split in ("train", "validation")]


def place_alone(splits) -> float:
    """Of whoever says, at every place, the classes that more than half of the training images have there."""
    from locfast.eval.probing.images import Images, whole_view
    from locfast.eval.probing.scoring import score
    from locfast.eval.probing.targets import Targets

    backbone = load_backbone("demo", pretrained=False)
    view = whole_view(backbone.image_size, backbone.mean, backbone.std, "bicubic")
    unions = []
    for split in splits:
        images = Images(split, view, torch.device("cpu"), 1, TRAIN)
        batch = next(iter(images.batches([torch.arange(len(images))])))
        targets = Targets.of(batch.label_map, backbone.patch_size, len(split.classes), split.unlabeled, "union")
        unions.append(targets.unions(torch.arange(len(images))))
    train, validation = unions
    return score((train.double().mean(0) - 0.5).expand(validation.shape), validation, validation.any(-1)).macro[
        "recall"
    ]


def test_without_images_a_probe_finds_what_places_tell_and_where_images_tell_more_it_finds_more(splits, tmp_path):
    floor = place_alone(splits)
    assert 0.2 < floor < 0.5, floor  # roads lie below and skies above in all of these
    position = recall(splits, tmp_path / "position", control="position")
    assert abs(position - floor) < 0.05, (floor, position)
    # Random weights, and labels of other images, hide places behind noise, and tell nothing that helps.
    shuffled, random = recall(splits, tmp_path / "shuffled", control="shuffled"), recall(splits, tmp_path / "random")
    assert max(shuffled, random) < floor + 0.05, (floor, shuffled, random)
    (tmp_path / "painted").mkdir()
    told = {"heads": ("mlp",), "lr": 1e-2, "epochs": 30}  # of every patch alone, without its place
    seen = recall(painted(splits, tmp_path / "painted"), tmp_path / "seen", **told)
    assert seen > floor + 0.1, (floor, seen)
