"""scikit-learn's own checks of the estimators."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.sklearn import ElasticNetCV, LassoCV, LogisticRegressionCV, RidgeCV


# The checks fit a few rows, of one of which the criterion may be made: that is a warning to people, not to checks.
@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
@parametrize_with_checks([
    RidgeCV(),
    LogisticRegressionCV(penalty_structure="scalar"),
    ElasticNetCV(alphas=3),
    LassoCV(alphas=3),
])
def test_the_estimator_is_one_of_scikit_learns(estimator, check):
    check(estimator)
