"""Which criterion fits a loss and its data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bilevel.core.options import require_value
from bilevel.criteria.approximate import ApproximateLeaveOneOut
from bilevel.criteria.criterion import Criterion
from bilevel.criteria.data import DENSE, LinearData
from bilevel.criteria.evidence import Evidence
from bilevel.criteria.folds import KFold
from bilevel.criteria.gram_folds import RidgeFolds
from bilevel.criteria.leave_one_out import RidgeLeaveOneOut
from bilevel.criteria.penalties import Penalties
from bilevel.problems.losses import GLMLoss, Squared

KINDS = ("auto", "loo", "alo", "kfold", "holdout", "evidence")
MANY = 20
"""Rows for each feature from which the folds of ridge regression are summed up by their Gram matrices."""


def choose_criterion(
    kind: str,
    data: LinearData,
    loss: GLMLoss,
    penalties: Penalties,
    *,
    folds: Iterable[Any] | None = None,
    dependent: str | None = None,
) -> Criterion:
    """Return the criterion of a name.

    "auto" leaves out single rows where it can: exactly for ridge regression ("loo"), approximately for other losses of
    one prediction ("alo"). It takes folds where rows depend on each other, for several outputs, and for sparse inputs
    that are too large to be dense.

    Args:
        kind: "auto", "loo", "alo", "kfold", "holdout", which is one fold, or "evidence".
        data: the rows.
        loss: of their predictions.
        penalties: which coefficients share a penalty.
        folds: pairs (training rows, validation rows), for the kinds that take them.
        dependent: how rows depend on each other, in words such as "grouped" or "ordered in time"; None: they do not.

    Raises:
        ValueError: in one sentence, where the kind does not fit.

    >>> data = LinearData.of([[0.0], [1.0], [3.0]], [0.0, 1.0, 2.0])
    >>> type(choose_criterion("auto", data, Squared(), Penalties.scalar(1))).__name__
    'RidgeLeaveOneOut'
    """
    require_value("criterion", kind, f"one of {', '.join(map(repr, KINDS))}", kind in KINDS)
    squared = isinstance(loss, Squared)  # these have closed forms
    if kind == "auto":
        kind = _fitting(data, squared, penalties, dependent)
    if kind in ("loo", "alo") and dependent is not None:
        raise ValueError(
            f"rows are {dependent}: a row that is left out alone is known from the others; use 'kfold' with folds that "
            "keep such rows together."
        )
    if kind in ("loo", "evidence") and not squared:
        raise ValueError(f"{kind!r} is of squared losses only, got {type(loss).__name__}: use 'alo' or 'kfold'.")
    if kind == "evidence":
        return Evidence(data, penalties)
    if kind == "loo":
        return RidgeLeaveOneOut(data, penalties)
    if kind == "alo":
        return ApproximateLeaveOneOut(data, loss, penalties)
    if folds is None:
        raise ValueError(
            f"{kind!r} needs `folds`, pairs (training rows, validation rows), such as those of a splitter of "
            "scikit-learn or of bilevel.selection.make_folds."
        )
    pairs = list(folds)
    if kind == "holdout" and len(pairs) != 1:
        raise ValueError(
            f"'holdout' takes one pair of training and validation rows, got {len(pairs)}: give one, such as that of "
            "scikit-learn's ShuffleSplit(1), or use 'kfold'."
        )
    several = data.y.dim() == 2
    if squared and (several or data.rows >= MANY * data.features):
        return RidgeFolds(data, penalties, pairs)
    return KFold(data, loss, penalties, pairs)


def standardizes(asked: bool | str, X: Any) -> bool:
    """Return whether penalties are those of columns with deviation 1; "auto" stands for those of dense X.

    Scaling makes rare words as large as common ones, which their weights on held-out rows do not bear out.
    """
    return not hasattr(X, "tocsr") if isinstance(asked, str) else bool(asked)


def _fitting(data: LinearData, squared: bool, penalties: Penalties, dependent: str | None) -> str:
    """Return the kind that "auto" stands for."""
    if dependent is not None:
        return "kfold"
    if data.sparse and data.rows * data.features > DENSE and not (squared and penalties.even):
        return "kfold"
    if squared:
        return "loo"
    return "kfold" if penalties.outputs is not None else "alo"
