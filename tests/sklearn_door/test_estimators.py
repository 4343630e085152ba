"""The estimators' numbers beside those of scikit-learn, at the penalties that were found, and their attributes."""

import numpy as np
import pytest
from scipy import sparse
from sklearn import clone, linear_model
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import LogisticRegressionCV, RidgeCV

rng = np.random.default_rng(0)
X = rng.standard_normal((90, 6)) * [1.0, 2.0, 5.0, 1.0, 0.1, 1.0] + 3.0
Z = StandardScaler().fit_transform(X)
SIGNAL = Z @ [2.0, -1.0, 0.0, 0.5, 0.0, 0.3]
y = SIGNAL + rng.standard_normal(90)
LABELS = np.array(["no", "yes"])[(SIGNAL + rng.logistic(size=90) > 0).astype(int)]
WEIGHTS = rng.integers(1, 4, 90).astype(float)
SPECIES = np.array(["a", "b", "c"])[np.digitize(SIGNAL + rng.logistic(size=90), [-1.0, 1.0])]
WIDE = rng.standard_normal((120, 40))
FEW = WIDE[:, :4] @ [1.0, -1.0, 1.0, -1.0] + rng.standard_normal(120)


def weighted_scaler(weights):
    return StandardScaler().fit(X, sample_weight=weights)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_one_ridge_penalty_is_the_alpha_of_scikit_learn(fit_intercept, weights):
    model = RidgeCV(penalty_structure="scalar", standardize=False, fit_intercept=fit_intercept).fit(X, y, weights)
    reference = linear_model.Ridge(model.alpha_, fit_intercept=fit_intercept).fit(X, y, weights)
    np.testing.assert_allclose(model.coef_, reference.coef_, rtol=1e-8)
    np.testing.assert_allclose(model.intercept_, reference.intercept_, rtol=1e-8, atol=1e-12)
    assert isinstance(model.alpha_, float)


def test_standardised_columns_are_those_of_a_pipeline_with_a_scaler():
    model = RidgeCV(penalty_structure="scalar").fit(X, y, WEIGHTS)
    scaler = weighted_scaler(WEIGHTS)
    reference = linear_model.Ridge(model.alpha_).fit(scaler.transform(X), y, WEIGHTS)
    np.testing.assert_allclose(model.predict(X), reference.predict(scaler.transform(X)), rtol=1e-8)
    np.testing.assert_allclose(model.penalties_, np.full(6, model.alpha_))


def test_one_penalty_is_at_least_as_good_as_the_best_of_a_hundred():
    grid = linear_model.RidgeCV(np.logspace(-3, 4, 100)).fit(Z, y)
    model = RidgeCV(penalty_structure="scalar").fit(X, y)
    assert model.best_score_ >= grid.best_score_
    assert model.tuning_report_.n_evaluations < 40


def test_penalties_of_each_feature_are_kept_where_few_features_matter():
    model = RidgeCV().fit(WIDE, FEW)
    report = model.tuning_report_
    assert report.survived
    assert report.tuned_loss < report.one_penalty_loss
    assert model.alpha_.shape == model.penalties_.shape == (40,)
    assert model.penalties_[:4].max() < np.median(model.penalties_[4:])
    np.testing.assert_allclose(model.alpha_, model.cv_results_["penalties"][model.cv_results_["chosen"]][0])
    # At these penalties ridge regression has a closed form.
    T = StandardScaler().fit_transform(WIDE)
    expected = np.linalg.solve(T.T @ T + np.diag(model.alpha_), T.T @ (FEW - FEW.mean()))
    np.testing.assert_allclose(model.coef_ * WIDE.std(0), expected, rtol=1e-8)


def test_one_penalty_is_kept_where_the_gain_is_not_proved():
    noise = np.random.default_rng(1).standard_normal(90)
    model = RidgeCV().fit(X, noise)
    assert not model.tuning_report_.survived
    assert isinstance(model.alpha_, float)
    scalar = RidgeCV(penalty_structure="scalar").fit(X, noise)
    np.testing.assert_allclose(model.coef_, scalar.coef_)


def test_groups_share_a_penalty():
    groups = ["few"] * 4 + ["none"] * 36
    model = RidgeCV(penalty_structure="group", groups=groups).fit(WIDE, FEW)
    assert model.tuning_report_.n_penalties == 2
    few, none = model.alpha_
    assert 10.0 * few < none
    np.testing.assert_allclose(model.penalties_, np.where(np.array(groups) == "few", few, none))


def test_cv_results_are_node_by_node():
    model = RidgeCV().fit(WIDE, FEW)
    results = model.cv_results_
    nodes = len(results["tau"])
    assert np.isinf(results["tau"][0])
    assert all(len(each) == nodes for each in results.values())
    np.testing.assert_allclose(results["gain"], results["loss"][0] - results["loss"])
    np.testing.assert_allclose(results["gate"][1:], results["gain"][1:] / results["gain_error"][1:])
    assert results["chosen"].sum() == 1
    assert model.best_score_ == -results["loss"][results["chosen"]][0]
    assert model.n_iter_ >= nodes


def test_losses_are_mean_squared_errors():
    noise = np.random.default_rng(2).standard_normal((400, 1))
    report = RidgeCV(penalty_structure="scalar").fit(noise, 3.0 * noise[:, 0] + 2.0 * noise[::-1, 0]).cv_results_
    assert report["criterion"][0] == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("per_target", [False, True])
def test_several_targets(per_target):
    Y = np.column_stack([y, -2.0 * y + X[:, 4], rng.standard_normal(90)])
    model = RidgeCV(penalty_structure="scalar", alpha_per_target=per_target, guard="off").fit(X, Y)
    assert model.coef_.shape == (3, 6)
    assert model.intercept_.shape == (3,)
    assert model.predict(X).shape == Y.shape
    reference = linear_model.Ridge(model.alpha_).fit(Z, Y)
    np.testing.assert_allclose(model.predict(X), reference.predict(Z), rtol=1e-7)
    assert np.shape(model.alpha_) == ((3,) if per_target else ())
    if per_target:
        grid = np.array([10.0, 0.1, 1000.0])
        options = {"alphas": grid, "alpha_per_target": True}
        theirs = linear_model.RidgeCV(**options).fit(Z, Y)
        alike = (Z @ np.ones((6, 1))) * [1.0, 0.1, 0.0] + rng.standard_normal(Y.shape)  # no gate opens
        model = RidgeCV(alpha_per_target=True).fit(X, alike)
        assert model.alpha_.shape == (3,)
        assert "every target has the one penalty" in str(model.tuning_report_)
        model = RidgeCV(**options, penalty_structure="scalar").fit(X, Y)
        np.testing.assert_array_equal(model.alpha_, theirs.alpha_)
        np.testing.assert_allclose(model.best_score_, theirs.best_score_)
        np.testing.assert_allclose(model.predict(X), theirs.predict(Z))
    column = RidgeCV(penalty_structure="scalar").fit(X, y[:, None])
    theirs = linear_model.RidgeCV().fit(X, y[:, None])
    for read in (lambda model: model.coef_, lambda model: model.intercept_, lambda model: model.predict(X)):
        assert read(column).shape == read(theirs).shape
    bare = RidgeCV(fit_intercept=False, guard="off", scoring="r2")
    with pytest.warns(UserWarning, match="has no say"):
        bare.fit(X, y[:, None])
    assert bare.intercept_ == 0.0
    assert bare.predict(X).shape == (90,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_coefficients_have_the_dtype_of_the_inputs(dtype):
    ridge = RidgeCV(penalty_structure="scalar").fit(X.astype(dtype), y.astype(dtype))
    logistic = LogisticRegressionCV(penalty_structure="scalar").fit(X.astype(dtype), LABELS)
    assert ridge.coef_.dtype == logistic.coef_.dtype == dtype
    assert ridge.predict(X.astype(dtype)).dtype == logistic.predict_proba(X.astype(dtype)).dtype == dtype
    np.testing.assert_allclose(ridge.coef_, RidgeCV(penalty_structure="scalar").fit(X, y).coef_, rtol=1e-3)


def test_sparse_inputs_give_the_same_model():
    dense = np.where(rng.random((90, 6)) < 0.6, 0.0, X)
    logistic = LogisticRegressionCV(guard="off", standardize=True)
    for estimator, target in ((RidgeCV(standardize=True), y), (logistic, LABELS)):
        model = estimator.fit(dense, target)
        coef = model.coef_.copy()
        np.testing.assert_allclose(estimator.fit(sparse.csr_matrix(dense), target).coef_, coef, rtol=1e-6)
        np.testing.assert_array_equal(
            estimator.predict(sparse.csr_array(dense)), estimator.predict(sparse.csc_array(dense))
        )


@pytest.mark.parametrize("estimator", [RidgeCV, LogisticRegressionCV])
def test_columns_of_dense_inputs_are_standardised_and_those_of_sparse_ones_are_not(estimator):
    dense = np.where(rng.random((90, 6)) < 0.6, 0.0, X) * [1.0, 9.0, 1.0, 0.1, 1.0, 1.0]
    target = LABELS if estimator is LogisticRegressionCV else y
    for table, standardize in ((dense, True), (sparse.csr_array(dense), False)):
        auto = estimator(penalty_structure="scalar").fit(table, target)
        asked = estimator(penalty_structure="scalar", standardize=standardize).fit(table, target)
        other = estimator(penalty_structure="scalar", standardize=not standardize).fit(table, target)
        np.testing.assert_array_equal(auto.coef_, asked.coef_)
        said = [model for model in (auto, asked, other) if "columns of sparse X" in str(model.tuning_report_)]
        assert said == ([] if standardize else [auto])
        assert not np.allclose(auto.coef_, other.coef_, rtol=1e-3)


def test_a_device_takes_dense_and_sparse_inputs():
    table = sparse.csr_array(np.where(X > 3.0, X, 0.0))
    for given in (X, table):
        there, here = (RidgeCV(penalty_structure="scalar", device=device).fit(given, y) for device in ("cpu", None))
        np.testing.assert_allclose(there.coef_, here.coef_)


def test_more_features_than_rows():
    model = RidgeCV().fit(WIDE[:25], FEW[:25])
    assert np.isfinite(model.coef_).all()
    classes = LogisticRegressionCV(penalty_structure="scalar").fit(WIDE[:30], FEW[:30] > 0)
    assert classes.score(WIDE[:30], FEW[:30] > 0) > 0.6


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("Cs", [None, [0.05, 0.3, 2.0]], ids=["grid", "given"])
def test_elastic_nets_of_two_classes_are_combined(Cs, weights):
    model = LogisticRegressionCV(Cs=Cs, l1_ratios=[0.0, 1.0], guard="off").fit(X, LABELS, weights)
    results = model.cv_results_
    assert list(results["candidate"][-2:]) == ["lasso", "adaptive lasso"]
    assert sum(model.weights_.values()) == pytest.approx(1.0)
    assert model.tuning_report_.n_candidates == len(model.weights_)
    assert model.tuning_report_.tuned_loss == results["loss"][1:].min()
    assert 0.0 < model.tuning_report_.tuned_loss < np.log(2.0)
    assert model.penalties_.shape == model.coef_.shape == (1, 6)
    assert Cs is None or np.isclose(Cs, model.C_).any()
    # The lasso beside ridge regression is scikit-learn's, at its C.
    options = {"candidates": ["ridge", "elastic_net"], "guard": "off"}
    alone = LogisticRegressionCV(Cs=[model.C_], penalty="l1", **options).fit(X, LABELS, weights)
    scaler = weighted_scaler(weights)
    reference = linear_model.LogisticRegression(C=model.C_, l1_ratio=1.0, solver="saga", tol=1e-8, max_iter=20_000)
    reference.fit(scaler.transform(X), LABELS, weights)
    share = alone.weights_["lasso"]
    ridge = LogisticRegressionCV(penalty_structure="scalar").fit(X, LABELS, weights).coef_
    np.testing.assert_allclose(alone.coef_, share * reference.coef_ / scaler.scale_ + (1 - share) * ridge, atol=1e-4)
    assert alone.l1_ratio_ == 1.0


def test_elastic_nets_of_several_classes_are_those_of_scikit_learn():
    model = LogisticRegressionCV(Cs=[0.5], l1_ratios=[0.7], use_legacy_attributes=True, class_weight="balanced")
    model.fit(X, SPECIES, WEIGHTS)
    assert model.coef_.shape == model.penalties_.shape == (3, 6)
    assert model.C_.tolist() == [0.5] * 3
    assert model.l1_ratio_.tolist() == [0.7] * 3
    sizes = dict(zip(*np.unique(np.repeat(SPECIES, WEIGHTS.astype(int)), return_counts=True), strict=True))
    per_row = WEIGHTS * [WEIGHTS.sum() / (3 * sizes[each]) for each in SPECIES]
    scaler = weighted_scaler(per_row)
    reference = linear_model.LogisticRegression(C=0.5, l1_ratio=0.7, solver="saga", tol=1e-10, max_iter=20_000)
    reference.fit(scaler.transform(X), SPECIES, per_row)
    assert model.weights_ == {"elastic net": 1.0}  # one C and one l1_ratio leave nothing to choose
    np.testing.assert_allclose(model.coef_, reference.coef_ / scaler.scale_, atol=1e-6)
    both = clone(model).set_params(l1_ratios=[0.0, 0.7], candidates=["elastic_net"]).fit(X, SPECIES, WEIGHTS)
    assert both.l1_ratios_.tolist() == [0.0, 0.7]
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1.0)
    alike = model.set_params(use_legacy_attributes=False, standardize=True).fit(sparse.csr_array(X), SPECIES, WEIGHTS)
    np.testing.assert_allclose(alike.coef_, model.coef_, rtol=1e-6)
    assert model.tuning_report_.n_penalties == 6


@pytest.mark.parametrize("class_weight", [None, "balanced", {"no": 2.0}])
def test_one_logistic_penalty_is_the_c_of_scikit_learn(class_weight):
    model = LogisticRegressionCV(penalty_structure="scalar", standardize=False, class_weight=class_weight)
    model.fit(X, LABELS, WEIGHTS)
    reference = linear_model.LogisticRegression(C=model.C_, class_weight=class_weight, tol=1e-12, max_iter=20000)
    reference.fit(X, LABELS, WEIGHTS)
    np.testing.assert_allclose(model.coef_, reference.coef_, rtol=1e-3)
    np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(X), atol=1e-4)
    assert model.classes_.tolist() == ["no", "yes"]
    assert isinstance(model.C_, float)


def test_several_classes_are_multinomial():
    model = LogisticRegressionCV(penalty_structure="scalar").fit(X, SPECIES)
    reference = linear_model.LogisticRegression(C=model.C_, tol=1e-12, max_iter=20000).fit(Z, SPECIES)
    np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(Z), atol=1e-4)
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1.0)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(model.predict_proba(X)))
    assert model.coef_.shape == (3, 6)
    assert set(model.predict(X)) <= set(SPECIES)


@pytest.mark.parametrize("structure", ["class", "class_feature"])
def test_classes_may_have_penalties_of_their_own(structure):
    model = LogisticRegressionCV(penalty_structure=structure, guard="off").fit(X, SPECIES)
    assert model.C_.shape == ((3,) if structure == "class" else (3, 6))
    np.testing.assert_allclose(1.0 / np.broadcast_to(model.C_.reshape(3, -1), (3, 6)), model.penalties_)


@pytest.mark.parametrize("labels", [LABELS, LABELS == "yes", np.where(LABELS == "yes", 7, -3), LABELS.astype(object)])
def test_labels_of_any_type(labels):
    model = LogisticRegressionCV(penalty_structure="scalar").fit(X, labels)
    assert model.predict(X).dtype == labels.dtype
    assert model.score(X, labels) > 0.7


def test_scores_are_those_of_scikit_learn():
    model = RidgeCV(penalty_structure="scalar").fit(X, y)
    assert model.score(X, y) == pytest.approx(1.0 - mean_squared_error(y, model.predict(X)) / y.var())
    classes = LogisticRegressionCV(penalty_structure="scalar", scoring="neg_log_loss").fit(X, LABELS)
    assert classes.score(X, LABELS) == pytest.approx(-log_loss(LABELS, classes.predict_proba(X)))
    assert LogisticRegressionCV(penalty_structure="scalar").fit(X, LABELS).score(X, LABELS) < 1.0


def test_candidates_are_what_the_one_penalty_is_chosen_from():
    alphas = np.logspace(-3, 4, 15)
    model = RidgeCV(alphas, penalty_structure="scalar").fit(X, y)
    reference = linear_model.RidgeCV(alphas).fit(Z, y)
    assert model.alpha_ == pytest.approx(reference.alpha_)
    assert model.best_score_ == pytest.approx(reference.best_score_)
    assert RidgeCV(5.0, penalty_structure="scalar").fit(X, y, WEIGHTS).alpha_ == pytest.approx(5.0)
    for Cs in (5, np.logspace(-4, 4, 5)):
        classes = LogisticRegressionCV(Cs=Cs, penalty_structure="scalar").fit(X, LABELS)
        assert np.isclose(classes.C_, np.logspace(-4, 4, 5)).any()
    tuned = RidgeCV(alphas).fit(WIDE, FEW)
    assert np.isclose(tuned.cv_results_["penalties"][0, 0], alphas).any()
    assert tuned.alpha_.shape == (40,)


def test_a_score_chooses_among_the_nodes():
    model = RidgeCV(scoring="neg_mean_absolute_error", cv=5).fit(WIDE, FEW)
    assert 0.7 < model.cv_results_["loss"][0] < 1.5
    assert model.best_score_ == -model.cv_results_["loss"][model.cv_results_["chosen"]][0]
    classes = LogisticRegressionCV(scoring="accuracy").fit(X[:, :3], LABELS, WEIGHTS)
    assert -1.0 <= classes.cv_results_["loss"][0] <= -0.5
    # One weight for all rows is that of each.
    one = RidgeCV(scoring="r2").fit(X, y, 2.0)
    np.testing.assert_array_equal(one.alpha_, RidgeCV(scoring="r2").fit(X, y, np.full(90, 2.0)).alpha_)


def test_a_warm_start_takes_fewer_evaluations():
    model = RidgeCV(penalty_structure="scalar", warm_start=True).fit(X, y)
    first, score = model.n_iter_, model.best_score_
    assert model.fit(X, y).n_iter_ < first
    assert model.best_score_ == pytest.approx(score, rel=1e-5)


def test_progress_is_one_line(capfd):
    RidgeCV(verbose=1).fit(X, y)
    assert "outer loop: " in capfd.readouterr().err
    RidgeCV().fit(X, y)
    assert capfd.readouterr().err == ""


def test_one_penalty_is_proved_the_best_of_a_range():
    model = RidgeCV(penalty_structure="scalar", certify=1e-4).fit(X, y, WEIGHTS)
    certificate = model.certificate_
    assert certificate.holds
    assert certificate.penalty == pytest.approx(model.alpha_, rel=0.05)
    assert certificate.lower <= -model.best_score_ <= certificate.lower * 1.001
    # So have all of a grid, whose penalties are those of the given weights.
    for alpha in np.logspace(-3, 4, 8):
        assert -RidgeCV(alpha, penalty_structure="scalar").fit(X, y, WEIGHTS).best_score_ >= certificate.lower
    assert not hasattr(RidgeCV(penalty_structure="scalar").fit(X, y), "certificate_")
    # It is of the penalty that was returned, not of a better one that was no candidate.
    poor = RidgeCV([1e4], penalty_structure="scalar", certify=1e-4).fit(X, y, WEIGHTS)
    assert not poor.certificate_.holds
    assert poor.certificate_.penalty == pytest.approx(poor.alpha_)
    assert poor.certificate_.value == pytest.approx(-poor.best_score_)


def test_folds_may_be_masks_of_rows():
    held = np.arange(90) % 3 == np.arange(3)[:, None]
    masks = RidgeCV(penalty_structure="scalar", cv=[(~part, part) for part in held]).fit(X, y)
    indices = RidgeCV(cv=[(np.flatnonzero(~part), np.flatnonzero(part)) for part in held], penalty_structure="scalar")
    assert masks.alpha_ == indices.fit(X, y).alpha_


@pytest.mark.parametrize("estimator", [RidgeCV(), LogisticRegressionCV()])
def test_penalties_are_shaped_as_coefficients(estimator):
    estimator.set_params(guard="off").fit(X, LABELS if hasattr(estimator, "class_weight") else y[:, None])
    assert (
        estimator.penalties_.shape == estimator.coef_.shape == ((1, 6) if hasattr(estimator, "class_weight") else (6,))
    )


@pytest.mark.parametrize("criterion", ["auto", "loo", "kfold", "holdout", "evidence"])
def test_any_criterion_of_the_library(criterion):
    cv = [(np.arange(60), np.arange(60, 90))] if criterion == "holdout" else None
    model = RidgeCV(penalty_structure="scalar", criterion=criterion, cv=cv).fit(X, y)
    assert model.score(X, y) > 0.5
    assert "tuned by" in str(model.tuning_report_)
    assert f'"{criterion}"' in str(RidgeCV.__doc__)
