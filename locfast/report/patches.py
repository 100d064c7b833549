"""What every patch of a photograph is taken for: colours over the dimmed picture (Locality Alignment, figure 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

Size = tuple[int, int]

PALETTE = (
    "#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00",
    "#3b78c9", "#b8e0a0", "#f7b6c2", "#b9a5e8", "#c49a5a", "#7fd6c8",
)  # fmt: skip
"""The first six are told apart by eyes that see no red or no green (Okabe and Ito); the others differ in lightness."""
OTHERS = "#c8ccd2"
"""Of the classes of a picture beyond the palette's twelve; hovering names them."""
OPACITY = 0.78


def colors(pictures: Sequence[Iterable[int]]) -> list[dict[int, str]]:
    """A colour for every class in each picture: the same one in all of them where the palette suffices for that.

    pictures: the classes of every picture, once for every patch that shows them.
    """
    counted = [Counter(one) for one in pictures]
    total = sum(counted, Counter())
    usual = {k: i % len(PALETTE) for i, (k, _) in enumerate(sorted(total.items(), key=lambda x: (-x[1], x[0])))}
    found = []
    for one in counted:
        taken: dict[int, int] = {}
        for k, _ in sorted(one.items(), key=lambda x: (-x[1], x[0])):
            free = [i for i in range(len(PALETTE)) if i not in taken.values()]
            if free:
                taken[k] = usual[k] if usual[k] in free else free[0]
        found.append({k: PALETTE[taken[k]] if k in taken else OTHERS for k in one})
    return found


def photograph(name: str, uri: str, size: Size, label: str) -> str:
    """The picture itself; maps show it again by its `name` (an id of the page), so its bytes stand there once."""
    height, width = size
    css = ' class="pixels"' if max(size) < 100 else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg"><image id="{name}"{css} href="{uri}" width="{width}" '
        f'height="{height}"/></svg>'
    )


def patch_map(
    name: str,
    answers: Sequence[Sequence[int]],
    truth: Sequence[Sequence[int]],
    grid: Size,
    size: Size,
    paint: dict[int, str],
    classes: Sequence[str],
    label: str,
) -> str:
    """Patches in the colours of their classes (several of one patch side by side) over the picture `name`, dimmed.

    A patch with an answer that is not in its truth is crossed; one whose truth is empty, because its pixels have no
    known label, is neither right nor wrong.
    """
    (rows, columns), (height, width) = grid, size
    tall, wide = height / rows, width / columns
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for patch, told in enumerate(answers):
        if told:
            groups.setdefault((tuple(told), tuple(truth[patch])), []).append(patch)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg"><use href="#{name}"/>'
        f'<rect width="{width}" height="{height}" opacity=".6"/>'
    ]
    for (told, there), patches in groups.items():
        wrong = bool(there) and any(k not in there for k in told)
        names = ", ".join(classes[k] for k in told)
        said = f"{names}: {len(patches)} patch{'es' if len(patches) > 1 else ''}"
        if wrong:
            said += f", wrong; there: {', '.join(classes[k] for k in there)}"
        drawn = ""
        for i, k in enumerate(told):
            part = wide / len(told)
            path = "".join(
                f"M{(p % columns) * wide + i * part:.5g} {(p // columns) * tall:.5g}h{part:.5g}v{tall:.5g}h{-part:.5g}z"
                for p in patches
            )
            drawn += f'<path d="{path}" fill="{paint[k]}" opacity="{OPACITY}"/>'
        if wrong:
            cross = "".join(
                f"M{(p % columns + 0.2) * wide:.5g} {(p // columns + 0.2) * tall:.5g}l{0.6 * wide:.5g} {0.6 * tall:.5g}"
                f"m0 {-0.6 * tall:.5g}l{-0.6 * wide:.5g} {0.6 * tall:.5g}"
                for p in patches
            )
            drawn += f'<path d="{cross}" fill="none" stroke="#101418" stroke-width="{0.13 * wide:.3g}"/>'
        words = escape(said)
        parts.append(f'<g class="mark" tabindex="-1" role="img" aria-label="{words}"><title>{words}</title>{drawn}</g>')
    return "".join([*parts, "</svg>"])


def wrong_patches(answers: Sequence[int], truth: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many patches with a known label have an answer that is not there, and how many have a known label."""
    known = [(told, there) for told, there in zip(answers, truth, strict=True) if there]
    return sum(told not in there for told, there in known), len(known)


def key(paint: dict[int, str], classes: Sequence[str]) -> str:
    """The colours' names, as a list that wraps."""
    items = "".join(
        f'<li><span class="swatch" style="background:{color}"></span>{escape(classes[k])}</li>'
        for k, color in sorted(paint.items(), key=lambda one: classes[one[0]])
    )
    return f'<ul class="legend">{items}</ul>'
