"""`SampleWeights`: ways to name trusted rows, what is kept, and what is refused."""

import joblib
import numpy as np
import pytest
import sklearn
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import LogisticRegressionCV, RidgeCV, SampleWeights

rng = np.random.default_rng(0)
X = rng.standard_normal((200, 3))
RIGHT = 3.0 * X[:, 0] + rng.standard_normal(200)
y = RIGHT + 9.0 * (np.arange(200) < 20)
TRUSTED = np.arange(200) >= 120
LABELS = np.where(y > 0, "yes", "no")


@pytest.fixture(scope="module")
def fitted():
    return SampleWeights(Ridge()).fit(X, y, trusted=TRUSTED)


def test_wrong_rows_count_less_and_the_model_is_fitted_with_the_weights(fitted):
    weights = fitted.sample_weight_
    assert weights.mean() == pytest.approx(1.0)
    assert weights[:20].max() < 0.2
    assert (weights[TRUSTED] == weights.max()).all()
    assert set(fitted.suspects_[:15]) <= set(range(20))
    assert sorted(fitted.suspects_) == list(range(120))
    expected = Ridge().fit(X, y, sample_weight=weights)
    np.testing.assert_array_equal(fitted.predict(X), expected.predict(X))
    assert fitted.score(X, RIGHT) > Ridge().fit(X, y).score(X, RIGHT)
    report = fitted.tuning_report_
    assert report.survived
    assert report.gate > report.kappa
    assert report.gain == pytest.approx(1 - report.weighted_loss / report.equal_loss)
    assert "Learned weights generalise: their mean squared error is" in str(report)
    assert "on trusted rows whose losses chose only the node: " in report.summary


def test_trusted_rows_are_named_in_several_ways(monkeypatch):
    monkeypatch.setattr("bilevel.selection.row_weights.SHARES", (0.8,))
    monkeypatch.setattr("bilevel.selection.row_weights.STEPS", ())
    by_mask = SampleWeights(Ridge()).fit(X, y, trusted=TRUSTED)
    assert by_mask.tuning_report_.survived
    by_index = SampleWeights(Ridge()).fit(X, y, trusted=np.flatnonzero(TRUSTED))
    np.testing.assert_array_equal(by_index.sample_weight_, by_mask.sample_weight_)
    pairs = [(np.flatnonzero(~TRUSTED), np.flatnonzero(TRUSTED))]
    by_pairs = SampleWeights(Ridge(), validation=pairs).fit(X, y)
    np.testing.assert_array_equal(by_pairs.sample_weight_, by_mask.sample_weight_)
    beside = SampleWeights(Ridge()).fit(X[~TRUSTED], y[~TRUSTED], X_val=X[TRUSTED], y_val=y[TRUSTED])
    np.testing.assert_allclose(
        beside.sample_weight_, by_mask.sample_weight_[~TRUSTED] / by_mask.sample_weight_[~TRUSTED].mean()
    )
    assert "no rows were declared trusted: 40 were taken" in str(
        SampleWeights(Ridge(), validation=KFold(5, shuffle=True, random_state=0), guard="off").fit(X, y).tuning_report_
    )
    sparse_one = SampleWeights(Ridge()).fit(sparse.csr_array(X), y, trusted=TRUSTED)
    np.testing.assert_allclose(sparse_one.sample_weight_, by_mask.sample_weight_, atol=1e-6)


def test_right_rows_keep_equal_weights_and_few_rows_too():
    kept = SampleWeights(RidgeCV(penalty_structure="scalar")).fit(X, RIGHT, trusted=TRUSTED)
    assert (kept.sample_weight_ == 1).all()
    assert "Equal weights are kept: no gain of learned ones is proved" in kept.tuning_report_.summary
    assert len(kept.suspects_) == 120
    few = SampleWeights(Ridge()).fit(X[:3], y[:3])
    assert (few.sample_weight_ == 1).all()
    assert "weights need at least 2 trusted rows and 2 others" in str(few.tuning_report_)


def test_labels_of_classes_and_the_methods_of_the_model():
    model = SampleWeights(LogisticRegressionCV(penalty_structure="scalar"), guard="off").fit(X, LABELS, trusted=TRUSTED)
    assert list(model.classes_) == ["no", "yes"]
    np.testing.assert_array_equal(model.predict_proba(X), model.estimator_.predict_proba(X))
    assert model.predict_log_proba(X).shape == (200, 2)
    assert model.decision_function(X).shape == (200,)
    assert not hasattr(SampleWeights(Ridge()), "predict_proba")
    assert "without an outer loop" in model.tuning_report_.summary
    pipeline = make_pipeline(StandardScaler(), SampleWeights(LogisticRegression(), guard="off"))
    assert pipeline.fit(X, LABELS).score(X, LABELS) > 0.7


def test_a_mask_of_trusted_rows_goes_the_way_of_metadata_and_a_file_predicts_the_same(fitted, tmp_path):
    with sklearn.config_context(enable_metadata_routing=True):
        model = SampleWeights(Ridge(), guard="off").set_fit_request(trusted=True)
        assert (
            cross_val_score(model, X, y, cv=KFold(2, shuffle=True, random_state=0), params={"trusted": TRUSTED}).mean()
            > 0.3
        )
    joblib.dump(fitted, tmp_path / "model.joblib")
    np.testing.assert_array_equal(joblib.load(tmp_path / "model.joblib").predict(X), fitted.predict(X))


@pytest.mark.parametrize(
    ("model", "given", "sentence"),
    [
        (KNeighborsClassifier(), {}, "estimator=KNeighborsClassifier.* must be a classifier or a regressor whose fit"),
        (Ridge(), {"trusted": TRUSTED, "X_val": X, "y_val": y}, "give trusted rows of X, or X_val and y_val, but not"),
        (Ridge(), {"X_val": X}, "give X_val and y_val together, or neither"),
        (Ridge(), {"trusted": TRUSTED[:9]}, "trusted must be a mask of the 200 rows of X, or indices of them"),
        (Ridge(), {"trusted": [200]}, "trusted must be a mask of the 200 rows of X, or indices of them"),
        (Ridge(), {"trusted": [3]}, "weights need at least 2 trusted rows and 2 others, got 1 and 199: trust other"),
        (Ridge(), {"X_val": X[:, :2], "y_val": y}, "X has 2 features, but SampleWeights is expecting 3 features"),
    ],
)
def test_refusals(model, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampleWeights(model).fit(X, LABELS if isinstance(model, KNeighborsClassifier) else y, **given)
    with pytest.raises(ValueError, match="y_val holds the class maybe, which no row of y has"):
        SampleWeights().fit(X, LABELS, X_val=X[:2], y_val=["maybe", "yes"])
    with pytest.raises(ValueError, match="every class needs a row that is not trusted"):
        SampleWeights().fit(X, LABELS, trusted=LABELS == "yes")
