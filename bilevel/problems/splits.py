"""One part of the data of a linear model, looked at before anything is computed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.data.sources import Array
from bilevel.oracles.batching import stacked_trees
from bilevel.problems.tables import column_names, features, first_not_finite, targets


class Split:
    """One part of the data, which messages call by its name: feature-major X of shape (features, rows), and y.

    `X`, of shape (rows, features), is a tensor, an array, nested lists or a table with named columns; `y` holds
    numbers, of shape (rows,) or (rows, 1). X and a floating y get the dtype that is asked for, else that of X.
    """

    def __init__(self, name: str, X: Any, y: Any, dtype: torch.dtype | None = None) -> None:
        columns = column_names(X)
        X, y = features(f"X_{name}", X), targets(f"y_{name}", y)
        if X.dim() != 2 or y.ndim != 1 or len(X) != len(y):
            several = X.dim() == 2 and y.ndim == 2 and len(X) == len(y)
            remedy = ": several targets are a problem each, which bilevel.stack runs side by side" if several else ""
            raise ValueError(
                f"X_{name} must have shape (rows, features) and y_{name} shape (rows,) with as many rows, "
                f"got {tuple(X.shape)} and {tuple(y.shape)}{remedy}."
            )
        if X.numel() == 0:
            raise ValueError(f"X_{name} is empty, of shape {tuple(X.shape)}.")
        if not isinstance(y, Tensor):
            raise ValueError(
                f"y_{name} holds strings, such as {str(y[0])!r}, but this problem takes numbers: encode them, or take "
                "a problem of classes."
            )
        if X.device != y.device:
            raise ValueError(f"X_{name} is on {X.device} but y_{name} on {y.device}: move one of them.")
        X = X if dtype is None else X.to(dtype)
        y = y.to(X.dtype) if y.is_floating_point() else y
        for what, values in ((f"X_{name}", X), (f"y_{name}", y)):
            if values.is_floating_point() and not tree.is_finite(values):
                where = first_not_finite(values, columns)
                raise ValueError(f"{what} holds NaN or infinite values {where}: drop or fill those rows first.")
        self.name = name
        self.X = X.t().contiguous()
        self.y = y

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.X.shape[-1]

    def in_double(self) -> Split:
        """Return the same numbers in float64."""
        wide = copy.copy(self)
        wide.X, wide.y = self.X.double(), self.y.double()
        return wide


def stacked_splits(parts: Sequence[Split]) -> Split:
    """Return one part of the data of several problems, of equal shapes, with X of shape (problems, features, rows)."""
    split, name = copy.copy(parts[0]), parts[0].name
    split.X = stacked_trees(f"X_{name}", [part.X for part in parts])
    split.y = stacked_trees(f"y_{name}", [part.y for part in parts])
    return split


def check_equal(problems: Sequence[Any], options: Sequence[str]) -> None:
    """Refuse to stack problems with different options; ValueError names the first that differs."""
    for index, problem in enumerate(problems):
        for name in options:
            value, wanted = getattr(problem, name), getattr(problems[0], name)
            if value != wanted:
                raise ValueError(
                    f"`stack` takes problems with equal options, but `{name}` is {wanted!r} in problem 0 and "
                    f"{value!r} in problem {index}."
                )


def numbered(named: dict[str, Any], like: Any) -> dict[str, Any]:
    """Return the targets of all parts, with labels that are strings as indices of the sorted training labels.

    Raises:
        ValueError: for one label alone, a label that training has not seen, and strings beside numbers.
    """
    result = {part: targets(f"y_{part}", y) for part, y in named.items()}
    words = [part for part, y in result.items() if not isinstance(y, Tensor)]
    if not words:
        return result
    if len(words) < len(result):
        numbers = next(part for part in result if part not in words)
        raise ValueError(f"y_{words[0]} holds strings, but y_{numbers} numbers: give all labels in one form.")
    labels = np.unique(result["train"])
    if len(labels) == 1:
        raise ValueError(f"y_train holds one class only ({str(labels[0])!r}): there is nothing to separate.")
    device = like.device if isinstance(like, Tensor) else None
    return {part: _indices(part, y, labels).to(device) for part, y in result.items()}


def _indices(part: str, y: Any, labels: Array) -> Tensor:
    unseen = np.setdiff1d(y, labels)
    if len(unseen):
        raise ValueError(f"y_{part} holds the label {str(unseen[0])!r}, which y_train does not.")
    return torch.as_tensor(np.searchsorted(labels, y))


def class_labels(split: Split, classes: Tensor) -> Tensor:
    """Return the labels of a split as indices into the sorted labels of training; ValueError for another label."""
    index = torch.searchsorted(classes, split.y.to(classes.dtype).contiguous()).clamp(max=len(classes) - 1)
    unknown = classes[index] != split.y
    if bool(unknown.any()):
        label = split.y[unknown][0]
        raise ValueError(f"y_{split.name} holds the label {label.item():g}, which y_train does not.")
    return index


def training_classes(split: Split) -> Tensor:
    """Return the sorted labels of the training targets; ValueError for one alone, and for no whole numbers."""
    if split.y.is_floating_point() and bool((split.y != split.y.round()).any()):
        raise ValueError("y_train holds labels that are not whole numbers: a regression target?")
    classes = split.y.unique()
    if len(classes) < 2:
        raise ValueError(f"y_train holds one class only ({classes[0].item():g}): there is nothing to separate.")
    return classes


def signs(splits: Mapping[str, Split], owner: str) -> dict[str, Tensor]:
    """Return two labels as -1 and +1, the larger one as +1; ValueError unless there are exactly two."""
    classes = training_classes(splits["train"])
    if len(classes) != 2:
        raise ValueError(f"y_train holds {len(classes)} classes: {owner} takes two, SoftmaxProblem any number.")
    return {name: 2.0 * class_labels(split, classes).to(split.X.dtype) - 1.0 for name, split in splits.items()}
