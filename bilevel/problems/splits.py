"""One part of the data of a linear model, looked at before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Split:
    """One part of the data: feature-major X of shape (features, rows), and y.

    Args:
        name: how messages call it.
        X: of shape (rows, features).
        y: of shape (rows,).
    """

    def __init__(self, name: str, X: Any, y: Any) -> None:
        try:
            X, y = torch.as_tensor(X), torch.as_tensor(y)
        except (TypeError, ValueError) as error:
            raise ValueError(f"X_{name} and y_{name} must be arrays of numbers; encode labels as integers.") from error
        if y.dtype == torch.bool:
            y = y.long()
        if X.dim() != 2 or y.dim() != 1 or len(X) != len(y):
            raise ValueError(
                f"X_{name} must have shape (rows, features) and y_{name} shape (rows,) with as many rows, "
                f"got {tuple(X.shape)} and {tuple(y.shape)}."
            )
        if X.numel() == 0:
            raise ValueError(f"X_{name} is empty, of shape {tuple(X.shape)}.")
        if not X.is_floating_point():
            raise ValueError(f"X_{name} must have a floating dtype, got {X.dtype}.")
        for what, values in ((f"X_{name}", X), (f"y_{name}", y)):
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise ValueError(f"{what} holds NaN or infinite values: drop or fill those rows first.")
        if X.device != y.device:
            raise ValueError(f"X_{name} is on {X.device} but y_{name} on {y.device}: move one of them.")
        self.name = name
        self.X = X.t().contiguous()
        self.y = y

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.X.shape[1]


def class_labels(split: Split, classes: Tensor) -> Tensor:
    """Return the labels of a split as indices into `classes`.

    Args:
        split: part of the data.
        classes: sorted labels seen in training.

    Raises:
        ValueError: for a label that training has not seen.
    """
    index = torch.searchsorted(classes, split.y.to(classes.dtype).contiguous()).clamp(max=len(classes) - 1)
    unknown = classes[index] != split.y
    if bool(unknown.any()):
        label = split.y[unknown][0]
        raise ValueError(f"y_{split.name} holds the label {label.item():g}, which y_train does not.")
    return index


def training_classes(split: Split) -> Tensor:
    """Return the sorted labels of the training targets.

    Raises:
        ValueError: if there is one label alone, or labels are not whole numbers.
    """
    if split.y.is_floating_point() and bool((split.y != split.y.round()).any()):
        raise ValueError("y_train holds labels that are not whole numbers: a regression target?")
    classes = split.y.unique()
    if len(classes) < 2:
        raise ValueError(f"y_train holds one class only ({classes[0].item():g}): there is nothing to separate.")
    return classes
