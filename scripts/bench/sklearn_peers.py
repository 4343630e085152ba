"""Tuned penalties beside Optuna and himalaya, where these are installed.

Optuna's TPE searches 30 log penalties by 50 trials of 5 folds each, evaluated by scikit-learn's cross_val_score, and
once more by this library's own criterion, which is quicker. Ours is the descent of the K-fold criterion of the same
folds from the best single penalty: the time from the data until its loss is no larger than that of the best trial.

himalaya tunes a penalty for each of five groups by random search, with its defaults, 5 folds and numpy; ours is with
the outer loop and the gate. Times are processor seconds of one thread in this process.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from typing import Any

import numpy as np
import torch
from common import emit
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn_bars import ours, standardised, test_loss, theirs, timed
from sklearn_sets import Parts, first, regression, split

from bilevel.criteria import Criterion, LinearData, Penalties
from bilevel.criteria.choose import choose_criterion
from bilevel.problems.losses import Logistic, Squared
from bilevel.selection import make_folds
from bilevel.selection.descend import box, tune
from bilevel.selection.scalar import best_penalty

TRIALS = 50


class Scaled(TransformerMixin, BaseEstimator):
    """Standardised columns over the roots of their penalties: a model of them with penalty 1 has these penalties."""

    def __init__(self, u: Any = None) -> None:
        self.u = u

    def fit(self, X: Any, y: Any = None) -> Scaled:
        self.scaler_ = StandardScaler().fit(X)
        return self

    def transform(self, X: Any) -> Any:
        return self.scaler_.transform(X) * np.exp(-0.5 * self.u)


def thirty(name: str, seed: int) -> tuple[Any, Any, Any, Any, str]:
    """Return X, y, the loss, scikit-learn's model with penalty 1, and its scoring."""
    if name == "breast_cancer":
        X, y = load_breast_cancer(return_X_y=True)
        return X, y, Logistic(), LogisticRegression(C=1.0, max_iter=1000), "neg_log_loss"
    rng = np.random.default_rng(seed)
    X, y = regression(rng, rng.standard_normal((300, 30)), first(rng, 30, 5), 1.5)
    return X, y, Squared(), Ridge(1.0), "neg_mean_squared_error"


def optuna_beside(name: str, seed: int, quick: bool) -> bool:
    """Emit how much sooner a descent reaches the loss of TPE, whose trials scikit-learn or our criterion evaluates."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    X, y, loss, model, scoring = thirty(name, seed)
    folds = make_folds(len(y), 5, labels=y if name == "breast_cancer" else None, seed=seed)

    def criterion() -> Criterion:
        data = LinearData.of(X, y, loss=loss)
        return choose_criterion("kfold", data, loss, Penalties.feature(30), folds=folds)

    fresh = criterion()
    low, high = box(fresh.data)

    def objective(trial: Any) -> float:
        u = np.array([trial.suggest_float(f"u{index}", low, high) for index in range(30)])
        if quick:
            return fresh.evaluate(u, second=False).value
        return -float(cross_val_score(make_pipeline(Scaled(u), model), X, y, cv=folds, scoring=scoring).mean())

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    _, their_seconds = timed(lambda: study.optimize(objective, n_trials=TRIALS))
    their_loss = fresh.evaluate(np.array([study.best_params[f"u{index}"] for index in range(30)])).value

    def descend(steps: int) -> float:
        fresh = criterion()
        one = best_penalty(fresh)
        return tune(fresh, np.full(30, one.u[0]), warm=one.evaluation.warm, steps=steps).evaluation.value

    reached, seconds, steps = np.inf, 0.0, 0
    while reached > their_loss and steps < 50:  # each time from the beginning
        steps += 1
        reached, seconds = timed(lambda steps=steps: descend(steps))
    times = their_seconds / seconds
    shown = {"loss": reached, "their_loss": their_loss, "seconds": seconds, "their_seconds": their_seconds}
    shown = {key: round(value, 5) for key, value in shown.items()}
    by = "our criterion" if quick else "scikit-learn"
    ok = quick or (times >= 20 and reached <= their_loss)
    asked = "" if quick else "20 times sooner to its loss"
    return emit(f"optuna, trials by {by}: {name}", round(times, 1), asked, ok, seed=seed, steps=steps, **shown)


def himalaya(parts: Parts, seed: int) -> tuple[float, float]:
    """Return the test loss of himalaya's group ridge, and its seconds."""
    from himalaya.ridge import GroupRidgeCV

    model = GroupRidgeCV(groups=parts.groups, cv=5, random_state=seed, solver_params={"progress_bar": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, seconds = timed(lambda: model.fit(parts.X, parts.y))
    return test_loss(np.ravel(model.predict(parts.X_test)), parts.y_test, "group_r"), seconds


def himalaya_beside(seeds: range) -> bool:
    """Emit the ratios of test loss and time of group ridge to scikit-learn's RidgeCV, of both."""
    rows = []
    for seed in seeds:
        parts = standardised(split("group_r", seed))
        base, _ = theirs(parts, "group_r")
        loss, seconds, _ = ours(parts, "group_r", Penalties.groups(parts.groups))
        other, other_seconds = himalaya(parts, seed)
        rows.append((loss / base, other / base, seconds, other_seconds))
    ratios = np.array(rows)
    ours_, their = np.exp(np.log(ratios[:, :2]).mean(0)).round(3).tolist()
    seconds, their_seconds = np.median(ratios[:, 2:], 0).round(3).tolist()
    logs = np.log(ratios[:, 0] / ratios[:, 1])
    shown = {"theirs": their, "seconds": seconds, "their_seconds": their_seconds, "splits": len(rows)}
    error = round(float(logs.std(ddof=1) / np.sqrt(len(logs))), 4)
    return emit("himalaya: group_r", ours_, "at most theirs", ours_ <= their, error_of_log_ratio=error, **shown)


def main() -> int:
    """Measure and return 0 where all bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=10, help="splits of each set")
    parser.add_argument("--seed", type=int, default=500, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fine = []
    if importlib.util.find_spec("optuna"):
        names = ("breast_cancer", "regression")
        cases = [(name, options.seed + index) for name in names for index in range(3)]
        fine += [optuna_beside(*case, quick) for quick in (False, True) for case in cases]
    if importlib.util.find_spec("himalaya"):
        fine += [himalaya_beside(range(options.seed, options.seed + options.splits))]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
