"""The page around a report's sections: one HTML file that loads nothing and forbids itself to."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent


def page(title: str, kind: str, lede: str, sections: Iterable[str]) -> str:
    """A whole page. `title` and `kind` are plain text; `lede` and the sections are HTML.

    Its Content-Security-Policy lets it load nothing, and run the one script whose hash it names: a class or a model
    called `<script>` could do no harm even if it were not escaped.
    """
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "hover.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1>{lede}</header>'
        f"<main>{''.join(sections)}</main><script>{script}</script></body></html>\n"
    )


def write_page(file: Path, html: str) -> Path:
    """Whole or not at all."""
    aside = file.with_name(f".{file.name}")
    aside.write_text(html, encoding="utf-8")
    os.replace(aside, file)
    return file


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it; nothing where there is nothing."""
    inside = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def paragraph(text: str, css: str = "") -> str:
    """Plain text as a paragraph."""
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def figure(chart: str, caption: str, legend: str = "", numbers: str = "") -> str:
    """A chart with its legend above, its caption (plain text) below, and its numbers as a table to fold out."""
    if not chart:
        return ""
    folded = fold("Numbers", numbers) if numbers else ""
    return f"<figure>{legend}{chart}<figcaption>{escape(caption)}</figcaption>{folded}</figure>"


def figures(*all_of_them: str) -> str:
    """Figures beside each other where the page is wide enough."""
    kept = [one for one in all_of_them if one]
    return f'<div class="figures">{"".join(kept)}</div>' if kept else ""


def fold(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>" if inside else ""


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """Plain text in cells; the first `names` columns are names, the others numbers. It scrolls in its own box.

    Of several columns of names, the first says a name once for all rows that share it.
    """
    top = "".join(f'<th scope="col"{"" if i < names else _NUMBER}>{escape(cell)}</th>' for i, cell in enumerate(head))
    body = []
    for _, group in groupby(enumerate(rows), key=lambda one: one[1][0] if names > 1 else one[0]):
        same = [row for _, row in group]
        for number, row in enumerate(same):
            cells = []
            for i, cell in enumerate(row):
                if i >= names:
                    cells.append(f"<td{_NUMBER}>{escape(cell)}</td>")
                elif i == 0 and len(same) > 1:
                    span = f'<th scope="rowgroup" rowspan="{len(same)}">{escape(cell)}</th>'
                    cells.append(span if number == 0 else "")
                else:
                    cells.append(f'<th scope="row">{escape(cell)}</th>')
            body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody>"
        "</table></div>"
    )


def tiles(shown: Iterable[tuple[str, str, str]]) -> str:
    """Figures that come first: (label, the figure, what it is of), plain text."""
    items = "".join(
        f'<li><span class="quiet">{escape(label)}</span><strong>{escape(number)}</strong>'
        f"<span>{escape(text)}</span></li>"
        for label, number, text in shown
    )
    return f'<ul class="tiles">{items}</ul>' if items else ""


_NUMBER = ' class="n"'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, as a list; plain text."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{rows}</dl>'


def data_uri(image: bytes, lossless: bool) -> str:
    """An encoded image as a data URI: a PNG, or a JPEG of quality 88, a tenth of the size on photographs."""
    from PIL import Image

    out = io.BytesIO()
    opened = Image.open(io.BytesIO(image)).convert("RGB")
    opened.save(out, **({"format": "PNG"} if lossless else {"format": "JPEG", "quality": 88, "optimize": True}))
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()
