"""Folds: pairs of training rows and validation rows, as any scikit-learn splitter gives them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria.criterion import Folds
from bilevel.criteria.data import LinearData, Rows
from bilevel.problems.losses import GLMLoss


def checked_folds(given: Iterable[Any], data: LinearData, loss: GLMLoss) -> Folds:
    """Return folds as pairs of indices.

    Args:
        given: pairs (training rows, validation rows) of indices or masks: one pair is a hold-out.
        data: the rows that they are of.
        loss: says what a training part needs.

    Raises:
        ValueError: in one sentence, for folds that overlap or leave a part without rows, weight, a class or a model.
    """
    folds = [(_index(train, data.rows), _index(held, data.rows)) for train, held in given]
    if not folds:
        raise ValueError("folds must hold at least one pair (training rows, validation rows).")
    for number, (train, held) in enumerate(folds, 1):
        if len(np.intersect1d(train.numpy(), held.numpy())):
            raise ValueError(f"fold {number} validates on rows that it trains on.")
        for name, part in (("training", train), ("validation", held)):
            if not len(part) or not bool(data.weights[part].sum() > 0):
                raise ValueError(f"fold {number} has no {name} rows with a weight.")
        if loss.separable:
            missing = np.setdiff1d(data.y.cpu().numpy(), data.y[train].cpu().numpy())
            if len(missing):
                raise ValueError(
                    f"fold {number} trains on no row of the class {missing[0]:g}: use fewer folds, or stratified ones."
                )
            continue
        constant = loss.constant_prediction(data.y[..., train]) if data.intercept else None
        if constant is not None and not bool(constant.isfinite()):
            raise ValueError(
                f"fold {number} has no model: all targets of its training rows are {data.y[train[0]]:g}, so that the "
                f"best constant prediction is {constant:g}: use fewer folds, or put other rows in them."
            )
    return folds


def restricted(folds: Folds, rows: Rows, count: int) -> Folds:
    """Return the folds of some of the rows, as indices among them; those that keep no rows of a part are left out.

    Args:
        folds: of all rows.
        rows: indices of those that stay.
        count: the number of all rows.
    """
    rows = torch.as_tensor(rows)
    place = torch.full((count,), -1).index_put_((rows,), torch.arange(len(rows)))
    parts = [tuple(part[part >= 0] for part in (place[train], place[held])) for train, held in folds]
    return [(train, held) for train, held in parts if len(train) and len(held)]


def _index(part: Any, rows: int) -> Tensor:
    array = np.asarray(part)
    index = np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64).reshape(-1)
    if len(index) and (index.min() < 0 or index.max() >= rows):
        raise ValueError(f"a fold names the row {index.max()}, but the data have {rows} rows.")
    return torch.from_numpy(np.ascontiguousarray(index))
