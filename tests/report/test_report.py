"""Reports of runs, probes and comparisons: whole pages, safe names, and charts that carry their numbers."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from locfast.errors import UserError
from locfast.eval.probing.compare import compare, read_comparison
from locfast.eval.probing.results import read_result, write_result
from locfast.report import page as page_module
from locfast.report import write_report
from tests.eval.probe_folders import CLASSES, make_probe
from tests.report.pages import check_page, marks

NASTY = '<script>alert("x")</script>&"\''


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three probes and their comparison, with names that would break a page which did not escape them."""
    root = tmp_path_factory.mktemp("reports")
    make_probe(root / "a", f"vit {NASTY}", 0.5, seeds=(0, 1))
    make_probe(root / "b", "aligned", 0.58, seeds=(0, 1), softcap=30.0)
    make_probe(root / "c", "vit_other", 0.45, seeds=(0, 1))
    make_probe(root / "d", "vit_third", 0.47, seeds=(0, 1))
    compare([root / name for name in "abcd"], root / "out", resamples=100)
    return root


def test_a_comparison_is_a_whole_page_that_loads_nothing(root):
    page = check_page(write_report(root / "out").read_text(encoding="utf-8"))
    assert page.texts["h1"] == ["4 backbones"]
    assert {"Scores", "Relative locality", "Interventions", "What every patch is taken for"} <= set(page.texts["h2"])
    assert len(page.all("image")) == 2 and len(page.all("use")) == 2 * (1 + 4)


def test_a_probe_is_a_whole_page_that_loads_nothing(root):
    page = check_page(write_report(root / "a").read_text(encoding="utf-8"))
    assert page.texts["h1"] == [f"vit {NASTY}"]
    assert {"Scores", "How the heads trained", "How it was measured"} <= set(page.texts["h2"])
    assert len(page.all("image")) == 2


def test_names_are_text_wherever_they_stand(root):
    for name in ("a", "out"):
        html = write_report(root / name).read_text(encoding="utf-8")
        assert html.count("<script") == 1 and 'alert("x")' not in html and "alert(1)</script>" not in html
        page = check_page(html)
        assert any(CLASSES[6] in one for one in marks(page)) and any("image <0>" in one for one in page.texts["div"])
    assert any(NASTY in one for one in marks(page))


def test_charts_carry_their_numbers(root):
    found, page = read_comparison(root / "out"), check_page(write_report(root / "out").read_text(encoding="utf-8"))
    said = marks(page)
    for key in ("local/transformer", "global/linear"):
        for name, row in found["heads"][key]["models"].items():
            one = {end: 100 * row["recall"][end] for end in ("value", "low", "high")}
            text = "{value:.2f} % (95 % interval {low:.2f} to {high:.2f})".format(**one)
            assert f"{key.replace('/', ', ')}, {name}: {text}" in said
    change = found["heads"]["local/transformer"]["models"]["aligned"]["difference"]["recall"]
    assert any(f"{100 * change['value']:+.2f} points (95 % interval" in one for one in said)
    for name, (across, up) in found["relative_locality"]["points"].items():
        assert any(
            f"{name}: global recall, % {100 * across:.2f}, local recall, % {100 * up:.2f}" in one for one in said
        )
    gains = found["by_class"]["aligned"]["gains"]
    assert any(one.startswith(f"dog: {100 * gains[2]['value']:+.2f} points") for one in said)
    small = found["by_size"]["width"]["models"]["aligned"][0]
    assert any(f"aligned, objects of 0 to 10 % of the image, {small['objects']} of" in one for one in said)
    assert any("cat" in one and "patch" in one for one in said)


def test_numbers_can_be_read_without_the_script(root):
    page = check_page(write_report(root / "out").read_text(encoding="utf-8"))
    titles = page.texts["title"][1:]
    assert titles == marks(page)
    recall = read_comparison(root / "out")["heads"]["local/linear"]["models"]["aligned"]["recall"]
    assert any(cell.startswith(f"{100 * recall['value']:.2f} (") for cell in page.texts["td"])


def test_wrong_patches_are_counted_and_marked(root):
    result = read_result(root / "a")
    picture = result.pictures[0]
    answers = picture.likeliest["transformer"]
    wrong = sum(answer not in truth for answer, truth in zip(answers, picture.truth, strict=True))
    page = check_page(write_report(root / "a").read_text(encoding="utf-8"))
    assert f"told: {wrong} of 36 wrong" in page.texts["div"]
    crossed = [one for one in marks(page) if ", wrong; there: " in one]
    counted = sum(int(one.split(": ")[1].split(" ")[0]) for one in crossed)
    others = result.pictures[1]
    rest = sum(a not in t for a, t in zip(others.likeliest["transformer"], others.truth, strict=True))
    assert counted == wrong + rest > 0


def test_the_same_folder_gives_the_same_page(root):
    assert write_report(root / "out").read_bytes() == write_report(root / "out").read_bytes()
    assert write_report(root / "b").read_bytes() == write_report(root / "b").read_bytes()


def test_a_comparison_of_two_says_why_there_is_no_trend(root, tmp_path):
    compare([root / "a", root / "b"], tmp_path, resamples=20)
    page = check_page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.texts["h1"] == [f"aligned against vit {NASTY}"]
    assert any("needs three models that were not aligned, and there are 1" in one for one in page.texts["p"])


def test_bare_probes_have_a_report_too(tmp_path):
    few = {"heads": ("linear",), "interventions": False, "pictures": 0, "things": None}
    for name in ("a", "b"):
        make_probe(tmp_path / name, name, **few)
    compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", resamples=20)
    for name in ("a", "out"):
        page = check_page(write_report(tmp_path / name).read_text(encoding="utf-8"))
        assert "Interventions" not in page.texts["h2"] and "What every patch is taken for" not in page.texts["h2"]


def test_pictures_that_are_gone_are_left_out(tmp_path):
    folder = make_probe(tmp_path / "a", "a")
    for file in (folder / "pictures").iterdir():
        file.unlink()
    assert "What every patch is taken for" not in check_page(write_report(folder).read_text()).texts["h2"]


def test_the_papers_protocol_is_said(tmp_path):
    folder = make_probe(tmp_path / "a", "a", settings={"protocol": "paper"})
    assert "best one on the split that is reported" in write_report(folder).read_text()


def test_the_command_writes_one_report_each(root):
    for name in ("a", "out"):
        (root / name / "report.html").unlink(missing_ok=True)
    arguments = [sys.executable, "-m", "locfast.report", str(root / "a"), str(root / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(root / name / "report.html") for name in ("a", "out")]
    assert all((root / name / "report.html").is_file() for name in ("a", "out"))


def test_what_is_no_report_is_told(tmp_path):
    with pytest.raises(UserError, match="neither the probe.json"):
        write_report(tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps({"schema": 77}))
    with pytest.raises(UserError, match="probe anew"):
        write_report(tmp_path)


def test_a_head_with_gaps_in_its_figures_is_no_crash(tmp_path):
    folder = make_probe(tmp_path, "a", pictures=0)
    result = read_result(folder)
    bare = [
        replace(head, epochs=[{"loss": 0.5, "selection": None}], validation=head.validation | {"ap": None})
        for head in result.heads
    ]
    write_result(replace(result, heads=bare), folder)
    assert "epoch kept" in check_page(write_report(folder).read_text()).texts["th"]


def luminance(color: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_in_both_schemes(scheme):
    """WCAG 2 AA: 4.5 for text and 3 for what is drawn; more for running text."""
    style = (Path(page_module.__file__).parent / "style.css").read_text()
    color = dict(re.findall(r"--([\w-]+): (#\w{6})", style.split("@media")[scheme == "dark"]))

    def contrast(one: str, other: str) -> float:
        low, high = sorted(luminance(color[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast("ink", ground) > 12 for ground in ("paper", "card", "note"))
    assert all(contrast("quiet", ground) > 4.5 for ground in ("paper", "card"))
    assert all(contrast(f"s{i}", "card") > 4.5 for i in range(6)) and contrast("tip", "tip-ink") > 12
