"""Images with texts and regions in a JSON Lines file, one image a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locfast.data.regions.json_form import parse_regions
from locfast.data.sources.file_list import LOOKED_AT
from locfast.data.sources.names import Names
from locfast.data.spec import Record, Region
from locfast.errors import UserError

EXAMPLE = '{"image": "photos/1.jpg", "text": "a dog on a beach"}'
WITH_REGIONS = EXAMPLE[:-1] + ', "regions": [{"box": [40, 60, 200, 180], "text": "a dog"}]}'


class JsonLines:
    """The images of a .jsonl file, in its order: a line is {"image": path, "text": a caption or a list of captions,
    "regions": see `parse_regions`}.

    Paths are relative to the file's folder. Empty lines, blank captions and other keys do not count. Images without a
    caption or regions are kept, as long as some have either. Raises UserError that names the line of whatever is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.described = 0
        try:
            self._lines = Names(self._read())
        except UnicodeDecodeError:
            raise UserError(
                f"asked for the pairs {path}, found a file that is not UTF-8 text; write lines like {EXAMPLE}"
            ) from None
        except OSError as error:
            raise UserError(
                f"asked for the pairs {path}, which cannot be read ({error.strerror}); check its permissions"
            ) from None
        if not self.described:
            found = f"{len(self)} images in it, but no text and no regions" if len(self) else "no line in it"
            raise UserError(f"asked for the pairs {path}, found {found}; write lines like {EXAMPLE}")
        some = range(0, len(self), -(-len(self) // LOOKED_AT))
        if not any(Path(self.name(i)).is_file() for i in some):
            raise UserError(
                f"asked for the pairs {path}, found {len(self)} images in it, but none of the {len(some)} looked at "
                f"exists, e.g. {self.name(0)}; paths are relative to the file's own folder"
            )

    def _read(self) -> Iterator[str]:
        """`_packed` for every line that is not empty."""
        with open(self.path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        image, texts, regions = _parsed(line)
                    except ValueError as error:
                        example = WITH_REGIONS if '"regions"' in line else EXAMPLE
                        raise UserError(
                            f"asked for the pairs {self.path}, found line {number} wrong: {error}; write {example}"
                        ) from None
                    self.described += bool(texts or regions)
                    yield _packed(image, texts, regions)

    def __len__(self) -> int:
        return len(self._lines)

    def name(self, index: int) -> str:
        return str(self.path.parent / json.loads(self._lines[index])[0])

    def read(self, index: int) -> Record:
        image, texts, *regions = json.loads(self._lines[index])
        name = str(self.path.parent / image)
        return Record(Path(name).read_bytes(), name, regions=_unpacked(*regions), texts=tuple(texts))

    def __repr__(self) -> str:
        return f"{len(self)} images with texts or regions listed in {self.path}"


def _packed(image: str, texts: list[str], regions: tuple[Region, ...] | None) -> str:
    """What a line says, in few bytes: [image, captions, regions], the last left out where they are None."""
    packed = [] if regions is None else [[[*region.box, region.score, region.text] for region in regions]]
    return json.dumps([image, texts, *packed], separators=(",", ":"))


def _unpacked(regions: list[list[Any]] | None = None) -> tuple[Region, ...] | None:
    return None if regions is None else tuple(Region(tuple(box), text, score) for *box, score, text in regions)


def _parsed(line: str) -> tuple[str, list[str], tuple[Region, ...] | None]:
    """The image, the captions and the regions of a line. Raises ValueError that says what is wrong."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"no object but {_shown(value)}")
    image, texts = value.get("image"), value.get("text")
    if not isinstance(image, str) or not image:
        keys = ", ".join(value) or "nothing"
        raise ValueError(f'"image" is {_shown(image)}' if "image" in value else f'no "image" among its keys ({keys})')
    texts = [] if texts is None else texts if isinstance(texts, list) else [texts]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f'"text" holds {_shown(text)}, which is no string')
    try:
        "".join((image, *texts)).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which neither file names nor tokenizers take") from None
    return image, [stripped for text in texts if (stripped := text.strip())], parse_regions(value)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
