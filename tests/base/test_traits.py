"""What solvers declare of their steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import bilevel as bl
from bilevel.base import Traits


def test_coefficients_that_are_given_anew_may_change_at_every_step() -> None:
    class Decaying(bl.GradientDescent):
        def coefficients(self, state: Any) -> Any:
            raise NotImplementedError

    class Constant(bl.GradientDescent):
        traits = Traits(rowwise=True, multistep=True, stationary_from=3)

        def coefficients(self, state: Any) -> Any:
            raise NotImplementedError

    assert bl.GradientDescent.traits.stationary_from == 0
    assert Decaying.traits == Traits(rowwise=True, multistep=True)
    assert Constant.traits.stationary_from == 3


def test_the_attributes_of_before_are_taken_with_the_new_way_in_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"Halved.memberwise is now `traits = Traits\(rowwise=True\)`."):

        @dataclass(frozen=True)
        class Halved(bl.InnerSolver):
            memberwise = True

            def step(self, inner: Any, state: bl.InnerState) -> bl.InnerState:
                return state.moved(0.5 * state.params)

    assert Halved.traits == Traits(rowwise=True)
    batch = bl.BilevelProblem(lambda w, u: (w * u) ** 2, lambda w, u: w, torch.tensor(1.0)).batched(2)
    found = bl.hypergradient(batch, Halved(steps=3), bl.FullUnroll(), torch.ones(2), on_failure="return")
    assert found.params.tolist() == [0.125, 0.125]
    with pytest.warns(DeprecationWarning, match="Biased.off_solution is now bias_reason."):

        class Biased(bl.GradientDescent):
            def off_solution(self, problem: Any) -> str:
                return "it stops early"

    with pytest.raises(ValueError, match="rests on the inner solution, but it stops early"):
        bl.hypergradient(batch.member(0), Biased(0.1, steps=3), bl.Implicit(), torch.ones(()))
