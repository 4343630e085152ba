"""`SampleWeights` on data with wrong rows and on clean data: the table of docs/sklearn.md, other seeds by --seed."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from common import emit
from sklearn import datasets
from sklearn.metrics import log_loss, mean_squared_error, roc_auc_score
from sklearn.model_selection import train_test_split

from bilevel.sklearn import LogisticRegressionCV, RidgeCV, SampleWeights

TRUSTED, SHARE = 50, 0.2
CLASSES = ("breast_cancer", "digits 3 v 8", "2 classes")


def _data(name: str, seed: int) -> tuple[Any, Any]:
    if name == "breast_cancer":
        return datasets.load_breast_cancer(return_X_y=True)  # type: ignore[no-any-return]
    if name == "digits 3 v 8":
        X, y = datasets.load_digits(return_X_y=True)
        pair = (y == 3) | (y == 8)
        return X[pair], (y[pair] == 8).astype(int)
    if name == "2 classes":
        return datasets.make_classification(600, 20, n_informative=8, flip_y=0, random_state=seed)  # type: ignore[no-any-return]
    if name == "diabetes":
        X, y = datasets.load_diabetes(return_X_y=True)
    else:
        X, y = datasets.make_regression(500, 20, n_informative=8, noise=40, random_state=seed)
    return X, (y - y.mean()) / y.std()


def _fit(name: str, seed: int, share: float) -> tuple[float, float, bool, float]:
    """Return the ratio of test losses, the AUC of finding wrong rows, whether weights were kept, and the seconds."""
    X, y = _data(name, seed)
    classes = name in CLASSES
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.35, random_state=seed, stratify=y if classes else None)
    split = {"test_size": TRUSTED, "random_state": seed, "stratify": y if classes else None}
    others, trusted = train_test_split(np.arange(len(y)), **split)
    rng = np.random.default_rng(seed)
    wrong = others[rng.choice(len(others), int(share * len(others)), replace=False)]
    y = y.copy()
    y[wrong] = 1 - y[wrong] if classes else y[wrong] + 3 * rng.standard_t(1.5, len(wrong))
    model = (LogisticRegressionCV if classes else RidgeCV)(penalty_structure="scalar")
    cleaned, plain = SampleWeights(model).fit(X, y, trusted=trusted), model.fit(X, y)
    losses = [
        log_loss(y_test, each.predict_proba(X_test)) if classes else mean_squared_error(y_test, each.predict(X_test))
        for each in (cleaned, plain)
    ]
    is_wrong = np.isin(cleaned.suspects_, wrong)
    found = float(roc_auc_score(is_wrong, -np.arange(len(is_wrong)))) if share else float("nan")
    report = cleaned.tuning_report_
    return losses[0] / losses[1], found, report.survived, report.seconds


def main() -> bool:
    """Print a row for each set, with wrong rows and without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=100, help="the first of the seeds (default 100)")
    parser.add_argument("--splits", type=int, default=10, help="splits of each set (default 10)")
    options, ok = parser.parse_args(), True
    for share in (SHARE, 0.0):
        for name in (*CLASSES, "diabetes", "regression"):
            seeds = range(options.seed, options.seed + options.splits)
            ratios, found, kept, seconds = map(np.array, zip(*(_fit(name, seed, share) for seed in seeds), strict=True))
            mean = float(np.exp(np.log(ratios).mean()))
            details = {"worst": float(ratios.max()), "AUC": float(found.mean()), "kept": int(kept.sum())}
            seconds = float(seconds.mean())
            what = f"{name}, {share:.0%} wrong"
            ok &= emit(what, mean, "a ratio of test losses of at most 1.02", mean <= 1.02, **details, seconds=seconds)
    return ok


if __name__ == "__main__":
    raise SystemExit(not main())
