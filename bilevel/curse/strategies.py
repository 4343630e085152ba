"""Ways to spend one budget ``T = (1 + omega) K`` on a hypergradient, each measured on one draw.

The papers' strategies are fixed tails: of ``K + omega N`` steps the last ``K - N`` are differentiated. The oracle is
the fixed tail that the exact derivative shows to be the best.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel.curse.draws import Draw
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.hypergrad import AdaptiveUnroll, BalancedImplicit, Implicit, hypergradient
from bilevel.hypergrad.extrapolation import OMEGA as WEIGHT
from bilevel.linear import CG
from bilevel.theory import optimal_truncation

OMEGA = round(WEIGHT)
FULL, BOUND, EIGHTH = "no truncation", "N by M (22)", "N = K/8"
HALVES, AUTO, EXTRAPOLATED, BALANCED = "half CG", 'tail="auto"', "extrapolate=True", 'balance="auto"'
STRATEGIES = (FULL, BOUND, EIGHTH, AUTO, EXTRAPOLATED, HALVES, BALANCED)
JUDGED = 1e-10
"""Relative errors below this are too close to rounding to judge an estimate by."""


def fixed_tails(draw: Draw, steps: int) -> Tensor:
    """Return the relative errors of all fixed tails N = 0, ..., K - 1 at equal budget, of shape (K,).

    One forward run, one sweep with a column for each N. A column is one VJP of the solution map; nothing of the library
    is used, so that the oracle is independent of it.
    """
    h, m = draw.step
    ahead = draw.looks_ahead
    inner: Any = draw.problem.bind(draw.hparams)
    x, previous, points = draw.start, draw.start, []
    for _ in range(steps + OMEGA * (steps - 1)):
        look = x + m * (x - previous)
        points.append(look if ahead else x)
        x, previous = look - h * inner.grad(points[-1]), x
    states = torch.stack(points, 1)
    last = steps + OMEGA * torch.arange(steps) - 1
    first = draw.problem.v[:, None].repeat(1, steps)
    second, total = torch.zeros_like(first), torch.zeros_like(first)
    for j in range(steps):
        # The column N has K - N derivative steps: the last columns are through.
        active = steps - j
        first, second = first[:, :active], second[:, :active]
        at = states[:, last[:active] - j]
        g = -h * first
        total[:, :active] += inner.slope[:, None] * at * g
        pulled = _hessian_times(draw, at, g)
        if ahead:
            first, second = (1 + m) * (first + pulled) + second, -m * (first + pulled)
        else:
            first, second = (1 + m) * first + pulled + second, -m * first
    return draw.error(total)


def _hessian_times(draw: Draw, points: Tensor, vectors: Tensor) -> Tensor:
    """Return the Hessian at each column of points times the column of vectors."""
    if draw.quadratic:
        return draw.hessian @ vectors
    X = draw.problem.train.X
    predictions = X.t() @ points
    curved = (X.t() @ vectors) * torch.sigmoid(predictions) * torch.sigmoid(-predictions)
    penalty: Tensor = draw.problem.bind(draw.hparams).penalty  # type: ignore[attr-defined]
    return draw.problem.scale * (X @ curved) + penalty[:, None] * vectors


def bound_tail(draw: Draw, steps: int) -> int:
    """Return the N that minimises M's bound (22) with the true constants: gradient descent on a quadratic."""
    derivative = torch.linalg.solve(draw.hessian, torch.diag(draw.slope * draw.solution))
    d0 = float(torch.linalg.matrix_norm(derivative, 2))
    e0 = float(torch.linalg.vector_norm(draw.start - draw.solution))
    return int(optimal_truncation(steps, draw.rate, d0, e0, draw.step[0] * float(draw.slope.max()), OMEGA))


def estimators(draw: Draw, steps: int) -> dict[str, HypergradEstimator]:
    """Return the estimators that the library runs with a budget of their own."""
    budget = (1 + OMEGA) * steps
    result: dict[str, HypergradEstimator] = {AUTO: AdaptiveUnroll(budget)}
    # Refused there.
    if not draw.solver.traits.oscillates:
        result[EXTRAPOLATED] = AdaptiveUnroll(budget, extrapolate=True)
    result[BALANCED] = BalancedImplicit(budget)
    return result


def half_and_half(draw: Draw, steps: int) -> tuple[float, float]:
    """Return error and cost of half the budget forward and half of it in CG at the last iterate."""
    budget = (1 + OMEGA) * steps
    # An HVP costs two; what is left pays for the cross product.
    estimator, solver = Implicit(CG(tol=1e-15, max_steps=budget // 4 - 2)), replace(draw.solver, steps=budget // 2)
    # A call of `hypergradient` would refuse the result where CG has not converged.
    run = Run(draw.problem, solver, draw.hparams, draw.start)
    solved = estimator.solve(run)
    value = solved.pullback(draw.problem.v).hparams
    return float(draw.error(value)), run.meter.read().gradient_equivalents


def measure(draw: Draw, steps: int) -> dict[str, Any]:
    """Return a row of the table of draws: each strategy's relative error under its name, with costs and tails.

    The effectivity of the balanced run's estimate is in it where the true error can judge that.
    """
    tails, rho = fixed_tails(draw, steps), draw.rate
    row: dict[str, Any] = {"family": draw.family, "group": draw.group, "setting": draw.setting, "rho": rho}
    row |= {"sK": -steps * math.log(min(rho, 1.0)), "oracle": float(tails.min()), "oracle N": int(tails.argmin())}
    row |= {FULL: float(tails[0]), EIGHTH: float(tails[steps // 8])}
    if draw.quadratic and not draw.step[1]:
        n = bound_tail(draw, steps)
        row |= {BOUND: float(tails[n]), f"{BOUND}: N": n}
    row[HALVES], row[f"{HALVES}: cost"] = half_and_half(draw, steps)
    for name, estimator in estimators(draw, steps).items():
        estimate = hypergradient(draw.problem, draw.solver, estimator, draw.hparams, draw.start, on_failure="return")
        row[name] = float(draw.error(estimate.hypergradient))
        row[f"{name}: cost"] = estimate.cost.gradient_equivalents
        row[f"{name}: adjoint steps"] = estimate.certificate.adjoint_steps
        if name == EXTRAPOLATED:
            row["refused"] = "no extrapolation" in estimate.certificate.error_note
        if name == BALANCED and estimate.certificate.error is not None and row[name] >= JUDGED:
            size = float(torch.linalg.vector_norm(draw.truth))
            row["effectivity"] = estimate.certificate.error / (row[name] * size)
    return row
