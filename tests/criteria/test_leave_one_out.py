"""Exact leave-one-out of ridge regression, beside refits without each row and central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from criteria_cases import differences, penalty_cases, refit

from bilevel.criteria import LinearData, Penalties, RidgeLeaveOneOut
from bilevel.problems import Squared


def made(rows: int, features: int, targets: int | None = None, **options: Any) -> LinearData:
    rng = np.random.default_rng(rows + features)
    X = 3.0 * rng.standard_normal((rows, features)) + 1.0
    y = rng.standard_normal((rows,) if targets is None else (rows, targets))
    weights = rng.random(rows) + 0.2
    weights[3] = 0.0
    return LinearData.of(X, y, weights, **options)


CASES = [
    (made(rows, features, targets), penalties)
    for rows, features, targets in ((30, 6, None), (16, 24, None), (20, 4, 3))
    for penalties in penalty_cases(features, targets)
]


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("rows", "features"), [(25, 6), (14, 20)])
def test_every_row_is_predicted_as_by_a_refit_without_it(rows: int, features: int, intercept: bool) -> None:
    data = made(rows, features, intercept=intercept)
    X, y, s = data.X.numpy(), data.y.numpy(), data.weights.numpy()
    for penalties in penalty_cases(features):
        u = np.random.default_rng(1).standard_normal(penalties.size) + 1.0
        evaluation = RidgeLeaveOneOut(data, penalties).evaluate(u)
        a, predicted = penalties.spread(u).exp().numpy(), np.zeros(rows)
        for row in range(rows):
            others = np.arange(rows) != row
            w, b = refit(X[others], y[others], s[others], a, Squared(), intercept)
            predicted[row] = X[row] @ w + b
        np.testing.assert_allclose(evaluation.predictions.numpy(), predicted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(evaluation.losses, 0.5 * s * (y - predicted) ** 2, rtol=1e-11, atol=1e-12)
        assert evaluation.value == pytest.approx(evaluation.losses.mean(), rel=1e-14)


@pytest.mark.parametrize(("data", "penalties"), CASES)
def test_derivatives_are_those_of_central_differences(data: LinearData, penalties: Penalties) -> None:
    criterion = RidgeLeaveOneOut(data, penalties)
    u = np.random.default_rng(2).standard_normal(penalties.size) + 2.0
    evaluation, first = criterion.evaluate(u), criterion.evaluate(u, second=False)
    gradient, jacobian = differences(criterion, u)
    np.testing.assert_allclose(evaluation.gradient, gradient, atol=1e-9)
    np.testing.assert_allclose(first.gradient, evaluation.gradient, atol=1e-14)
    torch.testing.assert_close(evaluation.jacobian, jacobian, rtol=0, atol=1e-8)
    J = evaluation.jacobian.reshape(-1, penalties.size)
    np.testing.assert_allclose(J.T @ evaluation.slopes.reshape(-1) / data.rows, evaluation.gradient, atol=1e-14)
    model = J.T @ (J * evaluation.curvatures.reshape(-1, 1)) / data.rows
    np.testing.assert_allclose(evaluation.gauss_newton, model, atol=1e-14)
    assert first.gauss_newton is None
    assert first.jacobian is None


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("features", [5, 40])
def test_the_eigenbasis_agrees_with_a_factorisation_and_a_scan_with_its_points(features: int, targets: Any) -> None:
    data = made(20, features, targets)
    criterion = RidgeLeaveOneOut(data, Penalties.scalar(features, targets))
    other = criterion.with_penalties(Penalties.feature(features, targets))
    grid = np.array([[6.0], [2.0], [-1.0]])
    for point, u in zip(criterion.scan(grid), grid, strict=True):
        one, many = criterion.evaluate(u), other.evaluate(np.full(features, u[0]))
        assert point.value == pytest.approx(one.value, rel=1e-13)
        assert one.value == pytest.approx(many.value, rel=1e-11)
        assert one.gradient[0] == pytest.approx(many.gradient.sum(), rel=1e-9)
        fit, same = criterion.refit(u), other.refit(np.full(features, u[0]))
        torch.testing.assert_close(fit.coef, same.coef, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fit.intercept, same.intercept, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("features", [6, 60])
def test_sparse_inputs_give_what_dense_ones_do(features: int) -> None:
    X = scipy.sparse.random(40, features, 0.3, format="csr", random_state=0)
    rng = np.random.default_rng(0)
    y, weights = rng.standard_normal(40), rng.random(40) + 0.1
    for penalties in penalty_cases(features):
        u = rng.standard_normal(penalties.size) + 1.0
        sparse, dense = (RidgeLeaveOneOut(LinearData.of(given, y, weights), penalties) for given in (X, X.toarray()))
        one, two = sparse.evaluate(u), dense.evaluate(u)
        assert one.value == pytest.approx(two.value, rel=1e-11)
        np.testing.assert_allclose(one.gradient, two.gradient, atol=1e-12)
        torch.testing.assert_close(sparse.refit(u).coef, dense.refit(u).coef, rtol=1e-10, atol=1e-12)


def test_the_fit_of_whole_weights_is_that_of_repeated_rows_and_order_and_units_do_not_matter() -> None:
    rng = np.random.default_rng(3)
    X, y, counts = rng.standard_normal((20, 4)), rng.standard_normal(20), rng.integers(1, 4, 20)
    penalties = Penalties.feature(4)
    u = rng.standard_normal(4)
    # Sums over more rows weigh more against the same penalty.
    weighted = RidgeLeaveOneOut(LinearData.of(X, y, counts), penalties).refit(u)
    repeated = LinearData.of(np.repeat(X, counts, 0), np.repeat(y, counts))
    fit = RidgeLeaveOneOut(repeated, penalties).refit(u + np.log(counts.mean()))
    torch.testing.assert_close(weighted.coef, fit.coef, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weighted.intercept, fit.intercept, rtol=1e-11, atol=1e-13)

    plain = RidgeLeaveOneOut(LinearData.of(X, y), penalties)
    turned = RidgeLeaveOneOut(LinearData.of(X[:, ::-1].copy(), y), penalties)
    scaled = RidgeLeaveOneOut(LinearData.of(X * [1.0, 10.0, 0.1, 5.0] + 7.0, 100.0 * y + 3.0), penalties)
    value = plain.evaluate(u)
    assert turned.evaluate(u[::-1]).value == pytest.approx(value.value, rel=1e-12)
    np.testing.assert_allclose(turned.evaluate(u[::-1]).gradient, value.gradient[::-1], rtol=1e-9)
    assert scaled.evaluate(u).value == pytest.approx(1e4 * value.value, rel=1e-11)
    assert scaled.unit(1e4 * value.value) == pytest.approx(1e4 * plain.unit(value.value), rel=1e-12)
    assert scaled.unit(0.0) == pytest.approx(1e4 * plain.unit(0.0), rel=1e-12)
    assert plain.unit(value.value) == value.value > 1e3 * plain.unit(0.0) > 0


def test_a_row_that_makes_most_of_the_criterion_is_named() -> None:
    rng = np.random.default_rng(4)
    X, y = rng.standard_normal((30, 3)), rng.standard_normal(30)
    y[11] = 60.0
    criterion = RidgeLeaveOneOut(LinearData.of(X, y), Penalties.scalar(3))
    assert criterion.remark(criterion.evaluate(np.zeros(1))).startswith("row 11 (counted from 0) alone makes 87%")
    calm = criterion.take([row for row in range(30) if row != 11])
    assert calm.remark(calm.evaluate(np.zeros(1))) == ""
