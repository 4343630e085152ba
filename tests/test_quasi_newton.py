"""The quasi-Newton solver, the curvature that problems keep for it, and what both save."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import F64, normal, spd, tree_case
from problem_cases import PROBLEMS, close, data, draw, logistic, multinomial, over, ridge, weighted
from scipy.optimize import minimize

import bilevel as bl
from bilevel.base import InnerState, LinearSystem
from bilevel.hypergrad.loop import run_inner
from bilevel.problems import LogisticProblem, SampleWeightProblem, design
from bilevel.problems.design import Design
from bilevel.problems.precondition import factored

LINEAR = {name: factory for name, factory in PROBLEMS.items() if not name.startswith("quadratic")}
KEEPING = {
    "ridge": partial(ridge, 13, penalty="per_feature"),
    "logistic": partial(logistic, penalty="per_feature"),
    "softmax": partial(multinomial, penalty="per_weight"),
    "weighted": weighted,
}
CG = bl.CG(tol=1e-11)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the passes over training and validation data."""
    count = [0]
    sweep = Design.sweep

    def counted(self: Design, visit: Any) -> Any:
        count[0] += 1
        return sweep(self, visit)

    monkeypatch.setattr(Design, "sweep", counted)
    return count


def solve(problem: Any, solver: bl.InnerSolver, u: Any, start: Any = None) -> Any:
    inner = problem.bind(u)
    return run_inner(inner, solver, solver.init(inner, problem.start(start)))


# One pass for each linearisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logistic", "softmax", "weighted"])
def test_gradient_value_curvature_and_linearization_share_one_pass(name, passes):
    problem = KEEPING[name]()
    at = draw(problem)
    inner = problem.bind(at.u)
    inner.grad(at.x), inner.value(at.x), inner.linearize(at.x).curvature
    assert (passes[0], inner.counts["gradient"], inner.counts["value"]) == (1, 1, 0)
    inner.linearize(at.x).vjp(at.v)
    assert passes[0] == 2


@pytest.mark.parametrize("name", ["logistic", "softmax"])
def test_a_rebound_gradient_takes_no_pass_and_is_not_counted(name, passes):
    problem = KEEPING[name]()
    at = draw(problem)
    old = problem.bind(at.u)
    old.grad(at.x)
    new, fresh = problem.bind(at.u + 0.7), problem.bind(at.u + 0.7)
    expected = fresh.grad(at.x)
    before = passes[0]
    old.linearize(at.x).rebind(new)
    close(new.grad(at.x), expected)
    close(new.value(at.x), fresh.value(at.x))
    assert passes[0] == before
    assert new.counts["gradient"] == new.counts["value"] == 0


def test_other_weights_of_the_rows_take_half_a_pass_that_is_counted(passes):
    problem = weighted()
    at = draw(problem)
    old = problem.bind(at.u)
    old.grad(at.x)
    new = problem.bind(at.u + 0.7)
    expected = problem.bind(at.u + 0.7).grad(at.x)
    before = passes[0]
    problem.predict = None  # predictions are known
    old.linearize(at.x).rebind(new)
    close(new.grad(at.x), expected)
    assert (passes[0] - before, new.counts["gradient"]) == (1, 1)


@over(KEEPING)
def test_the_value_is_counted_where_it_takes_a_pass_only(factory):
    problem = factory()
    at = draw(problem)
    inner = problem.bind(at.u)
    close(inner.value(at.x), problem.inner_loss(at.x, at.u))
    assert inner.counts["value"] == 1
    close(inner.value(at.w), problem.inner_loss(at.w, at.u))
    assert inner.counts["value"] == 2


def test_a_general_problem_gives_the_value_of_its_last_gradient_for_nothing():
    case = tree_case("dict", "dict")
    inner = case.problem.bind(case.hparams)
    inner.grad(case.start)
    close(inner.value(case.start), case.problem.inner_loss(case.start, case.hparams))
    assert inner.counts["value"] == 0


# Blocks ---------------------------------------------------------------------------------------------------------------


@over(KEEPING)
@pytest.mark.parametrize("workers", [1, 3])
def test_oracles_in_blocks_equal_those_in_one_piece_for_any_number_of_workers(factory, workers, monkeypatch):
    whole = factory()
    monkeypatch.setenv("BILEVEL_WORKERS", str(workers))
    monkeypatch.setattr(design, "LARGE", 1)
    monkeypatch.setattr(design, "ROWS", 3)
    split = factory()
    assert len(split.design.blocks) == 5
    at = draw(whole)
    ours, theirs = (problem.bind(at.u).linearize(at.x) for problem in (split, whole))
    close(ours.vjp(at.v), theirs.vjp(at.v))
    close(ours.jvp(at.v, at.du), theirs.jvp(at.v, at.du))
    close(ours.cross(at.v), theirs.cross(at.v))
    close(ours.dense_hessian(), theirs.dense_hessian())
    close(split.bind(at.u).grad(at.x), whole.bind(at.u).grad(at.x))
    close(split.bind(at.u).value(at.x), whole.bind(at.u).value(at.x))
    close(split.outer_value_and_grads(at.x, at.u), whole.outer_value_and_grads(at.x, at.u))


def test_the_number_of_workers_changes_no_bit(monkeypatch):
    X = normal(1, 4100, 500)
    problem = LogisticProblem(X, (X[:, 0] > 0).long(), X, (X[:, 0] > 0).long())
    assert len(problem.design.blocks) == 2
    w, u = normal(2, 500), torch.tensor(-3.0, dtype=F64)
    results = []
    for workers in ("1", "2"):
        monkeypatch.setenv("BILEVEL_WORKERS", workers)
        inner = problem.bind(u)
        results.append((inner.grad(w), inner.linearize(w).hvp(w)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_what_a_worker_raises_reaches_the_caller(monkeypatch):
    monkeypatch.setenv("BILEVEL_WORKERS", "2")
    monkeypatch.setattr(design, "LARGE", 1)
    monkeypatch.setattr(design, "ROWS", 2)

    def fail(block: int, X: Any, rows: slice) -> Any:
        raise ValueError(f"block {block}")

    with pytest.raises(ValueError, match="block"):
        Design(torch.eye(6)).sweep(fail)


# Preconditioners ------------------------------------------------------------------------------------------------------


@over(LINEAR)
def test_the_preconditioner_is_the_inverse_hessian_in_float32_symmetric_and_positive(factory):
    problem = factory()
    at = draw(problem)
    point = problem.bind(at.u).linearize(at.x)
    inverse = point.preconditioner(lasting=True)
    size = at.x.numel()
    dense = torch.stack([inverse.apply(row) for row in torch.eye(size, dtype=F64)])
    torch.testing.assert_close(dense @ point.dense_hessian(), torch.eye(size, dtype=F64), rtol=0, atol=3e-4)
    torch.testing.assert_close(dense, dense.t(), rtol=1e-4, atol=1e-5 * float(dense.abs().max()))
    assert float(torch.linalg.eigvalsh((dense + dense.t()) / 2)[0]) > 0


@over(LINEAR)
def test_a_kept_preconditioner_takes_the_present_penalties(factory, passes):
    problem = factory()
    at = draw(problem)
    old, new = problem.bind(at.u), problem.bind(at.u + 1.0)
    kept = old.linearize(at.x).preconditioner(lasting=True).kept
    point = new.linearize(at.x)
    before = passes[0]
    inverse = point.preconditioner(kept)
    assert (passes[0], new.counts["curvature"], old.counts["curvature"]) == (before, 0, 1)
    if not isinstance(problem, SampleWeightProblem):
        v = at.v.reshape(-1)
        got = inverse.apply(point.dense_hessian() @ v)
        torch.testing.assert_close(got, v, rtol=1e-3, atol=1e-3)
    # Asked for again, it is the same one: it is factored once.
    assert point.preconditioner(inverse.kept) is inverse


def test_a_factor_is_used_again_while_penalties_move_little():
    gram, diagonal = spd(1, 5).float(), torch.ones(5)
    first = factored(gram, diagonal)
    assert factored(gram, 1.2 * diagonal, first.kept).kept is first.kept
    moved = factored(gram, 1.3 * diagonal, first.kept)
    assert moved.kept is not first.kept
    v = normal(2, 5)
    torch.testing.assert_close(moved.apply((gram + torch.diag(1.3 * diagonal)).double() @ v), v, rtol=1e-4, atol=1e-4)


def test_an_indefinite_matrix_is_shifted_or_given_up_never_wrong():
    nearly = torch.ones(3, 3)
    assert factored(nearly, torch.zeros(3)).apply is not None
    hopeless = factored(nearly, -torch.ones(3))
    assert hopeless.apply is None
    assert factored(nearly, torch.full((3,), float("nan"))).apply is None
    # What is kept of it is still of use at other penalties.
    again = factored(nearly, torch.ones(3), hopeless.kept)
    torch.testing.assert_close(again.apply(torch.ones(3)), torch.full((3,), 0.25), rtol=1e-5, atol=0)


def test_large_models_and_general_problems_have_no_preconditioner():
    case = tree_case()
    assert case.problem.bind(case.hparams).linearize(case.start).preconditioner(lasting=True).apply is None
    X = normal(3, 4, 2001)
    problem = LogisticProblem(X, torch.arange(4) % 2, X, torch.arange(4) % 2)
    point = problem.bind(problem.initial_hparams()).linearize(problem.params)
    assert point.preconditioner(lasting=True).apply is None
    # A first solve of softmax regression measures nothing.
    assert multinomial().bind(torch.zeros((), dtype=F64)).linearize(multinomial().params).preconditioner().apply is None


@pytest.mark.parametrize("every", [1, 5])
def test_preconditioned_cg_solves_the_same_system_in_fewer_steps(every):
    matrix = spd(4, 40, 10.0)
    scales = torch.logspace(-3, 3, 40, dtype=F64)
    matrix = scales[:, None] * matrix * scales
    b, x = scales * normal(5, 40), None
    inverse = torch.linalg.inv(scales[:, None] * (spd(4, 40, 10.0) + 0.1 * torch.eye(40, dtype=F64)) * scales)
    solver = bl.CG(tol=1e-6, check_every=every, max_steps=30)
    for x in (None, normal(6, 40) / scales):
        solution = solver.solve(lambda v: matrix @ v, b, x, precondition=lambda v: inverse @ v)
        assert solution.verdict.status.ok
        assert solution.residual == pytest.approx(float((b - matrix @ solution.x).norm() / b.norm()), rel=1e-6)
        assert not solver.solve(lambda v: matrix @ v, b, x).verdict.status.ok


def test_preconditioned_cg_still_notices_negative_curvature_and_zero_start_costs_no_product():
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
    solution = CG.solve(lambda v: matrix @ v, torch.tensor([1.0, 2.0], dtype=F64), precondition=lambda v: 0.5 * v)
    assert solution.verdict.status is bl.Status.NEGATIVE_CURVATURE
    assert LinearSystem(lambda v: v, torch.ones(2), None, 1e-6).precondition is None


# The solver -----------------------------------------------------------------------------------------------------------


def test_without_curvature_it_takes_the_steps_of_bfgs_written_with_dense_matrices():
    A, b = spd(7, 6, 30.0), normal(8, 6)
    problem = bl.BilevelProblem(
        lambda x, u: 0.5 * x @ A @ x - b @ x + u * x.cosh().log().sum(),
        lambda x, u: x @ x,
        torch.zeros(6, dtype=F64),
    )
    solver, inner = bl.QuasiNewton(steps=8), problem.bind(torch.tensor(0.5, dtype=F64))
    state = solver.init(inner, problem.params)
    eye = torch.eye(6, dtype=F64)
    for _ in range(8):
        g, pairs = inner.grad(state.params), state.memory
        H = eye
        if pairs:
            s, y, _ = pairs[-1]
            H = (s @ y) / (y @ y) * eye
        for s, y, _ in pairs:
            V = eye - torch.outer(y, s) / (s @ y)
            H = V.t() @ H @ V + torch.outer(s, s) / (s @ y)
        after = solver.step(inner, state)
        step = state.params - after.params
        t = float(step @ (H @ g) / ((H @ g) @ (H @ g)))
        torch.testing.assert_close(step, t * (H @ g), rtol=1e-9, atol=1e-12)
        assert t > 0
        assert problem.inner_loss(after.params, 0.5) < problem.inner_loss(state.params, 0.5)
        state = after


def rosenbrock(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return (u * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def flat_valley(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Convex, with curvature that vanishes in one direction and explodes along another."""
    return (x**4).sum() + u * (10 * x[0] + x[1]).exp() + 1e-3 * (x * x).sum()


def ill_conditioned(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return 0.5 * (torch.logspace(-4, 3, len(x), dtype=x.dtype) * x * x).sum() - u * x.sum()


@pytest.mark.parametrize(
    ("loss", "start", "u"),
    [
        (rosenbrock, [-1.2, 1.0, -0.5, 0.8], 100.0),
        (flat_valley, [3.0, -2.0, 5.0], 1.0),
        (ill_conditioned, [1.0] * 8, 1.0),
        (lambda x, u: (1 + u * x * x).sqrt().sum(), [40.0, -3.0], 1.0),
        (lambda x, u: torch.nn.functional.softplus(u * x).sum() + 1e-2 * (x * x).sum(), [100.0, -100.0], 3.0),
    ],
    ids=["rosenbrock", "flat valley", "condition 1e7", "square root", "softplus"],
)
def test_it_finds_the_minimum_of_losses_that_are_far_from_quadratic(loss, start, u):
    problem = bl.BilevelProblem(loss, lambda x, u: x.sum(), torch.tensor(start, dtype=F64))
    u = torch.tensor(u, dtype=F64)
    run = solve(problem, bl.QuasiNewton(tol=1e-7), u)
    assert run.verdict.status.ok, run.verdict

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        root = torch.tensor(x, requires_grad=True)
        value = loss(root, u)
        return float(value.detach()), torch.autograd.grad(value, root)[0].numpy()

    theirs = minimize(value_and_grad, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    assert float(problem.inner_loss(run.state.params, u)) <= theirs.fun + 1e-9 * (1 + abs(theirs.fun))


@over(KEEPING)
@pytest.mark.parametrize("level", [-12.0, -4.0, 3.0])
def test_it_agrees_with_newton_on_every_structured_problem(factory, level):
    problem = factory()
    u = problem.initial_hparams(level)
    start = draw(problem).x
    ours = bl.hypergradient(problem, bl.QuasiNewton(tol=1e-10), bl.Implicit(CG), u, start)
    theirs = bl.hypergradient(problem, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct()), u, start)
    assert ours.status.ok
    scale = 1e-10 * float(ours.params.abs().max())
    torch.testing.assert_close(ours.hypergradient, theirs.hypergradient, rtol=1e-6, atol=1e-8 + scale)


@over(KEEPING)
def test_a_warm_loop_follows_the_exact_hypergradients_with_stale_curvature(factory):
    problem = factory()
    u = problem.initial_hparams(-2.0)
    runs = [
        bl.OuterOptimizer(problem, solver, estimator, u).run(12, progress=False)
        for solver, estimator in (
            (bl.QuasiNewton(tol=1e-11), bl.Implicit(CG)),
            (bl.Newton(tol=1e-12), bl.Implicit(bl.Direct())),
        )
    ]
    torch.testing.assert_close(runs[0].hparams, runs[1].hparams, rtol=0, atol=1e-6)


def test_kept_curvature_saves_gradients_and_products_and_is_measured_rarely():
    problem = LogisticProblem(**data(2, rows=300, features=40), penalty="per_feature")
    u = problem.initial_hparams(-6.0)
    spent = {}
    for name, warm in (("kept", True), ("cold", False)):
        outer = bl.OuterOptimizer(problem, bl.QuasiNewton(tol=1e-8), bl.Implicit(bl.CG(tol=1e-8)), u, warm_start=warm)
        counts = [outer.step().cost.counts for _ in range(10)]
        spent[name] = {kind: sum(c.get(kind, 0) for c in counts[1:]) for kind in ("gradient", "curvature")}
    assert spent["kept"]["curvature"] <= 2 < 9 <= spent["cold"]["curvature"]
    assert spent["kept"]["gradient"] < spent["cold"]["gradient"]


@over(KEEPING)
def test_a_resumed_run_continues_bit_for_bit_with_its_curvature(factory):
    problem = factory()

    def fresh() -> bl.OuterOptimizer:
        return bl.OuterOptimizer(problem, bl.QuasiNewton(tol=1e-9), bl.Implicit(CG), problem.initial_hparams(-2.0))

    whole, first, second = fresh(), fresh(), fresh()
    whole.run(8, progress=False)
    first.run(4, progress=False)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.carry.state is not None
    assert second.carry.state.kept is not None
    assert second.carry.state.point is None
    second.run(4, progress=False)
    assert torch.equal(whole.hparams, second.hparams)
    assert [record.outer_loss for record in whole.history] == [record.outer_loss for record in second.history]


def test_a_carry_of_another_problem_brings_its_iterate_and_curvature_but_not_its_data():
    one, two = logistic(), LogisticProblem(**{key: value.flip(0) for key, value in data(2).items()})
    u = one.initial_hparams(-1.0)
    carry = bl.hypergradient(one, bl.QuasiNewton(tol=1e-10), bl.Implicit(CG), u).carry
    there = bl.hypergradient(two, bl.QuasiNewton(tol=1e-10), bl.Implicit(CG), u, carry=carry)
    alone = bl.hypergradient(two, bl.QuasiNewton(tol=1e-10), bl.Implicit(CG), u)
    torch.testing.assert_close(there.hypergradient, alone.hypergradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["logistic", "softmax", "weighted"])
def test_float32_problems_stay_float32_and_reach_their_tolerance(name):
    family, options = {
        "logistic": (LogisticProblem, {"penalty": "per_feature"}),
        "softmax": (bl.problems.SoftmaxProblem, {"penalty": "per_weight"}),
        "weighted": (SampleWeightProblem, {"penalty": 0.1}),
    }[name]
    splits = {key: value.float() if key[0] == "X" else value for key, value in data(2).items()}
    problem = family(**splits, **options)
    outer = bl.OuterOptimizer(problem, bl.QuasiNewton(), bl.Implicit(), problem.initial_hparams(-1.0))
    result = outer.run(4, progress=False)
    assert result.hparams.dtype == torch.float32
    assert all(record.status == "OK" for record in result.history)


def test_at_the_rounding_floor_it_stays_and_says_how_far_it_came():
    problem = logistic(penalty="per_feature")
    run = solve(problem, bl.QuasiNewton(tol=1e-30), problem.initial_hparams(-3.0))
    assert run.verdict.status is bl.Status.INNER_NOT_CONVERGED
    assert run.residual < 1e-14
    run = solve(problem, bl.QuasiNewton(steps=60), problem.initial_hparams(-3.0))
    assert (run.steps, run.verdict.status) == (60, bl.Status.OK)


def test_a_loss_without_a_minimum_and_an_optimality_map_get_their_sentence():
    down = bl.BilevelProblem(lambda x, u: u * x.sum(), lambda x, u: x.sum(), torch.zeros(2, dtype=F64))
    run = solve(down, bl.QuasiNewton(tol=1e-8), torch.tensor(1.0, dtype=F64))
    assert run.verdict.status is bl.Status.FAILED_STEP
    assert "QuasiNewton at step 1: the loss falls without end along a direction of slope -2" in str(run.verdict)
    point = bl.BilevelProblem.from_fixed_point(lambda x, u: 0.5 * x + u, lambda x, u: x.sum(), torch.zeros(2).double())
    with pytest.raises(ValueError, match=r"QuasiNewton needs an inner loss, .*: use FixedPoint\(update\)"):
        solve(point, bl.QuasiNewton(), torch.ones(2, dtype=F64))


@pytest.mark.parametrize("estimator", [bl.FullUnroll(), bl.TruncatedUnroll(tail=2), bl.FullUnroll(mode="forward")])
def test_unrolling_it_is_refused(estimator):
    case = tree_case()
    with pytest.raises(ValueError, match="the steps of QuasiNewton are not differentiated: use Implicit"):
        bl.hypergradient(case.problem, bl.QuasiNewton(steps=3), estimator, case.hparams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "`QuasiNewton.pairs` must be a positive int, got 0"),
        ({"refresh": -0.5}, "`QuasiNewton.refresh` must be a positive number, got -0.5"),
        ({"tol": 0.0}, "`QuasiNewton.tol` must be a positive number or None, got 0.0"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        bl.QuasiNewton(**options)


def test_a_state_has_nothing_kept_unless_a_solver_keeps_it():
    state = InnerState(torch.zeros(2))
    assert (state.kept, state.point) == (None, None)


# Weights of the rows --------------------------------------------------------------------------------------------------


def test_wrong_labels_get_smaller_weights():
    X = normal(31, 90, 5)
    right = (X @ normal(32, 5, 3)).argmax(1)
    wrong = torch.arange(90) < 30
    labels = torch.where(wrong, (right + 1) % 3, right)
    X_val = normal(33, 60, 5)
    problem = SampleWeightProblem(X, labels, X_val, (X_val @ normal(32, 5, 3)).argmax(1), penalty=0.01)
    outer = bl.OuterOptimizer(problem, bl.QuasiNewton(tol=1e-8), bl.Implicit(), problem.initial_hparams())
    result = outer.run(40, progress=False)
    weights = problem.weights(result.hparams)
    assert float(weights[wrong].mean()) < 0.3 < 0.6 < float(weights[~wrong].mean())
    assert result.history[-1].outer_loss < 0.8 * result.history[0].outer_loss


def test_a_weight_of_two_is_a_repeated_row_and_a_weight_of_zero_none():
    splits = data(3)
    index = torch.tensor([0, 1, 1, 2, 2, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    weights = torch.ones(13, dtype=F64)
    weights[1], weights[2], weights[3] = 2.0, 3.0, 0.0
    options = {"loss": "sum", "parametrization": "direct", "penalty": 0.3}
    once = SampleWeightProblem(**splits, **options)
    again = SampleWeightProblem(
        **(splits | {"X_train": splits["X_train"][index], "y_train": splits["y_train"][index]}), **options
    )
    at = draw(once)
    ones = torch.ones(len(index), dtype=F64)
    close(once.bind(weights).grad(at.x), again.bind(ones).grad(at.x))
    close(once.bind(weights).linearize(at.x).hvp(at.v), again.bind(ones).linearize(at.x).hvp(at.v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0.0}, "`SampleWeightProblem.penalty` must be a positive number, got 0.0"),
        ({"penalty": "scalar"}, "`SampleWeightProblem.penalty` must be a positive number, got 'scalar'"),
        ({"parametrization": "log"}, "`SampleWeightProblem.parametrization` must be 'sigmoid' or 'direct', got 'log'"),
        ({"loss": "median"}, "`SampleWeightProblem.loss` must be 'mean' or 'sum', got 'median'"),
    ],
)
def test_options_of_the_weighted_problem_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        SampleWeightProblem(**data(3), **options)


def test_points_that_do_not_fit_the_weighted_problem():
    problem = SampleWeightProblem(**data(3), parametrization="direct")
    problem.check(problem.params, problem.initial_hparams())
    with pytest.raises(ValueError, match=r"`hparams` of SampleWeightProblem.* of shape \(13,\), got \(4,\)"):
        problem.check(problem.params, torch.zeros(4, dtype=F64))
    with pytest.raises(ValueError, match=r"a weight is negative \(-0.25\): declare a positive constraint, or use"):
        problem.check(problem.params, problem.initial_hparams(-0.25))
