"""`error_curves` against independent arithmetic: Jacobian products, autograd, and the library's estimators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problem_cases import close, normal

import bilevel as bl
from bilevel.inner import AsymptoticSobolev, Chebyshev, Sobolev
from bilevel.theory import QuadraticBatch, error_curves

STEPS, TAILS = 25, [25, 10, 1]
CURVES = ("suboptimality", "iterate", "forward", "reverse", "late")
SOLVERS = {
    "gradient descent": bl.GradientDescent(step_size=0.06),
    "heavy ball": bl.HeavyBall(step_size=0.08, momentum=0.4),
    "Nesterov": bl.Nesterov(step_size=0.05, momentum=0.5),
    "Chebyshev": Chebyshev(0.9, 33.0),
    "Sobolev": Sobolev(0.9, 33.0),
    "asymptotic": AsymptoticSobolev(0.9, 33.0),
}
over_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def quadratic(seed: int = 0) -> bl.QuadraticProblem:
    problem = bl.QuadraticProblem.random(size=6, hyperparameters=2, condition=30.0, seed=seed)
    problem.params = normal(6, seed=seed + 50)
    return problem


U = torch.tensor([0.3, 0.1], dtype=torch.float64)


def plain(problem: bl.BilevelProblem) -> bl.BilevelProblem:
    """The same losses with nothing known of them: autograd oracles, one problem at a time."""
    return bl.BilevelProblem(problem.inner_loss, problem.outer_loss, problem.params)


def assert_equal_curves(got, want, tolerance=1e-12):
    for name in CURVES:
        close(getattr(got, name), getattr(want, name), tolerance)


def test_curves_of_gradient_descent_are_those_of_explicit_jacobian_products() -> None:
    problem, h = quadratic(), 0.06
    H, b = problem.coefficients(U)
    A = torch.eye(6, dtype=torch.float64) - h * H
    x, X, exact = problem.params, torch.zeros(6, 2, dtype=torch.float64), problem.exact_jacobian(U)
    forward, parts = [(X - exact).norm()], []
    for _ in range(STEPS):
        B = -h * ((problem.hessian_directions @ x).t() + problem.linear_directions.t())
        parts.append(B)
        X, x = A @ X + B, x - h * (H @ x + b)
        forward.append((X - exact).norm())
    total, reverse = torch.zeros_like(X), [exact.norm()]
    for count, B in enumerate(reversed(parts)):
        total = total + torch.linalg.matrix_power(A, count) @ B
        reverse.insert(0, (total - exact).norm())
    curves = error_curves(problem, bl.GradientDescent(step_size=h), U, STEPS)
    close(curves.forward, torch.stack(forward))
    close(curves.reverse, torch.stack(reverse))


@over_solvers
def test_the_closed_form_agrees_with_the_solvers_own_oracles(solver: bl.InnerSolver) -> None:
    problem = quadratic()
    assert_equal_curves(
        error_curves(problem, solver, U, STEPS, TAILS), error_curves(plain(problem), solver, U, STEPS, TAILS)
    )


@over_solvers
def test_a_batch_agrees_with_its_problems_one_at_a_time(solver: bl.InnerSolver) -> None:
    problems = [quadratic(seed) for seed in range(3)]
    batch = error_curves(problems, solver, U, STEPS, TAILS)
    for index, problem in enumerate(problems):
        alone = error_curves(problem, solver, U, STEPS, TAILS)
        for name in CURVES:
            close(getattr(batch, name)[index], getattr(alone, name))


@over_solvers
def test_truncated_curves_end_at_the_estimators_jacobian(solver: bl.InnerSolver) -> None:
    problem, tail = quadratic(), 10
    curves = error_curves(problem, solver, U, STEPS, [tail])
    rows = []
    for row in torch.eye(6, dtype=torch.float64):
        # The outer gradient of the loss v'x is v, so the hypergradient is a row of the Jacobian.
        linear = bl.BilevelProblem(problem.inner_loss, lambda x, u, v=row: x @ v, problem.params)
        estimate = bl.hypergradient(linear, replace(solver, steps=STEPS), bl.TruncatedUnroll(tail=tail), U)
        rows.append(estimate.hypergradient)
    error = (torch.stack(rows) - problem.exact_jacobian(U)).norm()
    close(curves.truncated(tail), error)
    close(curves.late[0, -1], error)


def test_the_full_sweep_ends_where_forward_mode_does_and_late_starts_wait() -> None:
    curves = error_curves(quadratic(), SOLVERS["heavy ball"], U, STEPS, TAILS)
    close(curves.reverse[0], curves.forward[-1])
    close(curves.late[0], curves.forward)
    assert bool((curves.late[1, : STEPS - 10 + 1] == curves.jacobian_norm).all())
    close(curves.reverse[-1], curves.jacobian_norm)


@pytest.mark.parametrize("penalty", ["scalar", "per_feature"])
@pytest.mark.parametrize("kind", ["log", "direct"])
def test_ridge_problems_take_the_closed_form_and_agree(penalty: str, kind: str) -> None:
    X, y = normal(12, 4, seed=1), normal(12, seed=2)
    problem = bl.problems.RidgeProblem(X, y, X, y, penalty, parametrization=kind)
    u = problem.initial_hparams(0.2)
    start = normal(4, seed=3)
    solver = bl.GradientDescent(step_size=0.3)
    fast = error_curves(problem, solver, u, STEPS, TAILS, params=start)
    assert fast.forward_bound is not None
    assert_equal_curves(fast, error_curves(plain(problem), solver, u, STEPS, TAILS, params=start))


def test_general_losses_are_batched_over_hyperparameters_and_starts() -> None:
    X, y = normal(20, 4, seed=1), (normal(20, seed=2) > 0).long()
    problem = bl.problems.LogisticProblem(X, y, X, y, penalty="per_feature")
    us, starts = [problem.initial_hparams(value) for value in (-2.0, 0.0)], [normal(4, seed=4), normal(4, seed=5)]
    solver = bl.HeavyBall(step_size=0.5, momentum=0.5)
    batch = error_curves(problem, solver, us, STEPS, TAILS, params=starts)
    for index, (u, start) in enumerate(zip(us, starts, strict=True)):
        alone = error_curves(problem, solver, u, STEPS, TAILS, params=start)
        for name in CURVES:
            close(getattr(batch, name)[index], getattr(alone, name))


def test_trees_and_any_solver_have_curves() -> None:
    matrix = normal(5, 3, seed=6)
    problem = bl.BilevelProblem(
        lambda x, u: ((matrix @ x["w"] + x["b"] - 1) ** 2).sum() + u["a"].exp() * (x["w"] ** 2).sum() + x["b"] ** 2,
        lambda x, u: x["b"] ** 2,
        {"w": normal(3, seed=7), "b": torch.tensor(0.5, dtype=torch.float64)},
    )
    u = {"a": torch.tensor(0.1, dtype=torch.float64)}
    curves = error_curves(problem, bl.Adam(step_size=0.05), u, 30, [5])
    close(curves.reverse[0], curves.forward[-1])
    close(curves.truncated(5), curves.late[0, -1])
    batch = error_curves(problem, bl.GradientDescent(step_size=0.02), [u, u], 30)
    alone = error_curves(problem, bl.GradientDescent(step_size=0.02), u, 30)
    close(batch.forward[1], alone.forward)


def test_bounds_hold_and_are_attained_by_scalar_problems() -> None:
    problems = [quadratic(seed) for seed in range(5)]
    curves = error_curves(problems, bl.GradientDescent(step_size=0.06), U, 60, [60, 20])
    for name in ("iterate", "forward", "reverse", "late"):
        bound = getattr(curves, f"{name}_bound")
        assert bool((getattr(curves, name) <= bound * (1 + 1e-9) + 1e-13).all()), name
    # One dimension, with the two terms of one sign: d_k = rho^k d_0 + C k rho^(k-1) e_0 exactly.
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    scalar = QuadraticBatch(one, -one[0], one[None], 0 * one, 3 * one[0])
    sharp = error_curves(scalar, bl.GradientDescent(step_size=0.1), None, 40)
    # x_0 - x* = 2 and dx_0 - dx* = 1 pull in opposite directions; from x_0 = -1 they add.
    assert bool((sharp.forward <= sharp.forward_bound).all())
    sharp = error_curves(replace(scalar, start=-one[0]), bl.GradientDescent(step_size=0.1), None, 40)
    close(sharp.forward, sharp.forward_bound)
    assert error_curves(problems[0], bl.HeavyBall(step_size=0.05), U, 5).forward_bound is None


def test_relative_curves_and_peaks() -> None:
    curves = error_curves(quadratic(), bl.GradientDescent(step_size=0.06), U, STEPS, TAILS)
    relative = curves.relative
    close(relative.forward * curves.jacobian_norm, curves.forward)
    close(relative.forward[0], torch.ones((), dtype=torch.float64))
    height, index = curves.peak
    close(height, (curves.forward / curves.forward[0]).max())
    assert float(curves.forward[index]) == float(curves.forward.max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tails": [0]}, "a tail must be an int in 1..25"),
        ({"tails": [26]}, "a tail must be an int in 1..25"),
        ({"steps": 0}, "`steps` must be a positive int, got 0"),
        ({"hparams": [U, U], "params": [None] * 3}, "one length, got hparams 2, params 3"),
    ],
)
def test_mistakes_are_one_sentence(change: dict, message: str) -> None:
    options = {"hparams": U, "steps": STEPS} | change
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        error_curves(quadratic(), SOLVERS["heavy ball"], **options)


def test_stacked_quadratics_of_wrong_shapes_are_refused() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`QuadraticBatch\.start` must have shape \(1, 1\)"):
        QuadraticBatch(one, one[0], one[None], one, one)
