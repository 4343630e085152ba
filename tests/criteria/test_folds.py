"""Criteria of held-out folds, beside explicit refits of every fold and central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from criteria_cases import Array, differences, penalty_cases, refit, standardised
from sklearn.model_selection import KFold as Splitter

from bilevel.criteria import LinearData, Penalties, RidgeFolds
from bilevel.problems import Squared

RNG = np.random.default_rng(0)
ROWS, FEATURES = 36, 5
X = 3.0 * RNG.standard_normal((ROWS, FEATURES)) + 1.0
X[:, 2] = RNG.random(ROWS) < 0.4
WEIGHTS = RNG.random(ROWS) + 0.3
FOLDS = list(Splitter(4, shuffle=True, random_state=0).split(X))
HOLD_OUT = [(np.arange(5, 30), np.arange(4))]


def held_out(y: Array, loss: Any, a: Array, folds: Any, intercept: bool = True) -> tuple[float, Array]:
    """The criterion and the predictions by a refit of every fold, standardised by its own training rows."""
    predicted, weights, losses = [], [], []
    s = WEIGHTS / WEIGHTS.mean()
    for train, held in folds:
        mean, scale = (
            standardised(X[train], s[train]) if intercept else (0.0, np.sqrt(s[train] @ X[train] ** 2 / s[train].sum()))
        )
        w, b = refit((X[train] - mean) / scale, y[train], s[train], a, loss, intercept)
        z = (X[held] - mean) / scale @ w + b
        losses.append(loss.value(torch.from_numpy(z), torch.from_numpy(y[held])).numpy())
        predicted.append(z)
        weights.append(s[held])
    return float(np.average(np.concatenate(losses), weights=np.concatenate(weights))), np.concatenate(predicted)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("folds", [FOLDS, HOLD_OUT], ids=["folds", "hold-out"])
def test_ridge_from_fold_grams_is_that_of_refits(folds: Any, intercept: bool) -> None:
    y = RNG.standard_normal(ROWS) + 10.0 + X[:, 0]
    data = LinearData.of(X, y, WEIGHTS, intercept=intercept)
    for penalties in penalty_cases(FEATURES):
        criterion = RidgeFolds(data, penalties, folds)
        u = np.random.default_rng(1).standard_normal(penalties.size) + 1.0
        value, predicted = held_out(y, Squared(), penalties.spread(u).exp().numpy(), folds, intercept)
        evaluation = criterion.evaluate(u)
        assert evaluation.value == pytest.approx(value, rel=1e-11)
        np.testing.assert_allclose(evaluation.predictions, predicted, rtol=1e-11)
        assert evaluation.losses.mean() == pytest.approx(evaluation.value, rel=1e-13)
        for (fit, held), (_, rows) in zip(criterion.fits(evaluation), folds, strict=True):
            np.testing.assert_array_equal(held, rows)
            ours = evaluation.predictions[np.isin(criterion.held_out, rows)]
            torch.testing.assert_close(fit.predict(torch.from_numpy(X[rows])), ours)


@pytest.mark.parametrize("targets", [None, 3])
def test_derivatives_from_fold_grams_are_those_of_central_differences(targets: Any) -> None:
    y = RNG.standard_normal((ROWS,) if targets is None else (ROWS, targets))
    for penalties in penalty_cases(FEATURES, targets):
        criterion = RidgeFolds(LinearData.of(X, y, WEIGHTS), penalties, FOLDS)
        u = np.random.default_rng(2).standard_normal(penalties.size) + 2.0
        evaluation = criterion.evaluate(u)
        gradient, jacobian = differences(criterion, u)
        np.testing.assert_allclose(evaluation.gradient, gradient, atol=1e-9)
        J = jacobian.reshape(-1, penalties.size)
        model = J.T @ (J * evaluation.curvatures.reshape(-1, 1)) / ROWS
        np.testing.assert_allclose(evaluation.gauss_newton, model, atol=1e-8)
        np.testing.assert_allclose(J.T @ evaluation.slopes.reshape(-1) / ROWS, evaluation.gradient, atol=1e-9)


def test_ridge_folds_of_sparse_inputs_of_parts_and_of_repeated_rows() -> None:
    sparse, y = scipy.sparse.random(ROWS, 8, 0.5, format="csr", random_state=1), RNG.standard_normal(ROWS)
    penalties, u = Penalties.feature(8), np.linspace(-1.0, 2.0, 8)
    one, two = (RidgeFolds(LinearData.of(each, y), penalties, FOLDS) for each in (sparse, sparse.toarray()))
    assert one.evaluate(u).value == pytest.approx(two.evaluate(u).value, rel=1e-11)
    np.testing.assert_allclose(one.evaluate(u).gradient, two.evaluate(u).gradient, atol=1e-12)
    torch.testing.assert_close(one.refit(u).coef, two.refit(u).coef)

    train = FOLDS[0][0]
    part = two.take(torch.as_tensor(train))
    assert len(part.folds) == 3
    place = {int(row): index for index, row in enumerate(train)}
    inner = [([place[r] for r in tr if r in place], [place[r] for r in held]) for tr, held in FOLDS[1:]]
    direct = RidgeFolds(LinearData.of(sparse.toarray()[train], y[train]), penalties, inner)
    assert part.evaluate(u).value == pytest.approx(direct.evaluate(u).value, rel=1e-12)

    counts = RNG.integers(1, 4, ROWS)
    owner = np.repeat(np.arange(ROWS), counts)
    folds = [tuple(np.flatnonzero(np.isin(owner, rows)) for rows in pair) for pair in FOLDS]
    repeated = RidgeFolds(LinearData.of(sparse.toarray()[owner], y[owner]), penalties, folds)
    weighted = RidgeFolds(LinearData.of(sparse.toarray(), y, counts), penalties, FOLDS)
    value = repeated.evaluate(u + np.log(counts.mean())).value
    assert weighted.evaluate(u).value == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize(
    ("folds", "sentence"),
    [
        ([], "at least one pair"),
        ([([0, 1], [1, 2])], "fold 1 validates on rows that it trains on"),
        ([([0, 1], [])], "fold 1 has no validation rows with a weight"),
        ([([0, 99], [1])], "a fold names the row 99, but the data have 36 rows"),
    ],
)
def test_folds_that_are_none_are_refused_in_a_sentence(folds: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RidgeFolds(LinearData.of(X, X[:, 0]), Penalties.scalar(FEATURES), folds)
