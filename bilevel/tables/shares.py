"""What rows of a class, and features of a group, share: weights, and a penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bilevel.core.options import suggest
from bilevel.data.columns import listed
from bilevel.data.roles import target_names
from bilevel.data.rows import Rows


def weighted_by_class(rows: Rows, given: Mapping[Any, float] | str | None) -> Rows:
    """Return rows whose weights are multiplied by those of their classes; refuse a regression, and unknown labels."""
    if given is None:
        return rows
    if rows.classes is None:
        raise ValueError(
            f"`class_weight` is for classes, and {listed(target_names(rows.target))} holds numbers: leave it out."
        )
    weights = np.ones(len(rows.y)) if rows.weights is None else rows.weights
    sums = np.bincount(rows.y, weights, minlength=len(rows.classes))
    if isinstance(given, str):
        of_class = sums.sum() / (len(sums) * sums)
    else:
        known = {str(plain(label)): index for index, label in enumerate(rows.classes)}
        of_class = np.ones(len(sums))
        for label, weight in given.items():
            if str(label) not in known:
                classes = f"{', '.join(map(repr, known))}{suggest(str(label), known)}"
                raise ValueError(f"`class_weight` names {label!r}, but the classes are {classes}")
            of_class[known[str(label)]] = weight
    tested = rows.weights_test
    if rows.y_test is not None:
        tested = (np.ones(len(rows.y_test)) if tested is None else tested) * of_class[rows.y_test]
    return replace(rows, weights=weights * of_class[rows.y], weights_test=tested)


def groups_of(groups: Mapping[str, Sequence[str]], columns: Sequence[str]) -> list[str]:
    """Return the group of every feature, given its column; refuse columns in no group, in several, and unknown."""
    of_column: dict[str, str] = {}
    for group, members in groups.items():
        for column in members:
            if column in of_column or column not in columns:
                why = f"is in {of_column[column]!r}, too" if column in of_column else "is none that becomes a feature"
                raise ValueError(f"`groups.{group}` names the column {column!r}, which {why}.")
            of_column[column] = group
    if missing := [column for column in dict.fromkeys(columns) if column not in of_column]:
        raise ValueError(f"`groups` must name every column once, but no group has {listed(missing)}.")
    return [of_column[column] for column in columns]


def plain(label: Any) -> Any:
    """Return a label as a file holds it: whole numbers without a decimal point."""
    return int(label) if isinstance(label, float) and label.is_integer() else label
