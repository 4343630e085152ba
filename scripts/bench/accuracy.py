"""Hypergradients of ridge and logistic regression against a referee in extended precision."""

from __future__ import annotations

import numpy as np
import torch
from common import emit, relative_error
from sklearn.datasets import load_breast_cancer, load_diabetes

import bilevel as bl


def problems() -> dict[str, bl.problems.LinearModelProblem]:
    """Return ridge and logistic problems on real data, standardized, first half training, second half validation."""
    made: dict[str, bl.problems.LinearModelProblem] = {}
    for name, load, kind in (
        ("ridge diabetes", load_diabetes, bl.problems.RidgeProblem),
        ("logistic breast_cancer", load_breast_cancer, bl.problems.LogisticProblem),
    ):
        X, y = load(return_X_y=True)
        X = torch.as_tensor((X - X.mean(0)) / X.std(0))
        y = torch.as_tensor(y - y.mean() if kind is bl.problems.RidgeProblem else y)
        half = len(y) // 2
        for penalty in ("scalar", "per_feature"):
            made[f"{name} {penalty}"] = kind(X[:half], y[:half], X[half:], y[half:], penalty)
    return made


def referee(problem: bl.problems.LinearModelProblem, u: torch.Tensor) -> torch.Tensor:
    """Return the hypergradient by numpy: Newton's method and the adjoint, with residuals in extended precision."""
    X, X_val = problem.train.X.numpy().T.astype(np.longdouble), problem.val.X.numpy().T.astype(np.longdouble)
    y, y_val = problem.train.y.numpy().astype(np.longdouble), problem.val.y.numpy().astype(np.longdouble)
    pen = np.broadcast_to(np.exp(u.numpy().astype(np.longdouble)), (X.shape[1],))
    logistic = isinstance(problem, bl.problems.LogisticProblem)

    def slope(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        return -y / (1 + np.exp(y * z)) if logistic else z - y

    def hessian(w: np.ndarray) -> np.ndarray:
        z = X @ w
        bend = 1 / ((1 + np.exp(z)) * (1 + np.exp(-z))) if logistic else np.ones_like(z)
        return (X.T * bend) @ X / len(y) + np.diag(pen)

    w = np.zeros(X.shape[1], dtype=np.longdouble)
    for _ in range(50):
        gradient = X.T @ slope(X @ w, y) / len(y) + pen * w
        w = w - np.linalg.solve(hessian(w).astype(float), gradient.astype(float))
    assert np.abs(gradient).max() < 1e-16
    H, b = hessian(w), X_val.T @ slope(X_val @ w, y_val) / len(y_val)
    adjoint = np.zeros_like(b)
    for _ in range(5):
        adjoint = adjoint + np.linalg.solve(H.astype(float), (b - H @ adjoint).astype(float))
    by_weight = torch.as_tensor((-pen * w * adjoint).astype(float))
    return by_weight if u.dim() else by_weight.sum()


def main() -> bool:
    """Measure both bars on every problem and two penalties."""
    ok = True
    for name, problem in problems().items():
        for penalty in (-4.0, -1.0):
            u = problem.initial_hparams(penalty)
            truth = referee(problem, u)
            for bar, solver, estimator, label in (
                (1e-9, bl.Newton(), bl.Implicit(bl.Direct()), "Newton + Direct"),
                (1e-6, bl.GradientDescent(), bl.Implicit(bl.CG()), "GradientDescent + CG, default tolerances"),
            ):
                estimate = bl.hypergradient(problem, solver, estimator, u)
                error = relative_error(estimate.hypergradient, truth)
                ok &= emit(
                    f"accuracy: {label}: {name}, log penalty {penalty:g}",
                    error,
                    f"relative error at most {bar:g}",
                    error <= bar,
                    inner_steps=estimate.certificate.inner_steps,
                    inner_residual=estimate.certificate.inner_residual,
                )
    return ok


if __name__ == "__main__":
    raise SystemExit(not main())
