"""What "auto" chooses on thirty problems, beside every choice that was open: never more than 1.5 times as slow as best.

Each time is that of three hypergradients one after the other, as an outer loop takes them, each warm-started.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from common import emit, interleave, medians

import bilevel as bl

MOST = 1.5
ROUNDS = 7
SIZES = ((50, 10), (341, 30), (600, 50), (200, 400), (2_000, 100))
"""Rows and features."""
CHOICES: dict[str, bl.HypergradEstimator | str] = {
    "auto": "auto",
    "closed form": bl.ClosedForm(),
    "CG": bl.Implicit(bl.CG()),
    "direct": bl.Implicit(bl.Direct()),
    "balanced": bl.BalancedImplicit(),
}
SOLVERS: dict[str, bl.InnerSolver] = {"QuasiNewton": bl.QuasiNewton(), "Newton": bl.Newton()}


def problems() -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Yield thirty problems with their names and hyperparameters."""
    for seed, (rows, features) in enumerate(SIZES):
        generator = torch.Generator().manual_seed(seed)
        X, w, X_val = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((rows, features), (features,), (rows // 2, features))
        )
        z, z_val = X @ w / features**0.5, X_val @ w / features**0.5
        kinds = {
            bl.problems.RidgeProblem: lambda z: z + 0.3 * z.sin().square(),
            bl.problems.LogisticProblem: lambda z: (z > 0).long(),
            bl.problems.PoissonProblem: lambda z: z.exp().clamp(max=30.0).round(),
        }
        for kind, targets in kinds.items():
            for penalty in ("scalar", "per_feature"):
                problem = kind(X, targets(z), X_val, targets(z_val), penalty)
                name = f"{kind.__name__} {rows} x {features}, {penalty}"
                yield name, problem, problem.initial_hparams(-2.0)


def three(problem: Any, solver: bl.InnerSolver, estimator: Any, u: torch.Tensor) -> None:
    """Take three hypergradients, one after the other."""
    carry = None
    for step in range(3):
        carry = bl.hypergradient(problem, solver, estimator, u + 0.1 * step, carry=carry).carry


def main() -> bool:
    """Time every choice on every problem."""
    ok = True
    for name, problem, u in problems():
        ways = {}
        for label, estimator in CHOICES.items():
            for solved, solver in SOLVERS.items() if label != "auto" else [("", bl.QuasiNewton())]:
                run = partial(three, problem, solver, estimator, u)
                with contextlib.suppress(ValueError):  # of a choice that the problem refuses
                    run()
                    ways[f"{label} {solved}".strip()] = run
        seconds = medians(interleave(ways, rounds=ROUNDS, clock=time.process_time, at_least=0.003))
        best = min((way for way in seconds if way != "auto"), key=lambda way: seconds[way])
        share = seconds["auto"] / seconds[best]
        ok &= emit(
            f"choices: {name}",
            share,
            f"at most {MOST:g} times the best choice",
            share <= MOST,
            best=best,
            seconds=seconds,
        )
    return ok


if __name__ == "__main__":
    raise SystemExit(not main())
