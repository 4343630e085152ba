"""Late starts on random least squares (Mehmood et al. 2026, sections 4 and 6, and their Figures 1 to 14)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from bilevel.core.options import is_int, is_list, option, require
from bilevel.curse.outcome import Claim, Experiment, Line, Outcome, Panel, count, seed_of_draws, sizes
from bilevel.curse.problems import least_squares
from bilevel.inner import GradientDescent
from bilevel.theory import ErrorCurves, QuadraticBatch, error_curves, optimal_truncation

STEPS = {"2/(L+l)": lambda low, high: 2.0 / (low + high), "1/L": lambda low, high: 1.0 / high}

FLOOR = 1e-13
"""Relative errors below this are rounding."""


@dataclass(frozen=True)
class Truncation(Experiment):
    """``f = 1/2 |A x - b|^2 + u/2 |x|^2`` with A 200 x columns, b and x_0 standard Gaussian, u = 1: gradient descent.

    The step size is "2/(L+l)" (optimal) or "1/L"; `indices` are truncation indices k_0 of K steps, and omega is the
    cost of one derivative step in iterations, for the panel at equal budget ``(1 + omega) K``.
    """

    columns: Sequence[int] = sizes(100)
    step: str = option("2/(L+l)", " or ".join(map(repr, STEPS)), tuple(STEPS).__contains__)
    steps: int = count(100)
    draws: int = count(50)
    indices: Sequence[int] = (0, 5, 10, 20, 30, 40, 60, 80)
    omega: int = count(3)
    show: str = option("both", "'forward', 'reverse' or 'both'", ("forward", "reverse", "both").__contains__)
    seed: int = seed_of_draws()

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = is_list(self.indices) and all(is_int(index, 0) and index < self.steps for index in self.indices)
        require(self, "indices", f"ints in 0..{self.steps - 1}, truncation indices below `steps`", ok)

    def run(self) -> Outcome:
        rows, claims = [], []
        numbers: dict[str, float] = {}
        for size in self.columns:
            batch = least_squares(size, self.draws, seed=self.seed)
            solvers, rho = self.solvers(batch)
            curves = error_curves(batch, solvers, None, self.steps, [self.steps - index for index in self.indices])
            budget = self.equal_budget(batch, solvers)
            rows.append(self._panels(size, float(rho.median()), curves, budget))
            claims += self._claims(size, rho, curves, budget)
            height, index = curves.peak
            numbers |= {
                f"peak ratio {size}": float(height.median()),
                f"peak index {size}": float(index.double().median()),
                f"relative peak {size}": float(curves.relative.forward.amax(-1).median()),
                f"absolute peak {size}": float(curves.forward.amax(-1).median()),
                f"rho {size}": float(rho.median()),
            }
        title = f"Truncated unrolling of gradient descent, h = {self.step}, K = {self.steps}, {self.draws} draws"
        return Outcome(title, rows, claims, numbers=numbers)

    def solvers(self, batch: QuadraticBatch) -> tuple[list[GradientDescent], Tensor]:
        """Return one solver for each draw, and the contraction factors (draws,)."""
        low, high = batch.eigen[0][:, 0], batch.eigen[0][:, -1]
        sizes = STEPS[self.step](low, high)
        rho = torch.maximum((1 - sizes * low).abs(), (1 - sizes * high).abs())
        return [GradientDescent(step_size=float(h)) for h in sizes], rho

    def dropped(self) -> list[int]:
        """Return numbers N of dropped derivative steps, at least one step being left."""
        spread = [0, 1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95]
        return [n for n in sorted({math.floor(n * self.steps / 100) for n in spread}) if n < self.steps]

    def equal_budget(self, batch: QuadraticBatch, solvers: list[GradientDescent]) -> Tensor:
        """Return the relative error with N dropped steps at equal budget, (draws, len(dropped)).

        ``K(N) = K + omega N`` iterations, of which the last ``K - N`` are differentiated.
        """
        dropped = self.dropped()
        longest = self.steps + self.omega * dropped[-1]
        # The start of the derivative, k_0 = N + omega N, counted from the end of the longest run.
        curves = error_curves(batch, solvers, None, longest, [longest - (1 + self.omega) * n for n in dropped])
        at = [curves.late[:, j, self.steps + self.omega * n] for j, n in enumerate(dropped)]
        return torch.stack(at, -1) / curves.jacobian_norm[:, None]

    def _panels(self, size: int, rho: float, curves: ErrorCurves, budget: Tensor) -> list[Panel]:
        k = torch.arange(self.steps + 1)
        scaled = curves.relative
        assert scaled.forward_bound is not None
        ylabel = "relative Jacobian error"
        swept = scaled.reverse.median(0).values
        forward, stops = [], []
        for j, index in enumerate(self.indices):
            label = f"$k_0$ = {index}"
            forward.append(Line(label, k[index:], scaled.late[:, j].median(0).values[index:]))
            stops.append(Line(label, (self.steps - k[index])[None], swept[index][None], marks=True))
        first, label = self.indices[0], forward[0].label
        low, high = scaled.forward.quantile(0.1, 0), scaled.forward.quantile(0.9, 0)
        forward[0] = replace(forward[0], band=(low[first:], high[first:]))
        # One sweep draws over all: a dot says where each stops.
        longest = Line(label, self.steps - k[first:], swept[first:])
        floor = float(scaled.forward.median(0).values.min())
        # A bound goes on falling where the error has reached the rounding floor.
        bound = Line(label, k, scaled.forward_bound.median(0).values.clamp(min=floor), bound=True)
        n = torch.tensor(self.dropped())
        quantiles = budget.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=budget.dtype), 0)
        cost = Line("", n, quantiles[1], (quantiles[0], quantiles[2]), marks=True)
        name = f"{size} columns, $\\rho$ = {rho:.3f}"
        panels = {
            "forward": Panel(f"forward (dotted: bound), {name}", "iteration $k$", ylabel, [*forward, bound]),
            "reverse": Panel(f"reverse, {name}", "differentiated steps $K - k_0$", ylabel, [longest, *stops]),
        }
        shown = list(panels.values()) if self.show == "both" else [panels[self.show]]
        title = f"equal budget, $\\omega$ = {self.omega}, {size} columns"
        return [*shown, Panel(title, "dropped derivative steps $N$", ylabel, [cost])]

    def _claims(self, size: int, rho: Tensor, curves: ErrorCurves, budget: Tensor) -> list[Claim]:
        where = f"{size} columns, h = {self.step}, {self.draws} draws, median rho {float(rho.median()):.3f}"
        height, index = curves.peak
        cursed = float((height > 1.05).double().mean())
        late = torch.stack([curves.late[:, j, -1] for j in range(len(self.indices))], -1)
        truncated = torch.stack([curves.reverse[:, i] for i in self.indices], -1)
        same = float(((late - truncated).abs() / curves.jacobian_norm[:, None]).max())
        assert curves.forward_bound is not None
        assert curves.late_bound is not None
        norms = curves.jacobian_norm
        ratio = float((curves.forward / (curves.forward_bound + 1e-12 * norms[:, None])).max())
        late_ratio = float((curves.late / (curves.late_bound + 1e-12 * norms[:, None, None])).max())
        heights = [float((curves.late[:, j].amax(-1) / norms).median()) for j in range(len(self.indices))]
        worse = (
            f"peak ratio {float(height.median()):.3g} at k = {float(index.double().median()):.0f} (median); "
            f"above 1.05 in {cursed:.0%} of the draws"
        )
        by_start = ", ".join(f"{i}: {value:.3g}" for i, value in zip(self.indices, heights, strict=True))
        damped = all(a >= b - 1e-9 for a, b in pairwise(heights))
        agree, bounds = "truncated reverse sweep and late-started forward mode agree", "the bounds (19) and (21) hold"
        number, bounded = f"largest error/bound {ratio:.4f} and {late_ratio:.4f}", max(ratio, late_ratio) < 1 + 1e-6
        claims = [
            Claim("M section 6", "the derivative first gets worse", worse, cursed > 0.5, where),
            Claim("M section 4.1", "a late start damps the peak", f"relative peak by k_0: {by_start}", damped, where),
            Claim("M section 4.2", agree, f"{same:.1e} relative", same < 1e-11, where),
            Claim("M Theorems 7, 8", bounds, number, bounded, where),
        ]
        # Between errors at the rounding floor there is nothing to choose.
        best = budget.median(0).values
        if float(best[0]) < FLOOR:
            return claims
        j = int(best.argmin())
        gain, text = float(best[0] / best[j]), "at equal budget, dropping derivative steps pays"
        number = f"best N = {self.dropped()[j]} of K = {self.steps}: {gain:.3g} times lower error than N = 0"
        pays = Claim("M section 4.3", text, number, gain > 1.05, f"{where}, omega = {self.omega}")
        return [*claims, self._prediction(rho, curves, best, where), pays]

    def _prediction(self, rho: Tensor, curves: ErrorCurves, best: Tensor, where: str) -> Claim:
        """Compare the N that minimises the bound (22) with the N that minimises the error."""
        # d_1 <= rho d_0 + C e_0 gives back C.
        assert curves.forward_bound is not None
        constants = (curves.forward_bound[:, 1] - rho * curves.forward[:, 0]) / curves.iterate[:, 0]
        chosen = [
            optimal_truncation(self.steps, float(r), float(d), float(e), float(C), float(self.omega))
            for r, d, e, C in zip(rho, curves.forward[:, 0], curves.iterate[:, 0], constants, strict=True)
        ]
        predicted, true = float(torch.tensor(chosen).double().median()), self.dropped()[int(best.argmin())]
        text, near = "the bound predicts how many derivative steps to drop", abs(predicted - true) <= max(3, 0.3 * true)
        number = f"N = {predicted:.0f} by the bound, {true} by the error"
        return Claim("M (22)", text, number, near, f"{where}, omega = {self.omega}, medians, exact constants")


@dataclass(frozen=True)
class Contraction(Experiment):
    """How peaks depend on the contraction factor, over the sizes of `Truncation`; both step sizes."""

    columns: Sequence[int] = sizes(20, 60, 100, 140, 170, 185)
    draws: int = count(50)
    steps: int = count(400)
    seed: int = seed_of_draws()

    def run(self) -> Outcome:
        panels: dict[str, list[Line]] = {"relative": [], "absolute": [], "index": []}
        claims = []
        for step in STEPS:
            plan = Truncation(self.columns, step, self.steps, self.draws, seed=self.seed)
            points = []
            for size in self.columns:
                batch = least_squares(size, self.draws, seed=self.seed)
                solvers, rho = plan.solvers(batch)
                curves = error_curves(batch, solvers, None, self.steps)
                peaks = curves.relative.forward.amax(-1), curves.forward.amax(-1), curves.peak[1].double()
                points.append([each.median() for each in (rho, *peaks)])
            points.sort(key=lambda point: float(point[0]))
            x, *columns = (torch.stack(column) for column in zip(*points, strict=True))
            where = f"h = {step}, {self.draws} draws, medians; relative means divided by |dx*|"
            for name, y in zip(panels, columns, strict=True):
                panels[name].append(Line(f"h = {step}", 1 / (1 - x), y, marks=True))
                text = f"the {name} {'peak ' if name != 'index' else ''}of the curse grows with rho"
                number = ", ".join(f"{float(a):.3f}: {float(b):.3g}" for a, b in zip(x, y, strict=True))
                claims.append(Claim("M section 3", text, number, bool((y[1:] >= y[:-1]).all()), where))
        label = r"$1/(1-\rho)$"
        row = [
            Panel("peak, relative to $|X_*|$", label, "relative Jacobian error", panels["relative"], ("log", "log")),
            Panel("peak, absolute", label, "Jacobian error", panels["absolute"], ("log", "log")),
            Panel("where it lies", label, "iteration of the peak", panels["index"], ("log", "linear")),
        ]
        return Outcome("The curse of unrolling by contraction factor", [row], claims)
