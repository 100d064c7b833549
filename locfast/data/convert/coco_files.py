"""What the data sets on COCO's images have in common: where these lie, and their captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from locfast.data.convert.drafts import entries_of
from locfast.errors import UserError

FOLDERS = ("", "train2017/", "val2017/", "train2014/", "val2014/")
"""Where COCO's releases have an image, below the folder of images."""


def places(file_name: str) -> tuple[str, ...]:
    """Where an image of COCO may lie: under its name, and under that of the other release.

    The releases of 2014 (COCO_train2014_000000000009.jpg) and 2017 (000000000009.jpg) hold the same images, parted in
    another way; their numbers are the same.
    """
    base = PurePosixPath(file_name).name
    number = base.rpartition("_")[2]
    others = (f"{folder}{name}" for folder in FOLDERS for name in (base, number))
    old = (f"{split}/COCO_{split}_{number}" for split in ("train2014", "val2014"))
    return tuple(dict.fromkeys((file_name, *others, *old)))


def read_captions(files: Sequence[Path]) -> dict[int, list[str]]:
    """COCO's captions by the number of their image, of one file or more. Raises UserError."""
    captions: dict[int, list[str]] = {}
    for file in files:
        content = read_json_of(file, "captions")
        with entries_of(file, "a list 'annotations' of {image_id, caption}, as captions_train2017.json has it"):
            for one in content["annotations"]:
                captions.setdefault(int(one["image_id"]), []).append(str(one["caption"]))
    return captions


def read_json_of(file: Path, what: str) -> Any:
    """The content of a JSON file. Raises UserError where there is none."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"asked for the {what} in {file}, found no such file; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"asked for the {what} in {file}, found a file that is no JSON ({error})") from None
