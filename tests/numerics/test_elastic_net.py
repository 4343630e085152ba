"""Elastic nets on a Gram matrix."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import enet_path

from bilevel.numerics.elastic_net import GramColumns, solution


@pytest.mark.parametrize("l1_ratio", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(80, 30), (25, 40)])
def test_solutions_along_a_path_are_those_of_scikit_learn(shape: tuple[int, int], l1_ratio: float) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal(shape)
    y = X[:, :5] @ np.array([2.0, -1.0, 1.0, 0.5, -3.0]) + rng.standard_normal(len(X))
    gram, moment = X.T @ X / len(X), X.T @ y / len(X)
    formed: list[int] = []

    def form(index):
        formed.extend(index)
        return gram[index]

    alphas = abs(moment).max() / l1_ratio * np.geomspace(1.0, 0.02, 12)
    _, expected, _ = enet_path(X, y, l1_ratio=l1_ratio, alphas=alphas, tol=1e-13, max_iter=200_000)
    w, columns = np.zeros(shape[1]), GramColumns(gram.diagonal(), form)
    for alpha, reference in zip(alphas, expected.T, strict=True):
        l1, l2 = np.full(shape[1], l1_ratio * alpha), np.full(shape[1], (1.0 - l1_ratio) * alpha)
        np.testing.assert_allclose(solution(columns, moment, l1, l2, w).w, reference, rtol=0, atol=1e-8)
        w = solution(gram, moment, l1, l2, w).w
        np.testing.assert_allclose(w, reference, rtol=0, atol=1e-8)
    assert len(formed) == len(set(formed)), "every column is formed once"


@pytest.mark.parametrize("positive", [False, True])
def test_repeated_and_constant_columns_leave_the_conditions_met(positive: bool) -> None:
    rng = np.random.default_rng(2)
    X = rng.standard_normal((40, 6))
    X[:, 3], X[:, 4] = X[:, 0], 0.0
    y = X[:, 0] - X[:, 1] + rng.standard_normal(40)
    gram, moment = X.T @ X / 40, X.T @ y / 40
    l1 = np.full(6, 0.05)
    w = solution(gram, moment, l1, np.zeros(6), np.zeros(6), positive).w
    correlation = moment - gram @ w
    assert ((correlation if positive else abs(correlation)) <= l1 + 1e-9).all()
    np.testing.assert_allclose(correlation[w != 0], (l1 * np.sign(w))[w != 0], rtol=0, atol=1e-9)
    assert w[4] == 0
    assert (w.min() == 0) if positive else (w.min() < 0)


def test_supports_larger_than_the_rank_shrink_to_it() -> None:
    # Coordinates that enter together may be more than the rows: the Gram matrix of the support is singular then.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X = rng.standard_normal((6, 10))
        X, y = X - X.mean(0), rng.integers(0, 3, 6) - 1.0
        gram, moment = X.T @ X / 6, X.T @ (y - y.mean()) / 6
        w = np.zeros(10)
        for alpha in abs(moment).max() * np.geomspace(1.0, 1e-3, 12):
            found = solution(gram, moment, np.full(10, alpha), np.zeros(10), w)
            w = found.w
            assert found.converged
            correlation = moment - gram @ w
            assert (abs(correlation) <= alpha + 1e-9).all()
            np.testing.assert_allclose(correlation[w != 0], alpha * np.sign(w[w != 0]), rtol=0, atol=1e-8)


def test_too_few_rounds_are_said() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 20))
    y = X @ rng.standard_normal(20)
    gram, moment, few = X.T @ X / 60, X.T @ y / 60, np.full(20, 0.01)
    found = solution(gram, moment, few, 0.0 * few, 0.0 * few, rounds=1)
    assert (found.rounds, found.converged) == (1, False)
    assert solution(gram, moment, few, 0.0 * few, 0.0 * few).rounds > 1


@pytest.mark.parametrize("sides", ["columns", "products"])
def test_the_factor_of_a_support_serves_for_those_near_by(sides: str) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((120, 80))
    X[:, 79] = X[:, 3]
    gram, l2, formed = X.T @ X, np.full(80, 0.3), []
    columns = GramColumns(
        gram.diagonal(),
        lambda index: formed.append(index) or gram[index],  # type: ignore[func-returns-value]
        None if sides == "columns" else lambda w: X.T @ (X @ w),
    )
    support, served = np.arange(0, 64), []
    for step in range(12):
        right = rng.standard_normal(len(support))
        found = columns.solve(support, l2, right)
        served.append(columns.bordered)
        block = gram[np.ix_(support, support)] + 0.3 * np.eye(len(support))
        np.testing.assert_allclose(found, np.linalg.solve(block, right), rtol=1e-9, atol=1e-12)
        w = rng.standard_normal(len(support))
        np.testing.assert_allclose(columns.product(support, w), gram[:, support] @ w, rtol=1e-9, atol=1e-9)
        away = rng.choice(support, 1 + step % 2, replace=False)
        come = rng.choice(np.setdiff1d(np.arange(80), support), 1 + step % 3, replace=False)
        support = np.sort(np.concatenate([np.setdiff1d(support, away), come]))
    assert served[0] is False
    assert sum(served) >= 6
    assert len(np.unique(np.concatenate(formed))) == sum(len(each) for each in formed)  # none twice
    # Of a column that is there already, the factor of no support says enough; nor does it with other penalties.
    columns = GramColumns(gram.diagonal(), lambda index: gram[index])
    columns.solve(np.arange(64), 0.0 * l2, np.ones(64))
    columns.solve(np.append(np.arange(64), 79), 0.0 * l2, np.ones(65))
    assert not columns.bordered
    columns.solve(np.arange(64), 0.0 * l2, np.ones(64), anew=True)
    columns.solve(np.arange(63), 0.0 * l2, np.ones(63))
    assert columns.bordered
    columns.solve(np.arange(63), l2, np.ones(63))
    assert not columns.bordered
