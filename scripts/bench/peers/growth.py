"""How time and memory grow: with the number of steps, of parameters, and of hyperparameters. Each task is one point."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import implicit_peers as peers
import numpy as np
import p1_ridge
import p2_logistic
from contest import Contestant, Problem, Task
from shared import warm_torch

STEPS = (10, 30, 100, 300, 1000, 3000, 10_000)
FEATURES = (10, 50, 200, 1000, 5000)
HPARAMS = (1, 10, 100, 1000, 10_000, 100_000)
FORWARD_AT_MOST = 100
WEIGHTS, UNROLLED = 50, 100

# Steps ----------------------------------------------------------------------------------------------------------------


def steps_data(points: int, seed: int) -> list[SimpleNamespace]:
    """Return the ridge problem of P1 for each number of steps."""
    return [p1_ridge.data(steps, seed) for steps in STEPS[:points]]


def steps_reference(ds: list[SimpleNamespace]) -> dict[str, Any]:
    """Return the exact derivative of the last iterate for each number of steps."""
    return {str(d.steps): p1_ridge.exact_unroll(d, [p1_ridge.LOG_PENALTY], d.runs["unroll"]) for d in ds}


def by_steps(prepare: Any, ds: list[SimpleNamespace]) -> dict[str, Any]:
    """Return the calls of a contestant of P1."""
    return {str(d.steps): prepare(d)["unroll"] for d in ds}


# Parameters -----------------------------------------------------------------------------------------------------------


def features_data(points: int, seed: int) -> list[SimpleNamespace]:
    """Return the logistic problem of P2 for each number of features, with 2,000 rows."""
    return [p2_logistic.data(2000, features, 1, seed) for features in FEATURES[:points]]


def features_reference(ds: list[SimpleNamespace]) -> dict[str, Any]:
    """Return the exact first hypergradient for each number of features."""
    return {str(d.size): peers.dense_newton(p2_logistic.formulas(d), d)["first"] for d in ds}


def by_features(prepare: Any, ds: list[SimpleNamespace]) -> dict[str, Any]:
    """Return the calls of a contestant of P2."""
    return {str(d.size): prepare(d)["first"] for d in ds}


# Hyperparameters ------------------------------------------------------------------------------------------------------


def hparams_data(points: int, seed: int) -> list[SimpleNamespace]:
    """Return a ridge problem whose 50 log penalties are sums of groups of hyperparameters: ``log pen_j = (M u)_j``.

    The weights, and the work on them, are the same however many hyperparameters there are.
    """
    random = np.random.default_rng(seed)
    X, X_val = random.standard_normal((2, 300, WEIGHTS))
    truth = random.standard_normal(WEIGHTS)
    y, y_val = (Z @ truth + random.standard_normal(300) for Z in (X, X_val))
    ds = []
    for count in HPARAMS[:points]:
        M = random.standard_normal((WEIGHTS, count)) / count**0.5
        u = np.full(count, -0.1)
        largest = np.linalg.norm(X, 2) ** 2 / 300 + np.exp(M @ u).max()
        ds.append(SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, M=M, u=u, step_size=float(1.0 / largest)))
    return ds


def hparams_reference(ds: list[SimpleNamespace]) -> dict[str, Any]:
    """Return the derivative of the last iterate by forward recursion in the penalties, in 80-bit arithmetic."""
    wide, answers = np.longdouble, {}
    for d in ds:
        X, y, X_val, y_val = (part.astype(wide) for part in (d.X, d.y, d.X_val, d.y_val))
        gram, moment, h = X.T @ X / len(X), X.T @ y / len(X), wide(d.step_size)
        penalty = np.exp(d.M.astype(wide) @ d.u.astype(wide))
        w, T = np.zeros(WEIGHTS, wide), np.zeros((WEIGHTS, WEIGHTS), wide)
        for _ in range(UNROLLED):
            T = T - h * (gram @ T + penalty[:, None] * T + np.diag(penalty * w))
            w = w - h * (gram @ w - moment + penalty * w)
        slope = X_val.T @ (X_val @ w - y_val) / len(X_val)
        answers[str(len(d.u))] = (slope @ T) @ d.M.astype(wide)
    return answers


def _torch_losses(d: SimpleNamespace) -> tuple[Any, Any]:
    import torch

    warm_torch()
    X, y, X_val, y_val, M = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val, d.M))

    def inner(w: Any, u: Any) -> Any:
        return 0.5 * (X @ w - y).square().mean() + 0.5 * ((M @ u).exp() * w * w).sum()

    return inner, lambda w: 0.5 * (X_val @ w - y_val).square().mean()


def hparams_ours(ds: list[SimpleNamespace], mode: str) -> dict[str, Any]:
    """Return the calls of this library, on the losses as they are written."""
    import torch

    import bilevel as bl

    def call(d: SimpleNamespace) -> Any:
        inner, outer = _torch_losses(d)
        problem = bl.BilevelProblem(inner, lambda w, u: outer(w), params=torch.zeros(WEIGHTS, dtype=torch.float64))
        solver, estimator = bl.GradientDescent(step_size=d.step_size, steps=UNROLLED), bl.FullUnroll(mode=mode)
        u = torch.as_tensor(d.u)
        return lambda: bl.hypergradient(problem, solver, estimator, u).hypergradient

    most = FORWARD_AT_MOST if mode == "forward" else HPARAMS[-1]
    return {str(len(d.u)): call(d) for d in ds if len(d.u) <= most}


def hparams_torch(ds: list[SimpleNamespace]) -> dict[str, Any]:
    """Return the calls of torch autograd by hand."""
    import torch

    def call(d: SimpleNamespace) -> Any:
        inner, outer = _torch_losses(d)

        def unroll() -> Any:
            u = torch.as_tensor(d.u).clone().requires_grad_()
            w = torch.zeros(WEIGHTS, dtype=torch.float64, requires_grad=True)
            for _ in range(UNROLLED):
                w = w - d.step_size * torch.autograd.grad(inner(w, u), w, create_graph=True)[0]
            return torch.autograd.grad(outer(w), u)[0]

        return unroll

    return {str(len(d.u)): call(d) for d in ds}


def hparams_jax(ds: list[SimpleNamespace]) -> dict[str, Any]:
    """Return the calls of jax, reverse mode through a scan."""
    import jax
    import jax.numpy as jnp

    def call(d: SimpleNamespace) -> Any:
        X, y, X_val, y_val, M = (jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val, d.M))

        def inner(w: Any, u: Any) -> Any:
            return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(M @ u) * w * w)

        def run(u: Any) -> Any:
            step = lambda w, _: (w - d.step_size * jax.grad(inner)(w, u), None)  # noqa: E731
            w = jax.lax.scan(step, jnp.zeros(WEIGHTS), length=UNROLLED)[0]
            return 0.5 * jnp.mean((X_val @ w - y_val) ** 2)

        gradient, u = jax.jit(jax.grad(run)), jnp.asarray(d.u)
        return lambda: gradient(u).block_until_ready()

    return {str(len(d.u)): call(d) for d in ds}


# The contests ---------------------------------------------------------------------------------------------------------


def _points(values: tuple[int, ...], tolerance: float) -> dict[str, Task]:
    return {str(value): Task(f"{value:,}", tolerance=tolerance, rounds=3) for value in values}


def _steps_contestant(name: str, prepare: Any, package: str) -> Contestant:
    return Contestant(name, partial(by_steps, prepare), package, compiles="*" if package == "jax" else "")


def _features_contestant(name: str, prepare: Any, package: str) -> Contestant:
    return Contestant(name, partial(by_features, prepare), package, compiles="*" if package == "jaxopt" else "")


PROBLEMS = [
    Problem(
        key="growth of steps",
        title="Growth with the number of inner steps",
        words="The ridge problem of P1.",
        sizes={"full": {"points": len(STEPS)}, "quick": {"points": 3}},
        data=steps_data,
        reference=steps_reference,
        tasks=_points(STEPS, 1e-8),
        contestants=[
            _steps_contestant("bilevel FullUnroll, Gram matrix", partial(p1_ridge.ours, kind="Gram"), "bilevel"),
            _steps_contestant("bilevel FullUnroll, any loss", partial(p1_ridge.ours, kind="any loss"), "bilevel"),
            _steps_contestant("bilevel checkpointed, any loss", partial(p1_ridge.ours, kind="checkpoint"), "bilevel"),
            _steps_contestant("bilevel Spectral", partial(p1_ridge.ours, kind="spectral"), "bilevel"),
            _steps_contestant("torch autograd by hand", p1_ridge.torch_by_hand, "torch"),
            _steps_contestant("jax.lax.scan", p1_ridge.jax_scan, "jax"),
        ],
    ),
    Problem(
        key="growth of parameters",
        title="Growth with the number of parameters",
        words="The logistic problem of P2 with 2,000 rows and one penalty for each feature: first hypergradient.",
        sizes={"full": {"points": len(FEATURES)}, "quick": {"points": 2}},
        data=features_data,
        reference=features_reference,
        tasks=_points(FEATURES, 1e-4),
        contestants=[
            _features_contestant(p2_logistic.OURS[0], partial(p2_logistic.ours, kind="quasi-Newton"), "bilevel"),
            _features_contestant(p2_logistic.OURS[1], partial(p2_logistic.ours, kind="Newton"), "bilevel"),
            _features_contestant("torch L-BFGS, CG by hand", p2_logistic.torch_by_hand, "torch"),
            _features_contestant("jaxopt LBFGS, implicit CG", p2_logistic.jaxopt, "jaxopt"),
        ],
    ),
    Problem(
        key="growth of hyperparameters",
        title="Growth with the number of hyperparameters",
        words="Ridge regression with 50 weights whose log penalties are linear in the hyperparameters; 100 steps.",
        sizes={"full": {"points": len(HPARAMS)}, "quick": {"points": 3}},
        data=hparams_data,
        reference=hparams_reference,
        tasks=_points(HPARAMS, 1e-8),
        contestants=[
            Contestant("bilevel FullUnroll, any loss", partial(hparams_ours, mode="reverse"), "bilevel"),
            Contestant("bilevel FullUnroll, forward", partial(hparams_ours, mode="forward"), "bilevel"),
            Contestant("torch autograd by hand", hparams_torch, "torch"),
            Contestant("jax.lax.scan", hparams_jax, "jax", compiles="*"),
        ],
    ),
]
