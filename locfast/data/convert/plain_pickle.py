"""Pickles of plain data, read without running anything that they name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from locfast.errors import UserError


class _Plain(pickle.Unpickler):
    """Lists, dicts, tuples, strings, numbers, booleans and None have instructions of their own in a pickle; whatever
    else is in one is made by a function that the pickle names, and none is let in."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("it asks for an object that lies elsewhere")


def read_plain_pickle(file: Path, what: str) -> Any:
    """The plain data in a pickle; strings of Python 2 are taken for UTF-8.

    Raises UserError where the file is missing, is no pickle, or holds anything that is not plain: nothing of it is run.
    """
    try:
        with open(file, "rb") as raw:
            return _Plain(raw, encoding="utf-8", errors="replace").load()
    except FileNotFoundError:
        raise UserError(f"asked for the {what} in {file}, found no such file; check the path") from None
    except UserError as error:
        raise UserError(
            f"asked for the {what} in {file}, found a pickle that is not of plain data ({error}); such a file may run "
            "anything when it is read, and was refused: take it from the data set's own page"
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(
            f"asked for the {what} in {file}, found a file that is no whole pickle ({type(error).__name__}: {error}); "
            "download it again"
        ) from None
