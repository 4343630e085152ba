"""Failures measured in other libraries, one test for each: none of them may happen here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import F64, LINEAR_SOLVERS, STEP, flat, normal, ridge_case, spd, tree_case
from paths import ROOT
from torch import Tensor

import bilevel as bl


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("size", [1, 2])
def test_cg_on_one_or_two_unknowns_returns_the_last_iterate_and_not_the_one_before(size: int) -> None:
    X, y = normal(1, 20, size), normal(2, 20)
    problem = bl.problems.RidgeProblem(X[:10], y[:10], X[10:], y[10:])
    u = torch.tensor(-1.0, dtype=F64)
    estimate = bl.hypergradient(problem, bl.Newton(tol=1e-12), bl.Implicit(bl.CG()), u)
    exact = problem.exact_hypergradient(u)
    assert exact != 0
    assert abs(estimate.hypergradient - exact) <= 1e-10 * abs(exact)


def test_the_error_of_cg_does_not_grow_with_its_iterations() -> None:
    matrix, b = spd(3, 8, condition=100.0), normal(4, 8)
    exact = torch.linalg.solve(matrix, b)
    errors = [relative(bl.CG(max_steps=k).solve(lambda v: matrix @ v, b).x, exact) for k in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_the_scale_of_a_step_does_not_change_what_a_linear_solver_converges_to() -> None:
    case = ridge_case()
    for scale in (0.02, 0.1, 0.4):
        for solver in (bl.FixedPointIteration(step_size=scale), bl.Neumann(step_size=scale, steps=8000)):
            estimate = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), bl.Implicit(solver), case.hparams)
            assert relative(estimate.hypergradient, case.hypergradient()) < 1e-7


@pytest.mark.parametrize("solver", LINEAR_SOLVERS.values(), ids=lambda solver: type(solver).__name__)
def test_a_0d_inner_variable_gets_its_implicit_hypergradient(solver: Any) -> None:
    case = tree_case("0-d")
    estimate = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), bl.Implicit(solver), case.hparams)
    assert relative(estimate.hypergradient, case.hypergradient()) < 1e-9


def test_an_empty_tensor_is_refused() -> None:
    problem = bl.BilevelProblem(lambda x, u: (x * u).sum(), lambda x, u: x.sum(), torch.zeros(0, dtype=F64))
    with pytest.raises(ValueError, match=r"`params` is empty, of shape \(0,\)"):
        bl.hypergradient(problem, bl.GradientDescent(), bl.Implicit(), torch.tensor(1.0, dtype=F64))


def test_a_late_start_runs_its_first_steps_plainly_and_does_not_reuse_their_first_gradient() -> None:
    case = ridge_case()
    K, N, u = 12, 4, flat(case.hparams)
    x = flat(case.problem.params)
    X = torch.zeros(5, 5, dtype=F64)
    for k in range(K):
        if k >= K - N:
            X = X - STEP * (case.hessian(x, u) @ X + case.cross(x, u))
        x = x - STEP * case.grad(x, u)
    estimate = bl.hypergradient(case.problem, bl.GradientDescent(STEP, steps=K), bl.TruncatedUnroll(N), case.hparams)
    assert relative(estimate.params, x) < 1e-13
    assert relative(estimate.hypergradient, X.t() @ case.outer(x, u)[0]) < 1e-12


def test_an_unroll_can_be_repeated_in_one_process_and_leaves_torch_as_it_was() -> None:
    case = ridge_case()
    before = {name: vars(torch.optim.SGD)[name] for name in ("step", "__init__")}
    results = [
        bl.hypergradient(case.problem, bl.Adam(0.05, steps=5), estimator, case.hparams).hypergradient
        for estimator in (bl.FullUnroll(), bl.FullUnroll(memory="graph"), bl.FullUnroll())
    ]
    assert torch.equal(results[0], results[2])
    assert {name: vars(torch.optim.SGD)[name] for name in before} == before


def test_the_readme_uses_the_split_that_its_names_say() -> None:
    text = (ROOT / "README.md").read_text()
    inner, outer = (re.search(rf"{which}_loss=(.*)", text)[1] for which in ("inner", "outer"))  # type: ignore[index]
    assert "X @" in inner
    assert "y_val" not in inner
    assert "X_val @" in outer
    assert "y_val" in outer


@pytest.mark.parametrize("steps", [1, 2, 200])
def test_finite_differences_cover_any_number_of_inner_steps(steps: int) -> None:
    case = ridge_case()
    solver = bl.GradientDescent(STEP, steps=steps)
    differences, unrolled = (
        bl.hypergradient(case.problem, solver, estimator, case.hparams, case.start).hypergradient
        for estimator in (bl.FiniteDifference(), bl.FullUnroll())
    )
    assert relative(differences, unrolled) < 1e-7


@pytest.mark.parametrize("estimator", [bl.Implicit(), bl.FullUnroll(), bl.TruncatedUnroll(5)], ids=repr)
def test_near_the_inner_optimum_nothing_is_divided_by_a_vanishing_norm(estimator: Any) -> None:
    case = ridge_case()
    x = case.solution()
    for distance in (0.0, 1e-16, 1e-12, 1e-8):
        start = x + distance * normal(5, 5)
        estimate = bl.hypergradient(case.problem, bl.GradientDescent(steps=400), estimator, case.hparams, start)
        bound = 1e-6 if not isinstance(estimator, bl.TruncatedUnroll) else 1.0
        assert relative(estimate.hypergradient, case.hypergradient()) < bound


def test_the_hypergradient_at_an_outer_optimum_is_zero_and_fine() -> None:
    problem = bl.QuadraticProblem.random(4, 2, seed=0)
    u = torch.zeros(2, dtype=F64)
    problem.target = problem.solve(u)
    estimate = bl.hypergradient(problem, bl.Newton(tol=1e-12), bl.Implicit(), u, certify=True)
    assert estimate.status.ok
    assert estimate.hypergradient.norm() < 1e-12


@pytest.mark.parametrize("estimator", [bl.Implicit(), bl.FullUnroll()], ids=repr)
def test_an_error_above_a_hypergradient_is_no_doubt_only_where_it_is_rounding(estimator: Any) -> None:
    problem, u = bl.QuadraticProblem.random(4, 2, seed=0), torch.zeros(2, dtype=F64)
    fitted = problem.solve(u)
    for distance, steps, status in ((0.0, None, bl.Status.OK), (1e-3, 4, bl.Status.INACCURATE)):
        # A run that is too short ends near the target, and the solution is far from it.
        problem.target = fitted * (1.0 - distance)
        short = 0.9991 * fitted if steps else None
        solver = bl.GradientDescent(step_size=1e-3, steps=steps) if steps else bl.GradientDescent()
        one = bl.hypergradient(problem, solver, estimator, u, short, certify=True, on_failure="return")
        many = bl.hypergradient(
            problem, solver, estimator, u.expand(2, 2), short, batch=2, certify=True, on_failure="return"
        )
        assert [each.status for each in (one, *many)] == [status] * 3, one.verdict


def test_nan_is_reported_at_the_step_that_made_it_and_not_replaced_by_zeros() -> None:
    problem = bl.BilevelProblem(
        lambda x, u: (u * x - (x - 0.25).sqrt()).sum(),
        lambda x, u: x.sum(),
        torch.tensor([0.5, 1.0], dtype=F64),
    )
    estimate = bl.hypergradient(
        problem,
        bl.GradientDescent(0.2, steps=20),
        bl.FullUnroll(),
        torch.tensor(3.0, dtype=F64),
        on_failure="return",
    )
    assert estimate.status is bl.Status.NOT_FINITE
    x = torch.tensor([0.5, 1.0], dtype=F64)
    step = 0
    while torch.isfinite(x).all():
        gradient = 3.0 - 0.5 / (x - 0.25).sqrt()
        if not torch.isfinite(gradient).all():
            break
        x, step = x - 0.2 * gradient, step + 1
    assert f"at step {step}" in str(estimate.verdict)
    assert torch.isnan(estimate.hypergradient).all()


@pytest.mark.parametrize("estimator", [bl.FullUnroll(), bl.TruncatedUnroll(3), bl.FullUnroll(mode="forward")], ids=repr)
def test_lbfgs_whose_line_search_would_be_differentiated_is_refused(estimator: Any) -> None:
    case = ridge_case()
    with pytest.raises(ValueError, match="the steps of QuasiNewton are not differentiated: use Implicit"):
        bl.hypergradient(case.problem, bl.QuasiNewton(), estimator, case.hparams)
    estimate = bl.hypergradient(case.problem, bl.QuasiNewton(), bl.Implicit(), case.hparams)
    assert relative(estimate.hypergradient, case.hypergradient()) < 1e-8


def test_an_indefinite_hessian_gives_its_curvature_and_no_number() -> None:
    problem = bl.BilevelProblem(
        lambda x, u: 0.5 * (torch.tensor([1.0, -0.5], dtype=F64) * x * x).sum() + u * x.sum(),
        lambda x, u: (x - 1.0).square().sum(),
        torch.tensor([0.1, 0.1], dtype=F64),
    )
    solver = bl.GradientDescent(0.1, steps=2)
    for linear_solver in (bl.CG(), bl.Direct(), bl.Neumann(), bl.FixedPointIteration()):
        with pytest.raises(bl.HypergradientError, match=r"-0\.\d+.*a damping above 0\.\d+ would lift it") as caught:
            bl.hypergradient(problem, solver, bl.Implicit(linear_solver), torch.tensor(0.1, dtype=F64))
        assert caught.value.verdict.status is bl.Status.NEGATIVE_CURVATURE
        assert torch.isnan(caught.value.estimate.hypergradient)
    bl.hypergradient(problem, solver, bl.Implicit(bl.Direct(), damping=0.6), torch.tensor(0.1, dtype=F64))


def test_the_certificate_shows_the_adjoint_residual_and_default_tolerances_are_tight() -> None:
    case = ridge_case()
    estimate = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), bl.Implicit(), case.hparams)
    assert estimate.certificate.adjoint_residual is not None
    assert 0 < estimate.certificate.adjoint_residual < 1e-10
    assert relative(estimate.hypergradient, case.hypergradient()) < 1e-9
    loose = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), bl.Implicit(bl.CG(tol=1e-2)), case.hparams)
    assert loose.certificate.adjoint_residual > 1e-6  # type: ignore[operator]


def test_the_training_split_is_fitted_and_the_validation_split_scored() -> None:
    X, y = torch.eye(2, dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    problem = bl.problems.RidgeProblem(X, y, X, 3 * y, X_test=X, y_test=y, loss="sum")
    u = torch.tensor(-40.0, dtype=F64)
    estimate = bl.hypergradient(problem, bl.Newton(tol=1e-12), bl.Implicit(), u)
    torch.testing.assert_close(estimate.params, y, rtol=1e-12, atol=0)
    assert estimate.outer_loss == pytest.approx(float((2 * y).square().sum() / 4))
    metrics = problem.metrics(estimate.params)
    assert metrics["train_loss"] == pytest.approx(0.0, abs=1e-15)
    assert metrics["test_loss"] == pytest.approx(0.0, abs=1e-15)


def test_a_batch_of_tasks_is_solved_implicitly_under_vmap() -> None:
    case = ridge_case()
    batch = case.hparams + 0.2 * normal(6, 3, 5)

    def outer(u: Tensor) -> Tensor:
        x = bl.solution(case.problem, bl.Newton(tol=1e-12), bl.Implicit(), u, check=False)
        return case.problem.outer_loss(x, u)

    got = torch.func.vmap(torch.func.grad(outer))(batch)
    for u, gradient in zip(batch, got, strict=True):
        assert relative(gradient, case.problem.exact_hypergradient(u)) < 1e-9
