"""Exact hypergradients of penalised linear models in extended precision, with numpy alone: the bounds' referee.

Newton's method on residuals in long double; its linear systems are solved in float64 and refined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

Array = Any
LONG = np.longdouble


@dataclass(frozen=True)
class Truth:
    """The exact inner solution, adjoint and hypergradient, and the residual that proves the first."""

    x: Array
    w: Array
    hypergradient: Array
    residual: float


@dataclass(frozen=True)
class Model:
    """``sum_i omega_i loss(W a_i, y_i) + 1/2 sum pen W^2``, outer ``mean loss(W b_i, y_i)``; rows are a_i and b_i.

    `kind` is "squared", "logistic" (labels -1, 1) or "softmax" (labels 0, 1, ...); `pen` is shaped as the weights,
    `owner` says which hyperparameter each weight's penalty belongs to, and `slope` is ``d pen / d u``.
    """

    kind: str
    A: Array
    y: Array
    B: Array
    t: Array
    pen: Array
    slope: Array
    owner: Array
    omega: Array
    omega_slope: Array | None = None
    omega_owner: Array | None = None

    def slopes(self, Z: Array, y: Array) -> Array:
        """The derivatives of the losses with respect to predictions (classes, rows)."""
        if self.kind == "squared":
            return Z - y
        if self.kind == "logistic":
            return -y / (1 + np.exp(y * Z))
        P = np.exp(Z - Z.max(0))
        P = P / P.sum(0)
        P[y, np.arange(len(y))] -= 1
        return P

    def bends(self, Z: Array) -> Array:
        """The second derivatives (classes, classes, rows)."""
        if self.kind == "squared":
            return np.ones((1, 1, Z.shape[1]), Z.dtype)
        if self.kind == "logistic":
            return (1 / ((1 + np.exp(Z)) * (1 + np.exp(-Z))))[None]
        P = np.exp(Z - Z.max(0))
        P = P / P.sum(0)
        return np.einsum("ci,ck->cki", P, np.eye(len(P))) - P[:, None] * P[None]

    def gradient(self, x: Array) -> Array:
        """The inner gradient at x of shape (classes, features), in the precision of x."""
        A = self.A.astype(x.dtype)
        return (self.omega * self.slopes(x @ A.T, self.y)) @ A + self.pen * x

    def outer_gradient(self, x: Array) -> Array:
        """The outer gradient at x."""
        B = self.B.astype(x.dtype)
        return self.slopes(x @ B.T, self.t) @ B / len(B)

    def hessian(self, x: Array) -> Array:
        """The dense Hessian in float64."""
        S = self.bends((x @ self.A.T.astype(x.dtype)).astype(float)) * np.asarray(self.omega, float)
        C, d = x.shape
        H = np.einsum("ip,cki,iq->cpkq", self.A.astype(float), S, self.A.astype(float), optimize=True)
        return H.reshape(C * d, C * d) + np.diag(np.asarray(self.pen, float).ravel())

    def product(self, x: Array, v: Array) -> Array:
        """``H v`` in the precision of x."""
        A = self.A.astype(x.dtype)
        S = self.bends(x @ A.T)
        return (self.omega * np.einsum("cki,ki->ci", S, v @ A.T)) @ A + self.pen * v

    def hypergradient(self, x: Array, w: Array) -> Array:
        """``-C' w`` at a pair, over the flattened hyperparameters."""
        size = 1 + max(self.owner.max(), -1 if self.omega_owner is None else self.omega_owner.max())
        p = np.zeros(size, x.dtype)
        np.add.at(p, self.owner.ravel(), -(self.slope * x * w).ravel())
        if self.omega_owner is not None:
            A = self.A.astype(x.dtype)
            rows = (self.slopes(x @ A.T, self.y) * (w @ A.T)).sum(0)
            np.add.at(p, self.omega_owner, -self.omega_slope * rows)
        return p

    def solve(self) -> Truth:
        """Solve to the last bit but a few of long double."""
        x = np.zeros(self.pen.shape, LONG)
        start = norm = np.linalg.norm(self.gradient(x))
        for _ in range(200):
            # Near the end the factor at hand is good enough: residuals alone decide the accuracy.
            if norm > 1e-8 * start or norm == start:
                factor = cho_factor(self.hessian(x))
            g = self.gradient(x)
            step = cho_solve(factor, np.asarray(g, float).ravel()).reshape(x.shape).astype(LONG)
            t, before = LONG(1), norm
            while t > 1e-6 and not np.linalg.norm(self.gradient(x - t * step)) < norm:
                t /= 2
            if t <= 1e-6:
                break
            x = x - t * step
            norm = np.linalg.norm(self.gradient(x))
            if norm > 0.5 * before and norm < 1e-16 * start:
                break
        factor, b = cho_factor(self.hessian(x)), self.outer_gradient(x)
        w = np.zeros_like(x)
        for _ in range(8):
            r = b - self.product(x, w)
            w = w + cho_solve(factor, np.asarray(r, float).ravel()).reshape(x.shape).astype(LONG)
        return Truth(x, w, self.hypergradient(x, w), float(norm))


def model_of(problem: Any, hparams: Any) -> Model:
    """Read the data of a ridge, logistic or softmax problem, and its penalties by their definition, in long double."""
    kind = {"RidgeProblem": "squared", "LogisticProblem": "logistic", "SoftmaxProblem": "softmax"}[
        type(problem).__name__
    ]
    u = hparams.detach().double().numpy().astype(LONG)
    shape = problem.params_shape()
    owner = np.arange(u.size).reshape(u.shape)
    axes = problem.penalty_axes()[problem.penalty]
    expand = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
    pen, slope = (np.exp(u), np.exp(u)) if problem.parametrization == "log" else (u, np.ones_like(u))

    def full(values: Array) -> Array:
        return np.broadcast_to(values.reshape(expand), shape).reshape(-1, shape[-1])

    rows = problem.train.rows
    omega = np.full(rows, LONG(1) / rows if problem.loss == "mean" else LONG(1))
    A, B = (part.X.double().numpy().T.astype(LONG) for part in (problem.train, problem.val))
    y, t = (part.y.numpy() if kind == "softmax" else part.y.double().numpy() for part in (problem.train, problem.val))
    return Model(kind, A, y, B, t, full(pen), full(slope), full(owner), omega)
