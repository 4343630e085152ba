"""scikit-learn's own checks of `SampleWeights`: of its interface, so that few weights are tried here."""

import pytest
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.sklearn import SampleWeights


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("bilevel.selection.row_weights.SHARES", (0.8,))
    monkeypatch.setattr("bilevel.selection.row_weights.STEPS", ())
    monkeypatch.setattr("bilevel.selection.row_weights._penalty", lambda *_: 1.0)


@parametrize_with_checks([SampleWeights(Ridge(), guard="off"), SampleWeights(RidgeClassifier(), guard="off")])
def test_the_estimator_is_one_of_scikit_learns(estimator, check):
    check(estimator)
