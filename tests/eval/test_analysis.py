"""The analysis of a probe: hand-worked cases, intervals that cover what they should, and pairs."""

import time

import numpy as np
import pytest

from locfast.eval.probing import analysis
from locfast.eval.probing.bootstrap import Resamples, interval, macro, measured, resampled
from locfast.eval.probing.comparable import Probed
from locfast.eval.probing.results import Counts, read_result
from tests.eval.probe_folders import make_probe


def counts(hits, told, there):
    return Counts(*(np.array(part, dtype=np.int32) for part in (hits, told, there)))


TWO_IMAGES = counts(hits=[[1, 2, 0], [1, 0, 0]], told=[[2, 2, 1], [2, 1, 0]], there=[[2, 2, 0], [2, 2, 0]])
"""Class 0: 2 of 4 found, 4 told; class 1: 2 of 4, 3 told; class 2: not there."""


def test_macro_scores_by_hand():
    classes = measured([TWO_IMAGES])
    assert classes["recall"][:2].tolist() == [0.5, 0.5] and np.isnan(classes["recall"][2])
    assert macro(classes["recall"]) == 0.5
    assert macro(classes["precision"]) == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert macro(classes["f1"]) == pytest.approx((2 * 2 / 8 + 2 * 2 / 7) / 2)


def test_scores_equal_an_independent_library():
    library = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    truth, guess = generator.random((30, 16, 5)) < 0.3, generator.random((30, 16, 5)) < 0.4
    one = counts((truth & guess).sum(1), guess.sum(1), truth.sum(1))
    for name in analysis.SCORES:
        expected = getattr(library, f"{name}_score")(truth.reshape(-1, 5), guess.reshape(-1, 5), average="macro")
        assert macro(measured([one])[name]) == pytest.approx(expected, rel=1e-12)


def test_scores_from_counts_are_those_that_the_probe_reports(tmp_path):
    probe = Probed("a", tmp_path, read_result(make_probe(tmp_path, seeds=(0, 1))))
    keys = probe.result.keys()
    for key in keys:
        for head, one in zip(probe.result.of(key), probe.counts(key), strict=True):
            for name in analysis.SCORES:
                assert macro(measured([one])[name]) == pytest.approx(head.validation[name], rel=1e-12)
                found = [None if np.isnan(v) else pytest.approx(v) for v in measured([one])[name]]
                assert head.classes[name] == found


def test_every_draw_holds_as_many_images_and_any_machine_draws_the_same():
    draws = Resamples.of(50, 200)
    assert (draws.images.sum(1) == 50).all() and np.allclose(draws.seeds(3).sum(1), 1)
    # As first drawn: locfast.random gives the same bits everywhere, so a figure comes again on another machine.
    assert draws.images[0, :12].tolist() == [1, 2, 1, 1, 0, 2, 1, 2, 1, 1, 2, 0]
    assert (3 * draws.seeds(3)[:3]).round().tolist() == [[2, 1, 0], [3, 0, 0], [0, 1, 2]]
    assert (draws.images != Resamples.of(50, 200, seed=1).images).any()
    # An image is absent from (1 - 1/50)^50 = 36.4 % of draws; 10 000 cells have a spread of about 0.5 points.
    assert (draws.images == 0).mean() == pytest.approx(0.364, abs=0.02)


def test_interval_of_a_share_is_the_binomial_one():
    """One class, there once in each of 400 images, found in 240: the spread of the share is sqrt(0.6 * 0.4 / 400)."""
    found = np.zeros((400, 1), dtype=np.int32)
    found[:240] = 1
    one = counts(found, found, np.ones((400, 1)))
    recall = analysis.scores([one], Resamples.of(400, 4000))[0]["recall"]
    half = 1.96 * (0.6 * 0.4 / 400) ** 0.5
    # A percentile of 4000 draws is known to about 3 % of the half width; shares come in steps of 1/400 (5 % of it).
    assert recall["value"] == 0.6
    assert recall["low"] == pytest.approx(0.6 - half, abs=0.1 * half)
    assert recall["high"] == pytest.approx(0.6 + half, abs=0.1 * half)


def test_intervals_cover_the_truth_19_times_in_20():
    generator, draws, truth = np.random.default_rng(1), Resamples.of(300, 400), 0.3
    inside = 0
    for _ in range(200):
        hits = generator.binomial(1, truth, (300, 1)).astype(np.int32)
        one = analysis.scores([counts(hits, hits, np.ones((300, 1)))], draws)[0]["recall"]
        inside += one["low"] <= truth <= one["high"]
    # 190 expected, with a spread of sqrt(200 * 0.95 * 0.05) = 3.1: four spreads below and above.
    assert 178 <= inside <= 200 and inside > 0


def test_a_seed_that_differs_widens_the_interval():
    there = np.full((200, 1), 4)
    low, high = (counts(np.full((200, 1), hits), there, there) for hits in (1, 3))
    draws = Resamples.of(200)
    alone = analysis.scores([low], draws)[0]["recall"]
    both = analysis.scores([low, high], draws)[0]["recall"]
    assert alone == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert both == {"value": 0.5, "low": 0.25, "high": 0.75}


def test_a_draw_without_a_class_averages_over_the_others():
    draws = Resamples(np.array([[2.0, 0.0], [0.0, 2.0]]), 0)
    one = counts(hits=[[1, 0], [0, 2]], told=[[1, 0], [0, 2]], there=[[2, 0], [0, 2]])
    assert macro(resampled([one], draws)["recall"]).tolist() == [0.5, 1.0]
    assert interval(0.5, np.array([np.nan, 0.2, 0.2]))["low"] == pytest.approx(0.2)


def test_the_difference_of_a_backbone_from_itself_is_nothing(tmp_path):
    probe = Probed("a", tmp_path, read_result(make_probe(tmp_path, seeds=(0, 1))))
    runs, draws = probe.counts("local/transformer"), Resamples.of(40, 200)
    for gain in analysis.class_gains(runs, runs, draws):
        assert gain is None or gain == {"value": 0.0, "low": 0.0, "high": 0.0}
    first, second = (analysis.scores(runs, draws)[1]["recall"] for _ in range(2))
    assert (first == second).all()


def test_pairs_are_narrower_than_their_parts():
    """Half of the images are hard for both backbones; the second finds one patch more in each."""
    hits = np.array([[10 if i % 2 else 40] for i in range(100)])
    there = np.full((100, 1), 50)
    before, after = counts(hits, hits, there), counts(hits + 1, hits + 1, there)
    draws = Resamples.of(100)
    alone = analysis.scores([after], draws)[0]["recall"]
    (gain,) = analysis.class_gains([before], [after], draws)
    assert gain["low"] == pytest.approx(0.02) and gain["high"] == pytest.approx(0.02)
    assert alone["high"] - alone["low"] > 0.1  # 1.96 * 2 * 0.3 / 10


def test_most_improved_by_hand():
    gains = [None, *({"value": v} for v in (0.1, 0.3, -0.2, 0.3))]
    assert analysis.most_improved(gains) == [2, 4, 1, 3]
    assert analysis.most_improved(gains, among=[0, 1, 3]) == [1, 3]
    assert analysis.most_improved(gains, top=1) == [2]


def test_things_and_stuff_are_apart_where_the_data_say_so():
    assert analysis.kinds(5, [1, 3], unlabeled=0) == {"things": [1, 3], "stuff": [2, 4]}
    assert analysis.kinds(3, None, unlabeled=None) == {"all": [0, 1, 2]}
    assert analysis.kinds(3, [1, 2], unlabeled=0) == {"things": [1, 2]}


def test_bins_of_size_by_hand():
    shares = np.array([[0.0, 0.05, 0.1, 0.85], [0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=np.float32)
    there = (shares > 0).astype(int)
    edges = analysis.size_edges(shares, there)
    assert edges == pytest.approx(np.arange(11) / 10)
    assert analysis.size_bins(shares, there, edges).tolist() == [[-1, 0, 1, 8], [7, 3, -1, -1], [-1, -1, -1, 9]]
    assert (analysis.size_bins(shares, there, edges, unlabeled=3)[:, 3] == -1).all()
    halves = analysis.size_edges(shares, there, quantiles=True, bins=2)
    assert halves.tolist() == pytest.approx([0.0, 0.5, 1.0])  # of .05 .1 .3 .7 .85 1: three on either side


def test_recall_by_size_by_hand():
    one = counts(
        hits=[[1, 4], [0, 3], [2, 0]], told=[[1, 4], [0, 3], [2, 0]], there=[[2, 4], [2, 4], [4, 0]]
    )  # fmt: skip
    bins = np.array([[0, 1], [0, 0], [1, -1]])
    small, large, empty = analysis.size_recall([one], bins, 3, Resamples.of(3, 50))
    assert empty is None
    # Small: class 0 in images 0 and 1, 1 of 4; class 1 in image 1, 3 of 4. Large: class 0 2 of 4; class 1 4 of 4.
    assert (small[0]["value"], small[0]["objects"], small[0]["classes"]) == (0.5, 3, 2)
    assert (large[0]["value"], large[0]["objects"], large[0]["classes"]) == (0.75, 2, 2)


def test_relative_locality_by_hand():
    points = {"a": (0.5, 0.4), "b": (0.6, 0.5), "c": (0.7, 0.6), "d": (0.6, 0.58)}
    found = analysis.relative_locality(points, ["a", "b", "c"])
    assert (found["slope"], found["intercept"]) == (pytest.approx(1.0), pytest.approx(-0.1))
    assert found["residuals"] == {
        name: pytest.approx(r, abs=1e-12) for name, r in zip("abcd", (0, 0, 0, 0.08), strict=True)
    }
    points["b"] = (0.6, 0.56)  # the mean rises by 0.02, the slope stays
    found = analysis.relative_locality(points, ["a", "b", "c"])
    assert found["residuals"]["b"] == pytest.approx(0.04) and found["residuals"]["a"] == pytest.approx(-0.02)


def test_no_trend_from_fewer_than_three_models_or_from_one_place():
    assert "three models" in analysis.relative_locality({"a": (0.1, 0.2)}, ["a"])["absent"]
    same = dict.fromkeys("abc", (0.5, 0.1))
    assert "same global recall" in analysis.relative_locality(same, list("abc"))["absent"]


def test_interventions_stand_beside_their_head(tmp_path):
    found = analysis.interventions(read_result(make_probe(tmp_path, heads=("transformer",))))
    assert found == {
        "local/transformer": {
            "none": "local/transformer",
            "prefix": "local/transformer/prefix",
            "anonymous": "local/transformer/anonymous",
        }
    }


def test_the_transformer_is_the_head_that_is_judged_by():
    assert analysis.headline(["local/linear", "local/transformer/prefix", "local/transformer"]) == "local/transformer"
    assert analysis.headline(["local/mlp/prefix", "local/mlp", "global/linear"]) == "local/mlp"
    assert analysis.headline(["global/linear"]) is None


def test_coco_takes_seconds():
    """5000 images, 183 classes, 1000 draws: 5 s on two cores that others use, too; a loop over draws takes minutes."""
    generator = np.random.default_rng(0)
    there = generator.poisson(2, (5000, 183)) * (generator.random((5000, 183)) < 0.06)
    one = counts(generator.binomial(there, 0.5), there, there)
    begin = time.perf_counter()
    draws = Resamples.of(5000)
    analysis.scores([one], draws)
    bins = np.where(there > 0, generator.integers(0, 10, there.shape), -1)
    analysis.size_recall([one], bins, 10, draws)
    assert time.perf_counter() - begin < 20
