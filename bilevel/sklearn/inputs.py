"""Parameters of the estimators as numbers and tensors."""

from __future__ import annotations

from difflib import get_close_matches
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.metrics import get_scorer_names
from sklearn.utils import check_scalar
from sklearn.utils._missing import is_pandas_na
from sklearn.utils._param_validation import InvalidParameterError
from sklearn.utils.validation import validate_data

from bilevel.core.options import LARGEST, check_sizes
from bilevel.numerics.csr import csr

TYPES: dict[str, Any] = {"accept_sparse": "csr", "dtype": [np.float64, np.float32], "ensure_min_samples": 2}
"""What `validate_data` lets through, of every estimator."""
TIMES = ("m", "M")
"""Kinds of dtypes of durations and of dates."""
FLOATS = (np.dtype(np.float64), np.dtype(np.float32))


def set_parameters(given: dict[str, Any]) -> None:
    """Set the parameters of an estimator: ``locals()`` of its ``__init__``."""
    vars(given.pop("self")).update(given)


def read(estimator: Any, *given: Any, **options: Any) -> Any:
    """Return X, or X and y, as scikit-learn's `validate_data` does.

    Raises:
        TypeError: as `validate_data` does.
        ValueError: likewise, and in one sentence for a column of a frame, and a target, that holds no numbers.
    """
    numeric = given[: 2 if options.get("y_numeric") else 1]  # labels may be words
    for name, values in zip("Xy", numeric, strict=False):
        dtypes = values.dtypes if _is_frame(values) else [getattr(values, "dtype", None)]
        if any(getattr(dtype, "kind", "") in TIMES for dtype in dtypes):
            _refuse_words(name, values)
    try:
        return validate_data(estimator, *given, **TYPES | options)
    except (TypeError, ValueError):
        for name, values in zip("Xy", numeric, strict=False):
            _refuse_words(name, values)
        raise


def _refuse_words(name: str, given: Any) -> None:
    """Refuse times and words in the columns of a frame, and in a target; scikit-learn says so of other arrays."""
    columns = [(name, given)]
    if _is_frame(given):
        columns = [(f"the column {label!r} of {name}", given.iloc[:, j]) for j, label in enumerate(given.columns)]
    for label, column in columns:
        if getattr(getattr(column, "dtype", None), "kind", "") in TIMES:
            raise ValueError(f"{label} holds times: turn them into numbers, such as days, or leave them out.")
        if (column is given and name == "X") or getattr(getattr(column, "dtype", None), "kind", "") == "c":
            continue
        for row, each in enumerate(np.asarray(column, dtype=object).ravel()):
            try:
                float(0.0 if each is None or is_pandas_na(each) else each)
            except (TypeError, ValueError):
                remedy = "use LogisticRegressionCV for classes" if column is given else "leave it out"
                raise ValueError(
                    f"{label} holds {each!r} in row {row} (counted from 0), which is no number: turn it into numbers, "
                    f"or {remedy}."
                ) from None


def _is_frame(given: Any) -> bool:
    return hasattr(given, "iloc") and given.ndim == 2


def validated(estimator: Any, X: Any, y: Any) -> tuple[Any, Any]:
    """Return the rows and their numbers as scikit-learn's `validate_data` does, which costs a small fit a tenth.

    Plain arrays of finite floats pass as they are.
    """
    plain = type(X) is type(y) is np.ndarray and X.dtype in FLOATS and y.dtype in FLOATS and X.ndim == 2
    if plain and y.ndim in (1, 2) and len(X) == len(y) > 1 and X.shape[1] and _are_usual(X) and _are_usual(y):
        vars(estimator).pop("feature_names_in_", None)
        estimator.n_features_in_ = X.shape[1]
        return X, y
    found = read(estimator, X, y, multi_output=True, y_numeric=True)
    check_range(estimator, *found)
    return found[0], found[1]


def _are_usual(values: NDArray[Any]) -> bool:
    """Whether the sum of squares of some numbers says that all are finite, none too large, and not all too small."""
    flat = values.ravel("K")
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(LARGEST**-2 < float(flat.dot(flat)) < LARGEST**2)


def check_range(estimator: Any, X: Any, y: Any = None) -> None:
    """Refuse columns of validated X, and of y where it holds numbers, whose squares are not finite, or vanish.

    Raises:
        ValueError: in one sentence, with the column.
    """
    names = getattr(estimator, "feature_names_in_", range(X.shape[1]))
    if not _are_usual(X.data if sparse.issparse(X) else X):
        check_sizes(abs(X).max(axis=0).toarray() if sparse.issparse(X) else X, "X", names)
    if y is not None and y.dtype.kind == "f" and not _are_usual(y):
        check_sizes(y, "y", range(y.shape[1]) if y.ndim == 2 else ())


SIMPLE = (bool, int, float, str, type(None))
"""Types of parameters that nobody can change in place."""
CHECKED: set[tuple[Any, ...]] = set()
"""Keys of parameters that are valid."""


def key_of(owner: type[Any], values: list[Any]) -> tuple[Any, ...] | None:
    """Return what names the simple parameters of a class; None where one of them may change in place."""
    kinds = [type(each) for each in values]
    return (owner, *kinds, *values) if all(kind in SIMPLE for kind in kinds) else None


def check_scorer(owner: str, scoring: Any) -> None:
    """Refuse a name that is no scorer of scikit-learn.

    Raises:
        InvalidParameterError: in one sentence, with the names that are close.
    """
    names = get_scorer_names()
    if not isinstance(scoring, str) or scoring in names:
        return
    # "mse" stands for "neg_mean_squared_error".
    short = {name: "".join(word[0] for word in name.removeprefix("neg_").split("_")) for name in names}
    close = [name for name in names if scoring in name or scoring == short[name]] or get_close_matches(scoring, names)
    raise InvalidParameterError(
        f"The 'scoring' parameter of {owner} must be a str among those of sklearn.metrics.get_scorer_names(), a "
        f"callable or None. Got {scoring!r} instead{': close are ' + ', '.join(close[:3]) if close else ''}."
    )


def positive(name: str, given: Any) -> NDArray[np.float64]:
    """Return candidates of a parameter, in float64.

    Raises:
        ValueError: in one sentence, where there are none, or one is not a positive number.
    """
    if not len(given):
        raise ValueError(f"{name} must hold at least one number, got none: give None for any penalty.")
    return numbers(name, given, min_val=0.0, include_boundaries="neither")


def numbers(name: str, given: Any, **limits: Any) -> NDArray[np.float64]:
    """Return the numbers of a parameter, in float64.

    Args:
        name: of the parameter.
        given: its numbers.
        limits: of each, as scikit-learn's `check_scalar` takes them.

    Raises:
        ValueError: in one sentence, where there are none, or one is not finite or outside the limits.
    """
    if not len(given):
        raise ValueError(f"{name} must hold at least one number, got none.")
    for index, each in enumerate(given):
        check_scalar(each, f"{name}[{index}]", Real, **limits)
        if not np.isfinite(each):
            raise ValueError(f"{name}[{index}] == {each}, must be finite.")
    return np.asarray(given, dtype=np.float64)


def places_of(penalties: NDArray[Any]) -> NDArray[np.intp]:
    """Return the place of each of some penalties among them all, from the strongest on.

    >>> places_of(np.array([0.1, 10.0, 1.0]))
    array([2, 0, 1])
    """
    return np.argsort(np.argsort(-penalties, kind="stable"), kind="stable")


def nearest(value: float, candidates: NDArray[np.float64]) -> float:
    """Return the candidate that a value, which went through logarithms, stands for."""
    return float(candidates[np.abs(np.log(candidates / value)).argmin()])


AS_THEY_ARE = (
    "columns of sparse X are left as they are; standardize=True scales them to deviation 1, as those of dense X."
)
"""The remark of a report where "auto" stands for unscaled columns."""


def on_device(X: Any, device: Any) -> Any:
    """Return X, an array or a CSR matrix, on a device, where one is named.

    Raises:
        ValueError: in one sentence, for a device that is not there.
    """
    if device is None:
        return X
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device={str(device)!r} is no device of torch here: give 'cpu', or None.") from None
    if not sparse.issparse(X):
        return torch.as_tensor(X).to(device)
    X = X if X.has_canonical_format else X.copy()
    X.sum_duplicates()
    ends, columns, values = (torch.as_tensor(part) for part in (X.indptr, X.indices, X.data))
    return csr(ends.long(), columns.long(), values, X.shape).to(device)
