"""Linear models whose inner solves use structure: cold hypergradients, and 50 outer steps with warm starts.

    logistic      20,000 x 500, one penalty for each feature
    softmax       scikit-learn's digits, 898 x 64, ten classes, one penalty for each weight
    weights       the same with half of the labels corrupted, one weight for each training row

The alternative in the same run is scipy's L-BFGS with CG on closed-form products in numpy, warm-started in its loop.
All solve to an inner gradient norm of 1e-8 and a relative adjoint residual of 1e-8.

    python scripts/bench/structured.py [logistic] [softmax] [weights]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import large_logistic
import numpy as np
import torch
from common import emit, relative_error
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logsumexp, softmax
from sklearn.datasets import load_digits

import bilevel as bl

TOL, STEPS = 1e-8, 50


@dataclass
class Peer:
    """One inner problem in numpy: (w, u) -> loss with gradient, and products at w."""

    inner: Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]
    products: Callable[[np.ndarray, np.ndarray], tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]]
    outer_gradient: Callable[[np.ndarray], np.ndarray]
    size: int
    w: np.ndarray = field(init=False)
    x: np.ndarray = field(init=False)

    def cold(self) -> None:
        """Forget the last solution."""
        self.w, self.x = np.zeros(self.size), np.zeros(self.size)

    def __call__(self, u: np.ndarray) -> np.ndarray:
        """Return the hypergradient by L-BFGS and CG from the last solution."""
        options = {"maxiter": 5000, "maxfun": 10_000, "maxcor": 20, "gtol": TOL / self.size**0.5, "ftol": 0.0}
        self.w = minimize(self.inner, self.w, (u,), jac=True, method="L-BFGS-B", options=options).x
        product, cross = self.products(self.w, u)
        b = self.outer_gradient(self.w)
        r = b - product(self.x)
        p, rr, goal = r, r @ r, (TOL * np.linalg.norm(b)) ** 2
        while rr > goal:
            q = product(p)
            step = rr / (p @ q)
            self.x, r = self.x + step * p, r - step * q
            rr, before = r @ r, rr
            p = r + (rr / before) * p
        return -cross(self.x)


def logistic() -> tuple[Any, torch.Tensor, Peer]:
    """Return problem, hyperparameters and peer."""
    data = large_logistic.data()
    problem = bl.problems.LogisticProblem(*data, "per_feature")
    X, y, X_val, y_val = (part.numpy() for part in data)
    s, s_val, n = 2 * y - 1, 2 * y_val - 1, len(y)

    def inner(w: np.ndarray, u: np.ndarray) -> tuple[float, np.ndarray]:
        z, pen = s * (X @ w), np.exp(u)
        loss = np.logaddexp(0, -z).mean() + 0.5 * (pen * w * w).sum()
        return loss, X.T @ (-s * expit(-z)) / n + pen * w

    def products(w: np.ndarray, u: np.ndarray) -> Any:
        z, pen = X @ w, np.exp(u)
        bend = expit(z) * expit(-z) / n
        return lambda v: X.T @ (bend * (X @ v)) + pen * v, lambda v: pen * w * v

    def outer(w: np.ndarray) -> np.ndarray:
        return X_val.T @ (-s_val * expit(-s_val * (X_val @ w))) / len(y_val)

    return problem, problem.initial_hparams(-6.0), Peer(inner, products, outer, X.shape[1])


def digits(weighted: bool) -> tuple[Any, torch.Tensor, Peer]:
    """Return problem, hyperparameters and peer."""
    generator = torch.Generator().manual_seed(0)
    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator)
    images, labels = torch.tensor(found.data / 16.0)[order], torch.tensor(found.target)[order]
    given = labels[:898].clone()
    if weighted:
        wrong = torch.rand(898, generator=generator) < 0.5
        given[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
    parts = images[:898], given, images[898:], labels[898:]
    problem: Any
    if weighted:
        problem = bl.problems.SampleWeightProblem(*parts, penalty=6.7e-3)
    else:
        problem = bl.problems.SoftmaxProblem(*parts, "per_weight")
    u = problem.initial_hparams(0.0 if weighted else -5.0)
    X, y, X_val, y_val = (part.numpy() for part in parts)
    XT, XT_val = np.ascontiguousarray(X.T), np.ascontiguousarray(X_val.T)
    hot, hot_val, n = np.eye(10)[y].T, np.eye(10)[y_val].T, len(y)

    def scales(u: np.ndarray) -> tuple[Any, Any]:
        return (expit(u) / n, 6.7e-3) if weighted else (np.full(n, 1 / n), np.exp(u).reshape(10, -1))

    def inner(w: np.ndarray, u: np.ndarray) -> tuple[float, np.ndarray]:
        W, (weight, pen) = w.reshape(10, -1), scales(u)
        Z = W @ XT
        loss = (weight * (logsumexp(Z, 0) - (Z * hot).sum(0))).sum() + 0.5 * (pen * W * W).sum()
        return loss, ((weight * (softmax(Z, 0) - hot)) @ X + pen * W).ravel()

    def products(w: np.ndarray, u: np.ndarray) -> Any:
        W, (weight, pen) = w.reshape(10, -1), scales(u)
        P = np.exp(log_softmax(W @ XT, 0))

        def product(v: np.ndarray) -> np.ndarray:
            V = v.reshape(10, -1)
            bent = P * (V @ XT)
            return ((weight * (bent - P * bent.sum(0))) @ X + pen * V).ravel()

        def cross(v: np.ndarray) -> np.ndarray:
            V = v.reshape(10, -1)
            if weighted:
                return weight * (1 - n * weight) * ((P - hot) * (V @ XT)).sum(0)
            return (pen * W * V).ravel()

        return product, cross

    def outer(w: np.ndarray) -> np.ndarray:
        return ((softmax(w.reshape(10, -1) @ XT_val, 0) - hot_val) @ X_val).ravel() / len(y_val)

    return problem, u, Peer(inner, products, outer, 640)


def clock(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return (result, wall seconds, process CPU seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, problem: Any, u: torch.Tensor, peer: Peer, rounds: int, peer_steps: int) -> bool:
    """Print a cold hypergradient and a warm loop beside the peer's."""
    solver, estimator = bl.QuasiNewton(tol=TOL), bl.Implicit(bl.CG(tol=TOL))
    tight = bl.QuasiNewton(tol=1e-12), bl.Implicit(bl.CG(tol=1e-12))
    truth = bl.hypergradient(problem, *tight, u, on_failure="return").hypergradient.reshape(-1)

    def theirs() -> np.ndarray:
        peer.cold()
        return peer(u.numpy().ravel())

    ours, by_peer = [], []
    for _ in range(rounds + 1):
        ours.append(clock(lambda: bl.hypergradient(problem, solver, estimator, u)))
        by_peer.append(clock(theirs))
    estimate, error = ours[-1][0], relative_error(ours[-1][0].hypergradient.reshape(-1), truth)
    peer_error = relative_error(torch.from_numpy(by_peer[-1][0]), truth)
    wall = median(a[1] / b[1] for a, b in zip(ours[1:], by_peer[1:], strict=True))
    good = emit(
        f"{name}: cold hypergradient, time / scipy L-BFGS + CG",
        wall,
        "below 1 at an error below 1e-6",
        wall < 1 and error < 1e-6,
        cpu_ratio=median(a[2] / b[2] for a, b in zip(ours[1:], by_peer[1:], strict=True)),
        wall=median(run[1] for run in ours[1:]),
        cpu=median(run[2] for run in ours[1:]),
        error=error,
        error_of_peer=peer_error,
        counts=dict(estimate.cost.counts),
    )
    outer = bl.OuterOptimizer(problem, solver, estimator, u, lambda tensors: torch.optim.Adam(tensors, lr=0.1))
    counts: Counter[str] = Counter()
    outer.callbacks = (lambda _, estimate: counts.update(estimate.cost.counts),)
    (result, wall, cpu), last = clock(lambda: outer.run(STEPS - 1, progress=False)), outer.hparams
    final, wall_last, cpu_last = clock(outer.step)
    counts.update(final.cost.counts)
    truth = bl.hypergradient(problem, *tight, last, on_failure="return").hypergradient

    def peer_loop() -> None:
        peer.cold()
        moving = torch.nn.Parameter(u.clone())
        adam = torch.optim.Adam([moving], lr=0.1)
        for _ in range(peer_steps):
            moving.grad = torch.from_numpy(peer(moving.detach().numpy().ravel())).reshape(u.shape)
            adam.step()

    _, peer_wall, peer_cpu = clock(peer_loop)
    per_step = (wall + wall_last) / STEPS
    return (
        emit(
            f"{name}: one of {STEPS} warm outer steps, time / scipy L-BFGS + CG (of {peer_steps} steps)",
            per_step / (peer_wall / peer_steps),
            "below 1 at an error below 1e-6",
            per_step < peer_wall / peer_steps and relative_error(final.hypergradient, truth) < 1e-6,
            cpu_ratio=(cpu + cpu_last) / STEPS / (peer_cpu / peer_steps),
            wall=wall + wall_last,
            cpu=cpu + cpu_last,
            error=relative_error(final.hypergradient, truth),
            outer_loss=result.history[-1].outer_loss,
            counts=dict(counts),
        )
        and good
    )


CASES: dict[str, tuple[Callable[[], tuple[Any, torch.Tensor, Peer]], int, int]] = {
    "logistic": (logistic, 3, 5),
    "softmax": (lambda: digits(False), 9, STEPS),
    "weights": (lambda: digits(True), 9, STEPS),
}
"""Name -> (maker, rounds of cold hypergradients, outer steps of the peer)."""


def main(names: list[str] | None = None) -> bool:
    """Measure the named cases, all by default."""
    results = []
    for name in names or list(CASES):
        make, rounds, peer_steps = CASES[name]
        results.append(measure(name, *make(), rounds, peer_steps))
    return all(results)


if __name__ == "__main__":
    raise SystemExit(not main(sys.argv[1:]))
