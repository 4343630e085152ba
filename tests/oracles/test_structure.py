"""What problems declare of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel as bl
from bilevel.oracles.structure import Structure


def test_the_attributes_of_before_are_taken_with_the_new_way_in_a_warning() -> None:
    sentence = r"Old.quadratic is now `structure = Structure\(quadratic=True, unique_solution=False\)`."
    with pytest.warns(DeprecationWarning, match=sentence):

        class Old(bl.BilevelProblem):
            quadratic, one_solution = True, False

    class New(Old):
        structure = Structure(resampled=True)

    assert Old.structure == Structure(quadratic=True, unique_solution=False)
    assert New.structure == Structure(resampled=True)
    problem = Old(lambda w, u: (w - u) ** 2, lambda w, u: w**2, torch.tensor(0.0, dtype=torch.float64))
    estimate = bl.hypergradient(problem, bl.Newton(), bl.ClosedForm(), torch.tensor(3.0, dtype=torch.float64))
    assert float(estimate.hypergradient) == pytest.approx(6.0)


def test_a_batch_is_quadratic_where_all_its_members_are() -> None:
    u = torch.zeros(2)
    general = bl.BilevelProblem(lambda w, u: (w - u).square().sum(), lambda w, u: w.sum(), u)
    quadratic = bl.QuadraticProblem.random(size=2, hyperparameters=2, condition=3.0, seed=0)
    assert bl.stack([quadratic, quadratic], rows="loop").structure.quadratic
    assert not bl.stack([quadratic, general], rows="loop").structure.quadratic


def test_from_module_and_traced_forward_with_a_warning() -> None:
    def loss(model: Any, params: Any, decay: torch.Tensor) -> torch.Tensor:
        return model(torch.ones(2, 2)).square().mean() + decay * params["weight"].square().sum()

    with pytest.warns(DeprecationWarning, match="BilevelProblem.from_module is now bilevel.ModuleProblem."):
        problem = bl.BilevelProblem.from_module(torch.nn.Linear(2, 1, bias=False), loss, loss)
    assert type(problem) is bl.ModuleProblem
    with pytest.warns(DeprecationWarning, match=r"BilevelProblem.traced is now bilevel.trace\(problem\)."):
        traced = problem.traced()
    u = torch.tensor(0.5)
    gradients = [each.bind(u).grad(problem.params)["weight"] for each in (problem, traced)]
    torch.testing.assert_close(*gradients)
