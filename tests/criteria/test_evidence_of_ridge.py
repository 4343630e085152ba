"""The evidence of ridge regression, beside the likelihood of a multivariate normal."""

from __future__ import annotations

import numpy as np
import pytest
from criteria_cases import differences, penalty_cases

from bilevel.criteria import Evidence, LinearData, RidgeLeaveOneOut


@pytest.mark.parametrize(("rows", "features"), [(30, 5), (12, 18)])
def test_it_is_the_likelihood_of_a_normal_with_the_best_noise(rows: int, features: int) -> None:
    rng = np.random.default_rng(0)
    data = LinearData.of(rng.standard_normal((rows, features)), rng.standard_normal(rows), rng.random(rows) + 0.5)
    X, s = data.X.numpy(), data.weights.numpy()
    y = data.y.numpy() - s @ data.y.numpy() / rows
    for penalties in penalty_cases(features):
        criterion = Evidence(data, penalties)
        u = rng.standard_normal(penalties.size) + 1.0
        evaluation = criterion.evaluate(u)
        root, m = np.sqrt(s), rows - 1
        covariance = np.eye(rows) + (root[:, None] * X / penalties.spread(u).exp().numpy()) @ (root[:, None] * X).T
        best = (root * y) @ np.linalg.solve(covariance, root * y) / m
        expected = 0.5 * np.log(best) + np.linalg.slogdet(covariance)[1] / (2 * m)
        assert evaluation.value == pytest.approx(expected, rel=1e-10)
        gradient, _ = differences(criterion, u)
        np.testing.assert_allclose(evaluation.gradient, gradient, atol=1e-9)
        assert np.linalg.eigvalsh(evaluation.gauss_newton).min() > -1e-12
        assert evaluation.gauss_newton.shape == (penalties.size, penalties.size)
        fit, same = criterion.refit(u), RidgeLeaveOneOut(data, penalties).refit(u)
        np.testing.assert_allclose(fit.coef, same.coef, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(fit.intercept, same.intercept, rtol=1e-8)


def test_the_gauss_newton_matrix_is_the_fisher_information() -> None:
    rng = np.random.default_rng(1)
    X = LinearData.of(rng.standard_normal((20, 3)), np.zeros(20) + np.arange(20)).X.numpy()
    data = LinearData.of(X, rng.standard_normal(20), intercept=False)
    u = np.array([0.5, 1.0, 2.0])
    matrix = Evidence(data, penalty_cases(3)[1]).evaluate(u).gauss_newton
    Z = data.X.numpy()
    inverse = np.linalg.inv(np.eye(20) + (Z / np.exp(u)) @ Z.T)
    parts = [-np.outer(z, z) / a for z, a in zip(Z.T, np.exp(u), strict=True)]
    fisher = np.array([[0.5 * np.trace(inverse @ p @ inverse @ q) for q in parts] for p in parts]) / 20
    np.testing.assert_allclose(matrix, fisher, rtol=1e-10)


def test_rows_of_weight_zero_are_no_rows_and_no_row_is_named() -> None:
    rng = np.random.default_rng(2)
    X, y = rng.standard_normal((40, 3)), rng.standard_normal(40)
    y[5] = 50.0
    some = Evidence(LinearData.of(X[:10], y[:10]), penalty_cases(3)[1])
    every = Evidence(LinearData.of(X, y, np.repeat([1.0, 0.0], [10, 30])), some.penalties)
    for u in rng.standard_normal((2, some.penalties.size)):
        one, two = some.evaluate(u), every.evaluate(u + np.log(4.0))
        # Weights have mean 1: those of ten rows are 4, which is a constant.
        assert two.value == pytest.approx(one.value + 0.5 * np.log(4.0), rel=1e-10)
        np.testing.assert_allclose(two.gradient, one.gradient, rtol=1e-8)
        assert some.remark(one) == every.remark(two) == ""


def test_several_targets_are_refused() -> None:
    data = LinearData.of(np.eye(4), np.eye(4)[:, :2])
    with pytest.raises(ValueError, match="the evidence is of one target"):
        Evidence(data, penalty_cases(4, 2)[0])
