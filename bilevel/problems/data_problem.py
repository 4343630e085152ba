"""Problems that are made from training, validation and test rows, as configs make them by name."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.data.load import Dataset
from bilevel.oracles.problem import BilevelProblem
from bilevel.problems.splits import Split, numbered
from bilevel.problems.tables import check_columns

ROWS = 10
"""Of fewer validation rows, one may well make half of the loss."""
INTERCEPT = "centre X and y, or add a column of ones, which is penalised as the others are"
WEIGHTS = "state the weighted loss by two functions in a BilevelProblem"
ABSENT = {
    **dict.fromkeys(("fit_intercept", "intercept", "bias"), INTERCEPT),
    **dict.fromkeys(("sample_weight", "sample_weights", "weights", "class_weight"), WEIGHTS),
}
"""Options that other libraries have, and what stands for them here."""


class DataProblem(BilevelProblem):
    """Base of the problems whose inner loss is over training rows and whose outer loss is over validation rows.

    A config can name every exported subclass: `from_data` makes it of a data set and the options in the config.

    Attributes:
        from_dataset: names of the constructor's arguments that are attributes of a data set, which `from_data` takes
            from there and a config does not give.
        task: what the targets are, and so what a config's data set becomes: "regression" (numbers, which are centred),
            "classification" (labels, which may be strings and become 0, 1, ... in sorted order) or "raw" (numbers as
            they are in the data set).
    """

    from_dataset: ClassVar[frozenset[str]] = frozenset({"X_train", "y_train", "X_val", "y_val", "X_test", "y_test"})
    task: str = "raw"
    train: Split
    val: Split
    test: Split | None

    @classmethod
    def from_data(cls, dataset: Dataset, **options: Any) -> Self:
        """Return the problem of a data set from `bilevel.data.load`; options are the constructor's."""
        return cls(**{name: getattr(dataset, name) for name in cls.from_dataset}, **options)

    def take_splits(self, X_train: Any, y_train: Any, X_val: Any, y_val: Any, X_test: Any, y_test: Any) -> None:
        """Keep the parts of the data; inputs have the shape (rows, features), targets (rows,) or (rows, 1).

        Inputs are a tensor, an array, nested lists or a DataFrame: half precision becomes float32, other numbers that
        are not floating float64. Labels of a classification may be strings. Test data may be None.

        Raises:
            ValueError: in one sentence, for what is no data and for parts that do not fit each other, such as tables
                whose columns stand in another order.
        """
        if (X_test is None) != (y_test is None):
            raise ValueError("give X_test and y_test together, or neither.")
        inputs = {"train": X_train, "val": X_val} | ({} if X_test is None else {"test": X_test})
        y = {"train": y_train, "val": y_val} | ({} if y_test is None else {"test": y_test})
        if self.task == "classification":
            y = numbered(y, X_train)
        given = {"X_train": X_train, "y_train": y_train}
        self.detached = tuple(name for name, each in given.items() if getattr(each, "requires_grad", False))
        self.train = Split("train", X_train, y["train"])
        self.val = Split("val", X_val, y["val"], self.train.X.dtype)
        self.test = None if X_test is None else Split("test", X_test, y["test"], self.train.X.dtype)
        check_columns(inputs)
        for split in self.splits.values():
            if split.X.shape[0] != self.train.X.shape[0]:
                raise ValueError(
                    f"X_{split.name} has {split.X.shape[0]} features, but X_train has {self.train.X.shape[0]}."
                )
            if split.X.device != self.train.X.device:
                raise ValueError(f"X_{split.name} is on {split.X.device}, but X_train on {self.train.X.device}.")

    @property
    def splits(self) -> Mapping[str, Split]:
        """The parts of the data by name."""
        parts = {"train": self.train, "val": self.val}
        return parts if self.test is None else parts | {"test": self.test}

    def refuse_options(self, unknown: Mapping[str, Any]) -> None:
        """Refuse options that this problem does not have, with what to do in place of the first."""
        for name in unknown:
            remedy = ABSENT.get(name, "its options are in help(bilevel.problems." + type(self).__name__ + ")")
            raise ValueError(f"`{name}` is no option of {type(self).__name__}: {remedy}.")

    def row_losses(self, params: Tree, split: Split) -> Tensor | None:
        """Return the loss of every row of a split, whose mean is the outer loss; None where a problem does not say."""
        return None

    def constant_loss(self, split: Split) -> float | None:
        """Return the mean loss of a split under the best constant prediction of the training rows, or None."""
        return None

    def remark(self, params: Tree, hparams: Tree) -> str:
        """Say whether a constant predicts better than the model, or one row makes more than half of the outer loss."""
        rows, constant = self.row_losses(params, self.val), self.constant_loss(self.val)
        if rows is None or not bool(torch.isfinite(rows).all()):
            return ""
        result, loss, total = [], float(rows.mean()), float(rows.sum())
        if constant is not None and loss > constant * (1.0 + 1e-6):
            result.append(f"the outer loss {loss:.4g} is above {constant:.4g}, that of a constant prediction")
        if len(rows) >= ROWS and float(rows.max()) > 0.5 * total:
            share = float(rows.max()) / total
            result.append(f"row {int(rows.argmax()) + 1} of X_val alone makes {share:.0%} of the outer loss")
        return "; ".join(result)

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


Problem = TypeVar("Problem", bound=type[DataProblem])


def with_options_of(base: type[DataProblem]) -> Callable[[Problem], Problem]:
    """State the signature of a problem whose constructor hands on its arguments to a base, and adds options."""

    def stated(cls: Problem) -> Problem:
        made: Any = cls.__init__
        own, others = (inspect.signature(each).parameters.values() for each in (made, base.__init__))
        first = [each for each in others if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        new = [each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY]
        made.__signature__ = inspect.Signature([*first, *new, *(each for each in others if each not in first)])
        made.__annotations__ |= base.__init__.__annotations__  # in which configs look up the types of options
        return cls

    return stated
