"""Zero-shot regions: boxes by the names of their classes, and by their phrases, in the joint space of the text tower.

Every box is read by the model's prompter, where it was trained with one, and by RoI-align of its projected patch
tokens, as a model without can be read too. Recognition: a box takes the class with the nearest name (CLOC, appendix
A.2: the bare name). Retrieval: recall at 1, 5 and 10 from a region to its phrase and from a phrase to its region.
Images with captions are retrieved as well, as they are seen for their regions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.eval.commands import shared

if TYPE_CHECKING:
    from locfast.data.spec import CropPolicy, Source
    from locfast.eval.commands.joint import Joint
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.results import Score
    from locfast.eval.regions.reading import Looker, RegionFeatures

SOURCES = "COCO's instances_*.json or LVIS's lvis_v1_*.json; or a source with regions: .jsonl, tar shards, demo:COUNT"
VIEWS = ("own", "pad", "squash", "center")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_models(parser)
    shared.add_data(parser, train=False, val=SOURCES)
    shared.add_text(parser)
    group = parser.add_argument_group("regions")
    group.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="images of annotations; default: looked for beside the file"
    )
    group.add_argument("--images", type=int, metavar="N", help="so many of them, drawn from --seed; default: all")
    group.add_argument(
        "--classes", type=Path, metavar="FILE", help="a name a line; default: the annotations', or all phrases"
    )
    group.add_argument("--template", default="{}", help="a sentence with {} for a class (default: its name alone)")
    group.add_argument(
        "--recognition", action=argparse.BooleanOptionalAction, default=True, help="classes of boxes (default: yes)"
    )
    group.add_argument(
        "--retrieval", action=argparse.BooleanOptionalAction, help="by phrases; default: where --val has any"
    )
    group.add_argument(
        "--view", choices=VIEWS, default="own", help="own (default): a run's own; of others pad, which shows every box"
    )
    group.add_argument("--roi-size", type=int, default=7, help="RoI-align's samples along a side (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    from locfast.data.sources.needed import check_regions
    from locfast.data.sources.split import Chosen
    from locfast.errors import UserError
    from locfast.eval.commands.joint import TextTowers, open_joint
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.results import check_out
    from locfast.eval.regions.judge import Judge, classes_without
    from locfast.eval.regions.questions import choose_images, class_list, number_classes, open_regions
    from locfast.eval.regions.reading import read_regions

    if args.template.count("{}") != 1:
        raise UserError(f"--template {args.template!r}: it needs one {{}} where the name goes: a photo of a {{}}.")
    if args.roi_size < 1:
        raise UserError(f"--roi-size {args.roi_size}: type at least 1.")
    retrieval = not args.val.endswith(".json") if args.retrieval is None else args.retrieval
    if not (args.recognition or retrieval):
        raise UserError("--no-recognition without --retrieval asks nothing of any region. Leave one of them out.")
    shared.tell_progress()
    reading = shared.reading(args)
    source = open_regions(args.val, args.image_folder)
    check_regions(source)
    indices = choose_images(source, args.images, args.seed)
    texts = TextTowers(args)
    check_out(args.out, args.overwrite)
    models = Models(args)
    joint = open_joint(texts, models, [*args.model, args.against], "the joint space of regions", reading.device)
    lookers = _lookers(args, models, joint)
    read = read_regions(source, lookers, reading, indices)
    judge = Judge(read, joint.texts, models.against, reading.device, args.seed)
    found: list[Score] = []
    notes = [*_left_out(source, read), *joint.notes]
    settings: dict[str, Any] = {
        "device": str(reading.device),
        "precision": reading.precision,
        "views": {name: looker.crop for name, looker in lookers.items()},
        "readings": {name: list(looker.readings) for name, looker in lookers.items()},
        "queries": {"images": len(read), "regions": len(read.phrases), "phrases": len(set(read.phrases))},
        "left_out": {**getattr(source, "left_out", {}), "by_model": read.left_out},
        "text_towers": joint.described,
    }
    if args.recognition:
        classes, names = class_list(source, read.phrases, args.classes)
        labels = number_classes(read.phrases, classes, args.classes)
        settings["names_of_classes"] = dict(zip(classes, names, strict=True))
        notes += classes_without(labels, classes)
        found += judge.recognition(labels, classes, [args.template.replace("{}", name) for name in names])
    if retrieval:
        notes.append(
            f"retrieval among {len(read.phrases)} regions and their {settings['queries']['phrases']} distinct phrases: "
            "any region of an equal phrase is right, and a tie counts against the model"
        )
        found += judge.retrieval()
    if any(read.texts):
        captions = [own for own in read.texts if own]
        settings["queries"]["captions"] = sum(map(len, captions))
        notes.append(f"{len(captions)} images and their {settings['queries']['captions']} captions, too")
        found += judge.captions()
    val = source if args.images is None else Chosen(source, indices.numpy())
    how: dict[str, Any] = {"figures": "mean class accuracy and recall", "models_down": True}
    shared.finish(args, "regions", found, models, {"val": (val, read)}, settings, notes, **how)
    return 0


def _lookers(args: argparse.Namespace, models: Models, joint: Joint) -> dict[str, Looker]:
    from locfast.eval.regions.reading import Looker
    from locfast.eval.regions.readings import readings_of

    found = {}
    for name, tower in joint.towers.items():
        readings = readings_of(tower, models.subjects[name].prompter, args.roi_size)
        found[name] = Looker(tower, _crop(name, models) if args.view == "own" else args.view, readings)
    return found


def _crop(name: str, models: Models) -> CropPolicy:
    """How a run looks at images with regions; what it is set against looks likewise, and others pad."""
    those = (name, *(run for run, other in models.against.items() if other == name))
    return next((crop for one in those if (crop := models.subjects[one].crop)), "pad")


def _left_out(source: Source, read: RegionFeatures) -> list[str]:
    """What was not asked about, and why."""
    notes = [f"{len(read.phrases)} regions of {len(read.image_of.unique())} images are asked about"]
    of_source: dict[str, int] = getattr(source, "left_out", {})
    notes += [f"left out: {count} boxes, {reason}" for reason, count in of_source.items()]
    if empty := getattr(source, "empty", 0):
        notes.append(f"{empty} images of {source!r} have no box and are not read")
    for name, reasons in read.left_out.items():
        if reasons:
            notes.append(f"left out, as {name} sees them: " + ", ".join(f"{n} {why}" for why, n in reasons.items()))
    return notes
