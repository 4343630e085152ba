"""The estimators inside and around scikit-learn's other estimators, tools of inspection, and types of data."""

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.ensemble import BaggingRegressor, StackingRegressor, VotingClassifier
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.inspection import PartialDependenceDisplay, permutation_importance
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, RandomizedSearchCV, cross_validate, learning_curve
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from bilevel.sklearn import LogisticRegressionCV, RidgeCV, SampleWeights

rng = np.random.default_rng(0)
X = rng.standard_normal((60, 3))
y = X[:, 0] - X[:, 1] + 0.5 * rng.standard_normal(60)
LABELS = np.where(y > 0, "yes", "no")
THREE = np.array(["a", "b", "c"])[np.digitize(y, [-0.7, 0.7])]
TABLE = pd.DataFrame(X, columns=["age", "size", "dose"]).assign(colour=rng.choice(["red", "blue"], 60))
RIDGE = RidgeCV(penalty_structure="scalar")
LOGISTIC = LogisticRegressionCV(penalty_structure="scalar")


@pytest.mark.parametrize(
    "model",
    [
        VotingClassifier([("ours", LOGISTIC), ("theirs", LogisticRegression())], voting="soft"),
        CalibratedClassifierCV(LOGISTIC, cv=2),
        OneVsRestClassifier(LOGISTIC),
        RFE(LOGISTIC, n_features_to_select=2),
        make_pipeline(SelectFromModel(LOGISTIC), LOGISTIC),
        make_pipeline(StandardScaler(), SampleWeights(LOGISTIC, guard="off")),
    ],
    ids=lambda model: type(model).__name__,
)
def test_classifiers_around_ours(model):
    fitted = model.fit(X, THREE if isinstance(model, OneVsRestClassifier) else LABELS)
    assert fitted.score(X, THREE if isinstance(model, OneVsRestClassifier) else LABELS) > 0.6
    assert set(fitted.predict(X)) <= set(np.concatenate([LABELS, THREE]))


@pytest.mark.parametrize(
    "model",
    [
        StackingRegressor([("ours", RIDGE), ("theirs", Ridge())], final_estimator=RIDGE, cv=2),
        MultiOutputRegressor(RIDGE),
        TransformedTargetRegressor(RIDGE, transformer=StandardScaler()),
        BaggingRegressor(RIDGE, n_estimators=2, random_state=0),
        RFE(RIDGE, n_features_to_select=2),
        RandomizedSearchCV(RIDGE, {"standardize": [True, False], "fit_intercept": [True]}, n_iter=2, cv=2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_regressors_around_ours(model):
    targets = np.column_stack([y, -y]) if isinstance(model, MultiOutputRegressor) else y
    assert model.fit(X, targets).score(X, targets) > 0.4


def test_tools_of_inspection():
    fitted = clone(RIDGE).fit(TABLE[["age", "size", "dose"]], y)
    importance = permutation_importance(fitted, TABLE[["age", "size", "dose"]], y, n_repeats=2, random_state=0)
    assert importance.importances_mean[2] < importance.importances_mean[:2].min()
    _, train, test = learning_curve(RIDGE, X, y, cv=2, train_sizes=[0.5, 1.0])
    assert np.isfinite([train, test]).all()
    display = PartialDependenceDisplay.from_estimator(
        fitted, TABLE[["age", "size", "dose"]], ["age"], grid_resolution=5
    )
    assert display.axes_.size == 1
    display.figure_.clear()


@pytest.mark.parametrize("model", [RIDGE, LOGISTIC], ids=["ridge", "logistic"])
@pytest.mark.parametrize("kind", ["int32", "float32", "bool", "object", "frame", "Int64", "category"])
def test_columns_of_any_numeric_type(model, kind):
    whole = np.round(3 * X)
    target = y if model is RIDGE else LABELS
    given = pd.DataFrame(whole, columns=list("abc"))
    if kind in ("int32", "float32", "bool", "object"):
        given = whole.astype(kind)
    elif kind != "frame":
        given = given.astype("int64").astype(kind)
    fitted = clone(model).fit(given, target)
    assert fitted.coef_.dtype == (np.float32 if kind == "float32" else np.float64)
    numbers = whole != 0 if kind == "bool" else whole
    same, method = clone(model).fit(numbers.astype(float), target), "predict" if model is RIDGE else "predict_proba"
    np.testing.assert_allclose(getattr(fitted, method)(given), getattr(same, method)(numbers), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "labels",
    [
        y > 0,
        (y > 0).astype(np.int32),
        pd.Series(LABELS),
        pd.Series(LABELS, dtype="category"),
        LABELS.astype(object),
        np.where(y > 0, 2.0, -1.0),
    ],
    ids=["bool", "int32", "series", "category", "object", "float"],
)
def test_labels_of_any_type_come_back_as_they_are(labels):
    fitted = clone(LOGISTIC).fit(X, labels)
    assert set(fitted.predict(X)) == set(np.unique(labels))
    assert fitted.predict(X).dtype == fitted.classes_.dtype
    assert fitted.score(X, labels) > 0.7


def test_frames_through_a_whole_pipeline_with_names_and_output():
    columns = make_column_transformer(
        (StandardScaler(), ["age", "size", "dose"]), (OneHotEncoder(sparse_output=False), ["colour"])
    )
    pipeline = make_pipeline(columns, clone(RIDGE)).set_output(transform="pandas").fit(TABLE, y)
    assert pipeline[-1].feature_names_in_[0] == "standardscaler__age"
    with sklearn.config_context(transform_output="pandas", assume_finite=True):
        other = make_pipeline(clone(columns), clone(RIDGE)).fit(TABLE, y)
    np.testing.assert_allclose(other.predict(TABLE), pipeline.predict(TABLE))
    assert "RidgeCV" in pipeline._repr_html_()
    with pytest.raises(ValueError, match="feature names"):
        pipeline[-1].predict(
            columns.transform(TABLE)[["onehotencoder__colour_red", *pipeline[-1].feature_names_in_[:4]]]
        )


def test_polars_frames():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"a": X[:, 0], "b": X[:, 1]})
    assert list(clone(RIDGE).fit(frame, polars.Series(y)).feature_names_in_) == ["a", "b"]


def test_several_jobs_and_warm_starts_change_no_number():
    alone = RidgeCV(max_iter=50).fit(X, y)
    with joblib.parallel_config(backend="threading"):
        np.testing.assert_allclose(RidgeCV(n_jobs=2, max_iter=50).fit(X, y).coef_, alone.coef_, rtol=1e-10)
        search = GridSearchCV(RIDGE, {"penalty_structure": ["scalar", "feature"]}, cv=2, n_jobs=2).fit(X, y)
    assert search.best_score_ > 0.5
    warm = RidgeCV(penalty_structure="scalar", warm_start=True).fit(X, y)
    first = warm.alpha_
    assert warm.fit(X, y).alpha_ == pytest.approx(first, rel=1e-2)


def test_metadata_goes_through_nested_estimators():
    groups, weights = np.repeat(np.arange(12), 5), np.linspace(0.5, 1.5, 60)
    with sklearn.config_context(enable_metadata_routing=True):
        inner = RidgeCV(penalty_structure="scalar", cv=GroupKFold(3)).set_fit_request(sample_weight=True)
        inner.set_score_request(sample_weight=True)
        model = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), inner)
        found = cross_validate(
            model, X, y, cv=GroupKFold(2), params={"groups": groups, "sample_weight": weights}, return_estimator=True
        )
        assert found["test_score"].min() > 0.4
        assert all(each[-1].tuning_report_.criterion == "held-out folds" for each in found["estimator"])
        search = GridSearchCV(model, {"ridgecv__standardize": [True, False]}, cv=GroupKFold(2))
        assert search.fit(X, y, groups=groups, sample_weight=weights).best_score_ > 0.4
