"""Backbones beside each other: what is refused, what pairs give, and what the file holds."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from locfast.errors import UserError
from locfast.eval.probing.comparable import check_alike, open_probes, pick_baseline
from locfast.eval.probing.compare import compare, read_comparison
from locfast.eval.probing.results import Counts, read_result, write_result
from locfast.eval.probing.table import table
from tests.eval.probe_folders import CLASSES, make_probe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("probes")
    return [
        make_probe(root / "before", "vit_base", 0.5, seeds=(0, 1)),
        make_probe(root / "after", "runs/maskembed-vit_base", 0.58, seeds=(0, 1), softcap=30.0),
        make_probe(root / "other", "vit_other", 0.45, seeds=(0, 1)),
        make_probe(root / "third", "vit_third", 0.53, seeds=(0, 1)),
    ]


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    compare(folders, out, resamples=200)
    return read_comparison(out) | {"out": out}


def test_figures_are_those_that_the_probes_report(found, folders):
    for folder, name in zip(folders, [one["name"] for one in found["models"]], strict=True):
        result = read_result(folder)
        for key in result.keys():  # noqa: SIM118
            for measure in ("recall", "f1", "precision", "ap"):
                reported = np.mean([head.validation[measure] for head in result.of(key)])
                assert found["heads"][key]["models"][name][measure]["value"] == pytest.approx(reported)


def test_differences_are_between_pairs(found):
    heads = found["heads"]["local/transformer"]["models"]
    before, after = heads["vit_base"], heads["runs/maskembed-vit_base"]
    change = after["difference"]["recall"]
    assert "difference" not in before
    assert change["value"] == pytest.approx(after["recall"]["value"] - before["recall"]["value"])
    assert 0 < change["low"] < change["value"] < change["high"]
    assert change["high"] - change["low"] < after["recall"]["high"] - after["recall"]["low"]


def test_a_copy_of_a_backbone_differs_by_nothing(tmp_path):
    for name in ("a", "b"):
        make_probe(tmp_path / name, "same", seeds=(0, 1))
    compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", resamples=100)
    found = read_comparison(tmp_path / "out")
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    for head in found["heads"].values():
        change = head["models"]["b"]["difference"]
        assert change.pop("ap") == {"value": 0.0, "seeds": [0.0, 0.0]}
        assert all(one == nothing for one in change.values())
    assert all(one in (None, nothing) for one in found["by_class"]["b"]["gains"])
    assert all(one is None or one["difference"] == nothing for one in found["by_size"]["width"]["models"]["b"])


def test_another_call_gives_the_same_file(folders, found, tmp_path):
    compare(folders, tmp_path, resamples=200)
    assert (tmp_path / "compare.json").read_bytes() == (found["out"] / "compare.json").read_bytes()


def test_classes_and_sizes_and_the_trend_are_in_the_file(found):
    gains = found["by_class"]["runs/maskembed-vit_base"]
    assert len(gains["gains"]) == len(CLASSES) and gains["gains"][-1] is None
    assert set(gains["top"]["things"]) == {1, 2, 3, 6} and set(gains["top"]["stuff"]) == {4, 5}
    for way in ("width", "quantiles"):
        sizes = found["by_size"][way]
        assert len(sizes["edges"]) == 11 and all(len(bins) == 10 for bins in sizes["models"].values())
    objects = [one["objects"] for one in found["by_size"]["quantiles"]["models"]["vit_base"] if one]
    assert max(objects) - min(objects) <= 1
    trend = found["relative_locality"]
    assert trend["trend"] == ["vit_base", "vit_other", "vit_third"]
    assert math.isclose(sum(trend["residuals"][name] for name in trend["trend"]), 0, abs_tol=1e-12)
    assert found["interventions"]["vit_base"]["local/transformer"]["prefix"] == "local/transformer/prefix"


def test_the_first_is_the_baseline_unless_said(folders, tmp_path):
    probes = open_probes(folders)
    assert pick_baseline(probes, None).name == "vit_base"
    assert pick_baseline(probes, "after").name == pick_baseline(probes, str(folders[1])).name
    with pytest.raises(UserError, match="did you mean 'vit_other'"):
        pick_baseline(probes, "vit_othr")
    compare(folders[:2], tmp_path, baseline="after", resamples=50)
    swapped = read_comparison(tmp_path)
    assert swapped["baseline"] == "runs/maskembed-vit_base" == swapped["models"][0]["name"]
    assert swapped["heads"]["local/transformer"]["models"]["vit_base"]["difference"]["recall"]["value"] < 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": "ade20k"}, r"other data\. vit_base: camvid; b: ade20k"),
        (
            {"classes": ["unlabeled", "cat", "wolf", *CLASSES[3:]]},
            "number 2 is 'dog'; b: 8, of which number 2 is 'wolf'",
        ),
        ({"unlabeled": None}, "with another unlabeled class"),
        ({"train": 7}, "other numbers of images"),
        (
            {"settings": {"protocol": "paper", "labels": "union", "epochs": 5, "lr": 1e-3}},
            r"protocol \(protocol\).*held-out",
        ),
        (
            {"settings": {"protocol": "held-out", "labels": "majority", "epochs": 5, "lr": 1e-3}},
            r"\(labels\).*majority",
        ),
    ],
)
def test_other_data_or_another_protocol_is_refused_by_name(folders, tmp_path, change, named):
    make_probe(tmp_path / "b", "b", seeds=(0, 1), **change)
    with pytest.raises(UserError, match=named):
        compare([folders[0], tmp_path / "b"], tmp_path / "out", resamples=10)
    assert not (tmp_path / "out").exists()


def test_other_images_under_the_same_names_are_refused(folders, tmp_path):
    folder = make_probe(tmp_path / "b", "b", seeds=(0, 1))
    with np.load(folder / "shares.npz") as kept:
        np.savez_compressed(folder / "shares.npz", shares=kept["shares"][::-1])
    with pytest.raises(UserError, match="other validation images"):
        compare([folders[0], folder], tmp_path / "out", resamples=10)


def test_another_grid_is_allowed_and_said(folders, tmp_path):
    make_probe(tmp_path / "b", "b", grid=(8, 8), size=(128, 128), seeds=(0, 1))
    notes = check_alike(*open_probes([folders[0], tmp_path / "b"]))
    assert notes == [
        "b saw images of 128 x 128 in 8 x 8 patches, vit_base images of 96 x 96 in 6 x 6: local figures are of other "
        "patches, and not quite comparable."
    ]


def test_seeds_that_one_backbone_lacks_are_left_out_and_that_is_said(folders, tmp_path):
    make_probe(tmp_path / "b", "b", seeds=(1, 2))
    compare([folders[0], tmp_path / "b"], tmp_path / "out", resamples=20)
    found = read_comparison(tmp_path / "out")
    assert found["heads"]["local/linear"]["seeds"] == [1]
    assert any(note.startswith("local/linear: only the seeds 1,") for note in found["notes"])
    make_probe(tmp_path / "c", "c", seeds=(5,))
    with pytest.raises(UserError, match="no seed in common"):
        compare([folders[0], tmp_path / "c"], tmp_path / "out", resamples=20)


def test_a_head_that_one_backbone_lacks_is_compared_without_it(folders, tmp_path):
    make_probe(tmp_path / "b", "b", heads=("linear",), seeds=(0, 1))
    compare([folders[0], tmp_path / "b"], tmp_path / "out", resamples=20)
    heads = read_comparison(tmp_path / "out")["heads"]
    assert list(heads["local/transformer"]["models"]) == ["vit_base"]
    assert list(heads["local/linear"]["models"]) == ["vit_base", "b"]


def test_mistakes_are_told(folders, tmp_path):
    with pytest.raises(UserError, match="two folders or more"):
        compare(folders[:1], tmp_path)
    with pytest.raises(UserError, match="given twice"):
        compare([folders[0], folders[0]], tmp_path)
    with pytest.raises(UserError, match="holds no probe.json"):
        compare([folders[0], tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="a probe or a run is there"):
        compare(folders[:2], folders[0])
    with pytest.raises(UserError, match="no compare.json"):
        read_comparison(tmp_path)
    (tmp_path / "compare.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match="compare anew"):
        read_comparison(tmp_path)


def test_counts_that_were_cut_short_are_named(folders, tmp_path):
    folder = make_probe(tmp_path / "b", "b", seeds=(0, 1))
    file = folder / read_result(folder).heads[0].counts
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"transformer-none-0\.npz: not the counts"):
        compare([folders[0], folder], tmp_path / "out", resamples=10)


def test_a_head_without_average_precision_has_a_gap(folders, tmp_path):
    folder = make_probe(tmp_path / "b", "b", seeds=(0, 1))
    result = read_result(folder)
    bare = [replace(head, validation={k: v for k, v in head.validation.items() if k != "ap"}) for head in result.heads]
    write_result(replace(result, heads=bare), folder)
    compare([folders[0], folder], tmp_path / "out", resamples=10)
    row = read_comparison(tmp_path / "out")["heads"]["local/linear"]["models"]["b"]
    assert row["ap"] is None and "ap" not in row["difference"]


def test_pictures_are_copied_so_that_the_comparison_stands_alone(found):
    assert [one["name"] for one in found["pictures"]] == ["image <0>", "image <1>"]
    for picture in found["pictures"]:
        assert (found["out"] / picture["image"]).is_file()
        assert list(picture["likeliest"]) == list(picture["truth"]) == [one["name"] for one in found["models"]]
        assert len(picture["likeliest"]["vit_base"]) == 36


def test_the_table_has_every_head_and_figure(found):
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(table(found))
    text = console.export_text()
    recall = found["heads"]["local/transformer"]["models"]["vit_base"]["recall"]
    assert f"{100 * recall['value']:.2f} ({100 * recall['low']:.2f} to {100 * recall['high']:.2f})" in text
    assert "local, transformer, prefix" in text and text.count("runs/maskembed-vit_base") == len(found["heads"])


def test_no_figure_is_not_a_number(found):
    text = (found["out"] / "compare.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_counts_of_nothing_are_no_crash():
    empty = Counts(*(np.zeros((3, 2), dtype=np.int32) for _ in range(3)))
    from locfast.eval.probing.analysis import scores
    from locfast.eval.probing.bootstrap import Resamples

    value = scores([empty], Resamples.of(3, 10))[0]["recall"]["value"]
    assert math.isnan(value)
