"""Linear solves of a fixed number of products: CG and Neumann by steps, Nystrom by rank; their damping and residual."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import F64, flat, logistic_case, normal, ridge_case, spd
from torch import Tensor

import bilevel as bl
from bilevel.linear import nystrom

Status = bl.Status


def solve(solver: bl.LinearSolver, matrix: Tensor, b: Tensor, **options: Any) -> Any:
    return solver.solve(lambda v: matrix @ v, b, **options)


def true_residual(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    return float((b - matrix @ x).norm() / b.norm())


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_cg_takes_exactly_its_steps_and_reports_its_residual_without_a_verdict(steps: int) -> None:
    matrix, b = spd(1, 40, condition=1e4), normal(2, 40)
    solution = solve(bl.CG(steps=steps), matrix, b)
    same = solve(bl.CG(max_steps=steps), matrix, b)
    assert torch.equal(solution.x, same.x)
    assert same.verdict.status is Status.LINEAR_NOT_CONVERGED
    assert (solution.verdict.status, solution.steps) == (Status.OK, steps)
    assert solution.residual == pytest.approx(true_residual(matrix, solution.x, b), rel=1e-9)
    assert solution.residual > 1e-3


def test_cg_by_steps_ends_where_the_residual_is_rounding() -> None:
    matrix, b = spd(3, 3), normal(4, 3)
    solution = solve(bl.CG(steps=500), matrix, b)
    assert solution.steps < 10
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b), rtol=1e-13, atol=1e-14)
    assert solve(bl.CG(steps=500), matrix, b, tol=0.5).steps == solution.steps


def test_cg_by_steps_still_reports_negative_curvature() -> None:
    matrix = torch.diag(torch.tensor([3.0, -0.25], dtype=F64))
    assert solve(bl.CG(steps=5), matrix, torch.ones(2, dtype=F64)).verdict.status is Status.NEGATIVE_CURVATURE


def test_cg_by_steps_runs_batches() -> None:
    case = ridge_case("scalar")
    u = torch.tensor([-1.0, -4.0, 0.0], dtype=F64)
    estimator = bl.Implicit(bl.CG(steps=2), damping=0.1)
    together = bl.hypergradient(case.problem, bl.GradientDescent(), estimator, u, batch=3)
    alone = [bl.hypergradient(case.problem, bl.GradientDescent(), estimator, each) for each in u]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.hypergradient, other.hypergradient, rtol=1e-9, atol=1e-11)
        assert one.certificate.adjoint_steps == other.certificate.adjoint_steps == 2
        assert one.certificate.adjoint_residual == pytest.approx(other.certificate.adjoint_residual, rel=1e-6)


def test_a_truncated_solve_has_failed_only_where_its_residual_is_above_ten() -> None:
    # (1 + h)^20 = 2.7 and 1e6 for curvature -1.
    matrix, b = -torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)
    mild = solve(bl.Neumann(step_size=0.05, steps=20), matrix, b)
    assert mild.verdict.status.ok
    assert mild.residual == pytest.approx(1.05**20, rel=1e-9)
    assert solve(bl.Neumann(step_size=1.0, steps=20), matrix, b).verdict.status is Status.LINEAR_DIVERGED
    assert solve(bl.FixedPointIteration(step_size=0.05, max_steps=20), matrix, b).verdict.status is (
        Status.LINEAR_DIVERGED
    )


# Damping: in one place, for every solver ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        bl.CG(steps=3),
        bl.GMRES(tol=1e-12),
        bl.Neumann(steps=7, step_size=0.2),
        bl.FixedPointIteration(step_size=0.2, tol=1e-10),
        bl.Direct(),
        bl.Nystrom(rank=3),
    ],
    ids=repr,
)
def test_the_residual_is_that_of_the_damped_system(solver: Any) -> None:
    case = logistic_case()
    estimate = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), bl.Implicit(solver, damping=0.5), case.hparams)
    x, u = case.solution(), flat(case.hparams)
    damped = case.hessian(x, u) + 0.5 * torch.eye(len(x), dtype=F64)
    right = case.outer(x, u)[0]
    expected = true_residual(damped, flat(estimate.carry.adjoint), right)
    assert estimate.certificate.adjoint_residual == pytest.approx(expected, rel=1e-6, abs=1e-13)


# Nystrom --------------------------------------------------------------------------------------------------------------


def low_rank(size: int, rank: int) -> Tensor:
    factor = normal(11, size, rank)
    return factor @ factor.t()


def by_hand(hessian: Tensor, omega: Tensor, rho: float, b: Tensor) -> Tensor:
    """Woodbury as the paper writes it, in dense algebra."""
    Y = hessian @ omega
    core = omega.t() @ Y + Y.t() @ Y / rho
    return b / rho - Y @ torch.linalg.solve(core, Y.t() @ b) / rho**2


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_nystrom_is_the_woodbury_formula_of_its_products(rank: int) -> None:
    hessian, b, rho = spd(12, 20, condition=50.0), normal(13, 20), 0.7
    seen = []

    def matvec(v: Tensor) -> Tensor:
        seen.append(v)
        return hessian @ v + rho * v

    solution = bl.Nystrom(rank=rank, seed=3).solve(matvec, b, damping=rho)
    omega = torch.stack(seen[:rank], dim=1)
    torch.testing.assert_close(omega.t() @ omega, torch.eye(rank, dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(solution.x, by_hand(hessian, omega, rho, b), rtol=1e-10, atol=1e-11)
    assert (len(seen), solution.steps) == (rank + 1, rank)
    damped = hessian + rho * torch.eye(20, dtype=F64)
    assert solution.residual == pytest.approx(true_residual(damped, solution.x, b), rel=1e-9)


def test_nystrom_of_the_full_rank_of_the_hessian_is_exact() -> None:
    hessian, b, rho = low_rank(30, 5), normal(14, 30), 0.01
    exact = torch.linalg.solve(hessian + rho * torch.eye(30, dtype=F64), b)
    damped = hessian + rho * torch.eye(30, dtype=F64)
    solution = solve(bl.Nystrom(rank=5), damped, b, damping=rho)
    torch.testing.assert_close(solution.x, exact, rtol=1e-8, atol=1e-8)
    assert solution.residual < 1e-9


def test_nystrom_is_deterministic_by_its_seed() -> None:
    damped, b = spd(15, 20) + 0.5 * torch.eye(20, dtype=F64), normal(16, 20)
    one, same, other = (solve(bl.Nystrom(4, seed), damped, b, damping=0.5).x for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_nystrom_is_stable_where_the_formula_of_the_paper_is_not() -> None:
    # Eigenvalues over 18 orders of magnitude: core and Y'Y are singular in float64.
    basis = torch.linalg.qr(normal(17, 30, 30))[0]
    hessian = basis @ torch.diag(torch.logspace(2, -16, 30, dtype=F64)) @ basis.t()
    hessian, b, rho = (hessian + hessian.t()) / 2, normal(18, 30), 1e-6
    damped = hessian + rho * torch.eye(30, dtype=F64)
    assert solve(bl.Nystrom(rank=29), damped, b, damping=rho).residual < 1e-4


def test_a_higher_rank_gives_a_better_hypergradient() -> None:
    case = ridge_case()
    damped = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), bl.Implicit(damping=1.0), case.hparams)
    errors = []
    for rank in (1, 3, 5):
        estimator = bl.Implicit(bl.Nystrom(rank=rank), damping=1.0)
        estimate = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), estimator, case.hparams)
        errors.append(float((estimate.hypergradient - damped.hypergradient).norm()))
    assert errors[2] < 1e-12
    assert errors[2] < errors[1] < errors[0]


def test_nystrom_says_what_the_matrix_must_be() -> None:
    b = torch.ones(3, dtype=F64)
    with pytest.raises(ValueError, match=r"`Nystrom.rank` is 2 and the system has 3 unknowns, so it needs"):
        solve(bl.Nystrom(rank=2), torch.eye(3, dtype=F64), b)
    indefinite = torch.diag(torch.tensor([3.0, 1.0, -0.25], dtype=F64)) + 0.5 * torch.eye(3, dtype=F64)
    refused = solve(bl.Nystrom(rank=3), indefinite, b, damping=0.5).verdict
    assert refused.status is Status.NEGATIVE_CURVATURE
    assert "Nystrom met the curvature -0.25 among 3 products" in refused.detail
    assert "Implicit(curvature='gauss-newton')" in refused.detail
    empty = solve(bl.Nystrom(rank=2), 0.5 * torch.eye(3, dtype=F64), b, damping=0.5)
    assert empty.verdict.status is Status.SINGULAR


def test_nystrom_fails_where_the_eigenvalues_it_leaves_out_are_far_above_the_damping() -> None:
    damped, b = spd(19, 40) + 1e-3 * torch.eye(40, dtype=F64), normal(20, 40)
    solution = solve(bl.Nystrom(rank=2), damped, b, damping=1e-3)
    assert solution.verdict.status is Status.LINEAR_NOT_CONVERGED
    assert "large beside the damping 0.001: raise one of the two" in solution.verdict.detail
    assert solution.residual > 10


def test_a_newton_step_tells_nystrom_of_its_damping() -> None:
    case = ridge_case()
    solver = bl.Newton(bl.Nystrom(rank=3), damping=0.5, tol=1e-6)
    estimate = bl.hypergradient(case.problem, solver, bl.Implicit(), case.hparams)
    torch.testing.assert_close(flat(estimate.params), case.solution(), rtol=1e-4, atol=1e-5)


def test_the_sketch_is_the_same_whatever_is_drawn_before() -> None:
    first = nystrom.gaussian_basis(6, 2, 0, torch.zeros(6, dtype=F64))
    torch.rand(3)
    assert torch.equal(first, nystrom.gaussian_basis(6, 2, 0, torch.zeros(6, dtype=F64)))


def test_replacing_steps_keeps_options_apart() -> None:
    assert replace(bl.CG(tol=1e-3), tol=None, steps=4) == bl.CG(steps=4)


@pytest.mark.parametrize(
    "estimator",
    [
        bl.Implicit(bl.CG(steps=1)),
        bl.Implicit(bl.Neumann(steps=3)),
        bl.Implicit(damping=0.1),
        bl.Implicit(bl.Nystrom(rank=2), damping=0.1),
        bl.OneStep(),
        bl.TruncatedUnroll(tail=3),
    ],
    ids=["CG", "Neumann", "damped", "Nystrom", "one step", "tail"],
)
def test_the_bound_of_a_biased_hypergradient_holds_from_both_sides(estimator: bl.HypergradEstimator) -> None:
    case = logistic_case()
    solver = bl.GradientDescent(steps=60)
    found = bl.hypergradient(case.problem, solver, estimator, case.hparams, certify=True, on_failure="return")
    distance = float((found.hypergradient.reshape(-1) - case.hypergradient()).norm())
    assert found.status.ok == (found.certificate.error <= float(found.hypergradient.norm()) / 3)
    assert found.certificate.error_kind == "bound"
    assert distance > 1e-3 * float(case.hypergradient().norm())
    assert found.certificate.error_lower <= distance <= found.certificate.error
