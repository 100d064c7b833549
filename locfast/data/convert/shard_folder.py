"""A folder of shards that are converted one by one, each with a receipt that tells a later run that it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locfast.data.convert.tally import Tally
from locfast.data.regions.shards import write_shard
from locfast.data.spec import Record
from locfast.errors import UserError

RECEIPT = ".converted.json"


@dataclass(frozen=True)
class Work:
    """One shard to convert."""

    shard: str
    out: Path
    options: dict[str, Any]

    @property
    def receipt(self) -> Path:
        return self.out.with_name(self.out.name + RECEIPT)


def shards_by_name(spec: str, out: Path) -> dict[str, str]:
    """The shards that `spec` names by their file names. Raises UserError where two share one, or lie in `out`."""
    from locfast.data.sources import find_shards
    from locfast.data.sources.web import is_url

    if is_url(spec):
        raise UserError(f"asked to convert {spec}, which lies behind a URL; copy its shards to a disk first")
    shards: dict[str, str] = {}
    for shard in find_shards(spec)[0]:
        path = Path(shard)
        if shards.setdefault(path.name, shard) != shard:
            raise UserError(
                f"asked to convert {spec}, found two shards of one name: {shards[path.name]} and {shard}; convert "
                "folder by folder, each to an --out of its own"
            )
        if path.absolute().parent.resolve() == out.resolve():
            raise UserError(f"asked for --out {out}, which holds the shards to convert; name another folder")
    return shards


def check_folder(out: Path, work: Sequence[Work], *, resume: bool, overwrite: bool) -> None:
    """Make the folder, unless something there forbids it. Raises UserError."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"asked for --out {out}, found no folder {out.parent}; make it first: mkdir -p {out.parent}")
    if out.exists() and not out.is_dir():
        raise UserError(f"asked for --out {out}, found a file; shards go into a folder, so name another")
    out.mkdir(exist_ok=True)
    targets = {one.out for one in work}
    if (there := [one for one in work if one.out.exists() or one.receipt.exists()]) and not (resume or overwrite):
        raise UserError(
            f"asked for --out {out}, found {len(there)} of its {len(work)} shards there, e.g. {there[0].out.name}; add "
            "--resume to convert the others, --overwrite to begin anew, or name another folder"
        )
    for shard in sorted(out.glob("*.tar")):
        receipt = _receipt(shard.with_name(shard.name + RECEIPT))
        told = receipt.get("options")
        if shard not in targets and told != work[0].options:
            raise UserError(
                f"asked for --out {out}, found the shard {shard.name} there, which is not of this conversion; take it "
                "away, or name another folder"
            )
        if resume and receipt and told != work[0].options:
            raise UserError(
                f"asked for --resume in {out}, found that {shard.name} was converted with {told}, not with "
                f"{work[0].options}; give the same options, or --overwrite to begin anew"
            )


def kept(work: Work) -> Tally | None:
    """What a shard's conversion counted, where one of this very shard was finished; None: it is to be done."""
    receipt = _receipt(work.receipt)
    try:
        if receipt["options"] != work.options or receipt["of"] != _stamp(Path(work.shard)):
            return None
        tally = Tally.of(receipt["counts"])
        if tally.images and work.out.stat().st_size != receipt["bytes"]:
            return None
    except (KeyError, TypeError, OSError):
        return None
    return tally


def write(work: Work, samples: Iterable[tuple[str, str, Record]], tally: Tally) -> None:
    """The shard, and its receipt after it. A shard of which nothing is left has a receipt alone."""
    stamp = _stamp(Path(work.shard))
    work.receipt.unlink(missing_ok=True)
    for aside in work.out.parent.glob(f".{work.out.name}-*.tmp"):  # of a run that was killed
        aside.unlink()
    size = write_shard(work.out, samples) and work.out.stat().st_size
    if not size:
        work.out.unlink()
    receipt = {"of": stamp, "options": work.options, "bytes": size, "counts": tally.counts()}
    aside = work.receipt.with_name(f".{work.receipt.name}.tmp")
    aside.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, work.receipt)


def _stamp(shard: Path) -> list[int]:
    """Size and time of a shard that is converted: another one has others."""
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"asked for the shard {shard}, which cannot be read ({error.strerror})") from None
    return [status.st_size, status.st_mtime_ns]


def _receipt(file: Path) -> dict[str, Any]:
    """What a receipt tells, nothing where there is none or it cannot be read."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
