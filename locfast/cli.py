"""What every command shares: a user's mistake becomes one message, and flags lie over files and recipes."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from locfast.config.base import TrainConfig
from locfast.demo import demo_recipe
from locfast.errors import UserError, suggest
from locfast.interrupt import watched

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file too large"}
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
STOPPED = "Stopped by Ctrl-C."
RESUME = "go on from the newest checkpoint with --resume"


def command(main: Callable[[], object], *, every_rank: bool = False, go_on: str = RESUME) -> Callable[[], None]:
    """Run `main` as a command: UserError and a full disk end with one message on stderr and exit code 2.

    The first of several ranks tells it, since they end together; `every_rank` where each works for itself. go_on: what
    to do once the disk has room again.
    Ctrl-C ends it with one line and exit code 130, within seconds and at whatever moment it comes.
    """

    @functools.wraps(main)
    def run() -> None:
        told: list[str] = []
        with watched(lambda: None if told else _tell(STOPPED), 130):
            attempt(told)

    def attempt(told: list[str]) -> None:
        try:
            main()
        except UserError as error:
            _fail(str(error), 2, every_rank)
        except KeyboardInterrupt:
            told.append(STOPPED)
            _fail(STOPPED, 130)
        except BrokenPipeError:
            # the reader of a pipe (head, less) went away: nothing more to say, and no second error at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except Exception as error:
            reason = no_room(error, go_on) or no_access(error)
            if reason is None:
                raise
            _fail(reason, 2, every_rank)

    return run


def no_room(error: BaseException, go_on: str = RESUME) -> str | None:
    """A message when `error` (of Python or of safetensors) says that the disk takes no more, else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number not in NO_ROOM:
        return None
    path = getattr(error, "filename", None) or next(iter(getattr(error, "__notes__", [])), "")
    where = f" while writing {path}" if path else ""
    return (
        f"Cannot go on: {NO_ROOM[number]}{where} ({os.strerror(number)}). What was complete before is untouched. "
        f"Free some space, then {go_on}."
    )


def no_access(error: BaseException) -> str | None:
    """A message when `error` says that a file or folder must not be written or read, else None."""
    if not isinstance(error, OSError) or error.errno not in NO_ACCESS or not error.filename:
        return None
    return f"{error.filename} is out of reach ({error.strerror}): give another path, or see to its permissions."


def peek(argv: Sequence[str], flag: str) -> str | None:
    """The value of `--flag` on a command line before it is parsed (the last one counts), or None."""
    value = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
    return value


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The config of a training run: dataclass defaults < recipe < config.yaml of a resumed run < --config < flags."""
    import tyro

    from locfast.config.files import from_dict, merge
    from locfast.config.registry import run_config_class

    layers = _files(argv)
    merged = merge(*[values for _, values in layers])
    method = peek(argv, "--method") or str(merged.get("method", TrainConfig.method))
    kind = run_config_class(method)
    for where, values in layers:  # each alone first, so that a mistake is told with the file it stands in
        from_dict(kind, {**values, "method": method}, where)
    if peek(argv, "--epochs") is not None:
        merged.pop("steps", None)  # steps of a file would win over the flag
    default = from_dict(kind, {**merged, "method": method}, " + ".join(where for where, _ in layers))
    return tyro.cli(
        kind,
        default=default,
        args=list(argv),
        prog="python -m locfast.train",
        description="Train a ViT so that every patch embedding knows what is at its place.",
    )


def _files(argv: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """(origin, values) of every file under the flags, the lowest first."""
    from locfast.config.files import default_out, read_recipe, read_yaml, recipe_names

    layers: list[tuple[str, dict[str, Any]]] = []
    config, recipe = peek(argv, "--config"), peek(argv, "--recipe")
    if "--resume" in argv:
        named = [peek(argv, f"--{name}") or getattr(TrainConfig, name) for name in ("method", "model")]
        saved = Path(peek(argv, "--out") or default_out(*named)) / "config.yaml"
        if saved.is_file():
            layers.append((str(saved), read_yaml(saved)))
        elif peek(argv, "--out") and not any(peek(argv, f"--{name}") for name in ("model", "data", "recipe", "config")):
            near = suggest(saved.parent.name, _siblings(saved.parent))
            raise UserError(
                f"--resume --out {saved.parent}: there is no run{near or '.'} Give the folder of a run; to start one "
                "there, say what to train: --model and --data, --recipe or --config."
            )
    if config:
        layers.append((config, read_yaml(Path(config))))
    recipe = recipe or next((values["recipe"] for _, values in reversed(layers) if values.get("recipe")), None)
    if recipe is None and all(_is_demo(argv, layers, name) for name in ("model", "data")):
        method = peek(argv, "--method") or next((v["method"] for _, v in reversed(layers) if "method" in v), None)
        name = demo_recipe(method or TrainConfig.method)
        recipe = name if name in recipe_names() else None
    if recipe:
        layers.insert(0, (f"recipe {recipe}", read_recipe(recipe)))
    return layers


def _siblings(path: Path) -> list[str]:
    try:
        return os.listdir(path.parent)
    except OSError:
        return []


def _is_demo(argv: Sequence[str], layers: list[tuple[str, dict[str, Any]]], name: str) -> bool:
    given = peek(argv, f"--{name}")
    if given is None:
        given = next((values[name] for _, values in reversed(layers) if name in values), "demo")
    return given == "demo"


def _fail(message: str, code: int, every_rank: bool = False) -> None:
    _tell(message, every_rank)
    sys.exit(code)


def _tell(message: str, every_rank: bool = False) -> None:
    # the other ranks of a torchrun end with the same error: one of them tells it
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(f"\nlocfast: {message}" if sys.stderr.isatty() else f"locfast: {message}", file=sys.stderr, flush=True)
