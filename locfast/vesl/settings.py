"""OUT/vesl.json: what decides over the contents of a folder. A folder has one setting, or its files would not agree."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from locfast.errors import UserError
from locfast.vesl.aside import Aside, take

NAME = "vesl.json"
LOCK = ".vesl.lock"
PARTS = ("data", "caption", "phrases", "detect")

Sections = dict[str, dict[str, Any]]
"""Part -> its settings by name, as JSON has them."""


def saved(out: Path) -> Sections:
    """The settings of a folder; {} where nothing was begun. UserError where they cannot be read."""
    file = out / NAME
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: {file} cannot be read ({error}). Give another --out, or --overwrite.") from None


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
        if values.get(name) != there[part].get(name)
    ]
    if wrong:
        raise UserError(
            f"--out {out} was begun with other settings: {'; '.join(wrong)}. Type the command as before to go on, "
            "give another --out, or add --overwrite to make these steps anew."
        )
    return there


def agree(out: Path, asked: Sections, aside: Aside, fresh: Iterable[str] = ()) -> None:
    """`check`, and write what is new. Several ranks may do so at once."""
    with open(out / LOCK, "w", encoding="utf-8") as lock:
        _wait(lock)
        there = check(out, asked, fresh)
        both = {part: {**there, **asked}[part] for part in PARTS if part in there or part in asked}
        if both != there or fresh:
            text = json.dumps(both, indent=1) + "\n"
            aside.keep(out / NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _wait(lock: IO[str]) -> None:
    while True:
        try:
            take(lock)
            return
        except OSError:  # another rank is here for a moment
            time.sleep(0.02)


def _flag(name: str) -> str:
    return f"the number of samples of --data ({name})" if name == "samples" else f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)
