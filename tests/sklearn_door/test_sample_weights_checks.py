"""scikit-learn's own checks of `SampleWeights`: of its interface, so that weights are a formula of the rows here."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.selection import RowWeights
from bilevel.sklearn import SampleWeights


def quick(data, X_trusted, y_trusted, loss, *, guard, **_):
    """Weights that fall with the distance from the mean, in the place of learned ones."""
    assert not guard
    assert X_trusted.shape == (len(y_trusted), data.features)
    weights = (1.0 / (1.0 + data.dense().square().mean(1))).double().numpy()
    return RowWeights(weights, weights, ("equal weights", "near"), np.array([1.0, 0.5]), None, None, 1, 1.0, 0, 0.0)


@parametrize_with_checks([SampleWeights(Ridge(), guard="off"), SampleWeights(RidgeClassifier(), guard="off")])
def test_the_estimator_is_one_of_scikit_learns(estimator, check, monkeypatch):
    monkeypatch.setattr("bilevel.sklearn.sample_weights.learn_row_weights", quick)
    check(estimator)


@pytest.mark.parametrize("model", [Ridge(), RidgeClassifier()], ids=["numbers", "classes"])
def test_weights_of_few_rows_and_one_column_are_learned_in_single_precision(model):
    X = np.linspace(-1.0, 1.0, 12, dtype=np.float32)[:, None]
    y = X[:, 0] if isinstance(model, Ridge) else X[:, 0] > 0.1
    fitted = SampleWeights(model, guard="off").fit(X, y)
    assert np.isfinite(fitted.sample_weight_).all()
    assert fitted.sample_weight_.mean() == pytest.approx(1.0)
