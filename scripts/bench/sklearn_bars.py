"""Tuned penalties beside scikit-learn's cross-validation: each bar as asked and as measured.

    python scripts/bench/sklearn_bars.py --only feature --sets sparse_r group_r --splits 3

A ratio is the loss on test rows over that of `RidgeCV` with 100 penalties or `LogisticRegressionCV` with 20 penalties
and 5 folds, on the same split and the same standardised columns: geometric mean over splits, worst split in brackets.
"sparse" is of elastic nets: ours beside `ElasticNetCV` and logistic regression with L1, both over those ridge models.
Times are processor seconds of one thread in this process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import emit, interleave, medians, ratio
from scipy.sparse import random as sparse_rows
from sklearn.datasets import load_digits
from sklearn.linear_model import ElasticNetCV, LassoCV, LogisticRegression, LogisticRegressionCV, RidgeCV
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn_sets import CLASSES, REGRESSION, Parts, available, split

import bilevel.sklearn as tuned
from bilevel.criteria import ApproximateLeaveOneOut, Criterion, LinearData, Penalties, RidgeLeaveOneOut
from bilevel.problems.losses import Logistic, Squared
from bilevel.selection import Net, Selected, certify_range, path, penalty_cv
from bilevel.selection.scalar import best_penalty

FEATURE = {
    "sparse_r": 0.75,
    "group_r": 0.88,
    "wide_r": 0.35,
    "sparse_c": 0.92,
    "diabetes": 1.005,
    "dense_r": 1.005,
    "corrdense_r": 1.005,
    "dense_c": 1.005,
    "breast": 1.005,
    "widedense_r": 1.02,
    "wide_c": 0.90,
}
"""Bar 3: the mean ratio that is asked of a penalty for each feature, with the guard."""
SCALAR = ("breast", "dense_c", "sparse_c", "corr_c", "anes")
"""Bar 2: the mean over these is at most that of scikit-learn's."""
WORST = {True: 1.15, False: 1.06}
"""The worst split that is asked of regressions, with more columns than rows and without."""
L1_RATIOS = [0.1, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0]
"""What scikit-learn's documentation proposes."""
TIME = {True: 3.0, False: 0.6}
"""The time that is asked with more rows than columns: of a path on all rows of regressions, of all of classes."""
ONE = {"diabetes": 0.4, "small_r": 0.4, "wide_r": 0.4, "breast": 0.06, "digits": 0.7, "large_r": 0.05, "large_c": 0.65}
"""The time that is asked of the estimators with one penalty; "digits" are 600 rows of ten classes, "large" has 20,000
rows of 500 columns. The last three run whatever `--sets` says."""
EVALUATIONS, EPS = 60, 1e-5
"""What is asked of a proof that no single penalty from 1e-8 to 1e8 is better by more than this share."""


def standardised(parts: Parts) -> Parts:
    """Return columns, and the target of a regression, of mean 0 and deviation 1 on the training rows."""
    scaler = StandardScaler().fit(parts.X)
    X, X_test, y, y_test = scaler.transform(parts.X), scaler.transform(parts.X_test), parts.y, parts.y_test
    if y.dtype.kind == "f":
        mean, deviation = y.mean(), y.std()
        y, y_test = (y - mean) / deviation, (y_test - mean) / deviation
    return Parts(X, y, X_test, y_test, parts.groups)


def test_loss(z: Any, y: Any, name: str) -> float:
    """Return the mean squared error, or the mean log loss, of predictions for test rows."""
    if name in REGRESSION:
        return float(np.mean((z - y) ** 2))
    return float(np.mean(np.logaddexp(0.0, -np.where(y > 0, z, -z))))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function returns, and its processor seconds."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def logistic_cv() -> Any:
    """Return scikit-learn's model."""
    options = {"cv": 5, "scoring": "neg_log_loss", "max_iter": 1000, "use_legacy_attributes": False}
    return LogisticRegressionCV(Cs=20, l1_ratios=(0,), **options)


def theirs(parts: Parts, name: str) -> tuple[float, float]:
    """Return scikit-learn's test loss and seconds."""
    if name in REGRESSION:
        model = RidgeCV(alphas=np.logspace(-3, 5, 100))
        _, seconds = timed(lambda: model.fit(parts.X, parts.y))
        return test_loss(model.predict(parts.X_test), parts.y_test, name), seconds
    model = logistic_cv()
    _, seconds = timed(lambda: model.fit(parts.X, parts.y))
    return test_loss(model.decision_function(parts.X_test), parts.y_test, name), seconds


def criterion_of(parts: Parts, name: str, penalties: Penalties) -> Criterion:
    """Return exact leave-one-out of ridge, or approximate leave-one-out of logistic regression."""
    if name in REGRESSION:
        return RidgeLeaveOneOut(LinearData.of(parts.X, parts.y), penalties)
    loss = Logistic()
    return ApproximateLeaveOneOut(LinearData.of(parts.X, parts.y, loss=loss), loss, penalties)


def ours(parts: Parts, name: str, penalties: Penalties, **options: Any) -> tuple[float, float, Selected]:
    """Return the test loss, the seconds, and the tuned model."""
    found, seconds = timed(lambda: penalty_cv(criterion_of(parts, name, penalties), **options))
    z = parts.X_test @ found.coef.numpy() + float(found.intercept)
    return test_loss(z, parts.y_test, name), seconds, found


def penalties_of(kind: str, parts: Parts, seed: int) -> Penalties | None:
    """Return a penalty for all, for each feature, for the true groups, or for as many random ones."""
    features = parts.X.shape[1]
    if kind == "scalar":
        return Penalties.scalar(features)
    if kind == "feature":
        return Penalties.feature(features)
    if parts.groups is None:
        return None
    random = np.random.default_rng(1000 + seed).permutation(parts.groups)
    return Penalties.groups(parts.groups if kind == "true_groups" else random)


def asked(kind: str, name: str) -> float | None:
    """Return the mean ratio that is asked for; None where nothing is."""
    if kind == "feature":
        return FEATURE.get(name)
    return {"true_groups": 0.76, "random_groups": 1.03}.get(kind)


def beside(kind: str, name: str, seeds: range) -> list[dict[str, Any]]:
    """Return the ratios of test loss and times, and the chosen hyperprior, of every split."""
    rows = []
    for seed in seeds:
        parts = standardised(split(name, seed))
        penalties = penalties_of(kind, parts, seed)
        if penalties is None:
            return []
        loss, seconds, found = ours(parts, name, penalties)
        other, other_seconds = theirs(parts, name)
        taus = [node.tau for node in found.nodes[1:]]
        criterion = criterion_of(parts, name, penalties)
        _, path_seconds = timed(lambda criterion=criterion, taus=taus: path(criterion, taus))
        rows.append({
            "ratio": loss / other,
            "time": seconds / other_seconds,
            "path": path_seconds / other_seconds,
            "tau": found.node.tau,
            "wide": len(parts.y) < parts.X.shape[1],
        })
    return rows


def measured(kind: str, names: list[str], options: argparse.Namespace) -> bool:
    """Emit a line for each set, with the bars that are asked of it, and one for all."""
    fine, means = True, []
    for name in names:
        rows = beside(kind, name, range(options.seed, options.seed + options.splits))
        if not rows:
            continue
        ratios = np.array([row["ratio"] for row in rows])
        mean, worst = float(np.exp(np.log(ratios).mean())), float(ratios.max())
        time_, path_ = (float(np.median([row[key] for row in rows])) for key in ("time", "path"))
        wide, ok, says = rows[0]["wide"], True, []
        bar = asked(kind, name)
        if bar is not None:
            ok &= mean <= bar
            says.append(f"mean at most {bar:g}")
        if kind == "scalar" and name in SCALAR:
            ok &= worst <= 1.03
            says.append("no split above 1.03")
        if kind == "feature" and name in REGRESSION:
            ok &= worst <= WORST[wide]
            says.append(f"no split above {WORST[wide]:g}")
        if kind == "feature" and not wide:
            ok &= (path_ if name in REGRESSION else time_) <= TIME[name in REGRESSION]
            says.append(f"{'path ' if name in REGRESSION else ''}time at most {TIME[name in REGRESSION]:g}")
        means.append(mean)
        shown = {"splits": len(rows), "worst": round(worst, 3), "path": round(path_, 3), "time": round(time_, 3)}
        details = {"ratios": ratios.round(3).tolist(), "taus": [row["tau"] for row in rows]}
        fine &= emit(f"{kind} {name}", round(mean, 3), ", ".join(says), ok, **shown, **details)
    five = [mean for mean, name in zip(means, names, strict=False) if name in SCALAR and kind == "scalar"]
    if five:
        mean = float(np.exp(np.log(five).mean()))
        fine &= emit("scalar: breast, dense_c, sparse_c, corr_c, anes", round(mean, 4), "at most 1", mean <= 1)
    if means:
        emit(f"{kind}: all sets", round(float(np.exp(np.log(means).mean())), 3), "", True, sets=len(means))
    return fine


def theirs_sparse(parts: Parts, name: str) -> tuple[float, float]:
    """Return the test loss and seconds of scikit-learn's elastic net, or of its logistic regression with L1."""
    model: Any = ElasticNetCV(l1_ratio=L1_RATIOS, cv=5, max_iter=10_000)
    if name in CLASSES:
        options = {"cv": 5, "scoring": "neg_log_loss", "max_iter": 1000, "use_legacy_attributes": False}
        model = LogisticRegressionCV(Cs=20, solver="liblinear", l1_ratios=(1,), **options)
    _, seconds = timed(lambda: model.fit(parts.X, parts.y))
    z = model.predict(parts.X_test) if name in REGRESSION else model.decision_function(parts.X_test)
    return test_loss(z, parts.y_test, name), seconds


def ours_sparse(parts: Parts, name: str) -> tuple[float, float]:
    """Return the test loss and seconds of this library's estimators of the same names."""
    net = tuned.ElasticNetCV() if name in REGRESSION else tuned.LogisticRegressionCV(l1_ratios=(0.5, 1.0))
    _, seconds = timed(lambda: net.fit(parts.X, parts.y))
    z = net.predict(parts.X_test) if name in REGRESSION else net.decision_function(parts.X_test)
    return test_loss(z, parts.y_test, name), seconds


def sparse(names: list[str], options: argparse.Namespace) -> bool:
    """Emit a line for each set with the ratios of elastic nets, and the three bars of all."""
    fine, means, near = True, [], 0
    for name in names:
        rows = []
        for seed in range(options.seed, options.seed + options.splits):
            parts = standardised(split(name, seed))
            base, _ = theirs(parts, name)
            (loss, seconds), (other, other_seconds) = ours_sparse(parts, name), theirs_sparse(parts, name)
            rows.append((loss / base, other / base, seconds, other_seconds))
        table = np.array(rows)
        mean, their_mean = np.exp(np.log(table[:, :2]).mean(0)).tolist()
        most = 1.10 if name == "wine1" else 1.05
        means.append(mean)
        near += mean <= 1.02 * min(1.0, their_mean)
        seconds, other_seconds = np.median(table[:, 2:], 0).round(3).tolist()
        shown = {"splits": len(rows), "worst": round(float(table[:, 0].max()), 3), "theirs": round(their_mean, 3)}
        details = {"seconds": seconds, "their_seconds": other_seconds, "ratios": table[:, 0].round(3).tolist()}
        fine &= emit(f"sparse {name}", round(mean, 3), f"at most {most:g}", mean <= most, **shown, **details)
    mean = float(np.exp(np.log(means).mean()))
    few = len(names) - 3
    fine &= emit("sparse: all sets", round(mean, 3), "at most 0.86", mean <= 0.86, sets=len(means))
    return fine & emit("sparse: within 2 % of the better of theirs", near, f"at least {few}", near >= few)


def certified(names: list[str], options: argparse.Namespace) -> bool:
    """Emit the most evaluations that a certificate of each regression takes; a dense grid is never below its bound."""
    fine = True
    for name in (each for each in names if each in REGRESSION):
        counts, below = [], False
        for seed in range(options.seed, options.seed + options.splits):
            parts = standardised(split(name, seed))
            criterion = criterion_of(parts, name, Penalties.scalar(parts.X.shape[1]))
            found = certify_range(criterion, eps=EPS)
            grid = criterion.scan(np.linspace(np.log(found.high), np.log(found.low), 3001)[:, None])
            below |= not found.holds or min(each.value for each in grid) < found.lower * (1 - 1e-9)
            counts.append(found.evaluations)
        ok = max(counts) <= EVALUATIONS and not below
        fine &= emit(f"certificate {name}", max(counts), f"at most {EVALUATIONS}, none below", ok, counts=counts)
    return fine


def rows_of(name: str, seed: int) -> Parts:
    """Return a split, or rows of a large set."""
    if name == "digits":
        X, y = load_digits(return_X_y=True)
        X, X_test, y, y_test = train_test_split(X, y, train_size=600, random_state=seed, stratify=y)
        return standardised(Parts(X, y, X_test, y_test, None))
    if not name.startswith("large"):
        return standardised(split(name, seed))
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((20_000, 500))
    w = np.where(np.arange(500) < 50, 0.25 * rng.standard_normal(500), 0.0)
    y = (
        X @ w + 2.0 * rng.standard_normal(20_000)
        if name == "large_r"
        else rng.random(20_000) < 1 / (1 + np.exp(-X @ w))
    )
    return Parts(X, y, X[:0], y[:0], None)


def times(names: list[str], options: argparse.Namespace) -> bool:
    """Emit the time of the estimators with one penalty over scikit-learn's; of many rows also the K-fold loss of C."""
    fine = True
    for name, bar in ONE.items():
        if name in (*REGRESSION, *CLASSES) and name not in names:
            continue
        parts, details, regression = rows_of(name, options.seed), {}, name in REGRESSION or name == "large_r"
        kind = tuned.RidgeCV if regression else tuned.LogisticRegressionCV
        own = kind(penalty_structure="scalar")
        other: Any = RidgeCV(alphas=np.logspace(-3, 5, 100)) if regression else logistic_cv()
        alternatives = {"ours": lambda own=own, parts=parts: own.fit(parts.X, parts.y)}
        alternatives["theirs"] = lambda other=other, parts=parts: other.fit(parts.X, parts.y)
        rounds = 1 if name == "large_r" else 3 if name == "large_c" else 15
        seconds = interleave(alternatives, rounds, time.process_time)
        if name == "large_c":
            scored = {"X": parts.X, "y": parts.y, "cv": 5, "scoring": "neg_log_loss"}
            losses = [
                -cross_val_score(LogisticRegression(C=float(np.ravel(each.C_)[0]), max_iter=1000), **scored).mean()
                for each in (own, other)
            ]
            details = {"kfold_loss": losses[0], "their_kfold_loss": losses[1]}
            fine &= losses[0] <= 1.001 * losses[1]
        share = ratio(seconds, "ours", "theirs")
        fine &= emit(f"time: {name}", round(share, 3), f"at most {bar:g}", share <= bar, **details, **medians(seconds))
    return fine


def dense_net(seed: int) -> tuple[Any, Any, Any, Any]:
    """Return 5,000 rows of 200 columns, of which 20 count, and both elastic nets."""
    rng = np.random.default_rng(seed)
    X, w = rng.standard_normal((5000, 200)), np.zeros(200)
    w[:20] = rng.standard_normal(20)
    return X, X @ w + 2.0 * rng.standard_normal(5000), tuned.ElasticNetCV(), ElasticNetCV(l1_ratio=[0.5, 0.9, 1], cv=5)


def sparse_lasso(seed: int) -> tuple[Any, Any, Any, Any]:
    """Return 2,000 sparse rows of 5,600 columns, of which 60 count, and both lassos."""
    rng = np.random.default_rng(seed)
    X, w = sparse_rows(2000, 5600, 0.01, format="csr", random_state=seed), np.zeros(5600)
    X.data = np.abs(rng.standard_normal(len(X.data)))
    w[rng.choice(5600, 60, replace=False)] = 3.0 * rng.standard_normal(60)
    return X, X @ w + 0.3 * rng.standard_normal(2000), tuned.LassoCV(), LassoCV(cv=5)


def net_of_classes(seed: int) -> tuple[Any, Any, Any, Any]:
    """Return the digits, and multinomial regression with elastic nets of both."""
    parts = rows_of("digits", seed)
    options = {"cv": 5, "scoring": "neg_log_loss", "max_iter": 1000, "use_legacy_attributes": False}
    other = LogisticRegressionCV(Cs=10, solver="saga", l1_ratios=(0.5, 1.0), **options)
    return parts.X, parts.y, tuned.LogisticRegressionCV(l1_ratios=(0.5, 1.0)), other


NETS = {"dense": dense_net, "sparse": sparse_lasso, "classes": net_of_classes}
"""Elastic nets whose time is shown; no bar is asked."""


def net_times(_names: list[str], options: argparse.Namespace) -> bool:
    """Emit the time of elastic nets over scikit-learn's."""
    for name in options.nets:
        X, y, own, other = NETS[name](options.seed)
        fits = (partial(each.fit, X, y) for each in (own, other))
        (_, seconds), (_, other_seconds) = map(timed, fits)
        emit(f"time: nets, {name}", round(seconds / other_seconds, 3), "", True, ours=seconds, theirs=other_seconds)
    return True


def one_penalty(names: list[str], options: argparse.Namespace) -> bool:
    """Emit the bars of one penalty: leave-one-out below a grid's on every split, and log losses of five sets."""
    excess = []
    for name in (each for each in names if each in REGRESSION):
        for seed in range(options.seed, options.seed + options.splits):
            parts = standardised(split(name, seed))
            criterion = criterion_of(parts, name, Penalties.scalar(parts.X.shape[1]))
            grid = RidgeCV(alphas=np.logspace(-3, 5, 100)).fit(parts.X, parts.y).alpha_
            best = criterion.evaluate(np.log([grid]), second=False).value
            excess.append(best_penalty(criterion).evaluation.value / best - 1)
    most = float(max(excess, default=0.0))
    return emit("scalar: leave-one-out over the grid's, most", most, "at most 0", most <= 1e-9, splits=len(excess))


def exact(names: list[str], options: argparse.Namespace) -> bool:
    """Emit errors of gradients against differences, of leave-one-out against refits, and of weighted rows."""
    fine, rng = bool(names), np.random.default_rng(options.seed)
    for name, bar in (("sparse_r", 1e-9), ("sparse_c", 1e-10)):
        parts = standardised(split(name, options.seed))
        size = parts.X.shape[1]
        data, loss = LinearData.of(parts.X, parts.y, loss=Logistic() if name in CLASSES else None), Logistic()
        penalties = Penalties.feature(size)
        criterion: Criterion = RidgeLeaveOneOut(data, penalties)
        if name in CLASSES:
            criterion = ApproximateLeaveOneOut(data, loss, penalties, tol=1e-14)
        u, d = 3.0 + rng.standard_normal(size), rng.standard_normal(size)
        lines = [
            (criterion.evaluate(u + h * d).value - criterion.evaluate(u - h * d).value) / (2 * h) for h in (1e-3, 2e-3)
        ]
        slope = (4 * lines[0] - lines[1]) / 3
        error = abs(float(criterion.evaluate(u).gradient @ d) / slope - 1)
        fine &= emit(f"exact: gradient of {name}", error, f"at most {bar:g}", error <= bar)
    parts = standardised(split("sparse_r", options.seed))
    X, y, s = parts.X, parts.y, rng.integers(1, 4, len(parts.y))
    a, losses = np.exp(u_ := 3.0 + rng.standard_normal(X.shape[1])), []
    data = LinearData.of(X, y, s)
    found = RidgeLeaveOneOut(data, Penalties.feature(X.shape[1])).evaluate(u_)
    Z, weights = ((X - np.average(X, 0, s)) / data.scale.numpy()), s / s.mean()
    for row in range(len(y)):
        others = np.arange(len(y)) != row
        A = np.column_stack([Z, np.ones(len(y))])[others]
        w = np.linalg.solve((A.T * weights[others]) @ A + np.diag([*a, 0.0]), (A.T * weights[others]) @ y[others])
        losses.append(0.5 * weights[row] * (y[row] - Z[row] @ w[:-1] - w[-1]) ** 2)
    error = abs(found.value / float(np.mean(losses)) - 1)
    return fine & emit("exact: weighted leave-one-out against refits", error, "at most 1e-12", error <= 1e-12)


def apart(one: Any, other: Any) -> float:
    """Return the distance of two arrays as a part of the first one's size."""
    return float(np.linalg.norm(np.asarray(one) - np.asarray(other)) / np.linalg.norm(np.asarray(one)))


def weighted_and_repeated(parts: Parts, name: str, seed: int) -> float:
    """Return how far coefficients of rows with whole weights are from those of as many equal rows, at most.

    Penalties are of each feature; of the elastic net there are three, strong to weak.
    """
    rng = np.random.default_rng(seed)
    s = rng.integers(1, 4, len(parts.y))
    u = 3.0 + rng.standard_normal(parts.X.shape[1])
    loss = Logistic() if name in CLASSES else Squared()
    rows = np.repeat(np.arange(len(s)), s)
    tables = ((parts.X, parts.y, s), (parts.X[rows], parts.y[rows], None))
    models = []
    for each, (X, y, weights) in enumerate(tables):
        data = LinearData.of(X, y, weights, loss=loss if name in CLASSES else None)
        penalties = Penalties.feature(X.shape[1])
        # Penalties of sums of losses, under weights of mean 1.
        at = u - np.log(s.mean()) * (each == 0)
        smooth = ApproximateLeaveOneOut(data, loss, penalties, tol=1e-14)
        ridge = smooth if name in CLASSES else RidgeLeaveOneOut(data, penalties)
        net = Net(data, loss)
        alphas = net.largest() * np.array([0.5, 0.1, 0.02])
        models.append((ridge.refit(at).coef, net.path(alphas, 0.5).fit.coef))
    return max(apart(one, other) for one, other in zip(*models, strict=True))


def invariant(names: list[str], options: argparse.Namespace) -> bool:
    """Emit how far models are apart that must be equal: of weights, of columns in another order, of another unit."""
    found: dict[str, float] = {}
    for name in (each for each in ("sparse_r", "sparse_c") if each in names):
        parts = standardised(split(name, options.seed))
        found[f"integer weights and repeated rows, {name}"] = weighted_and_repeated(parts, name, options.seed)
        order = np.random.default_rng(options.seed).permutation(parts.X.shape[1])
        nets = tuned.LogisticRegressionCV(l1_ratios=(0.5, 1.0))
        models = {"LogisticRegressionCV": tuned.LogisticRegressionCV(), "LogisticRegressionCV with l1_ratios": nets}
        if name in REGRESSION:
            models = {"RidgeCV": tuned.RidgeCV(), "ElasticNetCV": tuned.ElasticNetCV()}
        for what, model in models.items():
            coef = model.fit(parts.X, parts.y).coef_
            found[f"order of columns, {what}"] = apart(coef[..., order], model.fit(parts.X[:, order], parts.y).coef_)
            if name in REGRESSION:
                larger = model.fit(parts.X, 1e3 * parts.y).coef_
                found[f"unit of the target, {what}"] = apart(coef, larger / 1e3)
    fine = bool(found)
    for what, distance in found.items():
        fine &= emit(f"invariance: {what}", distance, "at most 1e-8", distance <= 1e-8)
    return fine


SHARED = ("scalar", "feature", "true_groups", "random_groups")


def main() -> int:
    """Measure what is asked for and return 0 where all bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = {"sparse": sparse, "certificate": certified, "exact": exact, "time": times, "invariance": invariant}
    others["nets"] = net_times
    kinds = [*SHARED, *others]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="kinds of penalties")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["dense", "sparse"], help='of "nets"')
    parser.add_argument("--sets", nargs="+", choices=[*REGRESSION, *CLASSES], default=available(), help="data sets")
    parser.add_argument("--splits", type=int, default=10, help="splits of each set")
    parser.add_argument("--seed", type=int, default=400, help="of the first split: no choice was made on these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fine = [measured(kind, options.sets, options) for kind in options.only if kind not in others]
    fine += [one_penalty(options.sets, options)] if "scalar" in options.only else []
    fine += [others[kind](options.sets, options) for kind in options.only if kind in others]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
