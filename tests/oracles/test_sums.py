"""A reverse sweep that sums its cross products together against one that takes them one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import PROBLEMS, SOLVERS, flat, logistic_case, normal, regression_data, ridge_case, tree_case

import bilevel as bl
from bilevel.inner import LinearMultistep
from bilevel.oracles.vjp_sum import CHUNK, BilinearSum, ProductSum
from bilevel.problems import RidgeProblem

CASES = {cls.__name__: make for cls, make in PROBLEMS.items()} | {
    "ridge, one penalty": lambda: ridge_case("scalar"),
    "logistic, one penalty": lambda: logistic_case("scalar"),
    "a tree": lambda: tree_case("dict", "dict"),
}
MULTISTEP = {cls.__name__: row for cls, row in SOLVERS.items() if issubclass(cls, LinearMultistep)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_sweep_equals_one_step_at_a_time_in_value_and_count(case, solver) -> None:
    made = CASES[case]()
    method = MULTISTEP[solver].make(made.problem, steps=6)
    found = []
    for sweep in (type(method).sweep_vjp, bl.InnerSolver.sweep_vjp):
        inner = made.problem.bind(made.hparams)
        state, states = method.init(inner, made.start), []
        for _ in range(6):
            states.append(state)
            state = method.step(inner, state)
        cotangent = bl.tree.tree_map(lambda leaf: normal(31, 1, *leaf.shape)[0], state.variables)
        found.append((flat(sweep(method, inner, states, cotangent)), dict(inner.counts)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-13)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("case", ["QuadraticProblem", "RidgeProblem", "LogisticProblem", "SoftmaxProblem"])
def test_more_points_than_are_stacked_at_once_are_summed_all(case) -> None:
    made = CASES[case]()
    inner = made.problem.bind(made.hparams)
    fast, slow = inner.product_sum(), ProductSum(inner.hparams)
    assert isinstance(fast, BilinearSum)
    shape = made.problem.params.shape
    points = normal(32, CHUNK + 3, *shape)
    vectors = normal(33, CHUNK + 3, *shape)
    for point, vector in zip(points, vectors, strict=True):
        torch.testing.assert_close(
            fast.pull(inner.vjp_at, point, vector), slow.pull(inner.vjp_at, point, vector), rtol=1e-12, atol=1e-13
        )
    torch.testing.assert_close(fast.total(), slow.total(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(fast.total(), slow.total(), rtol=1e-11, atol=1e-11)  # asking twice adds nothing
    assert inner.counts["vjp"] == 2 * (CHUNK + 3)


def test_a_sweep_over_no_steps_is_zero() -> None:
    made = ridge_case()
    inner = made.problem.bind(made.hparams)
    cotangent = (normal(34, 5), ())
    moved, total = bl.GradientDescent(0.1).sweep_vjp(inner, [], cotangent)
    assert torch.equal(moved[0], cotangent[0])
    assert not total.any()


@pytest.mark.parametrize("rows", [3, 40])
def test_ridge_on_x_and_on_the_gram_matrix_equals_autograd(rows) -> None:
    X, y, X_val, y_val = regression_data(rows)
    for penalty in ("scalar", "per_feature"):
        problem = RidgeProblem(X, y, X_val, y_val, penalty)
        assert problem.on_gram == (rows >= 5)
        plain = bl.BilevelProblem(problem.inner_loss, problem.outer_loss, problem.params)
        u, solver = problem.initial_hparams(-1.0), replace(bl.Nesterov(0.05, 0.5), steps=30)
        a, b = (bl.hypergradient(each, solver, bl.FullUnroll(), u, normal(35, 5)) for each in (problem, plain))
        torch.testing.assert_close(a.hypergradient, b.hypergradient, rtol=1e-11, atol=1e-13)
        assert a.outer_loss == pytest.approx(b.outer_loss, rel=1e-13)
        assert a.cost.counts == b.cost.counts
