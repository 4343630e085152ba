"""Convex combinations of candidates, beside a general optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from bilevel.problems.losses import Logistic, Softmax, Squared
from bilevel.selection import stack


@pytest.mark.parametrize("loss", [Squared(), Logistic(), Softmax()], ids=lambda loss: type(loss).__name__)
def test_the_combination_is_the_least_of_the_simplex(loss: Any) -> None:
    rng = np.random.default_rng(0)
    several = isinstance(loss, Softmax)
    z = torch.from_numpy(rng.standard_normal((5, 3, 40) if several else (5, 40)))
    y = torch.from_numpy(rng.integers(0, 3, 40) if several else rng.choice([-1.0, 1.0], 40))
    weights = torch.from_numpy(rng.random(40) + 0.1)

    def value(omega: Any) -> float:
        mixed = torch.tensordot(torch.from_numpy(omega), z, 1)
        return float((weights * loss.value(mixed, y)).sum() / weights.sum())

    found = stack(z, y, loss, weights)
    options = {"bounds": [(0.0, 1.0)] * 5, "constraints": {"type": "eq", "fun": lambda omega: omega.sum() - 1.0}}
    least = minimize(value, np.full(5, 0.2), method="SLSQP", tol=1e-12, **options).fun
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1.0)
    assert value(found) <= least * (1 + 1e-7)


def test_a_candidate_that_is_right_has_all_the_weight() -> None:
    y = torch.tensor([1.0, -2.0, 0.5])
    assert stack(torch.stack([torch.zeros(3), y, -y]), y, Squared()).tolist() == [0.0, 1.0, 0.0]
