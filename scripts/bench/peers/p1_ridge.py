"""P1 and P1s: the derivative of 1,000 gradient steps on ridge regression, breast_cancer, one penalty."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from contest import Asked, Contestant, Problem, Task
from shared import breast_cancer, warm_torch

LOG_PENALTY = -3.0


def data(steps: int, seed: int) -> SimpleNamespace:
    """Return the splits, the number of steps, and the step size 1 / (largest curvature)."""
    X, y, X_val, y_val = breast_cancer(seed)
    largest = np.linalg.eigvalsh(X.T @ X / len(X))[-1] + np.exp(LOG_PENALTY)
    return SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, steps=steps, step_size=float(1.0 / largest))


def exact_unroll(d: SimpleNamespace, log_penalties: Any) -> Any:
    """Return the derivative of the K-step iterate at each penalty, by forward recursion in 80-bit arithmetic."""
    wide = np.longdouble
    X, y, X_val, y_val = (part.astype(wide) for part in (d.X, d.y, d.X_val, d.y_val))
    gram, moment, h = X.T @ X / len(X), X.T @ y / len(X), wide(d.step_size)
    penalty = np.exp(np.asarray(log_penalties, dtype=wide))[:, None]
    w, dw = np.zeros((2, len(penalty), gram.shape[0]), dtype=wide)
    for _ in range(d.steps):
        dw = dw - h * (dw @ gram + penalty * (dw + w))
        w = w - h * (w @ gram - moment + penalty * w)
    slope = (w @ X_val.T - y_val) @ X_val / len(X_val)
    return (slope * dw).sum(1)


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the exact derivative of the last iterate."""
    return {"unroll": exact_unroll(d, [LOG_PENALTY])[0]}


# This library ---------------------------------------------------------------------------------------------------------


def ours(d: SimpleNamespace, kind: str) -> dict[str, Any]:
    """Return the calls of this library: on the "Gram" matrix, "on X", "spectral", for "any loss", or "checkpoint"."""
    import torch

    import bilevel as bl

    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))
    ridge = bl.problems.RidgeProblem
    if kind == "on X":
        # What the class does by itself for more features than rows: products with X in place of the Gram matrix.
        ridge = type("RidgeOnX", (ridge,), {"on_gram": False})
    if kind in ("any loss", "checkpoint"):
        warm_torch()
        problem = bl.BilevelProblem(
            inner_loss=lambda w, u: 0.5 * (X @ w - y).square().mean() + 0.5 * u.exp() * (w * w).sum(),
            outer_loss=lambda w, u: 0.5 * (X_val @ w - y_val).square().mean(),
            params=torch.zeros(X.shape[1], dtype=X.dtype),
        )
    else:
        problem = ridge(X, y, X_val, y_val)
    solver = bl.GradientDescent(step_size=d.step_size, steps=d.steps)
    estimator = bl.Spectral() if kind == "spectral" else bl.FullUnroll()
    if kind == "checkpoint":
        estimator = bl.FullUnroll(memory="checkpoint")
    u = torch.tensor(LOG_PENALTY, dtype=torch.float64)
    return {"unroll": lambda: bl.hypergradient(problem, solver, estimator, u).hypergradient}


# Peers ----------------------------------------------------------------------------------------------------------------


def torch_by_hand(d: SimpleNamespace) -> dict[str, Any]:
    """Return the calls of a loop with `create_graph`, as every tutorial shows it."""
    import torch

    warm_torch()
    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))

    def unroll() -> Any:
        u = torch.tensor(LOG_PENALTY, dtype=X.dtype, requires_grad=True)
        w = torch.zeros(X.shape[1], dtype=X.dtype, requires_grad=True)
        for _ in range(d.steps):
            loss = 0.5 * (X @ w - y).square().mean() + 0.5 * u.exp() * (w * w).sum()
            (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - d.step_size * gradient
        return torch.autograd.grad(0.5 * (X_val @ w - y_val).square().mean(), u)[0]

    return {"unroll": unroll}


def _linear_module(features: int) -> Any:
    import torch

    class Linear(torch.nn.Module):
        """``X w``."""

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(features, dtype=torch.float64))

        def forward(self, X: Any) -> Any:
            """Return the predictions."""
            return X @ self.w

    return Linear()


def _module_losses(d: SimpleNamespace) -> tuple[Any, Any]:
    import torch

    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))

    def inner(model: Any, weights: Any, u: Any) -> Any:
        return 0.5 * (model(X) - y).square().mean() + 0.5 * u.exp() * (weights * weights).sum()

    return inner, lambda model: 0.5 * (model(X_val) - y_val).square().mean()


def _higher(d: SimpleNamespace) -> dict[str, Any]:
    import higher
    import torch

    warm_torch()
    inner, outer = _module_losses(d)

    def unroll() -> Any:
        u = torch.tensor(LOG_PENALTY, dtype=torch.float64, requires_grad=True)
        model = _linear_module(d.X.shape[1])
        sgd = torch.optim.SGD(model.parameters(), lr=d.step_size)
        with higher.innerloop_ctx(model, sgd) as (functional, differentiable):
            for _ in range(d.steps):
                differentiable.step(inner(functional, functional.w, u))
            return torch.autograd.grad(outer(functional), u)[0]

    return {"unroll": unroll}


def _torchopt(d: SimpleNamespace) -> dict[str, Any]:
    import torch
    import torchopt

    warm_torch()
    inner, outer = _module_losses(d)

    def unroll() -> Any:
        u = torch.tensor(LOG_PENALTY, dtype=torch.float64, requires_grad=True)
        model = _linear_module(d.X.shape[1])
        sgd = torchopt.MetaSGD(model, lr=d.step_size)
        for _ in range(d.steps):
            sgd.step(inner(model, model.w, u))
        return torch.autograd.grad(outer(model), u)[0]

    return {"unroll": unroll}


def jax_losses(d: SimpleNamespace) -> tuple[Any, Any]:
    """Return (inner loss of weights and log penalty, outer loss) for jax."""
    import jax.numpy as jnp

    X, y, X_val, y_val = (jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val))

    def inner(w: Any, u: Any) -> Any:
        return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.exp(u) * (w @ w)

    return inner, lambda w: 0.5 * jnp.mean((X_val @ w - y_val) ** 2)


def jax_unroll(d: SimpleNamespace) -> Any:
    """Return log penalty -> outer loss after the steps, by `jax.lax.scan`."""
    import jax
    import jax.numpy as jnp

    inner, outer = jax_losses(d)
    gradient = jax.grad(inner)

    def run(u: Any) -> Any:
        step = lambda w, _: (w - d.step_size * gradient(w, u), None)  # noqa: E731
        return outer(jax.lax.scan(step, jnp.zeros(d.X.shape[1]), length=d.steps)[0])

    return run


def jax_scan(d: SimpleNamespace) -> dict[str, Any]:
    """Return the calls of jax, compiled, reverse mode through a scan."""
    import jax

    gradient = jax.jit(jax.grad(jax_unroll(d)))
    return {"unroll": lambda: gradient(LOG_PENALTY).block_until_ready()}


def _jaxopt(d: SimpleNamespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import jaxopt

    inner, outer = jax_losses(d)
    solver = jaxopt.GradientDescent(
        inner, stepsize=d.step_size, maxiter=d.steps, tol=0.0, acceleration=False, implicit_diff=False
    )
    gradient = jax.jit(jax.grad(lambda u: outer(solver.run(jnp.zeros(d.X.shape[1]), u).params)))
    return {"unroll": lambda: gradient(LOG_PENALTY).block_until_ready()}


TORCH = ("torch*", "higher")

PROBLEMS = [
    Problem(
        key="p1",
        title="P1: ridge, breast_cancer (341 x 30), one penalty, derivative of 1,000 gradient steps",
        words="The answer is the derivative of the last iterate's validation loss, not of the solution's. "
        "Reference: forward recursion in 80-bit arithmetic.",
        sizes={"full": {"steps": 1000}, "quick": {"steps": 200}},
        data=data,
        reference=reference,
        tasks={"unroll": Task("one hypergradient", tolerance=1e-9)},
        contestants=[
            Contestant("bilevel FullUnroll, Gram matrix", lambda d: ours(d, "Gram"), "bilevel"),
            Contestant("bilevel FullUnroll, X", lambda d: ours(d, "on X"), "bilevel"),
            Contestant("bilevel FullUnroll, any loss", lambda d: ours(d, "any loss"), "bilevel", "autograd oracles"),
            Contestant("bilevel Spectral", lambda d: ours(d, "spectral"), "bilevel", "eigenbasis kept"),
            Contestant("torch autograd by hand", torch_by_hand, "torch"),
            Contestant("higher", _higher, "higher"),
            Contestant("torchopt MetaSGD", _torchopt, "torchopt"),
            Contestant("jax.lax.scan", jax_scan, "jax", compiles="unroll"),
            Contestant("jaxopt GradientDescent, unrolled", _jaxopt, "jaxopt", compiles="unroll"),
        ],
        asked=[
            Asked("unroll", ["bilevel FullUnroll, X"], TORCH, 4.0, words="fastest torch peer"),
            Asked("unroll", ["bilevel FullUnroll, Gram matrix"], TORCH, 8.0, words="fastest torch peer"),
            Asked("unroll", ["bilevel FullUnroll, Gram matrix"], ["jax.lax.scan"], None, 1.0, words="jax.lax.scan"),
            Asked("unroll", ["bilevel FullUnroll, any loss"], TORCH, None, words="fastest torch peer"),
            Asked("unroll", ["bilevel Spectral"], ["jax.lax.scan"], 20.0, 100.0, words="jax.lax.scan"),
            Asked("unroll", ["bilevel Spectral"], TORCH, 1000.0, words="fastest torch peer"),
        ],
        absent={
            "hypergrad, betty-ml": "no unrolled derivative of a given number of plain steps with respect to a penalty",
        },
    )
]
