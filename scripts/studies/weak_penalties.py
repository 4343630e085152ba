"""Are criteria finite and silent only where they are right? Penalties from e^-40 to e^40 beside 80 digits.

Every criterion with every loss that it takes, on tall and wide rows, with copied, nearly copied and constant columns,
and with a class of one row; data of both dtypes; one penalty, or one for each feature. The truth takes the data as
exact numbers: models by Newton's method in decimal arithmetic, derivatives by central differences of 10^-20.

A value is right to `LIMIT` of itself; a gradient to `LIMIT` of itself, or to half of the digits of the value. What is
not finite, or comes with a warning, is in doubt. Nothing silent should be wrong, and little in doubt right.

    python scripts/studies/weak_penalties.py
    python scripts/studies/weak_penalties.py --seeds 1000 1300 --show
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, getcontext
from typing import Any

import numpy as np

from bilevel.criteria import (
    ApproximateLeaveOneOut,
    Evidence,
    KFold,
    LinearData,
    Penalties,
    RidgeFolds,
    RidgeLeaveOneOut,
    newton_dense,
)
from bilevel.criteria import folds as folds_module
from bilevel.problems import Logistic, Poisson, Softmax, Squared

getcontext().prec = 80
LIMIT = 1e-2
KINDS = ("tall", "wide", "copies", "wide copies", "near copies", "constant", "rare class")
CASES = (
    ("loo", "squared"),
    ("alo", "squared"),
    ("alo", "logistic"),
    ("alo", "poisson"),
    ("kfold", "squared"),
    ("kfold", "logistic"),
    ("kfold", "poisson"),
    ("kfold", "softmax"),
    ("cg", "logistic"),
    ("cg", "softmax"),
    ("grams", "squared"),
    ("evidence", "squared"),
)
LOSSES = {"squared": Squared(), "logistic": Logistic(), "poisson": Poisson(), "softmax": Softmax()}
STEP = Decimal(10) ** -20
Exact = Any


@dataclass(frozen=True)
class Draw:
    """One criterion at one place, and what its truth needs."""

    kind: str
    criterion: str
    loss: str
    X: Any
    y: Any
    folds: list[tuple[Any, Any]]
    u: Any
    scalar: bool


def draw(seed: int) -> Draw:
    """Draw everything from one seed."""
    rng = np.random.default_rng(seed)
    criterion, loss = CASES[seed % len(CASES)]
    kind = KINDS[seed // len(CASES) % len(KINDS)]
    several = loss == "softmax"
    n, p = (8, 6 if several else 12) if kind.startswith("wide") else (12, 3 if several else 4)
    X = rng.standard_normal((n, p)) * 10.0 ** rng.uniform(-1, 1, p) + rng.standard_normal(p)
    half = p // 2
    if "copies" in kind:
        X[:, -half:] = X[:, :half]
    if kind == "near copies":
        X[:, -half:] += 10.0 ** -rng.integers(3, 15) * rng.standard_normal((n, half))
    if kind == "constant":
        X[:, 0] = 3.0
    z = (X - X.mean(0)) / X.std(0).clip(1e-12) @ rng.standard_normal(p) / 2.0 + rng.standard_normal(n)
    order = np.argsort(np.argsort(z))
    y = {
        "squared": z,
        "logistic": np.where(order >= (n - 1 if kind == "rare class" else n // 2), 1.0, -1.0),
        "poisson": rng.poisson(np.exp(z.clip(-2, 2))).astype(float),
        "softmax": np.where(order == n - 1, 2, order % 2) if kind == "rare class" else order % 3,
    }[loss]
    if loss == "poisson":
        y[0] = max(y[0], 1.0)
    rare = np.array([value for value, count in zip(*np.unique(y, return_counts=True), strict=True) if count == 1])
    free = np.flatnonzero(~np.isin(y, rare)) if loss in ("logistic", "softmax") else np.arange(n)
    halves = np.array_split(rng.permutation(free), 2)
    folds = [(np.setdiff1d(np.arange(n), held), held) for held in halves]
    scalar = bool(seed // (len(CASES) * len(KINDS)) % 2)
    u = np.full(1 if scalar else p, rng.uniform(-40.0, 40.0)) + (0.0 if scalar else rng.standard_normal(p))
    dtype = np.float32 if rng.random() < 0.5 else np.float64
    return Draw(kind, criterion, loss, X.astype(dtype), y, folds, u, scalar)


# What is judged ---------------------------------------------------------------------------------------------------


def answer(case: Draw) -> tuple[str, float, Any]:
    """Return "silent", "doubt" or "refused", with value and gradient, in doubt those that were computed."""
    loss, several = LOSSES[case.loss], case.loss == "softmax"
    p, outputs = case.X.shape[1], 3 if several else None
    penalties = Penalties.scalar(p, outputs) if case.scalar else Penalties.feature(p, outputs)
    direct, most = folds_module.DIRECT, newton_dense.MOST
    try:
        data = LinearData.of(case.X, case.y, loss=loss)
        if case.criterion == "cg":
            folds_module.DIRECT = newton_dense.MOST = 0
        made: Any = {
            "loo": lambda: RidgeLeaveOneOut(data, penalties),
            "evidence": lambda: Evidence(data, penalties),
            "alo": lambda: ApproximateLeaveOneOut(data, loss, penalties),
            "grams": lambda: RidgeFolds(data, penalties, case.folds),
        }.get(case.criterion, lambda: KFold(data, loss, penalties, case.folds))()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = made.evaluate(case.u, second=False)
            gradient = np.asarray(found.gradient)
            fine = not said and np.isfinite(found.value) and np.isfinite(gradient).all()
            raw = found if fine else made.compute(case.u, second=False)
    except ValueError:
        return "refused", np.nan, np.nan
    finally:
        folds_module.DIRECT, newton_dense.MOST = direct, most
    return "silent" if fine else "doubt", float(raw.value), np.asarray(raw.gradient)


# The truth --------------------------------------------------------------------------------------------------------


def exact(values: Any) -> Exact:
    """Return numbers as an array of decimals."""
    array = np.asarray(values, dtype=np.float64)
    return np.array([Decimal(float(each)) for each in array.ravel()], dtype=object).reshape(array.shape)


def exp(values: Exact) -> Exact:
    """Return the exponentials."""
    return np.array([each.exp() for each in values.ravel()], dtype=object).reshape(values.shape)


def factor(H: Exact) -> Exact:
    """Return the Cholesky factor."""
    L = H.copy()
    for k in range(len(L)):
        L[k, k] = L[k, k].sqrt()
        L[k + 1 :, k] = L[k + 1 :, k] / L[k, k]
        L[k + 1 :, k + 1 :] = L[k + 1 :, k + 1 :] - np.outer(L[k + 1 :, k], L[k + 1 :, k])
    return L


def solve(L: Exact, B: Exact) -> Exact:
    """Return ``(L L')^-1 B``."""
    B = B.copy()
    for k in range(len(L)):
        B[k] = (B[k] - L[k, :k] @ B[:k]) / L[k, k] if k else B[k] / L[k, k]
    for k in reversed(range(len(L))):
        B[k] = (B[k] - L[k + 1 :, k] @ B[k + 1 :]) / L[k, k] if k + 1 < len(L) else B[k] / L[k, k]
    return B


def parts(loss: str, z: Exact, y: Exact) -> tuple[Exact, Exact, Exact]:
    """Return losses (rows,), slopes (rows, outputs) and curvatures (rows, outputs, outputs) of z, (rows, outputs)."""
    one = Decimal(1)
    if loss == "softmax":
        top = np.array([max(row) for row in z], dtype=object)
        e = exp(z - top[:, None])
        total = e.sum(1)
        prob, own = e / total[:, None], np.arange(3) == np.asarray(y, dtype=int)[:, None]
        losses = np.array([each.ln() for each in total], dtype=object) + top - (z * own).sum(1)
        curved = prob[:, :, None] * np.where(np.eye(3, dtype=bool), one, 0 * one) - prob[:, :, None] * prob[:, None]
        return losses, prob - own, curved
    z, y = z[:, 0], exact(y)
    if loss == "squared":
        value, slope, curved = (z - y) ** 2 / 2, z - y, z * 0 + 1
    elif loss == "poisson":
        whole = np.array([each * each.ln() - each if each else each for each in y], dtype=object)
        value, slope, curved = exp(z) - y * z + whole, exp(z) - y, exp(z)
    else:
        e = exp(-abs(z))
        value = np.array([(one + each).ln() for each in e], dtype=object) + np.where(y * z < 0, abs(z), 0 * z)
        low, high = e / (1 + e), 1 / (1 + e)
        slope, curved = -y * np.where(y * z > 0, low, high), low * high
    return value, slope[:, None], curved[:, None, None]


class Truth:
    """Models and criteria in decimal arithmetic."""

    def __init__(self, case: Draw) -> None:
        self.case, self.outputs = case, 3 if case.loss == "softmax" else 1
        self.start: dict[int, Exact] = {}

    def columns(self, rows: Any) -> Exact:
        """All rows, standardised by some of them, with a column of ones."""
        X = exact(self.case.X)
        mean = X[rows].sum(0) / len(rows)
        X = X - mean
        square = (X[rows] ** 2).sum(0) / len(rows)
        for j in range(X.shape[1]):
            if square[j] <= Decimal("1e-24") * mean[j] ** 2:
                X[:, j] = 0 * X[:, j]
            else:
                X[:, j] = X[:, j] / square[j].sqrt()
        return np.hstack([X, np.full((len(X), 1), Decimal(1))])

    def model(self, X: Exact, rows: Any, a: Exact, which: int) -> tuple[Exact, Exact]:
        """Return coefficients (outputs, p1) and the factor of the Hessian; the mean of softmax' intercepts is held."""
        c, p1 = self.outputs, X.shape[1]
        penalty = np.tile(np.append(a, Decimal(0)), c)
        w, y, X = self.start.get(which, np.full((c, p1), Decimal(0))), np.asarray(self.case.y)[rows], X[rows]
        value = None
        for _ in range(300):
            losses, slope, curved = parts(self.case.loss, X @ w.T, y)
            value = losses.sum() + (penalty * w.ravel() ** 2).sum() / 2
            gradient = (slope.T @ X).ravel() + penalty * w.ravel()
            H = np.empty((c, p1, c, p1), dtype=object)
            for i in range(c):
                for j in range(c):
                    H[i, :, j] = (X.T * curved[:, i, j]) @ X
            H = H.reshape(c * p1, c * p1)
            H[np.arange(c * p1), np.arange(c * p1)] += penalty
            if c > 1:
                last = np.arange(p1 - 1, c * p1, p1)
                H[np.ix_(last, last)] += Decimal(1)
            L = factor(H)
            step = solve(L, gradient).reshape(c, p1)
            decrease, length = (gradient * step.ravel()).sum(), Decimal(1)
            if decrease <= Decimal("1e-130") + Decimal("1e-110") * abs(value):
                break
            while True:
                there = w - length * step
                new = parts(self.case.loss, X @ there.T, y)[0].sum() + (penalty * there.ravel() ** 2).sum() / 2
                if new <= value or length < Decimal("1e-9"):
                    break
                length /= 2
            w = there
        self.start[which] = w
        return w, L

    def value(self, u: Exact) -> Exact:
        """Return the criterion."""
        case, rows = self.case, np.arange(len(self.case.X))
        n, p = case.X.shape
        a = exp(u) if len(u) == p else np.full(p, exp(u)[0])
        if case.criterion in ("kfold", "cg", "grams"):
            total, count = Decimal(0), 0
            for which, (train, held) in enumerate(case.folds):
                X = self.columns(train)
                w, _ = self.model(X, train, a, which)
                total += parts(case.loss, X[held] @ w.T, np.asarray(case.y)[held])[0].sum()
                count += len(held)
            return total / count
        X = self.columns(rows)
        w, L = self.model(X, rows, a, 0)
        z = (X @ w.T)[:, 0]
        if case.criterion == "evidence":
            y = exact(case.y)
            m = n - 1
            rest = ((y - z) ** 2).sum() + (a * w[0, :-1] ** 2).sum()
            # det of the centred part: the intercept is last, and its pivot is n.
            logs = 2 * sum(L[k, k].ln() for k in range(p)) - sum(each.ln() for each in a)
            return (rest / m).ln() / 2 + logs / (2 * m)
        _, slope, curved = parts(case.loss, z[:, None], case.y)
        h = (X * solve(L, X.T.copy()).T).sum(1)
        shift = h * slope[:, 0] / (1 - h * curved[:, 0, 0])
        return parts(case.loss, (z + shift)[:, None], case.y)[0].sum() / n

    def both(self) -> tuple[Exact, Exact]:
        """Return value and gradient."""
        u = exact(self.case.u)
        value, gradient = self.value(u), []
        for j in range(len(u)):
            moved = [u.copy(), u.copy()]
            moved[0][j] += STEP
            moved[1][j] -= STEP
            gradient.append((self.value(moved[0]) - self.value(moved[1])) / (2 * STEP))
        return value, np.array(gradient, dtype=object)


def judged(case: Draw, truth: Callable[[], tuple[Exact, Exact]]) -> tuple[str, float]:
    """Return the status, and by how much value or gradient are off, as a share of what is right."""
    status, value, gradient = answer(case)
    if status == "refused" or not np.isfinite(value) or not np.isfinite(gradient).all():
        return status, float("nan")
    true, slopes = truth()
    off = abs(exact(value)[()] - true) / abs(true)
    error = ((exact(gradient) - slopes) ** 2).sum().sqrt()
    size = max((slopes**2).sum().sqrt(), Decimal("1.5e-8") / Decimal(LIMIT) * abs(true))
    return status, float(max(off, error / size))


def main() -> int:
    """Print how many are silent, in doubt, right and wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 336))
    parser.add_argument("--show", action="store_true", help="name the cases that are silent and wrong")
    options = parser.parse_args()
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for seed in range(*options.seeds):
        case = draw(seed)
        status, off = judged(case, Truth(case).both)
        named = status if status == "refused" else f"{status} {'right' if off <= LIMIT else 'wrong'}"
        counts[case.criterion, case.loss][named] += 1
        if options.show and named in ("silent wrong", "doubt right"):
            shape = "scalar" if case.scalar else "feature"
            print(f"{named}: seed {seed} {case.criterion} {case.loss} {case.kind} {shape} u {case.u[0]:.1f}: {off:.2g}")
    columns = ("silent right", "silent wrong", "doubt right", "doubt wrong", "refused")
    print(f"{'':22}" + "".join(f"{each:>14}" for each in columns))
    counts["all", ""] = sum(counts.values(), Counter())
    for key, of_key in counts.items():
        print(f"{key[0]:10}{key[1]:12}" + "".join(f"{of_key[each]:14}" for each in columns))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
