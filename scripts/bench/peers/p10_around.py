"""P10: what is around the work: the command line's start, and an outer step without its hypergradient."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from contest import Asked, Contestant, Problem, Task

STEPS, PENALTIES, RATE = 200, 30, 1e-3


def data(seed: int) -> SimpleNamespace:
    """Return the gradient that every outer step sees."""
    return SimpleNamespace(gradient=[(-1.0) ** i * (1.0 + i) for i in range(PENALTIES)])


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the exit status plus one, and where Adam (Kingma & Ba 2015) goes first on a constant gradient."""
    moved = sum(RATE / (1.0 + 1e-8 / abs(d.gradient[0])) for _ in range(STEPS))
    return {"help": [1.0], "step": [-moved if g > 0 else moved for g in d.gradient]}


def _command(*arguments: str) -> Any:
    def call() -> Any:
        return [1.0 + subprocess.run([sys.executable, *arguments], check=False, stdout=subprocess.DEVNULL).returncode]

    return call


def _ours(d: SimpleNamespace) -> dict[str, Any]:
    from dataclasses import replace
    from unittest import mock

    import torch

    import bilevel as bl

    X = torch.randn(50, PENALTIES, dtype=torch.float64)
    problem = bl.problems.RidgeProblem(X, X[:, 0], X, X[:, 0], "per_feature")
    u = torch.zeros(PENALTIES, dtype=torch.float64)
    solver, adam = bl.GradientDescent(steps=5), lambda tensors: torch.optim.Adam(tensors, lr=RATE)
    estimate = bl.hypergradient(problem, solver, bl.Implicit(), u, on_failure="return")
    estimate = replace(estimate, hypergradient=torch.tensor(d.gradient, dtype=u.dtype))

    def ready(*_: Any, **__: Any) -> Any:
        return estimate

    outer = bl.OuterOptimizer(problem, solver, bl.Implicit(), u, adam, on_failure="return")

    def call() -> Any:
        with mock.patch("bilevel.outer.loop.hypergradient", ready):
            for _ in range(STEPS):
                outer.step()
        outer.history.clear()
        return outer.hparams

    return {"help": _command("-m", "bilevel", "--help"), "step": call}


def _torch(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    u = torch.zeros(PENALTIES, dtype=torch.float64, requires_grad=True)
    adam, u.grad = torch.optim.Adam([u], lr=RATE), torch.tensor(d.gradient, dtype=torch.float64)

    def call() -> Any:
        for _ in range(STEPS):
            adam.step()
        return u.detach().clone()

    return {"step": call}


def _python(d: SimpleNamespace) -> dict[str, Any]:
    return {"help": _command("-c", "import argparse, importlib.metadata")}


OURS, ADAM, BARE = "bilevel", "torch Adam alone", "python, argparse and importlib.metadata"

PROBLEMS = [
    Problem(
        key="p10",
        title="P10: around the work",
        words=f"The start of the command line; and {STEPS} outer steps of Adam on {PENALTIES} hyperparameters whose "
        "hypergradients are at hand, beside the optimizer alone.",
        sizes={"full": {}, "quick": {}},
        data=data,
        reference=reference,
        tasks={
            "help": Task("bilevel --help"),
            "step": Task("an outer step without its hypergradient", tolerance=1e-6, per=STEPS, unit="step"),
        },
        contestants=[
            Contestant(OURS, _ours, "bilevel"),
            Contestant(ADAM, _torch),
            Contestant(BARE, _python),
        ],
        asked=[
            Asked("help", [OURS], [], at_most=0.15),
            Asked("step", [OURS], [ADAM], at_most=50e-6),
        ],
    )
]
