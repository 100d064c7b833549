"""What is said of a scene: boxes of what is in sight, phrases of what it is, one caption of all."""

import hashlib

import torch

from locfast.data.scenes import (
    CLASSES,
    MAX_OBJECTS,
    MIN_VISIBLE,
    PHRASES,
    SHAPES,
    SIZE,
    SceneSource,
    draw_scenes,
    render_scenes,
    scene_keys,
)

COUNT = 600


def test_images_and_label_maps_keep_the_bits_that_the_shipped_teacher_was_trained_on():
    digest = hashlib.sha256()
    for seed in (0, 5, 20000):
        for objects in (1, 4):
            for part in render_scenes(scene_keys(seed, 17, 300), objects):
                digest.update(part.numpy().tobytes())
    assert digest.hexdigest() == "240be9605b3dda8c486ad7aac14f11e872a4e825aacc534e4186e8237b8f91e6"


def test_a_region_is_the_box_of_the_pixels_of_an_object_that_are_in_sight():
    """Told from the label maps: an object shows where its class does, in scenes that have each class once."""
    source, looked_at = SceneSource(COUNT, seed=6), 0
    scenes = draw_scenes(scene_keys(6, 0, COUNT))
    _, labels = source.tensors(0, COUNT)
    for index in range(COUNT):
        classes, counts = labels[index].unique(return_counts=True)
        seen = {CLASSES[c]: int(n) for c, n in zip(classes.tolist(), counts.tolist(), strict=True) if c}
        in_front = scenes.front[index].unique()
        if len(in_front[in_front > 0]) != len(seen):
            continue  # two of a class
        regions = source.read(index).regions
        found = {}
        for region in regions:
            _, body, shape, _, _, core, _ = region.text.split()
            assert shape in SHAPES
            place = torch.nonzero(labels[index] == CLASSES.index(f"{core} in {body}"))
            (top, left), (bottom, right) = place.min(0).values.tolist(), (place.max(0).values + 1).tolist()
            assert region.box == (left, top, right, bottom)
            found[f"{core} in {body}"] = region.score
        assert set(found) == {name for name, pixels in seen.items() if pixels >= MIN_VISIBLE}
        assert set(found.values()) == {1.0}
        looked_at += 1
    assert looked_at > COUNT / 2


def test_discs_and_squares_are_told_apart():
    """Of an object that nothing hides a disc fills pi / 4 of its box; a square that is not turned, nearly all."""
    scenes, source = draw_scenes(scene_keys(3, 0, COUNT), 1), SceneSource(COUNT, seed=3, max_objects=1)
    filled = {shape: [] for shape in SHAPES}
    for index in range(COUNT):
        (region,) = source.read(index).regions
        left, top, right, bottom = region.box
        if min(left, top) > 0 and max(right, bottom) < SIZE:
            pixels = int((scenes.front[index] == 1).sum())
            filled[region.text.split()[2]].append(pixels / ((right - left) * (bottom - top)))
    disc, square = (torch.tensor(filled[shape]) for shape in SHAPES)
    # a disc's box does not change when it turns; whole pixels move its share by some per cent
    assert len(disc) > 50 and (disc - torch.pi / 4).abs().max() < 0.06
    assert len(square) > 50 and square.max() > 0.95 and square.std() > 2 * disc.std()


def test_a_caption_names_every_region_and_every_scene_has_one():
    source = SceneSource(COUNT, seed=1)
    said = set()
    for index in range(COUNT):
        record = source.read(index)
        phrases = [region.text for region in record.regions]
        assert 1 <= len(phrases) <= MAX_OBJECTS
        assert record.text == " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
        said.update(phrases)
    assert said == {phrase for both in PHRASES for phrase in both}


def test_records_hold_the_same_words_in_any_order_and_block():
    whole, apart = SceneSource(300, seed=4), SceneSource(20, seed=4, start=250)
    for index in (19, 0, 7, 6):
        assert apart.read(index) == whole.read(250 + index)
