"""P6: the derivative of gradient steps on logistic regression, a penalty a feature, and on softmax regression."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import p5_forward as softmax
from contest import Asked, Contestant, Problem, Task
from shared import BEFORE, earlier, warm_torch

CLASSES = 4


def data(logistic: int, softmax: int, rows: int, features: int, seed: int) -> SimpleNamespace:
    """Return Gaussian features, noisy labels of four classes, and the numbers of steps."""
    random = np.random.default_rng(seed)
    X, X_val = random.standard_normal((2, rows, features))
    truth = random.standard_normal((features, CLASSES))
    y, y_val = ((Z @ truth + 2.0 * random.standard_normal((rows, CLASSES))).argmax(1) for Z in (X, X_val))
    curvature = np.linalg.norm(X, 2) ** 2 / rows
    d = SimpleNamespace(X=X, X_val=X_val, y=y, y_val=y_val, steps={"softmax": softmax})
    d.u = np.array([-5.0, -4.0, -4.5, -5.5])
    d.step_size = float(1.0 / (0.5 * curvature + np.exp(d.u.max())))
    d.logistic = SimpleNamespace(X=X, X_val=X_val, steps=logistic, u=np.linspace(-6.0, -3.0, features))
    d.logistic.y, d.logistic.y_val = (np.where(labels < CLASSES // 2, -1.0, 1.0) for labels in (y, y_val))
    d.logistic.step_size = float(1.0 / (0.25 * curvature + np.exp(d.logistic.u.max())))
    return d


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the derivatives of the last iterates by forward recursion, by hand in 80-bit arithmetic."""
    wide, part = np.longdouble, d.logistic
    X, y, X_val, y_val, u = (each.astype(wide) for each in (part.X, part.y, part.X_val, part.y_val, part.u))
    h, penalty, n = wide(part.step_size), np.exp(u), len(X)
    expit = lambda z: 1.0 / (1.0 + np.exp(-z))  # noqa: E731
    w, T = np.zeros(len(u), wide), np.zeros((len(u), len(u)), wide)
    for _ in range(part.steps):
        s = expit(-y * (X @ w))
        moved = ((T @ X.T) * (s * (1.0 - s))) @ X / n + T * penalty + np.diag(penalty * w)
        T, w = T - h * moved, w - h * (penalty * w - (y * s) @ X / n)
    slope = -(y_val * expit(-y_val * (X_val @ w))) @ X_val / len(X_val)
    return {"logistic": T @ slope} | softmax.reference(d)


def _ours(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    import bilevel as bl

    part = d.logistic
    problem = bl.problems.LogisticProblem(
        *(torch.as_tensor(each) for each in (part.X, part.y, part.X_val, part.y_val)), penalty="per_feature"
    )
    solver, u = bl.GradientDescent(step_size=part.step_size, steps=part.steps), torch.as_tensor(part.u)
    return {"logistic": lambda: bl.hypergradient(problem, solver, bl.FullUnroll(), u)} | softmax.ours(d, "reverse")


def _torch_losses(d: SimpleNamespace) -> tuple[Any, Any]:
    import torch

    X, y, X_val, y_val = (torch.as_tensor(each) for each in (d.X, d.y, d.X_val, d.y_val))
    softplus = torch.nn.functional.softplus

    def inner(w: Any, u: Any) -> Any:
        return softplus(-y * (X @ w)).mean() + 0.5 * (u.exp() * w * w).sum()

    return inner, lambda w: softplus(-y_val * (X_val @ w)).mean()


def _ours_any(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    import bilevel as bl

    warm_torch()
    part = d.logistic
    inner, outer = _torch_losses(part)
    problem = bl.BilevelProblem(inner, lambda w, u: outer(w), params=torch.zeros(len(part.u), dtype=torch.float64))
    solver, u = bl.GradientDescent(step_size=part.step_size, steps=part.steps), torch.as_tensor(part.u)
    return {"logistic": lambda: bl.hypergradient(problem, solver, bl.FullUnroll(), u)}


def _torch_by_hand(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    warm_torch()
    part = d.logistic
    inner, outer = _torch_losses(part)

    def logistic() -> Any:
        u = torch.as_tensor(part.u).clone().requires_grad_()
        w = torch.zeros(len(u), dtype=u.dtype, requires_grad=True)
        for _ in range(part.steps):
            w = w - part.step_size * torch.autograd.grad(inner(w, u), w, create_graph=True)[0]
        return torch.autograd.grad(outer(w), u)[0]

    return {"logistic": logistic} | softmax.by_torch(d, forward=False)


def _jax(d: SimpleNamespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    part = d.logistic
    X, y, X_val, y_val, u = (jnp.asarray(each) for each in (part.X, part.y, part.X_val, part.y_val, part.u))

    def inner(w: Any, u: Any) -> Any:
        return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.5 * jnp.sum(jnp.exp(u) * w * w)

    def run(u: Any) -> Any:
        step = lambda w, _: (w - part.step_size * jax.grad(inner)(w, u), None)  # noqa: E731
        w = jax.lax.scan(step, jnp.zeros(len(u)), length=part.steps)[0]
        return jnp.mean(jnp.logaddexp(0.0, -y_val * (X_val @ w)))

    gradient = jax.jit(jax.grad(run))
    return {"logistic": lambda: gradient(u).block_until_ready()} | softmax.by_jax(d, forward=False)


OURS, ANY, JAX, TORCH = "bilevel FullUnroll", "bilevel FullUnroll, any loss", "jax.lax.scan", "torch autograd by hand"

PROBLEMS = [
    Problem(
        key="p6",
        title="P6: logistic and softmax regression, 341 x 30, derivative of 1,000 and 400 gradient steps",
        words="Logistic regression has a penalty for each feature, softmax regression one for each of four classes. "
        "The answer is the derivative of the last iterate's validation loss. Reference: forward recursion, by hand in "
        "80-bit arithmetic.",
        sizes={
            "full": {"logistic": 1000, "softmax": 400, "rows": 341, "features": 30},
            "quick": {"logistic": 100, "softmax": 40, "rows": 341, "features": 30},
        },
        data=data,
        reference=reference,
        tasks={
            "logistic": Task("logistic regression", tolerance=1e-9),
            "softmax": Task("softmax regression", tolerance=1e-9),
        },
        contestants=[
            Contestant(OURS, _ours, "bilevel"),
            Contestant(ANY, _ours_any, "bilevel", "the loss as it is written"),
            Contestant(BEFORE, earlier(_ours), note="an earlier commit, by git"),
            Contestant(TORCH, _torch_by_hand, "torch"),
            Contestant(JAX, _jax, "jax", compiles="*"),
        ],
        asked=[
            Asked("logistic", [OURS], [JAX], 0.5),
            Asked("softmax", [OURS], [JAX], 0.7),
            Asked("logistic", [ANY], [TORCH], 2.5),
            Asked("logistic", [ANY], [], measure="first_cpu", at_most=1.2),
            Asked("logistic", [OURS], [BEFORE]),
            Asked("softmax", [OURS], [BEFORE]),
        ],
    )
]
