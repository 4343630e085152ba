"""Rows for tuning by folds: features, targets, weights and groups, and perhaps a test part that tuning never sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bilevel.core.options import is_number, require_value
from bilevel.data.columns import Encoder
from bilevel.data.prepare import encode, filled, how_split, in_words, split, without_rare
from bilevel.data.sources import Array, Raw, read
from bilevel.data.table import TableOptions

LEAST = 3
"""Rows of a class with which every fold of a fold trains on it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a data set, "regression" or "classification", to tune on; without a test part X_test and y_test are None.

    X has the shape (rows, features), an array or sparse CSR; y are numbers, (rows,) or of several targets (rows,
    targets), or labels from 0 on, which stand for `classes`. The encoder says how columns became features, of data
    without named columns as numbers each; `ignored` are columns that are neither features nor `target`. Notes say what
    was done, and `zero_based`, of an svmlight file, whether the first column is number 0, not 1.
    """

    name: str
    task: str
    X: Any
    y: Array
    classes: tuple[Any, ...] | None
    X_test: Any
    y_test: Array | None
    weights: Array | None
    weights_test: Array | None
    groups: Array | None
    encoder: Encoder
    target: str | tuple[str, ...]
    ignored: tuple[str, ...]
    options: TableOptions
    notes: tuple[str, ...]
    zero_based: bool | None = None


def load_rows(
    name: Any,
    options: TableOptions,
    *,
    task: str | None = None,
    test: float = 0.0,
    seed: int = 0,
    rows: int | None = None,
    features: int | None = None,
    noise: float | None = None,
) -> Rows:
    """Return the rows of a data set to tune by folds, the share `test` of them set aside; other options are `load`'s.

    Fill values and categories are those of the rows that are returned; folds share them, but scale columns by their own
    training rows. A category that a fold does not train on has no influence there.

    Raises:
        ValueError: in one sentence, for data that cannot be used.
    """
    require_value("test", test, "a fraction from 0 to below 1", is_number(test) and 0 <= test < 1)
    raw = read(name, options, seed, rows, features, noise)
    joined = [part for part in ("train", "val") if part in raw.parts]
    if joined:
        # Folds do without the validation part that a file brings.
        X, y = (np.concatenate([raw.parts[part][index] for part in joined]) for index in (0, 1))
        raw = replace(raw, parts={"train": (X, y)} | {k: v for k, v in raw.parts.items() if k == "test"})
    raw, labels, task = encode(raw, task, doubt="note")
    if labels is not None and options.rare == "leave_out":
        raw, labels = without_rare(raw, labels, LEAST + (test > 0))
    groups, weights_test, how = None, None, "as in the file"
    if "" in raw.parts:
        how = how_split(raw, labels, options.ordered, seed)
        parts = split(raw, labels, seed, 0.0, test, options.ordered) if test else {"train": raw.parts[""]}
        groups, weights_test = _groups_and_weights(raw, parts)
        raw = replace(raw, parts=parts)
    raw = filled(raw)
    X, y = raw.parts["train"]
    X_test, y_test = raw.parts.get("test", (None, None))
    aside = f", {len(y_test)} set aside ({how})" if y_test is not None else ""
    size = f"{len(y)} rows to tune on{aside}, {X.shape[1]} features, {in_words(task, labels)}"
    alike = () if y.ndim == 1 else ("all targets count alike: each is divided by its deviation to be tuned",)
    return Rows(
        *(raw.source, task, X, y),
        classes=None if labels is None else tuple(labels.tolist()),
        X_test=X_test,
        y_test=y_test,
        weights=raw.weights,
        weights_test=weights_test,
        groups=groups,
        encoder=raw.encoder or Encoder.of_numbers(raw.feature_names),
        target=raw.target,
        ignored=() if raw.columns is None else raw.columns.ignored,
        options=options,
        notes=(size, *raw.notes, *alike),
        zero_based=raw.zero_based,
    )


def _groups_and_weights(raw: Raw, parts: dict[str, tuple[Array, Array]]) -> tuple[Array | None, Array | None]:
    """Return the groups of the rows to tune on, and the weights of those set aside, where a table has such columns."""
    groups = None if raw.columns is None else raw.columns.groups
    weights = None if raw.columns is None or "test" not in parts else raw.columns.weights
    if weights is not None:
        weights = weights[parts["test"][0][:, 0]]
        if not weights.any():
            raise ValueError(f"the weights of the test part of {raw.source!r} are all 0: take a larger `test`.")
    return None if groups is None else groups[parts["train"][0][:, 0]], weights
