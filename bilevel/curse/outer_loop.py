"""Unrolling inside a bilevel loop: warm start as an implicit truncation, and the order of the inner solvers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim import Adam

from bilevel.core import tree
from bilevel.core.options import is_int, is_list, is_number, is_positive, option, require
from bilevel.curse.methods import METHODS, method
from bilevel.curse.outcome import Claim, Experiment, Line, Outcome, Panel, count, seed_of_draws, some_of
from bilevel.curse.problems import gaussian, load
from bilevel.hypergrad import FullUnroll, TruncatedUnroll
from bilevel.inner import GradientDescent
from bilevel.outer import OuterOptimizer
from bilevel.problems import RidgeProblem


def _errors(outer: OuterOptimizer, steps: int) -> tuple[Tensor, Tensor]:
    """Run the loop; return the error of every hypergradient and the norm of the exact one."""
    errors, sizes = [], []
    for _ in range(steps):
        # The truth belongs to the hyperparameters before they move.
        exact = outer.problem.exact_hypergradient(outer.hparams)
        errors.append(tree.norm(outer.step().hypergradient - exact))
        sizes.append(tree.norm(exact))
    return torch.stack(errors), torch.stack(sizes)


@dataclass(frozen=True)
class WarmStarts(Experiment):
    """Warm against cold starts x truncation indices at equal budget (Mehmood et al. 2026, section 5).

    Ridge regression ``1/2 |X w - y|^2 + exp(u)/2 |w|^2`` with X of shape (200, columns), tuned on validation rows by
    Adam; the inner solver is gradient descent with 2/(L+l), and a cold start is standard Gaussian. N dropped derivative
    steps of K pay for omega N further iterations; the loop counts omega as 3.
    """

    columns: int = count(100)
    steps: int = count(40)
    dropped: Sequence[int] = (0, 5, 10, 15, 20, 30)
    outer_steps: int = count(30)
    draws: int = count(10)
    omega: int = count(3)
    lr: float = option(0.1, "a positive number", is_positive)
    seed: int = seed_of_draws()

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = is_list(self.dropped) and all(is_int(n, 0) and n < self.steps for n in self.dropped)
        require(self, "dropped", f"ints in 0..{self.steps - 1}, below `steps`", ok)

    def run(self) -> Outcome:
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
        medians = {key: value.median(0).values for key, value in result.items()}
        lines = [Line(f"{names[warm]}, N = {n}", outer, medians[warm, n]) for warm in names for n in shown]
        # The first step is cold for everybody.
        settled = {key: value[:, self.outer_steps // 2 :].median(1).values.median() for key, value in result.items()}
        middle = {warm: torch.stack([settled[warm, n] for n in self.dropped]) for warm in names}
        dropped = torch.tensor(list(self.dropped))
        right = [Line(f"{names[warm]}, any N", dropped, middle[warm], marks=True) for warm in names]
        error = "hypergradient error / first hypergradient"
        panels = [
            Panel("along the run", "outer step", error, lines),
            Panel("second half of the run", "dropped derivative steps $N$", error, right),
        ]
        title = f"Warm start as implicit truncation: K = {self.steps}, {self.columns} columns, {self.draws} draws"
        numbers = {f"{names[warm]} {n}": float(settled[warm, n]) for warm in names for n in self.dropped}
        return Outcome(title, [panels], self._claims(middle, (min(costs), max(costs))), numbers=numbers)

    def _run(self, draw: int, n: int, warm: bool) -> tuple[Tensor, float]:
        normal = gaussian(10_000 * self.seed + draw)
        X, X_val, weights = normal(200, self.columns), normal(200, self.columns), normal(self.columns)
        y, y_val = X @ weights + 5.0 * normal(200), X_val @ weights + 5.0 * normal(200)
        problem = RidgeProblem(X, y, X_val, y_val, loss="sum")
        u = problem.initial_hparams(0.0)
        values = torch.linalg.eigvalsh(problem.gram)
        # Adam moves the log penalty by at most about lr a step: one step size is stable for the whole loop.
        largest = math.exp(self.lr * self.outer_steps)
        h = 2.0 / float(values[0] + values[-1] + 1.0 / largest + largest)
        solver = GradientDescent(step_size=h, steps=self.steps + self.omega * n)
        estimator, start, adam = TruncatedUnroll(tail=self.steps - n), normal(self.columns), partial(Adam, lr=self.lr)
        outer = OuterOptimizer(problem, solver, estimator, u, adam, warm_start=warm, params=start, on_failure="return")
        errors, exact = _errors(outer, self.outer_steps)
        # Relative to the first hypergradient: near the optimum the exact one vanishes.
        return errors / exact[0], outer.gradient_equivalents

    def _claims(self, middle: dict[bool, Tensor], budget: tuple[float, float]) -> list[Claim]:
        where = (
            f"ridge 200 x {self.columns}, K = {self.steps}, omega = {self.omega}, medians over {self.draws} draws and "
            f"the second half of {self.outer_steps} outer steps, {budget[0]:.0f} to {budget[1]:.0f} "
            "gradient-equivalents a run"
        )
        warm, cold = middle[True], middle[False]
        best_warm, best_cold = int(warm.argmin()), int(cold.argmin())
        w_0, c_0, w, c = (f"{float(each):.3g}" for each in (warm[0], cold[0], warm[best_warm], cold[best_cold]))
        at_warm, at_cold = f"at N = {self.dropped[best_warm]}", f"at N = {self.dropped[best_cold]}"
        acts = "warm start acts as a truncation: without dropped steps it beats a cold start"
        beats = "warm start without truncation beats the best truncation from a cold start"
        pays, too = "from a cold start, truncation pays at equal budget", "on top of a warm start, truncation pays too"
        gains = best_warm > 0 and bool(warm[best_warm] < 0.95 * warm[0])
        return [
            Claim("M section 5", acts, f"{w_0} warm against {c_0} cold at N = 0", bool(warm[0] < cold[0]), where),
            Claim("M section 5", beats, f"{w_0} against {c} {at_cold}", bool(warm[0] < cold[best_cold]), where),
            Claim("M section 4", pays, f"{c} {at_cold} against {c_0} at N = 0", best_cold > 0, where),
            Claim("M section 5", too, f"{w} {at_warm} against {w_0} at N = 0", gains, where),
        ]


@dataclass(frozen=True)
class InnerSolvers(Experiment):
    """The hypergradient's error with several inner solvers, unrolled from a cold start, inside a bilevel loop.

    Ridge regression on breast cancer as in `Methods`, tuned over theta; every second row validates. `start` is the
    value of every entry of x_0, `lr` that of Adam.
    """

    methods: Sequence[str] = some_of(METHODS, "GD 2/(L+l)", "Chebyshev", "Sobolev")
    steps: int = count(150)
    outer_steps: int = count(20)
    start: float = option(1.0, "a number", is_number)
    log_theta: float = option(-6.907755278982137, "a number", is_number)
    lr: float = option(0.02, "a positive number", is_positive)

    def run(self) -> Outcome:
        X, y = load("breast_cancer")
        problem = RidgeProblem(X, y, X[::2], y[::2], loss="sum")
        u = problem.initial_hparams(self.log_theta)
        values = torch.linalg.eigvalsh(problem.gram)
        # Bounds of the spectrum for every penalty that the loop visits.
        drift = self.lr * self.outer_steps
        l, L = (float(values[0]) + float((u - drift).exp()), float(values[-1]) + float((u + drift).exp()))  # noqa: E741
        lines, middle, adam = [], {}, partial(Adam, lr=self.lr)
        for label in self.methods:
            solver = replace(method(label, l, L), steps=self.steps)
            start = torch.full(problem.params_shape(), self.start, dtype=torch.float64)
            outer = OuterOptimizer(
                problem, solver, FullUnroll(), u, adam, warm_start=False, params=start, on_failure="return"
            )
            errors, exact = _errors(outer, self.outer_steps)
            errors = errors / exact
            lines.append(Line(label, torch.arange(1, self.outer_steps + 1), errors, marks=True))
            middle[label] = float(errors.median())
        where = f"ridge on breast_cancer, {self.steps} inner steps from x_0 = {self.start:g}, {self.outer_steps} outer"
        text = "the order of the Jacobians' errors shows in the hypergradients of a bilevel run"
        order = sorted(middle, key=lambda label: middle[label])
        number = ", ".join(f"{label}: {middle[label]:.3g}" for label in order)
        holds = [each for each in order if each in ("Sobolev", "Chebyshev", "GD 2/(L+l)")][:1] == ["Sobolev"]
        panel = Panel("breast cancer", "outer step", "relative hypergradient error", lines)
        claims = [Claim("S section 5", text, number, holds, where)]
        return Outcome("Inner solvers inside a bilevel run", [[panel]], claims, numbers=middle)
