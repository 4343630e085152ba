"""Arrays, lists, tensors and tables (of pandas and alike) as tensors, with one sentence for what is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.data.sources import INDEX, Array

HALVES = (torch.float16, torch.bfloat16)


def features(name: str, X: Any) -> Tensor:
    """Return inputs as a floating tensor of shape (rows, features), from a tensor, an array, nested lists or a table.

    Tensors and arrays of 32 or 64 bits keep their dtype; half precision becomes float32, in which linear algebra
    exists, and all other numbers become float64.

    Raises:
        ValueError: in one sentence, for sparse inputs, for what is no number (with its column) and for an index column.
    """
    refuse_sparse(name, X)
    columns = _column_names(X)
    for column in columns:
        if isinstance(column, str) and INDEX.fullmatch(column):
            raise ValueError(
                f"{name} has the column {column!r}, the index that pandas wrote into a file: read the file with "
                "index_col=0, or drop the column."
            )
    if isinstance(X, Tensor):
        result = X.detach()
    else:
        array = _array(name, X)
        if array.ndim == 2 and array.dtype.kind not in "fiub":
            array = np.stack([_numbers(name, array[:, i], _called(columns, i)) for i in range(array.shape[1])], axis=1)
        result = torch.as_tensor(_plain(name, array))
    if result.is_complex():
        raise ValueError(f"{name} must hold real numbers, got {result.dtype}.")
    if not result.is_floating_point():
        return result.to(torch.float64)
    return result.float() if result.dtype in HALVES else result


def targets(name: str, y: Any) -> Tensor | Array:
    """Return targets as a tensor of shape (rows,), or labels that are strings as an array of them.

    Raises:
        ValueError: in one sentence, for sparse targets, for missing ones, and for what is neither number nor string.
    """
    refuse_sparse(name, y)
    if isinstance(y, Tensor):
        result: Tensor | Array = y.detach()
    else:
        array = _array(name, y)
        if array.dtype.kind == "O":
            array = _labels(name, array)
        result = array.astype(str) if array.dtype.kind in "US" else torch.as_tensor(_plain(name, array))
    if result.ndim == 2 and result.shape[1] == 1:
        result = result[:, 0]
    if isinstance(result, Tensor):
        if result.is_complex():
            raise ValueError(f"{name} must hold real numbers, got {result.dtype}.")
        return result.long() if result.dtype == torch.bool else result.float() if result.dtype in HALVES else result
    return result


def refuse_sparse(name: str, values: Any) -> None:
    """Refuse sparse matrices and tensors, with the way to a dense one."""
    if isinstance(values, Tensor) and values.layout != torch.strided:
        kind, dense = f"a sparse tensor, {values.layout}", f"{name}.to_dense()"
    elif hasattr(values, "toarray") and hasattr(values, "nnz"):
        kind, dense = f"sparse, a {type(values).__name__}", f"{name}.toarray()"
    else:
        return
    raise ValueError(
        f"{name} is {kind}, but this problem takes dense inputs: give {dense}, or state the losses as two functions "
        "in a BilevelProblem, which may use sparse matrices."
    )


def first_not_finite(values: Tensor, columns: Sequence[Any] = ()) -> str:
    """Return where the first NaN or infinite value is, such as "(3 of 40), the first in row 2, column 'age'"."""
    bad = ~torch.isfinite(values)
    row, *column = (int(index) for index in bad.nonzero()[0])
    at = f", column {_called(columns, column[0])}" if column else ""
    return f"({int(bad.sum())} of {values.numel()}), the first in row {row + 1}{at}"


def _column_names(X: Any) -> list[Any]:
    """Return the names of a table's columns, whatever they are; none for an array."""
    return [] if isinstance(X, Tensor | np.ndarray) else list(getattr(X, "columns", ()))


def column_names(X: Any) -> list[str]:
    """Return the names of a table's columns; none for anything else."""
    return [str(name) for name in _column_names(X)]


def check_columns(tables: Mapping[str, Any]) -> None:
    """Refuse tables whose columns differ in name or order from those of the training part, the first."""
    first, *others = [(part, column_names(X)) for part, X in tables.items()]
    for part, columns in others:
        if first[1] and columns and columns != first[1]:
            at = next((i for i, (a, b) in enumerate(zip(first[1], columns, strict=False)) if a != b), None)
            if at is not None:
                raise ValueError(
                    f"column {at + 1} of X_{part} is {columns[at]!r}, but of X_train {first[1][at]!r}: give both "
                    "tables the same columns in the same order."
                )


def _called(columns: Sequence[Any], index: int) -> str:
    return repr(columns[index]) if columns else str(index + 1)


def _array(name: str, values: Any) -> Array:
    try:
        # numpy turns the numbers of a mixed list into strings.
        mixed = isinstance(values, list | tuple) and any(isinstance(value, str) for value in values)
        array = np.asarray(values, dtype=object if mixed else None)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array of numbers: {' '.join(str(error).split()).rstrip('.')}.") from None
    if np.ma.isMaskedArray(values) and np.ma.getmaskarray(values).any():
        # numpy forgets the mask: the values under it would count as data.
        raise ValueError(f"{name} has masked values: drop or fill them first.")
    return array


def _plain(name: str, array: Array) -> Array:
    """Return an array that torch can read: of native byte order, writable, without negative strides."""
    if array.dtype.kind not in "fiubc":
        shown = "objects" if array.dtype.kind == "O" else str(array.dtype)
        raise ValueError(f"{name} must hold numbers, got {shown} of shape {array.shape}.")
    kind = array.dtype.newbyteorder("=")
    if kind.kind == "f" and kind.itemsize > 8:
        kind = np.dtype(np.float64)
    elif kind.kind == "u" and kind.itemsize > 1:
        kind = np.dtype(np.int64)
    readable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return array.astype(kind, copy=not readable)


def _numbers(name: str, column: Array, called: str) -> Array:
    if column.dtype.kind in "cmM":
        raise ValueError(f"column {called} of {name} holds {column.dtype}: encode it as real numbers first.")
    numbers = np.empty(len(column))
    for row, value in enumerate(column):
        try:
            if isinstance(value, str | bytes | np.datetime64 | np.timedelta64):
                raise TypeError
            # None is a missing number, as in pandas.
            numbers[row] = np.nan if value is None else float(value)
        except (TypeError, ValueError):
            shown = str(value) if isinstance(value, str) else value
            raise ValueError(
                f"column {called} of {name} holds {shown!r} in row {row + 1}, which is no number: encode it as "
                "numbers, fill it, or drop the column."
            ) from None
    return numbers


def _labels(name: str, array: Array) -> Array:
    """Return targets that came as objects as numbers, or all as strings."""
    flat = array.reshape(-1)
    for row, value in enumerate(flat):
        missing = value is None or type(value).__name__ in ("NAType", "NaTType") or value != value
        if missing:
            raise ValueError(f"{name} has no value in row {row + 1} ({value!r}): drop such rows first.")
    words = [isinstance(value, str) for value in flat]
    if all(words):
        return array.astype(str)
    try:
        if any(words):
            raise TypeError
        numbers = np.array([value.item() if hasattr(value, "item") else value for value in flat])
        return (numbers if numbers.dtype.kind in "fiub" else numbers.astype(np.float64)).reshape(array.shape)
    except (TypeError, ValueError):
        kinds = ", ".join(sorted({type(value).__name__ for value in flat}))
        raise ValueError(f"{name} must hold numbers or strings, all of one kind, got {kinds}.") from None
