"""`check_hypergradient`: right estimators pass, and a wrong one is named component by component."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import ESTIMATORS, F64, PROBLEMS, descent, tree_case

import bilevel as bl
from bilevel.core import tree


@dataclass(frozen=True)
class OffByFactor(bl.Implicit):
    """Implicit, with one leaf of its result scaled."""

    leaf: int = 0
    factor: float = 1.01

    def solve(self, run: bl.Run) -> bl.Solution:
        solved = super().solve(run)

        def pullback(cotangent: Any) -> bl.Pullback:
            pulled = solved.pullback(cotangent)
            leaves = tree.leaves(pulled.hparams)
            leaves[self.leaf] = leaves[self.leaf].clone()
            leaves[self.leaf].view(-1)[-1] *= self.factor
            return replace(pulled, hparams=tree.rebuild(pulled.hparams, leaves))

        return replace(solved, pullback=pullback)


EVERY = list(ESTIMATORS.values())
PAIRS = [(problem, EVERY[(index + shift) % len(EVERY)]) for index, problem in enumerate(PROBLEMS) for shift in (0, 3)]
"""Every problem twice and every estimator twice: all pairs at once are the business of `test_hypergrad.py`."""


@pytest.mark.parametrize(
    ("problem", "estimator"), PAIRS, ids=lambda value: getattr(value, "__name__", type(value).__name__)
)
def test_right_estimators_pass(problem: type, estimator: Any) -> None:
    case = PROBLEMS[problem]()
    report = bl.check_hypergradient(case.problem, descent(problem, tol=1e-10), estimator, case.hparams)
    assert report.ok, report
    assert set(report.errors) == {"differences"} | ({"exact"} if hasattr(case.problem, "solve") else set())
    assert max(report.errors.values()) < 1e-5
    assert "agrees" in str(report)


@pytest.mark.parametrize(
    "solver",
    [
        bl.GradientDescent(steps=1),
        bl.GradientDescent(steps=20),
        bl.HeavyBall(steps=5),
        bl.HeavyBall(steps=20),
        bl.Nesterov(steps=5, momentum="auto"),
    ],
    ids=repr,
)
def test_a_full_unroll_with_automatic_step_size_passes_at_any_number_of_steps(solver: Any) -> None:
    case = tree_case("dict", "dict")
    report = bl.check_hypergradient(case.problem, solver, bl.FullUnroll(), case.hparams)
    assert report.ok, report


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda cls: cls.__name__)
def test_a_component_that_is_one_percent_off_is_named(problem: type) -> None:
    case = PROBLEMS[problem]()
    report = bl.check_hypergradient(case.problem, bl.Newton(), OffByFactor(bl.Direct()), case.hparams)
    assert not report.ok
    assert report.worst == f"hparams[{case.hparams.numel() - 1}]"
    assert f"is OFF, most at {report.worst}" in str(report)
    assert str(report).splitlines()[3].startswith(report.worst)  # the worst component heads the table


def test_one_percent_is_within_a_tolerance_of_five() -> None:
    case = tree_case("tensor", "tensor")
    report = bl.check_hypergradient(case.problem, bl.Newton(), OffByFactor(bl.Direct()), case.hparams, rtol=0.05)
    assert report.ok


@pytest.mark.parametrize(("leaf", "label"), [(0, "hparams['penalty']"), (1, "hparams['shift'][0]")])
def test_components_of_dict_hyperparameters_are_named_by_their_keys(leaf: int, label: str) -> None:
    case = tree_case("dict", "dict")
    report = bl.check_hypergradient(case.problem, bl.Newton(), OffByFactor(bl.Direct(), leaf=leaf), case.hparams)
    assert not report.ok
    assert report.worst == label
    assert {row.component for row in report.rows} == {"hparams['penalty']", "hparams['shift'][0]"}


def test_an_estimate_that_failed_is_reported_and_not_raised() -> None:
    case = tree_case("tensor", "tensor")
    report = bl.check_hypergradient(case.problem, bl.Newton(), bl.Implicit(bl.CG(max_steps=1)), case.hparams)
    assert not report.ok
    assert report.errors["differences"] == float("inf")
    assert "status: CG stopped after 1 steps" in str(report)


def test_a_truncated_unroll_far_from_the_solution_is_off() -> None:
    case = tree_case("tensor", "tensor")
    report = bl.check_hypergradient(
        case.problem, bl.GradientDescent(0.05, steps=10), bl.TruncatedUnroll(2), case.hparams
    )
    assert not report.ok


def test_float32_passes_with_its_own_tolerance() -> None:
    case = tree_case("tensor", "tensor")
    single = bl.BilevelProblem(
        lambda w, u: ((w - 1.0) ** 2).sum() + u.exp() * (w * w).sum(), lambda w, u: (w**2).sum(), torch.zeros(3)
    )
    report = bl.check_hypergradient(single, bl.GradientDescent(), bl.Implicit(), torch.tensor(0.1))
    assert report.ok, report
    assert (report.rtol, case.hparams.dtype) == (1e-2, F64)
