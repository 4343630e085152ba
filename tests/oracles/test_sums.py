"""Reverse sweeps of ridge regression: of no steps, and on X and the Gram matrix beside autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import normal, regression_data, ridge_case

import bilevel as bl
from bilevel.problems import RidgeProblem


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
