"""OUT/vesl.json: what decides over the contents of a folder. A folder has one setting, or its files would not agree."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from locfast.errors import UserError
from locfast.vesl import forgetting
from locfast.vesl.aside import Aside, take
from locfast.vesl.folder import Folder
from locfast.vesl.forgetting import Pending

NAME = "vesl.json"
LOCK = ".vesl.lock"
PARTS = ("data", "caption", "phrases", "detect")

Sections = dict[str, dict[str, Any]]
"""Part -> its settings by name, as JSON has them."""


def saved(out: Path) -> Sections:
    """The settings of a folder; {} where nothing was begun. UserError where they cannot be read."""
    return {part: kept for part, kept in _read(out).items() if part in PARTS}


def _read(out: Path) -> dict[str, Any]:
    file = out / NAME
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        _check_form(whole)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"--out {out}: {file} cannot be read ({error}). Give another --out, or make all steps anew: "
            "`python -m locfast.vesl run` with --data and --overwrite."
        ) from None
    return whole


def _check_form(whole: Any) -> None:
    """Raises ValueError where it is none of what `agree` writes."""
    if not isinstance(whole, dict) or not all(isinstance(whole.get(part, {}), dict) for part in PARTS):
        raise ValueError("no object of objects")
    data = whole.get("data", {"data": "", "shard_size": 1})
    if not isinstance(data.get("data"), str) or type(data.get("shard_size")) is not int or data["shard_size"] < 1:
        raise ValueError('"data" says no source or no size of shards')
    forgetting.check_form(whole.get(forgetting.NAME, []))


def check(out: Path, asked: Sections, fresh: Iterable[str] = ()) -> Sections:
    """Hold what is `asked` against what stands there, but for the `fresh` parts, which are to be forgotten.

    Gives what stands there without those. Raises UserError that names every difference, or that `out` is the folder of
    something else.
    """
    fresh = set(fresh)
    there = {} if set(PARTS) <= fresh else {part: kept for part, kept in saved(out).items() if part not in fresh}
    if not (out / NAME).exists() and out.is_dir() and any(not one.name.startswith(".") for one in out.iterdir()):
        raise UserError(f"--out {out}: there are files, but not of VESL (no {NAME}). Give another --out.")
    wrong = [
        f"{_flag(name)} was {_shown(there[part].get(name))}, now it is {_shown(values.get(name))}"
        for part, values in asked.items()
        if part in there
        for name in sorted({*values, *there[part]})
        if values.get(name) != there[part].get(name) and name != "names"
    ]
    if wrong:
        raise UserError(
            f"--out {out} was begun with other settings: {'; '.join(wrong)}. Type the command as before to go on, "
            "give another --out, or add --overwrite to make these steps anew."
        )
    if "data" in there and there["data"].get("names") != asked.get("data", there["data"]).get("names"):
        raise UserError(
            f"--out {out}: the source {there['data'].get('data')} has as many samples as at the start, but other ones, "
            "or in another order: files came, went or were renamed, and captions would go to other images. Put them "
            "back to go on, give another --out, or type `run` with --overwrite to make all steps anew."
        )
    return there


def agree(folder: Folder, asked: Sections, aside: Aside, fresh: Iterable[str] = ()) -> None:
    """`check`, and write what is new. Several ranks may do so at once.

    With the `fresh` parts that are to be made anew stands which ranks have yet to `forget` what they made of them. A
    rank that finds itself among those, with these settings, joins what another rank has begun.
    """
    fresh = tuple(fresh)
    with _locked(folder.out):
        # what cannot be read is replaced as a whole, with all that was made
        kept = {} if set(PARTS) <= set(fresh) and not _readable(folder.out) else _read(folder.out)
        pending: list[Pending] = kept.get(forgetting.NAME, [])
        stage = next((part for part in fresh if part != "data"), "")
        if stage and forgetting.waits(pending, stage, folder):
            fresh = () if all(kept.get(part) == values for part, values in asked.items()) else fresh
        there = check(folder.out, asked, fresh)
        if fresh:
            pending = forgetting.begun(pending, stage, folder.ranks)
        _write(folder.out, {**there, **asked}, pending, aside)


def forget(folder: Folder, aside: Aside) -> None:
    """Remove what `--overwrite` left of this rank's, now or in a run that was killed.

    Of another number of ranks the first one to come removes what is left of all, while the others wait for it.
    """
    with _locked(folder.out):
        pending: list[Pending] = _read(folder.out).get(forgetting.NAME, [])
        if not pending:
            return
        others = [one for one in pending if one["ranks"] != folder.ranks]
        for one in others:
            forgetting.forget(folder, one, one["left"])
        pending = [one for one in pending if one not in others]
        if others:
            _write(folder.out, saved(folder.out), pending, aside)
    ours = [one for one in pending if folder.rank in one["left"]]
    for one in ours:
        forgetting.forget(folder, one, [folder.rank])
    if ours:
        with _locked(folder.out):
            pending = forgetting.without(_read(folder.out).get(forgetting.NAME, []), folder)
            _write(folder.out, saved(folder.out), pending, aside)


def _readable(out: Path) -> bool:
    try:
        _read(out)
    except UserError:
        return False
    return True


def _write(out: Path, parts: Sections, pending: list[Pending], aside: Aside) -> None:
    whole: dict[str, Any] = {part: parts[part] for part in PARTS if part in parts}
    if pending:
        whole[forgetting.NAME] = pending
    text = json.dumps(whole, indent=1) + "\n"
    if not _same(out / NAME, text):
        aside.keep(out / NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _same(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / LOCK, "w", encoding="utf-8") as lock:
        while True:
            try:
                take(lock)
                break
            except OSError:  # another rank is here for a moment
                time.sleep(0.02)
        yield


def _flag(name: str) -> str:
    return f"the number of samples of --data ({name})" if name == "samples" else f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)
