"""Softmax regression on digits for P3 and P3c: data, formulas in NumPy, losses for torch and jax.

    inner   1/n sum_i s_i (logsumexp(z_i) - z_i[y_i]) + 1/2 sum pen W^2,   z_i = W x_i

with W of shape (classes, features), flattened row by row. What the hyperparameters are, `d.tuned` says: "penalties",
``pen = exp(u)`` and s = 1; or "weights", ``s = sigmoid(u)`` and pen fixed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from shared import digits

CLASSES, FEATURES = 10, 64


def data(tuned: str, rows: int, steps: int, seed: int, penalty: float, corrupted: float = 0.0) -> SimpleNamespace:
    """Return digits with the labels of a share of the training rows replaced by random ones."""
    X, y, X_val, y_val = digits(seed, rows)
    random = np.random.default_rng(seed + 1)
    wrong = random.permutation(len(y))[: round(corrupted * len(y))]
    y = y.copy()
    y[wrong] = random.integers(0, CLASSES, len(wrong))
    size = CLASSES * FEATURES
    u = np.full(size, np.log(penalty)) if tuned == "penalties" else np.zeros(len(y))
    return SimpleNamespace(
        X=X, y=y, X_val=X_val, y_val=y_val, u=u, size=size, steps=steps, tuned=tuned, penalty=penalty
    )


def formulas(d: SimpleNamespace) -> SimpleNamespace:
    """Return what `implicit_peers` needs, in NumPy: class-major, as is fastest there."""
    from scipy.special import expit, softmax

    n, m = len(d.y), len(d.y_val)
    Xt, Xt_val = np.ascontiguousarray(d.X.T), np.ascontiguousarray(d.X_val.T)
    onehot, onehot_val = (np.eye(CLASSES)[labels].T for labels in (d.y, d.y_val))

    def parts(u: Any) -> tuple[Any, Any]:
        if d.tuned == "penalties":
            return np.full(n, 1.0 / n), np.exp(u).reshape(CLASSES, FEATURES)
        return expit(u) / n, np.full((CLASSES, FEATURES), d.penalty)

    def inner(w: Any, u: Any) -> tuple[float, Any]:
        W, (s, penalty) = w.reshape(CLASSES, FEATURES), parts(u)
        Z = W @ Xt
        top = Z.max(0)
        E = np.exp(Z - top)
        total = E.sum(0)
        value = s @ (np.log(total) + top - (Z * onehot).sum(0)) + 0.5 * (penalty * W * W).sum()
        return value, (((E / total - onehot) * s) @ d.X + penalty * W).ravel()

    def products(w: Any, u: Any) -> Any:
        (s, penalty), P = parts(u), softmax(w.reshape(CLASSES, FEATURES) @ Xt, axis=0)

        def product(v: Any) -> Any:
            V = v.reshape(CLASSES, FEATURES)
            bent = P * (V @ Xt)
            bent -= P * bent.sum(0)
            return ((bent * s) @ d.X + penalty * V).ravel()

        return product

    def hessian(w: Any, u: Any) -> Any:
        (s, penalty), P = parts(u), softmax(w.reshape(CLASSES, FEATURES) @ Xt, axis=0)
        blocks = np.empty((CLASSES, FEATURES, CLASSES, FEATURES))
        for i in range(CLASSES):
            for j in range(CLASSES):
                blocks[i, :, j] = (Xt * (s * P[i] * ((i == j) - P[j]))) @ d.X
        return blocks.reshape(d.size, d.size) + np.diag(penalty.ravel())

    def outer_gradient(w: Any) -> Any:
        return ((softmax(w.reshape(CLASSES, FEATURES) @ Xt_val, axis=0) - onehot_val) @ d.X_val).ravel() / m

    def pull(w: Any, u: Any, adjoint: Any) -> Any:
        if d.tuned == "penalties":
            return -np.exp(u) * w * adjoint
        W, A = w.reshape(CLASSES, FEATURES), adjoint.reshape(CLASSES, FEATURES)
        return -expit(u) * expit(-u) / n * ((softmax(W @ Xt, axis=0) - onehot) * (A @ Xt)).sum(0)

    return SimpleNamespace(inner=inner, products=products, hessian=hessian, outer_gradient=outer_gradient, pull=pull)


def jax_losses(d: SimpleNamespace) -> tuple[Any, Any]:
    """Return inner and outer loss for jax."""
    import jax
    import jax.numpy as jnp

    X, y, X_val, y_val = (jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val))

    def each(w: Any, X: Any, y: Any) -> Any:
        Z = X @ w.reshape(CLASSES, FEATURES).T
        return jax.nn.logsumexp(Z, axis=1) - jnp.take_along_axis(Z, y[:, None], axis=1)[:, 0]

    def inner(w: Any, u: Any) -> Any:
        if d.tuned == "penalties":
            return jnp.mean(each(w, X, y)) + 0.5 * jnp.sum(jnp.exp(u) * w * w)
        return jnp.mean(jax.nn.sigmoid(u) * each(w, X, y)) + 0.5 * d.penalty * jnp.sum(w * w)

    return inner, lambda w: jnp.mean(each(w, X_val, y_val))


def torch_losses(d: SimpleNamespace) -> tuple[Any, Any]:
    """Return inner and outer loss for torch."""
    import torch

    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))
    cross_entropy = torch.nn.functional.cross_entropy

    def inner(w: Any, u: Any) -> Any:
        Z = X @ w.reshape(CLASSES, FEATURES).t()
        if d.tuned == "penalties":
            return cross_entropy(Z, y) + 0.5 * (u.exp() * w * w).sum()
        return (u.sigmoid() * cross_entropy(Z, y, reduction="none")).mean() + 0.5 * d.penalty * (w * w).sum()

    return inner, lambda w: cross_entropy(X_val @ w.reshape(CLASSES, FEATURES).t(), y_val)
