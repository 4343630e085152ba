"""`ElasticNetCV` and `LassoCV`: numbers beside scikit-learn's, attributes, parameters and refusals."""

import inspect
import warnings

import joblib
import numpy as np
import pytest
import sklearn
from scipy import sparse
from sklearn import linear_model
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring, get_scorer
from sklearn.model_selection import GroupKFold, KFold, TimeSeriesSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bilevel as bl
from bilevel.sklearn import ElasticNetCV, LassoCV, LogisticRegressionCV, RidgeCV

rng = np.random.default_rng(0)
X = rng.standard_normal((100, 25)) * rng.uniform(0.5, 2.0, 25) + 1.0
y = X[:, :3] @ [2.0, -1.0, 1.0] + 1.5 * rng.standard_normal(100)
WEIGHTS = rng.integers(1, 4, 100).astype(float)
PLAIN = {"standardize": False, "cv": KFold(5)}


@pytest.fixture(scope="module")
def fitted():
    return ElasticNetCV().fit(X, y)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("alphas", [12, [0.5, 0.01, 0.1]])
def test_the_elastic_net_alone_is_that_of_scikit_learn(alphas, weights):
    reference = linear_model.ElasticNetCV(l1_ratio=[0.5, 1.0], cv=KFold(5), tol=1e-12, max_iter=50_000)
    with sklearn.config_context(skip_parameter_validation=True):
        name = "alphas" if "n_alphas" not in reference.get_params() or not np.isscalar(alphas) else "n_alphas"
        reference.set_params(**{name: alphas}).fit(X, y, weights)
    model = ElasticNetCV(l1_ratio=[0.5, 1.0], alphas=alphas, candidates=["elastic_net"], **PLAIN).fit(X, y, weights)
    np.testing.assert_allclose(model.mse_path_, reference.mse_path_, rtol=1e-8)
    np.testing.assert_allclose(model.alphas_, reference.alphas_, rtol=1e-10)
    np.testing.assert_allclose(model.coef_, reference.coef_, atol=1e-8)
    assert model.alpha_ == pytest.approx(reference.alpha_)
    assert model.l1_ratio_ == reference.l1_ratio_
    assert model.intercept_ == pytest.approx(reference.intercept_)
    assert abs(model.dual_gap_) < 1e-10
    assert model.weights_ == {"elastic net": 1.0}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_the_lasso_alone_is_that_of_scikit_learn(positive, fit_intercept):
    options = {"positive": positive, "fit_intercept": fit_intercept}
    alphas = [1.0, 0.1, 0.02]
    reference = linear_model.LassoCV(alphas=alphas, cv=KFold(5), tol=1e-12, max_iter=50_000, **options).fit(X, y)
    model = LassoCV(alphas=alphas, candidates=["lasso"], **PLAIN, **options).fit(X, y)
    np.testing.assert_allclose(model.mse_path_, reference.mse_path_, rtol=1e-8)
    np.testing.assert_allclose(model.coef_, reference.coef_, atol=1e-8)
    assert not hasattr(model, "l1_ratio_")
    assert model.n_iter_ >= 1


def test_standardised_columns_are_those_of_a_pipeline_with_a_scaler(fitted):
    scaled = linear_model.ElasticNet(alpha=fitted.alpha_, l1_ratio=fitted.l1_ratio_, tol=1e-10, max_iter=50_000)
    reference = make_pipeline(StandardScaler(), scaled).fit(X, y)
    model = ElasticNetCV(candidates=["elastic_net"]).fit(X, y)
    assert model.alpha_ == fitted.alpha_
    np.testing.assert_allclose(model.predict(X), reference.predict(X), rtol=1e-6)


def test_results_are_candidate_by_candidate(fitted):
    results = fitted.cv_results_
    assert all(len(each) == len(results["candidate"]) for each in results.values())
    assert fitted.weights_ == dict(zip(results["candidate"], results["weight"], strict=True))
    np.testing.assert_allclose(results["gain"], results["loss"][0] - results["loss"])
    np.testing.assert_allclose(results["gate"][1:], results["gain"][1:] / results["gain_error"][1:])
    at = list(results["candidate"]).index("elastic net")
    assert results["loss"][at] == pytest.approx(fitted.mse_path_.mean(-1).min(), rel=0.05)
    np.testing.assert_array_equal(results["penalties"][at], np.full(25, fitted.alpha_))
    assert results["l1_ratio"][at] == fitted.l1_ratio_
    np.testing.assert_array_equal(fitted.penalties_, results["penalties"][results["chosen"]][0])
    report = fitted.tuning_report_
    assert report.survived
    assert report.one_penalty_loss == results["loss"][0]
    assert report.tuned_loss == results["loss"].min()
    assert report.n_candidates == len(results["candidate"])
    assert f"{report.n_candidates} candidates" in str(report)
    assert f"<- {max(fitted.weights_.values()):.0%}" in str(report)
    assert f"{report.tuned_loss:.5g}" in report.summary


def test_the_lasso_has_exact_zeros_and_one_candidate():
    model = LassoCV().fit(X, y)
    assert 0 < (model.coef_ == 0).sum() < 25
    assert sorted(model.weights_.values()) == [0.0, 1.0]
    assert list(model.weights_) == ["lasso", "adaptive lasso"]


def test_the_report_says_what_judged_and_what_was_solved():
    lasso = LassoCV(candidates=["lasso"], alphas=[1.0], cv=4).fit(X, y)
    first, *_, cost = str(lasso.tuning_report_).splitlines()
    assert first == "LassoCV: 1 candidate, judged by 4 held-out folds"
    assert cost.startswith("Cost: 5 elastic nets, ")
    both = ElasticNetCV(candidates=["ridge", "elastic_net"], alphas=[1.0], l1_ratio=1.0).fit(X, y)
    first, *_, cost = str(both.tuning_report_).splitlines()
    ridge = "; ridge penalties by exact leave-one-out (mean squared error)"
    assert first == "ElasticNetCV: 2 candidates, judged by 5 held-out folds" + ridge
    assert cost.startswith(f"Cost: {both.tuning_report_.n_evaluations} evaluations of the criterion, 6 elastic nets, ")


@pytest.mark.parametrize("scoring", ["neg_mean_absolute_error", "r2"])
def test_a_scorer_chooses_among_candidates(scoring):
    options = {"scoring": scoring, "cv": KFold(5), "standardize": False}
    net = ElasticNetCV(l1_ratio=0.7, alphas=[0.1], candidates=["ridge", "elastic_net"], **options).fit(X, y, WEIGHTS)
    alone = linear_model.ElasticNet(alpha=0.1, l1_ratio=0.7, tol=1e-10)
    scorer, scores = check_scoring(alone, scoring=scoring), []
    for train, held in KFold(5).split(X):
        alone.fit(X[train], y[train], WEIGHTS[train])
        scores.append(scorer(alone, X[held], y[held], sample_weight=WEIGHTS[held]))
    results = net.cv_results_
    assert results["loss"][1] == pytest.approx(-np.mean(scores))
    ridge = RidgeCV(cv=KFold(5), scoring=scoring, standardize=False, criterion="loo").fit(X, y, WEIGHTS)
    assert results["loss"][0] == pytest.approx(ridge.cv_results_["loss"][0], rel=1e-3)
    assert sorted(results["weight"]) == [0.0, 1.0]
    assert net.tuning_report_.loss_name == f"minus {scoring}"
    assert f"{-results['loss'][0]:.5g}" in net.tuning_report_.summary
    assert scoring in net.tuning_report_.summary


def test_a_scorer_chooses_among_candidates_of_classes():
    labels = np.digitize(y, [0.0, 3.0])
    options = {"l1_ratios": [1.0], "Cs": [0.1, 1.0], "penalty_structure": "scalar", "cv": 3}
    for target in (labels, labels > 0):
        model = LogisticRegressionCV(scoring="accuracy", **options).fit(X, target)
        losses = model.cv_results_["loss"]
        assert ((losses < -0.4) & (losses >= -1.0)).all()
        assert sorted(model.weights_.values()) == [0.0, 1.0]
        assert "accuracy" in model.tuning_report_.summary


def test_a_scorer_without_a_value_keeps_the_first_candidate():
    def broken(model, X, y):
        return np.nan

    with pytest.warns(bl.BilevelWarning, match="is not finite on fold 1, 2, 3 of the outer loop, so the lasso is kept"):
        model = LassoCV(alphas=8, cv=3, scoring=broken).fit(X, y)
    assert model.weights_["lasso"] == 1.0
    assert "broken is not finite" in model.tuning_report_.summary


def test_a_scorer_takes_metadata_where_it_asks_for_some():
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = get_scorer("neg_mean_absolute_error").set_score_request(sample_weight=True)
        model = LassoCV(alphas=4, cv=3, scoring=scorer).set_fit_request(sample_weight=True)
        model.fit(X, y, sample_weight=WEIGHTS)
    plain = LassoCV(alphas=4, cv=3, scoring="neg_mean_absolute_error").fit(X, y, WEIGHTS)
    np.testing.assert_allclose(model.cv_results_["loss"], plain.cv_results_["loss"])


def test_evidence_has_the_unit_of_ridge_regression():
    net = ElasticNetCV(criterion="evidence", candidates=["ridge", "elastic_net"], alphas=3, tol=1e-8).fit(X, y)
    ridge = RidgeCV(criterion="evidence", penalty_structure="scalar", tol=1e-8).fit(X, y)
    assert net.cv_results_["criterion"][0] == pytest.approx(ridge.cv_results_["criterion"][0], rel=1e-4)
    assert net.tuning_report_.criterion_name == ridge.tuning_report_.criterion_name == "minus log evidence of a row"


def test_cs_keep_their_order_and_digits_with_l1_ratios():
    Cs = [0.3, 0.1, 7.0]
    model = LogisticRegressionCV(penalty="l1", Cs=Cs, penalty_structure="scalar").fit(X, y > 0, WEIGHTS)
    assert model.Cs_.tolist() == Cs
    assert model.C_ in Cs


def test_max_iter_has_its_say_with_l1_ratios():
    options = {"penalty": "l1", "Cs": [1.0], "candidates": ["ridge", "elastic_net"]}
    with pytest.warns(ConvergenceWarning, match="max_iter=1"):
        LogisticRegressionCV(max_iter=1, tol=1e-12, **options).fit(X, y > 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LogisticRegressionCV(**options).fit(X, y > 0)


@pytest.mark.parametrize("wrong", [{"guard": "best"}, {"guard": "one_se"}, {"groups": np.zeros(25)}])
def test_what_has_no_say_with_l1_ratios_is_refused(wrong):
    with pytest.raises(ValueError, match="with l1_ratios, guard is 'auto' or 'off', and groups"):
        LogisticRegressionCV(l1_ratios=[1.0], **wrong).fit(X, y > 0)


def test_figures_name_the_candidates(fitted):
    pytest.importorskip("matplotlib").use("agg")
    labels = [each.get_text() for each in fitted.plot_path().ax_.get_xticklabels()]
    assert labels == list(fitted.cv_results_["candidate"])
    assert len(fitted.plot_penalties().points_) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_and_sparse_inputs(dtype):
    table = np.where(X > 1.0, X, 0.0).astype(dtype)
    dense = ElasticNetCV(alphas=8).fit(table, y)
    assert dense.coef_.dtype == dtype
    for form in (sparse.csr_matrix, sparse.csc_array):
        model = ElasticNetCV(alphas=8, standardize=True).fit(form(table), y)
        np.testing.assert_allclose(model.coef_, dense.coef_, atol=1e-4)
        assert "columns of sparse X" not in str(model.tuning_report_)
    auto = LassoCV(alphas=8, candidates=["lasso"]).fit(sparse.csr_array(table), y)
    assert "columns of sparse X are left as they are; standardize=True scales them" in str(auto.tuning_report_)


@pytest.mark.parametrize("cv", [3, TimeSeriesSplit(3), GroupKFold(3), [(np.arange(60), np.arange(60, 100))]])
def test_folds_of_any_kind(cv):
    groups = {"groups": np.repeat(np.arange(10), 10)} if isinstance(cv, GroupKFold) else {}
    model = ElasticNetCV(cv=cv, alphas=8).fit(X, y, **groups)
    assert model.score(X, y) > 0.5
    np.testing.assert_array_equal(clone(model).fit(X, y, **groups).coef_, model.coef_)


def test_it_is_one_of_scikit_learns(fitted, tmp_path):
    for ours, theirs in ((ElasticNetCV, linear_model.ElasticNetCV), (LassoCV, linear_model.LassoCV)):
        assert issubclass(ours, theirs)
        assert set(inspect.signature(theirs).parameters) <= set(inspect.signature(ours).parameters)
    path = tmp_path / "model.joblib"
    joblib.dump(fitted, path)
    np.testing.assert_array_equal(joblib.load(path).predict(X), fitted.predict(X))
    assert cross_val_score(make_pipeline(StandardScaler(), LassoCV(alphas=8)), X, y, cv=2).mean() > 0.5
    with sklearn.config_context(enable_metadata_routing=True):
        model = ElasticNetCV(cv=GroupKFold(3), alphas=8).set_fit_request(sample_weight=True)
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), model)
        assert pipeline.fit(X, y, sample_weight=WEIGHTS, groups=np.repeat(np.arange(10), 10)).score(X, y) > 0.5
    with joblib.parallel_backend("threading"):
        again = ElasticNetCV(n_jobs=2, n_alphas=8).fit(X, y)
    np.testing.assert_allclose(again.coef_, ElasticNetCV(alphas=8).fit(X, y).coef_)


def test_too_few_rounds_are_warned_of():
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        LassoCV(max_iter=1, alphas=3).fit(X, y)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (ElasticNetCV(l1_ratio=[0.5, 1.5]), r"l1_ratio\[1\] == 1.5, must be <= 1.0"),
        (ElasticNetCV(l1_ratio=2.0), "The 'l1_ratio' parameter of ElasticNetCV"),
        (ElasticNetCV(l1_ratio=[]), "l1_ratio must hold at least one number"),
        (ElasticNetCV(l1_ratio=[0.0, 0.5]), "not supported for l1_ratio=0"),
        (ElasticNetCV(alphas=[0.1, -1.0]), r"alphas\[1\] == -1.0, must be >= 0.0"),
        (ElasticNetCV(alphas=[]), "alphas must hold at least one number"),
        (LassoCV(alphas=[0.1, np.inf]), r"alphas\[1\] == inf, must be finite"),
        (LassoCV(alphas=[np.nan]), r"alphas\[0\] == nan, must be finite"),
        (ElasticNetCV(l1_ratio=[0.5, np.nan]), r"l1_ratio\[1\] == nan, must be finite"),
        (ElasticNetCV(eps=0), "The 'eps' parameter of ElasticNetCV"),
        (ElasticNetCV(candidates=["ridge"]), "candidates must be of .* with 'elastic_net' among them"),
        (LassoCV(candidates=["adaptive_lasso"]), "candidates must be of .* with 'lasso' among them"),
        (ElasticNetCV(positive=True, candidates=["ridge", "elastic_net"]), "negative coefficients"),
        (LassoCV(criterion="neg_log_loss"), "is a scorer"),
        (LassoCV(guard="best"), "The 'guard' parameter of LassoCV"),
    ],
)
def test_refusals(model, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.fit(X, y)


def test_several_targets_are_refused():
    with pytest.raises(ValueError, match="use MultiTaskElasticNetCV"):
        ElasticNetCV().fit(X, np.column_stack([y, y]))
