"""Paths of elastic nets on a Gram matrix."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import enet_path

from bilevel.numerics.elastic_net import elastic_path, solve_gram


@pytest.mark.parametrize("l1_ratio", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(80, 30), (25, 40)])
def test_a_path_is_that_of_scikit_learn(shape: tuple[int, int], l1_ratio: float) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal(shape)
    y = X[:, :5] @ np.array([2.0, -1.0, 1.0, 0.5, -3.0]) + rng.standard_normal(len(X))
    gram, moment = X.T @ X / len(X), X.T @ y / len(X)
    alphas = abs(moment).max() / l1_ratio * np.geomspace(1.0, 0.02, 12)
    _, expected, _ = enet_path(X, y, l1_ratio=l1_ratio, alphas=alphas, tol=1e-13, max_iter=200_000)
    np.testing.assert_allclose(elastic_path(gram, moment, alphas, l1_ratio), expected.T, rtol=0, atol=1e-8)


def test_weights_scale_columns_and_the_order_of_penalties_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    X, weights = rng.standard_normal((50, 8)), rng.uniform(0.5, 2.0, 8)
    y = X[:, 0] - X[:, 1] + rng.standard_normal(50)
    gram, moment = X.T @ X / 50, X.T @ y / 50
    alphas = np.array([0.02, 0.5, 0.1])
    path = elastic_path(gram, moment, alphas, 1.0, weights)
    scaled = X / weights
    _, expected, _ = enet_path(scaled, y, l1_ratio=1.0, alphas=np.sort(alphas)[::-1], tol=1e-13, max_iter=100_000)
    np.testing.assert_allclose(path[[1, 2, 0]], (expected / weights[:, None]).T, rtol=0, atol=1e-9)


def test_repeated_and_constant_columns_leave_the_conditions_met() -> None:
    rng = np.random.default_rng(2)
    X = rng.standard_normal((40, 6))
    X[:, 3], X[:, 4] = X[:, 0], 0.0
    y = X[:, 0] + rng.standard_normal(40)
    gram, moment = X.T @ X / 40, X.T @ y / 40
    l1 = np.full(6, 0.05)
    w = solve_gram(gram, moment, l1, np.zeros(6), np.zeros(6))
    correlation = moment - gram @ w
    assert (abs(correlation) <= l1 + 1e-9).all()
    np.testing.assert_allclose(correlation[w != 0], (l1 * np.sign(w))[w != 0], rtol=0, atol=1e-9)
    assert w[4] == 0
