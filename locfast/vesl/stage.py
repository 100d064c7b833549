"""What the three stages share: which chunks they do, and what they say of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from locfast.errors import UserError
from locfast.vesl.aside import Aside, read_lines
from locfast.vesl.feed import Fed, Job
from locfast.vesl.folder import STAGES, Folder
from locfast.vesl.meter import Meter, rates, told

log = logging.getLogger("locfast")
LOST = 8
"""So many samples that a chunk asks for, of which no file could be read, stop the run: most often a disk is gone."""

Row = dict[str, Any]


@dataclass
class Stage:
    """A stage over the chunks of this rank. A chunk is done when the file of its result is there."""

    name: str
    folder: Folder
    aside: Aside
    meter: Meter
    made: int = 0
    """Chunks."""

    @property
    def before(self) -> str:
        return STAGES[STAGES.index(self.name) - 1]

    def pending(self) -> Iterator[int]:
        """Missing chunks whose input is there."""
        for chunk in self.folder.missing(self.name):
            if self.name == STAGES[0] or self.folder.result(self.before, chunk).exists():
                yield chunk

    def input(self, chunk: int) -> list[Row]:
        """What the stage before says of each sample. UserError where that is not what it wrote."""
        path = self.folder.result(self.before, chunk)
        try:
            rows = read_lines(path)
        except ValueError:
            rows = []
        if [row.get("index") for row in rows] != list(self.folder.indices(chunk)):
            raise UserError(
                f"{path} does not hold one line for each sample of its chunk ({len(self.folder.indices(chunk))}). "
                f"Remove it and what was made of it, and `python -m locfast.vesl {self.before}` makes it anew."
            )
        return rows

    def chunks(self, fed: Iterable[Fed]) -> Iterator[tuple[int, Iterator[Fed]]]:
        """The batches of each chunk; waiting for them is on the meter."""
        return itertools.groupby(self.meter.waited_for(iter(fed)), key=lambda one: one.job.chunk)

    def check_lost(self, chunk: int, number: int, asked: Sequence[Row]) -> None:
        """UserError where the files of all samples of a chunk that were `asked` for, here their rows, were lost."""
        if number >= LOST and number == len(asked):
            last = asked[-1]
            raise UserError(
                f"none of the {number} files of chunk {chunk + 1} could be read; the last was {last['name']} "
                f"({last['unreadable']}). Is the disk still there? Nothing was written for this chunk: type the same "
                "command to go on."
            )

    def check_same(self, row: Row, name: str) -> None:
        """UserError where a sample has another name than when it was captioned: its caption is another image's."""
        if row["name"] != name:
            raise UserError(
                f"sample {row['index']} of the source was {row['name']} when it was captioned, and is {name} now: "
                "files came or went. Put them back, or make the captions anew: `python -m locfast.vesl caption` with "
                "--overwrite."
            )

    def note(self, chunk: int, before: dict[str, float], said: str) -> dict[str, float]:
        """Keep and say how fast a chunk was, just before it is kept itself; the meter's reading."""
        self.made += 1
        now = self.meter.read()
        taken = rates(now, before)
        self.aside.keep_lines(self.folder.times(self.name, chunk), [{"stage": self.name, "chunk": chunk, **taken}])
        rate = told(taken, str(self.meter.device or "cpu"))
        log.info("%s: chunk %d of %d: %s; %s", self.name, chunk + 1, self.folder.chunks, said, rate)
        return now

    def end(self) -> None:
        """Say how fast it was in all. UserError where chunks are left, because the stage before has not made theirs."""
        reading = rates(self.meter.read())
        if self.made:
            rate = told(reading, str(self.meter.device or "cpu"))
            log.info("%s: %d images in %.1f s: %s", self.name, reading["images"], reading["seconds"], rate)
        else:
            log.info("%s: no chunk was left to do", self.name)
        left = list(self.folder.missing(self.name))
        if left:
            raise UserError(
                f"{self.name}: {len(left)} of {self.folder.chunks} chunks wait for the step before, first of all chunk "
                f"{left[0] + 1}. Type `python -m locfast.vesl {self.before}` for {self.folder.out}, then this again."
            )


def check_captioned(folder: Folder) -> None:
    """UserError where no image of the whole source has a caption, so that there is nothing to label.

    A rank looks at its own chunks first, up to the first caption, and at the others' only where it has none. It says
    nothing while chunks are missing: the last rank to end finds all of them there.
    """
    ours, bad = folder.ours(), 0
    for chunk in (*ours, *(one for one in range(folder.chunks) if one not in ours)):
        try:
            rows = read_lines(folder.result("caption", chunk))
        except (OSError, ValueError):  # what is damaged, the next step tells
            return
        if any(row.get("captions") for row in rows):
            return
        bad += sum("unreadable" in row for row in rows)
    raise UserError(
        f"caption: none of the {folder.samples} images has a caption ({folder.samples - bad} without a text, {bad} "
        "unreadable), so there is nothing to label. Take a --captioner NAME, or a --data with texts (NAME.txt beside "
        "NAME.jpg, or pairs), and add --overwrite."
    )


def jobs(chunks: Iterable[tuple[int, list[int]]], batch_size: int) -> Iterator[Job]:
    """The samples of each chunk in batches that end with it, so that they depend on nothing that was done before.

    A chunk without samples is one empty job.
    """
    for chunk, indices in chunks:
        starts = range(0, max(1, len(indices)), batch_size)
        for start in starts:
            yield Job(chunk, indices[start : start + batch_size])
