"""Scores as a table: models side by side, and behind each what it gained or lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from locfast.eval.global_ability.results import Score

if TYPE_CHECKING:
    from rich.table import Table


def score_table(found: Sequence[Score]) -> Table:
    """A row a setting; in percent, each figure above its 95 % interval."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    models = list(dict.fromkeys(one.model for one in found))
    of = {(one.setting, one.model): one for one in found}
    settings = list(dict.fromkeys(one.setting for one in found))
    for model in models:
        table.add_column(model, justify="right", overflow="fold")
        if other := of[settings[0], model].difference:
            table.add_column(f"difference from {other.against}", justify="right", overflow="fold")
    for setting in settings:
        cells = [setting]
        for model in models:
            one = of[setting, model]
            low, high = one.interval
            cells.append(f"{100 * one.accuracy:.1f}\n{100 * low:.1f} to {100 * high:.1f}")
            if one.difference:
                low, high = one.difference.interval
                cells.append(f"{100 * one.difference.accuracy:+.1f}\n{100 * low:+.1f} to {100 * high:+.1f}")
        table.add_row(*cells, end_section=setting != settings[-1])
    return table
