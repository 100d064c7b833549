"""The order of samples: computed from the position, continuous over epochs."""

import torch

from locfast.data.order import MAX_PROBES, Order


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
