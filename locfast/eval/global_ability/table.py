"""Scores as a table: models side by side, and behind each what it gained or lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from locfast.eval.global_ability.results import Difference, Score

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
            cells.append(_figure(one))
            if one.difference:
                cells.append(_difference(one.difference))
        table.add_row(*cells, end_section=setting != settings[-1])
    return table


def tables_by_group(found: Sequence[Score]) -> list[Table]:
    """Settings "GROUP, WHAT": a table a group, with a column for every WHAT, and models below one another."""
    from rich.table import Table

    tables = []
    for group in dict.fromkeys(one.setting.partition(", ")[0] for one in found):
        own = [one for one in found if one.setting.partition(", ")[0] == group]
        table = Table()
        table.add_column(group, overflow="fold")
        for what in dict.fromkeys(one.setting.partition(", ")[2] for one in own):
            table.add_column(what, justify="right")
        for model in dict.fromkeys(one.model for one in own):
            scores = [one for one in own if one.model == model]
            told = [one.difference for one in scores if one.difference]
            table.add_row(model, *map(_figure, scores), end_section=not told)
            if told:
                table.add_row(f"  difference from {told[0].against}", *map(_difference, told), end_section=True)
        tables.append(table)
    return tables


def _figure(one: Score) -> str:
    low, high = one.interval
    return f"{100 * one.accuracy:.1f}\n{100 * low:.1f} to {100 * high:.1f}"


def _difference(one: Difference) -> str:
    low, high = one.interval
    return f"{100 * one.accuracy:+.1f}\n{100 * low:+.1f} to {100 * high:+.1f}"
