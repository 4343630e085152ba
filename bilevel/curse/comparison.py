"""Methods on one inner problem: function value and unrolled derivative, side by side (Scieur et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.core.options import is_bool, is_int, is_number, is_positive, option, require
from bilevel.curse.methods import METHODS, method
from bilevel.curse.outcome import Claim, Experiment, Line, Outcome, Panel, count, some_of
from bilevel.curse.problems import NAMES, DataMissingError, load, logistic, ridge
from bilevel.problems import LogisticProblem, RidgeProblem
from bilevel.theory import ErrorCurves, chebyshev_rate, error_curves, gd_rate
from bilevel.theory.sweeps import reference

MODELS = ("ridge", "ridge per feature", "logistic")
BURNS = 1.05
"""An error that never exceeds this multiple of its start is called one without a burn-in."""
FLOOR = 1e-13
"""Relative errors below this are rounding."""
LOWEST = 1e-20
"""Function values are drawn down to this: those of quadratics have no rounding floor above it."""


@dataclass(frozen=True)
class Methods(Experiment):
    """The error of x_k and of its unrolled derivative, for several methods and data sets.

    Ridge regression is ``1/2 |X w - y|^2 + theta/2 |w|^2`` with X and y divided by ``|X|_2``; with "per feature", theta
    is a vector, whose directions do not commute with the Hessian. Logistic regression is
    ``sum log(1 + exp(-y_i x_i'w)) + theta/2 |w|^2`` on standardized X, with the spectrum at the solution. `start` is
    the value of every entry of x_0, K the number of steps, and methods are compared at step `at`.
    """

    data: Sequence[str] = some_of(NAMES, "breast_cancer")
    methods: Sequence[str] = some_of(METHODS, "GD 1/L", "GD 2/(L+l)")
    steps: int = count(1000)
    theta: float = option(1e-3, "a positive number", is_positive)
    start: float = option(1.0, "a number", is_number)
    model: str = option("ridge", " or ".join(map(repr, MODELS)), MODELS.__contains__)
    logarithmic: bool = option(False, "True or False", is_bool)
    at: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "at", "an int in 1..steps", is_int(self.at) and self.at <= self.steps)

    def run(self) -> Outcome:
        rows, notes, claims = [], [], []
        numbers: dict[str, float] = {}
        for name in self.data:
            try:
                problem = self.problem(name)
            except DataMissingError as missing:
                notes.append(str(missing))
                continue
            l, L = self.spectrum(problem)  # noqa: E741
            start = torch.full(problem.params_shape(), self.start, dtype=torch.float64)
            u, solvers = self.hparams(problem), {label: method(label, l, L) for label in self.methods}
            curves = {
                label: error_curves(problem, solver, u, self.steps, params=start) for label, solver in solvers.items()
            }
            rows.append(self._panels(name, l / L, curves))
            claims += self._claims(name, l, L, curves)
            numbers[f"kappa {name}"] = l / L
            for label, curve in curves.items():
                height, index = curve.peak
                numbers |= {
                    f"peak ratio {name} {label}": float(height),
                    f"peak index {name} {label}": float(index),
                    f"error at {self.at} {name} {label}": float(curve.relative.forward[self.at]),
                }
        words = {"ridge per feature": "Ridge regression, one penalty for each feature"}
        model = words.get(self.model, f"{self.model.capitalize()} regression")
        title = f"{model}, theta = {self.theta:g}, $x_0$ = {self.start:g}"
        return Outcome(title, rows, claims, notes, numbers)

    def problem(self, name: str) -> RidgeProblem | LogisticProblem:
        """Return the problem on a data set."""
        if self.model == "logistic":
            return logistic(name)
        return ridge(name, "per_feature" if self.model == "ridge per feature" else "scalar")

    def hparams(self, problem: RidgeProblem | LogisticProblem) -> Tensor:
        """Return theta in the shape that the problem takes."""
        if self.model == "ridge per feature":
            # Unequal penalties, so that H and the directions have no common eigenvectors.
            size = problem.hparams_shape()[0]
            return self.theta * torch.linspace(0.5, 1.5, size, dtype=torch.float64)
        return problem.initial_hparams(self.theta)

    def spectrum(self, problem: RidgeProblem | LogisticProblem) -> tuple[float, float]:
        """Return the ends of the spectrum of the Hessian at the solution."""
        u, start = self.hparams(problem), torch.zeros(problem.params_shape(), dtype=torch.float64)
        x, _ = reference(problem, u, start)
        values = torch.linalg.eigvalsh(problem.bind(u).linearize(x).dense_hessian())
        return float(values[0]), float(values[-1])

    def _panels(self, name: str, kappa: float, curves: dict[str, ErrorCurves]) -> list[Panel]:
        first = 1 if self.logarithmic else 0
        k = torch.arange(first, self.steps + 1)
        scales = ("log" if self.logarithmic else "linear", "log")
        values, derivatives = [], []
        for label, curve in curves.items():
            ratio = (curve.suboptimality / curve.suboptimality[0])[first:]
            values.append(Line(label, k, _above(ratio, 1e-15 if self.model == "logistic" else LOWEST)))
            derivatives.append(Line(label, k, _above(curve.relative.forward[first:], FLOOR)))
        shown = name.replace("_", " ")
        title = f"{shown}, $\\kappa$ = {kappa:.2g}"
        return [
            Panel(title, "iteration $t$", "$(f_t - f_*) / (f_0 - f_*)$", values, scales),
            Panel(title, "iteration $t$", r"$\|\partial x_t - \partial x_*\| / \|\partial x_*\|$", derivatives, scales),
        ]

    def _claims(self, name: str, l: float, L: float, curves: dict[str, ErrorCurves]) -> list[Claim]:  # noqa: E741
        where = f"{self.model} on {name}, kappa = {l / L:.3e}, theta = {self.theta:g}, x_0 = {self.start:g}"
        peaks = {label: curve.peak for label, curve in curves.items()}
        claims = []
        for label, (height, index) in peaks.items():
            number = f"peak ratio {float(height):.4g} at t = {int(index)}"
            calm = "Sobolev" in label or label in ("GD 1/L", "GD sqrt(2)/L")
            source = {"GD": "S Corollaries 1, 2", "Ch": "S Theorem 3", "As": "S Theorem 4"}.get(
                label[:2], "S section 4"
            )
            if calm:
                text, holds = f"{label}: no burn-in", float(height) <= BURNS
            else:
                text, holds = f"{label}: the derivative first gets worse", float(height) > BURNS
            claims.append(Claim(source, text, number, holds, where))
        if self.model == "ridge":
            claims += [self._bound(name, l, L, *each, where) for each in curves.items() if _bounded(each[0])]
        claims += self._crossing(curves, where)
        return claims + self._order(curves, where)

    def _bound(self, name: str, l: float, L: float, label: str, curve: ErrorCurves, where: str) -> Claim:  # noqa: E741
        """Compare with the bound of Theorem 2 or 3, which needs directions that commute with the Hessian."""
        k = torch.arange(self.steps + 1, dtype=torch.float64)
        # The derivative of theta -> grad f(x_0, theta) is x_0 - xbar = x_0, and dx_0 = 0.
        G = abs(self.start) * math.sqrt(load(name)[0].shape[1])
        d0 = float(curve.jacobian_norm)
        if label == "Chebyshev":
            bound, source = chebyshev_rate(k, l, L, d0, G), "S Theorem 3"
        else:
            step = method(label, l, L).step_size  # type: ignore[attr-defined]
            bound, source = gd_rate(k, l, L, d0, G, step), "S Theorem 2"
        ratio = float((curve.forward / (bound + FLOOR * d0)).max())
        number = f"largest error/bound {ratio:.4f}"
        return Claim(source, f"{label}: the bound holds", number, ratio <= 1 + 1e-6, where)

    def _crossing(self, curves: dict[str, ErrorCurves], where: str) -> list[Claim]:
        """Look at the claim that the larger step is better for the function and worse for the derivative."""
        if not {"GD 1/L", "GD 2/(L+l)"} <= set(curves):
            return []
        small, large = curves["GD 1/L"], curves["GD 2/(L+l)"]
        above = (large.suboptimality > small.suboptimality).nonzero()
        last = int(above[-1]) if len(above) else 0
        more = (large.forward > small.forward).nonzero()
        until = int(more[-1]) if len(more) else 0
        ends = last == self.steps
        better = "the larger step gives the smaller function value"
        number = f"f_t of 2/(L+l) is above that of 1/L up to t = {last}" + (", the end of the run" if ends else "")
        after = where if ends or last == 0 else f"{where}; it holds after that t"
        longer, worse = "the larger step has the longer burn-in", f"its derivative is worse up to t = {until}"
        return [
            Claim("S Figure 1", better, number, last == 0, after),
            Claim("S Figure 1", longer, worse, until > 1, where),
        ]

    def _order(self, curves: dict[str, ErrorCurves], where: str) -> list[Claim]:
        """Look at the order of the derivatives' errors at one iteration."""
        if "Sobolev" not in curves:
            return []
        errors = {label: float(curve.relative.forward[self.at]) for label, curve in curves.items()}
        claims = []
        for other, factor in (("Chebyshev", 10.0), ("GD 2/(L+l)", 100.0)):
            # Two errors at the rounding floor say nothing of their methods.
            if other in errors and errors[other] > 100 * FLOOR:
                gain = errors[other] / errors["Sobolev"]
                text = f"after {self.at} steps Sobolev's derivative is {factor:g} times better than {other}'s"
                number = f"{gain:.3g} times ({errors['Sobolev']:.3g} against {errors[other]:.3g})"
                claims.append(Claim("S Figure 4", text, number, gain >= factor, where))
        return claims


def _bounded(label: str) -> bool:
    """Whether a theorem bounds the derivative of the method."""
    return label.startswith("GD") or label == "Chebyshev"


def _above(values: Tensor, floor: float) -> Tensor:
    """Return values with NaN, which is not drawn, from where they are at the rounding floor."""
    return torch.where(values > floor, values, float("nan"))
