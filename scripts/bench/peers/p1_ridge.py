"""P1 and P1s: the derivative of 1,000 steps on ridge regression, one penalty: breast_cancer, and wide data (P1w)."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from contest import Asked, Contestant, Problem, Task
from shared import BEFORE, breast_cancer, earlier, warm_torch

LOG_PENALTY = -3.0
MOMENTUM, TAIL, LONG = 0.9, 50, 100
"""The last `TAIL` of `LONG` times as many steps are differentiated where the unroll is truncated."""
TOLERANCE, LARGE_PENALTY = 1e-9, 1.5
"""The gradient's norm that ends a run, and the log penalty with which it does so after a few dozen steps."""


def data(steps: int, seed: int) -> SimpleNamespace:
    """Return the splits of breast_cancer, and the steps."""
    return _with_steps(*breast_cancer(seed), steps)


def wide_data(steps: int, rows: int, features: int, seed: int) -> SimpleNamespace:
    """Return Gaussian data with more features than rows, and the steps."""
    random = np.random.default_rng(seed)
    X, X_val = random.standard_normal((2, rows, features))
    truth = random.standard_normal(features) / features**0.5
    y, y_val = (Z @ truth + random.standard_normal(rows) for Z in (X, X_val))
    d = _with_steps(X, y, X_val, y_val, steps)
    d.runs = {"unroll": d.runs["unroll"]}
    return d


def _with_steps(X: Any, y: Any, X_val: Any, y_val: Any, steps: int) -> SimpleNamespace:
    """Return the splits, what each task runs, and the step size 1 / (largest curvature)."""
    largest = np.linalg.norm(X, 2) ** 2 / len(X) + np.exp(LOG_PENALTY)
    runs = {
        "unroll": Steps(steps),
        "tolerance": Steps(LONG * steps, tol=TOLERANCE),
        "short": Steps(LONG * steps, tol=TOLERANCE, log_penalty=LARGE_PENALTY),
        "heavyball": Steps(steps, momentum=MOMENTUM),
        "nesterov": Steps(steps, momentum=MOMENTUM, ahead=MOMENTUM),
        "truncated": Steps(LONG * steps, tail=TAIL),
    }
    step_size = float(1.0 / largest)
    return SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, steps=steps, step_size=step_size, runs=runs)


@dataclass(frozen=True)
class Steps:
    """``y = w + ahead (w - w_before)``, then ``w_next = w + momentum (w - w_before) - h grad(y)``, so many times.

    Args:
        count: steps.
        momentum: of the step.
        ahead: of the point at which the gradient is taken.
        tail: the last steps that are differentiated; None: all.
        tol: the norm of the gradient that ends the run before.
        log_penalty: of the problem.
    """

    count: int
    momentum: float = 0.0
    ahead: float = 0.0
    tail: int | None = None
    tol: float = 0.0
    log_penalty: float = LOG_PENALTY


def exact_unroll(d: SimpleNamespace, log_penalties: Any, run: Steps) -> Any:
    """Return the derivative of the last iterate at each penalty, by forward recursion in 80-bit arithmetic."""
    wide = np.longdouble
    X, y, X_val, y_val = (part.astype(wide) for part in (d.X, d.y, d.X_val, d.y_val))
    moment, h = X.T @ y / len(X), wide(d.step_size)
    if len(X) > X.shape[1]:
        gram = X.T @ X / len(X)
        product = lambda v: v @ gram  # noqa: E731
    else:
        product = lambda v: (v @ X.T) @ X / len(X)  # noqa: E731
    penalty = np.exp(np.asarray(log_penalties, dtype=wide))[:, None]
    momentum, ahead = wide(run.momentum), wide(run.ahead)
    w, w_before, dw, dw_before = np.zeros((4, len(penalty), X.shape[1]), dtype=wide)
    for step in range(run.count):
        at, moved = w + ahead * (w - w_before), w - w_before
        gradient = product(at) - moment + penalty * at
        if run.tol and float((gradient * gradient).sum()) <= run.tol**2:
            break
        if run.tail is None or step >= run.count - run.tail:
            dat, dmoved = dw + ahead * (dw - dw_before), dw - dw_before
            change = product(dat) + penalty * (dat + at)
            dw, dw_before = dw + momentum * dmoved - h * change, dw
        w, w_before = w + momentum * moved - h * gradient, w
    slope = (w @ X_val.T - y_val) @ X_val / len(X_val)
    return (slope * dw).sum(1)


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the exact derivative of the last iterate of every run."""
    return {task: exact_unroll(d, [run.log_penalty], run)[0] for task, run in d.runs.items()}


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

    def call(run: Steps) -> Any:
        u = torch.tensor(run.log_penalty, dtype=torch.float64)
        solver = bl.GradientDescent(step_size=d.step_size, steps=run.count)
        if run.tol:
            solver = bl.GradientDescent(step_size=d.step_size, tol=run.tol)
        if run.momentum:
            momentum = bl.Nesterov if run.ahead else bl.HeavyBall
            solver = momentum(step_size=d.step_size, momentum=run.momentum, steps=run.count)
        estimator = bl.FullUnroll("reverse", "checkpoint" if kind == "checkpoint" else "iterates")
        if kind == "spectral":
            estimator = bl.Spectral()
        if run.tail:
            estimator = bl.TruncatedUnroll(run.tail)
        return lambda: bl.hypergradient(problem, solver, estimator, u)

    return {task: call(run) for task, run in d.runs.items() if task == "unroll" or kind == "Gram"}


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


def jax_unroll(d: SimpleNamespace, run: Steps, on_gram: bool = False) -> Any:
    """Return log penalty -> outer loss after the steps, by `jax.lax.scan`; with `on_gram`, on a Gram matrix at hand."""
    import jax
    import jax.numpy as jnp

    inner, outer = jax_losses(d)
    gradient = jax.grad(inner)
    if on_gram:
        gram, moment = jnp.asarray(d.X.T @ d.X / len(d.X)), jnp.asarray(d.X.T @ d.y / len(d.X))
        gradient = lambda w, u: gram @ w - moment + jnp.exp(u) * w  # noqa: E731

    def plain(w: Any, u: Any) -> Any:
        return w - d.step_size * gradient(w, u)

    def with_momentum(pair: Any, u: Any) -> Any:
        w, before = pair
        at = w + run.ahead * (w - before) if run.ahead else w
        return w + run.momentum * (w - before) - d.step_size * gradient(at, u), w

    def after(state: Any, u: Any, steps: int) -> Any:
        step = with_momentum if run.momentum else plain
        return jax.lax.scan(lambda state, _: (step(state, u), None), state, length=steps)[0]

    def value(u: Any) -> Any:
        zeros = jnp.zeros(d.X.shape[1])
        state, tail = (zeros, zeros) if run.momentum else zeros, run.tail or run.count
        if tail < run.count:
            state = jax.lax.stop_gradient(after(state, jax.lax.stop_gradient(u), run.count - tail))
        state = after(state, u, tail)
        return outer(state[0] if run.momentum else state)

    return value


def jax_scan(d: SimpleNamespace, on_gram: bool = False) -> dict[str, Any]:
    """Return the calls of jax, compiled, reverse mode through a scan."""
    import jax

    def call(run: Steps) -> Any:
        gradient = jax.jit(jax.grad(jax_unroll(d, run, on_gram)))
        return lambda: gradient(LOG_PENALTY).block_until_ready()

    return {task: call(run) for task, run in d.runs.items() if not run.tol}


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
GRAM, ON_X, ANY = (f"bilevel FullUnroll, {kind}" for kind in ("Gram matrix", "X", "any loss"))
JAX, JAX_ON_GRAM = "jax.lax.scan", "jax.lax.scan, Gram matrix"
OURS_ON_GRAM = Contestant(GRAM, lambda d: ours(d, "Gram"), "bilevel")
OURS_BEFORE = Contestant(BEFORE, earlier(lambda d: ours(d, "Gram")), note="an earlier commit, by git")
BY_JAX = Contestant(JAX, jax_scan, "jax", compiles="*")


def on_gram(task: str) -> list[Asked]:
    """Return what is asked of an unroll on the Gram matrix."""
    return [
        Asked(task, [GRAM], [JAX], 3.0),
        Asked(task, [GRAM], [JAX_ON_GRAM], 0.3, 1.0),
        Asked(task, [GRAM], [BEFORE], 10.0),
    ]


PROBLEMS = [
    Problem(
        key="p1",
        title="P1: ridge, breast_cancer (341 x 30), one penalty, derivative of 1,000 gradient steps",
        words="The answer is the derivative of the last iterate's validation loss, not of the solution's. Momentum is "
        f"0.9; where the unroll is truncated, the last {TAIL} of 100,000 steps are differentiated. Reference: forward "
        "recursion in 80-bit arithmetic.",
        sizes={"full": {"steps": 1000}, "quick": {"steps": 200}},
        data=data,
        reference=reference,
        tasks={
            "unroll": Task("one hypergradient", tolerance=1e-9),
            "heavyball": Task("heavy ball", tolerance=1e-9),
            "nesterov": Task("Nesterov", tolerance=1e-9),
            "tolerance": Task("all steps to a gradient of norm 1e-9, some 3,700", tolerance=1e-9),
            "short": Task(f"the same with a log penalty of {LARGE_PENALTY}, some 60 steps", tolerance=1e-9),
            "truncated": Task(f"the last {TAIL} of 100,000 steps (quick: 20,000)", tolerance=1e-9),
        },
        contestants=[
            OURS_ON_GRAM,
            Contestant(ON_X, lambda d: ours(d, "on X"), "bilevel"),
            Contestant(ANY, lambda d: ours(d, "any loss"), "bilevel", "autograd oracles"),
            Contestant("bilevel Spectral", lambda d: ours(d, "spectral"), "bilevel", "eigenbasis kept"),
            OURS_BEFORE,
            Contestant("torch autograd by hand", torch_by_hand, "torch"),
            Contestant("higher", _higher, "higher"),
            Contestant("torchopt MetaSGD", _torchopt, "torchopt"),
            BY_JAX,
            Contestant(JAX_ON_GRAM, lambda d: jax_scan(d, on_gram=True), "jax", "Gram matrix kept", compiles="*"),
            Contestant("jaxopt GradientDescent, unrolled", _jaxopt, "jaxopt", compiles="unroll"),
        ],
        asked=[
            *on_gram("unroll"),
            *on_gram("heavyball"),
            *on_gram("nesterov"),
            Asked("tolerance", [GRAM], [BEFORE], 4.5),
            Asked("short", [GRAM], [BEFORE], 4.5),
            Asked("truncated", [GRAM], [BEFORE], 300.0),
            Asked("truncated", [GRAM], [JAX_ON_GRAM]),
            Asked("unroll", [ON_X], [JAX], 0.3),
            Asked("unroll", [ON_X], TORCH, 4.0, words="fastest torch peer"),
            Asked("unroll", [GRAM], TORCH, 8.0, words="fastest torch peer"),
            Asked("unroll", [ANY], TORCH, 5.0, words="fastest torch peer"),
            Asked("unroll", [ANY], [], measure="first_cpu", at_most=1.2),
            Asked("unroll", ["bilevel Spectral"], [JAX], 100.0),
            Asked("unroll", ["bilevel Spectral"], [JAX_ON_GRAM], 8.0),
            Asked("unroll", ["bilevel Spectral"], TORCH, 1000.0, words="fastest torch peer"),
        ],
        absent={
            "hypergrad, betty-ml": "no unrolled derivative of a given number of plain steps with respect to a penalty",
        },
    ),
    Problem(
        key="p1w",
        title="P1w: ridge, 60 x 2,000, one penalty, derivative of 1,000 gradient steps",
        words="More features than rows. Reference: forward recursion in 80-bit arithmetic.",
        sizes={
            "full": {"steps": 1000, "rows": 60, "features": 2000},
            "quick": {"steps": 100, "rows": 60, "features": 500},
        },
        data=wide_data,
        reference=reference,
        tasks={"unroll": Task("one hypergradient", tolerance=1e-9)},
        contestants=[
            Contestant("bilevel FullUnroll", lambda d: ours(d, "Gram"), "bilevel"),
            OURS_BEFORE,
            Contestant("torch autograd by hand", torch_by_hand, "torch"),
            BY_JAX,
        ],
        asked=[
            Asked("unroll", ["bilevel FullUnroll"], [BEFORE], 20.0),
            Asked("unroll", ["bilevel FullUnroll"], [JAX]),
            Asked("unroll", ["bilevel FullUnroll"], TORCH),
        ],
    ),
]
