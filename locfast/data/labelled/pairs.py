"""Images and label maps as two trees of files with the same names."""

from __future__ import annotations

import os
from pathlib import Path

from locfast.data.decode.cpu import decode_label_map
from locfast.data.labelled.split import ListedImages, encode_label_map, some
from locfast.data.sources.folder import walk_images
from locfast.data.sources.names import Names
from locfast.data.spec import Record
from locfast.errors import UserError


class LabelledPairs(ListedImages):
    """Every image `images/a/b.jpg` with its label map `maps/a/b.png`.

    `shift`: what is added, modulo 256, to the values of the files to make class ids of them.
    Raises UserError where an image has no map, a map no image, and where there is neither.
    """

    def __init__(self, images: Path, maps: Path, shift: int = 0) -> None:
        self.images, self.maps, self.shift = images, maps, shift
        map_of = {os.path.splitext(name)[0]: name for name in walk_images(maps)}
        names = list(walk_images(images))
        stems = [os.path.splitext(name)[0] for name in names]
        alone = [str(images / name) for name, stem in zip(names, stems, strict=True) if stem not in map_of]
        alone += [str(maps / map_of[stem]) for stem in sorted(map_of.keys() - set(stems))]
        if alone:
            raise UserError(
                f"asked for pairs of the same name in {images} and {maps}, found {len(alone)} files without their "
                f"counterpart: {some(alone)}. Every image needs a label map and every label map an image "
                "(a/b.jpg, a/b.png): add what is missing, or take these files out"
            )
        if not names:
            raise UserError(f"asked for labelled images in {images} and {maps}, found no image in either")
        self._names, self._map_names = Names(names), Names(map_of[stem] for stem in stems)

    def label_name(self, index: int) -> str:
        return str(self.maps / self._map_names[index])

    def read(self, index: int) -> Record:
        """Raises OSError where a file cannot be read, UnreadableImage for a damaged map that has to be shifted."""
        name, label_map = self.name(index), Path(self.label_name(index)).read_bytes()
        if self.shift:
            label_map = encode_label_map(decode_label_map(label_map) + self.shift)
        return Record(Path(name).read_bytes(), name, label_map=label_map)
