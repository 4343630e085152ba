"""Approximate leave-one-out, beside one Newton step of every leave-one-out problem and central differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from criteria_cases import differences, penalty_cases, refit
from torch import Tensor

from bilevel.criteria import ApproximateLeaveOneOut, LinearData, Penalties, RidgeLeaveOneOut, approximate
from bilevel.numerics import factored
from bilevel.problems import GLMLoss, Huber, Logistic, Poisson, Softmax, Squared, SquaredHinge

LOSSES: list[GLMLoss] = [Logistic(), Squared(), Poisson(), Huber(1.0), SquaredHinge()]


def made(loss: GLMLoss, rows: int, features: int, **options: Any) -> LinearData:
    rng = np.random.default_rng(rows + features)
    X = 3.0 * rng.standard_normal((rows, features)) + 1.0
    signal = X[:, 0] / 3.0 + rng.standard_normal(rows)
    y = signal
    if isinstance(loss, Logistic | SquaredHinge):
        y = np.where(signal > 0.3, 1, 0)
    elif isinstance(loss, Poisson):
        y = np.round(np.exp(0.5 * signal))
    weights = rng.random(rows) + 0.2
    weights[3] = 0.0
    return LinearData.of(X, y, weights, loss=loss, **options)


@pytest.mark.crossed
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("rows", "features"), [(40, 5), (18, 26)])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_every_row_is_predicted_by_one_newton_step_without_it(
    loss: GLMLoss, rows: int, features: int, intercept: bool
) -> None:
    data = made(loss, rows, features, intercept=intercept)
    X, y, s = data.X.numpy(), data.y.numpy(), data.weights.numpy()
    penalties = Penalties.feature(features)
    u = np.random.default_rng(1).standard_normal(features) + 2.0
    criterion = ApproximateLeaveOneOut(data, loss, penalties, tol=1e-14)
    w, b = refit(X, y, s, np.exp(u), loss, intercept)
    fit = criterion.refit(u)
    np.testing.assert_allclose(fit.coef * data.scale, w, rtol=1e-9, atol=1e-10)

    X1 = np.hstack([X, np.ones((rows, int(intercept)))])
    w1, a = np.append(w, [b] * intercept), np.append(np.exp(u), [0.0] * intercept)
    z = torch.from_numpy(X1 @ w1)
    slope, curvature = loss.slope(z, data.y).numpy(), loss.curvature(z, data.y).numpy()
    expected = np.zeros(rows)
    for row in range(rows):
        rest = np.arange(rows) != row
        gradient = X1[rest].T @ (s * slope)[rest] + a * w1
        hessian = (X1[rest].T * (s * curvature)[rest]) @ X1[rest] + np.diag(a)
        expected[row] = X1[row] @ (w1 - np.linalg.solve(hessian, gradient))
    evaluation = criterion.evaluate(u)
    np.testing.assert_allclose(evaluation.predictions, expected, rtol=1e-8, atol=1e-9)
    losses = s * loss.value(torch.from_numpy(expected), data.y).numpy()
    assert evaluation.value == pytest.approx(losses.mean(), rel=1e-8)


@pytest.mark.parametrize(("loss", "rows", "features"), [(Huber(1.0), 40, 60), (SquaredHinge(), 400, 40)])
def test_models_of_losses_with_kinks_are_found_at_weak_penalties(loss: GLMLoss, rows: int, features: int) -> None:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((rows, features))
    z = 6.0 * X @ rng.standard_normal(features) / features**0.5 + 0.3 * rng.standard_normal(rows)
    data = LinearData.of(X, np.where(z > 0, 1, 0) if isinstance(loss, SquaredHinge) else z, loss=loss)
    criterion, warm = ApproximateLeaveOneOut(data, loss, Penalties.feature(features)), None
    for value in (3.0, 0.0, -3.0, -8.0, -2.0):
        u = value + 0.3 * np.sin(np.arange(features))
        warm = criterion.evaluate(u, warm).warm
        fit = criterion.refit(u, warm)
        slopes = data.weights * loss.slope(fit.predict(torch.from_numpy(X)), data.y)
        # With the columns in the units that penalties are in.
        parts = torch.from_numpy(X / data.scale.numpy()).T @ slopes, torch.from_numpy(np.exp(u)) * fit.coef * data.scale
        assert float((parts[0] + parts[1]).norm()) < 1e-6 * float(slopes.abs().sum()) + 1e-9


@pytest.mark.parametrize(("rows", "features"), [(40, 5), (18, 26)])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_derivatives_are_those_of_central_differences(loss: GLMLoss, rows: int, features: int) -> None:
    data = made(loss, rows, features)
    for penalties in penalty_cases(features):
        criterion = ApproximateLeaveOneOut(data, loss, penalties, tol=1e-14)
        u = np.random.default_rng(2).standard_normal(penalties.size) + 3.0
        evaluation, first = criterion.evaluate(u, full=True), criterion.evaluate(u, second=False)
        gradient, jacobian = differences(criterion, u)
        np.testing.assert_allclose(evaluation.gradient, gradient, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(first.gradient, evaluation.gradient, rtol=1e-12, atol=1e-13)
        assert evaluation.jacobian is not None
        J = evaluation.jacobian
        torch.testing.assert_close(J, jacobian, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(J.T @ evaluation.slopes / rows, evaluation.gradient, rtol=1e-9, atol=1e-13)
        model = J.T @ (J * evaluation.curvatures[:, None]) / rows
        np.testing.assert_allclose(evaluation.gauss_newton, model, rtol=1e-9, atol=1e-13)


def test_of_squared_losses_it_is_exact_and_a_warm_start_changes_nothing() -> None:
    data = made(Squared(), 30, 4)
    penalties, u = Penalties.feature(4), np.array([0.0, 1.0, 2.0, 3.0])
    exact = RidgeLeaveOneOut(data, penalties).evaluate(u)
    found = ApproximateLeaveOneOut(data, Squared(), penalties).evaluate(u)
    assert found.value == pytest.approx(exact.value, rel=1e-12)
    np.testing.assert_allclose(found.gradient, exact.gradient, atol=1e-13)
    np.testing.assert_allclose(found.gauss_newton, exact.gauss_newton, atol=1e-13)

    criterion = ApproximateLeaveOneOut(made(Logistic(), 40, 4), Logistic(), penalties, tol=1e-14)
    warm = criterion.evaluate(u + 1.0).warm
    assert criterion.evaluate(u, warm).value == pytest.approx(criterion.evaluate(u).value, rel=1e-11)
    assert [each.value for each in criterion.scan(np.stack([u + 1.0, u]))][1] == pytest.approx(
        criterion.evaluate(u).value, rel=1e-11
    )


def test_sketched_leverages_are_near_and_so_are_their_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(Logistic(), 1500, 12)
    for penalties in (Penalties.scalar(12), Penalties.groups(np.arange(12) % 3)):
        criterion = ApproximateLeaveOneOut(data, Logistic(), penalties)
        u = np.linspace(3.0, 5.0, penalties.size)
        exact = criterion.evaluate(u, full=True)
        monkeypatch.setattr(approximate, "LARGE", 0)
        found = criterion.evaluate(u, full=True)
        monkeypatch.undo()
        # Leverages are about p / n, and their mean has an error of a few percent.
        assert found.value == pytest.approx(exact.value, rel=1e-3)
        np.testing.assert_allclose(found.gradient, exact.gradient, rtol=0.05, atol=1e-5)
        np.testing.assert_allclose(found.gauss_newton, exact.gauss_newton, rtol=0.05, atol=1e-5)
        torch.testing.assert_close(found.predictions, exact.predictions, rtol=0.05, atol=0.02)


def test_a_gram_matrix_serves_like_curvatures_and_solutions_are_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    data, penalties, made_ = made(Logistic(), 1500, 12), Penalties.scalar(12), []
    exact = ApproximateLeaveOneOut(data, Logistic(), penalties)
    monkeypatch.setattr(approximate, "LARGE", 0)
    gram = factored.weighted_gram
    monkeypatch.setattr(factored, "weighted_gram", lambda *given: made_.append(1) or gram(*given))
    grid = np.linspace(9.0, -3.0, 13)[:, None]
    scanned = ApproximateLeaveOneOut(data, Logistic(), penalties).scan(grid)
    assert 0 < len(made_) < 9
    monkeypatch.setattr(factored, "SAME", -1.0)  # none serves
    anew = ApproximateLeaveOneOut(data, Logistic(), penalties).scan(grid)
    monkeypatch.undo()
    for one, two, three in zip(scanned, anew, exact.scan(grid), strict=True):
        assert one.value == pytest.approx(two.value, rel=3e-4)  # the sketch has 1e-3
        np.testing.assert_allclose(one.gradient, two.gradient, rtol=1e-3, atol=3e-5)
        np.testing.assert_allclose(one.gradient, three.gradient, rtol=1e-2, atol=1e-4)
    H = scanned[-1].warm[2].H
    assert not H.exact
    X1 = np.column_stack([data.X, np.ones(1500)])
    r = np.random.default_rng(0).standard_normal(13)
    direct = np.linalg.solve((X1.T * H.d.numpy()) @ X1 + np.diag(H.a.numpy()), r)
    np.testing.assert_allclose(H.solve(torch.from_numpy(r)), direct, rtol=1e-3, atol=1e-5)


def test_the_error_by_the_sketch_is_that_of_other_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    data, u = made(Logistic(), 1500, 12), np.array([3.0])
    exact = ApproximateLeaveOneOut(data, Logistic(), Penalties.scalar(12)).evaluate(u)
    monkeypatch.setattr(approximate, "LARGE", 0)
    randn, found, draws = torch.randn, [], torch.Generator().manual_seed(1)
    monkeypatch.setattr(torch, "randn", lambda *size, generator, dtype: randn(*size, generator=draws, dtype=dtype))
    for _ in range(40):
        criterion = ApproximateLeaveOneOut(data, Logistic(), Penalties.scalar(12))
        found.append(criterion.evaluate(u))
    errors = np.array([each.value - exact.value for each in found])
    said = np.median([each.warm[2].error for each in found])
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(said, rel=0.3)
    assert f"{found[0].warm[2].error:.1g}" in criterion.accuracy(found[0])
    assert not criterion.accuracy(exact)


def test_sparse_inputs_give_what_dense_ones_do_and_parts_what_their_own_data_do() -> None:
    rng = np.random.default_rng(5)
    X, y = scipy.sparse.random(50, 8, 0.4, format="csr", random_state=0), rng.integers(0, 2, 50)
    criteria = [
        ApproximateLeaveOneOut(LinearData.of(each, y, loss=Logistic()), Logistic(), Penalties.feature(8))
        for each in (X, X.toarray())
    ]
    one, two = (each.evaluate(np.zeros(8)) for each in criteria)
    assert one.value == pytest.approx(two.value, rel=1e-12)
    some = list(range(5, 45))
    direct = LinearData.of(X.toarray()[some], y[some], loss=Logistic())
    part = criteria[1].take(some).evaluate(np.zeros(8))
    assert part.value == pytest.approx(
        ApproximateLeaveOneOut(direct, Logistic(), Penalties.feature(8)).evaluate(np.zeros(8)).value, rel=1e-12
    )


@dataclass(frozen=True)
class FromNumpy(Squared):
    """A loss that autograd cannot differentiate."""

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(z.numpy() * 0.0 + 1.0)

    def third(self, z: Tensor, y: Tensor) -> Tensor:
        return GLMLoss.third(self, z, y)


def test_losses_that_it_cannot_take_are_refused_in_a_sentence() -> None:
    X, y = np.eye(6), np.arange(6) % 3
    labels = LinearData.of(X, y, loss=Softmax())
    with pytest.raises(ValueError, match="Softmax has several: use K-fold"):
        ApproximateLeaveOneOut(labels, Softmax(), Penalties.scalar(6, 3))
    data = LinearData.of(X, y.astype(float))
    with pytest.raises(ValueError, match=r"FromNumpy has no third derivative.*write FromNumpy\.third\(z, y\)"):
        ApproximateLeaveOneOut(data, FromNumpy(), Penalties.scalar(6))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_third_derivatives_are_autograds(loss: GLMLoss) -> None:
    z, y = torch.linspace(-2.1, 2.0, 9, dtype=torch.float64), torch.tensor([1.0, -1.0, 1.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(loss.third(z, y), GLMLoss.third(loss, z, y))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_one_penalty_of_more_columns_than_rows_is_that_of_all_equal_ones(sparse: bool, intercept: bool) -> None:
    rng = np.random.default_rng(3)
    X, y = rng.standard_normal((20, 31)) * (rng.random((20, 31)) < 0.5), np.arange(20) % 2
    X[:, 4] = 0.0
    weights = rng.random(20) * (np.arange(20) != 7)
    data = LinearData.of(scipy.sparse.csr_array(X) if sparse else X, y, weights, loss=Logistic(), intercept=intercept)
    one = ApproximateLeaveOneOut(data, Logistic(), Penalties.scalar(31), tol=1e-14)
    each = one.with_penalties(Penalties.feature(31))
    found = one.evaluate(np.array([0.3]))
    there = each.evaluate(np.full(31, -1.0), found.warm)
    back = one.evaluate(np.array([-1.0]), there.warm)
    assert back.value == pytest.approx(there.value, rel=1e-10)
    assert back.gradient[0] == pytest.approx(there.gradient.sum(), rel=1e-8)
    for u, fit in ((-1.0, one.refit(np.array([-1.0]), back.warm)), (0.3, one.refit(np.array([0.3]), back.warm))):
        wanted = each.refit(np.full(31, u))
        torch.testing.assert_close(fit.coef, wanted.coef, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(fit.intercept, wanted.intercept, rtol=1e-7, atol=1e-9)
