"""scikit-learn's own cross-validation of one penalty, on the same rows, as a model to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bilevel.criteria import Fit
from bilevel.data.rows import Rows
from bilevel.problems.losses import GLMLoss, Logistic, Softmax, Squared

ESTIMATORS: dict[type[GLMLoss], str] = {
    Squared: "RidgeCV",
    Logistic: "LogisticRegressionCV",
    Softmax: "LogisticRegressionCV",
}


def scikit_learn(rows: Rows, loss: GLMLoss) -> tuple[str, Callable[[Any], Fit]]:
    """Return the name of scikit-learn's estimator for a loss, and what makes its model of some of the rows.

    Columns are standardised by these rows. Ridge regression has 100 penalties from 1e-3 to 1e5, by leave-one-out;
    classes have scikit-learn's 10 from 1e-4 to 1e4, by the log loss of 5 folds. Its own defaults are 3 penalties, and
    accuracy.

    Raises:
        ValueError: for other losses than squared, logistic and softmax.
    """
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.preprocessing import StandardScaler

    estimator = ESTIMATORS.get(type(loss))
    if estimator is None:
        raise ValueError(f"`beside: scikit-learn` has no cross-validation of {type(loss).__name__}: leave it out.")

    def fit(index: Any) -> Fit:
        index = np.asarray(index)
        X, y = rows.X[index], rows.y[index]
        weights = None if rows.weights is None else rows.weights[index]
        scaler = StandardScaler(with_mean=not hasattr(X, "tocsr")).fit(X, sample_weight=weights)
        model: Any
        if estimator == "RidgeCV":
            model = RidgeCV(np.logspace(-3, 5, 100)).fit(scaler.transform(X), y, sample_weight=weights)
        else:
            model = LogisticRegressionCV(Cs=10, scoring="neg_log_loss", max_iter=1000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of defaults that will change
                model = model.fit(scaler.transform(X), y, sample_weight=weights)
        coef = torch.as_tensor(np.atleast_2d(model.coef_) / scaler.scale_)
        mean = scaler.mean_ if scaler.with_mean else np.zeros(X.shape[1])
        intercept = torch.as_tensor(np.atleast_1d(model.intercept_)) - coef @ torch.as_tensor(mean)
        return Fit(coef, intercept) if len(coef) > 1 else Fit(coef[0], intercept[0])

    return f"scikit-learn's {estimator}", fit
