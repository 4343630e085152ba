"""Criteria of held-out folds, beside explicit refits of every fold and central differences."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from criteria_cases import Array, coarse_differences, differences, penalty_cases, refit, standardised
from sklearn.model_selection import KFold as Splitter

from bilevel.core.status import BilevelWarning
from bilevel.criteria import KFold, LinearData, Penalties, RidgeFolds, newton_dense
from bilevel.criteria import folds as module
from bilevel.problems import GLMLoss, Logistic, Poisson, Softmax, Squared

RNG = np.random.default_rng(0)
ROWS, FEATURES = 36, 5
X = 3.0 * RNG.standard_normal((ROWS, FEATURES)) + 1.0
X[:, 2] = RNG.random(ROWS) < 0.4
WEIGHTS = RNG.random(ROWS) + 0.3
SPLITS = list(Splitter(4, shuffle=True, random_state=0).split(X))
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
@pytest.mark.parametrize("splits", [SPLITS, HOLD_OUT], ids=["folds", "hold-out"])
def test_ridge_from_fold_grams_is_that_of_refits(splits: Any, intercept: bool) -> None:
    y = RNG.standard_normal(ROWS) + 10.0 + X[:, 0]
    data = LinearData.of(X, y, WEIGHTS, intercept=intercept)
    for penalties in penalty_cases(FEATURES):
        criterion = RidgeFolds(data, penalties, splits)
        u = np.random.default_rng(1).standard_normal(penalties.size) + 1.0
        value, predicted = held_out(y, Squared(), penalties.spread(u).exp().numpy(), splits, intercept)
        evaluation = criterion.evaluate(u)
        assert evaluation.value == pytest.approx(value, rel=1e-11)
        np.testing.assert_allclose(evaluation.predictions, predicted, rtol=1e-11)
        assert evaluation.losses.mean() == pytest.approx(evaluation.value, rel=1e-13)
        for (fit, held), (_, rows) in zip(criterion.fits(evaluation), splits, strict=True):
            np.testing.assert_array_equal(held, rows)
            ours = evaluation.predictions[np.isin(criterion.held_out, rows)]
            torch.testing.assert_close(fit.predict(torch.from_numpy(X[rows])), ours)


@pytest.mark.parametrize("targets", [None, 3])
def test_derivatives_from_fold_grams_are_those_of_central_differences(targets: Any) -> None:
    y = RNG.standard_normal((ROWS,) if targets is None else (ROWS, targets))
    for penalties in penalty_cases(FEATURES, targets):
        criterion = RidgeFolds(LinearData.of(X, y, WEIGHTS), penalties, SPLITS)
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
    one, two = (RidgeFolds(LinearData.of(each, y), penalties, SPLITS) for each in (sparse, sparse.toarray()))
    assert one.evaluate(u).value == pytest.approx(two.evaluate(u).value, rel=1e-11)
    np.testing.assert_allclose(one.evaluate(u).gradient, two.evaluate(u).gradient, atol=1e-12)
    torch.testing.assert_close(one.refit(u).coef, two.refit(u).coef)

    train = SPLITS[0][0]
    part = two.take(torch.as_tensor(train))
    assert len(part.folds) == 3
    place = {int(row): index for index, row in enumerate(train)}
    inner = [([place[r] for r in tr if r in place], [place[r] for r in held]) for tr, held in SPLITS[1:]]
    direct = RidgeFolds(LinearData.of(sparse.toarray()[train], y[train]), penalties, inner)
    assert part.evaluate(u).value == pytest.approx(direct.evaluate(u).value, rel=1e-12)

    counts = RNG.integers(1, 4, ROWS)
    owner = np.repeat(np.arange(ROWS), counts)
    folds = [tuple(np.flatnonzero(np.isin(owner, rows)) for rows in pair) for pair in SPLITS]
    repeated = RidgeFolds(LinearData.of(sparse.toarray()[owner], y[owner]), penalties, folds)
    weighted = RidgeFolds(LinearData.of(sparse.toarray(), y, counts), penalties, SPLITS)
    value = repeated.evaluate(u + np.log(counts.mean())).value
    assert weighted.evaluate(u).value == pytest.approx(value, rel=1e-11)


def labels(loss: GLMLoss, rows: int = ROWS) -> Array:
    """Targets that a loss takes, of which every class is in every fold."""
    signal = X[:rows, 0] / 3.0 + np.random.default_rng(7).standard_normal(rows)
    if isinstance(loss, Poisson):
        return np.round(np.exp(0.5 * signal))
    if isinstance(loss, Squared):
        return signal
    return np.argsort(np.argsort(signal)) * (3 if isinstance(loss, Softmax) else 2) // rows


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("splits", [SPLITS, HOLD_OUT], ids=["folds", "hold-out"])
@pytest.mark.parametrize("loss", [Logistic(), Squared(), Poisson()], ids=lambda loss: type(loss).__name__)
def test_folds_of_any_loss_are_those_of_refits(loss: GLMLoss, splits: Any, intercept: bool) -> None:
    data = LinearData.of(X, labels(loss), WEIGHTS, loss=loss, intercept=intercept)
    penalties, u = Penalties.feature(FEATURES), np.linspace(0.0, 2.0, FEATURES)
    criterion = KFold(data, loss, penalties, splits, tol=1e-14)
    value, predicted = held_out(data.y.numpy(), loss, np.exp(u), splits, intercept)
    evaluation = criterion.evaluate(u)
    assert evaluation.value == pytest.approx(value, rel=1e-8)
    np.testing.assert_allclose(evaluation.predictions, predicted, rtol=1e-6, atol=1e-9)
    fit, held = criterion.fits(evaluation)[-1]
    torch.testing.assert_close(
        fit.predict(torch.from_numpy(X[held])), evaluation.predictions[-len(held) :], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("loss", [Logistic(), Poisson(), Softmax()], ids=lambda loss: type(loss).__name__)
def test_derivatives_of_folds_are_those_of_differences(
    loss: GLMLoss, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct and not isinstance(loss, Softmax):
        return
    monkeypatch.setattr(newton_dense, "MOST", 150 if direct else 0)
    data = LinearData.of(X, labels(loss), WEIGHTS, loss=loss)
    for penalties in penalty_cases(FEATURES, 3 if isinstance(loss, Softmax) else None)[:4]:
        criterion = KFold(data, loss, penalties, SPLITS, tol=1e-14 if direct else 1e-22)
        u = np.random.default_rng(2).standard_normal(penalties.size) + 2.0
        evaluation = criterion.evaluate(u)
        gradient, jacobian = coarse_differences(criterion, u)
        np.testing.assert_allclose(evaluation.gradient, gradient, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(evaluation.jacobian, jacobian, rtol=1e-5, atol=1e-6)
        assert evaluation.gauss_newton is not None
        assert np.linalg.eigvalsh(evaluation.gauss_newton).min() > -1e-12


def test_folds_of_one_model_agree_however_it_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    y, u = labels(Logistic()), np.linspace(0.0, 2.0, FEATURES)
    sparse = scipy.sparse.csr_matrix(np.where(np.abs(X) > 2.0, X, 0.0))
    penalties, found = Penalties.feature(FEATURES), []
    for given, direct in ((sparse, 400), (sparse.toarray(), 400), (sparse, 0), (sparse.toarray(), 0)):
        monkeypatch.setattr(module, "DIRECT", direct)
        data = LinearData.of(given, y, WEIGHTS, loss=Logistic())
        criterion = KFold(data, Logistic(), penalties, SPLITS, tol=1e-20)
        evaluation = criterion.evaluate(u)
        found.append((evaluation.value, evaluation.gradient, criterion.refit(u, evaluation.warm).coef))
        warm = criterion.evaluate(u, criterion.evaluate(u + 1.0).warm)
        assert warm.value == pytest.approx(evaluation.value, rel=1e-9)
    for value, gradient, coef in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-9)
        np.testing.assert_allclose(gradient, found[0][1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(coef, found[0][2], rtol=1e-7, atol=1e-9)

    # Two classes of softmax are the logistic model, with twice the penalty on a coefficient of each sign.
    twice = Penalties.feature(FEATURES, 2)
    for most in (0, 150):
        monkeypatch.setattr(newton_dense, "MOST", most)
        two, few = (
            KFold(LinearData.of(given, y, WEIGHTS, loss=Softmax()), Softmax(), twice, SPLITS, tol=tol)
            for given, tol in ((sparse.toarray(), 1e-20), (sparse, 1e-10))
        )
        assert two.evaluate(u + np.log(2.0)).value == pytest.approx(found[0][0], rel=1e-8)
        assert few.evaluate(u + np.log(2.0)).value == pytest.approx(found[0][0], rel=1e-7)
    part = two.take(torch.as_tensor(SPLITS[0][0]))
    assert len(part.folds) == 3
    assert np.isfinite(part.evaluate(u).gradient).all()


def test_the_losses_of_a_row_that_several_folds_hold_out_are_added_up() -> None:
    y = X[:, 0].copy()
    y[7] += 60.0
    splits = [
        (np.setdiff1d(np.arange(ROWS), held), held)
        for step in (1, 5, 7)
        for held in np.array_split(np.arange(ROWS) * step % ROWS, 3)
    ]
    criterion = KFold(LinearData.of(X, y), Squared(), Penalties.scalar(FEATURES), splits)
    found = criterion.evaluate(np.array([4.0]), second=False)
    assert found.losses.max() < 0.5 * found.losses.sum()
    share = found.losses[criterion.held_out.numpy() == 7].sum() / found.losses.sum()
    assert criterion.remark(found) == f"row 7 (counted from 0) alone makes {share:.0%} of the criterion: look at it."


def test_a_scan_is_of_all_penalties() -> None:
    data = LinearData.of(X, labels(Logistic()), loss=Logistic())
    criterion = KFold(data, Logistic(), Penalties.scalar(FEATURES), SPLITS)
    grid = np.linspace(9.0, -9.0, 10)[:, None]
    found = [each.value for each in criterion.scan(grid)]
    assert found == pytest.approx([criterion.evaluate(u).value for u in grid], rel=1e-6)


def test_a_fold_that_trains_on_one_class_is_refused() -> None:
    y = np.arange(ROWS) // 18
    with pytest.raises(ValueError, match="fold 1 trains on no row of the class -1: use fewer folds, or stratified"):
        KFold(
            LinearData.of(X, y, loss=Logistic()),
            Logistic(),
            Penalties.scalar(FEATURES),
            [(np.arange(18, ROWS), np.arange(18))],
        )


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        ([], "at least one pair"),
        ([([0, 1], [1, 2])], "fold 1 validates on rows that it trains on"),
        ([([0, 1], [])], "fold 1 has no validation rows with a weight"),
        ([([0, 99], [1])], "a fold names the row 99, but the data have 36 rows"),
    ],
)
def test_folds_that_are_none_are_refused_in_a_sentence(splits: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RidgeFolds(LinearData.of(X, X[:, 0]), Penalties.scalar(FEATURES), splits)


def test_weak_penalties_of_wide_softmax_are_those_of_factored_hessians(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    wide = rng.standard_normal((60, 80))
    y, splits = (wide[:, :3] + 0.5 * rng.standard_normal((60, 3))).argmax(1), list(Splitter(3).split(wide))
    for scale, standardize, levels in ((1.0, True, (-9.0, -14.0, -20.0)), (1e25, False, (0.0,))):
        data = LinearData.of(wide * scale, y, loss=Softmax(), standardize=standardize)
        criterion = KFold(data, Softmax(), Penalties.scalar(80, 3), splits)
        for level in levels:
            u = np.array([level + 2.0 * np.log(scale)])
            found = criterion.evaluate(u)
            with monkeypatch.context() as patch:
                patch.setattr(newton_dense, "MOST", 1000)
                right = KFold(data, Softmax(), Penalties.scalar(80, 3), splits).evaluate(u)
            assert found.value == pytest.approx(right.value, rel=1e-6)
            np.testing.assert_allclose(found.gradient, right.gradient, rtol=1e-5)


def test_weak_penalties_of_sparse_separable_classes_are_found_though_float32_has_no_digit_left_for_them() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    counts = (rng.random((60, 520)) < 0.05).astype(float)
    counts[:, :15] = (rng.random((60, 15)) < 0.5) & (np.arange(15) % 3 == y[:, None])  # words of one class each
    data = LinearData.of(scipy.sparse.csr_matrix(counts / 5.0), y, loss=Softmax(), standardize=False)
    criterion = KFold(data, Softmax(), Penalties.scalar(520, 3), list(Splitter(3).split(counts)))
    u = np.array([data.level - 13.5])
    found = criterion.evaluate(u)
    assert np.isfinite(found.value)
    slope = (criterion.evaluate(u + 0.1).value - criterion.evaluate(u - 0.1).value) / 0.2
    assert found.gradient[0] == pytest.approx(slope, rel=1e-3)
    many = criterion.with_penalties(Penalties.feature(520, 3)).evaluate(np.full(520, u[0]), second=False)
    assert many.gradient.sum() == pytest.approx(slope, rel=1e-3)


def test_models_that_are_not_found_have_no_finite_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.newton_cg, "STEPS", 1)
    monkeypatch.setattr(module, "DIRECT", 0)
    sparse = scipy.sparse.csr_matrix(X)
    data = LinearData.of(sparse, labels(Logistic()), loss=Logistic())
    criterion = KFold(data, Logistic(), Penalties.scalar(FEATURES), SPLITS)
    monkeypatch.setattr(module.newton_dense, "ENTRIES", 0)
    with pytest.warns(BilevelWarning, match="models at a log penalty of -3 were not found.*give a stronger penalty"):
        found = criterion.evaluate(np.array([-3.0]))
    assert found.value == np.inf
    assert np.isfinite(found.gradient).all()


def test_conjugate_gradients_end_where_there_is_no_curvature() -> None:
    r = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    for curvatures in ([2.0, -3.0], [torch.nan, 1.0]):
        product = partial(torch.mul, r.new_tensor(curvatures))
        x, steps = module.newton_cg.conjugate_gradients(product, lambda v: v, r, r.new_tensor(1e-8))
        assert bool(torch.isfinite(x).all())
        assert steps == module.newton_cg.CG_STEPS
