"""What a grid of penalties leaves behind: the attributes and shapes that scikit-learn's classes have."""

import numpy as np
import pytest
from sklearn import linear_model
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from bilevel.sklearn import LogisticRegressionCV, RidgeCV

rng = np.random.default_rng(0)
X = rng.standard_normal((60, 4))
TWO = np.where(X[:, 0] + rng.logistic(size=60) > 0, "yes", "no")
THREE = np.array(["a", "b", "c"])[rng.integers(0, 3, 60)]
Y = np.column_stack([X[:, 0] + rng.standard_normal(60), X[:, 1]])
FOLDS = StratifiedKFold(3)
NAMES = ("Cs_", "scores_", "coefs_paths_", "l1_ratios_", "C_", "l1_ratio_")


def shapes(value):
    return {label: np.shape(each) for label, each in value.items()} if isinstance(value, dict) else np.shape(value)


@pytest.mark.crossed
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("y", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("l1_ratios", [None, (0,)])
@pytest.mark.filterwarnings("ignore:.*l1_ratios=None:FutureWarning", "ignore:.*use_legacy_attributes:FutureWarning")
def test_a_grid_of_logistic_regressions_has_the_shapes_of_scikit_learns(legacy, y, l1_ratios):
    options = {"Cs": [1.0, 0.01, 0.1], "cv": FOLDS, "use_legacy_attributes": legacy, "l1_ratios": l1_ratios}
    ours = LogisticRegressionCV(penalty_structure="scalar", **options).fit(X, y)
    theirs = linear_model.LogisticRegressionCV(scoring="neg_log_loss", **options).fit(X, y)
    for name in NAMES:
        assert shapes(getattr(ours, name)) == shapes(getattr(theirs, name)), name
    np.testing.assert_array_equal(ours.Cs_, theirs.Cs_)


@pytest.mark.parametrize("y", [TWO, THREE], ids=["two", "three"])
def test_scores_and_paths_are_those_of_refits_on_the_folds(y):
    Cs = [1.0, 0.01, 0.1]
    ours = LogisticRegressionCV(Cs=Cs, cv=FOLDS, penalty_structure="scalar", standardize=False).fit(X, y)
    for fold, (train, held) in enumerate(FOLDS.split(X, y)):
        for index, C in enumerate(Cs):
            model = linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=1000).fit(X[train], y[train])
            expected = np.hstack([model.coef_, model.intercept_[:, None]])
            np.testing.assert_allclose(ours.coefs_paths_[fold, 0, index], expected, atol=1e-5)
            score = -log_loss(y[held], model.predict_proba(X[held]))
            np.testing.assert_allclose(ours.scores_[fold, 0, index], score, atol=1e-6)
    assert ours.Cs_[ours.scores_.mean((0, 1)).argmax()] == ours.C_


def test_without_a_grid_or_without_folds_a_sentence_says_what_to_read():
    free = LogisticRegressionCV(penalty_structure="scalar").fit(X, TWO)
    with pytest.raises(AttributeError, match="has no scores_, as there is no grid of Cs: read C_ and tuning_report_"):
        free.scores_  # noqa: B018
    assert not hasattr(free, "Cs_")
    single = LogisticRegressionCV(Cs=3, penalty_structure="scalar").fit(X, TWO)
    np.testing.assert_allclose(single.Cs_, [1e-4, 1.0, 1e4])
    with pytest.raises(AttributeError, match="has no coefs_paths_, as only folds of one penalty leave them"):
        single.coefs_paths_  # noqa: B018
    assert not hasattr(single.set_params(Cs=None).fit(X, TWO), "Cs_")
    nets = LogisticRegressionCV(Cs=2, l1_ratios=[0.5, 1.0], guard="off", penalty_structure="scalar", cv=2).fit(X, TWO)
    np.testing.assert_array_equal(nets.l1_ratios_, [0.5, 1.0])
    assert not hasattr(nets, "scores_")
    with pytest.raises(AttributeError, match="'LogisticRegressionCV' object has no attribute 'nothing'"):
        free.nothing  # noqa: B018


@pytest.mark.parametrize("y", [Y[:, 0], Y[:, :1], Y], ids=["one", "column", "two"])
@pytest.mark.parametrize("weights", [None, np.linspace(0.5, 2.0, 60)], ids=["even", "weighted"])
def test_errors_of_left_out_rows_are_scikit_learns(y, weights):
    alphas = [1.0, 100.0, 0.1]
    ours = RidgeCV(alphas, store_cv_results=True, standardize=False, penalty_structure="scalar")
    ours.fit(X, y, sample_weight=weights)
    theirs = linear_model.RidgeCV(alphas, store_cv_results=True).fit(X, y, sample_weight=weights)
    np.testing.assert_allclose(ours.cv_results_, theirs.cv_results_, rtol=1e-8)
    assert ours.alpha_ == theirs.alpha_
    assert ours.tuning_report_.nodes["penalties"].shape == (1, 1)
    assert len(ours.plot_path().ax_.get_xticklabels()) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "store_cv_results=True stores the squared errors of rows at each of the alphas: give alphas"),
        ({"alphas": [1.0], "scoring": "r2"}, "give alphas, and scoring=None"),
        ({"alphas": [1.0], "cv": 3}, "store_cv_results=True is of exact leave-one-out: leave cv and groups None"),
    ],
)
def test_errors_that_there_are_none_of_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        RidgeCV(store_cv_results=True, penalty_structure="scalar", **options).fit(X, Y[:, 0])
