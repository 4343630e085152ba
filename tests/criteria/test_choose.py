"""Which criterion a name stands for, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bilevel.criteria import LinearData, Penalties, choose_criterion
from bilevel.problems import GLMLoss, Logistic, Softmax, Squared

X = np.random.default_rng(0).standard_normal((60, 2))
PAIRS = [(np.arange(30), np.arange(30, 60)), (np.arange(30, 60), np.arange(30))]


def chosen(kind: str, loss: GLMLoss, outputs: int | None = None, **options: Any) -> str:
    y = (
        X @ np.ones((2, 2))
        if outputs == 2
        else X[:, 0]
        if isinstance(loss, Squared)
        else np.arange(60) % (outputs or 2)
    )
    data = LinearData.of(X, y, loss=loss)
    return type(choose_criterion(kind, data, loss, Penalties.feature(2, outputs), **options)).__name__


def test_auto_leaves_out_single_rows_where_it_can() -> None:
    assert chosen("auto", Squared()) == "RidgeLeaveOneOut"
    assert chosen("auto", Squared(), 2) == "RidgeLeaveOneOut"
    assert chosen("auto", Logistic()) == "ApproximateLeaveOneOut"
    assert chosen("auto", Softmax(), 3, folds=PAIRS) == "KFold"
    assert chosen("auto", Logistic(), folds=PAIRS, dependent="grouped") == "KFold"
    assert chosen("kfold", Squared(), folds=PAIRS) == "RidgeFolds"
    assert chosen("evidence", Squared()) == "Evidence"
    assert chosen("holdout", Logistic(), folds=PAIRS[:1]) == "KFold"


@pytest.mark.parametrize(
    ("kind", "loss", "options", "sentence"),
    [
        (
            "cv",
            Squared(),
            {},
            "`criterion` must be one of 'auto', 'loo', .*'evidence', got 'cv'",
        ),
        ("loo", Squared(), {"dependent": "grouped"}, "rows are grouped: a row that is left out alone is known"),
        ("alo", Logistic(), {"dependent": "ordered"}, "rows are ordered: a row that is left out alone is known"),
        ("loo", Logistic(), {}, "'loo' is of squared losses only, got Logistic: use 'alo' or 'kfold'"),
        ("kfold", Logistic(), {}, "'kfold' needs `folds`, pairs"),
        ("auto", Logistic(), {"dependent": "grouped"}, "'kfold' needs `folds`, pairs"),
        ("holdout", Logistic(), {"folds": PAIRS}, "got 2: give one, such as that of .* ShuffleSplit"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(kind: str, loss: GLMLoss, options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        chosen(kind, loss, **options)
