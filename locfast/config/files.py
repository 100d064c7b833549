"""Configs as YAML: strict reading (every key known, every type right), layers, and the file of a run folder."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from locfast.errors import UserError, suggest

RECIPES = Path(__file__).parent.parent / "recipes"
NOT_SAVED = ("out", "config", "resume", "overwrite")
"""Fields that say how a run was called rather than what it computes: not part of config.yaml."""

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty mapping)."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` lines, but it holds a {type(content).__name__}.")
    return content


def default_out(method: str, model: str) -> Path:
    """Where a run goes without --out: runs/METHOD-MODEL, the model without its hub, folder and checkpoint file."""
    name = model.split("@")[0].removeprefix("hf-hub:").rstrip("/").split("/")[-1]
    return Path("runs") / f"{method}-{name or 'model'}"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The fields that recipe `name` sets."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = recipe_names()
        raise UserError(
            f"--recipe {name}: no such recipe{suggest(name, known) or '.'} `--recipe help` lists the {len(known)} that "
            "exist; a file of your own goes to --config."
        )
    return read_yaml(path)


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Layers laid over each other, the last one on top; nested mappings are merged key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def from_dict(kind: type[T], values: dict[str, Any], where: str, prefix: str = "") -> T:
    """A config dataclass from plain values; `where` names their origin in errors."""
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key '{prefix}{key}'{suggest(str(key), known)}")
    return kind(**{key: _convert(hints[key], value, where, prefix + key) for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values: dicts, lists, strings, numbers, booleans, None."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if _is_tuple(value) else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def write_config(config: Any, path: Path, header: str) -> None:
    """Write the resolved config of a run, so that `--config` reads it back; `header` becomes its first line."""
    import yaml

    values = {key: value for key, value in to_dict(config).items() if key not in NOT_SAVED}
    path.write_text(f"# {header}\n" + yaml.safe_dump(values, sort_keys=False, width=110), encoding="utf-8")


def _is_tuple(value: object) -> bool:
    return isinstance(value, tuple)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the type `hint`, or UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, key)
    if origin is Literal:
        if value in arguments:
            return value
        near = suggest(str(value), [str(a) for a in arguments])
        raise UserError(f"{where}: {key} is one of {', '.join(map(str, arguments))}; got {value!r}{near}")
    if origin is tuple:
        return _tuple(arguments, value, where, key)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} is a section with keys of its own; got {value!r}")
        return from_dict(hint, value, where, prefix=f"{key}.")  # type: ignore[arg-type]
    if hint is float:
        value = _float(value)
    # bool is an int to Python, but `epochs: true` is a mistake
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: {key} must be {_WORDS.get(hint, hint.__name__)}, got {value!r}")
    return value


def _tuple(arguments: tuple[Any, ...], value: Any, where: str, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: {key} must be a list, got {value!r}")
    repeated = len(arguments) == 2 and arguments[1] is Ellipsis
    if not repeated and len(value) != len(arguments):
        raise UserError(f"{where}: {key} must have {len(arguments)} values, got {len(value)}")
    kinds = [arguments[0]] * len(value) if repeated else arguments
    return tuple(_convert(kind, item, where, key) for kind, item in zip(kinds, value, strict=True))


def _float(value: Any) -> Any:
    """Integers, and `1e-6`, which YAML 1.1 reads as text, are numbers too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


_WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
