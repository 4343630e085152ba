"""What the columns of a table are for: features, target, weights, groups, time; those that number rows; dates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bilevel.core.options import LARGEST, suggest
from bilevel.data.columns import SHOWN, columns_named, first_word, listed
from bilevel.data.looks import (
    FEW_VALUES,
    SIGNED,
    counts_rows,
    is_called_index,
    looks_like_days,
    lose_digits,
    numbers_rows,
    spelled_number,
    with_thousands,
)
from bilevel.data.table import COMMA, Array, Table, TableOptions, is_number

OTHER = "name another column as the `target`"
DAY = re.compile(r"(\d{4}([-/.])\d\d(?:\2\d\d(?:[T ]\d\d:\d\d(?::\d\d)?)?)?)((?<=:\d\d:\d\d)\.\d+)?(Z|[-+]\d\d:?\d\d)?")
"""A month, a day or a time from the year on; parts of a second and the zone stand apart."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of a table by what they are for, weights and groups of all its rows, and indices of those in use.

    The target is a name, or those of several; notes say what was done.
    """

    table: Table
    features: tuple[str, ...]
    target: str | tuple[str, ...]
    weights: Array | None
    groups: Array | None
    rows: Array
    notes: tuple[str, ...]

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of the other columns."""
        return tuple(name for name in self.table.columns if name not in {*self.features, *target_names(self.target)})


def sort_columns(table: Table, options: TableOptions) -> Columns:
    """Return what every column is for; dates and numbers that are not written as such are refused by their column."""
    names, index = list(table.columns), options.index
    roles = {"weights": options.weights, "groups": options.by_groups, "time": options.time}
    others = {*roles.values(), *options.drop}
    if not names:
        raise ValueError(f"{table.source!r} has no columns: it needs features and a target.")
    if (target := options.target) is None:
        free = [name for name in reversed(names) if name not in others]
        named = [name for name in free if index == "keep" or not is_called_index(table, name)]
        target = next(iter((*named, *free)), names[-1])
    targets = target_names(target)
    _check_named(table, targets, roles, options.drop)
    features = [name for name in names if name not in {*targets, *others}]
    notes = list(table.notes)
    if len(names) == 1:
        raise ValueError(
            f"{table.source!r} has the one column {names[0]!r}: it needs features and a target, with commas, "
            "semicolons, tabs or bars between them."
        )
    if numbering := [name for name in features if index == "leave_out" and numbers_rows(table, name)]:
        features = [name for name in features if name not in numbering]
        are, number = ("are", "they number") if len(numbering) > 1 else ("is", "it numbers")
        notes.append(f"{columns_named(numbering)} {are} left out, as {number} the rows")
    elif index == "leave_out" and (counting := [name for name in features if counts_rows(table, name)]):
        notes += [
            f"{columns_named([name])} counts the rows, and is kept as a feature: leave it out with `drop` if it is none"
            for name in counting
        ]
    if not features:
        besides = " and the index of its rows" if numbering else ""
        raise ValueError(f"{table.source!r} holds no features besides the target {listed(targets)}{besides}.")
    if commas := [name for name in (*features, *targets) if table.has_decimal_commas(name)]:
        notes.append(f"decimal commas are read in {listed(commas)}")
    notes += _check_features(table, features, options)
    aimed = np.arange(table.rows) if options.missing == "refuse" else _rows_with(table, targets)
    if len(aimed) < table.rows:
        left = table.rows - len(aimed)
        notes.append(f"{left} row{'s' if left > 1 else ''} without a target {'are' if left > 1 else 'is'} left out")
    return Columns(
        *(table, tuple(features), targets if len(targets) > 1 else targets[0]),
        weights=None if options.weights is None else _weights(table, options.weights),
        groups=None if options.by_groups is None else table.words(options.by_groups),
        rows=aimed if options.time is None else aimed[np.argsort(_order(table, options.time)[aimed], kind="stable")],
        notes=tuple(notes),
    )


def target_names(target: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of one target or of several."""
    return (target,) if isinstance(target, str) else tuple(target)


def _check_named(table: Table, targets: Sequence[str], roles: dict[str, str | None], drop: Sequence[str]) -> None:
    names = ", ".join(table.columns)
    if len(set(targets)) < len(targets) or not targets:
        raise ValueError(f"`target` must name one column, or several that differ, got {list(targets)}.")
    for role, name in (*(("target", each) for each in targets), *roles.items()):
        if name is not None and name not in table.columns:
            hint = suggest(name, table.columns)
            raise ValueError(f"{table.source!r} has no {role} column {name!r}: its columns are {names}{hint}")
    if unknown := [name for name in drop if name not in table.columns]:
        hint = suggest(str(unknown[0]), table.columns)
        raise ValueError(f"`drop` names {unknown[0]!r}, but the columns of {table.source!r} are {names}{hint}")


def _rows_with(table: Table, targets: Sequence[str]) -> Array:
    """Return the indices of the rows that have a value in every target; refuse a table where none has."""
    there = np.ones(table.rows, dtype=bool)
    for name in targets:
        column = table.columns[name]
        there &= column != "" if column.dtype.kind == "U" else ~np.isnan(column.astype(np.float64))
        if not there.any():
            what = "is empty" if name == targets[0] else f"has no value where {listed(targets[:1])} has one"
            raise ValueError(f"the target {name!r} of {table.source!r} {what}: name another column as the `target`.")
    return np.flatnonzero(there)


def _check_features(table: Table, features: list[str], options: TableOptions) -> list[str]:
    """Return in words what becomes of the features."""
    words, holes, equal, days = [], [], [], []
    for name in features:
        numbers = table.numbers(name)
        _refuse_dates(table, name, f"leave it out with `drop: [{name}]`")
        if numbers is None:
            _refuse_mixed(table, name)
            if options.strings == "refuse":
                row, word = first_word(table, name)
                raise ValueError(
                    f"the feature column {name!r} of {table.source!r} is not numeric: row {row} holds {word!r} (encode "
                    "it as numbers, take `strings: one_hot`, or leave it out with `drop`)."
                )
            words.append(name)
        elif lose_digits(table.columns[name], numbers):
            equal.append(name)
        elif looks_like_days(numbers):
            days.append(name)
        empty = np.isnan(numbers) if numbers is not None else table.words(name) == ""
        if empty.any():
            holes.append(f"{name!r} ({int(empty.sum())})")
            if options.missing == "refuse":
                raise ValueError(
                    f"X of {table.source!r} holds NaN or missing values, the first in row {int(empty.argmax()) + 1}, "
                    f"column {name!r}: drop or fill them first, or take `missing: fill`."
                )
    notes = []
    if equal:
        notes.append(
            f"different integers of {listed(equal)} become equal, as they need more than 53 bits: take differences, or "
            "leave the column out with `drop`"
        )
    if days:
        first = table.words(days[0])[0]
        notes.append(
            f"the numbers of {listed(days)} look like dates ({first}): leave them out with `drop`, or count days"
        )
    if words:
        count = sum(len(np.unique(table.words(name)[table.words(name) != ""])) for name in words)
        made = f"{count} feature{'s' if count > 1 else ''}"
        notes.append(f"the words of {listed(words)} become {made} of 0 and 1, one for each category")
    if holes:
        more = f" and of {len(holes) - SHOWN} more" if len(holes) > SHOWN else ""
        notes.append(
            f"missing values of {', '.join(holes[:SHOWN])}{more} are filled by the median or the most frequent word of "
            "the training rows"
        )
    return notes


def _refuse_dates(table: Table, name: str, otherwise: str) -> None:
    if found := table.date(name):
        remedy = f"turn it into numbers (a year, or days since a start), or {otherwise}"
        raise table.error(name, f"holds dates ({found[1]!r} in row {found[0]}): {remedy}")


def _refuse_signed(table: Table, name: str, cells: Array) -> None:
    """Refuse words that are all numbers with a currency, as percentages or with marks of thousands."""
    signed = [str(cell) for cell in cells if SIGNED.fullmatch(cell)]
    if signed and all(SIGNED.fullmatch(cell) or is_number(cell) for cell in cells):
        remedy = "write plain numbers, without %, $ and the like"
        raise table.error(name, f"holds numbers with signs, such as {signed[0]!r}: {remedy}")
    if marked := with_thousands(cells):
        decimals = ", or say `decimal: ','` if the comma stands before decimals" if COMMA.fullmatch(marked) else ""
        holds = f"holds numbers with marks of thousands, such as {marked!r}"
        raise table.error(name, f"{holds}: write them without{decimals}")


def _refuse_mixed(table: Table, name: str) -> None:
    """Refuse a column of many different numbers with a few words, and one of numbers with commas or signs."""
    cells = np.unique(table.words(name))
    cells = cells[cells != ""]
    words = [str(cell) for cell in cells if not is_number(cell)]
    _refuse_signed(table, name, cells)
    if len(cells) > FEW_VALUES and all(re.fullmatch(r"[-+]?\d[\d.]*(,\d+)+", word) for word in words):
        remedy = "say `decimal: ','` if they stand before decimals, else write numbers without them"
        raise table.error(name, f"holds numbers with commas, such as {words[0]!r}: {remedy}")
    if len(cells) - len(words) > max(FEW_VALUES, 9 * len(words)):
        row = int((table.words(name) == words[0]).argmax()) + 1
        remedy = f"correct it, leave the cell empty, or leave the column out with `drop: [{name}]`"
        raise table.error(name, f"holds numbers, but {words[0]!r} in row {row}: {remedy}")
    _refuse_spelled(table, name, cells, f"leave it out with `drop: [{name}]`")


def _refuse_spelled(table: Table, name: str, cells: Array, otherwise: str) -> None:
    if spelled := spelled_number(cells):
        remedy = f"write one plain number in each cell, or {otherwise}"
        raise table.error(name, f"holds numbers that are not written as such, as {spelled!r}: {remedy}")


def _weights(table: Table, name: str) -> Array:
    weights = table.numbers(name)
    if weights is None or not ((weights <= LARGEST) & (weights >= 0)).all() or not weights.any():
        row, cell = first_word(table, name)
        if weights is not None:
            row = int(((weights <= LARGEST) & (weights >= 0)).argmin()) + 1
            cell = str(table.words(name)[row - 1])
        raise ValueError(
            f"the weights in the column {name!r} of {table.source!r} must be numbers from 0 to {LARGEST:g}, not all 0: "
            f"row {row} {f'holds {cell!r}' if cell else 'is empty'}."
        )
    return weights


def _order(table: Table, name: str) -> Array:
    """Return what sorts the rows by time: numbers, or dates from the year on; refuse what has another order."""
    numbers = table.numbers(name)
    if numbers is not None and not np.isnan(numbers).any():
        return numbers
    days = [day for day in map(DAY.fullmatch, table.words(name)) if day] if numbers is None else []
    # The text of dates has the order of time only where all have one form and one zone.
    if len(days) == table.rows and len({(re.sub(r"\d", "0", day[1]), day[4]) for day in days}) == 1:
        return np.array([day[1] + (day[3] or "") for day in days])
    needs = "it needs numbers or dates such as 2024-01-31 in every row, all written alike"
    raise table.error(name, f"cannot order the rows: {needs}")


def target_values(table: Table, target: str | Sequence[str], rows: Array) -> Array:
    """Return a target column, at some rows, as integers, else as numbers, else as words; several as numbers."""
    if isinstance(target, str):
        return _one_target(table, target, rows)
    columns = [_one_target(table, name, rows) for name in target]
    for name, column in zip(target, columns, strict=True):
        if column.dtype.kind == "U":
            raise ValueError(
                f"the target {name!r} of {table.source!r} holds words, such as {str(column[0])!r}, but several targets "
                "are numbers: tune it alone."
            )
    return np.stack([column.astype(np.float64) for column in columns], axis=1)


def _one_target(table: Table, name: str, rows: Array) -> Array:
    column = table.columns[name][rows]
    if column.dtype.kind in "iu":
        return column
    table = replace(table, columns={name: column})
    if column.dtype.kind == "U" and len(column) and np.isin(np.char.lower(column), ("true", "false")).all():
        return column
    if (numbers := table.numbers(name)) is not None:
        try:
            return column.astype(np.int64) if column.dtype.kind == "U" else numbers
        except (ValueError, OverflowError):
            return numbers
    _refuse_dates(table, name, OTHER)
    _refuse_signed(table, name, cells := np.unique(column[column != ""]))
    _refuse_spelled(table, name, cells, OTHER)
    if (column == "").any():
        first = int(np.argmax(column == "")) + 1
        raise ValueError(
            f"the target of {table.source!r} misses labels ({(column == '').sum()}), the first in row {first}."
        )
    return column
