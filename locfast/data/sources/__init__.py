"""Sources: where encoded samples come from. `open_source` chooses by what it is told; nothing here decodes."""

from __future__ import annotations

from locfast.data.spec import Source


def open_source(spec: str, *, seed: int = 0) -> Source:
    """The source that `spec` names.

    An image folder; a folder with `images/` and `annotations/` (label maps); a .txt file list; a .tar shard, a folder
    of them, or a pattern (`shard-{000..012}.tar`, `*.tar`); `demo` or `demo:COUNT` for scenes drawn from `seed`.
    Raises UserError for every mistake.
    """
    raise NotImplementedError


def hold_out(
    source: Source, *, share: float | None = None, count: int | None = None, seed: int = 0
) -> tuple[Source, Source]:
    """Split off `count` samples (or a `share`, at least one) by a fixed pseudo-random permutation: (train, held out).

    Raises UserError when one side would be empty.
    """
    raise NotImplementedError
