"""A proof that no single penalty of a range is better, beside dense grids."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
from selection_cases import ridge, table

from bilevel.criteria import ApproximateLeaveOneOut, KFold, LinearData, Penalties, RidgeFolds, RidgeLeaveOneOut
from bilevel.problems.losses import Logistic, Squared
from bilevel.selection import certify_range, make_folds
from bilevel.selection.certified import _bound, _expansion, _folds, _leave_one_out


def criterion_of(kind: str, rows: int, features: int) -> Any:
    X, y = table(rows, features, seed=features)
    weights = np.random.default_rng(1).random(rows) + 0.3
    data, one = LinearData.of(X, y, weights), Penalties.scalar(features)
    if kind == "loo":
        return RidgeLeaveOneOut(data, one)
    folds = make_folds(rows, 4)
    return RidgeFolds(data, one, folds) if kind == "folds" else KFold(data, Squared(), one, folds)


CASES = [("loo", 40, 5), ("loo", 16, 24), ("folds", 40, 5), ("folds", 24, 30), ("kfold", 40, 5)]


@pytest.mark.parametrize(("kind", "rows", "features"), CASES)
def test_no_penalty_of_an_interval_is_below_its_bound(kind: str, rows: int, features: int) -> None:
    criterion = criterion_of(kind, rows, features)
    parts = _leave_one_out(criterion.data) if kind == "loo" else _folds(criterion)
    rng, tight = np.random.default_rng(0), 0
    for _ in range(60):
        u, r = rng.uniform(-8, 12), 10 ** rng.uniform(-2, 0.3)
        value, bound = _bound(parts, u, r)
        inside = [each.value for each in criterion.scan(np.linspace(u + r, u - r, 7)[:, None])]
        assert value == pytest.approx(criterion.evaluate(np.array([u]), second=False).value, rel=1e-8)
        assert bound <= min(inside) * (1 + 1e-9)
        tight += bound > min(inside) - 0.01 * abs(value)
    assert tight > 15


def left_out(data: LinearData, row: int) -> Any:
    """Return the error of a row under the refit without it, as a function of the log penalty, in 40 digits."""
    X, y, s = (each.tolist() for each in (data.X, data.y, data.weights))
    others = [each for each in range(len(y)) if each != row]
    X1 = mpmath.matrix([[*line, 1.0] for line in X])
    size = X1.cols
    gram, moment = mpmath.matrix(size), mpmath.matrix(size, 1)
    for each in others:
        gram += s[each] * (X1[each, :].T * X1[each, :])
        moment += s[each] * y[each] * X1[each, :].T

    def error(u: Any) -> Any:
        H = gram.copy()
        for j in range(size - 1):
            H[j, j] += mpmath.exp(u)
        return y[row] - (X1[row, :] * mpmath.lu_solve(H, moment))[0]

    return error


@pytest.mark.parametrize(("features", "u"), [(2, 1.0), (6, -4.0), (6, 4.0)])
def test_errors_and_their_derivatives_are_those_of_refits_in_many_digits(features: int, u: float) -> None:
    data, r = criterion_of("loo", 5, features).data, 0.5
    (parts,) = _leave_one_out(data)
    e, e1, e2, most = _expansion(parts, u, r)
    with mpmath.workdps(40):
        for row in range(5):
            error = left_out(data, row)
            assert e[row] == pytest.approx(float(error(u)), rel=1e-9)
            assert e1[row] == pytest.approx(float(mpmath.diff(error, u)), rel=1e-7, abs=1e-12)
            assert e2[row] == pytest.approx(float(mpmath.diff(error, u, 2)), rel=1e-7, abs=1e-12)
            for side, ends in zip(most, ((u - r, u), (u, u + r)), strict=True):
                assert all(abs(mpmath.diff(error, at, 3)) <= side[row] * (1 + 1e-9) for at in ends)


@pytest.mark.parametrize(("kind", "rows", "features"), CASES[:4])
def test_a_dense_grid_is_never_below_a_certificate(kind: str, rows: int, features: int) -> None:
    criterion = criterion_of(kind, rows, features)
    certificate = certify_range(criterion, eps=1e-5)
    assert certificate.holds
    grid = np.linspace(np.log(1e8), np.log(1e-8), 400)[:, None]
    # Where rounding takes gradients of wide rows, `evaluate` counts values as infinite.
    values = np.array([criterion.compute(u, second=False).value for u in grid])
    assert certificate.lower <= values.min() * (1 + 1e-9)
    assert certificate.value <= values.min() * (1 + 1e-5)
    assert certificate.evaluations <= 60


def test_a_range_without_the_best_penalty_is_certified_at_its_end() -> None:
    certificate = certify_range(ridge(40, 5), 1e3, 1e6, 1e-3)
    assert certificate.penalty == pytest.approx(1e3)
    assert certificate.holds


def test_what_cannot_be_certified_is_refused() -> None:
    X, y = table(20, 3)
    data = LinearData.of(X, (y > 0).astype(int), loss=Logistic())
    with pytest.raises(ValueError, match="takes leave-one-out or K-fold of ridge regression with one target"):
        certify_range(ApproximateLeaveOneOut(data, Logistic(), Penalties.scalar(3)))
    with pytest.raises(ValueError, match=r"must be 0 < low < high, got 1 and 0\.5"):
        certify_range(ridge(20, 3), 1.0, 0.5)
