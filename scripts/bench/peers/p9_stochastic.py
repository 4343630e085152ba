"""P9: a stochastic outer step, one inner step, one adjoint step and one outer step on batches: logistic, d = 22."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import p7_outer
from contest import Asked, Contestant, Problem, Task
from shared import warm_torch

BATCH, INNER_RATE, OUTER_RATE, START = 64, 0.3, 1.0, -1.0


def data(rows: int, features: int, steps: int, seed: int) -> SimpleNamespace:
    """Return the logistic data of P7, batches of each split with labels as signs, and those that each step takes."""
    d = p7_outer.data("logistic", rows, features, steps, seed)
    random = np.random.default_rng(seed + 1)
    d.parts = rows // BATCH
    signed = (d.y[:, None] * d.X, d.y_val[:, None] * d.X_val)
    d.batches = [each[: d.parts * BATCH].reshape(d.parts, BATCH, features) for each in signed]
    d.draws = random.integers(0, d.parts, (2, steps))
    d.rates = OUTER_RATE / np.sqrt(1.0 + np.arange(steps) / 50.0)
    return d


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the least outer loss of one penalty."""
    return {"loop": p7_outer.reference(d)["tune"]}


def grade(d: SimpleNamespace, task: str, answer: list[float]) -> list[float]:
    """Return the exact outer loss at the penalty where the steps have ended."""
    return [p7_outer.exact_loss(d, answer[0])]


def _loop(d: SimpleNamespace, problem: Any, **options: Any) -> dict[str, Any]:
    """Return SABA of this library with constant rates; the first call makes the loop, as that of jax compiles."""
    import torch

    import bilevel as bl

    warm_torch()
    made: list[Any] = []

    def call() -> Any:
        if not made:
            rates = {"inner_step": INNER_RATE, "outer_step": OUTER_RATE, "scaling": "none", "freeze": 0}
            method, start = bl.SABA(every=d.steps, **rates, **options), torch.tensor(START, dtype=torch.float64)
            loop = bl.SingleLoop(problem, method, start, certify=False)
            made.extend((loop, loop.state_dict()))
        loop, first = made
        loop.load_state_dict(first)
        return loop.run(d.steps, progress=False).hparams

    return {"loop": call}


def _linear(d: SimpleNamespace) -> dict[str, Any]:
    """Return the loop on the linear model, by closed forms."""
    import torch

    import bilevel as bl

    parts = [torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)]
    return _loop(d, bl.problems.LogisticProblem(*parts), batch_size=BATCH)


def _ours(d: SimpleNamespace) -> dict[str, Any]:
    """Return the loop on the losses as they are written, on batches of rows."""
    import torch

    import bilevel as bl

    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))
    softplus = torch.nn.functional.softplus

    def outer(w: Any, u: Any, batch: Any) -> Any:
        return softplus(-batch[1] * (batch[0] @ w)).mean()

    def inner(w: Any, u: Any, batch: Any) -> Any:
        return outer(w, u, batch) + 0.5 * u.exp() * (w @ w)

    samplers = [bl.MiniBatches(rows, BATCH) for rows in ((X, y), (X_val, y_val))]
    start = torch.zeros(d.size, dtype=X.dtype)
    return _loop(d, bl.BilevelProblem(inner, outer, start, sampler=samplers[0], outer_sampler=samplers[1]))


def _soba(d: SimpleNamespace) -> dict[str, Any]:
    """Return SOBA (Dagreou et al. 2022) by hand in NumPy."""
    from scipy.special import expit

    X, X_val = d.batches

    def call() -> Any:
        w, v, u = np.zeros(d.size), np.zeros(d.size), START
        for i, j, rate in zip(*d.draws, d.rates, strict=True):
            A, B, penalty = X[i], X_val[j], np.exp(u)
            s = expit(-(A @ w))
            gradient = penalty * w - s @ A / BATCH
            product = ((s * (1.0 - s)) * (A @ v)) @ A / BATCH + penalty * v
            slope = -(expit(-(B @ w)) @ B) / BATCH
            w, v, u = w - INNER_RATE * gradient, v - INNER_RATE * (product - slope), u + rate * penalty * (w @ v)
        return u

    return {"loop": call}


def _saba(d: SimpleNamespace) -> dict[str, Any]:
    """Return SABA (Dagreou et al. 2022) by jax: tables of the directions of every batch, a scan that is compiled."""
    import jax
    import jax.numpy as jnp

    X, X_val = (jnp.asarray(each) for each in d.batches)
    draws, rates = tuple(jnp.asarray(each) for each in d.draws), jnp.asarray(d.rates)

    def inner(A: Any, w: Any, v: Any, penalty: Any) -> Any:
        s = jax.nn.sigmoid(-(A @ w))
        product = ((s * (1.0 - s)) * (A @ v)) @ A / BATCH + penalty * v
        return jnp.stack([penalty * w - s @ A / BATCH, product])

    def outer(B: Any, w: Any) -> Any:
        return -(jax.nn.sigmoid(-(B @ w)) @ B) / BATCH

    def averaged(table: Any, mean: Any, index: Any, new: Any) -> tuple[Any, Any, Any]:
        change = new - table[index]
        return change + mean, table.at[index].set(new), mean + change / d.parts

    def step(state: Any, drawn: Any) -> Any:
        (w, v, u, G, F), (i, j, rate) = state, drawn
        penalty = jnp.exp(u)
        g, *G = averaged(*G, i, inner(X[i], w, v, penalty))
        f, *F = averaged(*F, j, outer(X_val[j], w))
        return (w - INNER_RATE * g[0], v - INNER_RATE * (g[1] - f), u + rate * penalty * (w @ v), G, F), None

    @jax.jit
    def run(u: Any) -> Any:
        w = v = jnp.zeros(d.size)
        tables = [jax.vmap(lambda A: inner(A, w, v, jnp.exp(u)))(X), jax.vmap(lambda B: outer(B, w))(X_val)]
        state = (w, v, u, *([table, table.mean(0)] for table in tables))
        return jax.lax.scan(step, state, (*draws, rates))[0][2]

    return {"loop": lambda: run(START).block_until_ready()}


OURS, LINEAR = "bilevel SingleLoop, any loss", "bilevel SingleLoop, linear model"
SOBA, SABA = "SOBA by hand, NumPy", "SABA, jax.lax.scan"
STEPS = 1000

PROBLEMS = [
    Problem(
        key="p9",
        title="P9: stochastic outer steps, logistic regression, 6,400 x 22, batches of 64, one penalty",
        words="Each outer step takes one inner step and one adjoint step, each on a batch. The exact outer loss at the "
        "last penalty is compared with the least one, found by dense Newton steps in NumPy. The loops of this library "
        "are `SingleLoop` with SABA: their time holds the record on all data at the end, and their first call what a "
        "loss takes to be recorded; nothing of a record is certified here.",
        sizes={
            "full": {"rows": 6400, "features": 22, "steps": STEPS},
            "quick": {"rows": 1280, "features": 22, "steps": STEPS},
        },
        data=data,
        reference=reference,
        tasks={"loop": Task("one outer step", tolerance=0.01, per=STEPS, rounds=3, unit="outer step")},
        contestants=[
            Contestant(OURS, _ours, "bilevel"),
            Contestant(LINEAR, _linear, "bilevel"),
            Contestant(SOBA, _soba, "numpy", "formulas by hand"),
            Contestant(SABA, _saba, "jax", "formulas by hand", compiles="loop"),
        ],
        asked=[
            Asked("loop", [OURS], [], at_most=250e-6),
            Asked("loop", [LINEAR], [], at_most=60e-6),
            Asked("loop", [OURS, LINEAR], [SABA]),
        ],
        grade=grade,
    )
]  # fmt: skip
