"""P5: forward mode with four hyperparameters: memory must not grow with the number of steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from contest import Asked, Contestant, Problem, Task
from shared import digits, warm_torch

CLASSES, ROWS = 4, 200


def data(short: int, long: int, seed: int) -> SimpleNamespace:
    """Return four classes of digits, the two numbers of steps, and the step size 1 / (largest curvature)."""
    X, y, X_val, y_val = digits(seed, ROWS, CLASSES)
    u = np.array([-6.0, -5.5, -6.5, -5.0])
    largest = 0.5 * np.linalg.norm(X, 2) ** 2 / ROWS + np.exp(u.max())
    steps = {"short": short, "long": long}
    return SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, u=u, steps=steps, step_size=float(1.0 / largest))


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the derivative of the last iterate after each number of steps, by hand in 80-bit arithmetic."""
    wide = np.longdouble
    X, X_val, h, penalty = d.X.astype(wide), d.X_val.astype(wide), wide(d.step_size), np.exp(d.u.astype(wide))[:, None]
    onehot, onehot_val = (np.eye(CLASSES, dtype=wide)[labels].T for labels in (d.y, d.y_val))
    rows, features = X.shape
    W, T = np.zeros((CLASSES, features), wide), np.zeros((CLASSES, CLASSES, features), wide)

    def probabilities(Z: Any) -> Any:
        E = np.exp(Z - Z.max(0))
        return E / E.sum(0)

    answers = {}
    for step in range(1, max(d.steps.values()) + 1):
        P = probabilities(W @ X.T)
        Z = T @ X.T
        bent = P * (Z - (P * Z).sum(1, keepdims=True))
        moved = bent @ X / rows + penalty * T
        for j in range(CLASSES):
            moved[j, j] += penalty[j] * W[j]
        T, W = T - h * moved, W - h * ((P - onehot) @ X / rows + penalty * W)
        for name in (name for name, steps in d.steps.items() if steps == step):
            slope = (probabilities(W @ X_val.T) - onehot_val) @ X_val / len(X_val)
            answers[name] = (T * slope).sum((1, 2))
    return answers


def ours(d: SimpleNamespace, mode: str) -> dict[str, Any]:
    """Return the calls of this library."""
    import torch

    import bilevel as bl

    parts = [torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)]
    problem = bl.problems.SoftmaxProblem(*parts, penalty="per_class")
    u, estimator = torch.as_tensor(d.u), bl.FullUnroll(mode=mode)

    def call(steps: int) -> Any:
        solver = bl.GradientDescent(step_size=d.step_size, steps=steps)
        return lambda: bl.hypergradient(problem, solver, estimator, u)

    return {name: call(steps) for name, steps in d.steps.items()}


def by_jax(d: SimpleNamespace, forward: bool) -> dict[str, Any]:
    """Return the calls of jax, compiled, through a scan."""
    import jax
    import jax.numpy as jnp

    X, y, X_val, y_val = (jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val))

    def cross_entropy(W: Any, X: Any, y: Any) -> Any:
        Z = X @ W.T
        return jnp.mean(jax.nn.logsumexp(Z, axis=1) - jnp.take_along_axis(Z, y[:, None], axis=1)[:, 0])

    def inner(W: Any, u: Any) -> Any:
        return cross_entropy(W, X, y) + 0.5 * jnp.sum(jnp.exp(u)[:, None] * W * W)

    def call(steps: int) -> Any:
        def run(u: Any) -> Any:
            step = lambda W, _: (W - d.step_size * jax.grad(inner)(W, u), None)  # noqa: E731
            W = jax.lax.scan(step, jnp.zeros((CLASSES, X.shape[1])), length=steps)[0]
            return cross_entropy(W, X_val, y_val)

        gradient = jax.jit((jax.jacfwd if forward else jax.grad)(run))
        return lambda: gradient(jnp.asarray(d.u)).block_until_ready()

    return {name: call(steps) for name, steps in d.steps.items()}


def by_torch(d: SimpleNamespace, forward: bool) -> dict[str, Any]:
    """Return the calls of loops in torch: with `torch.func`, or a graph."""
    import torch

    warm_torch()
    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))
    cross_entropy = torch.nn.functional.cross_entropy
    zeros = torch.zeros(CLASSES, X.shape[1], dtype=X.dtype)

    def inner(W: Any, u: Any) -> Any:
        return cross_entropy(X @ W.t(), y) + 0.5 * (u.exp()[:, None] * W * W).sum()

    def outer(W: Any) -> Any:
        return cross_entropy(X_val @ W.t(), y_val)

    def reverse(steps: int) -> Any:
        u, W = torch.as_tensor(d.u).clone().requires_grad_(), zeros.clone().requires_grad_()
        for _ in range(steps):
            W = W - d.step_size * torch.autograd.grad(inner(W, u), W, create_graph=True)[0]
        return torch.autograd.grad(outer(W), u)[0]

    gradient = torch.func.grad(inner)

    def push(W: Any, u: Any, tangent: Any, direction: Any) -> Any:
        return torch.func.jvp(lambda W, u: W - d.step_size * gradient(W, u), (W, u), (tangent, direction))

    steps_of_all = torch.func.vmap(push, in_dims=(None, None, 0, 0), out_dims=(None, 0))

    def along(steps: int) -> Any:
        u, W, tangents = torch.as_tensor(d.u), zeros, torch.zeros(CLASSES, CLASSES, X.shape[1], dtype=X.dtype)
        for _ in range(steps):
            W, tangents = steps_of_all(W, u, tangents, torch.eye(CLASSES, dtype=X.dtype))
        return (tangents * torch.func.grad(outer)(W)).sum((1, 2))

    run = along if forward else reverse
    return {name: (lambda steps=steps: run(steps)) for name, steps in d.steps.items()}


FORWARD = "bilevel FullUnroll(mode='forward')"

PROBLEMS = [
    Problem(
        key="p5",
        title="P5: forward mode, softmax regression on four classes of digits (200 x 64), four penalties",
        words="Gradient descent; the answer is the derivative of the last iterate's validation loss. The reverse "
        "sweeps stand beside for their memory. Reference: forward recursion, by hand in 80-bit arithmetic.",
        sizes={"full": {"short": 300, "long": 3000}, "quick": {"short": 20, "long": 200}},
        data=data,
        reference=reference,
        tasks={
            "short": Task("a tenth of the steps", tolerance=1e-8, rounds=3),
            "long": Task("3,000 steps (quick: 200)", tolerance=1e-8, rounds=3),
        },
        contestants=[
            Contestant(FORWARD, lambda d: ours(d, "forward"), "bilevel"),
            Contestant("bilevel FullUnroll(mode='reverse')", lambda d: ours(d, "reverse"), "bilevel"),
            Contestant("torch.func.jvp by hand", lambda d: by_torch(d, True), "torch"),
            Contestant("torch autograd by hand, reverse", lambda d: by_torch(d, False), "torch"),
            Contestant("jax.jacfwd of jax.lax.scan", lambda d: by_jax(d, True), "jax", compiles="*"),
            Contestant("jax.grad of jax.lax.scan, reverse", lambda d: by_jax(d, False), "jax", compiles="*"),
        ],
        asked=[
            Asked("long", [FORWARD], ["a tenth of the steps"], 0.8, measure="memory of short"),
            Asked("long", [FORWARD], ["torch*reverse"], None, measure="memory"),
            Asked("long", [FORWARD], ["torch.func*"], None),
            Asked("long", [FORWARD], ["jax.jacfwd*"], 0.6),
        ],
        absent={"higher, torchopt": "no forward mode"},
    )
]
