"""Random problems whose hypergradient is known: ridge and logistic regression with the outer loss ``v'w``.

With one penalty for each weight, the hypergradient is one VJP of the solution map,

    g* = -(d pen/du) w* H(w*)^-1 v     (entry by entry), w* by Newton's method
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerState
from bilevel.curse.methods import method
from bilevel.data.sources import read_bundled
from bilevel.inner import LinearMultistep
from bilevel.inner.newton import newton_to_rounding
from bilevel.problems import LogisticProblem, RidgeProblem

FAMILIES = ("M", "ridge", "logistic", "ill-conditioned")


class _LinearOuter:
    """The outer loss v'w."""

    v: Tensor

    def outer_loss(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.v @ params

    def outer_value_and_grads(self, params: Tensor, hparams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.v @ params, self.v, torch.zeros_like(hparams)


class LinearRidge(_LinearOuter, RidgeProblem):
    """Ridge regression with the outer loss v'w."""


class LinearLogistic(_LinearOuter, LogisticProblem):
    """Logistic regression with the outer loss v'w."""


Problem = LinearRidge | LinearLogistic
MakeSolver = Callable[[float, float], LinearMultistep]


@dataclass(frozen=True)
class Draw:
    """One problem, with a penalty for each weight, its solver, its start and its exact answer: w* and H(w*).

    Draws of a `group` are summed up together inside a family; `setting` tells them apart.
    """

    family: str
    group: str
    setting: str
    problem: Problem
    solver: LinearMultistep
    hparams: Tensor
    start: Tensor
    solution: Tensor
    hessian: Tensor

    @cached_property
    def slope(self) -> Tensor:
        """Derivative of the penalties by the hyperparameters."""
        slope: Tensor = self.problem.bind(self.hparams).slope  # type: ignore[attr-defined]
        return slope

    @cached_property
    def truth(self) -> Tensor:
        """The exact hypergradient."""
        return -self.slope * self.solution * torch.linalg.solve(self.hessian, self.problem.v)

    @property
    def quadratic(self) -> bool:
        """Whether the inner loss is quadratic."""
        return self.problem.structure.quadratic

    @property
    def step(self) -> tuple[float, float]:
        """Step size and momentum, as the numbers of a step tell them."""
        numbers = self.solver.coefficients(InnerState(None))
        return -numbers.write[0], -numbers.mix[0][1] if len(numbers.mix) > 1 else 0.0

    @property
    def looks_ahead(self) -> bool:
        """Whether momentum moves the point where the gradient is taken (Nesterov's method)."""
        return self.solver.coefficients(InnerState(None)).read[0] != 1.0

    @cached_property
    def rate(self) -> float:
        """Spectral radius of the inner map at the solution."""
        h, m = self.step
        decay = 1 - h * torch.linalg.eigvalsh(self.hessian)
        ahead = self.looks_ahead
        first, second = ((1 + m) * decay, -m * decay) if ahead else (m + decay, torch.full_like(decay, -m))
        rows = torch.stack([first, second, torch.ones_like(first), torch.zeros_like(first)], -1)
        return float(torch.linalg.eigvals(rows.reshape(-1, 2, 2)).abs().max())

    def error(self, hypergradient: Tensor) -> Tensor:
        """Return relative errors of hypergradients of shape (d, ...)."""
        truth = self.truth.reshape(-1, *(1,) * (hypergradient.dim() - 1))
        return torch.linalg.vector_norm(hypergradient - truth, dim=0) / torch.linalg.vector_norm(truth)


def draws(families: Sequence[str], columns: Sequence[int], steps: int, count: int, seed: int) -> Iterator[Draw]:
    """Yield `count` draws of each setting, family by family, with K = `steps`; `columns` are sizes of M's problem.

    The seed is that of the first draw of each setting; seed + count is at most 1000.
    """
    seeds = range(seed, seed + count)
    if "M" in families:
        yield from _gaussian(columns, steps, seeds)
    for kind in ("ridge", "logistic"):
        for index, name in enumerate(_DATA):
            if kind in families and name[0] == kind:
                yield from _tabular(*name, steps, seeds, index)
    if "ill-conditioned" in families:
        yield from _ill(steps, seeds)


def _generator(*seeds: int) -> torch.Generator:
    """Return a generator seeded by several numbers below 1000."""
    return torch.Generator().manual_seed(sum(seed * 1000**i for i, seed in enumerate(seeds)))


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _solution(problem: Problem, u: Tensor) -> Tensor:
    solution: Tensor = newton_to_rounding(problem.bind(u), u.new_zeros(problem.params_shape()))[0]
    return solution


def _drawn(
    names: tuple[str, str, str], problem: Problem, make: MakeSolver, u: Tensor, start: Tensor, v: Tensor
) -> Draw:
    """Solve, and give the solver the ends of the spectrum at the solution."""
    problem.v = v
    x = _solution(problem, u)
    hessian = problem.bind(u).linearize(x).dense_hessian()
    values = torch.linalg.eigvalsh(hessian)
    # Away from its solution, logistic regression may be steeper.
    largest = float(values[-1]) if problem.structure.quadratic else problem.bind(u).curvature(start).largest
    return Draw(*names, problem, make(float(values[0]), largest), u, start, x, hessian)


def _method(label: str, steps: int) -> MakeSolver:
    """Return a maker of a solver of `METHODS` from the ends of the spectrum; heavy ball begins with a full step."""
    changes: dict[str, Any] = {"first_step": "full"} if label == "heavy ball" else {}
    return lambda low, high: replace(method(label, low, high), steps=steps, **changes)


def _gaussian(columns: Sequence[int], steps: int, seeds: Sequence[int]) -> Iterator[Draw]:
    """M's problem: A of 200 x size, b, x_0 and v standard normal, penalties one."""
    for step in ("2/(L+l)", "1/L"):
        for size in columns:
            for seed in seeds:
                g = _generator(seed, size, 7)
                A, b, start, v = _normal(g, 200, size), _normal(g, 200), _normal(g, size), _normal(g, size)
                problem = LinearRidge(A, b, A, b, "per_feature", loss="sum", parametrization="direct")
                u = torch.ones(size, dtype=torch.float64)
                names = f"M, h = {step}", str(size), f"seed {seed}"
                yield _drawn(names, problem, _method(f"GD {step}", steps), u, start, v)


_DATA = (("ridge", "breast_cancer"), ("logistic", "breast_cancer"), ("ridge", "diabetes"), ("logistic", "digits"))


def _tabular(kind: str, name: str, steps: int, seeds: Sequence[int], index: int) -> Iterator[Draw]:
    """Regression on scikit-learn's data: a 70 % subsample, penalties, v and the start are drawn."""
    X, y = (torch.as_tensor(part, dtype=torch.float64) for part in read_bundled(name).parts[""])
    X = X[:, X.std(0) > 0]
    X = (X - X.mean(0)) / X.std(0)
    classes = (y >= 5).long() if name == "digits" else y.long()
    y = (y - y.mean()) / y.std() if kind == "ridge" else classes
    family = LinearRidge if kind == "ridge" else LinearLogistic
    size = X.shape[1]
    for label in ("GD 1/L", "Nesterov"):
        for warm in (False, True):
            for strength in (1e-2, 1e-1):
                for seed in seeds:
                    g = _generator(seed, index, 11)
                    rows = torch.randperm(len(y), generator=g)[: int(0.7 * len(y))]
                    problem = family(X[rows], y[rows], X[rows], y[rows], "per_feature")
                    u = math.log(strength) + 0.5 * _normal(g, size)
                    near = u + 0.1 * _normal(g, size)
                    start = _solution(problem, near) if warm else _normal(g, size)
                    group = f"{'warm' if warm else 'cold'} {label.removesuffix(' 1/L')}"
                    names = kind, group, f"{name}, penalty {strength:g}, seed {seed}"
                    yield _drawn(names, problem, _method(label, steps), u, start, _normal(g, size))


def _ill(steps: int, seeds: Sequence[int]) -> Iterator[Draw]:
    """Quadratics with log-uniform spectra, down to an inverse condition number of 1e-5."""
    size = 50
    for label in ("GD 1/L", "GD 2/(L+l)", "Nesterov", "heavy ball"):
        for power in (3, 4, 5):
            for seed in seeds:
                g = _generator(seed, power, 13)
                Q, _ = torch.linalg.qr(_normal(g, size, size))
                penalty = 10.0**-power / 100
                X = (torch.logspace(-power, 0, size, dtype=torch.float64) - penalty).sqrt()[:, None] * Q.t()
                y, start, v = _normal(g, size), _normal(g, size), _normal(g, size)
                problem = LinearRidge(X, y, X, y, "per_feature", loss="sum", parametrization="direct")
                u = torch.full((size,), penalty, dtype=torch.float64)
                names = "ill-conditioned", label.removeprefix("GD "), f"kappa 1e-{power}, seed {seed}"
                yield _drawn(names, problem, _method(label, steps), u, start, v)
