"""The estimators among scikit-learn's other parts: pipelines, routing, cloning, files, output, HTML."""

import subprocess
import sys

import joblib
import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    ShuffleSplit,
    TimeSeriesSplit,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.metadata_routing import get_routing_for_object

from bilevel.sklearn import LogisticRegressionCV, RidgeCV

rng = np.random.default_rng(0)
X = rng.standard_normal((60, 4))
y = X[:, 0] - X[:, 1] + rng.standard_normal(60)
LABELS = np.where(y > 0, "yes", "no")
GROUPS = np.repeat(np.arange(12), 5)
TABLE = np.column_stack([X.astype(object), rng.choice(["red", "blue"], 60)])


@pytest.fixture(scope="module")
def fitted():
    return RidgeCV().fit(X, y)


def columns():
    return ColumnTransformer([("numbers", StandardScaler(), [0, 1, 2, 3]), ("colour", OneHotEncoder(), [4])])


def test_pipelines_with_column_transformers_and_scores_around_them():
    regression = make_pipeline(columns(), RidgeCV())
    scores = cross_val_score(regression, TABLE, y, cv=3)
    assert scores.mean() > 0.2
    classification = make_pipeline(columns(), LogisticRegressionCV(penalty_structure="scalar"))
    assert cross_val_score(classification, TABLE, LABELS, cv=3, scoring="neg_log_loss").mean() > -np.log(2)
    probabilities = cross_val_predict(classification, TABLE, LABELS, cv=3, method="predict_proba")
    assert probabilities.shape == (60, 2)


def test_a_grid_search_chooses_a_structure():
    search = GridSearchCV(RidgeCV(guard="off"), {"penalty_structure": ["scalar", "feature"]}, cv=2).fit(X, y)
    assert search.best_params_["penalty_structure"] in ("scalar", "feature")


def test_a_clone_has_the_parameters_and_no_fit(fitted):
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "coef_")
    assert "penalty_structure='scalar'" in repr(RidgeCV(penalty_structure="scalar"))


def test_a_file_predicts_the_same_in_a_fresh_process(fitted, tmp_path):
    joblib.dump(fitted, tmp_path / "model.joblib")
    np.save(tmp_path / "X.npy", X)
    code = (
        "import joblib, numpy as np, sys; model = joblib.load('model.joblib')\n"
        "np.save('z.npy', model.predict(np.load('X.npy'))); str(model.tuning_report_); assert 'torch' not in dir()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), fitted.predict(X))


@pytest.mark.parametrize(
    "cv",
    [2, KFold(3), TimeSeriesSplit(3), ShuffleSplit(3, test_size=0.3, random_state=0), list(KFold(3).split(X))],
    ids=lambda cv: type(cv).__name__,
)
def test_folds_of_any_kind(cv):
    model = RidgeCV(cv=cv).fit(X, y)
    assert model.score(X, y) > 0.3
    np.testing.assert_array_equal(clone(model).fit(X, y).coef_, model.coef_)


def test_groups_of_rows_reach_the_splitter_with_and_without_routing():
    plain = RidgeCV(cv=GroupKFold(3)).fit(X, y, groups=GROUPS)
    pairs = RidgeCV(cv=list(GroupKFold(3).split(X, y, GROUPS))).fit(X, y)
    np.testing.assert_allclose(plain.coef_, pairs.coef_)
    with sklearn.config_context(enable_metadata_routing=True):
        model = RidgeCV(cv=GroupKFold(3)).set_fit_request(sample_weight=True)
        routed = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), model)
        routed.fit(X, y, groups=GROUPS, sample_weight=np.ones(60))
        np.testing.assert_allclose(routed[-1].predict(routed[0].transform(X)), plain.predict(X), rtol=1e-6)
        assert "splitter" in str(get_routing_for_object(model))
    # Without a splitter of groups, whole groups are held out.
    assert RidgeCV().fit(X, y, groups=GROUPS).tuning_report_.honest == "nested"


def test_validation_can_be_switched_off():
    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):
        assert RidgeCV(penalty_structure="scalar", fit_intercept=1).fit(X, y).score(X, y) > 0.3


def test_html_and_tags(fitted):
    assert "RidgeCV" in fitted._repr_html_()
    tags = fitted.__sklearn_tags__()
    assert tags.input_tags.sparse
    assert tags.target_tags.multi_output
    assert not tags.array_api_support
    assert isinstance(fitted, sklearn.linear_model.RidgeCV)
    assert LogisticRegressionCV().__sklearn_tags__().classifier_tags.multi_class
