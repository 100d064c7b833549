"""Images with coloured boxes, and annotations of them in the forms of COCO and of LVIS v1."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red_kite": (230, 20, 20), "leaf": (20, 200, 40), "hot_dog": (40, 60, 230), "parrot_(bird)": (220, 210, 30)}
"""Classes as LVIS would name them."""
NAMES = [name.replace("_", " ") for name in COLOURS]
SIZES = ((90, 60), (48, 96), (64, 64), (200, 50), (30, 31), (33, 120))
"""Width and height: wide, tall and square ones."""


def pictures(count: int = 12, seed: int = 0) -> list[tuple[bytes, tuple[int, int], list[tuple[list[int], str]]]]:
    """JPEGs, their sizes, and the boxes (x, y, width, height) on each with their classes; none lies on another."""
    generator, found = np.random.default_rng(seed), []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        pixels, boxes = np.full((height, width, 3), 120, dtype=np.uint8), []
        for half in range(2):  # one in each half along the long side, at least a quarter of the image long and wide
            long, short = max(width, height) // 2, min(width, height)
            a0, b0 = half * long + int(generator.integers(0, long // 4)), int(generator.integers(0, short // 4))
            a1, b1 = (half + 1) * long - int(generator.integers(1, long // 4)), short - int(generator.integers(1, 5))
            x0, x1, y0, y1 = (a0, a1, b0, b1) if width >= height else (b0, b1, a0, a1)
            name = list(COLOURS)[int(generator.integers(0, 3 if number % 2 else 4))]
            pixels[y0:y1, x0:x1] = COLOURS[name]
            boxes.append(([x0, y0, x1 - x0, y1 - y0], name))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
        found.append((file.getvalue(), (width, height), boxes))
    return found


def categories(lvis: bool) -> list[dict[str, Any]]:
    """In no order of their ids, and one that no box has."""
    names = {7: "red_kite", 3: "leaf", 90: "hot_dog", 18: "parrot_(bird)", 44: "zebra"}
    if not lvis:
        return [{"supercategory": "thing", "id": i, "name": name.replace("_", " ")} for i, name in names.items()]
    more = {"def": "a thing", "image_count": 1, "instance_count": 1, "frequency": "r"}
    return [{"id": i, "name": name, "synonyms": [name], "synset": f"{name}.n.01", **more} for i, name in names.items()]


def write_annotations(root: Path, *, lvis: bool = False, count: int = 12) -> Path:
    """The file; images lie in val2017, and of LVIS every third in train2017. COCO's first image has a crowd, too."""
    id_of = {str(one["name"]).replace("_", " "): one["id"] for one in categories(lvis)}
    images, annotations = [], []
    for number, (data, (width, height), boxes) in enumerate(pictures(count)):
        id, split = 1000 - number, "train2017" if lvis and number % 3 == 0 else "val2017"
        name = f"{id:012}.jpg"
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / split / name).write_bytes(data)
        url = f"http://images.cocodataset.org/{split}/{name}"
        told = {"license": 3, "coco_url": url, "height": height, "width": width, "id": id}
        told |= {"date_captured": "2013-11-14 11:18:45", "flickr_url": "http://farm9.staticflickr.com/1.jpg"}
        more = {"neg_category_ids": [44], "not_exhaustive_category_ids": []} if lvis else {"file_name": name}
        images.append({**told, **more})
        for box, text in boxes:
            x, y, w, h = box
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            crowd = {} if lvis else {"iscrowd": 0}
            one = {"segmentation": outline, "area": float(w * h), "image_id": id, "bbox": [float(v) for v in box]}
            annotations.append(
                {**one, **crowd, "category_id": id_of[text.replace("_", " ")], "id": len(annotations) + 1}
            )
    annotations.reverse()  # not in the order of the images
    if not lvis:
        runs = {"size": [images[0]["height"], images[0]["width"]], "counts": [10, 4000]}
        crowd = {"segmentation": runs, "area": 4000.0, "iscrowd": 1, "image_id": 1000, "bbox": [0.0, 0.0, 60.0, 50.0]}
        annotations.append({**crowd, "category_id": 3, "id": 900100000001})
        images.append({**images[1], "id": 5})  # an image without a box
    content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    file = root / "annotations" / ("lvis_v1_val.json" if lvis else "instances_val2017.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**content, "categories": categories(lvis)}))
    return file


def write_lines(root: Path, count: int = 12) -> Path:
    """The same images as JSON Lines, with captions of all but the last two."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (data, _, boxes) in enumerate(pictures(count)):
        (root / f"{number}.jpg").write_bytes(data)
        regions = [{"box": [x, y, x + w, y + h], "text": name.replace("_", " ")} for (x, y, w, h), name in boxes]
        text = " beside ".join(one["text"] for one in regions)
        captions = {"text": [f"{text} on grey", f"picture {number}"]} if number < count - 2 else {}
        lines.append({"image": f"{number}.jpg", **captions, "regions": regions})
    (root / "regions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "regions.jsonl"
