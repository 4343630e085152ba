"""Unrolling inside a bilevel loop: warm start as an implicit truncation, and the order of the inner solvers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerSolver
from bilevel.core import tree
from bilevel.core.options import is_int, is_list, is_number, is_positive, require
from bilevel.curse.methods import METHODS, method
from bilevel.curse.outcome import Claim, Line, Outcome, Panel
from bilevel.curse.problems import load
from bilevel.engine.estimator import HypergradEstimator
from bilevel.hypergrad import FullUnroll, TruncatedUnroll
from bilevel.inner import GradientDescent
from bilevel.outer import OuterOptimizer
from bilevel.problems import RidgeProblem


def _errors(
    problem: RidgeProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tensor,
    params: Tensor,
    *,
    warm: bool,
    steps: int,
    lr: float,
) -> tuple[Tensor, Tensor, float]:
    """Run the loop.

    Returns:
        The error of every hypergradient, the norm of the exact one, and the cost in gradient-equivalents.
    """
    errors: list[Tensor] = []

    def look(outer: OuterOptimizer, estimate: Any) -> None:
        errors.append(tree.norm(estimate.hypergradient - exact[-1]))

    exact: list[Tensor] = []
    outer = OuterOptimizer(
        problem,
        solver,
        estimator,
        hparams,
        lambda tensors: torch.optim.Adam(tensors, lr=lr),
        warm_start=warm,
        params=params,
        callbacks=[look],
        on_failure="return",
    )
    for _ in range(steps):
        # The truth belongs to the hyperparameters before they move.
        exact.append(problem.exact_hypergradient(outer.hparams))
        outer.run(1, progress=False)
    return torch.stack(errors), torch.stack([tree.norm(each) for each in exact]), outer.gradient_equivalents


@dataclass(frozen=True)
class WarmStarts:
    """Warm against cold starts x truncation indices at equal budget (Mehmood et al. 2026, section 5).

    Ridge regression ``1/2 |X w - y|^2 + exp(u)/2 |w|^2`` with X of shape (200, columns), tuned on validation rows by
    Adam; the inner solver is gradient descent with 2/(L+l), and a cold start is standard Gaussian. N dropped derivative
    steps pay for omega N further iterations.

    Args:
        columns: size of w.
        steps: inner steps K without truncation.
        dropped: numbers N of dropped derivative steps.
        outer_steps: steps of the outer loop.
        draws: problems.
        omega: cost of one derivative step in iterations; the loop counts 3.
        lr: learning rate of Adam over the log penalty.
        seed: of the draws.
    """

    columns: int = 100
    steps: int = 40
    dropped: Sequence[int] = (0, 5, 10, 15, 20, 30)
    outer_steps: int = 30
    draws: int = 10
    omega: int = 3
    lr: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("columns", "steps", "outer_steps", "draws", "omega"):
            require(self, name, "a positive int", is_int(getattr(self, name)))
        ok = is_list(self.dropped) and all(is_int(n, 0) and n < self.steps for n in self.dropped)
        require(self, "lr", "a positive number", is_positive(self.lr))
        require(self, "dropped", f"ints in 0..{self.steps - 1}, below `steps`", ok)
        require(self, "seed", "an int in 0..999999", is_int(self.seed, 0) and self.seed < 1_000_000)

    def run(self) -> Outcome:
        """Run it."""
        names = {True: "warm", False: "cold"}
        result: dict[tuple[bool, int], Tensor] = {}
        costs = []
        for n in self.dropped:
            for warm in names:
                runs = [self._run(draw, n, warm) for draw in range(self.draws)]
                result[warm, n] = torch.stack([errors for errors, _ in runs])
                costs += [cost for _, cost in runs]
        shown = sorted({self.dropped[0], self.dropped[len(self.dropped) // 2]})
        outer = torch.arange(1, self.outer_steps + 1)
        lines = [
            Line(f"{names[warm]}, N = {n}", outer, result[warm, n].median(0).values) for warm in names for n in shown
        ]
        # The first step is cold for everybody.
        settled = {key: value[:, self.outer_steps // 2 :].median(1).values for key, value in result.items()}
        numbers_dropped = torch.tensor(list(self.dropped))
        middle = {warm: torch.stack([settled[warm, n].median() for n in self.dropped]) for warm in names}
        right = [Line(f"{names[warm]}, any N", numbers_dropped, middle[warm], marks=True) for warm in names]
        error = "hypergradient error / first hypergradient"
        panels = [
            Panel("along the run", "outer step", error, lines),
            Panel("second half of the run", "dropped derivative steps $N$", error, right),
        ]
        budget = (min(costs), max(costs))
        title = f"Warm start as implicit truncation: K = {self.steps}, {self.columns} columns, {self.draws} draws"
        return Outcome(
            title,
            [panels],
            self._claims(middle, budget),
            numbers={
                f"{names[warm]} {n}": float(value)
                for warm in names
                for n, value in zip(self.dropped, middle[warm], strict=True)
            },
        )

    def _run(self, draw: int, n: int, warm: bool) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(10_000 * self.seed + draw)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        X, X_val, weights = normal(200, self.columns), normal(200, self.columns), normal(self.columns)
        y, y_val = X @ weights + 5.0 * normal(200), X_val @ weights + 5.0 * normal(200)
        problem = RidgeProblem(X, y, X_val, y_val, loss="sum")
        u = problem.initial_hparams(0.0)
        values = torch.linalg.eigvalsh(problem.gram)
        # Adam moves the log penalty by at most about lr a step: one step size is stable for the whole loop.
        largest = math.exp(self.lr * self.outer_steps)
        h = 2.0 / float(values[0] + values[-1] + 1.0 / largest + largest)
        solver = GradientDescent(step_size=h, steps=self.steps + self.omega * n)
        errors, exact, cost = _errors(
            problem,
            solver,
            TruncatedUnroll(tail=self.steps - n),
            u,
            normal(self.columns),
            warm=warm,
            steps=self.outer_steps,
            lr=self.lr,
        )
        # Relative to the first hypergradient: near the optimum the exact one vanishes.
        return errors / exact[0], cost

    def _claims(self, middle: dict[bool, Tensor], budget: tuple[float, float]) -> list[Claim]:
        where = (
            f"ridge 200 x {self.columns}, K = {self.steps}, omega = {self.omega}, medians over {self.draws} draws and "
            f"the second half of {self.outer_steps} outer steps, {budget[0]:.0f} to {budget[1]:.0f} "
            "gradient-equivalents a run"
        )
        warm, cold = middle[True], middle[False]
        best_warm, best_cold = int(warm.argmin()), int(cold.argmin())
        dropped = self.dropped
        return [
            Claim(
                "M section 5",
                "warm start acts as a truncation: without dropped steps it beats a cold start",
                f"{float(warm[0]):.3g} warm against {float(cold[0]):.3g} cold at N = 0",
                bool(warm[0] < cold[0]),
                where,
            ),
            Claim(
                "M section 5",
                "warm start without truncation beats the best truncation from a cold start",
                f"{float(warm[0]):.3g} against {float(cold[best_cold]):.3g} at N = {dropped[best_cold]}",
                bool(warm[0] < cold[best_cold]),
                where,
            ),
            Claim(
                "M section 4",
                "from a cold start, truncation pays at equal budget",
                f"{float(cold[best_cold]):.3g} at N = {dropped[best_cold]} against {float(cold[0]):.3g} at N = 0",
                best_cold > 0,
                where,
            ),
            Claim(
                "M section 5",
                "on top of a warm start, truncation pays too",
                f"{float(warm[best_warm]):.3g} at N = {dropped[best_warm]} against {float(warm[0]):.3g} at N = 0",
                best_warm > 0 and bool(warm[best_warm] < 0.95 * warm[0]),
                where,
            ),
        ]


@dataclass(frozen=True)
class InnerSolvers:
    """The hypergradient's error with several inner solvers, unrolled from a cold start, inside a bilevel loop.

    Ridge regression on breast cancer as in `Methods`, tuned over theta; every second row validates.

    Args:
        methods: labels of methods.
        steps: inner steps K.
        outer_steps: steps of the outer loop.
        start: the value of every entry of x_0.
        log_theta: where the log penalty starts.
        lr: learning rate of Adam.
    """

    methods: Sequence[str] = ("GD 2/(L+l)", "Chebyshev", "Sobolev")
    steps: int = 150
    outer_steps: int = 20
    start: float = 1.0
    log_theta: float = -6.907755278982137
    lr: float = 0.02

    def __post_init__(self) -> None:
        known = is_list(self.methods) and all(name in METHODS for name in self.methods)
        require(self, "methods", f"a list of some of {', '.join(METHODS)}", known)
        for name in ("steps", "outer_steps"):
            require(self, name, "a positive int", is_int(getattr(self, name)))
        for name in ("start", "log_theta"):
            require(self, name, "a number", is_number(getattr(self, name)))
        require(self, "lr", "a positive number", is_positive(self.lr))

    def run(self) -> Outcome:
        """Run it."""
        X, y = load("breast_cancer")
        problem = RidgeProblem(X, y, X[::2], y[::2], loss="sum")
        u = problem.initial_hparams(self.log_theta)
        values = torch.linalg.eigvalsh(problem.gram)
        # Bounds of the spectrum for every penalty that the loop visits.
        drift = self.lr * self.outer_steps
        l, L = (float(values[0]) + float((u - drift).exp()), float(values[-1]) + float((u + drift).exp()))  # noqa: E741
        outer = torch.arange(1, self.outer_steps + 1)
        lines, middle = [], {}
        for label in self.methods:
            solver = replace(method(label, l, L), steps=self.steps)
            start = torch.full(problem.params_shape(), self.start, dtype=torch.float64)
            errors, exact, _ = _errors(
                problem, solver, FullUnroll(), u, start, warm=False, steps=self.outer_steps, lr=self.lr
            )
            errors = errors / exact
            lines.append(Line(label, outer, errors, marks=True))
            middle[label] = float(errors.median())
        where = f"ridge on breast_cancer, {self.steps} inner steps from x_0 = {self.start:g}, {self.outer_steps} outer"
        order = sorted(middle, key=lambda label: middle[label])
        claims = [
            Claim(
                "S section 5",
                "the order of the Jacobians' errors shows in the hypergradients of a bilevel run",
                ", ".join(f"{label}: {middle[label]:.3g}" for label in order),
                [each for each in order if each in ("Sobolev", "Chebyshev", "GD 2/(L+l)")][:1] == ["Sobolev"],
                where,
            )
        ]
        panel = Panel("breast cancer", "outer step", "relative hypergradient error", lines)
        return Outcome("Inner solvers inside a bilevel run", [[panel]], claims, numbers=middle)
