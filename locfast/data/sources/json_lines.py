"""Images with texts in a JSON Lines file: {"image": path, "text": a caption or several} a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from locfast.data.sources.file_list import LOOKED_AT
from locfast.data.sources.names import Names
from locfast.data.spec import Record
from locfast.errors import UserError

EXAMPLE = '{"image": "photos/1.jpg", "text": "a dog on a beach"}'


class JsonLines:
    """The images of a .jsonl file, in its order: a line is {"image": path, "text": a caption or a list of captions}.

    Paths are relative to the file's folder. Empty lines, blank captions and other keys do not count. Images without a
    caption are kept, as long as some have one. Raises UserError that names the line of whatever is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.captioned = 0
        try:
            self._pairs = Names(self._read())
        except UnicodeDecodeError:
            raise UserError(
                f"asked for the pairs {path}, found a file that is not UTF-8 text; write lines like {EXAMPLE}"
            ) from None
        except OSError as error:
            raise UserError(
                f"asked for the pairs {path}, which cannot be read ({error.strerror}); check its permissions"
            ) from None
        if not self.captioned:
            found = f"{len(self)} images in it, but no text" if len(self) else "no line in it"
            raise UserError(f"asked for the pairs {path}, found {found}; write lines like {EXAMPLE}")
        some = range(0, len(self), -(-len(self) // LOOKED_AT))
        if not any(Path(self.name(i)).is_file() for i in some):
            raise UserError(
                f"asked for the pairs {path}, found {len(self)} images in it, but none of the {len(some)} looked at "
                f"exists, e.g. {self.name(0)}; paths are relative to the file's own folder"
            )

    def _read(self) -> Iterator[str]:
        """[image, caption, ...] as JSON, for every line that is not empty."""
        with open(self.path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        image, texts = _pair(line)
                    except ValueError as error:
                        raise UserError(
                            f"asked for the pairs {self.path}, found line {number} wrong: {error}; write {EXAMPLE}"
                        ) from None
                    self.captioned += bool(texts)
                    yield json.dumps([image, *texts])

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        return str(self.path.parent / json.loads(self._pairs[index])[0])

    def read(self, index: int) -> Record:
        image, *texts = json.loads(self._pairs[index])
        name = str(self.path.parent / image)
        return Record(Path(name).read_bytes(), name, texts=tuple(texts))

    def __repr__(self) -> str:
        return f"{len(self)} images with texts listed in {self.path}"


def _pair(line: str) -> tuple[str, list[str]]:
    """The image and the captions of a line. Raises ValueError that says what is wrong."""
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
    return image, [stripped for text in texts if (stripped := text.strip())]


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
