"""Where charts put their marks, and which numbers stand on their axes."""

import math
import re

import pytest

from locfast.report.charts import Value, dots, legend, lines, nice_ticks, scatter, short, strip, told
from locfast.report.patches import OTHERS, PALETTE, colors, patch_map, wrong_patches
from tests.report.pages import Page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (41, 58, [40, 45, 50, 55, 60]),
        (-3, 8, [-5, -2.5, 0, 2.5, 5, 7.5, 10]),
        (7, 7, [6.4, 6.6, 6.8, 7, 7.2, 7.4, 7.6]),
    ],
)
def test_ticks_are_round_and_hold_the_values(low, high, ticks):
    found = nice_ticks(low, high)
    assert found[0] <= low and found[-1] >= high and len(found) <= 8
    assert found == pytest.approx(ticks)


@pytest.mark.parametrize("seed", range(20))
def test_any_range_has_a_few_ticks(seed):
    import random

    draw = random.Random(seed)
    low = draw.uniform(-100, 100)
    high = low + 10 ** draw.uniform(-6, 6)
    found = nice_ticks(low, high)
    assert 2 <= len(found) <= 8 and found[0] <= low + 1e-6 * (high - low) and found[-1] >= high - 1e-6 * (high - low)


def test_a_value_stands_where_the_axis_says():
    """45 % between the ticks 40 and 50 of 10 .. 308 units."""
    drawn = dots([("row", {1: Value(0.40)}), ("row", {1: Value(0.50)}), ("row", {1: Value(0.45)})], ["", "x"], "chart")
    places = [float(x) for x in re.findall(r'class="dot s1" cx="([\d.]+)"', drawn)]
    assert places[2] == pytest.approx((places[0] + places[1]) / 2, abs=0.1) and places[1] > places[0] + 100


def test_every_series_has_its_own_line_color_and_shape():
    drawn = dots([("row", {i: Value(0.1 * i) for i in range(6)})], list("abcdef"), "chart")
    assert all(f"dot {'hollow ' if i == 0 else ''}s{i}" in drawn for i in range(6))
    heights = [float(y) for y in re.findall(r'<rect class="hit" x="0" y="([\d.]+)"', drawn)]
    assert len(set(heights)) == 6
    Page(drawn)


def test_a_gap_in_a_curve_is_no_crash_and_no_point():
    drawn = lines({"loss": [(1, Value(2.0)), (2, Value(math.nan)), (3, Value(0.1))]}, "step", "loss")
    assert drawn.count('class="spot"') == 2 and "nan" not in drawn.lower()
    assert lines({"loss": [(1, Value(math.inf))]}, "step", "loss") == "" == dots([], [], "x") == strip([], "x")


def test_an_axis_beyond_a_decade_is_logarithmic_unless_told_otherwise():
    """0.01, 0.1 and 1: the middle one halfway up, or close to the lowest."""
    for may_be_log, share in ((True, 0.5), (False, 0.0909)):
        drawn = lines({"a": [(i, Value(10.0**-i)) for i in range(3)]}, "x", "y", may_be_log=may_be_log)
        top, middle, low = (float(y) for y in re.findall(r'class="spot" cx="[\d.]+" cy="([\d.]+)"', drawn))
        assert (low - middle) / (low - top) == pytest.approx(share, abs=0.01)


def test_a_long_curve_has_few_marks_and_all_its_points():
    drawn = lines({"loss": [(i, Value(1 + i / 1000)) for i in range(1000)]}, "step", "loss")
    assert drawn.count('class="mark"') <= 60 and drawn.count(",") >= 1000


def test_a_single_point_and_equal_values_are_drawn():
    for drawn in (
        lines({"loss": [(5, Value(1.0))]}, "step", "loss"),
        dots([("row", {0: Value(0.5)})], ["a"], "chart"),
        strip([("class", Value(0.0))], "gain"),
        scatter([("a", 0.5, 0.4, False, "")], None, "x", "y"),
    ):
        assert "nan" not in drawn.lower() and 'class="mark"' in drawn
        Page(drawn)


def test_a_trend_stays_inside_the_chart():
    drawn = scatter([("a", 0.4, 0.1, False, ""), ("b", 0.6, 0.9, True, "")], (9.0, -4.0), "x", "y")
    (line,) = re.findall(r'class="trend" x1="([-\d.]+)" y1="([-\d.]+)" x2="([-\d.]+)" y2="([-\d.]+)"', drawn)
    assert all(0 <= float(number) <= 360 for number in line)


def test_what_a_mark_says():
    assert told(Value(0.5)) == "50.00 %"
    assert told(Value(0.0123, 0.01, 0.02, "seed 1"), signed=True) == (
        "+1.23 points (95 % interval +1.00 to +2.00); seed 1"
    )
    assert short("vit_base_patch16_clip_224.openai", 15) == "vit_bas….openai"
    assert legend(["one"]) == "" == legend(["a", "b"], first=1) and legend(["a", "<b>"]).count("&lt;b&gt;") == 1


def test_a_class_keeps_its_color_where_colors_suffice():
    first, second = colors([[1, 1, 1, 2], [2, 3, 1]])
    assert first[1] == second[1] and first[2] == second[2] and len({second[k] for k in (1, 2, 3)}) == 3
    many = colors([list(range(15))])[0]
    assert list(many.values()).count(OTHERS) == 15 - len(PALETTE)
    assert len({many[k] for k in many if many[k] != OTHERS}) == len(PALETTE)


def test_colors_do_not_clash_in_a_picture_of_rare_classes():
    """Classes 0 and 12 would share a colour by their rank over all pictures; in one picture they must not."""
    common = [[k] * (40 - k) for k in range(13)]
    found = colors([[k for one in common for k in one], [0, 12]])[1]
    assert found[0] != found[12]


def test_patches_by_hand():
    classes = ["sky", "cat", "dog"]
    drawn = patch_map(
        "p",
        [[0], [1], [2], [2]],
        [[0], [0, 1], [1], []],
        (2, 2),
        (20, 40),
        {0: "#111", 1: "#222", 2: "#333"},
        classes,
        "map",
    )
    said = [a["aria-label"] for a in Page(drawn).all("g")]
    assert said == ["sky: 1 patch", "cat: 1 patch", "dog: 1 patch, wrong; there: cat", "dog: 1 patch"]
    assert '<path d="M20 0h20v10h-20z" fill="#222"' in drawn and drawn.count('fill="none"') == 1
    assert wrong_patches([0, 1, 2, 2], [[0], [0, 1], [1], []]) == (1, 3)


def test_classes_of_one_patch_share_it():
    drawn = patch_map("p", [[0, 1]], [[0, 1]], (1, 1), (10, 10), {0: "#111", 1: "#222"}, ["a", "b"], "map")
    assert "M0 0h5v10h-5z" in drawn and "M5 0h5v10h-5z" in drawn and 'fill="none"' not in drawn
