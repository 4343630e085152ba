"""P1b: 64 penalties at once, the derivative of 1,000 gradient steps on ridge regression, breast_cancer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from contest import Asked, Contestant, Problem, Task
from p1_ridge import data as one_penalty
from p1_ridge import exact_unroll, jax_unroll
from shared import warm_torch

LOWEST, HIGHEST = -6.0, -2.0


def data(steps: int, batch: int, seed: int) -> SimpleNamespace:
    """Return the ridge data with `batch` penalties."""
    d = one_penalty(steps, seed)
    largest = np.linalg.eigvalsh(d.X.T @ d.X / len(d.X))[-1] + np.exp(HIGHEST)
    d.penalties, d.step_size = np.linspace(LOWEST, HIGHEST, batch), float(1.0 / largest)
    return d


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the exact derivative of the last iterate at every penalty."""
    return {"batch": exact_unroll(d, d.penalties, d.runs["unroll"])}


# This library ---------------------------------------------------------------------------------------------------------


def _ours(d: SimpleNamespace, kind: str) -> dict[str, Any]:
    import torch

    import bilevel as bl

    problem = bl.problems.RidgeProblem(*(torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)))
    solver = bl.GradientDescent(step_size=d.step_size, steps=d.steps)
    u = torch.as_tensor(d.penalties)
    if kind == "spectral":
        spectral = bl.Spectral()
        return {"batch": lambda: spectral.sweep(problem, solver, u).hypergradients}
    return {"batch": lambda: bl.hypergradient(problem, solver, bl.FullUnroll(), u, batch=len(u))}


# Peers ----------------------------------------------------------------------------------------------------------------


def _jax(d: SimpleNamespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    gradient = jax.jit(jax.vmap(jax.grad(jax_unroll(d, d.runs["unroll"]))))
    u = jnp.asarray(d.penalties)
    return {"batch": lambda: gradient(u).block_until_ready()}


def _torch_batched(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    warm_torch()
    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))

    def batch() -> Any:
        u = torch.as_tensor(d.penalties).requires_grad_()
        w = torch.zeros(X.shape[1], len(u), dtype=X.dtype, requires_grad=True)
        for _ in range(d.steps):
            losses = 0.5 * (X @ w - y[:, None]).square().mean(0) + 0.5 * u.exp() * (w * w).sum(0)
            (gradient,) = torch.autograd.grad(losses.sum(), w, create_graph=True)
            w = w - d.step_size * gradient
        return torch.autograd.grad(0.5 * (X_val @ w - y_val[:, None]).square().mean(0).sum(), u)[0]

    return {"batch": batch}


def _torch_vmap(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    warm_torch()
    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))

    def inner(w: Any, u: Any) -> Any:
        return 0.5 * (X @ w - y).square().mean() + 0.5 * u.exp() * (w * w).sum()

    gradient = torch.func.grad(inner)

    def run(u: Any) -> Any:
        w = torch.zeros(X.shape[1], dtype=X.dtype)
        for _ in range(d.steps):
            w = w - d.step_size * gradient(w, u)
        return 0.5 * (X_val @ w - y_val).square().mean()

    u = torch.as_tensor(d.penalties)
    return {"batch": lambda: torch.func.vmap(torch.func.grad(run))(u)}


PROBLEMS = [
    Problem(
        key="p1b",
        title="P1b: P1 at 64 penalties at once",
        words="One call returns 64 hypergradients. Reference: forward recursion in 80-bit arithmetic.",
        sizes={"full": {"steps": 1000, "batch": 64}, "quick": {"steps": 100, "batch": 64}},
        data=data,
        reference=reference,
        tasks={"batch": Task("64 hypergradients", tolerance=1e-9)},
        contestants=[
            Contestant("bilevel Spectral.sweep", lambda d: _ours(d, "spectral"), "bilevel", "eigenbasis kept"),
            Contestant("bilevel FullUnroll, batch=64", lambda d: _ours(d, "unroll"), "bilevel"),
            Contestant("jax.vmap of jax.lax.scan", _jax, "jax", compiles="batch"),
            Contestant("torch autograd by hand, batched", _torch_batched, "torch"),
            Contestant("torch.func.vmap", _torch_vmap, "torch"),
        ],
        asked=[
            Asked("batch", ["bilevel Spectral.sweep"], ["jax.vmap*"], 50.0, 1000.0, words="jax.vmap"),
            Asked("batch", ["bilevel FullUnroll, batch=64"], ["jax.vmap*"], 3.5, words="jax.vmap"),
        ],
        absent={"higher, torchopt": "no batch over hyperparameters; a loop takes 64 times their time in P1"},
    )
]
