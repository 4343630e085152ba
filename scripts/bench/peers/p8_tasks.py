"""P8: the meta-gradient of MAML over the tasks of a meta-batch: a large network, and many tasks of a small one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from contest import Asked, Contestant, Problem, Task

SHOWN = 1000
"""Components of the meta-gradient that are compared."""


def data(tasks: int, widths: Sequence[int], shots: int, queries: int, steps: int, seed: int) -> SimpleNamespace:
    """Return the rows of every task, the first weights, and which components are compared."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((tasks, shots + queries, widths[0]))
    truth = random.standard_normal((tasks, widths[0], widths[-1]))
    outputs = np.sin(inputs @ truth)
    targets = outputs.argmax(-1) if widths[-1] > 1 else outputs
    start = {}
    for index, (into, out) in enumerate(pairwise(widths)):
        start[f"{2 * index}.weight"] = random.standard_normal((out, into)) / into**0.5
        start[f"{2 * index}.bias"] = np.zeros(out)
    size = sum(part.size for part in start.values())
    picks = random.permutation(size)[:SHOWN]
    return SimpleNamespace(
        tasks=tasks, widths=widths, shots=shots, steps=steps, inputs=inputs, targets=targets, start=start, picks=picks,
        rate=0.01, classes=widths[-1] > 1,
    )  # fmt: skip


def grade(d: SimpleNamespace, task: str, answer: list[float]) -> Any:
    """Return the components that are compared."""
    return np.array(answer)[d.picks]


def _parts(d: SimpleNamespace, dtype: str = "float32") -> SimpleNamespace:
    """Return module, loss and tasks in torch."""
    import torch

    layers: list[Any] = []
    for into, out in pairwise(d.widths):
        layers += [torch.nn.Linear(into, out), torch.nn.ReLU()]
    module = torch.nn.Sequential(*layers[:-1]).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), d.start.values(), strict=True):
            parameter.copy_(torch.as_tensor(value))
    X = torch.as_tensor(d.inputs, dtype=getattr(torch, dtype))
    y = torch.as_tensor(d.targets, dtype=None if d.classes else X.dtype)
    loss = torch.nn.functional.cross_entropy if d.classes else torch.nn.functional.mse_loss
    tasks = [((X[i, : d.shots], y[i, : d.shots]), (X[i, d.shots :], y[i, d.shots :])) for i in range(d.tasks)]
    return SimpleNamespace(module=module, loss=loss, tasks=tasks, X=X, y=y)


def _ours(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    import bilevel as bl
    from bilevel.meta import MetaProblem

    parts = _parts(d)
    problem = MetaProblem(parts.module, parts.loss, lambda index: parts.tasks[index % d.tasks], batch_size=d.tasks)
    solver, u = bl.GradientDescent(d.rate, steps=d.steps), problem.initial_hparams()
    bl.hypergradient(problem, solver, bl.FullUnroll(), u)  # as an outer loop: it looks at its problem once

    def call() -> Any:
        estimate = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False)
        leaves = [leaf.reshape(-1) for leaf in estimate.hypergradient["init"].values()]
        return SimpleNamespace(hypergradient=torch.cat(leaves), certificate=estimate.certificate)

    return {"meta": call}


def _loop(d: SimpleNamespace, dtype: str = "float32") -> dict[str, Any]:
    """Return the call of a loop over tasks with `create_graph`, which keeps the graph of one task at a time."""
    import torch

    sys.path.append(str(Path(__file__).parents[1]))
    from maml_reference import PlainMAML

    parts = _parts(d, dtype)
    maml = PlainMAML(parts.module, parts.loss, d.rate, d.steps)

    def call() -> Any:
        parts.module.zero_grad()
        for support, query in parts.tasks:
            (maml.at(maml.adapted(support, d.steps, True), query) / d.tasks).backward()
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in parts.module.parameters()])
        parts.module.zero_grad()  # or what it frees would be taken off what the next call holds
        return gradient

    return {"meta": call}


def _vmap(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    parts = _parts(d)
    X, y = (part.split([d.shots, part.shape[1] - d.shots], dim=1) for part in (parts.X, parts.y))
    start = {name: value.detach() for name, value in parts.module.named_parameters()}

    def at(weights: Any, X: Any, y: Any) -> Any:
        return parts.loss(torch.func.functional_call(parts.module, weights, (X,)), y)

    def adapted(weights: Any, X: Any, y: Any, X_query: Any, y_query: Any) -> Any:
        for _ in range(d.steps):
            gradients = torch.func.grad(at)(weights, X, y)
            weights = {name: value - d.rate * gradients[name] for name, value in weights.items()}
        return at(weights, X_query, y_query)

    many = torch.func.vmap(torch.func.grad(adapted), in_dims=(None, 0, 0, 0, 0))

    def call() -> Any:
        gradients = many(start, X[0], y[0], X[1], y[1])
        return torch.cat([each.mean(0).reshape(-1) for each in gradients.values()])

    return {"meta": call}


def _jax(d: SimpleNamespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    start = [jnp.asarray(value, dtype=jnp.float32) for value in d.start.values()]
    X = jnp.asarray(d.inputs, dtype=jnp.float32)
    y = jnp.asarray(d.targets) if d.classes else jnp.asarray(d.targets, dtype=jnp.float32)

    def loss(weights: Any, X: Any, y: Any) -> Any:
        for index in range(0, len(weights), 2):
            X = X @ weights[index].T + weights[index + 1]
            X = X if index == len(weights) - 2 else jax.nn.relu(X)
        if not d.classes:
            return jnp.mean((X - y) ** 2)
        return jnp.mean(jax.nn.logsumexp(X, axis=1) - jnp.take_along_axis(X, y[:, None], axis=1)[:, 0])

    def adapted(weights: Any, X: Any, y: Any) -> Any:
        def step(weights: Any, _: Any) -> Any:
            gradients = jax.grad(loss)(weights, X[: d.shots], y[: d.shots])
            return [w - d.rate * g for w, g in zip(weights, gradients, strict=True)], None

        return loss(jax.lax.scan(step, weights, length=d.steps)[0], X[d.shots :], y[d.shots :])

    def mean(weights: Any) -> Any:
        return jnp.mean(jax.vmap(adapted, in_axes=(None, 0, 0))(weights, X, y))

    gradient = jax.jit(lambda weights: jnp.concatenate([each.ravel() for each in jax.grad(mean)(weights)]))
    return {"meta": lambda: gradient(start).block_until_ready()}


OURS, LOOP, VMAP = "bilevel MetaProblem, FullUnroll", "torch autograd by hand, a loop", "torch.func.vmap by hand"
JAX = "jax.vmap of jax.lax.scan"
CONTESTANTS = [
    Contestant(OURS, _ours, "bilevel"),
    Contestant(LOOP, _loop, "torch"),
    Contestant(VMAP, _vmap, "torch"),
    Contestant(JAX, _jax, "jax", compiles="meta"),
]
LARGE = {"tasks": 8, "widths": (784, 520, 256, 5), "shots": 25, "queries": 75, "steps": 5}
SMALL = {"tasks": 64, "widths": (1, 40, 40, 1), "shots": 10, "queries": 10, "steps": 5}


def _problem(key: str, title: str, size: dict[str, Any], quick: dict[str, Any], asked: Sequence[Asked]) -> Problem:
    return Problem(
        key=key,
        title=f"P8: MAML, {title}, 5 steps",
        words="The gradient of the mean query loss by the first weights, in float32. Reference: a loop over tasks in "
        f"float64; {SHOWN:,} components are compared.",
        sizes={"full": size, "quick": size | quick},
        data=data,
        reference=lambda d: {"meta": grade(d, "meta", _loop(d, "float64")["meta"]().tolist())},
        tasks={"meta": Task("one meta-gradient", tolerance=1e-4, live=True)},
        contestants=CONTESTANTS,
        asked=asked,
        grade=grade,
    )


PROBLEMS = [
    _problem(
        "p8", "8 tasks, 540,000 weights", LARGE, {"widths": (196, 64, 32, 5)},
        [
            Asked("meta", [OURS], [LOOP], 1 / 1.1),
            Asked("meta", [OURS], [LOOP], 1 / 1.3, measure="live"),
            Asked("meta", [OURS], [JAX]),
        ],
    ),
    _problem(
        "p8s", "64 sine tasks, 1-40-40-1", SMALL, {"tasks": 8},
        [Asked("meta", [OURS], [VMAP]), Asked("meta", [OURS], [LOOP]), Asked("meta", [OURS], [JAX])],
    ),
]  # fmt: skip
