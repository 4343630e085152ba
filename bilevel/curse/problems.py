"""The problems of the two papers' experiments, scaled as their figures need it.

Every data set is standardized, gets targets -1 and +1 where it has two classes and centred ones otherwise, and X and y
are divided by ``|X|_2``: the largest eigenvalue of X'X is then one, and eta = 1 is a natural Sobolev weight.
"""

from __future__ import annotations

import bz2
import csv
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bilevel.data.sources import read_bundled
from bilevel.problems import LogisticProblem, RidgeProblem
from bilevel.theory import QuadraticBatch

NAMES = ("breast_cancer", "bodyfat", "gaussian")
BODYFAT_TARGET = "brozek"
BODYFAT_FEATURES = (
    *("age", "weight", "height", "adipos", "neck", "chest", "abdom"),
    *("hip", "thigh", "knee", "ankle", "biceps", "forearm", "wrist"),
)


class DataMissingError(ValueError):
    """A data set that is not installed, in one sentence that says how to get it."""


def load(name: str, *, scaled: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return X of shape (rows, features) and y of shape (rows,) in float64; `scaled`: both divided by ``|X|_2``.

    Of `NAMES`, "bodyfat" needs the PyPI package `faraway`, and "gaussian" (200 x 100) is drawn with the seed.
    """
    if name == "breast_cancer":
        features, target = read_bundled(name).parts[""]
        X, y = _standardized(features), torch.as_tensor(2.0 * target - 1.0)
    elif name == "bodyfat":
        X, y = _bodyfat()
    else:
        normal = gaussian(seed)
        X = normal(200, 100)
        y = X @ normal(100) + normal(200)
    size = torch.linalg.matrix_norm(X, 2) if scaled else 1.0
    return X / size, y / size


def gaussian(seed: int) -> Callable[..., Tensor]:
    """Return shape -> standard normal numbers in float64, from a generator of their own."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _standardized(values: np.ndarray) -> Tensor:
    return torch.as_tensor((values - values.mean(0)) / values.std(0))


def _bodyfat() -> tuple[Tensor, Tensor]:
    # Read as a file: importing the package would need pandas.
    result = find_spec("faraway")
    if result is None or not result.submodule_search_locations:
        raise DataMissingError("the data set bodyfat is skipped: it comes with the PyPI package `faraway`.")
    (place, *_) = result.submodule_search_locations
    with bz2.open(Path(place) / "datasets" / "fat" / "fat.csv.bz2", "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    X = np.array([[float(row[name]) for name in BODYFAT_FEATURES] for row in rows])
    y = np.array([float(row[BODYFAT_TARGET]) for row in rows])
    return _standardized(X), torch.as_tensor(y - y.mean())


def ridge(name: str, penalty: str = "scalar") -> RidgeProblem:
    """Return ``1/2 |X w - y|^2 + theta/2 |w|^2`` (a sum, no mean) with theta itself as hyperparameter."""
    X, y = load(name)
    return RidgeProblem(X, y, X, y, penalty, loss="sum", parametrization="direct")


def logistic(name: str) -> LogisticProblem:
    """Return ``sum log(1 + exp(-y_i x_i'w)) + theta/2 |w|^2`` on standardized X; a regression target by its sign."""
    X, y = load(name, scaled=False)
    labels = (y > 0).long()
    return LogisticProblem(X, labels, X, labels, loss="sum", parametrization="direct")


def least_squares(columns: int, draws: int, *, seed: int = 0) -> QuadraticBatch:
    """Return draws of ``1/2 |A x - b|^2 + 1/2 |x|^2`` with A, b and x_0 standard Gaussian, A of shape (200, columns).

    They are the problems of Mehmood et al. 2026, section 6, stacked.
    """
    normal = gaussian(1_000 * seed + columns)
    A, b, start = normal(draws, 200, columns), normal(draws, 200, 1), normal(draws, columns)
    identity = torch.eye(columns, dtype=torch.float64)
    return QuadraticBatch(
        A.mT @ A + identity,
        -(A.mT @ b)[..., 0],
        identity.expand(draws, 1, columns, columns),
        torch.zeros(draws, 1, columns, dtype=torch.float64),
        start,
    )
