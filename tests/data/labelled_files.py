"""Files of labelled data for tests, and what they are read as."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locfast.data.decode.cpu import decode_label_map
from locfast.errors import UserError

SIZE = (6, 5)  # width, height of most images here


def png(ids, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(ids, dtype=np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putdata(np.asarray(ids).ravel().tolist())
        image.putpalette([7, 70, 200] * 256)
    image.save(file, "PNG")
    return file.getvalue()


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def ids(split, index: int) -> list[list[int]]:
    return decode_label_map(split.source.read(index).label_map).tolist()


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    return str(error.value)


MAP = [[0, 0, 1, 1, 2, 255], [0] * 6, [1] * 6, [2] * 6, [255] * 6]


def put_coco_stuff(root: Path, jpeg: Callable[..., bytes]) -> Path:
    """COCO-Stuff as it is distributed, with one image a split."""
    files = {"labels.txt": "".join(f"{i}: {'unlabeled' if i == 0 else f'class {i}'}\n" for i in range(183))}
    for split, name in {"train2017": "000000000009", "val2017": "000000000139"}.items():
        files[f"{split}/{name}.jpg"] = jpeg(*SIZE)
        files[f"stuffthingmaps/{split}/{name}.png"] = png([[0, 1, 90, 91, 181, 255]] * 5)
    return put(root, files)
