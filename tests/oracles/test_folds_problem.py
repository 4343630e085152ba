"""Problems that share their hyperparameters: the mean of their outer losses, with the closed forms of each."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import F64, normal
from sklearn.model_selection import KFold

import bilevel as bl
from bilevel.criteria import LinearData, Penalties, RidgeFolds
from bilevel.problems import LassoProblem, LogisticProblem, RidgeProblem

X, Y = normal(0, 40, 4), normal(1, 40)
PAIRS = list(KFold(4).split(X))


def made(kind: type = RidgeProblem, y: torch.Tensor = Y) -> list[bl.BilevelProblem]:
    return [kind(X[train], y[train], X[held], y[held], penalty="per_feature", loss="sum") for train, held in PAIRS]


@pytest.mark.parametrize("kind", [RidgeProblem, LogisticProblem])
@pytest.mark.parametrize("estimator", [bl.Implicit(), bl.FullUnroll()], ids=repr)
def test_the_hypergradient_is_the_mean_of_those_of_the_problems(kind: type, estimator: bl.HypergradEstimator) -> None:
    problems = made(kind, Y if kind is RidgeProblem else torch.sign(Y))
    u, solver = torch.linspace(0.0, 1.0, 4, dtype=F64), bl.GradientDescent(tol=1e-11)
    whole = bl.hypergradient(bl.folds(problems), solver, estimator, u)
    each = [bl.hypergradient(problem, solver, estimator, u) for problem in problems]
    assert whole.outer_loss == pytest.approx(np.mean([one.outer_loss for one in each]), rel=1e-9)
    torch.testing.assert_close(whole.hypergradient, torch.stack([one.hypergradient for one in each]).mean(0))


def test_tune_takes_it_and_finds_what_the_criterion_of_the_folds_has_its_minimum_at() -> None:
    tuned = bl.tune(bl.folds(made()))
    data = LinearData.of(X, Y, intercept=False, standardize=False)
    criterion = RidgeFolds(data, Penalties.feature(4), PAIRS)
    u = tuned.hparams.numpy()
    evaluation = criterion.evaluate(u)
    assert float(tuned.estimate.outer_loss) == pytest.approx(evaluation.value, rel=1e-9)
    assert float(np.abs(evaluation.gradient).max()) < 1e-4


def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        bl.folds([])
    with pytest.raises(ValueError, match="takes single problems"):
        bl.folds([bl.stack(made())])
    assert len(bl.folds(problem for problem in made()).problems) == 4  # type: ignore[arg-type]
    single = RidgeProblem(X[:20], Y[:20], X[20:], Y[20:])
    wrong: list[tuple[Any, str]] = [
        ([1, 2], "`folds` takes problems, but problem 0 is 1."),
        (single, "`folds` takes a list of problems, got "),
        (3, "`folds` takes a list of problems, got 3."),
        ([single, made()[0]], "problem 0 has them of shape (), and problem 1 of shape (4,)."),
        ([single, LassoProblem(X[:20], Y[:20], X[20:], Y[20:])], "but problem 1 has the nonsmooth term L1: "),
    ]
    for given, sentence in wrong:
        with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
            bl.folds(given)
        assert "\n" not in str(caught.value)
