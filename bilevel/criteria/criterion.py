"""`Criterion`: a loss of held-out predictions as a function of the log penalties of a linear model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.core.status import warn
from bilevel.criteria.data import LinearData, Rows
from bilevel.criteria.penalties import Penalties
from bilevel.numerics.csr import csr
from bilevel.numerics.small import array, to_numpy, weighted_gram
from bilevel.problems.losses import GLMLoss

Array = NDArray[np.float64]
Folds = Sequence[tuple[Tensor, Tensor]]
"""Indices of training rows and of validation rows, for every fold."""
T = TypeVar("T")

NOISELESS = 1e-4
"""Of the loss of a constant prediction, what a hyperprior is measured in at least."""
HALF = 0.5
"""A row with more than this part of the loss is named."""
WEAK = 15.0
"""Log penalties this far below `LinearData.level` are judged: what rounding moves there counts as not found."""
MOVED = 2e-3
"""Share of a value, or of a gradient, that the rounding of X may move; see `scripts/studies/weak_penalties.py`."""
UNSOLVED = (
    "models at a log penalty of {:.0f} were not found, so that the criterion counts as infinite there: give a stronger "
    "penalty, or leave out columns that depend on each other."
)


@dataclass(frozen=True, eq=False)
class Fit:
    """A linear model in the units of the X that was given.

    Attributes:
        coef: of shape (features,), or (outputs, features).
        intercept: of shape (), or (outputs,).
    """

    coef: Tensor
    intercept: Tensor

    def predict(self, X: Tensor) -> Tensor:
        """Return the predictions of rows of shape (rows, features): (rows,), or (outputs, rows)."""
        z = X @ self.coef if self.coef.dim() == 1 else (X @ self.coef.T).T
        return z + self.intercept[..., None]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A criterion at some log penalties.

    Attributes:
        value: the weighted mean loss of the held-out rows.
        slope: what `gradient` is, or what returns that.
        model: the Gauss-Newton matrix where it is not that of `jacobian`; else None.
        losses: of every held-out row, weighted so that their mean is `value`; in the order of `Criterion.held_out`.
        predictions: of the held-out rows, (rows,) or (outputs, rows).
        slopes: derivatives of the weighted losses by the predictions, shaped as these: ``gradient = J' slopes / rows``.
        curvatures: second derivatives, shaped as the predictions (of softmax, its probabilities; see `GLMLoss`).
        jacobian: derivatives J of the predictions by the log penalties, (rows, k) or (outputs, rows, k); None where not
            asked for. Of approximate leave-one-out, without the terms that the Gauss-Newton model leaves out, unless
            `full` is set.
        warm: what a next evaluation near by starts from.
    """

    value: float
    slope: Array | Callable[[], Array]
    model: Array | None
    losses: Array
    predictions: Tensor
    slopes: Tensor
    curvatures: Tensor
    jacobian: Tensor | None
    warm: Any = None

    @cached_property
    def gradient(self) -> Array:
        """The derivatives of the value by the log penalties, of shape (k,)."""
        return self.slope() if callable(self.slope) else self.slope

    @cached_property
    def gauss_newton(self) -> Array | None:
        """``J' diag(curvatures) J / rows``, (k, k), positive semidefinite; None where not asked for."""
        if self.model is not None or self.jacobian is None:
            return self.model
        J, curvatures = self.jacobian.reshape(-1, self.jacobian.shape[-1]), self.curvatures.reshape(-1)
        return to_numpy(weighted_gram(array(J), array(curvatures))) / len(self.losses)


class shared(Generic[T]):
    """A property that is computed once for a criterion and all that `with_penalties` makes of it."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, criterion: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self, criterion: Criterion, owner: type[Any]) -> T: ...
    def __get__(self, criterion: Criterion | None, owner: type[Any]) -> Self | T:
        if criterion is None:
            return self
        if self.name not in criterion.known:
            criterion.known[self.name] = self.compute(criterion)
        return criterion.known[self.name]


class Criterion(ABC):
    """A held-out loss of the linear model with penalties ``a = exp(u)``, and its derivatives by u.

        w(u) = argmin sum_i s_i loss(x_i'w + b, y_i) + 1/2 sum_j a_j w_j^2

    with standardised columns, an intercept b that is not penalised, and weights s of mean 1. A criterion has no hidden
    state: two evaluations at one u are equal, whatever happened between them, up to the tolerance of the inner solve.
    Where models or their derivatives are not found, such as at penalties that are lost in rounding, a `BilevelWarning`
    says so and the value is infinite, so that searches leave such penalties.

    Args:
        data: the rows.
        loss: of a row's prediction.
        penalties: which coefficients share a penalty.

    Attributes:
        folds: pairs of training and validation rows; none where rows are left out singly, or not at all.

    Raises:
        ValueError: in one sentence, where they do not fit.
    """

    name: ClassVar[str] = "criterion"
    """What reports call it."""
    folds: Folds = ()
    leaves_one_out: ClassVar[bool] = False
    """Whether it leaves out every row singly: losses, slopes and the Jacobian are of all rows, in their order."""
    least: float = 0.0
    """One minus a leverage is at least this: a row that decides its prediction alone has no leave-one-out error."""
    tol: float = 0.0
    """Relative decrease of the training objective that models may be away from their minima."""

    def __init__(self, data: LinearData, loss: GLMLoss, penalties: Penalties) -> None:
        _check(data, loss, penalties)
        self.data, self.loss, self.penalties = data, loss, penalties
        self.known: dict[str, Any] = {}

    @shared
    def held_out(self) -> Tensor:
        """The indices of the rows that losses are of, in their order: of folds, one after the other."""
        return torch.cat([held for _, held in self.folds]) if self.folds else torch.arange(self.data.rows)

    @shared
    def share(self) -> Tensor:
        """The weights of the held-out rows, with mean one."""
        weights = self.data.weights[self.held_out]
        return weights / weights.mean()

    def unit(self, single: float) -> float:
        """Return what a hyperprior is measured in: 1 for a log likelihood, else the criterion of the best one penalty.

        That is near the noise, of which tuned penalties save a part. It is at least a small part of the loss of the
        best constant prediction, for rows that are interpolated have none.

        Args:
            single: the criterion of the best one penalty.
        """
        if self.loss.likelihood:
            return 1.0
        y, share = self.data.y, self.data.weights / self.data.rows
        constant = (y * share).sum(-1, keepdim=True) if self.data.intercept else y.new_zeros(*y.shape[:-1], 1)
        spread = float((self.loss.value(constant.expand(y.shape), y) * share).sum(-1).mean())
        return max(single, NOISELESS * spread) or 1.0

    def evaluate(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        """Return value and gradient at log penalties, and the Gauss-Newton model: those of `compute`, judged.

        A subclass gives `compute`; one that gives this method in its place is taken at its word.

        Args:
            u: log penalties, of shape (k,).
            warm: the `warm` of an evaluation near by.
            second: whether the Gauss-Newton matrix and the Jacobian are needed.
            full: whether the Jacobian has to be exact, where a model leaves terms out.
        """
        return self._judged(u, self.compute(u, warm, second=second, full=full))

    def compute(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        """Return what `evaluate` does, whatever rounding does to it; a value that was not found is not finite."""
        raise NotImplementedError(f"{type(self).__name__} has to define compute(u, warm, *, second, full).")

    def _judged(self, u: Array, found: Evaluation) -> Evaluation:
        """Return an evaluation, infinite with a warning where it was not found, or where rounding moves it."""
        right = np.isfinite(found.value)
        if right and np.min(u) < self.data.level - WEAK:
            others = [each.with_penalties(self.penalties) for each in self._shaken]
            with np.errstate(all="ignore"):
                right = all(self._agree(found, each.compute(u, second=False)) for each in others)
        if not right:
            warn_unsolved(u)
        return found if right else replace(found, value=np.inf)

    @shared
    def _shaken(self) -> list[Self]:
        """The same criterion of X with other rounding errors and limits."""
        made = []
        for seed in range(2):
            other = copy.copy(self)
            other.known, other.data = {}, _shaken(self.data, seed)
            other.least, other.tol = (2.0 + seed) * self.least, 0.01 * self.tol
            made.append(other)
        return made

    @staticmethod
    def _agree(one: Evaluation, two: Evaluation) -> bool:
        """Whether two evaluations are the same but for `MOVED`, gradients but for half of the digits of the value."""
        off, size = np.linalg.norm(one.gradient - two.gradient), np.linalg.norm(one.gradient)
        few = np.finfo(np.float64).eps ** 0.5 * abs(one.value)
        # Written so that NaN is not.
        return bool(abs(one.value - two.value) <= MOVED * abs(one.value) and off <= max(MOVED * size, few))

    def rough(self) -> Self:
        """Return the same criterion, evaluated as roughly as a first look allows: itself, where that saves nothing."""
        return self

    def coarse(self) -> Self:
        """Return the same criterion, with models as near their minima as a fold's losses need: itself by default."""
        return self

    def scan(self, u: Array) -> list[Evaluation]:
        """Return evaluations, without second derivatives, at several u, (m, k), on a line.

        The default goes through all of them in their order, each warm from the one before: begin with strong penalties,
        which cost least. A criterion may have several minima, so it ends nowhere before.
        """
        found: list[Evaluation] = []
        for each in u:
            found.append(self.evaluate(each, found[-1].warm if found else None, second=False))
        return found

    @abstractmethod
    def refit(self, u: Array, warm: Any = None) -> Fit:
        """Return the model of all rows at log penalties."""

    def fits(self, evaluation: Evaluation) -> list[tuple[Fit, Tensor]] | None:
        """Return the model of every fold with the rows that it has not seen; None where rows are left out singly."""
        return None

    @abstractmethod
    def take(self, rows: Rows) -> Self:
        """Return the same criterion of some of the rows, standardised by themselves."""

    def with_penalties(self, penalties: Penalties) -> Self:
        """Return the same criterion with other penalties; what is known of the data is shared."""
        _check(self.data, self.loss, penalties)
        other = copy.copy(self)
        other.penalties = penalties
        return other

    def remark(self, evaluation: Evaluation) -> str:
        """Name a row that makes more than half of the criterion; empty where none does."""
        if self.leaves_one_out and not evaluation.losses.max() > HALF * evaluation.losses.sum():
            return ""
        held = self.held_out.cpu().numpy()
        losses = np.bincount(held, evaluation.losses)  # folds may hold out a row several times
        worst = int(losses.argmax())
        if len(np.unique(held)) < 3 or not losses[worst] > HALF * losses.sum():
            return ""
        share = losses[worst] / losses.sum()
        return f"row {worst} (counted from 0) alone makes {share:.0%} of the criterion: look at it."

    def accuracy(self, evaluation: Evaluation) -> str:
        """Say how well an evaluation is known, where it is an estimate; else empty."""
        return ""

    def weighted(self, losses: Tensor) -> Tensor:
        """Return losses of every row, (rows,) or (targets, rows), times its weight, of targets the mean."""
        losses = losses * self.data.weights
        return losses if losses.dim() == 1 else losses.mean(0)

    def given(self, w: Tensor, intercept: Tensor) -> Fit:
        """Return the model of standardised coefficients in the units of the X that was given."""
        return given(self.data, w, intercept)


def warn_unsolved(u: Array) -> None:
    """Warn that models at some log penalties were not found."""
    warn(UNSOLVED.format(np.min(u)))


def given(data: LinearData, w: Tensor, intercept: Tensor | float) -> Fit:
    """Return the models of standardised coefficients, (..., features), in the units of the X that was given."""
    coef = w / data.scale
    return Fit(coef, intercept - coef @ data.offset)


def _shaken(data: LinearData, seed: int) -> LinearData:
    """Return data with other rounding errors: some units of the last place of X, drawn from a seed."""
    X, generator = data.X, torch.Generator().manual_seed(seed)
    values = X.values() if data.sparse else X
    unit = 4.0 * torch.finfo(values.dtype).eps
    values = values * (1.0 + unit * torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values))
    shape = data.rows, data.features
    return replace(data, X=csr(X.crow_indices(), X.col_indices(), values, shape) if data.sparse else values)


def _check(data: LinearData, loss: GLMLoss, penalties: Penalties) -> None:
    if penalties.owner.shape[-1] != data.features:
        raise ValueError(
            f"penalties cover {penalties.owner.shape[-1]} features, but X has {data.features}: name each feature once."
        )
    single = loss.outputs(data.y) if data.y.dim() == 1 else len(data.y)
    if (penalties.outputs is None) != (single is None) or (penalties.outputs or 0) < (single or 0):
        wanted = "one" if single is None else str(single)
        raise ValueError(f"penalties are of {penalties.outputs or 'one'} outputs, but the data have {wanted}.")
