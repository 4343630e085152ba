"""Hypergradient estimators against the product formula, dense implicit differentiation and finite differences."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    BIASED_ESTIMATORS,
    ESTIMATORS,
    F64,
    HPARAMS,
    LINEAR_SOLVERS,
    MOMENTUM,
    PARAMS,
    PROBLEMS,
    QUADRATIC_ESTIMATORS,
    SOLVERS,
    STEP,
    UNROLLED,
    Case,
    descent,
    exported,
    flat,
    logistic_case,
    normal,
    quadratic_case,
    ridge_case,
    tree_case,
)
from torch import Tensor

import bilevel as bl
import bilevel.hypergrad

CASES: dict[str, Callable[[], Case]] = {
    "quadratic": quadratic_case,
    "ridge": ridge_case,
    "ridge scalar": lambda: ridge_case("scalar"),
    "logistic": logistic_case,
    "logistic scalar": lambda: logistic_case("scalar"),
    "dict": lambda: tree_case("dict", "dict"),
}
METHODS = {
    "GradientDescent": bl.GradientDescent(STEP),
    "HeavyBall": bl.HeavyBall(STEP, MOMENTUM),
    "Nesterov": bl.Nesterov(STEP, MOMENTUM),
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def product_formula(case: Case, method: str, steps: int, tail: int) -> tuple[Tensor, Tensor]:
    """Return (x_K, hypergradient): X <- A_k X + B_k from X = 0 at step K - N, on the whole state (x, x_prev)."""
    x, u, h, m = flat(case.start), flat(case.hparams), STEP, MOMENTUM
    n, previous = len(x), x
    eye, zero = torch.eye(n, dtype=F64), torch.zeros(n, n, dtype=F64)
    X = torch.zeros(2 * n, len(u), dtype=F64)
    for k in range(steps):
        y = x + m * (x - previous) if method == "Nesterov" else x
        H, C = case.hessian(y, u), case.cross(y, u)
        step = eye - h * H
        top = {
            "GradientDescent": (step, zero),
            "HeavyBall": (step + m * eye, -m * eye),
            "Nesterov": ((1 + m) * step, -m * step),
        }[method]
        A = torch.cat([torch.cat(top, 1), torch.cat([eye, zero], 1)])
        B = torch.cat([-h * C, torch.zeros_like(C)])
        if k >= steps - tail:
            X = A @ X + B
        push = m * (x - previous) if method == "HeavyBall" else 0.0
        x, previous = y - h * case.grad(y, u) + push, x
    by_x, by_u = case.outer(x, u)
    return x, by_u + X[:n].t() @ by_x


def at(case: Case, solver: Any, estimator: Any, **options: Any) -> bl.Estimate:
    return bl.hypergradient(case.problem, solver, estimator, case.hparams, case.start, **options)


def close(estimate: bl.Estimate, expected: Tensor, tol: float = 1e-11) -> None:
    torch.testing.assert_close(flat(estimate.hypergradient), expected, rtol=tol, atol=tol)


def with_steps(method: str, steps: int) -> Any:
    return replace(METHODS[method], steps=steps)


def test_every_exported_estimator_and_problem_has_a_row_of_gold_options() -> None:
    rows = {*ESTIMATORS, *QUADRATIC_ESTIMATORS, *BIASED_ESTIMATORS}
    assert rows == set(exported(bilevel.hypergrad, bl.HypergradEstimator))
    problems = set(exported(bl.problems, bl.BilevelProblem)) - {bl.problems.DataProblem, bl.problems.LinearModelProblem}
    problems -= {bl.problems.MLPProblem}  # no single solution: test_mlp.py
    problems -= {bl.problems.LassoProblem, bl.problems.ElasticNetProblem}  # no smooth solver: test_lasso.py
    assert set(PROBLEMS) == problems


@pytest.mark.crossed
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_every_full_unroll_equals_the_product_formula(case: Callable[[], Case], method: str, steps: int) -> None:
    case_ = case()
    x, expected = product_formula(case_, method, steps, steps)
    results = {}
    for name, estimator in {
        "iterates": bl.FullUnroll(),
        "graph": bl.FullUnroll(memory="graph"),
        "forward": bl.FullUnroll(mode="forward"),
        "tail": bl.TruncatedUnroll(tail=steps),
        "fraction": bl.TruncatedUnroll(tail=1.0),
    }.items():
        results[name] = at(case_, with_steps(method, steps), estimator)
        close(results[name], expected)
        torch.testing.assert_close(flat(results[name].params), x, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        flat(results["forward"].hypergradient), flat(results["iterates"].hypergradient), rtol=1e-12, atol=1e-13
    )


@pytest.mark.crossed
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("steps", "tail", "length"), [(12, 7, 7), (20, 0.35, 7), (10, 0.01, 1), (9, 8, 8)])
def test_a_truncated_unroll_equals_the_product_formula_of_its_tail(
    case: Callable[[], Case], method: str, steps: int, tail: float, length: int
) -> None:
    case_ = case()
    _, expected = product_formula(case_, method, steps, length)
    estimate = at(case_, with_steps(method, steps), bl.TruncatedUnroll(tail=tail))
    close(estimate, expected)
    assert (estimate.certificate.inner_steps, estimate.certificate.adjoint_steps) == (steps, length)
    _, full = product_formula(case_, method, steps, steps)
    assert (expected - full).norm() > 1e-6 * full.norm()  # the tail matters, so the comparison can fail


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_a_fraction_is_of_the_steps_that_were_taken_where_the_solver_stops_by_tolerance(fraction: float) -> None:
    case = ridge_case()
    estimate = at(case, bl.GradientDescent(STEP, tol=1e-3), bl.TruncatedUnroll(tail=fraction))
    taken = estimate.certificate.inner_steps
    length = -(-int(10 * fraction) * taken // 10)
    assert estimate.certificate.adjoint_steps == length
    close(estimate, product_formula(case, "GradientDescent", taken, length)[1])


@pytest.mark.parametrize("steps", [1, 10, 30, 100, 1000])
def test_a_fraction_is_the_smallest_number_of_steps_that_covers_it(steps: int) -> None:
    for percent in range(1, 101):
        expected = max(1, -(-percent * steps // 100))
        assert bl.TruncatedUnroll(tail=percent / 100).length(steps) == expected


@pytest.mark.parametrize("solver", LINEAR_SOLVERS.values(), ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_implicit_with_every_linear_solver_equals_the_dense_implicit_function_theorem(
    solver: Any, case: Callable[[], Case]
) -> None:
    case_ = case()
    close(at(case_, bl.Newton(tol=1e-12), bl.Implicit(solver)), case_.hypergradient(), 1e-9)


def test_implicit_equals_the_exact_jacobian_of_the_quadratic() -> None:
    case = quadratic_case()
    problem: Any = case.problem
    x = problem.solve(case.hparams)
    expected = problem.exact_jacobian(case.hparams).t() @ (x - problem.target)
    close(at(case, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct())), expected, 1e-12)
    torch.testing.assert_close(expected, case.hypergradient(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=lambda estimator: type(estimator).__name__)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda cls: cls.__name__)
def test_every_estimator_agrees_with_dense_algebra_at_convergence(estimator: Any, problem: type) -> None:
    case = PROBLEMS[problem]()
    # The problem's own start and another one in turn: every problem and every estimator has both.
    turn = list(PROBLEMS).index(problem) + list(ESTIMATORS).index(type(estimator))
    start = None if turn % 2 else case.start
    estimate = bl.hypergradient(case.problem, descent(problem, tol=1e-11), estimator, case.hparams, start)
    tol = 1e-7 if isinstance(estimator, bl.FiniteDifference | bl.TruncatedUnroll) else 1e-8
    expected = case.hypergradient()
    assert (flat(estimate.hypergradient) - expected).norm() <= tol * expected.norm()


@pytest.mark.parametrize("damping", [0.5, 3.0])
def test_damping_adds_to_the_diagonal_of_the_adjoint_system_alone(damping: float) -> None:
    case = logistic_case()
    x, u = case.solution(), flat(case.hparams)
    by_x, by_u = case.outer(x, u)
    H = case.hessian(x, u) + damping * torch.eye(len(x), dtype=F64)
    expected = by_u - case.cross(x, u).t() @ torch.linalg.solve(H, by_x)
    for solver in (bl.CG(tol=1e-13), bl.Direct()):
        close(at(case, bl.Newton(tol=1e-12), bl.Implicit(solver, damping=damping)), expected, 1e-10)


@pytest.mark.crossed
@pytest.mark.parametrize("linear_solver", [None, bl.CG(tol=1e-13), bl.Direct()], ids=repr)
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_unrolled_newton_has_the_derivative_of_its_steps(linear_solver: Any, damping: float, steps: int) -> None:
    # With CG the number of iterations moves with the hyperparameters unless each system is solved.
    if isinstance(linear_solver, bl.CG):
        tight = type("TightCG", (bl.CG,), {"solve": lambda self, *a, tol=None, **o: bl.CG.solve(self, *a, **o)})
        linear_solver = tight(tol=1e-13)
    case = tree_case("dict", "dict")
    solver = bl.Newton(linear_solver, damping, steps=steps)
    unrolled, differences = (at(case, solver, e) for e in (bl.FullUnroll(), bl.FiniteDifference()))
    torch.testing.assert_close(flat(unrolled.hypergradient), flat(differences.hypergradient), rtol=1e-7, atol=1e-8)


def test_newton_steps_that_stay_at_the_solution_still_carry_the_derivative() -> None:
    case = quadratic_case()
    for tail in (1, 5, 30):
        close(at(case, bl.Newton(steps=30), bl.TruncatedUnroll(tail=tail)), case.hypergradient(), 1e-10)


def nonsymmetric(hparams: str = "tensor") -> tuple[bl.BilevelProblem, Any, Any, Callable[[Tensor], Tensor]]:
    """A contraction with a nonsymmetric Jacobian, and the exact total outer loss as a function of flat hparams."""
    M, c, t = 0.4 * spd_free(), normal(52, 4), normal(53, 4)

    def map_(x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(M @ x * (1 + 0.2 * u[0]) + u[1] * c) + 0.1 * u[0]

    def update(x: Any, u: Any) -> Any:
        return {"x": map_(x["x"], flat(u))}

    def outer(x: Any, u: Any) -> Tensor:
        return (x["x"] - t).square().sum() + flat(u).square().sum()

    def total(u: Tensor) -> Tensor:
        x = torch.zeros(4, dtype=F64)
        for _ in range(400):
            x = map_(x, u)
        return outer({"x": x}, u)

    problem = bl.BilevelProblem.from_fixed_point(update, outer, {"x": torch.zeros(4, dtype=F64)})
    return problem, update, HPARAMS[hparams], total


def spd_free() -> Tensor:
    M = normal(51, 4, 4)
    return M / torch.linalg.matrix_norm(M, 2)


@pytest.mark.parametrize("hparams", HPARAMS)
def test_a_users_map_with_nonsymmetric_jacobian_is_differentiated_unrolled_and_implicitly(hparams: str) -> None:
    problem, update, u, total = nonsymmetric(hparams)
    expected = torch.func.grad(total)(flat(u))
    assert not torch.allclose(spd_free(), spd_free().t())
    for estimator in (
        bl.Implicit(bl.GMRES(tol=1e-13)),
        bl.Implicit(bl.Neumann(steps=200, step_size=1.0)),
        bl.FullUnroll(),
        bl.FullUnroll(memory="graph"),
        bl.FullUnroll(mode="forward"),
        bl.TruncatedUnroll(tail=0.99),
    ):
        estimate = bl.hypergradient(problem, bl.FixedPoint(update, tol=1e-14, steps=200), estimator, u)
        torch.testing.assert_close(flat(estimate.hypergradient), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tree", ["tensor", "0-d", "dict"])
def test_unrolled_adam_reverse_graph_forward_and_finite_differences_agree(tree: str) -> None:
    case, solver = tree_case(tree, "dict"), bl.Adam(0.05, steps=20)
    graph, reverse, forward, differences = (
        flat(at(case, solver, estimator).hypergradient)
        for estimator in (
            bl.FullUnroll(memory="graph"),
            bl.FullUnroll(),
            bl.FullUnroll(mode="forward"),
            bl.FiniteDifference(),
        )
    )
    torch.testing.assert_close(reverse, graph, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(forward, graph, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(differences, graph, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("cls", "params", "hparams"),
    [
        *((cls, "dict", "dict") for cls in UNROLLED),
        *((bl.GradientDescent, params, hparams) for params in PARAMS for hparams in HPARAMS),
        *((cls, params, "tensor") for cls, params in zip(UNROLLED, itertools.cycle(PARAMS), strict=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_solver_unrolls_on_every_tree_as_finite_differences_say(cls: type, params: str, hparams: str) -> None:
    case = tree_case(params, hparams)
    solver = SOLVERS[cls].make(case.problem, steps=2 if cls is bl.Newton else 6)
    ours, differences = (at(case, solver, estimator) for estimator in (bl.FullUnroll(), bl.FiniteDifference()))
    scale = max(1.0, float(flat(differences.hypergradient).norm()))
    assert (flat(ours.hypergradient) - flat(differences.hypergradient)).norm() <= 1e-7 * scale
    assert type(ours.hypergradient) is type(case.hparams)


def test_the_direct_dependence_of_the_outer_loss_is_added() -> None:
    case = tree_case()
    x, u = case.solution(), flat(case.hparams)
    _, by_u = case.outer(x, u)
    assert by_u.norm() > 0.1
    close(at(case, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct())), case.hypergradient(), 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_carried_state_is_a_constant_of_the_differentiation(method: str) -> None:
    case = ridge_case()
    first = at(case, with_steps(method, 4), bl.FullUnroll())
    warm = at(case, with_steps(method, 3), bl.FullUnroll(), carry=first.carry)
    # Seven steps in a row, of which the last three are differentiated.
    x, expected = product_formula(case, method, 7, 3)
    close(warm, expected)
    torch.testing.assert_close(flat(warm.params), x, rtol=0, atol=1e-12)


def test_a_warm_start_that_is_good_enough_already_is_no_silent_zero() -> None:
    case = ridge_case()
    solver = bl.GradientDescent(STEP, tol=1e-9)
    first = at(case, solver, bl.TruncatedUnroll(tail=200))
    for estimator in (bl.TruncatedUnroll(tail=200), bl.TruncatedUnroll(tail=0.5), bl.FullUnroll()):
        again = at(case, solver, estimator, carry=first.carry)
        assert flat(again.hypergradient).norm() > 0
    again = at(case, solver, bl.TruncatedUnroll(tail=200), carry=first.carry)
    assert again.certificate.adjoint_steps == 200
    close(again, product_formula(case, "GradientDescent", first.certificate.inner_steps + 200, 200)[1], 1e-10)


def test_float32_hypergradients_are_right_to_float32() -> None:
    case = ridge_case()
    problem: Any = case.problem
    X, y, V, z = (t.float() for t in (problem.train.X.t(), problem.train.y, problem.val.X.t(), problem.val.y))
    single = bl.problems.RidgeProblem(X, y, V, z, penalty="per_feature")
    for estimator in (bl.FullUnroll(), bl.FullUnroll(mode="forward"), bl.Implicit(), bl.TruncatedUnroll(tail=0.9)):
        estimate = bl.hypergradient(single, bl.GradientDescent(), estimator, case.hparams.float())
        assert estimate.hypergradient.dtype == torch.float32
        error = (estimate.hypergradient.double() - case.hypergradient()).norm() / case.hypergradient().norm()
        assert error < 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=lambda estimator: type(estimator).__name__)
def test_inputs_are_neither_modified_nor_given_gradients(estimator: Any) -> None:
    case = tree_case("tensor", "tensor")
    u, x = case.hparams.clone().requires_grad_(), case.start.clone().requires_grad_()
    before = u.detach().clone(), x.detach().clone()
    bl.hypergradient(case.problem, bl.GradientDescent(STEP, steps=5), estimator, u, x)
    assert torch.equal(u, before[0])
    assert torch.equal(x, before[1])
    assert u.grad is None
    assert x.grad is None


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=lambda estimator: type(estimator).__name__)
def test_hypergradients_on_the_gpu_equal_those_on_the_cpu(estimator: Any) -> None:
    X, y = normal(1, 30, 4), normal(2, 30)
    results = []
    for device in ("cpu", "cuda"):
        problem = bl.problems.RidgeProblem(*(t.to(device) for t in (X[:20], y[:20], X[20:], y[20:])))
        u = torch.zeros((), dtype=F64, device=device)
        results.append(bl.hypergradient(problem, bl.GradientDescent(tol=1e-10), estimator, u).hypergradient)
    assert results[1].is_cuda
    torch.testing.assert_close(results[1].cpu(), results[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("linear_solver", [bl.GMRES(), bl.CG(), bl.Direct()], ids=lambda s: type(s).__name__)
def test_a_maximum_or_a_saddle_of_an_inner_loss_is_no_solution(linear_solver: bl.LinearSolver) -> None:
    for curvatures in ([-1.0, -2.0], [1.0, -2.0]):
        c = torch.tensor(curvatures, dtype=F64)

        def inner(x: Any, u: Any, c: Any = c) -> Any:
            return (0.5 * c * x * x).sum() - u * x.sum()

        problem = bl.BilevelProblem(inner, lambda x, u: (x - 1).square().sum(), torch.zeros(2, dtype=F64))
        # A step towards any stationary point, minimum or not.
        solver = bl.FixedPoint(lambda x, u, c=c: x - 0.4 * c * (c * x - u), steps=300)
        found = bl.hypergradient(
            problem, solver, bl.Implicit(linear_solver), torch.tensor(0.5, dtype=F64), on_failure="return"
        )
        assert found.status is bl.Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("linear_solver", [bl.GMRES(), bl.CG(), bl.Direct()], ids=lambda s: type(s).__name__)
def test_singular_directions_of_the_hessian_matter_only_where_the_outer_loss_sees_them(
    linear_solver: bl.LinearSolver,
) -> None:
    rows, y, u = normal(101, 3, 5), normal(102, 3), torch.tensor(1.3, dtype=F64)
    inner = lambda w, u: (rows @ w - u * y).square().sum()  # noqa: E731
    given = (bl.GradientDescent(tol=1e-10), bl.Implicit(linear_solver), u)
    blind = bl.BilevelProblem(inner, lambda w, u: (rows @ w).square().sum(), torch.zeros(5, dtype=F64))
    found = bl.hypergradient(blind, *given)
    assert found.status.ok
    assert float(found.hypergradient) == pytest.approx(float(2 * u * y @ y), rel=1e-7)
    if isinstance(linear_solver, bl.Direct):
        assert "2 singular direction(s), which the outer loss does not see" in found.verdict.detail
    seeing = bl.BilevelProblem(inner, lambda w, u: (w - 1).square().sum(), torch.zeros(5, dtype=F64))
    found = bl.hypergradient(seeing, *given, on_failure="return")
    assert found.status is bl.Status.SINGULAR
    assert "damping above" not in str(found.verdict)
