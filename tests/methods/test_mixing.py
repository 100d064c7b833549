"""Mixup and CutMix between the images of a micro-batch."""

import torch

from locfast.methods.mixing import Mix, draw_mix, mix_images
from locfast.random import Keys


def keys(samples: int) -> Keys:
    return Keys(0, torch.zeros(samples, dtype=torch.int64), torch.arange(samples))


def test_mixup_blends_every_image_with_its_partner() -> None:
    images = torch.rand(3, 3, 4, 4)
    mixed = mix_images(images, Mix(torch.tensor([1.0, 0.25, 0.0]), None))
    torch.testing.assert_close(mixed[0], images[0])
    torch.testing.assert_close(mixed[1], images[1])  # the middle one is its own partner
    torch.testing.assert_close(mixed[2], images[0])


def test_cutmix_pastes_a_centred_box_of_the_area_that_is_not_kept() -> None:
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    mixed = mix_images(images, Mix(torch.tensor([0.75, 1.0]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])))
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = 1  # a quarter of the area
    assert torch.equal(mixed[0], expected.expand(3, 8, 8))
    assert torch.equal(mixed[1], images[1])


def test_shares_follow_the_beta_distribution() -> None:
    draw = draw_mix(keys(4000), 0.5, 0.0)
    assert draw is not None and draw.centre is None
    # Beta(1/2, 1/2): mean 1/2, variance 1/8; five standard errors of 4000 draws (0.0056 and 0.0014).
    assert abs(draw.keep.mean().item() - 0.5) < 0.028
    assert abs(draw.keep.var().item() - 0.125) < 0.007


def test_draws_repeat_and_no_mixing_draws_nothing() -> None:
    first, again = draw_mix(keys(8), 0.0, 1.0), draw_mix(keys(8), 0.0, 1.0)
    assert first is not None and again is not None and first.centre is not None and again.centre is not None
    assert torch.equal(first.keep, again.keep) and torch.equal(first.centre, again.centre)
    assert draw_mix(keys(8), 0.0, 0.0) is None
