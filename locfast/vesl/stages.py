"""The three stages of VESL: captions, phrases, regions (CLOC, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locfast.data.orphan import pool
from locfast.data.regions.shards import write_shard
from locfast.data.spec import Record, Region
from locfast.vesl.boxes import regions
from locfast.vesl.detector import Detector
from locfast.vesl.feed import Fed
from locfast.vesl.phrases import Phrases, find_phrases
from locfast.vesl.pixels import Framed
from locfast.vesl.stage import Row, Stage

Said = tuple[str, list[str]]
"""Where captions come from ("given", "generated", "both", "none"), and the captions, the main one first."""


def caption(stage: Stage, fed: Iterable[Fed], say: Callable[[Any], list[Said]]) -> None:
    """captions/NNNNNN.jsonl: `say` captions the readable samples of a batch."""
    before = stage.meter.read()
    for chunk, batches in stage.chunks(fed):
        rows: list[Row] = []
        lost = 0
        for one in batches:
            with stage.meter.busy():
                said = iter(say(one.batch) if one.batch is not None else [])
            for index, name, problem in zip(one.job.indices, one.names, one.problems, strict=True):
                row: Row = {"index": index, "name": name}
                if problem:
                    row["unreadable"] = problem
                else:
                    row["caption"], row["captions"] = next(said)
                rows.append(row)
            lost += one.lost
            stage.meter.images += len(one.names)
        stage.check_lost(chunk, lost, rows)
        captioned = sum(bool(row.get("captions")) for row in rows)
        bad = sum("unreadable" in row for row in rows)
        before = stage.note(chunk, before, f"{captioned} of {len(rows)} images with a caption, {bad} unreadable")
        stage.aside.keep_lines(stage.folder.result(stage.name, chunk), rows)
    stage.end()


def phrases(stage: Stage, max_phrases: int, workers: int) -> None:
    """phrases/NNNNNN.jsonl: what stands in the captions' file, and the phrases. In `workers` processes (0: here)."""
    before = stage.meter.read()
    with pool(workers) if workers else nullcontext() as helpers:
        for chunk in stage.pending():
            rows = stage.input(chunk)
            asked = [(row.get("captions", []), max_phrases) for row in rows]
            with stage.meter.busy():
                found = list(helpers.map(_find, asked, chunksize=32) if helpers else map(_find, asked))
            for row, one in zip(rows, found, strict=True):
                if row.get("captions"):
                    row.update(phrases=one.kept, dropped=one.dropped)
            stage.meter.images += len(rows)
            number = sum(len(row.get("phrases", ())) for row in rows)
            before = stage.note(chunk, before, f"{number} phrases for {len(rows)} images")
            stage.aside.keep_lines(stage.folder.result(stage.name, chunk), rows)
    stage.end()


def _find(asked: tuple[list[str], int]) -> Phrases:
    return find_phrases(*asked)


@dataclass(frozen=True)
class Choice:
    """Which of a detector's boxes become regions, see `boxes.regions`."""

    min_score: float = 0.1
    nms: float | None = None
    max_regions: int | None = None


@dataclass(frozen=True)
class Frames:
    """What a worker makes of a batch: two tensors, which reach the main process in shared memory, and the rest."""

    frames: Tensor  # uint8 [B, side, side, 3]
    data: Tensor  # the images' own bytes, one after the other
    lengths: list[int]
    inside: list[tuple[int, int]]
    sizes: list[tuple[int, int]]
    endings: list[str]

    @staticmethod
    def of(items: Sequence[tuple[Framed, bytes]]) -> Frames:
        each = [one for one, _ in items]
        return Frames(
            torch.stack([torch.from_numpy(one.pixels) for one in each]),
            torch.frombuffer(bytearray().join(data for _, data in items), dtype=torch.uint8),
            [len(data) for _, data in items],
            [one.inside for one in each],
            [one.size for one in each],
            [one.ending for one in each],
        )


@dataclass
class Labelled:
    """A chunk while it is written: the batches to come, what is known of its samples, and what each one got."""

    batches: Iterator[Fed]
    rows: list[Row]
    log: list[Row] = field(default_factory=list)
    lost: int = 0


class Waiting:
    """The chunks that the detector is to do, and the phrases of those under way."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.rows: dict[int, list[Row]] = {}

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for chunk in self.stage.pending():
            self.rows[chunk] = self.stage.input(chunk)
            yield chunk, [row["index"] for row in self.rows[chunk] if row.get("captions")]


def detect(stage: Stage, fed: Iterable[Fed], waiting: Waiting, detector: Detector, choice: Choice) -> None:
    """shards/NNNNNN.tar: images with a caption, their captions and regions; log/NNNNNN.jsonl: what each image got."""
    before = stage.meter.read()
    for chunk, batches in stage.chunks(fed):
        detector.forget()
        made = Labelled(batches, waiting.rows.pop(chunk))

        def write(aside: Path, chunk: int = chunk, made: Labelled = made) -> None:
            nonlocal before
            number = write_shard(aside, label(made, stage, detector, choice))
            log = [*made.log, *(_skipped(row) for row in made.rows if "unreadable" in row or not row["captions"])]
            log.sort(key=lambda row: row["index"])
            stage.check_lost(chunk, made.lost, [row for row in made.rows if row.get("captions")])
            boxes = sum(row.get("boxes", 0) for row in log)
            before = stage.note(chunk, before, f"{boxes} boxes on {number} images, {len(log) - number} images skipped")
            stage.aside.keep_lines(stage.folder.beside(stage.name, chunk), log)

        stage.aside.keep(stage.folder.result(stage.name, chunk), write)
    stage.end()


def label(made: Labelled, stage: Stage, detector: Detector, choice: Choice) -> Iterator[tuple[str, str, Record]]:
    """The samples of a chunk as `write_shard` takes them, labelled batch by batch while it writes."""
    known = {row["index"]: row for row in made.rows}
    for one in made.batches:
        good = []
        for index, name, problem in zip(one.job.indices, one.names, one.problems, strict=True):
            if problem:
                known[index]["unreadable"] = problem
            else:
                stage.check_same(known[index], name)
                good.append(known[index])
        made.lost += one.lost
        stage.meter.images += len(one.job.indices)
        if not good:
            continue
        found = _found(one.batch, good, stage, detector, choice)
        images = one.batch.data.split(one.batch.lengths)
        for row, data, ending, (boxes, degenerate) in zip(good, images, one.batch.endings, found, strict=True):
            made.log.append(_labelled(row, boxes, degenerate))
            record = Record(data.numpy().tobytes(), row["name"], texts=tuple(row["captions"]), regions=boxes)
            yield f"{row['index']:012d}", ending, record


def _found(
    batch: Frames, rows: list[Row], stage: Stage, detector: Detector, choice: Choice
) -> list[tuple[tuple[Region, ...], int]]:
    """Regions of every image of a batch, and its number of degenerate boxes; those without a phrase have none."""
    asked = [i for i, row in enumerate(rows) if row["phrases"]]
    found: list[tuple[tuple[Region, ...], int]] = [((), 0)] * len(rows)
    if not asked:
        return found
    phrases = [rows[i]["phrases"] for i in asked]
    with stage.meter.busy():
        scores, labels, boxes = detector.detect(batch.frames[asked], [batch.inside[i] for i in asked], phrases)
    scores, labels, boxes = scores.cpu(), labels.cpu(), boxes.cpu()
    for row, i in enumerate(asked):
        found[i] = regions(
            scores[row],
            labels[row],
            boxes[row],
            phrases[row],
            batch.sizes[i],
            side=detector.side,
            inside=batch.inside[i],
            min_score=choice.min_score,
            nms=choice.nms,
            max_regions=choice.max_regions,
        )
    return found


def _labelled(row: Row, boxes: Sequence[Region], degenerate: int) -> Row:
    return {
        **{name: row[name] for name in ("index", "name", "caption")},
        "captions": len(row["captions"]),
        "phrases": len(row["phrases"]),
        "dropped": row["dropped"],
        "boxes": len(boxes),
        "degenerate": degenerate,
        "best": max((region.score for region in boxes), default=None),
    }


def _skipped(row: Row) -> Row:
    why = f"unreadable: {row['unreadable']}" if "unreadable" in row else "no caption"
    return {"index": row["index"], "name": row["name"], "skipped": why}
