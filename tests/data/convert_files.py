"""Running the converters in tests, and reading what they wrote as a source would."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from locfast.data.commands import convert
from locfast.data.regions.json_form import parse_regions
from locfast.errors import UserError


def run(*arguments: object) -> int:
    """The command with these arguments; its exit code."""
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(one) for one in arguments]))


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    return str(error.value)


def written(out: Path) -> list[tuple[str, str | list[str] | None, list[tuple[tuple[float, ...], str]]]]:
    """Image, text and (box, text) of every region, a line each: the regions through locfast's own reader."""
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert all(set(line) <= {"image", "text", "regions"} for line in lines)
    return [
        (line["image"], line.get("text"), [(one.box, one.text) for one in parse_regions(line["regions"])])
        for line in lines
    ]


def put(root: Path, files: dict[str, object]) -> Path:
    """Write bytes and texts as they are, anything else as JSON."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = data if isinstance(data, bytes | str) else json.dumps(data)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return root
