"""Gradient descent with a step for each variable: its diagonal, its steps, and their derivative, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bilevel as bl


def data(seed: int = 0, rows: int = 40, features: int = 5) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    X, X_val = rng.standard_normal((rows, features)), rng.standard_normal((rows, features))
    w = rng.standard_normal(features)
    return X, X @ w + rng.standard_normal(rows), X_val, X_val @ w + rng.standard_normal(rows)


def ridge(arrays: tuple[np.ndarray, ...]) -> bl.problems.RidgeProblem:
    return bl.problems.RidgeProblem(*map(torch.from_numpy, arrays), "per_feature")


U = np.array([9.0, -3.0, -1.0, 2.0, -8.0])


def written_out(arrays: tuple[np.ndarray, ...], u: np.ndarray, shares: np.ndarray, steps: int) -> tuple[float, ...]:
    """The outer loss of ridge regression after some steps from zero."""
    X, y, X_val, y_val = arrays
    w = np.zeros(len(u))
    for _ in range(steps):
        w = w - shares * (X.T @ (X @ w - y) / len(y) + np.exp(u) * w)
    return 0.5 * np.mean((X_val @ w - y_val) ** 2), w


def test_steps_are_those_of_the_penalties_and_the_largest_curvature_of_the_data() -> None:
    arrays = data()
    X, y = arrays[:2]
    shares = 1 / (np.linalg.eigvalsh(X.T @ X / len(y))[-1] + np.exp(U))
    solver = bl.PreconditionedGradientDescent(steps=7)
    estimate = bl.hypergradient(ridge(arrays), solver, bl.FullUnroll(), torch.from_numpy(U))
    loss, w = written_out(arrays, U, shares, 7)
    np.testing.assert_allclose(estimate.params.numpy(), w, rtol=1e-4)
    assert estimate.outer_loss == pytest.approx(loss, rel=1e-4)
    # D is a constant of the differentiation.
    differences = [
        (written_out(arrays, U + d, shares, 7)[0] - written_out(arrays, U - d, shares, 7)[0]) / 2e-5
        for d in 1e-5 * np.eye(len(U))
    ]
    np.testing.assert_allclose(estimate.hypergradient.numpy(), differences, rtol=1e-3, atol=1e-8)
    checkpointed = bl.FullUnroll(memory="checkpoint")
    again = bl.hypergradient(ridge(arrays), solver, checkpointed, torch.from_numpy(U))
    torch.testing.assert_close(again.hypergradient, estimate.hypergradient, rtol=1e-12, atol=0)


def test_one_dead_weight_does_not_slow_the_others() -> None:
    problem, u = ridge(data()), torch.from_numpy(np.array([10.0, -3.0, -3.0, -3.0, -3.0]))
    steps = [
        bl.hypergradient(problem, solver, bl.Implicit(), u, on_failure="return").certificate.inner_steps
        for solver in (bl.PreconditionedGradientDescent(tol=1e-8), bl.GradientDescent(tol=1e-8, steps=5_000))
    ]
    assert steps[0] < 300 < 5_000 == steps[1]


@pytest.mark.parametrize("kind", ["logistic", "softmax", "weights"])
def test_the_diagonal_is_above_the_hessian(kind: str) -> None:
    X, _, X_val, _ = map(torch.from_numpy, data(1))
    y, y_val = (torch.arange(len(each)) % 3 for each in (X, X_val))
    problems = bl.problems
    problem, u = {
        "logistic": lambda: (
            problems.LogisticProblem(X, (y > 0).double(), X_val, (y_val > 0).double(), "per_feature"),
            torch.from_numpy(U),
        ),
        "softmax": lambda: (problems.SoftmaxProblem(X, y, X_val, y_val, "per_feature"), torch.from_numpy(U)),
        "weights": lambda: (problems.SampleWeightProblem(X, y, X_val, y_val, penalty=0.1), torch.randn(40).double()),
    }[kind]()
    inner = problem.bind(u)
    for params in (problem.params, torch.randn_like(problem.params)):
        hessian = inner.linearize(params).dense_hessian()
        above = torch.diag(inner.majorizer(params).reshape(-1)) - hessian
        assert float(torch.linalg.eigvalsh(above)[0]) > -1e-12


def test_rows_take_the_steps_of_each() -> None:
    u = torch.from_numpy(np.stack([U, U[::-1], -U]))
    solver = bl.PreconditionedGradientDescent(tol=1e-9)
    many = bl.hypergradient(ridge(data()), solver, bl.Implicit(), u, batch=3)
    for index, one in enumerate(many):
        alone = bl.hypergradient(ridge(data()), solver, bl.Implicit(), u[index])
        assert one.certificate.inner_steps == alone.certificate.inner_steps
        torch.testing.assert_close(one.hypergradient, alone.hypergradient, rtol=1e-8, atol=1e-12)


def test_a_tail_is_swept_and_methods_of_fixed_coefficients_are_refused() -> None:
    problem, u = ridge(data()), torch.from_numpy(np.clip(U, -2, 2))
    exact = bl.hypergradient(problem, bl.QuasiNewton(), bl.Implicit(), u).hypergradient
    solver = bl.PreconditionedGradientDescent(steps=300)
    tail = bl.hypergradient(problem, solver, bl.TruncatedUnroll(tail=200), u).hypergradient
    torch.testing.assert_close(tail, exact, rtol=1e-4, atol=1e-8)
    scalar = bl.problems.RidgeProblem(*map(torch.from_numpy, data()), "scalar")
    with pytest.raises(ValueError, match="needs a linear multistep solver"):
        bl.hypergradient(scalar, solver, bl.Spectral(), u[0])


def test_a_curvature_without_a_step_size_is_one_sentence() -> None:
    problem = bl.BilevelProblem(
        lambda w, u: -(w * w).sum() * u.exp(), lambda w, u: (w - 1).square().sum(), torch.zeros(2).double()
    )
    with pytest.raises(ValueError, match="a curvature that is not positive and finite"):
        bl.hypergradient(problem, bl.PreconditionedGradientDescent(steps=3), bl.FullUnroll(), torch.zeros(()).double())
