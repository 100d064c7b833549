"""The folder of a VESL run: its chunks, who does which, and which are done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STAGES = ("caption", "phrases", "detect")
RESULT = {"caption": ("captions", ".jsonl"), "phrases": ("phrases", ".jsonl"), "detect": ("shards", ".tar")}
"""Stage -> folder and ending of the file whose being there means that a chunk is done."""
BESIDE = {"detect": ("log", ".jsonl")}
"""What a stage writes just before that."""
TIMES = "times"


@dataclass(frozen=True)
class Folder:
    """`samples` consecutive samples of a source in chunks of `shard_size`; chunk k is rank k mod `ranks`'s."""

    out: Path
    samples: int
    shard_size: int
    rank: int = 0
    ranks: int = 1

    @property
    def chunks(self) -> int:
        return -(-self.samples // self.shard_size)

    def indices(self, chunk: int) -> range:
        first = chunk * self.shard_size
        return range(first, min(first + self.shard_size, self.samples))

    def result(self, stage: str, chunk: int) -> Path:
        return self._path(*RESULT[stage], chunk)

    def beside(self, stage: str, chunk: int) -> Path:
        return self._path(*BESIDE[stage], chunk)

    def times(self, stage: str, chunk: int) -> Path:
        return self._path(TIMES, f".{stage}.json", chunk)

    def ours(self) -> range:
        """Chunks of this rank."""
        return range(self.rank, self.chunks, self.ranks)

    def missing(self, stage: str) -> Iterator[int]:
        """Chunks of this rank that are not done, looked up one by one."""
        return (chunk for chunk in self.ours() if not self.result(stage, chunk).exists())

    def forget(self, stage: str) -> None:
        """Remove what this rank made in `stage` and in all stages after it, the last one first."""
        for one in reversed(STAGES[STAGES.index(stage) :]):
            for folder, ending in (RESULT[one], *([BESIDE[one]] if one in BESIDE else []), (TIMES, f".{one}.json")):
                for path in sorted((self.out / folder).glob(f"*{ending}")):
                    number = path.name.split(".")[0]
                    if number.isdigit() and int(number) % self.ranks == self.rank:
                        path.unlink(missing_ok=True)
                        # an index that was made of the shard that is no more
                        path.with_name(path.name + ".index.npz").unlink(missing_ok=True)

    def _path(self, folder: str, ending: str, chunk: int) -> Path:
        return self.out / folder / f"{chunk:06d}{ending}"
