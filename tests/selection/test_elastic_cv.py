"""Ridge regression, elastic nets and the adaptive lasso on one set of folds: numbers, gate, and combination."""

import numpy as np
import pytest
import torch
from scipy import optimize, sparse
from sklearn.linear_model import LogisticRegression, enet_path

from bilevel.criteria import ApproximateLeaveOneOut, Fit, KFold, LinearData, Penalties, RidgeLeaveOneOut
from bilevel.problems import Huber, Logistic, Poisson, Softmax, Squared
from bilevel.selection import Net, elastic_cv, kappa_of, make_folds, paired, penalty_cv
from bilevel.selection.candidates import NetSearch, RidgeSearch
from bilevel.selection.honest import HeldOut, predictions

rng = np.random.default_rng(0)
X = rng.standard_normal((90, 20)) * rng.uniform(0.5, 3.0, 20) + 1.0
y = X[:, :3] @ [2.0, -1.0, 1.0] + 2.0 * rng.standard_normal(90)
NOISE = rng.standard_normal(90)
WEIGHTS = rng.integers(0, 3, 90).astype(float)
FOLDS = make_folds(90, 4)


def ridge(X=X, y=y, weights=None, **options):
    return RidgeLeaveOneOut(LinearData.of(X, y, weights, **options), Penalties.feature(X.shape[1]))


@pytest.fixture(scope="module")
def combined():
    return elastic_cv(ridge(), folds=FOLDS)


def excess(net, w, l1, l2):
    """How far the conditions of a minimum are from being met."""
    data = net.data
    z = data.product(torch.from_numpy(w))
    z = z + (data.y - z).mean() if net.loss.quadratic else z
    slopes = data.collect(data.weights * net.loss.slope(z, data.y)).numpy() / data.rows + l2 * w
    return np.where(w == 0, np.maximum(abs(slopes) - l1, 0), abs(slopes + l1 * np.sign(w))).max()


SPARSE = sparse.csr_matrix(np.where(X > 2, X, 0))


@pytest.mark.parametrize("table", [X, X[:9], SPARSE, SPARSE[:9]], ids=["tall", "wide", "sparse", "sparse and wide"])
@pytest.mark.parametrize("l1_ratio", [0.5, 1.0])
def test_paths_meet_the_conditions_of_a_minimum(table, l1_ratio):
    data = LinearData.of(table, y[: table.shape[0]])
    net, factors = Net(data, Squared()), np.linspace(0.5, 2.0, 20)
    largest = net.largest(factors) / l1_ratio
    alphas = largest * np.geomspace(1.0, 1e-3, 6)
    models = net.path(alphas, l1_ratio, factors)
    assert models.converged
    found = (models.fit.coef * data.scale).numpy()
    assert not found[0].any()
    assert net.path(alphas[:1] * 0.999, l1_ratio, factors).fit.coef.any()
    for alpha, w in zip(alphas, found, strict=True):
        assert excess(net, w, l1_ratio * alpha * factors, (1 - l1_ratio) * alpha * factors) < 1e-9 * largest


@pytest.mark.parametrize("rows", [90, 9], ids=["tall", "wide"])
def test_a_logistic_path_is_that_of_scikit_learn(rows):
    labels = np.where(y > 0, 1.0, -1.0)[:rows]
    data = LinearData.of(X[:rows], labels, WEIGHTS[:rows] + 1.0)
    net = Net(data, Logistic())
    alphas = net.largest() * np.array([1.0, 0.3, 0.05])
    models = net.path(alphas, 0.5)
    Z = data.X.numpy()
    for index, alpha in enumerate(alphas):
        reference = LogisticRegression(
            C=1.0 / (alpha * rows), l1_ratio=0.5, solver="saga", tol=1e-9, max_iter=20_000
        ).fit(Z, labels, data.weights)
        np.testing.assert_allclose(models.fit.coef[index] * data.scale, reference.coef_[0], atol=1e-5)


@pytest.mark.parametrize("table", [X, SPARSE, X[:30], SPARSE[:30]], ids=["tall", "sparse", "wide", "sparse and wide"])
@pytest.mark.parametrize("intercept", [True, False])
def test_a_path_of_three_classes_is_that_of_scikit_learn(table, intercept):
    rows = table.shape[0]
    labels = torch.from_numpy(np.digitize(y, [-2.0, 2.0])[:rows])
    data = LinearData.of(table, labels, WEIGHTS[:rows] + 1.0, intercept=intercept)
    net = Net(data, Softmax(), outputs=3)
    alphas = net.largest() * np.array([1.0, 0.3, 0.1])
    options = {"solver": "saga", "tol": 1e-10, "max_iter": 20_000, "fit_intercept": intercept}
    for l1_ratio in (0.6, 1.0):
        models = net.path(alphas / l1_ratio, l1_ratio)
        assert models.converged
        assert not (models.fit.coef[0].any() and l1_ratio == 1.0)
        C = l1_ratio / (alphas[-1] * rows)
        reference = LogisticRegression(C=C, l1_ratio=l1_ratio, **options).fit(data.dense(), labels, data.weights)
        np.testing.assert_allclose(models.fit.coef[-1] * data.scale, reference.coef_, atol=1e-6)
        b = models.fit.intercept[-1] + models.fit.coef[-1] @ data.offset
        np.testing.assert_allclose(b - b.mean(), reference.intercept_ - np.mean(reference.intercept_), atol=1e-6)


def test_a_dual_gap_bounds_the_objective():
    data = LinearData.of(X, y)
    net = Net(data, Squared())
    fit = net.path(net.largest() * np.array([0.5, 0.1]), 0.7).fit
    alpha = 0.1 * net.largest()
    assert abs(net.dual_gap(type(fit)(fit.coef[1], fit.intercept[1]), alpha, 0.7)) < 1e-10
    assert net.dual_gap(type(fit)(fit.coef[0], fit.intercept[0]), alpha, 0.7) > 1e-3


def test_the_grid_is_that_of_scikit_learn_on_the_same_folds(combined):
    net = combined.net
    assert net.alphas.shape == (3, 40)
    for fold, (train, held) in enumerate(FOLDS):
        mean, scale = X[train].mean(0), X[train].std(0)
        Z, centre = (X - mean) / scale, y[train].mean()
        for ratio, alphas, losses in zip(net.l1_ratios, net.alphas[:, ::8], net.losses[:, ::8, fold], strict=True):
            _, w, _ = enet_path(Z[train], y[train] - centre, l1_ratio=ratio, alphas=alphas, tol=1e-12, max_iter=50_000)
            expected = 0.5 * np.square(Z[held] @ w + centre - y[held, None]).mean(0)
            np.testing.assert_allclose(losses, expected, rtol=1e-8)
    at = np.unravel_index(np.argmin((net.losses * [len(held) for _, held in FOLDS]).sum(-1)), net.alphas.shape)
    assert (net.alpha, net.l1_ratio) == (net.alphas[at], net.l1_ratios[at[0]])


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_rows_are_judged_under_penalties_that_the_other_folds_chose(weights):
    target = X @ np.linspace(0.0, 0.5, 20) + 2.0 * NOISE
    options = {"candidates": ["elastic_net"], "alphas": 12}
    found = elastic_cv(ridge(y=target, weights=weights), folds=FOLDS, **options)
    sizes = [np.ones(90)[held].sum() if weights is None else weights[held].sum() for _, held in FOLDS]
    losses, total = found.net.losses * sizes, 0.0
    for fold in range(4):
        others = np.delete(losses, fold, -1).sum(-1)
        total += losses[(*np.unravel_index(np.argmin(others), others.shape), fold)]
    assert found.candidates[0].loss == pytest.approx(total / sum(sizes))
    assert found.candidates[0].loss > 1.01 * losses.sum(-1).min() / sum(sizes)
    # Held out twice, a row has no say in what it judges either.
    twice = elastic_cv(ridge(y=target, weights=weights), folds=[*FOLDS, *FOLDS], **options)
    assert twice.candidates[0].loss == pytest.approx(found.candidates[0].loss)


def test_one_fold_that_chooses_and_judges_is_remarked_on():
    single = {"folds": FOLDS[:1], "candidates": ["elastic_net"]}
    assert "both chooses the penalties" in elastic_cv(ridge(), alphas=3, **single).remarks[0]
    assert not elastic_cv(ridge(), alphas=[0.1], l1_ratios=[1.0], **single).remarks


def test_the_path_is_that_of_penalty_cv(combined):
    selected = penalty_cv(ridge(), folds=FOLDS)
    for node, candidate in zip(selected.nodes, combined.candidates, strict=False):
        assert candidate.loss == pytest.approx(node.loss)
        np.testing.assert_allclose(candidate.penalties * 90, node.penalties)
    names = [each.name for each in combined.candidates]
    assert names == [
        "ridge",
        *(f"ridge, tau {node.tau:g}" for node in selected.nodes[1:]),
        "elastic net",
        "adaptive lasso",
    ]


def test_the_combination_has_the_least_loss_of_held_out_rows(combined):
    assert combined.open
    predictions = []
    for index, candidate in enumerate(combined.candidates):
        assert candidate.loss == pytest.approx(combined.losses.losses[index].mean())
        gain, error = paired(combined.losses.losses[0], combined.losses.losses[index])
        assert (candidate.gain, candidate.gain_error) == (pytest.approx(gain), pytest.approx(error))
        predictions.append(candidate.fit.coef)
    weights = np.array([each.weight for each in combined.candidates])
    assert weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(combined.coef, weights @ torch.stack(predictions).numpy())
    assert combined.candidates[combined.chosen].weight == weights.max()
    best = elastic_cv(ridge(), folds=FOLDS, stacking=False)
    assert [each.weight for each in best.candidates] == [float(each is best.best) for each in best.candidates]


def test_weights_of_the_combination_are_those_of_a_quadratic_programme():
    # Held-out predictions of the two candidates are made by hand.
    found = elastic_cv(ridge(), folds=FOLDS, candidates=["ridge", "elastic_net"], guard="off", alphas=8)
    columns = []
    for candidate in found.candidates:
        z = np.empty(90)
        for train, held in FOLDS:
            mean, scale, centre = X[train].mean(0), X[train].std(0), y[train].mean()
            Z = (X - mean) / scale
            if candidate.l1_ratio == 0:
                own = penalty_cv(RidgeLeaveOneOut(LinearData.of(X[train], y[train]), Penalties.scalar(20)), tol=1e-6)
                w = (own.coef * torch.from_numpy(scale)).numpy()
            else:
                alpha, ratio = float(candidate.penalties[0]), candidate.l1_ratio
                alphas = np.geomspace(1e3 * alpha, alpha, 5)
                w = enet_path(Z[train], y[train] - centre, l1_ratio=ratio, alphas=alphas, tol=1e-12)[1][:, -1]
            z[held] = Z[held] @ w + centre
        columns.append(z)
    first, second = columns

    def loss(omega):
        return np.square(omega * first + (1 - omega) * second - y).mean()

    omega = optimize.minimize_scalar(loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).x
    assert found.candidates[0].weight == pytest.approx(omega, abs=1e-4)


def test_every_fold_has_weights_of_its_own_for_the_adaptive_lasso():
    # Rows that are held out have no say in their fold's models, not even in the weights of columns.
    changed = y.copy()
    changed[FOLDS[0][1]] += 100.0
    options = {"folds": FOLDS[:1], "candidates": ["elastic_net", "adaptive_lasso"], "alphas": [0.1], "guard": "off"}
    searches = []
    for target in (y, changed):
        criterion = ridge(y=target)
        held_out = HeldOut(criterion, FOLDS[:1])
        nodes = RidgeSearch(
            criterion, held_out, (1.0, 0.1), {"tol": 1e-4, "steps": 25, "n_jobs": None, "progress": False}
        )
        search = NetSearch(criterion, held_out, nodes, positive=False, rounds=200)
        columns, _ = search.columns(
            [search.grid("adaptive lasso", (1.0,), np.array([0.05]), 1e-3, adaptive=True)], None
        )
        searches.append(columns[0].held[0])
    np.testing.assert_allclose(searches[0], searches[1], rtol=1e-6)
    assert len(elastic_cv(ridge(), **options).candidates) == 2


def test_a_combination_is_that_of_weighted_rows():
    weights = np.where(np.arange(90) < 45, 3.0, 1.0)
    place = np.repeat(np.arange(90), weights.astype(int))
    repeated = [tuple(np.flatnonzero(np.isin(place, part)) for part in fold) for fold in FOLDS]
    target = X @ np.linspace(0.0, 0.5, 20) + 2.0 * NOISE
    criterion = KFold(LinearData.of(X, target, weights), Squared(), Penalties.scalar(20), FOLDS)
    other = KFold(LinearData.of(X[place], target[place]), Squared(), Penalties.scalar(20), repeated)
    options = {"candidates": ["ridge", "elastic_net"], "guard": "off", "alphas": 8}
    weighted, plain = elastic_cv(criterion, folds=FOLDS, **options), elastic_cv(other, folds=repeated, **options)
    assert 0.0 < weighted.candidates[0].weight < 1.0
    assert weighted.candidates[0].weight == pytest.approx(plain.candidates[0].weight, abs=1e-4)


@pytest.mark.parametrize("loss", [Poisson(), Huber(1.0)], ids=["poisson", "huber"])
def test_paths_of_other_losses_meet_the_conditions_of_a_minimum(loss):
    counts = rng.poisson(np.exp(0.3 * X[:, 0])).astype(float)
    data = LinearData.of(X, counts)
    net = Net(data, loss)
    largest = net.largest()
    alphas = largest * np.array([1.0, 0.3, 0.05])
    models = net.path(alphas, 0.8)
    assert models.converged
    for alpha, w, b in zip(alphas, models.fit.coef, models.fit.intercept, strict=True):
        z = predictions(data, Fit(w, b))
        slopes = loss.slope(z, data.y)
        assert abs(float(slopes.mean())) < 1e-5 * largest
        w = (w * data.scale).numpy()
        gradient = data.collect(slopes).numpy() / 90 + 0.2 * alpha * w
        off = np.where(w == 0, np.maximum(abs(gradient) - 0.8 * alpha, 0), abs(gradient + 0.8 * alpha * np.sign(w)))
        assert off.max() < 1e-4 * largest
    found = elastic_cv(ApproximateLeaveOneOut(data, loss, Penalties.feature(20)), folds=FOLDS, alphas=8)
    assert found.best.loss < found.losses.losses[0].mean() + 1e-12


def test_noise_keeps_the_one_penalty():
    found = elastic_cv(ridge(y=NOISE), folds=FOLDS)
    assert not found.open
    assert found.choice.kappa == kappa_of(Squared(), found.losses.losses[0], 20)
    np.testing.assert_array_equal(found.coef, found.candidates[0].fit.coef)


def test_a_gain_that_is_not_proved_keeps_the_one_penalty(combined):
    found = elastic_cv(ridge(), folds=FOLDS, kappa=2.0 * combined.best.gate)
    assert found.best.gain > 0.0
    assert not found.open
    assert [each.weight for each in found.candidates] == [1.0] + [0.0] * (len(found.candidates) - 1)
    np.testing.assert_array_equal(found.coef, found.candidates[0].fit.coef)
    assert "ridge is kept: the gain of the" in found.summary
    assert elastic_cv(ridge(), folds=FOLDS, kappa=2.0 * combined.best.gate, guard="off").candidates[0].weight < 1.0


def test_what_is_taken_without_a_gate_is_said():
    options = {"folds": FOLDS, "candidates": ["ridge", "path", "elastic_net"], "alphas": 8, "guard": "off"}
    for seed in range(3):
        target = np.random.default_rng(seed).standard_normal(90)
        for stacking in (True, False):
            found = elastic_cv(ridge(y=target), stacking=stacking, kappa=10.0, **options)
            assert not found.open
            chosen = found.candidates[found.chosen]
            said = f"{chosen.weight:.0%} {chosen.name}" in found.summary and "without a gate" in found.summary
            assert said == (found.candidates[0].weight < 1)
            assert ("is kept" in found.summary) != said


@pytest.mark.parametrize("select", [elastic_cv, penalty_cv])
def test_a_given_fold_without_a_weight_is_refused_and_one_made_here_left_out(select):
    train, _ = FOLDS[1]
    weights = np.ones(90)
    weights[train] = 0.0
    with pytest.raises(ValueError, match="fold 1 has no training rows with a weight"):
        select(ridge(weights=weights), folds=[FOLDS[1]])
    weights = 1.0 - weights
    with pytest.raises(ValueError, match="fold 2 has no held-out rows with a weight"):
        select(ridge(weights=weights), folds=FOLDS)
    made = select(ridge(weights=weights), folds=4, taus=[1.0])
    assert len(made.folds) == 3
    assert len(made.losses.rows) == len(train)


def test_a_number_of_penalties_may_be_numpys_and_solves_are_counted():
    options = {"folds": FOLDS, "candidates": ["elastic_net"], "l1_ratios": np.array([0.5, 1.0])}
    found, other = (elastic_cv(ridge(), alphas=alphas, **options) for alphas in (5, np.int64(5)))
    assert found.net.alphas.tolist() == other.net.alphas.tolist()
    at = int(np.argmax(found.net.alphas[found.net.l1_ratios == found.net.l1_ratio] == found.net.alpha))
    assert (found.solved, found.evaluations) == (2 * 5 * 4 + at + 1, 0)


def test_weights_are_repeated_rows():
    rows = np.repeat(np.arange(90), WEIGHTS.astype(int))
    place = np.repeat(np.arange(90), WEIGHTS.astype(int))
    repeated = [tuple(np.flatnonzero(np.isin(place, part)) for part in fold) for fold in FOLDS]
    options = {"candidates": ["elastic_net"], "alphas": 10}
    weighted = elastic_cv(ridge(weights=WEIGHTS), folds=FOLDS, **options)
    plain = elastic_cv(ridge(X[rows], y[rows]), folds=repeated, **options)
    np.testing.assert_allclose(weighted.net.alphas, plain.net.alphas, rtol=1e-10)
    np.testing.assert_allclose(weighted.net.losses, plain.net.losses, rtol=1e-8)
    np.testing.assert_allclose(weighted.coef, plain.coef, rtol=1e-6, atol=1e-9)
    assert weighted.candidates[0].loss == pytest.approx(plain.candidates[0].loss)


def test_order_of_columns_and_scale_of_the_target_do_not_matter(combined):
    order = rng.permutation(20)
    other = elastic_cv(ridge(X[:, order], 1000.0 * y), folds=FOLDS)
    np.testing.assert_allclose(other.coef / 1000.0, combined.coef[order], rtol=1e-3, atol=1e-4)
    assert other.choice.best == combined.choice.best


@pytest.mark.parametrize("size", [1, 60], ids=["one", "wide"])
def test_one_feature_and_more_features_than_rows(size):
    table = np.random.default_rng(1).standard_normal((40, size))
    found = elastic_cv(ridge(table, table[:, 0] + 0.3 * NOISE[:40]), alphas=8)
    assert found.converged
    assert found.coef[0] > 0.5
    assert torch.isfinite(found.coef).all()


def test_constant_columns_and_targets():
    table = np.column_stack([X[:, :3], np.ones(90)])
    assert elastic_cv(ridge(table), folds=FOLDS, alphas=8).coef[3] == 0
    flat = elastic_cv(ridge(table, np.full(90, 7.0)), folds=FOLDS, alphas=8)
    np.testing.assert_allclose(flat.coef, 0.0, atol=1e-10)
    assert flat.intercept == pytest.approx(7.0)
    assert flat.net.alphas.max() < 1e-10


def test_two_classes_take_the_log_loss():
    labels = (X[:, 0] + rng.logistic(size=90) > 1.0) * 2.0 - 1.0
    data = LinearData.of(X, labels)
    criterion = ApproximateLeaveOneOut(data, Logistic(), Penalties.feature(20))
    found = elastic_cv(criterion, folds=FOLDS, l1_ratios=[1.0], alphas=8)
    assert found.candidates[-2].name == "lasso"
    assert 0.1 < found.best.loss < np.log(2.0)


def test_three_classes_are_combined_by_their_log_loss():
    labels = torch.from_numpy(np.digitize(y, [-2.0, 2.0]))
    criterion = KFold(LinearData.of(X, labels), Softmax(), Penalties.scalar(20, 3), FOLDS)
    options = {"candidates": ["ridge", "elastic_net"], "l1_ratios": [1.0], "alphas": 8, "guard": "off"}
    found = elastic_cv(criterion, folds=FOLDS, **options)
    assert found.candidates[1].weight > 0.0
    assert found.coef.shape == found.candidates[1].penalties.shape == (3, 20)
    assert found.best.loss < np.log(3.0)
    weights = [each.weight for each in found.candidates]
    expected = sum(weight * each.fit.coef for weight, each in zip(weights, found.candidates, strict=True))
    np.testing.assert_allclose(found.coef, expected)
    # The weights of an adaptive lasso are those of single coefficients.
    criterion = KFold(LinearData.of(X[:, :4], labels), Softmax(), Penalties.scalar(4, 3), FOLDS)
    options = {"candidates": ["elastic_net", "adaptive_lasso"], "taus": (1.0, 0.1), "alphas": 4}
    factors = elastic_cv(criterion, folds=FOLDS[:2], **options).candidates[1].penalties
    assert factors.unique().numel() == 12


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"candidates": ["lasso"]}, "must be of 'ridge'"),
        ({"candidates": ["ridge"]}, "must hold 'elastic_net'"),
        ({"positive": True}, "ridge regression has negative coefficients"),
        ({"guard": "of"}, "`guard` must be 'auto' or 'off'"),
        ({"l1_ratios": ()}, "`l1_ratios` must hold numbers from 0 to 1"),
        ({"l1_ratios": (2.0,)}, "`l1_ratios` must hold numbers from 0 to 1"),
        ({"l1_ratios": (0.5, np.nan)}, "`l1_ratios` must hold numbers from 0 to 1"),
        ({"l1_ratios": (0.0, 1.0)}, "at an l1_ratio of 0 no penalty"),
        ({"alphas": 0}, "`alphas` must be"),
        ({"alphas": []}, "`alphas` must be"),
        ({"alphas": [0.1, np.inf]}, "`alphas` must be"),
        ({"alphas": [-0.1]}, "`alphas` must be"),
        ({"alphas": 5.5}, "`alphas` must be"),
        ({"eps": 0.0}, "`eps` must be between 0 and 1"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        elastic_cv(ridge(), **options)
