"""Small data and criteria for the tests of the choice of penalties."""

from __future__ import annotations

from typing import Any

import numpy as np

from bilevel.criteria import LinearData, Penalties, RidgeLeaveOneOut


def table(rows: int, features: int, seed: int = 0, useful: int = 2, noise: float = 1.0) -> tuple[Any, Any]:
    """Return rows whose target needs only the first features."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, features))
    return X, X[:, :useful] @ np.full(useful, 1.5) + noise * rng.standard_normal(rows)


def ridge(rows: int, features: int, seed: int = 0, useful: int = 2, noise: float = 1.0) -> RidgeLeaveOneOut:
    """Return the leave-one-out criterion of such rows, with a penalty for each feature."""
    return RidgeLeaveOneOut(LinearData.of(*table(rows, features, seed, useful, noise)), Penalties.feature(features))
