"""Where does the time of a probe go? One whole probe of ViT-B/16 on as many images as COCO has, by its parts.

Photographs are read over and over under new names, each with a label map of 183 classes in blocks of random ids: time
depends on sizes alone, and the figures of this probe mean nothing. It is the product that runs, once: features, which
read, decode and pass every image through the backbone; heads, five epochs; scores, average precision included.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from _harness import Bench, parser
from _results import ROOT, Row
from PIL import Image

from locfast.data.labelled import LabelledSplit
from locfast.data.sources import ImageFolder
from locfast.data.spec import Record
from locfast.engine.precision import pick_precision
from locfast.eval.probing.run import probe_backbone
from locfast.eval.probing.settings import Settings
from locfast.models.backbone import load_backbone

COCO = {"train": 118_287, "validation": 5_000}
CLASSES = 183
PHOTOS = [root / "shared" / "data" / "photos" for root in (ROOT, ROOT.parent)]
SOURCES = ["locfast/eval/probing", "locfast/eval/heads.py", "locfast/eval/labels.py", "locfast/data/labelled"]


class Repeated:
    """A folder's photographs, over and over, with label maps of blocks of 40 px."""

    def __init__(self, folder: Path, count: int, side: str) -> None:
        self.photos, self.count, self.side = ImageFolder(folder), count, side
        self.maps: list[bytes] = []
        generator = np.random.default_rng(0)
        for i in range(len(self.photos)):
            width, height = Image.open(io.BytesIO(self.photos.read(i).image)).size
            ids = generator.integers(0, CLASSES, (-(-height // 40), -(-width // 40)), np.uint8)
            file = io.BytesIO()
            Image.fromarray(ids.repeat(40, 0).repeat(40, 1)[:height, :width]).save(file, "PNG")
            self.maps.append(file.getvalue())

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.side}/{index}.jpg"

    label_name = file_name = name

    def read(self, index: int) -> Record:
        photo = index % len(self.photos)
        return Record(self.photos.read(photo).image, self.name(index), label_map=self.maps[photo])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="vit_base_patch16_clip_224", help="with random weights")
    options.add_argument("--images", type=int, default=COCO["train"], help="training images (default: COCO's)")
    options.add_argument("--validation", type=int, default=COCO["validation"])
    options.add_argument("--photos", type=Path, default=next((folder for folder in PHOTOS if folder.is_dir()), None))
    options.add_argument("--heads", nargs="+", default=["transformer"])
    options.add_argument("--features", default="auto")
    options.add_argument("--workers", type=int)
    args = options.parse_args()
    if args.photos is None:
        options.error("there are no photographs beside this checkout; give --photos DIR")
    bench = Bench("probe", SOURCES, args)
    counts = {"train": 128, "validation": 32} if bench.smoke else {"train": args.images, "validation": args.validation}
    model = "demo" if bench.smoke else args.model
    backbone = load_backbone(model, pretrained=False, seed=0)
    splits = {
        side: LabelledSplit(
            Repeated(args.photos, count, side), tuple(map(str, range(CLASSES))), 0, None, "folder", "repeated"
        )
        for side, count in counts.items()
    }
    settings = Settings(heads=tuple(args.heads), batch_size=32)
    with tempfile.TemporaryDirectory() as folder:
        result = probe_backbone(
            backbone,
            None,
            model,
            splits["train"],
            splits["validation"],
            settings,
            Path(folder),
            device=bench.device,
            precision=pick_precision("auto", bench.device),
            machine=bench.result.machine,
            keep=args.features,
            workers=args.workers,
            tell=lambda line: print(line, flush=True),
        )
    steps = settings.epochs * (result.images["train"] // settings.batch_size)
    heads = len(result.heads)
    notes = {
        "features": f"{sum(counts.values()) / result.seconds['features']:.0f} images/s",
        "heads": f"{1e3 * result.seconds['heads'] / max(1, steps):.2f} ms a step of {heads} heads, choosing included",
        "scores": "recall, F1 and average precision",
        "all": "one run",
    }
    case = f"{model}, {counts['train']} images, {settings.epochs} epochs"
    for part, note in notes.items():
        ms = 1e3 * result.seconds[part]
        bench.add(Row(case, part, "locfast", ms, ms, ms, note=note, shape={"T": backbone.num_tokens, "K": CLASSES}))
    bench.finish()


if __name__ == "__main__":
    main()
