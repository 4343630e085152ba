"""From `cv` and `groups` of an estimator to pairs of indices, and to penalties that features share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import (
    GroupKFold,
    GroupShuffleSplit,
    LeaveOneGroupOut,
    LeavePGroupsOut,
    StratifiedGroupKFold,
    TimeSeriesSplit,
    check_cv,
)
from sklearn.utils import check_random_state

from bilevel.criteria import Penalties
from bilevel.selection import make_folds

FOLDS = 5
"""Folds of the outer loop where `cv` is None."""
GROUPED = (GroupKFold, GroupShuffleSplit, LeaveOneGroupOut, LeavePGroupsOut, StratifiedGroupKFold)

Pair = tuple[NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True, eq=False)
class Folds:
    """Folds of the rows.

    Attributes:
        made: indices of training rows and rows held out, or what makes them when they are asked for.
        seed: of other folds, for an outer loop around `pairs` where these are too few for one; None for no such.
        rows: how many there are.
        labels: the class of every row; None without classes.
        given: whether `pairs` came from `cv` or from groups of rows, so that the criterion takes them too.
        dependence: "grouped" or "ordered" where rows are declared to be; else "".
    """

    made: list[Pair] | Callable[[], list[Pair]]
    seed: int | None
    rows: int
    labels: Any
    given: bool
    dependence: str

    @cached_property
    def pairs(self) -> list[Pair]:
        """Indices of training rows and rows held out."""
        return self.made() if callable(self.made) else self.made

    def __iter__(self) -> Iterator[Pair]:
        yield from self.pairs

    def outer(self, inner: bool, weights: NDArray[np.float64]) -> list[Pair]:
        """Return the folds of an outer loop that train on two rows; if nobody gave them, those whose held rows weigh.

        Args:
            inner: whether the criterion takes, in every outer fold, what is left of all the others.
            weights: of shape (rows,).
        """
        pairs = [pair for pair in self._outer(inner) if len(pair[0]) > 1]  # standardised, one row is no feature
        return pairs if self.given else [(train, held) for train, held in pairs if weights[held].any()]

    def _outer(self, inner: bool) -> list[Pair]:
        if not inner:
            return self.pairs
        usable = [pair for pair in self.pairs if self._leaves_folds(pair[0])]
        if len(usable) > 1:
            return usable
        return [] if self.seed is None else _numbered(None, self.rows, self.labels, None, self.seed)

    def _leaves_folds(self, rows: Any) -> bool:
        """Whether some of the rows, without the others, still have folds with all classes."""
        inner = [(np.intersect1d(train, rows), np.intersect1d(held, rows)) for train, held in self.pairs]
        inner = [(train, held) for train, held in inner if len(train) and len(held)]
        classes = 0 if self.labels is None else len(np.unique(self.labels))
        return bool(inner) and all(not classes or len(np.unique(self.labels[train])) == classes for train, _ in inner)


def folds_of(cv: Any, X: Any, y: Any, classes: Any, split: dict[str, Any], random_state: Any) -> Folds:
    """Return the folds that a parameter `cv` stands for.

    Args:
        cv: None, a number, a splitter of scikit-learn, or pairs of indices.
        X: of shape (rows, features).
        y: of shape (rows,) or (rows, targets); of a classifier the indices of classes.
        classes: of a classifier its labels, else None.
        split: what goes to the splitter, such as groups of rows.
        random_state: of the shuffle, for a number.

    Raises:
        ValueError: in one sentence, for folds that cannot be fitted.
    """
    groups, labels = split.get("groups"), None if classes is None else y
    if groups is not None:
        groups = _sortable(groups, "rows")
    grouped, ordered = groups is not None or isinstance(cv, GROUPED), isinstance(cv, TimeSeriesSplit)
    seed = 0 if random_state is None else int(check_random_state(random_state).randint(2**31 - 1))
    pairs: list[Pair] | Callable[[], list[Pair]]
    if cv is None and classes is None and groups is None:
        pairs = partial(_numbered, None, X.shape[0], None, None, seed)  # one penalty may need none
    elif cv is None or isinstance(cv, Integral):
        pairs = _numbered(cv, X.shape[0], labels, groups, seed)
    else:
        splitter = check_cv(cv, labels, classifier=classes is not None)
        found = enumerate(splitter.split(X, y, **split), 1)
        pairs = [(_indices(train, X.shape[0], fold), _indices(held, X.shape[0], fold)) for fold, (train, held) in found]
    if classes is not None and isinstance(pairs, list):
        _check_classes(pairs, y, classes)
    dependence = "grouped" if grouped else "ordered" if ordered else ""
    spare = None if dependence else seed + 1
    return Folds(pairs, spare, X.shape[0], labels, cv is not None or grouped, dependence)


def _indices(part: Any, rows: int, fold: int) -> NDArray[np.intp]:
    """Return the indices of a part of a fold, which may be given as a mask of the rows.

    Raises:
        ValueError: in one sentence, for a mask of other rows, and indices of none.
    """
    given = np.asarray(part)
    if given.dtype == bool:
        if given.shape != (rows,):
            raise ValueError(f"Fold {fold} of cv holds a mask of shape {given.shape}, but X has {rows} rows.")
        return np.flatnonzero(given)
    whole = given.ndim == 1 and (given.dtype.kind in "iu" or not given.size)
    if not whole or (given.size and not -rows <= given.min() <= given.max() < rows):
        raise ValueError(f"Fold {fold} of cv must hold indices of the {rows} rows of X, or masks of them.")
    return given.astype(np.intp)


def _sortable(groups: Any, what: str) -> NDArray[Any]:
    """Return labels of groups as an array.

    Raises:
        ValueError: in one sentence, for labels that do not compare, such as None among strings.
    """
    labels = np.asarray(groups)
    try:
        np.unique(labels)
    except TypeError:
        raise ValueError(f"groups of {what} must be labels of one type without None: name every group.") from None
    return labels


def _numbered(cv: Any, rows: int, labels: Any, groups: Any, seed: int) -> list[Pair]:
    """Return so many folds, shuffled, stratified by labels or of whole groups; None stands for five, or fewer.

    Raises:
        ValueError: in one sentence, for more folds than rows or groups.
    """
    parts, what = (rows, "rows") if groups is None else (len(np.unique(groups)), "groups of rows")
    count = min(FOLDS, parts) if cv is None else int(cv)
    if cv is None and parts < 2:
        raise ValueError("groups of rows hold one group only, and folds hold out whole groups: name at least two.")
    if not 2 <= count <= parts:
        raise ValueError(f"cv={cv} must be at least 2 and at most {parts}, the number of {what}.")
    pairs = make_folds(rows, count, labels=labels if groups is None else None, groups=groups, seed=seed)
    if labels is None or groups is not None:
        return pairs
    # Rows of rare classes are trained on in every fold: an outer and an inner fold may leave none of them.
    counts = np.bincount(labels)
    rare = counts - np.ceil(counts / count) - np.ceil(counts / max(count, 3)) < 1
    stay = np.flatnonzero(rare[labels])
    pairs = [(np.union1d(train, stay), np.setdiff1d(held, stay)) for train, held in pairs]
    return [(train, held) for train, held in pairs if len(held)]


def _check_classes(pairs: list[Pair], y: Any, classes: Any) -> None:
    """Refuse a fold whose training rows are without a class.

    Raises:
        ValueError: in one sentence.
    """
    for number, (train, _) in enumerate(pairs, 1):
        if len(missing := np.setdiff1d(np.arange(len(classes)), y[train])):
            raise ValueError(
                f"Fold {number} of cv trains on no row of class {classes[missing[0]]!s}: use StratifiedKFold, or fewer "
                "folds."
            )


def penalties_of(structure: str, groups: Any, features: int, outputs: int | None) -> Penalties:
    """Return which coefficients share a penalty.

    Args:
        structure: "scalar", "group", "feature", "class" or "target", "class_feature" or "target_feature".
        groups: the group of every feature, for "group".
        features: of a row.
        outputs: classes or targets; None for one prediction.

    Raises:
        ValueError: in one sentence, for groups that do not fit.
    """
    if (structure == "group") != (groups is not None):
        needs = "needs groups, the group of every feature" if groups is None else "takes no groups: say 'group'"
        raise ValueError(f"penalty_structure={structure!r} {needs}.")
    if structure == "group":
        labels = list(groups)
        if len(labels) != features or any(np.ndim(each) for each in labels):
            raise ValueError(
                f"groups must hold one label for each of the {features} features of X, got {len(labels)} entries."
            )
        return Penalties.groups(_sortable(labels, "features"), outputs)
    if structure in ("class", "target") and outputs is not None:
        return Penalties.output(features, outputs)
    if structure in ("class_feature", "target_feature") and outputs is not None:
        return Penalties.output_feature(features, outputs)
    one = structure in ("scalar", "class", "target")
    return Penalties.scalar(features, outputs) if one else Penalties.feature(features, outputs)
