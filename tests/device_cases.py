"""Problems on any device, and a row for each variant of an estimator: what a step of it may ask of an accelerator.

The rows of solvers stand in `helpers`. `scripts/studies/gpu_check.py` runs the same rows on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import helpers
import torch
from helpers import normal, spd
from torch import Tensor

import bilevel as bl
from bilevel.problems import LogisticProblem, QuadraticProblem, RidgeProblem, SoftmaxProblem

# Problems -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A problem on a device, with hyperparameters there."""

    problem: bl.BilevelProblem
    hparams: Any


def quadratic(device: Any) -> Placed:
    """Closed forms of one or two kernels: what is left is the solver's own."""
    made = QuadraticProblem.random(12, 3, condition=8.0, seed=3)
    parts = (made.hessian, made.linear, made.hessian_directions, made.linear_directions, made.target)
    return Placed(QuadraticProblem(*(part.to(device) for part in parts)), (0.3 * normal(5, 3)).to(device))


def _linear_model(family: Any, classes: int, penalty: str, device: Any) -> Placed:
    X, X_val = normal(1, 40, 5), normal(2, 20, 5)
    scores, scores_val = X @ normal(3, 5, max(classes, 1)), X_val @ normal(3, 5, max(classes, 1))
    if not classes:
        y, y_val = scores[:, 0] + normal(4, 40), scores_val[:, 0] + normal(5, 20)
    else:
        y, y_val = (s.argmax(1) + 0.0 * s[:, 0] for s in (scores, scores_val))
    problem = family(*(part.to(device) for part in (X, y, X_val, y_val)), penalty)
    return Placed(problem, problem.initial_hparams(-1.5))


def scalar_ridge(device: Any) -> Placed:
    """Ridge regression with one penalty: its Hessians share an eigenbasis."""
    return _linear_model(RidgeProblem, 0, "scalar", device)


def dictionary(device: Any) -> Placed:
    """A general loss of a dict of tensors, by autograd: a small net with two weight decays towards its start."""
    X, y = normal(31, 30, 3).to(device), normal(32, 30).to(device)
    X_val, y_val = normal(33, 20, 3).to(device), normal(34, 20).to(device)
    start = {"first": normal(35, 3, 4), "last": normal(36, 4), "shift": torch.zeros((), dtype=torch.float64)}
    start = bl.tree.tree_map(lambda leaf: leaf.to(device), start)

    def predict(p: Any, X: Tensor) -> Tensor:
        return torch.tanh(X @ p["first"]) @ p["last"] + p["shift"]

    def inner(p: Any, h: Any) -> Tensor:
        decay = h["decay"].exp()
        away = bl.tree.add(p, start, -1.0)
        penalty = decay[0] * away["first"].square().sum() + decay[1] * (
            away["last"].square().sum() + away["shift"] ** 2
        )
        return (predict(p, X) - y).square().mean() + penalty

    def outer(p: Any, h: Any) -> Tensor:
        return (predict(p, X_val) - y_val).square().mean()

    decay = torch.zeros(2, dtype=torch.float64, device=device)
    return Placed(bl.BilevelProblem(inner, outer, start), {"decay": decay})


@dataclass(frozen=True)
class ProblemRow:
    """Kernels of one call of an oracle, at most; `vjp` is that of a new linearization, as a reverse sweep calls it."""

    make: Callable[[Any], Placed]
    grad: int
    vjp: int
    reason: str


PROBLEMS = {
    "quadratic": ProblemRow(quadratic, 1, 4, "H x + b is one; H v one; C' v a product, a sum and a product"),
    "ridge": ProblemRow(
        partial(_linear_model, RidgeProblem, 0, "per_feature"), 1, 3, "on the Gram matrix; C' v is two"
    ),
    "logistic": ProblemRow(
        partial(_linear_model, LogisticProblem, 2, "per_feature"),
        *(9, 12),
        "two products with X, five kernels for the slope, scale and penalty; curvature four, H v five, C' v two, a sum",
    ),
    "softmax": ProblemRow(
        partial(_linear_model, SoftmaxProblem, 3, "per_class"),
        8,
        13,
        "two products with X, scale and penalty; the slope is a softmax and three for the labels; its bend five",
    ),
    "dictionary": ProblemRow(dictionary, 45, 101, "what autograd launches for a loss of 18 operations: no closed form"),
}


def system(size: int, device: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A symmetric positive definite matrix as (matvec, right-hand side, matrix), too hard for a few dozen steps."""
    matrix, b = spd(41, size, 1e6).to(device), normal(42, size).to(device)
    return lambda v: matrix @ v, b, matrix


SOLVERS = {cls.__name__: row for cls, row in helpers.SOLVERS.items()}
LINEAR_SOLVERS = {cls.__name__: row for cls, row in helpers.LINEAR_ROWS.items()}


# Estimators: kernels of one inner step of gradient descent on the quadratic, differentiated --------------------------


@dataclass(frozen=True)
class EstimatorRow:
    """An estimator, the most kernels that one inner step costs with it, and the looks of a whole short hypergradient.

    Attributes:
        estimator: the estimator.
        kernels: per inner step, its share of the derivative included.
        looks: times that a hypergradient of 64 steps waits in all, in every call with a problem but the first: 3 for
            the residuals of each run (one look for both ends), the outer loss and the hypergradient; with `Implicit`,
            which no tolerance ends here, one for what the outer loss is away from its value at the solution; the rest
            is the adjoint system's.
        reason: where the kernels come from.
        runs: inner runs that one hypergradient takes.
        flat: whether they run on flat vectors: no step is looked at, but once the curvature and once the end.
        agreement: relative distance between two devices that rounding explains.
    """

    estimator: bl.HypergradEstimator
    kernels: float
    looks: int
    reason: str
    flat: bool = False
    runs: int = 1
    agreement: float = 1e-10


ESTIMATORS = {
    "unroll": EstimatorRow(bl.FullUnroll(), 0.5, 5, "doubled there and back", flat=True),
    "graph": EstimatorRow(bl.FullUnroll(memory="graph"), 35, 3, "autograd records every operation of the loss"),
    "forward": EstimatorRow(bl.FullUnroll(mode="forward"), 6, 4, "step two; all tangents together four", flat=True),
    "truncated": EstimatorRow(bl.TruncatedUnroll(tail=0.5), 0.5, 5, "doubled there and back", flat=True),
    "one step": EstimatorRow(helpers.BIASED_ESTIMATORS[bl.OneStep], 0.5, 5, "doubled there; one step back", flat=True),
    "auto tail": EstimatorRow(bl.AdaptiveUnroll(), 12, 7, "as unroll; the step's length, adjoint sums"),
    "extrapolated": EstimatorRow(
        bl.AdaptiveUnroll(tail=0.5, extrapolate=True), 8, 9, "as truncated; the step's length, adjoint sums"
    ),
    "implicit": EstimatorRow(bl.Implicit(), 0.5, 12, "doubled; no step is differentiated", flat=True),
    "balanced": EstimatorRow(bl.BalancedImplicit(), 4, 20, "step two, the step's length two; the error"),
    "auto": EstimatorRow(bl.Auto(memory_limit=1.0), 0.5, 12, "implicit with so little memory", flat=True),
    "differences": EstimatorRow(
        bl.FiniteDifference(), 13, 14, "two runs by steps for each of three hyperparameters", runs=6, agreement=1e-6
    ),
    **{
        f"implicit {name}": EstimatorRow(bl.Implicit(row.solver), 0.5, row.looks + 2, "doubled", flat=True)
        for name, row in LINEAR_SOLVERS.items()
    },
}

DIRECT = {"first order": helpers.BIASED_ESTIMATORS[bl.FirstOrder]}
"""Estimators that need an outer loss in which every hyperparameter appears."""

ON_THE_SPECTRUM = {cls.__name__: each for cls, each in helpers.QUADRATIC_ESTIMATORS.items()}
"""Estimators for ridge regression whose work does not grow with the steps."""

BUDGETED = {
    "auto tail, budget": bl.AdaptiveUnroll(budget=100),
    "extrapolated, budget": bl.AdaptiveUnroll(budget=100, tail=0.5, extrapolate=True),
    "balanced, budget": bl.BalancedImplicit(budget=100),
}
"""Estimators that share a budget decide how to go on while they run: their looks depend on what they find, and products
that an accelerator computes in vain are paid from the same budget."""
