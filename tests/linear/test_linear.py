"""Linear solvers on dense matrices whose solution is known."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import F64, LINEAR_SOLVERS, PARAMS, exported, flat, normal, shaped, spd
from torch import Tensor

import bilevel as bl
import bilevel.linear
from bilevel.numerics.conjugate_gradients import conjugate_gradients_of_rows

every_solver = pytest.mark.parametrize("solver", LINEAR_SOLVERS.values(), ids=lambda solver: type(solver).__name__)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
Status = bl.Status


def solve(solver: bl.LinearSolver, matrix: Tensor, b: Tensor, x0: Tensor | None = None, **options: Any) -> Any:
    return solver.solve(lambda v: matrix @ v, b, x0, **options)


def cg_iterates(matrix: Tensor, b: Tensor, steps: int) -> list[Tensor]:
    """The CG iterates as minimisers of the A-norm error over the Krylov space, by dense least squares."""
    basis, iterates = [b / b.norm()], []
    for _ in range(steps):
        V, _ = torch.linalg.qr(torch.stack(basis, 1))
        iterates.append(V @ torch.linalg.solve(V.t() @ matrix @ V, V.t() @ b))
        basis.append(matrix @ V[:, -1] / (matrix @ V[:, -1]).norm())
    return iterates


def test_every_exported_linear_solver_has_a_row_of_gold_options() -> None:
    assert set(LINEAR_SOLVERS) == set(exported(bilevel.linear, bl.LinearSolver)) == set(exported(bl, bl.LinearSolver))


@every_solver
@pytest.mark.parametrize("size", [1, 2, 30])
def test_it_solves_positive_definite_systems_of_any_size(solver: bl.LinearSolver, size: int) -> None:
    matrix, b = spd(1, size), normal(2, size)
    solution = solve(solver, matrix, b)
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)
    assert solution.verdict.status.ok
    assert solution.residual == pytest.approx(float((b - matrix @ solution.x).norm() / b.norm()), rel=1e-6, abs=1e-18)


@pytest.mark.crossed
@every_solver
@pytest.mark.parametrize("tree", PARAMS)
def test_it_solves_systems_on_trees_and_returns_their_shape(solver: bl.LinearSolver, tree: str) -> None:
    like = PARAMS[tree]
    n = flat(like).numel()
    matrix, b = spd(3, n), normal(4, n)
    solution = solver.solve(lambda v: shaped(matrix @ flat(v), like), shaped(b, like))
    torch.testing.assert_close(flat(solution.x), torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)
    shaped_b = shaped(b, like)
    assert type(solution.x) is type(shaped_b)
    if isinstance(shaped_b, Tensor):
        assert solution.x.shape == shaped_b.shape


@every_solver
@pytest.mark.parametrize("start", ["none", "random", "solution"])
def test_a_zero_right_hand_side_gives_zero_whatever_the_start(solver: bl.LinearSolver, start: str) -> None:
    x0 = None if start == "none" else normal(5, 4)
    solution = solve(solver, spd(5, 4), torch.zeros(4, dtype=F64), x0)
    assert not solution.x.any()
    assert (solution.residual, solution.verdict.status) == (0.0, Status.OK)


@every_solver
def test_a_warm_start_does_not_change_the_limit(solver: bl.LinearSolver) -> None:
    matrix, b = spd(6, 8), normal(7, 8)
    for x0 in (normal(8, 8), 1e3 * normal(8, 8), torch.linalg.solve(matrix, b)):
        given = x0.clone()
        solution = solve(solver, matrix, b, x0)
        torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-10)
        assert solution.verdict.status.ok
        assert torch.equal(x0, given)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e150])
@pytest.mark.parametrize("cls", [bl.CG, bl.GMRES, bl.FixedPointIteration])
def test_a_warm_start_at_the_solution_takes_no_step_and_near_it_fewer(cls: type, scale: float) -> None:
    matrix, b = spd(6, 20), scale * normal(7, 20)
    exact = torch.linalg.solve(matrix, b)
    solver = cls(tol=1e-8)
    assert solve(solver, matrix, b, exact).steps == 0
    assert solve(solver, matrix, b, exact + 1e-6 * scale * normal(8, 20)).steps < solve(solver, matrix, b).steps


@every_solver
@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e-12, 1e12, 1e150])
def test_the_solution_is_linear_in_the_right_hand_side_however_small_or_large(
    solver: bl.LinearSolver, scale: float
) -> None:
    matrix, b = spd(9, 5), normal(10, 5)
    solution = solve(solver, matrix, scale * b)
    assert solution.verdict.status.ok
    torch.testing.assert_close(solution.x / scale, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)


@every_solver
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scaling_the_matrix_scales_the_solution(solver: bl.LinearSolver, scale: float) -> None:
    matrix, b = spd(9, 5), normal(10, 5)
    solution = solve(solver, scale * matrix, b)
    assert solution.verdict.status.ok
    torch.testing.assert_close(scale * solution.x, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0, 1.5])
def test_scaling_a_step_size_never_changes_the_limit(fraction: float) -> None:
    matrix, b = spd(11, 6, condition=4.0), normal(12, 6)
    exact = torch.linalg.solve(matrix, b)
    for solver in (
        bl.FixedPointIteration(step_size=fraction / 4, tol=1e-12),
        bl.Neumann(step_size=fraction / 4, steps=3000),
    ):
        torch.testing.assert_close(solve(solver, matrix, b).x, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", [bl.CG(), bl.GMRES(restart=60), bl.Direct()], ids=lambda s: type(s).__name__)
def test_ill_conditioned_systems_are_solved_to_the_residual_or_reported(solver: bl.LinearSolver) -> None:
    for condition in (1e6, 1e12):
        basis, _ = torch.linalg.qr(normal(13, 20, 20))
        matrix = (
            basis @ torch.diag(torch.logspace(0, float(torch.tensor(condition).log10()), 20, dtype=F64)) @ basis.t()
        )
        matrix, b = (matrix + matrix.t()) / 2, normal(14, 20)
        solution = solve(solver, matrix, b)
        true = float((b - matrix @ solution.x).norm() / b.norm())
        assert solution.residual == pytest.approx(true, rel=1e-3, abs=1e-15)
        # The residual that rounding leaves of condition 1e12 differs from CPU to CPU, on either side of Direct's limit.
        limit = torch.finfo(F64).eps ** (1 / 3) if isinstance(solver, bl.Direct) else 4e-10
        assert solution.verdict.status.ok == (solution.residual <= limit)


def test_cg_iterates_are_the_krylov_minimisers_and_the_last_one_is_returned() -> None:
    matrix, b = spd(15, 10), normal(16, 10)
    for steps, expected in enumerate(cg_iterates(matrix, b, 6), start=1):
        solution = solve(bl.CG(max_steps=steps), matrix, b)
        torch.testing.assert_close(solution.x, expected, rtol=0, atol=1e-10)
        assert solution.steps == steps


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_cg_is_exact_after_as_many_steps_as_unknowns(size: int) -> None:
    matrix, b = spd(17, size), normal(18, size)
    solution = solve(bl.CG(tol=1e-14, max_steps=size), matrix, b)
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b), rtol=1e-11, atol=1e-12)
    assert solution.steps <= size


def test_the_error_of_cg_falls_in_every_step_in_the_energy_norm() -> None:
    matrix, b = spd(19, 30, condition=1e3), normal(20, 30)
    exact = torch.linalg.solve(matrix, b)
    errors = []
    for steps in range(1, 25):
        e = solve(bl.CG(max_steps=steps), matrix, b).x - exact
        errors.append(float(e @ matrix @ e))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_looking_every_eight_iterations_returns_the_same_x_as_looking_every_one(size: int) -> None:
    matrix, b = spd(21, size), normal(22, size)
    for x0 in (None, torch.linalg.solve(matrix, b), normal(23, size)):
        one, eight = (solve(bl.CG(check_every=k), matrix, b, x0) for k in (1, 8))
        assert torch.equal(one.x, eight.x)
        assert (one.steps, one.residual) == (eight.steps, eight.residual)
    negative = spd(21, size) - 5.0 * torch.eye(size, dtype=F64)
    one, eight = (solve(bl.CG(check_every=k), negative, b) for k in (1, 8))
    assert torch.equal(one.x, eight.x)
    assert one.verdict == eight.verdict


def test_a_row_of_nan_stays_at_its_start_while_the_others_are_solved() -> None:
    matrices = torch.stack([spd(23, 4), spd(24, 4)])
    b = torch.stack([normal(25, 4), torch.full((4,), math.nan, dtype=F64)])
    goals = torch.full((2,), 1e-24, dtype=F64)
    start = torch.zeros_like(b)
    x, *_ = conjugate_gradients_of_rows(lambda v: (matrices @ v[..., None])[..., 0], start, b, goals, 50, 1)
    torch.testing.assert_close(x[0], torch.linalg.solve(matrices[0], b[0]), rtol=1e-10, atol=1e-12)
    assert not x[1].any()


def test_cg_reports_negative_curvature_with_its_value_and_a_damping_that_lifts_it() -> None:
    matrix = torch.diag(torch.tensor([3.0, -0.25], dtype=F64))
    solution = solve(bl.CG(), matrix, torch.tensor([0.0, 1.0], dtype=F64))
    assert solution.verdict.status is Status.NEGATIVE_CURVATURE
    assert "curvature -0.25 after 0 steps" in str(solution.verdict)
    assert "a damping above 0.25 would lift it" in str(solution.verdict)
    lifted = matrix + 0.26 * torch.eye(2, dtype=F64)
    assert solve(bl.CG(), lifted, torch.ones(2, dtype=F64)).verdict.status.ok


@pytest.mark.parametrize("solver", [bl.Direct(), bl.Neumann(), bl.FixedPointIteration()], ids=repr)
def test_the_other_symmetric_solvers_report_negative_curvature_with_its_value(solver: bl.LinearSolver) -> None:
    for matrix in (torch.diag(torch.tensor([3.0, -0.25], dtype=F64)), torch.tensor([[-0.25]], dtype=F64)):
        solution = solve(solver, matrix, torch.ones(len(matrix), dtype=F64))
        assert solution.verdict.status is Status.NEGATIVE_CURVATURE
        assert "-0.25" in str(solution.verdict)
        assert "a damping above 0.25 would lift it" in str(solution.verdict)


@every_solver
def test_a_singular_system_without_solution_is_never_reported_as_solved(solver: bl.LinearSolver) -> None:
    for matrix in (torch.zeros(3, 3, dtype=F64), torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64))):
        solution = solve(solver, matrix, torch.ones(3, dtype=F64))
        if isinstance(solver, bl.Neumann) and matrix.any():
            assert solution.residual > 0.5  # an approximation by design: the residual says what it is worth
        else:
            assert not solution.verdict.status.ok
            assert solution.verdict.detail


def test_cg_and_direct_name_a_singular_system() -> None:
    for solver in (bl.CG(), bl.Direct()):
        assert solve(solver, torch.zeros(2, 2, dtype=F64), torch.ones(2, dtype=F64)).verdict.status is Status.SINGULAR


@pytest.mark.parametrize(
    "solver", [bl.CG(max_steps=3), bl.GMRES(max_steps=3), bl.FixedPointIteration(max_steps=3)], ids=repr
)
def test_a_solver_out_of_steps_says_its_steps_and_its_true_residual(solver: bl.LinearSolver) -> None:
    matrix, b = spd(24, 30, condition=1e4), normal(25, 30)
    solution = solve(solver, matrix, b)
    true = float((b - matrix @ solution.x).norm() / b.norm())
    assert solution.verdict.status is Status.LINEAR_NOT_CONVERGED
    assert f"stopped after 3 steps at the relative residual {true:.2e}, above tol=3.7e-11" in str(solution.verdict)
    assert (solution.steps, solution.residual) == (3, pytest.approx(true, rel=1e-6))


@pytest.mark.parametrize(
    "solver",
    [
        bl.CG(tol=1e-30, max_steps=4),
        bl.GMRES(tol=1e-30, max_steps=4),
        bl.FixedPointIteration(tol=1e-30, max_steps=20),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_a_residual_fifty_times_above_the_tolerance_has_not_converged(solver: Any) -> None:
    matrix, b = spd(15, 20), normal(16, 20)
    left = solve(solver, matrix, b).residual
    assert 1e-8 < left < 1
    short = solve(replace(solver, tol=left / 50), matrix, b)
    assert (short.residual, short.verdict.status) == (left, Status.LINEAR_NOT_CONVERGED)
    assert solve(replace(solver, tol=2 * left), matrix, b).verdict.status is Status.OK


@every_solver
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_reported_as_such(solver: bl.LinearSolver, value: float) -> None:
    matrix = spd(26, 4)
    matrix[1, 2] = matrix[2, 1] = value
    assert solve(solver, matrix, normal(27, 4)).verdict.status is Status.NOT_FINITE


def test_direct_solves_a_matrix_that_is_not_symmetric_unless_it_should_be_a_hessian() -> None:
    matrix = spd(28, 4) + torch.triu(normal(29, 4, 4), 1)
    b = normal(30, 4)
    solution = solve(bl.Direct(), matrix, b)
    assert solution.verdict.status.ok
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b))
    refused = bl.Direct().solve(lambda v: matrix @ v, b, definite=True)
    assert refused.verdict.status is Status.LINEAR_NOT_CONVERGED
    assert "not symmetric" in str(refused.verdict)


def test_direct_takes_an_indefinite_matrix_where_no_minimum_is_promised() -> None:
    matrix, b = torch.diag(torch.tensor([3.0, -0.25], dtype=F64)), torch.ones(2, dtype=F64)
    solution = bl.Direct().solve(lambda v: matrix @ v, b, definite=False)
    assert solution.verdict.status.ok
    torch.testing.assert_close(solution.x, b / matrix.diagonal())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", [bl.Direct(), bl.CG(), bl.GMRES()], ids=lambda s: type(s).__name__)
def test_singular_directions_matter_only_where_the_right_hand_side_sees_them(
    solver: bl.LinearSolver, dtype: torch.dtype
) -> None:
    rows = normal(81, 5, 8).to(dtype)
    matrix, seen = rows.t() @ rows, rows.t() @ normal(82, 5).to(dtype)
    unseen = bl.base.LinearSolver.solve(solver, lambda v: matrix @ v, seen, dense=lambda: matrix, definite=True)
    assert unseen.verdict.status.ok
    # The component along the singular directions is left alone.
    expected = (torch.linalg.pinv(matrix.double(), rtol=1e-5) @ seen.double()).to(dtype)
    torch.testing.assert_close(unseen.x, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-9)
    if isinstance(solver, bl.Direct):
        assert "3 singular direction(s), which the outer loss does not see" in unseen.verdict.detail
    failed = solver.solve(lambda v: matrix @ v, normal(83, 8).to(dtype), definite=True)
    assert failed.verdict.status is Status.SINGULAR
    assert "damping above" not in str(failed.verdict)


@pytest.mark.parametrize("solver", [bl.CG(), bl.Direct()], ids=lambda s: type(s).__name__)
def test_singular_members_of_a_batch_are_judged_as_single_systems_are(solver: bl.LinearSolver) -> None:
    rows = normal(81, 5, 8)
    matrix, regular = rows.t() @ rows, spd(84, 8)
    matrices = torch.stack([matrix, matrix, regular, -regular])
    b = torch.stack([rows.t() @ normal(82, 5), normal(83, 8), normal(83, 8), normal(83, 8)])
    solution = solver.solve(
        lambda v: (matrices @ v[..., None])[..., 0], b, dense=lambda: matrices, definite=True, rows=True
    )
    assert [v.status for v in solution.verdict] == [
        Status.OK, Status.SINGULAR, Status.OK, Status.NEGATIVE_CURVATURE
    ]  # fmt: skip
    torch.testing.assert_close(solution.x[0], torch.linalg.pinv(matrix) @ b[0])
    torch.testing.assert_close(solution.x[2], torch.linalg.solve(regular, b[2]))


def test_rows_are_refused_by_a_solver_of_one_system() -> None:
    with pytest.raises(ValueError, match=r"^GMRES\(\) takes one system at a time: use CG\(\) or Direct\(\) for rows."):
        bl.GMRES().solve(lambda v: v, torch.ones(2, 3), rows=True)


def test_rows_of_any_tree_and_of_any_size_are_solved() -> None:
    sizes = torch.tensor([1e-200, 2.0, 1e200], dtype=F64)
    b = {"a": normal(1, 3, 2) * sizes[:, None], "b": normal(2, 3) * sizes}
    matrices = 4.0 * torch.eye(3, dtype=F64).expand(3, 3, 3)
    for solver in (bl.CG(), bl.Direct()):
        found = solver.solve(lambda v: {k: 4.0 * x for k, x in v.items()}, b, dense=lambda: matrices, rows=True)
        assert max(found.residual) < 1e-12
        for name in b:
            torch.testing.assert_close(found.x[name], b[name] / 4.0, rtol=1e-12, atol=0)


def test_gmres_reports_negative_curvature_of_what_should_be_a_hessian() -> None:
    matrix, b = torch.diag(torch.tensor([3.0, 1.0, -0.25], dtype=F64)), torch.ones(3, dtype=F64)
    assert bl.GMRES().solve(lambda v: matrix @ v, b).verdict.status.ok
    found = bl.GMRES().solve(lambda v: matrix @ v, b, definite=True).verdict
    assert found.status is Status.NEGATIVE_CURVATURE
    assert "GMRES met the curvature -0.25 within 3 steps" in found.detail


def test_direct_gives_the_same_with_a_dense_matrix_at_hand_and_from_products() -> None:
    matrix, b = spd(31, 6), normal(32, 6)
    products = solve(bl.Direct(), matrix, b)
    dense = solve(bl.Direct(), matrix, b, dense=lambda: matrix)
    torch.testing.assert_close(dense.x, products.x, rtol=0, atol=1e-15)
    torch.testing.assert_close(dense.x, torch.linalg.solve(matrix, b), rtol=1e-13, atol=1e-14)


def test_direct_refines_what_rounding_of_its_matrix_leaves() -> None:
    matrix, b = spd(20, 6), normal(21, 6)
    solution = solve(bl.Direct(), matrix, b, dense=lambda: matrix + 1e-6 * spd(22, 6))
    assert 1e-16 < solution.residual < 1e-10


def test_gmres_keeps_its_space_orthogonal_where_the_matrix_is_ill_conditioned() -> None:
    left, _ = torch.linalg.qr(normal(1, 30, 30))
    right, _ = torch.linalg.qr(normal(2, 30, 30))
    matrix = left @ torch.diag(torch.logspace(0, -10, 30, dtype=F64)) @ right
    assert solve(bl.GMRES(tol=1e-14, restart=30), matrix, normal(3, 30)).residual < 1e-5


def test_direct_refuses_a_system_above_its_size() -> None:
    with pytest.raises(ValueError, match=r"`Direct.max_size` is 3 but the system has 4 unknowns.*or use CG\(\)"):
        solve(bl.Direct(max_size=3), spd(31, 4), normal(32, 4))


@pytest.mark.parametrize("restart", [1, 3, 10, 50])
def test_gmres_solves_nonsymmetric_systems_with_any_restart(restart: int) -> None:
    matrix = 3.0 * torch.eye(12, dtype=F64) + 0.3 * normal(33, 12, 12)
    b = normal(34, 12)
    solution = solve(bl.GMRES(tol=1e-11, restart=restart), matrix, b)
    assert solution.verdict.status.ok
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-9)


def test_gmres_minimises_the_residual_over_the_krylov_space() -> None:
    matrix, b = torch.eye(9, dtype=F64) + 0.5 * normal(35, 9, 9), normal(36, 9)
    powers = [b]
    for steps in range(1, 6):
        V, _ = torch.linalg.qr(torch.stack(powers, 1))
        best = torch.linalg.lstsq(matrix @ V, b[:, None]).solution[:, 0]
        solution = solve(bl.GMRES(tol=1e-14, max_steps=steps), matrix, b)
        torch.testing.assert_close(solution.x, V @ best, rtol=0, atol=1e-10)
        powers.append(matrix @ powers[-1])


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_neumann_equals_its_sum(steps: int) -> None:
    matrix, b, h = spd(37, 5, condition=3.0), normal(38, 5), 0.3
    term, total = h * b, torch.zeros(5, dtype=F64)
    for _ in range(steps):
        total, term = total + term, term - h * (matrix @ term)
    solution = solve(bl.Neumann(steps=steps, step_size=h), matrix, b, x0=normal(39, 5))
    torch.testing.assert_close(solution.x, total, rtol=0, atol=1e-13)
    assert solution.steps == steps


def test_a_diverging_iteration_says_so_with_its_step_size() -> None:
    for solver in (bl.FixedPointIteration(step_size=1.0, max_steps=50), bl.Neumann(step_size=1.0)):
        solution = solve(solver, spd(40, 5), normal(41, 5))
        assert solution.verdict.status is Status.LINEAR_DIVERGED
        assert "step_size=1" in str(solution.verdict)
        assert "use a smaller `step_size`" in str(solution.verdict)


def test_a_tolerance_given_to_the_call_replaces_the_solvers_own() -> None:
    matrix, b = spd(42, 20), normal(43, 20)
    loose = solve(bl.CG(tol=1e-12), matrix, b, tol=1e-2)
    assert 1e-12 < loose.residual <= 1e-2
    assert loose.steps < solve(replace(bl.CG(), tol=1e-12), matrix, b).steps


@every_solver
def test_float32_systems_stay_in_float32(solver: bl.LinearSolver) -> None:
    relaxed = replace(solver, tol=1e-5) if "tol" in inspect.signature(type(solver)).parameters else solver
    matrix, b = spd(44, 6).float(), normal(45, 6).float()
    solution = solve(relaxed, matrix, b)
    assert solution.x.dtype == torch.float32
    torch.testing.assert_close(
        solution.x.double(), torch.linalg.solve(matrix.double(), b.double()), rtol=1e-3, atol=1e-4
    )


@pytest.mark.gpu
@needs_cuda
@every_solver
def test_it_solves_on_the_gpu_as_on_the_cpu(solver: bl.LinearSolver) -> None:
    matrix, b = spd(46, 30), normal(47, 30)
    x = solve(solver, matrix.cuda(), b.cuda()).x
    assert x.is_cuda
    torch.testing.assert_close(x.cpu(), torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)
