"""Files that cannot be read: from when on there are too many of them, and what is told then."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from locfast.data.loader import Loader
from locfast.engine.distributed import World
from locfast.errors import UserError

SIGMAS = 3.0
"""n unreadable files come from a share of them that gives n +- sqrt(n) (they are counted like rare events), so that
n - 3 sqrt(n) is what hardly any luck of the draw explains: less than one time in 700."""
SHOWN = 20


def too_many(files: int, size: int, samples: int, limit: float) -> bool:
    """Whether `files` unreadable ones exceed the share `limit` of a source of `size`, after `samples` were handed out.

    They do when they alone are more than that share of the source. In a large source that would take long to show, so
    they also do when their share of what was read so far is above the limit beyond chance. Each of them was read in
    vain before a sample that was handed out.
    """
    certain = files - SIGMAS * math.sqrt(files)
    return files > limit * size or certain > limit * (samples + files)


def enough(share: float) -> float:
    """A round --max-bad that leaves room above `share`: one and a half times as much, up to 1, 2 or 5 times 10^k."""
    wanted = 1.5 * share
    power = 10.0 ** math.floor(math.log10(wanted))
    return min(1.0, float(f"{next(step for step in (1, 2, 5, 10) if step * power >= wanted) * power:.0e}"))


@dataclass
class Unreadable:
    """What all ranks together could not read, held against --max-bad."""

    loader: Loader
    size: int
    """Files of the source."""
    limit: float
    names: dict[str, str] = field(default_factory=dict)
    """Every unreadable file and why, of all ranks, as of the last `exceeded`."""
    samples: int = 0

    def exceeded(self, world: World) -> bool:
        """Whether too many files are unreadable. All ranks call it at the same steps, and get the same answer."""
        replaced = self.loader.replaced
        if world.size == 1:
            self.names, self.samples = replaced.names, replaced.samples
        else:
            new = {name: why for name, why in replaced.names.items() if name not in self.names}
            every = world.gather((new, replaced.samples))
            for names, _ in every:
                self.names.update(names)
            self.samples = sum(samples for _, samples in every)
        return too_many(len(self.names), self.size, self.samples, self.limit)

    def error(self, world: World, folder: Path) -> UserError:
        """What to tell the user; writes the whole list to unreadable.txt in the run folder. All ranks call it."""
        path, count = folder / "unreadable.txt", len(self.names)
        text = "".join(f"{name}\t{why}\n" for name, why in self.names.items())
        world.on_first(lambda: path.write_text(text, encoding="utf-8"))
        read = min(self.size, self.samples + count)
        shown = "".join(f"\n  {name}: {why}" for name, why in list(self.names.items())[:SHOWN])
        more = f"\n  and {count - SHOWN} more" if count > SHOWN else ""
        return UserError(
            f"--max-bad {self.limit:g}: {count} of the {self.size} files of --data cannot be read, found in "
            f"{self.samples} samples; that is too many to go on without a word:{shown}{more}\n"
            f"The whole list is in {path}. Nothing that was trained is lost: `--resume --out {folder} --max-bad "
            f"{enough(count / read):g}` goes on without them. Or remove the files, which makes it another data set, "
            "and start again."
        )
