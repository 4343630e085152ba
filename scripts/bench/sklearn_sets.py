"""Data sets for tuned linear models: drawn ones with known structure, and real ones of installed packages.

``rng = default_rng(seed)``, everything else is drawn from it in the order in which it stands; each set is then split
65/35 with the same seed, stratified by class. Columns are as they come: whoever fits standardises.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import PolynomialFeatures

Array = NDArray[np.float64]
Rng = np.random.Generator
Table = tuple[Array, NDArray[Any]]


@dataclass(frozen=True)
class Parts:
    """A split of a set."""

    X: Array
    y: NDArray[Any]
    X_test: Array
    y_test: NDArray[Any]
    groups: NDArray[Any] | None = None


def autoregressive(rng: Rng, rows: int, columns: int, r: float) -> Array:
    """Return columns each of which is r times the one before it plus noise, all with deviation 1."""
    X = rng.standard_normal((rows, columns))
    for column in range(1, columns):
        X[:, column] = r * X[:, column - 1] + np.sqrt(1 - r * r) * X[:, column]
    return X


def regression(rng: Rng, X: Array, w: Array, noise: float) -> Table:
    """Return rows whose target is linear, with normal noise."""
    return X, X @ w + noise * rng.standard_normal(len(X))


def classes(rng: Rng, X: Array, w: Array) -> Table:
    """Return rows whose class is drawn from the logistic model."""
    return X, (rng.random(len(X)) < 1 / (1 + np.exp(-(X @ w)))).astype(int)


def first(rng: Rng, size: int, count: int, scale: float = 1.0) -> Array:
    """Return coefficients of which only the first are not zero."""
    w = np.zeros(size)
    w[:count] = scale * rng.standard_normal(count)
    return w


def every(rng: Rng, size: int, step: int, scale: float = 1.0) -> Array:
    """Return coefficients of which one in so many is not zero."""
    w = np.zeros(size)
    w[::step] = scale * rng.standard_normal(len(w[::step]))
    return w


def sparse_r(rng: Rng) -> Table:
    """Ten of 100 coefficients are not zero."""
    X = rng.standard_normal((300, 100))
    return regression(rng, X, first(rng, 100, 10), 1.5)


def strong_r(rng: Rng, share: float = 0.01) -> Table:
    """Likewise, with this share of noise in the variance."""
    X, w = rng.standard_normal((300, 100)), first(rng, 100, 10)
    return regression(rng, X, w, float(np.sqrt(share) * np.linalg.norm(w)))


def stronger_r(rng: Rng) -> Table:
    """Likewise, with a thousandth."""
    return strong_r(rng, 0.001)


def group_r(rng: Rng) -> Table:
    """Five blocks of 20 coefficients, two of them zero."""
    X = rng.standard_normal((300, 100))
    w = np.concatenate([scale * rng.standard_normal(20) for scale in (1, 0.3, 0.1, 0, 0)])
    return regression(rng, X, w, 2.0)


def dense_r(rng: Rng) -> Table:
    """All of 60 coefficients alike."""
    X = rng.standard_normal((300, 60))
    return regression(rng, X, 0.3 * rng.standard_normal(60), 2.0)


def corr_r(rng: Rng) -> Table:
    """Correlated columns, one coefficient in ten not zero."""
    X = autoregressive(rng, 300, 80, 0.9)
    return regression(rng, X, every(rng, 80, 10), 1.5)


def corrdense_r(rng: Rng) -> Table:
    """Correlated columns, all coefficients alike."""
    X = autoregressive(rng, 300, 80, 0.9)
    return regression(rng, X, 0.2 * rng.standard_normal(80), 2.0)


def wide_r(rng: Rng) -> Table:
    """More columns than rows, 15 of 300 coefficients not zero."""
    X = rng.standard_normal((150, 300))
    return regression(rng, X, first(rng, 300, 15), 1.0)


def widedense_r(rng: Rng) -> Table:
    """More columns than rows, all coefficients alike."""
    X = rng.standard_normal((150, 300))
    return regression(rng, X, 0.1 * rng.standard_normal(300), 1.0)


def heavy_r(rng: Rng) -> Table:
    """Heavy tails of columns and noise."""
    X = rng.standard_t(3, (300, 60))
    w = first(rng, 60, 10)
    return X, X @ w + 2 * rng.standard_t(2.5, 300)


def small_r(rng: Rng) -> Table:
    """Few rows."""
    X = rng.standard_normal((46, 10))
    return regression(rng, X, first(rng, 10, 3), 1.0)


def sparse_c(rng: Rng) -> Table:
    """Classes by 8 of 80 columns."""
    X = rng.standard_normal((400, 80))
    return classes(rng, X, first(rng, 80, 8, 1.2))


def dense_c(rng: Rng) -> Table:
    """Classes by all of 40 columns alike."""
    X = rng.standard_normal((400, 40))
    return classes(rng, X, 0.3 * rng.standard_normal(40))


def corr_c(rng: Rng) -> Table:
    """Classes by one correlated column in ten."""
    X = autoregressive(rng, 400, 60, 0.9)
    return classes(rng, X, every(rng, 60, 10, 1.5))


def wide_c(rng: Rng) -> Table:
    """Classes by 8 of 240 columns, more than rows."""
    X = rng.standard_normal((160, 240))
    return classes(rng, X, first(rng, 240, 8, 1.5))


def squares(X: Array) -> Array:
    """Return the columns with their squares and products."""
    return np.asarray(PolynomialFeatures(2, include_bias=False).fit_transform(X))


def diabetes(rng: Rng) -> Table:
    """442 patients."""
    return load_diabetes(return_X_y=True)


def diabetes2(rng: Rng) -> Table:
    """The same, with squares and products."""
    X, y = load_diabetes(return_X_y=True)
    return squares(X), y


def breast(rng: Rng) -> Table:
    """569 tumours."""
    return load_breast_cancer(return_X_y=True)


def wine1(rng: Rng) -> Table:
    """One of three cultivars against the others."""
    X, y = load_wine(return_X_y=True)
    return X, (y == 1).astype(int)


def digits38(rng: Rng) -> Table:
    """Images of 3 against 8."""
    X, y = load_digits(return_X_y=True)
    keep = (y == 3) | (y == 8)
    return X[keep], (y[keep] == 8).astype(int)


def autompg(rng: Rng) -> Table:
    """Miles per gallon of cars, with squares and products."""
    from mlxtend.data import autompg_data

    X, y = autompg_data()
    X = X.iloc[:, :7] if hasattr(X, "iloc") else X[:, :7]
    X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(X).all(1)
    return squares(X[keep]), y[keep]


def star98(rng: Rng) -> Table:
    """Whether a school district is above the median."""
    import statsmodels.api as sm

    data = sm.datasets.star98.load_pandas()
    above, below = data.endog.iloc[:, 0], data.endog.iloc[:, 1]
    return np.asarray(data.exog, dtype=float), (np.asarray(above / (above + below)) > 0.45).astype(int)


def anes(rng: Rng) -> Table:
    """A vote, with squares and products."""
    import statsmodels.api as sm

    table = sm.datasets.anes96.load_pandas().data
    X = np.asarray(table.drop(columns=["vote", "PID"]), dtype=float)
    return squares(X), np.asarray(table["vote"], dtype=int)


REGRESSION: dict[str, Callable[[Rng], Table]] = {
    each.__name__: each
    for each in (
        diabetes,
        diabetes2,
        autompg,
        small_r,
        dense_r,
        corrdense_r,
        sparse_r,
        strong_r,
        stronger_r,
        group_r,
        corr_r,
        heavy_r,
        wide_r,
        widedense_r,
    )
}
CLASSES: dict[str, Callable[[Rng], Table]] = {
    each.__name__: each for each in (breast, dense_c, sparse_c, corr_c, wide_c, digits38, wine1, star98, anes)
}
NEEDS = {"autompg": "mlxtend", "star98": "statsmodels", "anes": "statsmodels"}
"""Packages that hold a set and may not be there."""
TRUE_GROUPS = {"group_r": np.repeat(np.arange(5), 20)}


def available() -> list[str]:
    """Return the names of the sets that can be made here."""
    names = [*REGRESSION, *CLASSES]
    return [name for name in names if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]


def split(name: str, seed: int) -> Parts:
    """Return a set drawn with a seed, split 65/35 with it; constant columns of the training rows are left out."""
    X, y = (REGRESSION | CLASSES)[name](np.random.default_rng(seed))
    strata = y if name in CLASSES else None
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.35, random_state=seed, stratify=strata)
    keep = X.std(0) > 0
    return Parts(X[:, keep], y, X_test[:, keep], y_test, TRUE_GROUPS.get(name))
