"""The worst case over all quadratics with a spectrum in [l, L] (Scieur et al. 2022, Theorems 2 to 4, Figure 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.core.options import is_list, is_positive, option
from bilevel.curse.methods import METHODS, method
from bilevel.curse.outcome import Claim, Experiment, Line, Outcome, Panel, count, some_of
from bilevel.theory import QuadraticBatch, error_curves, lower_bound

POINTS = 801
"""Chebyshev points in [l, L], which include both ends."""


@dataclass(frozen=True)
class WorstCase(Experiment):
    """``max over [kappa, 1] of |P_t - lam P_t'|``: the error with G = 0, relative to its start.

    `kappas` are inverse condition numbers l/L, one panel each.
    """

    kappas: Sequence[float] = option(
        (1e-2, 1e-3),
        "numbers in (0, 1)",
        lambda kappas: is_list(kappas) and all(is_positive(kappa) and kappa < 1 for kappa in kappas),
    )
    methods: Sequence[str] = some_of(
        METHODS, "GD 1/L", "GD 2/(L+l)", "Chebyshev", "heavy ball", "Sobolev", "Sobolev alpha=0"
    )
    steps: int = count(400)

    def run(self) -> Outcome:
        panels, claims = [], []
        numbers: dict[str, float] = {}
        k = torch.arange(self.steps + 1)
        for kappa in self.kappas:
            lines = []
            for label in self.methods:
                curve = self.curve(label, kappa)
                lines.append(Line(label, k, curve))
                height, index = curve.max(0)
                numbers |= {f"peak {label} {kappa:g}": float(height), f"index {label} {kappa:g}": float(index)}
                claims += self._claims(label, kappa, float(height), int(index))
            bound = torch.as_tensor(lower_bound(k.double(), kappa, 1.0))
            lines.append(Line("lower bound (Proposition 1)", k, bound))
            lowest = float(torch.stack([line.y for line in lines]).min())
            ylim = max(lowest, 1e-8) / 2, 3 * max(float(line.y.max()) for line in lines)
            ylabel = r"$\max_\lambda |P_t - \lambda P_t'|$"
            panels.append(Panel(f"$\\kappa$ = {kappa:g}", "iteration $t$", ylabel, lines, ylim=ylim))
        return Outcome("Worst-case error of the unrolled derivative, G = 0", [panels], claims, numbers=numbers)

    def curve(self, label: str, kappa: float) -> Tensor:
        """Return the worst error after 0, ..., K steps: all eigenvalues run as one batch of scalar problems."""
        angles = torch.linspace(0.0, math.pi, POINTS, dtype=torch.float64)
        values = (1 + kappa) / 2 - (1 - kappa) / 2 * torch.cos(angles)
        zero = torch.zeros(POINTS, 1, dtype=torch.float64)
        # From x_0 = 0 to x* = 1 with dH = -lam: G = 0 and dx* = 1, so that the error is |P_t - lam P_t'| itself.
        batch = QuadraticBatch(
            values[:, None, None], -values[:, None], -values[:, None, None, None], zero[:, None], zero
        )
        return error_curves(batch, method(label, kappa, 1.0), None, self.steps).forward.amax(0)

    def _claims(self, label: str, kappa: float, height: float, index: int) -> list[Claim]:
        where = f"worst case over [l, L], G = 0, kappa = {kappa:g}, within {self.steps} steps"
        number = f"{height:.4g} at t = {index}"
        if label == "GD 2/(L+l)":
            t, top = (1 - kappa**2) / (2 * kappa), 1 / (math.e * kappa)
            if t >= self.steps:
                return []
            claim = "the peak is O(1/kappa) at t ~ 1/kappa; exactly 1/(e kappa) at (1-kappa^2)/(2 kappa)"
            holds = abs(height / top - 1) < 0.1 and abs(index - t) <= max(2, 0.02 * t)
            return [Claim("S Corollary 1", claim, f"{number}; predicted {top:.4g} at {t:.1f}", holds, where)]
        if label == "Chebyshev":
            t, top = 1.0327 / math.sqrt(kappa), 0.532 / kappa
            claim = "the peak is O(2/kappa) at t ~ 2 sqrt(1/kappa)"
            printed = abs(height * kappa / 2 - 1) < 0.1 and abs(index * math.sqrt(kappa) / 2 - 1) < 0.1
            number += f"; predicted {top:.4g} at {t:.1f} (0.532/kappa, 1.0327/sqrt kappa)"
            where += "; the orders are right, the constants about 4 and 2 times off"
            return [Claim("S Theorem 3", claim, number, printed, where)]
        if label == "GD 1/L":
            return [Claim("S Corollary 1", "h = 1/L has no burn-in", number, height <= 1 + 1e-9, where)]
        if label.startswith("Sobolev"):
            claim = f"{label}: no burn-in"
            return [Claim("S Proposition 3", claim, number, height <= 1.05, f"{where}; S proves it on average alone")]
        return []
