"""The quasi-Newton solver, the curvature that problems keep for it, and what both save."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from helpers import F64, normal, spd, tree_case
from problem_cases import KEEPING, close, data, draw, logistic, over
from scipy.optimize import minimize

import bilevel as bl
from bilevel.base import InnerState
from bilevel.core import tree
from bilevel.engine.loop import run_inner
from bilevel.inner.quasi_newton import _with as kept_pairs
from bilevel.problems import LogisticProblem, SampleWeightProblem

OWN = {"pairs": 11}
"""An option with which the solver takes its own steps, for which dense Newton steps stand otherwise."""
CG = bl.CG(tol=1e-11)


def solve(problem: Any, solver: bl.InnerSolver, u: Any, start: Any = None) -> Any:
    inner = problem.bind(u)
    return run_inner(inner, solver, solver.init(inner, problem.start(start)))


def test_a_pair_without_positive_curvature_is_not_kept():
    x, step, raveler = normal(1, 3), normal(2, 3), tree.Raveler(normal(1, 3))
    for curvature, cache in ((2.0, 1), (0.0, 0), (-2.0, 0)):
        gradient = curvature * step
        pairs = kept_pairs((), x + step, x, gradient, torch.zeros(3, dtype=F64), raveler)
        assert len(pairs) == cache
        for s, y, inverse in pairs:
            # Scaled to a step of length one, which leaves the metric that they stand for.
            torch.testing.assert_close(s, step / step.norm())
            torch.testing.assert_close(y, gradient / step.norm())
            assert float(inverse) == pytest.approx(float(step @ step) / float(step @ gradient))


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


def test_curvature_that_has_become_wrong_is_measured_again_where_steps_are_slow():
    # Kept from large penalties, where the weights and so the curvature's weights are other ones.
    X = 4.0 * normal(1, 200, 30)
    y = (X @ normal(2, 30) + 4.0 * normal(3, 200) > 0).long()
    problem = LogisticProblem(X[:150], y[:150], X[150:], y[150:], "per_feature")
    u, estimator = problem.initial_hparams(3.0), bl.Implicit(bl.CG(tol=1e-8))
    counts = []
    for refresh in (0.25, 1e9):
        solver = bl.QuasiNewton(tol=1e-8, refresh=refresh, **OWN)
        carry = bl.hypergradient(problem, solver, estimator, u).carry
        counts.append(bl.hypergradient(problem, solver, estimator, u - 8.0, carry=carry).cost.counts)
    assert counts[0].get("curvature", 0) > 0 == counts[1].get("curvature", 0)
    assert counts[0]["gradient"] < 0.2 * counts[1]["gradient"]


@over(KEEPING)
@pytest.mark.parametrize("level", [-12.0, -4.0, 3.0])
def test_it_agrees_with_newton_on_every_structured_problem(factory, level):
    problem = factory()
    u = problem.initial_hparams(level)
    start = draw(problem).x
    ours = bl.hypergradient(problem, bl.QuasiNewton(tol=1e-10, **OWN), bl.Implicit(CG), u, start)
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
            (bl.QuasiNewton(tol=1e-11, **OWN), bl.Implicit(CG)),
            (bl.Newton(tol=1e-12), bl.Implicit(bl.Direct())),
        )
    ]
    torch.testing.assert_close(runs[0].hparams, runs[1].hparams, rtol=0, atol=1e-6)


def test_kept_curvature_saves_gradients_and_products_and_is_measured_rarely():
    problem = LogisticProblem(**data(2, rows=300, features=40), penalty="per_feature")
    u = problem.initial_hparams(-6.0)
    spent = {}
    for name, warm in (("kept", True), ("cold", False)):
        outer = bl.OuterOptimizer(
            problem, bl.QuasiNewton(tol=1e-8, **OWN), bl.Implicit(bl.CG(tol=1e-8)), u, warm_start=warm
        )
        counts = [outer.step().cost.counts for _ in range(10)]
        spent[name] = {kind: sum(c.get(kind, 0) for c in counts[1:]) for kind in ("gradient", "curvature")}
    assert spent["kept"]["curvature"] <= 2 < 9 <= spent["cold"]["curvature"]
    assert spent["kept"]["gradient"] < spent["cold"]["gradient"]


@over(KEEPING)
def test_a_resumed_run_continues_bit_for_bit_with_its_curvature(factory):
    problem = factory()

    def fresh() -> bl.OuterOptimizer:
        return bl.OuterOptimizer(
            problem, bl.QuasiNewton(tol=1e-9, **OWN), bl.Implicit(CG), problem.initial_hparams(-2.0), None
        )

    whole, first, second = fresh(), fresh(), fresh()
    whole.run(8, progress=False)
    first.run(4, progress=False)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.carry.state is not None
    assert second.carry.state.cache is not None
    assert second.carry.state.point is None
    second.run(4, progress=False)
    assert torch.equal(whole.hparams, second.hparams)
    assert [record.outer_loss for record in whole.history] == [record.outer_loss for record in second.history]


def test_a_carry_of_another_problem_brings_its_iterate_and_curvature_but_not_its_data():
    one, two = logistic(), LogisticProblem(**{key: value.flip(0) for key, value in data(2).items()})
    u = one.initial_hparams(-1.0)
    carry = bl.hypergradient(one, bl.QuasiNewton(tol=1e-10, **OWN), bl.Implicit(CG), u).carry
    there = bl.hypergradient(two, bl.QuasiNewton(tol=1e-10, **OWN), bl.Implicit(CG), u, carry=carry)
    alone = bl.hypergradient(two, bl.QuasiNewton(tol=1e-10, **OWN), bl.Implicit(CG), u)
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
    outer = bl.OuterOptimizer(problem, bl.QuasiNewton(**OWN), bl.Implicit(), problem.initial_hparams(-1.0))
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
    with pytest.raises(
        ValueError, match=r"QuasiNewton needs an inner loss, .*: use Newton\(\) or FixedPoint\(update\)"
    ):
        solve(point, bl.QuasiNewton(), torch.ones(2, dtype=F64))


@pytest.mark.parametrize(
    "estimator",
    [bl.FullUnroll(), bl.TruncatedUnroll(tail=2), bl.FullUnroll(mode="forward"), bl.FullUnroll(memory="graph")],
)
def test_unrolling_it_is_refused_before_a_step_is_taken(estimator, monkeypatch):
    case, solver = tree_case(), bl.QuasiNewton(steps=3)
    words = "the steps of QuasiNewton are not differentiated: use Implicit"
    inner = case.problem.bind(case.hparams)
    state = solver.init(inner, case.start)
    with pytest.raises(ValueError, match=words):
        solver.step_vjp(inner, state, state.variables)
    with pytest.raises(ValueError, match=words):
        solver.step_jvp(inner, state, [state.variables], [case.hparams])
    monkeypatch.setattr(bl.QuasiNewton, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=words):
        bl.hypergradient(case.problem, solver, estimator, case.hparams)


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
    assert (state.cache, state.point) == (None, None)


# Weights of the rows --------------------------------------------------------------------------------------------------


def test_wrong_labels_get_smaller_weights():
    X = normal(31, 90, 5)
    right = (X @ normal(32, 5, 3)).argmax(1)
    wrong = torch.arange(90) < 30
    labels = torch.where(wrong, (right + 1) % 3, right)
    X_val = normal(33, 60, 5)
    problem = SampleWeightProblem(X, labels, X_val, (X_val @ normal(32, 5, 3)).argmax(1), penalty=0.01)
    outer = bl.OuterOptimizer(problem, bl.QuasiNewton(tol=1e-8, **OWN), bl.Implicit(), problem.initial_hparams())
    result = outer.run(12, progress=False)
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
