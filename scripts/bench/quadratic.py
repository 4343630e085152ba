"""Ridge regression with one penalty on breast_cancer (341 x 30 training rows): every fast path beside plain autograd.

The alternative is the loop that one writes by hand, recorded by torch autograd: 1,000 gradient steps, one backward
pass. All are called in turn in one run; the figures are medians of processor time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from common import emit, relative_error
from sklearn.datasets import load_breast_cancer

import bilevel as bl
from bilevel.problems import RidgeProblem

STEPS, STEP_SIZE, PENALTIES = 1000, 0.05, 64
TRAIN, VAL = slice(0, 341), slice(341, 455)


class RidgeOnX(RidgeProblem):
    """Ridge regression whose products go through X, as with fewer rows than features."""

    on_gram = False


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return shuffled rows of breast_cancer, standardised by the training rows."""
    X, y = map(torch.as_tensor, load_breast_cancer(return_X_y=True))
    rows = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    X, y = X[rows], y[rows].to(X.dtype)
    return (X - X[TRAIN].mean(0)) / X[TRAIN].std(0), y


def processor_ms(alternatives: Mapping[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each function, called as often in each round as its number says."""
    spent: dict[str, list[float]] = {name: [] for name in alternatives}
    for function, _ in alternatives.values():
        function()
    for _ in range(rounds):
        for name, (function, calls) in alternatives.items():
            for _ in range(calls):
                start = time.process_time()
                function()
                spent[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in spent.items()}


def main() -> bool:
    """Measure each way beside the loop by hand."""
    X, y = data()
    parts = (X[TRAIN], y[TRAIN], X[VAL], y[VAL])
    gram, on_x = RidgeProblem(*parts), RidgeOnX(*parts)
    u, solver = gram.initial_hparams(-3.0), bl.GradientDescent(step_size=STEP_SIZE, steps=STEPS)
    grid = torch.linspace(-6.0, 0.0, PENALTIES, dtype=X.dtype)

    def by_hand(at: torch.Tensor = u) -> torch.Tensor:
        h = at.clone().requires_grad_()
        w = torch.zeros(X.shape[1], dtype=X.dtype, requires_grad=True)
        for _ in range(STEPS):
            loss = 0.5 * (X[TRAIN] @ w - y[TRAIN]).square().mean() + 0.5 * h.exp() * w.square().sum()
            (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - STEP_SIZE * gradient
        return torch.autograd.grad(0.5 * (X[VAL] @ w - y[VAL]).square().mean(), h)[0]

    def call(problem: RidgeProblem, estimator: bl.HypergradEstimator, at: torch.Tensor = u) -> torch.Tensor:
        return bl.hypergradient(problem, solver, estimator, at).hypergradient

    def from_scratch() -> torch.Tensor:
        fresh = RidgeProblem(*parts, "per_feature")
        return bl.hypergradient(fresh, solver, bl.ClosedForm(), u.expand(X.shape[1])).hypergradient.sum()

    unrolled, exact = by_hand(), gram.exact_hypergradient(u)
    rows = [
        ("full unroll on X", lambda: call(on_x, bl.FullUnroll()), 3, unrolled, 4),
        ("full unroll on the Gram matrix", lambda: call(gram, bl.FullUnroll()), 3, unrolled, 8),
        ("on the spectrum", lambda: call(gram, bl.Spectral()), 50, unrolled, 400),
        ("exact, eigenbasis reused", lambda: call(gram, bl.ClosedForm()), 50, exact, 1000),
        ("exact, from scratch (new problem, Cholesky)", from_scratch, 50, exact, 200),
        ("64 penalties at once", lambda: bl.Spectral().sweep(gram, solver, grid).hypergradients, 50, None, 3000),
    ]
    alternatives: dict[str, tuple[Callable[[], Any], int]] = {"by hand": (by_hand, 1)}
    alternatives |= {name: (function, calls) for name, function, calls, _, _ in rows}
    spent = processor_ms(alternatives, rounds=5)
    ok = True
    for name, function, _, truth, asked in rows:
        if truth is None:
            sample = range(0, PENALTIES, 21)
            error = relative_error(function()[sample], torch.stack([by_hand(grid[index]) for index in sample]))
            speed = PENALTIES * spent["by hand"] / spent[name]
        else:
            error, speed = relative_error(function(), truth), spent["by hand"] / spent[name]
        ok &= emit(
            f"ridge, {STEPS} steps: {name}: times as fast as autograd by hand",
            speed,
            f"at least {asked} at equal values",
            speed >= asked and error < 1e-9,
            relative_difference=error,
            processor_ms=spent[name],
            by_hand_ms=spent["by hand"],
        )
    return ok


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(not main())
