"""Honest losses: what a fold holds out, nobody sees; and the second level of leave-one-out beside the tuning anew."""

from __future__ import annotations

from typing import Any

import joblib
import numpy as np
import pytest
from scipy.optimize import minimize
from selection_cases import ridge, table

from bilevel.criteria import LinearData, Penalties, RidgeLeaveOneOut
from bilevel.selection import Hyperprior, make_folds, nested, path, penalty_cv, second_level, tune
from bilevel.selection.honest import has_risen, predictions

TAUS = (0.3, 0.03)


class Leaks(RidgeLeaveOneOut):
    """A criterion whose folds keep a row that they hold out."""

    def take(self, rows: Any) -> Any:
        missing = np.setdiff1d(np.arange(self.data.rows), rows)
        return super().take(np.append(rows, missing[:1]))


def blind(kind: type[RidgeLeaveOneOut]) -> bool:
    """Return whether the predictions for the rows held out by each fold are the same with other targets there."""
    X, y = table(30, 4)
    folds = make_folds(30, 2)
    before = nested(kind(LinearData.of(X, y), Penalties.feature(4)), folds, TAUS, anchored=False).losses
    same = []
    for _, held in folds:
        moved = y.copy()
        moved[held] += 2.0
        after = nested(kind(LinearData.of(X, moved), Penalties.feature(4)), folds, TAUS, anchored=False).losses
        # (z - y - 2)^2 / 2 - (z - y)^2 / 2 = 2 - 2 (z - y), for the same prediction z.
        error = 1.0 - (after[:2] - before[:2])[:, held] / 2.0
        same.append(np.allclose(0.5 * error**2, before[:2, held], rtol=1e-9, atol=1e-9))
    return all(same)


def test_folds_never_see_the_rows_that_they_hold_out() -> None:
    assert blind(RidgeLeaveOneOut)
    assert not blind(Leaks)


def test_nested_losses_are_those_of_the_path_of_each_fold() -> None:
    criterion = ridge(40, 5)
    folds = make_folds(40, 4)
    found = nested(criterion, folds, TAUS, anchored=False)
    assert found.losses.shape == (3, 40)
    assert found.rows.tolist() == list(range(40))
    train, held = folds[1]
    part = RidgeLeaveOneOut(criterion.data.take(train), criterion.penalties)
    points = path(part, TAUS)
    fit = part.refit(points[2].u)
    X, y = table(40, 5)
    error = X[held] @ fit.coef.numpy() + float(fit.intercept) - y[held]
    np.testing.assert_allclose(found.losses[2, held], 0.5 * error**2)
    assert found.evaluations >= 4 * 12


def test_rows_held_out_twice_count_once_and_others_not_at_all() -> None:
    criterion = ridge(30, 3)
    train, held = np.arange(20), np.arange(20, 30)
    once, twice = (nested(criterion, [(train, held)] * n, TAUS, anchored=False) for n in (1, 2))
    assert once.rows.tolist() == held.tolist()
    np.testing.assert_allclose(once.losses, twice.losses)


def test_weights_make_the_mean_and_workers_change_nothing() -> None:
    X, y = table(40, 4)
    weights = np.random.default_rng(3).random(40) + 0.1
    weighted = RidgeLeaveOneOut(LinearData.of(X, y, weights), Penalties.feature(4))
    found = nested(weighted, make_folds(40, 4), TAUS, anchored=False)
    fits = [weighted.take(train).refit(path(weighted.take(train), TAUS)[0].u) for train, _ in make_folds(40, 4)]
    total = 0.0
    for fit, (_, held) in zip(fits, make_folds(40, 4), strict=True):
        z = predictions(weighted.data, fit).numpy()
        np.testing.assert_allclose(z, X @ fit.coef.numpy() + float(fit.intercept))
        total += (weights[held] * 0.5 * (z[held] - y[held]) ** 2).sum()
    assert found.losses[0].mean() == pytest.approx(total / weights.sum(), rel=1e-6)


@pytest.mark.parametrize("part", [0, 1])
def test_a_fold_without_rows_is_refused(part: int) -> None:
    fold: list[Any] = [np.arange(20), np.arange(20, 30)]
    fold[part] = np.arange(0)
    with pytest.raises(ValueError, match=r"fold 2 has no (training|held-out) rows"):
        nested(ridge(30, 3), [(np.arange(10), np.arange(10, 30)), tuple(fold)], TAUS, anchored=False)


def test_folds_follow_the_path_until_their_loss_has_clearly_risen() -> None:
    X, _ = table(50, 12)
    y = X @ np.ones(12) + 4.0 * np.random.default_rng(7).standard_normal(50)
    criterion = RidgeLeaveOneOut(LinearData.of(X, y), Penalties.feature(12))
    taus = (0.1, 0.01, 0.003, 0.001, 1e-4)
    found = nested(criterion, make_folds(50, 5), taus, anchored=False)
    nodes = len(found.losses)
    assert nodes < 6
    assert has_risen(list(found.losses))
    assert not any(has_risen(list(found.losses[:n])) for n in range(1, nodes))
    with joblib.parallel_config(backend="threading"):
        side_by_side = nested(criterion, make_folds(50, 5), taus, anchored=False, n_jobs=2)
    np.testing.assert_array_equal(side_by_side.losses, found.losses)
    assert side_by_side.evaluations == found.evaluations
    assert len(penalty_cv(criterion, taus=taus).nodes) == nodes


def without_its_term(criterion: RidgeLeaveOneOut, prior: Hyperprior, start: Any, row: int) -> float:
    """Return the leave-one-out loss of a row under penalties that were tuned with all other rows' losses."""
    rows = criterion.data.rows

    def objective(u: Any) -> tuple[float, Any]:
        found = criterion.evaluate(u)
        slopes = found.slopes.clone()
        slopes[row] = 0.0
        value = (found.losses.sum() - found.losses[row]) / rows + prior.value(u)
        return value, (found.jacobian.T @ slopes).numpy() / rows + prior.gradient(u)

    return float(criterion.evaluate(minimize(objective, start, jac=True, tol=1e-7).x).losses[row])


def test_the_second_level_is_the_tuning_without_a_row_to_first_order() -> None:
    criterion = ridge(30, 3, useful=1)
    scalar, point = path(criterion, (0.1,), tol=1e-10, steps=100, converge=True)
    found = second_level(criterion, [scalar, point])
    exact = np.array([without_its_term(criterion, point.prior, point.u, row) for row in range(30)])
    plain, honest = point.evaluation.losses, found.losses[1]
    # What is left after the correction is of second order: a tenth of what was corrected.
    assert np.abs(honest - exact).sum() < 0.15 * np.abs(plain - exact).sum()
    assert honest.mean() == pytest.approx(exact.mean(), rel=0.01)
    assert honest.mean() > plain.mean()


def test_the_second_level_is_near_refits_of_the_whole_tuning_and_no_less() -> None:
    criterion = ridge(30, 3, useful=1)
    _, point = path(criterion, (0.1,), tol=1e-8, steps=100, converge=True)
    losses = []
    for row in range(30):
        part = criterion.take(np.delete(np.arange(30), row))
        fit = part.refit(tune(part, point.u, point.prior, tol=1e-6).u)
        z = predictions(criterion.data, fit)
        losses.append(float(criterion.loss.value(z, criterion.data.y)[row]))
    found = second_level(criterion, [point]).losses[0]
    assert np.corrcoef(found, losses)[0, 1] > 0.99
    assert np.mean(losses) < found.mean() < 1.08 * np.mean(losses)


def test_folds_without_a_score_are_left_out_where_three_remain() -> None:
    criterion = ridge(40, 3)

    def score(fit: Any, rows: Any) -> float:
        return float("nan") if 0 in rows else -float(criterion.data.y[rows].square().mean())

    for count, kept in ((5, 4), (3, 3)):
        found = nested(criterion, make_folds(40, count), (0.1,), anchored=False, score=score)
        assert found.losses.shape[1] == len(found.rows) == kept
        assert np.isfinite(found.losses).all() == (kept == 4)
