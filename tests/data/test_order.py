"""The order of samples: computed from the position, continuous over epochs."""

import time

import numpy as np
import pytest
import torch

from locfast.data.order import MAX_PROBES, BlockOrder, Order, arrange, foresee, pick_shuffle
from locfast.data.sources.ahead import Ahead
from locfast.data.sources.split import groups, hold_out
from locfast.data.spec import Record


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own():
    epoch, index = Order(50, seed=1)(torch.arange(150))
    assert epoch.tolist() == [0] * 50 + [1] * 50 + [2] * 50
    for part in index.split(50):
        assert sorted(part.tolist()) == list(range(50))
    assert len({tuple(part.tolist()) for part in index.split(50)}) == 3


def test_a_batch_across_the_end_of_an_epoch_continues_with_the_next():
    order = Order(10, seed=0)
    _, index = order(torch.arange(30))
    assert torch.equal(order(torch.arange(8, 16))[1], index[8:16])


def test_the_order_jumps_to_any_position():
    order = Order(1_281_167, seed=3)
    far = 4_000_000_123
    _, around = order(torch.arange(far - 5, far + 5))
    assert order(torch.tensor([far]))[1].item() == around[5].item()


def test_another_seed_gives_another_order():
    assert not torch.equal(Order(100, 0)(torch.arange(100))[1], Order(100, 1)(torch.arange(100))[1])


def test_replacements_are_different_samples_that_depend_on_the_position():
    order = Order(1000, seed=0)
    probes = order.replacements(17)
    assert len(probes) == len(set(probes)) == MAX_PROBES
    assert probes == Order(1000, seed=0).replacements(17)
    assert probes != order.replacements(18)


def test_a_small_dataset_has_each_sample_as_a_replacement_once():
    assert sorted(Order(7, seed=0).replacements(3)) == list(range(7))


def test_the_full_order_is_what_it_always_was():
    """Numbers of the first version: a run of then goes on with them."""
    assert Order(13, seed=5)(torch.arange(26))[1].tolist() == (
        [9, 2, 8, 7, 10, 6, 0, 1, 3, 11, 12, 4, 5, 5, 0, 3, 11, 10, 7, 4, 1, 8, 2, 9, 12, 6]
    )
    far = torch.tensor([0, 1, 10**9 + 7, 4 * 10**12])
    assert Order(1_281_167, seed=0)(far)[1].tolist() == [364261, 749643, 679426, 793260]


SHARDS = np.array([0, 100, 101, 164, 165, 700])
"""Starts of shards of 100, 1, 63, 1, 535 and 300 samples."""


def blocks_of(order: BlockOrder, index: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(torch.from_numpy(order.starts), index, right=True) - 1


@pytest.mark.parametrize("block,buffer", [(64, 8192), (64, 256), (16, 100), (7, 10), (1, 1), (1000, 3)])
def test_blocks_show_every_sample_once_an_epoch_in_an_order_of_its_own(block, buffer):
    epoch, index = BlockOrder(1000, 3, SHARDS, block=block, buffer=buffer)(torch.arange(3000))
    assert torch.equal(epoch, torch.arange(3).repeat_interleave(1000))
    for part in index.split(1000):
        assert torch.equal(part.sort().values, torch.arange(1000))
    assert len({tuple(part.tolist()) for part in index.split(1000)}) == 3


def test_no_block_spans_two_shards_and_only_the_last_one_of_a_shard_is_short():
    order = BlockOrder(1000, 0, SHARDS, block=64)
    ends = [*order.starts[1:].tolist(), 1000]
    assert set(SHARDS.tolist()) <= set(order.starts.tolist())
    for start, end in zip(order.starts.tolist(), ends, strict=True):
        assert end - start == 64 or (end - start < 64 and end in [*SHARDS.tolist(), 1000])


def test_a_buffer_is_filled_with_whole_blocks_one_behind_the_other():
    """128 places hold two blocks of 64, in an order that is not the disk's; the next two blocks come behind them."""
    order = BlockOrder(64 * 40, 1, np.array([0, 64 * 10]), block=64, buffer=128)
    seen = set()
    for part in order(torch.arange(64 * 40))[1].split(128):
        blocks = set(blocks_of(order, part).tolist())
        assert len(blocks) == 2 and not blocks & seen
        assert (part.diff() == 1).sum() < 10
        seen |= blocks
    assert seen == set(range(40))


def test_blocks_jump_to_any_position_by_batches_of_any_size():
    order = BlockOrder(1000, 7, SHARDS, block=16, buffer=100)
    _, whole = order(torch.arange(5000))
    fresh = BlockOrder(1000, 7, SHARDS, block=16, buffer=100)
    for first, count in ((4990, 10), (0, 3), (1995, 10), (3210, 1), (500, 2600)):
        assert torch.equal(fresh(torch.arange(first, first + count))[1], whole[first : first + count])
    far = 4_000_000_000_123
    around = fresh(torch.arange(far - 5, far + 5))[1]
    assert order(torch.tensor([far]))[1].item() == around[5].item()


def test_blocks_keep_the_tables_of_three_epochs_and_no_more():
    order = BlockOrder(1000, 0, SHARDS)
    for position in range(0, 4000, 500):
        order(torch.arange(position, position + 600))
    assert len(order._tables) == 3


def test_another_seed_gives_another_order_of_blocks():
    first, other = (BlockOrder(1000, seed, SHARDS, block=8, buffer=64)(torch.arange(1000))[1] for seed in (0, 1))
    assert not torch.equal(first, other)


def test_every_sample_comes_to_every_place_equally_often():
    """8 samples in blocks of 2, buffers of 4: over 160 epochs each is due 20 times at a place. Chi-square with 7
    degrees of freedom passes 29.9 once in 10000."""
    index = BlockOrder(8, 0, np.array([0, 4]), block=2, buffer=4)(torch.arange(8 * 160))[1].view(160, 8)
    for place in (0, 3, 4, 7):
        counts = torch.bincount(index[:, place], minlength=8).double()
        assert ((counts - 20) ** 2 / 20).sum() < 29.9


def test_a_source_that_fits_a_buffer_is_shuffled_in_full():
    """Two samples of a block lie as far apart as any two: a third of the size on average, within 3 %."""
    index = torch.cat([BlockOrder(4096, seed, np.array([0, 1000]))(torch.arange(4096))[1] for seed in range(4)])
    places = torch.argsort(index.view(4, 4096), dim=1)
    assert (places.diff(dim=1).abs().double().mean() / 4096 - 1 / 3).abs() < 0.01


def test_blocks_are_due_where_their_samples_enter_the_row():
    """Against the row itself: with buffers of one place it is what is shown."""
    order = BlockOrder(1000, 7, SHARDS, block=16, buffer=1)
    _, row = order(torch.arange(3000))
    begins = {place: block for place, block in enumerate(row.tolist()) if block in set(order.starts.tolist())}
    numbers = {start: number for number, start in enumerate(order.starts.tolist())}
    for first, end in ((0, 1), (1, 2), (0, 3000), (990, 1010), (999, 1000), (1000, 1001), (1990, 2000), (350, 2050)):
        wanted = [numbers[begins[place]] for place in range(first, end) if place in begins]
        assert order.due(first, end) == wanted


class Grouped:
    """A source of `size` samples whose groups begin at `starts`."""

    def __init__(self, size: int, starts: list[int] | None) -> None:
        self.size, self.starts = size, starts

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> Record:
        return Record(b"", str(index))

    def groups(self) -> np.ndarray | None:
        return None if self.starts is None else np.array(self.starts)


@pytest.mark.parametrize("starts", [[0, 1, 4, 9, 9 + 16, 60], [0], [0, 59]])
def test_groups_survive_a_hold_out(starts):
    """Against the groups of every sample that stays, looked up one by one; small ones may be gone altogether."""
    source = Grouped(64, starts)
    for count in (1, 20, 50):
        for side in hold_out(source, count=count, seed=count):
            lies_in = [np.searchsorted(starts, int(side.read(i).name), side="right") for i in range(len(side))]
            wanted = [i for i in range(len(side)) if i == 0 or lies_in[i] != lies_in[i - 1]]
            assert groups(side).tolist() == wanted
    assert all(groups(side) is None for side in hold_out(Grouped(64, None), count=9))


def test_auto_is_blocks_for_shards_and_full_for_the_rest():
    shards, folder = Grouped(64, [0, 32]), Grouped(64, None)
    assert [pick_shuffle(how, shards) for how in ("auto", "full", "blocks")] == ["blocks", "full", "blocks"]
    assert [pick_shuffle(how, folder) for how in ("auto", "full", "blocks")] == ["full", "full", "blocks"]
    position = torch.arange(64)
    assert torch.equal(arrange(folder, 3)[1](position)[1], Order(64, 3)(position)[1])
    assert torch.equal(arrange(shards, 3, "full")[1](position)[1], Order(64, 3)(position)[1])
    assert repr(arrange(shards, 3)[1]) == (
        "every epoch permutes 2 blocks of 64 neighbours from 2 shards, then samples inside buffers of 8192"
    )
    assert "1 blocks of 64 neighbours from one row" in repr(arrange(folder, 3, "blocks")[1])


class Asked(Grouped):
    """Writes down what it was asked to have ready."""

    can_look_ahead = True

    def __init__(self, size: int, starts: list[int]) -> None:
        super().__init__(size, starts)
        self.ahead: list[tuple[int, int]] = []

    def will_need(self, first: int, end: int) -> None:
        self.ahead.append((first, end))


def test_a_block_is_asked_for_once_when_its_first_sample_is_read():
    source = Asked(200, [0, 100])
    ordered, _ = arrange(source, 0)
    for index in (70, 64, 99, 100, 199, 0, 163):
        assert ordered.read(index).name == str(index)
    assert source.ahead == [(64, 100), (100, 164), (164, 200), (0, 64)]
    plain, _ = arrange(source, 0, "full")
    plain.read(3)
    assert len(source.ahead) == 4


def test_blocks_are_asked_for_one_buffer_before_they_are_due():
    source = Asked(640, [0, 320])
    ordered = Ahead(source, (order := BlockOrder(640, 0, source.groups(), block=32, buffer=128)).starts)
    batches = [torch.arange(first, first + 64) for first in range(64, 640, 64)]
    assert [position.tolist() for position in foresee(ordered, order, iter(batches))] == [p.tolist() for p in batches]
    wanted = [order.starts[block] for block in order.due(64 + 128, 640 + 128)]
    deadline = time.monotonic() + 10
    while len(source.ahead) < len(wanted) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [first for first, _ in source.ahead] == wanted
    assert len(wanted) == 18


def test_nothing_is_foreseen_in_the_full_order_in_a_source_that_fits_a_buffer_or_in_places_out_of_order():
    source = Asked(640, [0, 320])
    positions = [torch.arange(64)]
    for shuffle in ("full", "blocks"):
        assert foresee(*arrange(source, 0, shuffle), positions) is positions
    order = BlockOrder(640, 0, source.groups(), buffer=128)
    mixed = [torch.tensor([5, 3, 9])]
    assert [p.tolist() for p in foresee(Ahead(source, order.starts), order, mixed)] == [[5, 3, 9]]
    assert source.ahead == []


def test_a_block_that_was_forgotten_is_asked_for_again(monkeypatch):
    monkeypatch.setattr("locfast.data.sources.ahead.REMEMBERED", 2)
    source = Asked(640, [0])
    ordered, _ = arrange(source, 0)
    for index in (0, 64, 1, 128, 2, 65):
        ordered.read(index)
    assert [first for first, _ in source.ahead] == [0, 64, 128, 64]


def test_blocks_of_what_a_hold_out_left_are_asked_for_where_they_lie():
    source = Asked(2000, [0, 900])
    train, held = hold_out(source, count=200)
    ordered, order = arrange(train, 0)
    for index in range(len(train)):
        ordered.read(index)
    ends = [*order.starts[1:].tolist(), len(train)]
    first_and_last = [(train.read(a).name, train.read(b - 1).name) for a, b in zip(order.starts, ends, strict=True)]
    assert source.ahead == [(int(first), int(last) + 1) for first, last in first_and_last]
    held.read(0)
    assert arrange(held, 0)[0] is held  # one sample in ten of a block: to read all of it would be waste
