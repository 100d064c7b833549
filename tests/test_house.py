"""Who may import whom: an arrow never runs back up, and what answers at once imports no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from locfast.config.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "train",
    "probe",
    "report",
    "export",
    "env",
    "inspect",
    "data",
    "data stats",
    "data preview",
    "data bench",
    "data index",
    "data convert",
    "evaluate",
    "evaluate knn",
    "evaluate linear",
    "evaluate zero-shot",
    "evaluate retrieval",
    "evaluate finetune",
    "evaluate regions",
    "analyze",
    "vesl",
    "vesl run",
    "vesl caption",
    "vesl phrases",
    "vesl detect",
    "vesl view",
)
ABOVE = (
    *("cli", "train", "probe", "evaluate", "analyze", "export", "env", "inspect", "report", "demo", "subject"),
    *("subcommands", "vesl"),
)
"""Commands and the demo: nothing below may import them (but `locfast.cli`, which holds what they share)."""

FORBIDDEN = {
    "config": ("kernels", "models", "methods", "data", "engine", "eval", "random", *ABOVE),
    "data": ("kernels", "models", "methods", "engine", "eval", *ABOVE),
    "machine_code": ("models", "methods", "data", "engine", "eval", *ABOVE),
    "models": ("methods", "data", "engine", "eval", *ABOVE),
    "methods": ("engine", "eval", *ABOVE),
    "engine": ("models", "eval", *(name for name in ABOVE if name != "cli")),
    "eval": ("methods", "engine", *ABOVE),
    "vesl": ("kernels", "models", "methods", "eval", *(name for name in ABOVE if name != "vesl")),
}
"""Room -> the parts of locfast that its files must not import. A room's `__main__` is a command, and so is every module
in its `commands/`: one that shows what a method makes of data needs both, and no room below is both's."""


def imports(file: Path, package: str) -> Iterator[str]:
    """Full names of every module that a file imports, inside functions too; `package` is where the file lies."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{name.name}" for name in node.names)


def of_room(folder: Path, package: str) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.rglob("*.py")):
        if file.name != "__main__.py" and "commands" not in file.relative_to(folder).parts:
            inside = ".".join([package, *file.relative_to(folder).parent.parts])
            yield from ((file.relative_to(ROOT), name) for name in imports(file, inside))


def whole_words(texts: Iterable[object]) -> set[str]:
    """Words of all that is text, in small letters: `permutation` is one, though it holds a method's name."""
    return {word for text in texts if isinstance(text, str) for word in re.split("[^a-z0-9]+", text.lower())}


def starts(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_room_imports_what_stands_above_it(room: str) -> None:
    found = list(of_room(ROOT / "locfast" / room, f"locfast.{room}"))
    assert found
    bad = [(str(f), n) for f, n in found if any(starts(n, f"locfast.{part}") for part in FORBIDDEN[room])]
    assert bad == []


def test_no_room_imports_its_own_commands() -> None:
    for room in FORBIDDEN:
        inside = list(of_room(ROOT / "locfast" / room, f"locfast.{room}"))
        assert [(str(f), n) for f, n in inside if starts(n, f"locfast.{room}.commands")] == []


def test_kernels_import_nothing_else_of_locfast() -> None:
    found = list(of_room(ROOT / "kernels", "locfast.kernels"))
    allowed = ("locfast.kernels", "torch", "triton")
    outside = {
        (str(file), name)
        for file, name in found
        if not any(starts(name, module) for module in allowed) and name.split(".")[0] not in sys.stdlib_module_names
    }
    assert found and outside == set()


def test_configs_need_nothing_but_the_standard_library() -> None:
    """YAML is read inside a function, by whoever has a file to read."""
    code = "import sys, locfast.config.registry, locfast.config.files, locfast.config.maskembed; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in _python("-c", code).stdout.split()}
    bare = {name.split(".")[0] for name in _python("-c", "import sys; print(*sys.modules)").stdout.split()}
    assert loaded - bare - set(sys.stdlib_module_names) == {"locfast"}


def test_engine_names_no_method() -> None:
    for file in sorted((ROOT / "locfast/engine").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        names = whole_words(getattr(node, "id", "") or getattr(node, "attr", "") for node in nodes)
        texts = whole_words(getattr(node, "value", "") for node in nodes)
        # to clip is also what optimisers do to gradients: OptimConfig has a field of that name
        assert not ((names - {"clip"}) | texts) & set(METHODS), file.name
    modules = {
        name for _, name in of_room(ROOT / "locfast/engine", "locfast.engine") if starts(name, "locfast.methods")
    }
    faces = ("locfast.methods.create_method", "locfast.methods.base", "locfast.methods.ranks")
    assert all(any(starts(name, face) for face in faces) for name in modules)


def test_importing_locfast_imports_no_torch() -> None:
    assert _python("-c", "import sys, locfast; sys.exit('torch' in sys.modules)").returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_no_torch(name: str) -> None:
    told = _python("-X", "importtime", "-m", *f"locfast.{name}".split(), "--help")
    assert told.returncode == 0 and "usage" in told.stdout
    modules = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines() if line.startswith("import time:")}
    assert "locfast" in modules and not modules & {"torch", "timm", "triton"}


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
