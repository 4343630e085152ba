"""Problems on any device, and one row for each solver and estimator: what a step of it may ask of an accelerator.

A new solver or estimator takes one line here; `scripts/gpu_check.py` runs the same rows on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def dictionary(device: Any) -> Placed:
    """A general loss of a dict of tensors, by autograd: a small net with two weight decays."""
    X, y = normal(31, 30, 3).to(device), normal(32, 30).to(device)
    X_val, y_val = normal(33, 20, 3).to(device), normal(34, 20).to(device)

    def predict(p: Any, X: Tensor) -> Tensor:
        return torch.tanh(X @ p["first"]) @ p["last"] + p["shift"]

    def inner(p: Any, h: Any) -> Tensor:
        decay = h["decay"].exp()
        penalty = decay[0] * p["first"].square().sum() + decay[1] * (p["last"].square().sum() + p["shift"] ** 2)
        return (predict(p, X) - y).square().mean() + penalty

    start = {
        "first": 0.5 * normal(35, 3, 4),
        "last": 0.5 * normal(36, 4),
        "shift": torch.zeros((), dtype=torch.float64),
    }
    hparams = {"decay": torch.tensor([-1.0, -1.0], dtype=torch.float64)}
    problem = bl.BilevelProblem(
        inner,
        lambda p, h: (predict(p, X_val) - y_val).square().mean(),
        bl.tree.tree_map(lambda leaf: leaf.to(device), start),
    )
    return Placed(problem, bl.tree.tree_map(lambda leaf: leaf.to(device), hparams))


@dataclass(frozen=True)
class ProblemRow:
    """Kernels of one call of an oracle; those of `hvp` and `vjp` come at a linearization that has been used once."""

    make: Callable[[Any], Placed]
    grad: int
    hvp: int
    vjp: int
    reason: str


PROBLEMS = {
    "quadratic": ProblemRow(quadratic, 1, 1, 4, "H x + b is one product; C' v takes a product, a sum, a product"),
    "ridge": ProblemRow(lambda d: _linear_model(RidgeProblem, 0, "per_feature", d), 1, 1, 4, ""),
    "logistic": ProblemRow(lambda d: _linear_model(LogisticProblem, 2, "per_feature", d), 9, 5, 8, ""),
    "softmax": ProblemRow(lambda d: _linear_model(SoftmaxProblem, 3, "per_class", d), 9, 9, 9, ""),
    "dictionary": ProblemRow(dictionary, 60, 90, 90, ""),
}


def system(size: int, device: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A symmetric positive definite matrix as (matvec, right-hand side, matrix), too hard for a few dozen steps."""
    matrix, b = spd(41, size, 1e6).to(device), normal(42, size).to(device)
    return lambda v: matrix @ v, b, matrix
