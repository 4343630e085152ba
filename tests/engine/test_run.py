"""`Run`: what an estimator is given, and the ways in which the same was asked for before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import ridge_case

import bilevel as bl

SOLVER = bl.GradientDescent(steps=7)


def a_run() -> bl.Run:
    case = ridge_case()
    return bl.Run(case.problem, SOLVER, case.hparams, case.start)


def test_a_run_binds_its_problem_once_and_counts_what_its_solve_takes() -> None:
    run = a_run()
    inner, end = run.inner(), run.solve()
    assert run.inner() is inner
    assert end.steps == 7
    before = dict(run.meter.counts)
    inner.grad(run.solver.params(end.state))  # the run has looked at its last iterate
    assert dict(run.meter.counts) == before
    assert run.begin().steps == 0
    seen: list[int] = []
    assert run.solve(lambda state: seen.append(state.steps) or state.steps == 3).steps == 3
    assert seen == [0, 1, 2, 3]


def test_an_estimator_with_six_arguments_forwards_and_says_what_is_new() -> None:
    @dataclass(frozen=True)
    class New(bl.HypergradEstimator):
        def solve(self, run: bl.Run) -> bl.Solution:
            return bl.Implicit().solve(run)

    with pytest.warns(DeprecationWarning, match=r"Old\.solve takes one argument now: `solve\(self, run\)`"):

        @dataclass(frozen=True)
        class Old(bl.HypergradEstimator):
            def solve(self, problem: Any, solver: Any, hparams: Any, params: Any, carry: Any, meter: Any) -> Any:
                return bl.Implicit().solve(bl.Run(problem, solver, hparams, params, carry, meter))

    case = ridge_case()
    new, old = (bl.hypergradient(case.problem, bl.Newton(), estimator, case.hparams) for estimator in (New(), Old()))
    assert torch.equal(new.hypergradient, old.hypergradient)
    assert new.cost.counts == old.cost.counts


def test_begin_and_run_inner_forward_and_say_what_is_new() -> None:
    run = a_run()
    names: Any = bl
    with pytest.warns(DeprecationWarning, match="`Run.solve`") as warned:
        end = names.run_inner(run.inner(), SOLVER, names.begin(run.inner(), SOLVER, run.params, run.carry))
    assert len(warned) == 2
    torch.testing.assert_close(end.state.params, run.solve().state.params, rtol=1e-12, atol=0)
