"""Reports in a browser: nothing runs over the page, nothing is complained of, and marks tell their numbers."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from locfast.eval.probing.compare import compare
from locfast.report import write_report
from tests.eval.probe_folders import make_probe

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (360, 1200)


def browser() -> str | None:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    cached = Path.home().glob(".cache/ms-playwright/chromium*/chrome-*/*")
    return found or next((str(p) for p in sorted(cached) if p.name in ("chrome", "headless_shell")), None)


pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium on this machine: apt-get install chromium")

HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const pages = %s, out = [];
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) > 382;
(async () => {
  for (const [name, url, width] of pages) {
    const frame = document.createElement("iframe");
    frame.style = `width: ${width}px; height: 800px; border: 0`;
    const loaded = new Promise((done) => { frame.onload = done; });
    frame.src = url;
    document.body.append(frame);
    await loaded;
    const inside = frame.contentDocument, root = inside.documentElement, tip = inside.querySelector(".tip");
    for (const fold of inside.querySelectorAll("details")) fold.open = true;
    const mark = inside.querySelector(".chart .mark"), said = [];
    const kinds = [["pointerover", "hover"], ["focusin", "focus"], ["pointerdown", "tap"]];
    for (const [kind] of kinds) {
      mark.dispatchEvent(new frame.contentWindow.Event(kind, { bubbles: true }));
      said.push(!tip.hidden && tip.textContent === mark.getAttribute("aria-label"));
      const box = tip.getBoundingClientRect();
      said.push(box.left >= 0 && box.right <= width);
      inside.body.dispatchEvent(new frame.contentWindow.Event("pointerover", { bubbles: true }));
      said.push(tip.hidden);
    }
    const outside = [...inside.querySelectorAll("main *, header *")].filter((one) =>
      !one.closest(".scroll, pre, svg") && one.getBoundingClientRect().right > width + 0.5);
    const text = Math.min(...[...inside.querySelectorAll(".chart")].map((chart) =>
      parseFloat(getComputedStyle(chart.querySelector("text")).fontSize) *
      chart.getBoundingClientRect().width / chart.viewBox.baseVal.width));
    const scrolls = [...inside.querySelectorAll(".scroll")].some((one) => one.scrollWidth > one.clientWidth);
    out.push({ name, width, seen: root.clientWidth, scroll: root.scrollWidth,
      outside: outside.map((one) => one.outerHTML.slice(0, 90)), said,
      text, scrolls, paper: light(getComputedStyle(inside.body).backgroundColor),
      titles: inside.querySelectorAll(".mark > title").length });
    frame.remove();
  }
  const pre = document.createElement("pre");
  pre.id = "result";
  pre.textContent = JSON.stringify(out);
  document.body.append(pre);
})();
</script>
"""
"""Loads each page in a frame of each width, touches a mark in three ways, and writes down what it sees."""


def visit(file: Path, profile: Path, dark: bool) -> tuple[str, str]:
    """The document after its scripts, and what the browser logged."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    command = [
        str(browser()), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--allow-file-access-from-files", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", *scheme,
        "--window-size=1300,900", "--virtual-time-budget=20000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A comparison, a probe and a run, with long names, many classes and a wide table."""
    root = tmp_path_factory.mktemp("browser")
    classes = ["unlabeled", *(f"class {i} with a long name of several words" for i in range(60)), "never there"]
    long = "vit_so400m_patch14_siglip_gap_384.webli_" + "a" * 40
    few = {"classes": classes, "grid": (24, 24), "size": (336, 336), "things": list(range(1, 30)), "images": 20}
    for name, skill in (("a", 0.5), ("b", 0.6), ("c", 0.4), ("d", 0.45)):
        make_probe(root / name, long if name == "a" else name, skill, heads=("transformer",), **few)
    compare([root / name for name in "abcd"], root / "out", resamples=50)
    run = root / "run"
    run.mkdir()
    (run / "config.yaml").write_text("# locfast 0.1\nmodel: " + "x" * 200 + "\n")
    steps = ({"step": i, "loss": 3 / (i + 1), "val/loss": 3.1 / (i + 1)} for i in range(200))
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    return {name: write_report(root / name) for name in ("out", "a", "run")}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_reports_fit_a_phone_and_a_desk_in_light_and_dark(pages, tmp_path, dark):
    visits = [(name, file.as_uri(), width) for name, file in pages.items() for width in WIDTHS]
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS % json.dumps(visits))
    dom, log = visit(harness, tmp_path / "profile", dark)
    (result,) = re.findall(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    found = json.loads(result.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert len(found) == len(visits)
    for one in found:
        assert one["seen"] == one["width"] and one["scroll"] <= one["width"], one
        assert one["outside"] == [], one
        assert one["said"] == [True] * 9 and one["titles"] == 0, one
        assert one["text"] >= 10, one  # pixels: the smallest text of a chart
        assert one["paper"] is not dark, one
    assert any(one["scrolls"] for one in found if one["width"] == 360)
    assert not re.findall(r"CONSOLE.*", log), re.findall(r"CONSOLE.*", log)


def test_a_page_with_an_error_would_be_noticed(tmp_path):
    """The browser's log says what a page complains of: a blocked script, an exception."""
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><body><script>undefinedFunction()</script>")
    assert "CONSOLE" in visit(page, tmp_path / "profile", dark=False)[1]
