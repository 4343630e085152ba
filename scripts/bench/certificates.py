"""What a certificate costs beside its hypergradient, at 500 features, and the Hessian-vector products it takes."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import emit

import bilevel as bl
from bilevel.certify import bound_error, certify_error

FEATURES, STEPS, ROUNDS = 500, 200, 7


def processor_seconds(alternatives: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median seconds of processor time of each, called in turn after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(ROUNDS + 1):
        for name, function in alternatives.items():
            start = time.process_time()
            function()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


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
    u = problem.initial_hparams(-3.0)
    step = 1.0 / problem.bind(u).curvature(problem.params).largest
    solver, estimator = bl.GradientDescent(step, steps=STEPS), bl.Implicit(bl.CG(tol=1e-8))
    estimate = bl.hypergradient(problem, solver, estimator, u)
    given = (problem, u, estimate.params, estimate.hypergradient, estimate.carry.adjoint)
    seconds = processor_seconds({
        "implicit": lambda: bl.hypergradient(problem, solver, estimator, u),
        "A0": lambda: bound_error(*given),
        "A1": lambda: certify_error(*given),
    })
    found = certify_error(*given)
    products = int(re.search(r"(\d+) HVPs", found.note)[1])  # type: ignore[index]
    share = seconds["A0"] / seconds["implicit"]
    ok = emit(f"A0 / implicit: {name}", share, "below 0.05", share < 0.05, seconds=seconds)
    rest = {"A1 / implicit": seconds["A1"] / seconds["implicit"], "note": found.note}
    return ok & emit(f"A1 products: {name}", products, "about 10 (at most 15)", products <= 15, **rest)


if __name__ == "__main__":
    raise SystemExit(not main())
