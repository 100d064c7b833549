"""File lists: a text file with one image path a line."""

from __future__ import annotations

from pathlib import Path

from locfast.data.sources.names import Names
from locfast.data.spec import Record
from locfast.errors import UserError

LOOKED_AT = 16
"""Entries that are looked up when a list is opened; all of a long list on a network disk would take minutes."""


class FileList:
    """The images of a .txt file: one path a line, relative to the list's folder; empty lines are left out."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, encoding="utf-8") as lines:
                self.names = Names(name for line in lines if (name := line.strip()))
        except UnicodeDecodeError:
            raise UserError(
                f"asked for the file list {path}, found a file that is not UTF-8 text; a list has one image path a line"
            ) from None
        except OSError as error:
            raise UserError(
                f"asked for the file list {path}, which cannot be read ({error.strerror}); check its permissions"
            ) from None
        if not len(self.names):
            raise UserError(f"asked for the file list {path}, found no line in it; write one image path a line")
        step = -(-len(self.names) // LOOKED_AT)
        some = range(0, len(self.names), step)
        if not any(Path(self.name(i)).is_file() for i in some):
            raise UserError(
                f"asked for the file list {path}, found {len(self.names)} paths in it, but none of the {len(some)} "
                f"looked at exists, e.g. {self.name(0)}; paths in a list are relative to its own folder"
            )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.path.parent / self.names[index])

    def read(self, index: int) -> Record:
        name = self.name(index)
        return Record(Path(name).read_bytes(), name)

    def __repr__(self) -> str:
        return f"{len(self)} images listed in {self.path}"
