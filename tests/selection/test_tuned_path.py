"""The descent of a criterion, the hyperprior, the best single penalty, and the path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from selection_cases import ridge, table

from bilevel.criteria import KFold, LinearData, Penalties, RidgeFolds, RidgeLeaveOneOut, newton_cg
from bilevel.problems import Softmax, Squared
from bilevel.selection import Hyperprior, best_penalty, make_folds, path, tune
from bilevel.selection.descend import _curvature, _FewRows, _Matrix, box
from bilevel.selection.selected import remarks_of


@pytest.mark.parametrize("anchor", [None, 0.7])
def test_the_derivatives_of_the_hyperprior(anchor: float | None) -> None:
    shares = np.array([0.5, 0.3, 0.2])
    prior, u, h = Hyperprior(0.4, shares, anchor), np.array([1.0, -2.0, 0.5]), 1e-5
    centre = shares @ u if anchor is None else anchor
    assert prior.value(u) == pytest.approx(
        0.4 * sum(c * (each - centre) ** 2 for c, each in zip(shares, u, strict=True))
    )
    for j, unit in enumerate(np.eye(3)):
        slope = (prior.value(u + h * unit) - prior.value(u - h * unit)) / (2 * h)
        assert prior.gradient(u)[j] == pytest.approx(slope, abs=1e-9)
        bend = (prior.gradient(u + h * unit) - prior.gradient(u - h * unit)) / (2 * h)
        np.testing.assert_allclose(prior.hessian[j], bend, atol=1e-9)


@pytest.mark.parametrize("anchor", [None, 3.0])
def test_a_descent_ends_at_the_minimum(anchor: float | None) -> None:
    criterion = ridge(60, 6)
    prior = Hyperprior(0.04 * criterion.evaluate(np.full(6, 4.0)).value, criterion.penalties.weights, anchor)

    def objective(u: Any) -> tuple[float, Any]:
        found = criterion.evaluate(u, second=False)
        return found.value + prior.value(u), found.gradient + prior.gradient(u)

    least = minimize(objective, np.full(6, 4.0), jac=True, tol=1e-12).fun
    tuned = tune(criterion, np.full(6, 4.0), prior, tol=1e-10, steps=100)
    assert objective(tuned.u)[0] == pytest.approx(least, rel=1e-7)
    coarse = tune(criterion, np.full(6, 4.0), prior, tol=1e-4)
    assert objective(coarse.u)[0] == pytest.approx(least, rel=3e-4)
    assert coarse.evaluations < 15


def test_with_fewer_rows_than_penalties_steps_are_those_of_the_matrix() -> None:
    criterion = ridge(15, 22)
    prior = Hyperprior(0.1, criterion.penalties.weights, 1.5)
    found = criterion.evaluate(np.linspace(0.0, 3.0, 22))
    quick, matrix = _curvature(found, prior), _Matrix(found.gauss_newton + prior.hessian)
    assert isinstance(quick, _FewRows)
    np.testing.assert_allclose(quick.diagonal, matrix.diagonal, rtol=1e-12)
    np.testing.assert_allclose(quick.product(found.gradient), matrix.product(found.gradient), atol=1e-14)
    for free in (np.ones(22, dtype=bool), np.arange(22) % 3 > 0):
        steps = [each.newton(found.gradient[free], free, 1e-3) for each in (quick, matrix)]
        np.testing.assert_allclose(*steps, rtol=1e-9, atol=1e-13)


def test_a_descent_stays_in_the_box_and_stops_where_features_have_no_effect() -> None:
    criterion = ridge(60, 6)
    low, high = box(criterion.data)
    tuned = tune(criterion, np.full(6, 4.0), tol=1e-6, steps=200)
    assert (tuned.u >= low).all()
    assert tuned.u.max() == high
    assert tuned.evaluations < 20
    assert tune(criterion, np.full(6, 1e6), steps=0).u.tolist() == [high] * 6


class Holes(RidgeLeaveOneOut):
    """A criterion that fails for weak penalties of the first feature."""

    def evaluate(self, u: Any, warm: Any = None, **options: Any) -> Any:
        found = super().evaluate(u, warm, **options)
        return replace(found, value=float("nan")) if u[0] < 3.0 else found


def test_a_descent_goes_round_evaluations_that_fail() -> None:
    plain = ridge(60, 6)
    tuned = tune(Holes(plain.data, plain.penalties), np.full(6, 4.0), tol=1e-8, steps=60)
    assert 3.0 <= tuned.u[0] < 4.0
    assert tuned.evaluation.value < plain.evaluate(np.full(6, 4.0)).value


def test_the_best_single_penalty_is_no_worse_than_a_fine_grid() -> None:
    for seed in range(2):
        criterion = ridge(50, 8, seed, useful=1 + 6 * seed)
        one = criterion.with_penalties(Penalties.scalar(8))
        grid = np.linspace(*box(criterion.data), 800)[:, None]
        best = min(each.value for each in one.scan(grid))
        found = best_penalty(criterion)
        assert found.evaluation.value <= best * (1 + 1e-7)
        assert found.evaluations <= 15


@pytest.mark.parametrize("kind", [KFold, RidgeFolds])
def test_the_best_single_penalty_is_found_beyond_a_first_minimum(kind: Any) -> None:
    rng = np.random.default_rng(0)
    d, s = rng.standard_normal((2, 60))
    # The difference of two near-equal columns says more than their sum, but only weak penalties let it through.
    X = np.column_stack([s + 0.03 * d, s - 0.03 * d, rng.standard_normal((60, 30))])
    y = 0.6 * s + 3.0 * d + 0.5 * rng.standard_normal(60)
    folds = make_folds(60, 5)

    def loss(u: float) -> float:
        total = 0.0
        for train, held in folds:
            mean, scale = X[train].mean(0), X[train].std(0)
            Z, V = (X[train] - mean) / scale, (X[held] - mean) / scale
            w = np.linalg.solve(Z.T @ Z + np.exp(u) * np.eye(32), Z.T @ (y[train] - y[train].mean()))
            total += 0.5 * np.square(V @ w + y[train].mean() - y[held]).sum()
        return total / 60

    candidates = np.linspace(-8.0, 12.0, 21)
    values = np.array([loss(u) for u in candidates])
    best, first = int(values.argmin()), 20 - int((np.diff(values[::-1]) > 0).argmax())
    assert best < first < 20
    assert values[best] < 0.5 * values[first]
    data, penalties = LinearData.of(X, y), Penalties.scalar(32)
    criterion = KFold(data, Squared(), penalties, folds) if kind is KFold else RidgeFolds(data, penalties, folds)
    of_candidates = best_penalty(criterion, candidates=candidates)
    assert of_candidates.u[0] == candidates[best]
    assert of_candidates.evaluation.value == pytest.approx(values.min(), rel=1e-6)
    assert best_penalty(criterion).evaluation.value <= values.min() * (1 + 1e-6)


def test_a_path_goes_from_one_penalty_to_looser_and_looser_ones() -> None:
    criterion = ridge(80, 10)
    points = path(criterion, (1.0, 0.1, 0.01))
    assert [each.tau for each in points] == [np.inf, 1.0, 0.1, 0.01]
    assert np.ptp(points[0].u) == 0.0
    spreads = [np.ptp(each.u) for each in points]
    assert spreads == sorted(spreads)
    values = [each.evaluation.value for each in points]
    assert values == sorted(values, reverse=True)
    assert points[0].evaluation.value == pytest.approx(criterion.evaluate(points[0].u).value)


def test_with_as_many_features_as_rows_penalties_are_held_at_the_single_one() -> None:
    wide = ridge(30, 40)
    (single, tuned), (_, free) = path(wide, (0.3,)), path(wide, (0.3,), anchored=False)
    assert tuned.prior is not None
    assert tuned.prior.anchor == single.u[0]
    assert free.prior is not None
    assert free.prior.anchor is None
    assert abs(tuned.u.mean() - single.u[0]) < abs(free.u.mean() - single.u[0])


def test_a_path_leaves_a_single_penalty_that_interpolates() -> None:
    wide = ridge(40, 80, 0, useful=6, noise=0.02)
    single, tuned = path(wide, (1.0,))
    assert single.u[0] == box(wide.data)[0]
    # There, only the ratios of penalties matter: those of features that help have to be able to fall.
    assert tuned.u.min() < tuned.u.mean() - 1.0
    assert tuned.evaluation.value < 0.5 * single.evaluation.value


def test_one_penalty_has_no_path() -> None:
    criterion = ridge(40, 5)
    assert len(path(criterion.with_penalties(Penalties.scalar(5)))) == 1


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("unit", [1e-5, 1e5])
def test_columns_that_are_not_standardised_have_a_box_in_their_own_units(unit: float, sparse: bool) -> None:
    X, y = table(40, 4)
    X[:, 2] *= 3.0

    def of(unit: float) -> RidgeLeaveOneOut:
        given = csr_matrix(unit * X) if sparse else unit * X
        return RidgeLeaveOneOut(LinearData.of(given, y, standardize=False), Penalties.feature(4))

    plain, other, shift = of(1.0), of(unit), 2.0 * np.log(unit)
    assert plain.data.level == pytest.approx(np.log(40 * X.var(0).mean()))
    np.testing.assert_allclose(box(other.data), np.add(box(plain.data), shift))
    for one, two in zip(path(plain, (0.1,)), path(other, (0.1,)), strict=True):
        np.testing.assert_allclose(two.u, one.u + shift, atol=1e-6)
        assert two.evaluation.value == pytest.approx(one.evaluation.value, rel=1e-9)
        assert remarks_of(other, two) == remarks_of(plain, one) == []


def test_without_noise_the_single_penalty_and_the_path_go_below_the_box() -> None:
    criterion = ridge(60, 8, noise=1e-5)
    low, _ = box(criterion.data)
    tuned = best_penalty(criterion)
    weaker = criterion.with_penalties(Penalties.scalar(8)).scan(np.linspace(low, -20, 50)[:, None])
    least = min(each.value for each in weaker)
    assert tuned.u[0] < low
    assert tuned.evaluation.value <= least * (1 + 1e-4)
    points = path(criterion, (0.1,))
    assert points[1].evaluation.value <= tuned.evaluation.value * 1.01


class Exactly(KFold):
    """K-fold that takes no rough first look."""

    def rough(self) -> Exactly:
        return self


def test_a_rough_first_look_finds_the_same_single_penalty_with_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    X = rng.standard_normal((120, 60))
    y = torch.as_tensor((X[:, :3] + 1.5 * rng.standard_normal((120, 3))).argmax(1))
    given = (LinearData.of(X, y), Softmax(), Penalties.scalar(60, 3), make_folds(120, 4, labels=y.numpy()))
    steps: list[int] = []
    plain = newton_cg.conjugate_gradients

    def counted(*arguments: Any) -> Any:
        found = plain(*arguments)
        steps.append(found[1])
        return found

    monkeypatch.setattr(newton_cg, "conjugate_gradients", counted)
    found, work = [], []
    for kind, few in ((Exactly, 5), (KFold, 5), (KFold, 1)):
        monkeypatch.setattr("bilevel.selection.scalar.FEW", few)
        found.append(best_penalty(kind(*given)))
        work.append(sum(steps))
        steps.clear()
    for each in found[1:]:
        assert each.u[0] == pytest.approx(found[0].u[0], abs=0.02)
        assert each.evaluation.value == pytest.approx(found[0].evaluation.value, rel=1e-6)
        assert each.evaluation.value == pytest.approx(KFold(*given).evaluate(each.u).value, rel=1e-6)
        assert each.converged
    assert work[1] < 0.7 * work[0]
