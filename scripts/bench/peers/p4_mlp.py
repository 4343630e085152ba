"""P4: an MLP 64-128-10 on digits, four weight decays, the derivative of 100 SGD steps with batches of 64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from contest import Asked, Contestant, Problem, Task
from shared import digits, warm_torch

RATE, BATCH, HIDDEN, CLASSES = 0.1, 64, 128, 10
NAMES = ("W1", "b1", "W2", "b2")


def data(steps: int, seed: int) -> SimpleNamespace:
    """Return digits, the rows of every batch, the first weights, and the log weight decay of each tensor."""
    X, y, X_val, y_val = digits(seed)
    random = np.random.default_rng(seed + 1)
    epochs = -(-steps * BATCH // len(X)) + 1
    rows = np.concatenate([random.permutation(len(X))[: len(X) // BATCH * BATCH] for _ in range(epochs)])
    start = [
        random.standard_normal((HIDDEN, 64)) / 8.0,
        np.zeros(HIDDEN),
        random.standard_normal((CLASSES, HIDDEN)) / HIDDEN**0.5,
        np.zeros(CLASSES),
    ]
    rows = rows[: steps * BATCH].reshape(steps, BATCH)
    u = np.array([-5.0, -6.0, -4.5, -5.5])
    return SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, rows=rows, start=start, steps=steps, u=u)


def _gradient(w: Any, tangents: Any, X: Any, onehot: Any) -> tuple[Any, Any]:
    """Return the gradient of the mean cross-entropy, and its derivatives along `tangents`, by hand."""
    W1, b1, W2, b2 = w
    H = np.tanh(X @ W1.T + b1)
    Z = H @ W2.T + b2
    P = np.exp(Z - Z.max(1, keepdims=True))
    P /= P.sum(1, keepdims=True)
    dZ, slope = (P - onehot) / len(X), 1.0 - H * H
    dH = dZ @ W2
    gradient = [(dH * slope).T @ X, (dH * slope).sum(0), dZ.T @ H, dZ.sum(0)]
    derivatives = []
    for V1, v1, V2, v2 in tangents:
        tH = slope * (X @ V1.T + v1)
        tZ = tH @ W2.T + H @ V2.T + v2
        tdZ = P * (tZ - (P * tZ).sum(1, keepdims=True)) / len(X)
        tdA = (tdZ @ W2 + dZ @ V2) * slope - 2.0 * dH * H * tH
        derivatives.append([tdA.T @ X, tdA.sum(0), tdZ.T @ H + dZ.T @ tH, tdZ.sum(0)])
    return gradient, derivatives


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the derivative of the last iterate by forward recursion, by hand in 80-bit arithmetic."""
    wide = np.longdouble
    X, X_val = d.X.astype(wide), d.X_val.astype(wide)
    onehot, onehot_val = (np.eye(CLASSES, dtype=wide)[labels] for labels in (d.y, d.y_val))
    decay = np.exp(d.u.astype(wide))
    w = [part.astype(wide) for part in d.start]
    tangents = [[np.zeros_like(part) for part in w] for _ in NAMES]
    for rows in d.rows:
        gradient, derivatives = _gradient(w, tangents, X[rows], onehot[rows])
        for j, (tangent, derivative) in enumerate(zip(tangents, derivatives, strict=True)):
            for i in range(4):
                moved = derivative[i] + decay[i] * tangent[i] + (decay[i] * w[i] if i == j else 0)
                tangent[i] = tangent[i] - wide(RATE) * moved
        w = [part - wide(RATE) * (g + e * part) for part, g, e in zip(w, gradient, decay, strict=True)]
    outer, _ = _gradient(w, [], X_val, onehot_val)
    return {"unroll": [sum((g * t).sum() for g, t in zip(outer, tangent, strict=True)) for tangent in tangents]}


# This library ---------------------------------------------------------------------------------------------------------


def _torch_parts(d: SimpleNamespace) -> SimpleNamespace:
    import torch

    warm_torch()
    X, y, X_val, y_val, rows = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val, d.rows))
    batches = [(X[index], y[index]) for index in rows]
    cross_entropy = torch.nn.functional.cross_entropy

    def logits(w: Any, X: Any) -> Any:
        return torch.tanh(X @ w["W1"].t() + w["b1"]) @ w["W2"].t() + w["b2"]

    def inner(w: Any, u: Any, batch: Any) -> Any:
        penalty = sum(decay * (w[name] * w[name]).sum() for name, decay in zip(NAMES, u.exp(), strict=True))
        return cross_entropy(logits(w, batch[0]), batch[1]) + 0.5 * penalty

    start = dict(zip(NAMES, map(torch.as_tensor, d.start), strict=True))
    outer = lambda w: cross_entropy(logits(w, X_val), y_val)  # noqa: E731
    u = torch.as_tensor(d.u)
    return SimpleNamespace(batches=batches, inner=inner, outer=outer, start=start, u=u, full=(X, y))


def _ours(d: SimpleNamespace, mode: str, memory: str = "iterates") -> dict[str, Any]:
    import bilevel as bl

    parts = _torch_parts(d)

    class Batches:
        """The same batches as everybody's."""

        def __call__(self, step: int) -> Any:
            return parts.batches[step]

        def full(self) -> Any:
            return parts.full

    problem = bl.BilevelProblem(parts.inner, lambda w, u: parts.outer(w), params=parts.start, sampler=Batches())
    if mode:
        problem = bl.trace(problem, mode)
    solver = bl.GradientDescent(step_size=RATE, steps=d.steps)
    estimator = bl.FullUnroll(memory=memory)
    return {"unroll": lambda: bl.hypergradient(problem, solver, estimator, parts.u)}


# Peers ----------------------------------------------------------------------------------------------------------------


def _torch_by_hand(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    parts = _torch_parts(d)

    def unroll() -> Any:
        u = parts.u.clone().requires_grad_()
        w = {name: value.clone().requires_grad_() for name, value in parts.start.items()}
        for batch in parts.batches:
            gradients = torch.autograd.grad(parts.inner(w, u, batch), list(w.values()), create_graph=True)
            w = {name: value - RATE * g for (name, value), g in zip(w.items(), gradients, strict=True)}
        return torch.autograd.grad(parts.outer(w), u)[0]

    return {"unroll": unroll}


def _module(start: Any) -> Any:
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, CLASSES)).double()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), start.values(), strict=True):
            parameter.copy_(value)
    return net


def _loss(net: Any, weights: Any, u: Any, batch: Any) -> Any:
    import torch

    penalty = sum(decay * (w * w).sum() for w, decay in zip(weights, u.exp(), strict=True))
    return torch.nn.functional.cross_entropy(net(batch[0]), batch[1]) + 0.5 * penalty


def _higher(d: SimpleNamespace) -> dict[str, Any]:
    import higher
    import torch

    parts, X_val, y_val = _torch_parts(d), torch.as_tensor(d.X_val), torch.as_tensor(d.y_val)

    def unroll() -> Any:
        u, net = parts.u.clone().requires_grad_(), _module(parts.start)
        with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=RATE)) as (functional, differentiable):
            for batch in parts.batches:
                differentiable.step(_loss(functional, functional.parameters(), u, batch))
            return torch.autograd.grad(torch.nn.functional.cross_entropy(functional(X_val), y_val), u)[0]

    return {"unroll": unroll}


def _torchopt(d: SimpleNamespace) -> dict[str, Any]:
    import torch
    import torchopt

    parts, X_val, y_val = _torch_parts(d), torch.as_tensor(d.X_val), torch.as_tensor(d.y_val)

    def unroll() -> Any:
        u, net = parts.u.clone().requires_grad_(), _module(parts.start)
        sgd = torchopt.MetaSGD(net, lr=RATE)
        for batch in parts.batches:
            # The package replaces parameters by plain tensors, which the layers still hold by name.
            weights = (net[0].weight, net[0].bias, net[2].weight, net[2].bias)
            sgd.step(_loss(net, weights, u, batch))
        return torch.autograd.grad(torch.nn.functional.cross_entropy(net(X_val), y_val), u)[0]

    return {"unroll": unroll}


def _jax(d: SimpleNamespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    X, y, X_val, y_val, rows = (jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val, d.rows))

    def cross_entropy(w: Any, X: Any, y: Any) -> Any:
        Z = jnp.tanh(X @ w[0].T + w[1]) @ w[2].T + w[3]
        return jnp.mean(jax.nn.logsumexp(Z, axis=1) - jnp.take_along_axis(Z, y[:, None], axis=1)[:, 0])

    def inner(w: Any, u: Any, index: Any) -> Any:
        penalty = sum(decay * jnp.sum(part * part) for decay, part in zip(jnp.exp(u), w, strict=True))
        return cross_entropy(w, X[index], y[index]) + 0.5 * penalty

    def run(u: Any) -> Any:
        def step(w: Any, index: Any) -> Any:
            return [part - RATE * g for part, g in zip(w, jax.grad(inner)(w, u, index), strict=True)], None

        return cross_entropy(jax.lax.scan(step, [jnp.asarray(part) for part in d.start], rows)[0], X_val, y_val)

    gradient, u = jax.jit(jax.grad(run)), jnp.asarray(d.u)
    return {"unroll": lambda: gradient(u).block_until_ready()}


EAGER = ["bilevel FullUnroll", "bilevel FullUnroll, traced fx"]
TORCH = ("torch*", "higher")

PROBLEMS = [
    Problem(
        key="p4",
        title="P4: MLP 64-128-10 on digits, four weight decays, derivative of 100 SGD steps, batches of 64",
        words="The answer is the derivative of the last iterate's validation loss. Reference: forward recursion, by "
        "hand in 80-bit arithmetic.",
        sizes={"full": {"steps": 100}, "quick": {"steps": 20}},
        data=data,
        reference=reference,
        tasks={"unroll": Task("one hypergradient", tolerance=1e-8, live=True)},
        contestants=[
            Contestant("bilevel FullUnroll", lambda d: _ours(d, ""), "bilevel", "stored iterates"),
            Contestant(
                "bilevel FullUnroll, checkpoint", lambda d: _ours(d, "", "checkpoint"), "bilevel", "steps taken twice"
            ),
            Contestant("bilevel FullUnroll, graph", lambda d: _ours(d, "", "graph"), "bilevel", "autograd graph"),
            Contestant("bilevel FullUnroll, traced fx", lambda d: _ours(d, "fx"), "bilevel", compiles="unroll"),
            Contestant("torch autograd by hand", _torch_by_hand, "torch"),
            Contestant("higher", _higher, "higher"),
            Contestant("torchopt MetaSGD", _torchopt, "torchopt"),
            Contestant("jax.lax.scan", _jax, "jax", compiles="unroll"),
        ],
        asked=[
            Asked("unroll", EAGER, TORCH, 1.7, words="fastest torch peer"),
            Asked("unroll", EAGER, TORCH, 1 / 0.65, measure="live", words="leanest torch peer"),
            Asked("unroll", ["bilevel FullUnroll, checkpoint"], TORCH, 1.0, words="fastest torch peer"),
            Asked("unroll", ["bilevel FullUnroll, checkpoint"], TORCH, 2.5, measure="live", words="leanest torch peer"),
            Asked("unroll", [*EAGER, "bilevel FullUnroll, graph"], TORCH, 1.0, 2.0, words="fastest torch peer"),
            Asked("unroll", ["bilevel FullUnroll, traced fx"], TORCH, 1.0, 2.0, words="fastest torch peer"),
            Asked("unroll", EAGER, TORCH, 3.0, 6.0, measure="memory", words="leanest torch peer"),
            Asked("unroll", ["bilevel FullUnroll*"], ["jax.lax.scan"], None),
        ],
    )
]
