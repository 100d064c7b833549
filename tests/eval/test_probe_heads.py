"""Heads learn from what they may see: interventions hide what they say, epochs are chosen where they may be."""

from dataclasses import replace

import pytest
import torch

from locfast.errors import UserError
from locfast.eval.heads import ProbeHead
from locfast.eval.labels import classes_in_patches
from locfast.eval.probing.settings import Settings
from locfast.eval.probing.targets import Targets, pack, unpack
from locfast.eval.probing.tokens import Held
from locfast.eval.probing.training import Part, evaluate, rate, train_heads

K, SIDE, PATCH, WIDTH = 5, 16, 4, 32
CPU = torch.device("cpu")
QUICK = Settings(heads=("transformer", "linear"), tasks=("local",), epochs=8, lr=1e-2, batch_size=16)


def planted(count: int, seed: int, labels: str = "union") -> tuple[torch.Tensor, Targets]:
    """Tokens that hold the class of their patch one-hot, behind one prefix token that holds those of the image."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(K, (count, SIDE // PATCH, SIDE // PATCH), generator=generator, dtype=torch.uint8)
    maps = ids.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    patches = torch.nn.functional.one_hot(ids.flatten(1).long(), WIDTH).float() * 4
    tokens = torch.cat([patches.amax(1, keepdim=True), patches], dim=1)
    return tokens, Targets.of(maps, (PATCH, PATCH), K, None, labels)  # type: ignore[arg-type]


def part(tokens: torch.Tensor, targets: Targets) -> Part:
    return Part(Held(tokens.half(), CPU), targets, torch.arange(len(tokens)))


def head(task, kind, intervention) -> ProbeHead:
    return ProbeHead(kind, task, WIDTH, K, 1, (SIDE // PATCH) ** 2, 4, intervention)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


def trained(settings: Settings = QUICK, train=None, selection=None, seed: int = 0):
    train = train or part(*planted(160, 1, settings.labels))
    selection = selection or part(*planted(40, 2, settings.labels))
    return train_heads(head, settings, seed, train, selection, CPU, no_autocast)


def test_unpacking_gives_back_what_was_packed():
    present = torch.rand(3, 7, 19) < 0.4
    assert pack(present).shape == (3, 7, 3)
    assert torch.equal(unpack(pack(present), 19), present)


@pytest.mark.parametrize("labels", ["union", "majority"])
def test_all_heads_find_a_planted_signal(labels):
    settings = replace(QUICK, heads=("transformer", "mlp", "linear"), tasks=("local", "global"), labels=labels)
    held_out = part(*planted(60, 3, labels))
    heads = trained(settings)
    assert [(one.task, one.kind) for one in heads] == [(t, k) for t in settings.tasks for k in settings.heads]
    for one, (scores, _) in zip(heads, evaluate(heads, held_out, CPU, no_autocast), strict=True):
        assert scores.macro["recall"] > 0.9 and scores.macro["ap"] > 0.9, (one.task, one.kind, scores.macro)


def test_a_head_of_the_prefix_does_not_see_patches():
    torch.manual_seed(0)
    one = head("local", "transformer", "prefix").eval()
    tokens = torch.randn(2, 17, WIDTH)
    other = torch.cat([tokens[:, :1], torch.randn(2, 16, WIDTH)], dim=1)
    assert torch.equal(one(tokens), one(other))
    assert not torch.equal(one(tokens), one(tokens.flip(0)))


def test_without_prefix_tokens_it_sees_the_mean_alone():
    torch.manual_seed(0)
    one = ProbeHead("transformer", "local", WIDTH, K, 0, 16, 4, "prefix").eval()
    tokens = torch.randn(2, 16, WIDTH)
    torch.testing.assert_close(one(tokens), one(tokens[:, torch.randperm(16)]))


def test_to_a_head_of_anonymous_tokens_their_order_says_nothing():
    torch.manual_seed(0)
    tokens, order = torch.randn(2, 17, WIDTH), torch.randperm(17)
    blind, plain = head("local", "transformer", "anonymous").eval(), head("local", "transformer", "none").eval()
    torch.testing.assert_close(blind(tokens), blind(tokens[:, order]))
    assert not torch.allclose(plain(tokens), plain(tokens[:, order]), atol=1e-3)


def test_interventions_lose_what_is_planted_patch_by_patch():
    settings = replace(QUICK, heads=("transformer",), interventions=("none", "prefix", "anonymous"))
    heads = trained(settings)
    found = [scores.macro["ap"] for scores, _ in evaluate(heads, part(*planted(60, 3)), CPU, no_autocast)]
    assert found[0] > 0.9 > 0.6 > max(found[1:]), found


def test_every_head_trains_as_it_would_alone():
    both, alone = trained(), trained(replace(QUICK, heads=("linear",)))
    assert both[1].kind == alone[0].kind == "linear"
    assert all(torch.equal(both[1].best[name], tensor) for name, tensor in alone[0].best.items())


def test_equal_seeds_give_equal_bits_and_others_do_not():
    first, second, third = trained(), trained(), trained(seed=1)
    assert all(torch.equal(first[0].best[name], tensor) for name, tensor in second[0].best.items())
    assert first[0].epochs == second[0].epochs
    assert not torch.equal(first[0].best["head.output.weight"], third[0].best["head.output.weight"])


def test_the_epoch_that_counts_has_the_highest_recall_of_those_that_know_more_than_frequencies():
    """Features that say nothing: recall is that of saying yes at random, and no epoch may be chosen for it."""
    tokens, targets = planted(160, 1)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    blind = trained(train=part(noise, targets), selection=part(noise[:40].flip(0), planted(40, 2)[1]))
    assert all(one.best_epoch == QUICK.epochs for one in blind)
    for one in trained():
        recalls = [epoch["selection"] for epoch in one.epochs]
        assert recalls[one.best_epoch - 1] == max(recalls[1:]) and one.selection.macro["recall"] == max(recalls[1:])


def test_the_rate_rises_from_zero_and_falls_to_a_tenth():
    settings = Settings(warmup_steps=500)
    rates = [rate(settings, step, 18_485) for step in (0, 250, 500, 9492, 18_484)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5.5e-4, 1e-4], rel=1e-3)
    assert rate(settings, 5, 50) == settings.lr  # of few steps, a tenth warms up


def test_settings_that_make_no_sense_are_mistakes_of_the_user():
    for wrong, told in (
        ({"heads": ("resnet",)}, "--heads resnet"),
        ({"tasks": ()}, "--tasks"),
        ({"heads": ("linear",), "interventions": ("prefix",)}, "for the local transformer head"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"epochs": 0}, "--epochs 0"),
        ({"seeds": (1, 1)}, "--seeds 1 1"),
        ({"lr": 0.0}, "--lr 0.0"),
    ):
        with pytest.raises(UserError, match=told):
            Settings(**wrong)
    with pytest.raises(ValueError, match="local transformer"):
        ProbeHead("linear", "local", WIDTH, K, 1, 16, 4, "prefix")


def test_targets_are_those_of_the_label_maps():
    maps = torch.randint(0, K, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    targets = Targets.of(maps, (PATCH, PATCH), K, 0, "union")
    rows = torch.tensor([2, 0])
    assert torch.equal(targets.unions(rows), classes_in_patches(maps, (PATCH, PATCH), K, 0)[rows])
    ids = targets.images(rows)
    assert [torch.nonzero(row).flatten().tolist() for row in ids] == [maps[row].unique().tolist() for row in rows]
