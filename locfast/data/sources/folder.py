"""Image folders, with or without label maps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from locfast.data.sources.names import Names
from locfast.data.sources.texts import TEXT, lines, text_beside
from locfast.data.spec import Record
from locfast.errors import UserError

KINDS = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2", "ppm", "pgm")
IMAGE_EXTENSIONS = tuple("." + kind for kind in (*KINDS, "pbm", "pnm"))


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def walk_images(root: Path, others: set[str] | None = None) -> Iterator[str]:
    """Paths of all images below `root`, relative to it, in an order that depends on the names alone.

    Hidden files and folders are left out, symbolic links are followed (a folder that contains itself only once).
    `others` gets the endings of all files that are no images, such as ".txt".
    Raises UserError where a folder may not be read.
    """

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"asked for the images below {root}, found the folder {folder}, which cannot be read "
                f"({error.strerror}); give read and execute permission, or choose another --data"
            ) from None
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(entry.path, f"{prefix}{entry.name}/", above | {here})
            elif is_image(entry.name):
                yield prefix + entry.name
            elif others is not None:
                others.add(os.path.splitext(entry.name)[1])

    return walk(str(root), "", frozenset())


class ImageFolder:
    """Every image below a folder, at any depth, sorted by path. Labels are neither needed nor read.

    `a/b.txt` beside `a/b.jpg` holds its texts, one a line. Where no .txt lies anywhere, none is looked for.
    """

    has_texts = False

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        others: set[str] = set()
        self.names = Names(walk_images(self.root, others))
        self.has_texts = TEXT in others
        if not len(self.names):
            raise UserError(
                f"asked for images in {root}, found none: no file below it ends in "
                f"{', '.join(IMAGE_EXTENSIONS)}; choose a folder with images, a .txt list or .tar shards"
            )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.root / self.names[index])

    def read(self, index: int) -> Record:
        name = self.name(index)
        text = text_beside(name) if self.has_texts else None
        return Record(Path(name).read_bytes(), name, text=text, texts=lines(text))

    def __repr__(self) -> str:
        return f"{len(self)} images in {self.root}"


class LabelledFolder:
    """`images/` and `annotations/` side by side: `images/a/b.jpg` has its class ids in `annotations/a/b.png`.

    `split` narrows it to a folder inside both ("train"). Images without an annotation are left out. `classes` are the
    lines of `classes.txt`, class 0 first, where that file is there.
    """

    def __init__(self, root: str | Path, split: str = "") -> None:
        self.root, self.split = Path(root), split
        images, maps = self.root / "images" / split, self.root / "annotations" / split
        for folder in (images, maps):
            if not folder.is_dir():
                raise UserError(
                    f"asked for labelled images in {root}, found no folder {folder}; images/ and annotations/ must lie "
                    "side by side with the same file names, and with the same splits inside"
                )
        self.images, self.maps = images, maps
        labelled = {os.path.splitext(name)[0]: name for name in walk_images(maps)}
        pairs = [(n, labelled[stem]) for n in walk_images(images) if (stem := os.path.splitext(n)[0]) in labelled]
        self.names, self.map_names = Names(n for n, _ in pairs), Names(m for _, m in pairs)
        if not pairs:
            raise UserError(
                f"asked for labelled images in {root}, found {images} and {maps}, but no image that has an annotation "
                "of the same name; name them alike (images/a.jpg, annotations/a.png)"
            )
        classes = self.root / "classes.txt"
        self.classes = tuple(classes.read_text().splitlines()) if classes.is_file() else ()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.images / self.names[index])

    def read(self, index: int) -> Record:
        name = self.name(index)
        label_map = (self.maps / self.map_names[index]).read_bytes()
        return Record(Path(name).read_bytes(), name, label_map=label_map)

    def __repr__(self) -> str:
        return f"{len(self)} labelled images in {self.images}"
