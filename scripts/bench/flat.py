"""Unrolls on flat vectors beside the same runs step by step: whole calls, processor time, at equal error."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from common import emit, interleave, medians, ratio, relative_error

import bilevel as bl

ROWS, FEATURES, SEED, ROUNDS = 341, 30, 3, 5
ERROR = 1e-12
DOUBLED = {
    "GradientDescent": bl.GradientDescent(),
    "HeavyBall": bl.HeavyBall(),
    "Nesterov": bl.Nesterov(),
    "AsymptoticSobolev": bl.AsymptoticSobolev(),
}
STEPPED = {"Chebyshev": bl.Chebyshev(), "Sobolev": bl.Sobolev()}
BY_STEPS = mock.patch.multiple("bilevel.hypergrad.unroll", unrolled=lambda *_, **__: None, pushed=lambda run: None)


def main() -> bool:
    """Measure ridge regression on its Gram matrix, linear models on X, and forward mode."""
    generator = torch.Generator().manual_seed(SEED)
    X = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    y = X @ torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    classes, labels = torch.arange(ROWS) % 4, (y > 0).double()
    ridge = bl.problems.RidgeProblem(X, y, X[:100], y[:100], penalty="per_feature")
    models = {
        "logistic": bl.problems.LogisticProblem(X, labels, X[:100], labels[:100], penalty="per_feature"),
        "softmax": bl.problems.SoftmaxProblem(X, classes, X[:100], classes[:100], penalty="per_class"),
    }
    full, ok = bl.FullUnroll(), True
    for name, solver in DOUBLED.items():
        ok &= _beside(f"ridge, {name}, 1,000 steps, doubled", ridge, replace(solver, steps=1_000), full, 5.0)
    for name, solver in STEPPED.items():
        ok &= _beside(f"ridge, {name}, 200 steps", ridge, replace(solver, steps=200), full, 1.0)
    descent = bl.GradientDescent(steps=400)
    for name, problem in models.items():
        ok &= _beside(f"{name}, 400 steps", problem, descent, full, 1.2)
    ok &= _beside("softmax, 400 steps, forward", models["softmax"], descent, bl.FullUnroll(mode="forward"), 1.5)
    scalar = bl.problems.RidgeProblem(X, y, X[:100], y[:100])
    broad = torch.randn(60, 2_000, generator=generator, dtype=torch.float64)
    wide = bl.problems.RidgeProblem(broad, broad[:, 0], broad[:20], broad[:20, 0])
    ok &= _beside("ridge, to a tolerance of 1e-9", ridge, bl.GradientDescent(0.2, tol=1e-9), full, 1.5)
    ok &= _beside("softmax, to a tolerance of 1e-6", models["softmax"], bl.Nesterov(tol=1e-6), full, 1.0)
    short = bl.GradientDescent(0.01, steps=1_000)
    ok &= _beside("ridge of 60 rows and 2,000 features, 1,000 steps", wide, short, full, 20.0)
    ok &= _beside("64 ridge penalties, 1,000 steps", scalar.batched(64), bl.GradientDescent(steps=1_000), full, 1.5)
    tail = bl.TruncatedUnroll(50)
    return ok & _beside("ridge, 50 of 20,000 steps", ridge, bl.GradientDescent(steps=20_000), tail, 50.0)


def _beside(name: str, problem: Any, solver: bl.InnerSolver, estimator: Any, least: float) -> bool:
    u = problem.initial_hparams(-2.0)

    def call() -> torch.Tensor:
        estimate = bl.hypergradient(problem, solver, estimator, u, check=False, on_failure="return")
        gradient: torch.Tensor = estimate.hypergradient
        return gradient

    def by_steps() -> torch.Tensor:
        with BY_STEPS:
            return call()

    error = relative_error(call(), by_steps())
    seconds = interleave({"flat": call, "steps": by_steps}, ROUNDS, time.process_time)
    times = ratio(seconds, "steps", "flat")
    milliseconds = {f"{key}_ms": 1e3 * value for key, value in medians(seconds).items()}
    asked = f"at least {least:g} times less processor time than step by step, within {ERROR:g}"
    return emit(name, times, asked, times >= least and error <= ERROR, error=error, **milliseconds)


if __name__ == "__main__":
    raise SystemExit(not main())
