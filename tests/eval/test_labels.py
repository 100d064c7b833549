"""Labels of patches and of images agree with loops over pixels."""

from collections import Counter

import pytest
import torch

from locfast.eval.labels import class_share_in_image, classes_in_image, classes_in_patches, majority_in_patches

GRIDS = [((1, 1), (7, 5), 3), ((3, 5), (4, 4), 2), ((5, 3), (2, 7), 4), ((2, 2), (14, 14), 1)]
"""Rows and columns of patches, height and width of a patch, images."""


def maps(grid, patch, batch: int, num_classes: int, device) -> torch.Tensor:
    """Label maps in which every class, ids that are no class and 255 occur, with blocks of one id only."""
    shape = (batch, grid[0] * patch[0], grid[1] * patch[1])
    generator = torch.Generator().manual_seed(sum(shape))
    ids = torch.tensor([*range(num_classes), 0, 0, 255, 255, num_classes + 1])
    drawn = ids[torch.randint(len(ids), shape, generator=generator)]
    drawn[0, : patch[0], : patch[1]] = 255
    drawn[-1, -patch[0] :, -patch[1] :] = 0
    return drawn.to(torch.uint8).to(device)


def cells(label_map: torch.Tensor, patch) -> list[list[list[int]]]:
    """The ids of every patch of every image, pixel by pixel."""
    _, height, width = label_map.shape
    images = []
    for image in label_map.tolist():
        patches = []
        for top in range(0, height, patch[0]):
            for left in range(0, width, patch[1]):
                patches.append([image[top + y][left + x] for y in range(patch[0]) for x in range(patch[1])])
        images.append(patches)
    return images


def counted(pixels: list[int], num_classes: int, unlabeled: int | None) -> Counter:
    """How often every class occurs, the unlabeled one left out beside any other."""
    counts = Counter(id for id in pixels if id < num_classes)
    if unlabeled is not None and set(counts) - {unlabeled}:
        counts.pop(unlabeled, None)
    return counts


@pytest.mark.parametrize("unlabeled", [0, 2, None])
@pytest.mark.parametrize(("grid", "patch", "batch"), GRIDS)
def test_labels_of_patches_agree_with_a_loop(device, grid, patch, batch, unlabeled):
    label_map = maps(grid, patch, batch, 4, device)
    expected = [[counted(pixels, 4, unlabeled) for pixels in image] for image in cells(label_map, patch)]
    present = classes_in_patches(label_map, patch, 4, unlabeled).tolist()
    assert [[[id for id in range(4) if row[id]] for row in image] for image in present] == [
        [sorted(counts) for counts in image] for image in expected
    ]
    assert majority_in_patches(label_map, patch, 4, unlabeled).tolist() == [
        [min(counts, key=lambda id: (-counts[id], id)) if counts else -1 for counts in image] for image in expected
    ]


@pytest.mark.parametrize(("grid", "patch", "batch"), GRIDS)
def test_labels_of_images_agree_with_a_loop(device, grid, patch, batch):
    label_map = maps(grid, patch, batch, 4, device)
    images = [[id for row in image for id in row] for image in label_map.tolist()]
    share = class_share_in_image(label_map, 4)
    assert share.dtype == torch.float32
    assert (
        share.tolist() == torch.tensor([[image.count(id) / len(image) for id in range(4)] for image in images]).tolist()
    )
    assert classes_in_image(label_map, 4).tolist() == [[id in image for id in range(4)] for image in images]


def test_majority_by_hand():
    label = torch.tensor([[[0, 0, 2, 1, 255, 255, 0, 255], [0, 2, 1, 2, 255, 255, 255, 255]]], dtype=torch.uint8)
    assert majority_in_patches(label, (2, 2), 3).tolist() == [[2, 1, -1, 0]]
    assert majority_in_patches(label, (2, 2), 3, unlabeled=None).tolist() == [[0, 1, -1, 0]]
    assert majority_in_patches(label, (2, 2), 3, unlabeled=2).tolist() == [[0, 1, -1, 0]]


def test_labels_of_patches_do_not_mind_strides(device):
    label_map = maps((4, 3), (2, 7), 2, 4, device)
    turned = label_map.transpose(1, 2).contiguous().transpose(1, 2)
    for function in (classes_in_patches, majority_in_patches):
        assert torch.equal(function(turned, (2, 7), 4), function(label_map, (2, 7), 4))


def test_patches_that_do_not_tile_a_map_are_refused():
    for function in (classes_in_patches, majority_in_patches):
        with pytest.raises(ValueError, match="14 x 14 do not tile a label map of 28 x 30"):
            function(torch.zeros(1, 28, 30, dtype=torch.uint8), (14, 14), 3)


def test_labels_of_a_large_batch_take_little_memory():
    label_map = torch.zeros(8, 336, 336, dtype=torch.uint8)
    with torch.profiler.profile(profile_memory=True) as profile:
        majority_in_patches(label_map, (14, 14), 183)
        classes_in_patches(label_map, (14, 14), 183)
        class_share_in_image(label_map, 183)
    # all that is ever allocated; int64 ids are 8 bytes a pixel and there are three functions, of 8 images here
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < 64 * 2**20  # so 64 images need less than 512 MB, if nothing were ever freed
