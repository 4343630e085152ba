"""Needs are data: what a class requires by name is refused in one sentence before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import ridge_case

import bilevel as bl
from bilevel.base.requirements import NEEDS

TEXTS = {
    "inner_solution": "rests on the inner solution, but `AdamW.weight_decay` leads",
    "differentiable_steps": "the steps of QuasiNewton are not differentiated",
    "one_inner_loss": "Asks compares steps of one inner loss, but this problem has a sampler",
    "module_loss": "needs a single problem of `ModuleProblem`",
    "symmetric": "Asks needs a symmetric matrix",
    "quadratic": "Asks needs a quadratic inner loss, which this BilevelProblem does not say it has",
    "smooth": "Asks needs a smooth inner loss, but this problem has the nonsmooth term L1",
    "proximal_solver": "AdamW needs a smooth inner loss, .* L1: use ProximalGradient",
    "eigenbasis": "Asks needs a quadratic inner loss whose Hessian",
    "multistep": "Asks needs a linear multistep solver .*, got AdamW",
    "fixed_steps": "Asks needs a fixed number of steps: give AdamW `steps` and no `tol`",
}


@dataclass(frozen=True)
class Asks(bl.Implicit):
    need: str = ""

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({self.need})


def unfit(need: str) -> bl.BilevelProblem:
    """A problem that has nothing of what can be asked for."""

    def loss(w: Any, u: Any, batch: Any = 0.0) -> Any:
        return ((w - batch) ** 2 + u * w**2).sum()

    start = torch.ones(1, dtype=torch.float64)
    if need == "one_inner_loss":
        return bl.BilevelProblem(loss, lambda w, u: (w**2).sum(), start, sampler=bl.MiniBatches(start[None], 1))
    if need in ("smooth", "proximal_solver"):
        return bl.BilevelProblem(loss, lambda w, u: (w**2).sum(), start, nonsmooth=bl.L1(1.0))
    return bl.BilevelProblem(outer_loss=lambda w, u: (w**2).sum(), params=start, optimality=lambda w, u: w + u * w)


@pytest.mark.parametrize("need", NEEDS)
def test_each_need_is_refused_in_its_sentence_where_it_is_not_met(need: str) -> None:
    solver = bl.QuasiNewton() if need == "differentiable_steps" else bl.AdamW(steps=3, tol=1e-3)
    with pytest.raises(ValueError, match=TEXTS[need]):
        Asks(bl.GMRES(), need=need).check(unfit(need), solver, torch.ones(1, dtype=torch.float64))


def test_a_linear_solver_that_says_needs_symmetry_is_taken_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="Old.needs_symmetry is now `requires = "):

        class Old(bl.Direct):
            needs_symmetry = True

    with pytest.raises(ValueError, match="Old needs a symmetric matrix"):
        bl.Implicit(Old()).check(unfit("symmetric"), bl.GradientDescent(), torch.ones(1, dtype=torch.float64))


def test_a_need_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    case = ridge_case()
    with pytest.raises(
        ValueError, match=r"`Asks.requires` names 'symetric': choose from inner_solution, .*, symmetric"
    ):
        Asks(need="symetric").check(case.problem, bl.GradientDescent(), case.hparams)
