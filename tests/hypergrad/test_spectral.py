"""Unrolling on the spectrum against the same steps one by one; closed-form hypergradients against dense algebra."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import F64, HIGH, LOW, QUADRATIC_ESTIMATORS, flat, normal, quadratic_case, regression_data, ridge_case, spd
from torch import Tensor

import bilevel as bl
from bilevel.numerics.eigenbasis import SMALL, diagonalise, geometric
from bilevel.oracles.structure import Structure
from bilevel.problems import LogisticProblem, QuadraticProblem, RidgeProblem

SOLVERS = {
    "gradient descent": bl.GradientDescent(0.07),
    "gradient descent, auto": bl.GradientDescent(),
    "heavy ball": bl.HeavyBall(0.05, 0.8),
    "heavy ball, auto, half": bl.HeavyBall(momentum="auto", first_step="half"),
    "Nesterov": bl.Nesterov(0.05, 0.6),
    "Nesterov, auto": bl.Nesterov(momentum="auto"),
    "Chebyshev": bl.Chebyshev(LOW, HIGH),
    "Chebyshev, auto": bl.Chebyshev(),
    "Sobolev": bl.Sobolev(LOW, HIGH, alpha=0.0),
    "asymptotic Sobolev": bl.AsymptoticSobolev(LOW, HIGH),
    "asymptotic Sobolev, auto, half": bl.AsymptoticSobolev(first_step="half"),
}


def ridge(loss: str = "mean", parametrization: str = "log", dtype: torch.dtype = F64) -> RidgeProblem:
    data = [each.to(dtype) for each in regression_data()]
    return RidgeProblem(*data, loss=loss, parametrization=parametrization)


def shifted_quadratic() -> QuadraticProblem:
    """A quadratic with two hyperparameters: one moves the Hessian along the identity, both move the linear term."""
    eye = torch.eye(5, dtype=F64)
    return QuadraticProblem(
        spd(1, 5, 6.0), normal(2, 5), torch.stack([2.0 * eye, 0.0 * eye]), normal(3, 2, 5), normal(4, 5)
    )


PROBLEMS: dict[str, tuple[Any, Tensor]] = {
    "ridge": (ridge(), torch.tensor(-1.0, dtype=F64)),
    "ridge, direct": (ridge(parametrization="direct"), torch.tensor(0.4, dtype=F64)),
    "quadratic": (shifted_quadratic(), torch.tensor([0.3, -0.2], dtype=F64)),
}


def close(a: Any, b: Any, tol: float = 1e-10) -> None:
    """Equal to a relative error of the whole vector."""
    a, b = flat(a), flat(b)
    assert (a - b).norm() <= tol * b.norm(), (a, b)


def agree(fast: bl.Estimate, slow: bl.Estimate, tol: float = 1e-10) -> None:
    """Everything that a run leaves is the same, warm start included."""
    close(fast.hypergradient, slow.hypergradient, tol)
    close(fast.params, slow.params, tol)
    assert fast.outer_loss == pytest.approx(slow.outer_loss, rel=tol)
    assert fast.certificate.inner_steps == slow.certificate.inner_steps
    assert fast.certificate.adjoint_steps == slow.certificate.adjoint_steps
    assert fast.certificate.measured == pytest.approx(slow.certificate.measured)
    assert fast.carry.state.steps == slow.carry.state.steps
    assert len(fast.carry.state.memory) == len(slow.carry.state.memory)
    for a, b in zip(fast.carry.state.memory, slow.carry.state.memory, strict=True):
        close(a, b, tol)


@pytest.mark.crossed
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_spectral_gives_params_derivative_and_warm_start_of_the_full_unroll(problem, solver, steps) -> None:
    made, u = PROBLEMS[problem]
    run = replace(SOLVERS[solver], steps=steps)
    agree(*(bl.hypergradient(made, run, each, u, normal(17, 5)) for each in (bl.Spectral(), bl.FullUnroll())))


@pytest.mark.crossed
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tail", [1, 7, 0.35])
def test_a_spectral_tail_is_the_truncated_unroll(problem, solver, tail) -> None:
    made, u = PROBLEMS[problem]
    run = replace(SOLVERS[solver], steps=20)
    slow = bl.hypergradient(made, run, bl.TruncatedUnroll(tail=tail), u, normal(17, 5))
    agree(bl.hypergradient(made, run, bl.Spectral(tail=tail), u, normal(17, 5)), slow)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tail", [None, 5])
def test_spectral_keeps_a_chain_of_warm_starts(solver, tail) -> None:
    problem, run = ridge(), replace(SOLVERS[solver], steps=9)
    carries: list[bl.Carry | None] = [None, None]
    slow = bl.FullUnroll() if tail is None else bl.TruncatedUnroll(tail=tail)
    for outer in range(3):
        u = torch.tensor(-1.0 + 0.4 * outer, dtype=F64)
        found = [
            bl.hypergradient(problem, run, each, u, normal(17, 5), carry=carry)
            for each, carry in zip((bl.Spectral(tail=tail), slow), carries, strict=True)
        ]
        agree(*found)
        carries = [estimate.carry for estimate in found]


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_a_step_size_that_makes_a_factor_vanish_is_no_special_case(steps) -> None:
    # Eigenvalues 1, 2, 4 with h = 1/4 exactly: one factor r is 0, at which r^K / r would be nan.
    eye = torch.eye(3, dtype=F64)
    problem = QuadraticProblem(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64)), normal(2, 3), eye[None])
    run, u = bl.GradientDescent(0.25, steps=steps), torch.zeros(1, dtype=F64)
    agree(*(bl.hypergradient(problem, run, each, u, normal(3, 3)) for each in (bl.Spectral(), bl.FullUnroll())))


@pytest.mark.parametrize("eigenvalue", [0.0, 1e-12, -1e-6, -0.02])
@pytest.mark.parametrize("solver", ["gradient descent", "heavy ball", "Nesterov"])
def test_spectral_needs_no_positive_curvature(eigenvalue, solver) -> None:
    eye = torch.eye(3, dtype=F64)
    problem = QuadraticProblem(torch.diag(torch.tensor([eigenvalue, 2.0, 4.0], dtype=F64)), normal(2, 3), eye[None])
    run, u = replace(SOLVERS[solver], steps=30), torch.zeros(1, dtype=F64)
    # So far from the critical point that 30 steps make the gradient smaller: a run that leads away fails.
    start = 10.0 * normal(3, 3)
    agree(*(bl.hypergradient(problem, run, each, u, start) for each in (bl.Spectral(), bl.FullUnroll())))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000, 100_000])
def test_the_geometric_sums_equal_sums_in_exact_arithmetic(count) -> None:
    q = [0.0, 1e-14, 0.3 * SMALL / count, 3 * SMALL / count, 5e-4, 0.1, 0.5, 1.0, 1.3, -1e-9, -1e-5]
    found = geometric(torch.tensor(q, dtype=F64), count)
    for index, each in enumerate(q):
        exact = Fraction(each)
        r = 1 - exact
        if count <= 1000:
            # Over a common power of two all sums are of integers.
            power, slope = r**count, count * (r ** (count - 1))
            total = sum((r**j for j in range(count)), Fraction(0)) if count <= 10 else None
            if exact != 0:
                total = (1 - power) / exact
                total_slope = (total - slope) / exact
            else:
                total, total_slope = Fraction(count), Fraction(count * (count - 1), 2)
            for value, truth in zip(found, (power, slope, total, total_slope), strict=True):
                assert float(value[index]) == pytest.approx(float(truth), rel=2e-11, abs=1e-300)
        elif each == 0.0:
            assert float(found[3][index]) == pytest.approx(count * (count - 1) / 2, rel=1e-12)


@pytest.mark.parametrize("solver", ["gradient descent", "heavy ball", "Sobolev"])
def test_float32_runs_in_float32(solver) -> None:
    problem, run = ridge(dtype=torch.float32), replace(SOLVERS[solver], steps=60)
    u = torch.tensor(-1.0)
    found = bl.hypergradient(problem, run, bl.Spectral(), u)
    assert found.hypergradient.dtype == found.params.dtype == torch.float32
    exact = bl.hypergradient(ridge(), run, bl.FullUnroll(), u.double())
    close(found.hypergradient.double(), exact.hypergradient, 1e-4)


def test_the_sum_loss_and_more_features_than_rows() -> None:
    X, y, X_val, y_val = regression_data(rows=8, features=12)
    for loss, step in (("mean", 0.05), ("sum", 0.005)):
        problem = RidgeProblem(X, y, X_val, y_val, loss=loss)
        u, run = torch.tensor(-1.0, dtype=F64), bl.GradientDescent(step, steps=50)
        agree(*(bl.hypergradient(problem, run, each, u) for each in (bl.Spectral(), bl.FullUnroll())))


def test_the_counts_show_the_looks_at_the_residual_alone() -> None:
    estimate = bl.hypergradient(ridge(), bl.GradientDescent(0.07, steps=1000), bl.Spectral(), PROBLEMS["ridge"][1])
    assert dict(estimate.cost.counts) == {"gradient": 2, "outer": 1}
    assert estimate.cost.peak_memory is None
    inner = ridge().bind(PROBLEMS["ridge"][1])
    # Near a solution the gradient is the rounding of its parts, whichever way they are summed.
    left = float(inner.grad(estimate.params).norm())
    assert estimate.certificate.inner_residual == pytest.approx(left, rel=1e-9, abs=1e-14)


def test_a_diverging_run_is_judged_as_its_steps_would_be() -> None:
    problem, u = PROBLEMS["ridge"]
    for steps in (40, 2000):
        run = bl.GradientDescent(3.0, steps=steps)
        found = [
            bl.hypergradient(problem, run, each, u, on_failure="return") for each in (bl.Spectral(), bl.FullUnroll())
        ]
        assert found[0].status is found[1].status is bl.Status.DIVERGED
        assert "try step_size=" in found[0].verdict.detail


@pytest.mark.crossed
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_sweep_of_64_hyperparameter_vectors_equals_64_calls(problem, solver) -> None:
    made, u = PROBLEMS[problem]
    stack = u + torch.linspace(0.0, 1.0, 64, dtype=F64).reshape(64, *[1] * u.dim())
    run = replace(SOLVERS[solver], steps=15)
    for tail in (None, 4):
        estimator = bl.Spectral(tail=tail)
        swept = estimator.sweep(made, run, stack, normal(17, 5))
        single = [bl.hypergradient(made, run, estimator, each, normal(17, 5)) for each in stack[::9]]
        close(swept.hypergradients[::9], torch.stack([each.hypergradient for each in single]), 1e-12)
        close(swept.params[::9], torch.stack([each.params for each in single]), 1e-12)
        close(swept.outer_losses[::9], torch.tensor([each.outer_loss for each in single], dtype=F64), 1e-12)
        left = [each.certificate.inner_residual for each in single]
        # A residual is a difference of numbers of size one.
        torch.testing.assert_close(swept.residuals[::9], torch.tensor(left, dtype=F64), rtol=1e-9, atol=1e-13)


def test_a_sweep_takes_a_start_for_each_vector() -> None:
    made, u = PROBLEMS["ridge"]
    stack, starts = u + torch.arange(3, dtype=F64), normal(20, 3, 5)
    for run in (bl.HeavyBall(momentum="auto", steps=12), bl.GradientDescent(0.05, steps=12)):
        swept = bl.Spectral().sweep(made, run, stack, starts)
        single = [bl.hypergradient(made, run, bl.FullUnroll(), *each) for each in zip(stack, starts, strict=True)]
        close(swept.hypergradients, torch.stack([each.hypergradient for each in single]), 1e-10)
        close(swept.params, torch.stack([each.params for each in single]), 1e-12)
    with pytest.raises(ValueError, match=r"^`params` of a sweep must be one start or as many as hyperparameter"):
        bl.Spectral().sweep(made, run, stack, starts[:2])


def test_the_eigenbasis_is_computed_once_for_a_problem(monkeypatch) -> None:
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    problem = ridge()
    for penalty in (-1.0, -2.0, -3.0):
        for estimator in QUADRATIC_ESTIMATORS.values():
            bl.hypergradient(problem, bl.GradientDescent(steps=5), estimator, torch.tensor(penalty, dtype=F64))
    assert len(calls) == 1


def test_an_eigenbasis_knows_its_problem() -> None:
    problem, u = PROBLEMS["quadratic"]
    basis = problem.spectrum()
    hessian, linear = problem.coefficients(u)
    diagonal = basis.bind(u)
    close(basis.vectors @ torch.diag(diagonal.values) @ basis.vectors.t(), hessian)
    close(basis.back(diagonal.linear), linear)
    close(basis.back(diagonal.solution), problem.solve(u))
    x = normal(5, 3, 5)
    close(basis.back(basis.turn(x)), x)
    assert diagonalise(hessian, linear, lambda u: (u, u)).directions is None


def test_a_users_problem_enters_through_its_spectrum() -> None:
    A, b, target = spd(7, 4, 3.0), normal(8, 4), normal(9, 4)

    class Mine(bl.BilevelProblem):
        structure = Structure(quadratic=True)

        def spectrum(self):
            return diagonalise(A, b, lambda u: (u.exp(), u.exp()))

    problem = Mine(
        lambda x, u: 0.5 * x @ A @ x + 0.5 * u.exp() * x @ x + b @ x,
        lambda x, u: 0.5 * (x - target).square().sum() + u,
        torch.zeros(4, dtype=F64),
    )
    u, run = torch.tensor(-0.5, dtype=F64), bl.Nesterov(0.2, 0.5, steps=30)
    agree(*(bl.hypergradient(problem, run, each, u) for each in (bl.Spectral(), bl.FullUnroll())))
    exact = bl.hypergradient(problem, run, bl.ClosedForm(), u)
    close(exact.hypergradient, bl.hypergradient(problem, bl.Newton(), bl.Implicit(bl.Direct()), u).hypergradient)


def per_index(index: int) -> bl.inner.Coefficients:
    h = 0.1 / (1 + index % 3)
    return bl.inner.Coefficients(read=(1.0,), mix=((1.0,),), write=(-h,))


class Cycling(bl.GradientDescent):
    """A gradient method whose steps differ, though its base says they settle."""

    def coefficients(self, state):
        return per_index(state.steps)


def test_a_users_method_with_other_steps_is_run_as_it_is() -> None:
    problem, u = PROBLEMS["ridge"]
    for steps in (2, 3, 4, 30):
        run = Cycling(0.1, steps=steps)
        agree(*(bl.hypergradient(problem, run, each, u, normal(17, 5)) for each in (bl.Spectral(), bl.FullUnroll())))


# Closed form ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [quadratic_case, ridge_case, lambda: ridge_case("scalar")])
def test_closed_form_equals_the_dense_implicit_function_theorem(case) -> None:
    made = case()
    estimate = bl.hypergradient(made.problem, bl.GradientDescent(), bl.ClosedForm(), made.hparams, certify=True)
    assert estimate.status.ok
    close(estimate.hypergradient, made.hypergradient(), 1e-11)
    close(estimate.hypergradient, made.problem.exact_hypergradient(made.hparams), 1e-12)
    close(estimate.params, made.solution(), 1e-12)
    assert estimate.certificate.inner_residual < 1e-13
    assert estimate.certificate.adjoint_residual < 1e-13
    assert estimate.certificate.inner_steps == 0


@pytest.mark.parametrize("problem", PROBLEMS)
def test_closed_form_passes_the_check_by_central_differences(problem) -> None:
    made, u = PROBLEMS[problem]
    report = bl.check_hypergradient(made, bl.GradientDescent(), bl.ClosedForm(), u)
    assert report.ok, report


def test_closed_form_leaves_a_warm_start_that_any_solver_takes() -> None:
    case = ridge_case("scalar")
    for solver in (
        bl.HeavyBall(0.05, 0.8, tol=1e-10),
        bl.Sobolev(LOW, HIGH, tol=1e-10),
        bl.Adam(tol=1e-8),
        bl.Newton(),
    ):
        left = bl.hypergradient(case.problem, solver, bl.ClosedForm(), case.hparams)
        estimate = bl.hypergradient(case.problem, solver, bl.Implicit(), case.hparams, carry=left.carry)
        assert estimate.certificate.inner_steps == 0


def test_both_work_in_the_outer_loop_and_the_layer() -> None:
    case = ridge_case("scalar")
    for estimator in QUADRATIC_ESTIMATORS.values():
        outer = bl.OuterOptimizer(case.problem, bl.GradientDescent(steps=50), estimator, case.hparams)
        history = outer.run(4, progress=False).history
        assert history[-1].outer_loss < history[0].outer_loss
        u = case.hparams.clone().requires_grad_()
        params = bl.solution(case.problem, bl.GradientDescent(steps=50), estimator, u)
        case.problem.outer_loss(params, u).backward()
        close(
            u.grad, bl.hypergradient(case.problem, bl.GradientDescent(steps=50), estimator, case.hparams).hypergradient
        )


@pytest.mark.parametrize(("lowest", "status"), [(-2.0, "NEGATIVE_CURVATURE"), (0.0, "SINGULAR")])
@pytest.mark.parametrize("shared", [True, False])
def test_closed_form_names_a_hessian_that_is_not_positive_definite(lowest, status, shared) -> None:
    hessian = torch.diag(torch.tensor([lowest, 1.0, 3.0], dtype=F64))
    direction = torch.eye(3, dtype=F64) if shared else torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    problem = QuadraticProblem(hessian, normal(1, 3), direction[None])
    u = torch.zeros(1, dtype=F64)
    estimate = bl.hypergradient(problem, bl.GradientDescent(), bl.ClosedForm(), u, on_failure="return")
    assert estimate.status is bl.Status[status]
    assert f"the inner Hessian has the smallest eigenvalue {lowest:.3g}" in estimate.verdict.detail


def test_closed_form_notices_a_loss_that_is_not_quadratic() -> None:
    class Wrong(bl.BilevelProblem):
        structure = Structure(quadratic=True)

    problem = Wrong(lambda x, u: (x**4).sum() + u.exp() * x @ x, lambda x, u: x.sum(), torch.ones(2, dtype=F64))
    u = torch.tensor(0.0, dtype=F64)
    estimate = bl.hypergradient(problem, bl.GradientDescent(), bl.ClosedForm(), u, on_failure="return")
    assert estimate.status is bl.Status.INNER_NOT_CONVERGED
    assert "is the inner loss quadratic?" in estimate.verdict.detail


# Refusals -------------------------------------------------------------------------------------------------------------


def logistic() -> LogisticProblem:
    X, y, X_val, y_val = regression_data()
    return LogisticProblem(X, y.sign(), X_val, y_val.sign())


GD = bl.GradientDescent
SPECTRUM = "Spectral needs a quadratic inner loss whose Hessian is A + s(u) I (a ridge problem with penalty='scalar'"
REFUSED = [
    (logistic, GD(steps=5), bl.Spectral(), SPECTRUM),
    (lambda: ridge_case().problem, GD(steps=5), bl.Spectral(), SPECTRUM),
    (lambda: quadratic_case().problem, GD(steps=5), bl.Spectral(), SPECTRUM),
    (ridge, bl.Newton(steps=5), bl.Spectral(), "Spectral needs a linear multistep solver (GradientDescent, Heavy"),
    (ridge, GD(), bl.Spectral(), "Spectral needs a fixed number of steps: give GradientDescent `steps` and no `tol`"),
    (ridge, bl.Nesterov(steps=5, tol=1e-3), bl.Spectral(), "Spectral needs a fixed number of steps: give Nesterov"),
    (ridge, GD(steps=5), bl.Spectral(tail=6), "`Spectral.tail` is 6, but the inner solver takes 5 steps: the tail"),
    (logistic, GD(), bl.ClosedForm(), "ClosedForm needs a quadratic inner loss, which this LogisticProblem does not"),
]


@pytest.mark.parametrize(("problem", "solver", "estimator", "sentence"), REFUSED)
def test_what_does_not_apply_is_refused_in_one_sentence(problem, solver, estimator, sentence) -> None:
    made = problem()
    u = made.initial_hparams() if hasattr(made, "initial_hparams") else torch.zeros(3, dtype=F64)
    for call in (bl.hypergradient, bl.solution):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}.*[.]$"):
            call(made, solver, estimator, u)


@pytest.mark.parametrize("tail", [0, -1, 1.5, 0.0, True, "auto"])
def test_a_tail_that_is_none_is_refused(tail) -> None:
    with pytest.raises(ValueError, match=r"^`Spectral.tail` must be a positive int \(steps\), a float in \(0, 1\]"):
        bl.Spectral(tail=tail)


def test_ridge_with_too_many_features_to_diagonalise_has_no_spectrum() -> None:
    X, y = torch.zeros(2, 5001), torch.zeros(2)
    assert RidgeProblem(X, y, X, y).spectrum() is None


def test_a_large_closed_form_is_factored_once_and_diagonalised_where_it_recurs() -> None:
    X, y = normal(0, 320, 310), normal(1, 320)
    u = torch.tensor(-1.0, dtype=F64)
    found = []
    for recurs in (False, True):
        large = RidgeProblem(X, y, X[:9], y[:9])
        assert large.has_spectrum
        if recurs:
            bl.OuterOptimizer(large, bl.GradientDescent(), bl.ClosedForm(), u)
        for _ in range(2):
            found.append(bl.hypergradient(large, bl.GradientDescent(), bl.ClosedForm(), u).hypergradient)
            assert ("_eigenbasis" in vars(large)) == (recurs or len(found) > 1)
    torch.testing.assert_close(torch.stack(found), found[0].expand(4), rtol=1e-9, atol=0)


def test_a_sweep_over_one_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^`hparams` of a sweep must be a stack of hyperparameter vectors"):
        bl.Spectral().sweep(ridge(), bl.GradientDescent(steps=3), torch.tensor(0.0, dtype=F64))


def test_closed_form_refuses_more_parameters_than_it_can_factor() -> None:
    class Wide(bl.BilevelProblem):
        structure = Structure(quadratic=True)

    problem = Wide(lambda x, u: u * x @ x + x.sum(), lambda x, u: x.sum(), torch.zeros(5001))
    with pytest.raises(ValueError, match=r"^ClosedForm\(\) factors a dense Hessian, for at most 5,000 parameters"):
        bl.hypergradient(problem, bl.GradientDescent(), bl.ClosedForm(), torch.tensor(1.0))


def test_a_closed_form_sweep_equals_single_calls_and_its_residuals_are_small() -> None:
    problem = ridge()
    grid = torch.linspace(-6.0, 2.0, 9, dtype=F64)
    swept = bl.ClosedForm().sweep(problem, grid)
    for u, value, gradient, params in zip(grid, swept.outer_losses, swept.hypergradients, swept.params, strict=True):
        single = bl.hypergradient(problem, bl.Newton(), bl.ClosedForm(), u)
        assert float(value) == pytest.approx(single.outer_loss, rel=1e-12)
        torch.testing.assert_close(gradient, single.hypergradient, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(gradient, problem.exact_hypergradient(u), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(params, single.params, rtol=1e-10, atol=1e-13)
    assert float(swept.residuals.max()) < 1e-12


def test_a_closed_form_sweep_says_what_it_needs() -> None:
    per_feature = ridge_case("per_feature").problem
    with pytest.raises(ValueError, match=r"ClosedForm.sweep needs a problem with a `spectrum` .* batch=\.\.\.\)"):
        bl.ClosedForm().sweep(per_feature, torch.zeros(3, *per_feature.hparams_shape(), dtype=F64))
    with pytest.raises(ValueError, match="must be a stack of hyperparameter vectors, got a 0-d Tensor"):
        bl.ClosedForm().sweep(ridge(), torch.zeros((), dtype=F64))
