"""What a certificate costs beside its hypergradient, at 500 features, and the Hessian-vector products it takes."""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from common import emit, interleave, medians, ratio

import bilevel as bl
from bilevel.certify import bound_error, certify_error

FEATURES, STEPS, ROUNDS = 500, 200, 15


def main() -> bool:
    """Compare both bounds with an implicit hypergradient after 200 steps of gradient descent."""
    generator = torch.Generator().manual_seed(0)
    ok = True
    for rows in (1_000, 5_000):
        X = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
        y = (X @ torch.randn(FEATURES, generator=generator, dtype=torch.float64) > 0).double()
        for kind in (bl.problems.LogisticProblem, bl.problems.RidgeProblem):
            for penalty in ("scalar", "per_feature"):
                problem = kind(X, y, X, y, penalty)
                ok &= _compare(problem, f"{kind.__name__}, {penalty}, {rows} x {FEATURES}")
    return ok


def _compare(problem: Any, name: str) -> bool:
    # Penalties for single features are spread over a factor of e^2.
    u = problem.initial_hparams(-3.0)
    u = u + torch.linspace(-1.0, 1.0, u.numel(), dtype=u.dtype) if u.dim() else u
    step = 1.0 / problem.bind(u).curvature(problem.params).largest
    solver, estimator = bl.GradientDescent(step, steps=STEPS), bl.Implicit(bl.CG(tol=1e-8))
    estimate = bl.hypergradient(problem, solver, estimator, u)
    given = (problem, u, estimate.params, estimate.hypergradient, estimate.carry.adjoint)
    alternatives = {
        "implicit": lambda: bl.hypergradient(problem, solver, estimator, u),
        "A0": lambda: bound_error(*given),
        "A1": lambda: certify_error(*given),
    }
    seconds = interleave(alternatives, ROUNDS, time.process_time)
    found = certify_error(*given)
    products = int(re.search(r"(\d+) HVPs", found.note)[1])  # type: ignore[index]
    share = ratio(seconds, "A0", "implicit")
    ok = emit(f"A0 / implicit: {name}", share, "below 0.05", share < 0.05, seconds=medians(seconds))
    rest = {"A1 / implicit": ratio(seconds, "A1", "implicit"), "note": found.note}
    return ok & emit(f"A1 products: {name}", products, "about 10 (at most 15)", products <= 15, **rest)


if __name__ == "__main__":
    raise SystemExit(not main())
