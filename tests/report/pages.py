"""What every report must be: well-formed HTML that loads nothing, with captions and names for what is drawn."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements in order, with their text; asserts that every tag is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag in {*self.open[-2:]}:
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_page(html: str) -> Page:
    """Assert that `html` is one whole page that loads nothing and tells what it draws. Gives it, parsed."""
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "base", "object", "embed"), tag
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value[:60])
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy and f"'sha256-{digest}'" in policy
    assert "prefers-color-scheme: dark" in html
    viewport = next(a["content"] for a in page.all("meta") if a.get("name") == "viewport")
    assert viewport and "width=device-width" in viewport
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) - html.count("<g class") == 1
    assert len(page.all("table")) == len(page.all("caption"))
    drawn = [a for a in page.all("svg") if a.get("class") != "key"]
    assert all(a.get("aria-label") and a.get("viewbox") for a in drawn)
    ids = [str(a["id"]) for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(str(a["href"])[1:] in ids for a in page.all("use"))
    return page


def marks(page: Page) -> list[str]:
    """What every mark of the charts says, in order."""
    return [str(a["aria-label"]) for a in page.all("g") if a.get("class") == "mark"]
