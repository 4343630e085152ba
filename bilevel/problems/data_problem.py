"""Problems that are made from training, validation and test rows, as configs make them by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.problem import BilevelProblem
from bilevel.problems.splits import Split
from bilevel.tree import Tree


class DataProblem(BilevelProblem):
    """Base of the problems whose inner loss is over training rows and whose outer loss is over validation rows.

    A config can name every exported subclass whose constructor takes X_train, y_train, X_val, y_val, X_test and y_test.
    """

    train: Split
    val: Split
    test: Split | None

    def take_splits(self, X_train: Any, y_train: Any, X_val: Any, y_val: Any, X_test: Any, y_test: Any) -> None:
        """Keep the parts of the data.

        Args:
            X_train: training inputs of shape (rows, features), floating.
            y_train: training targets of shape (rows,).
            X_val: validation inputs.
            y_val: validation targets.
            X_test: test inputs, or None.
            y_test: test targets, or None.

        Raises:
            ValueError: in one sentence, for what is no data and for parts that do not fit each other.
        """
        if (X_test is None) != (y_test is None):
            raise ValueError("give X_test and y_test together, or neither.")
        self.train = Split("train", X_train, y_train)
        self.val = Split("val", X_val, y_val)
        self.test = None if X_test is None else Split("test", X_test, y_test)
        for split in self.splits.values():
            if split.X.shape[0] != self.train.X.shape[0] or split.X.dtype != self.train.X.dtype:
                raise ValueError(
                    f"X_{split.name} has {split.X.shape[0]} features in {split.X.dtype}, "
                    f"but X_train has {self.train.X.shape[0]} in {self.train.X.dtype}."
                )
            if split.X.device != self.train.X.device:
                raise ValueError(f"X_{split.name} is on {split.X.device}, but X_train on {self.train.X.device}.")

    @property
    def splits(self) -> Mapping[str, Split]:
        """The parts of the data by name."""
        parts = {"train": self.train, "val": self.val}
        return parts if self.test is None else parts | {"test": self.test}

    @property
    @abstractmethod
    def unit(self) -> str:
        """What a hyperparameter is, in words."""

    @abstractmethod
    def labels(self, features: Sequence[str]) -> list[str]:
        """Return a name for every scalar hyperparameter, in the order of the leaves, given those of the features."""

    @abstractmethod
    def initial_hparams(self, value: float = 0.0) -> Tree:
        """Return hyperparameters that all have one value."""
