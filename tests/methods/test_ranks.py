"""Whose rows a loss over the global batch counts: all ranks' in a step, one's own otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from locfast.methods import ranks


@pytest.fixture
def three() -> Iterator[None]:
    """A process that believes to be one of three ranks."""
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_a_process_without_others_has_no_group():
    assert ranks.process_group(training=True) is None
    assert ranks.size(None) == 1


def test_ranks_meet_in_a_step_and_stand_alone_in_evaluation_and_when_asked(three):
    assert ranks.process_group(training=True) is dist.group.WORLD
    assert ranks.size(ranks.process_group(training=True)) == 3
    assert ranks.process_group(training=False) is None
    with ranks.alone():
        assert ranks.process_group(training=True) is None
    assert ranks.process_group(training=True) is dist.group.WORLD


def test_a_value_keeps_its_bits_and_takes_anothers_gradient():
    x = torch.tensor(0.1, requires_grad=True)
    value = torch.tensor(1e8 + 1)
    made = ranks.with_gradient(value, 3 * x)
    assert made.item() == value.item()
    assert torch.autograd.grad(made, x)[0].item() == 3
