"""Checkpointed unrolling against stored iterates and plain autograd; the memory and the work of the general path."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import F64, SOLVERS, UNROLLED, flat, normal, quadratic_case, tree_case
from torch import Tensor

import bilevel as bl
from bilevel.core import tree
from bilevel.engine.checkpointing import CheckpointedStates

CHECKPOINT = bl.FullUnroll(memory="checkpoint")


def same(one: bl.Estimate, other: bl.Estimate) -> None:
    """The hypergradients are equal bit for bit."""
    assert torch.equal(flat(one.hypergradient), flat(other.hypergradient))
    assert one.outer_loss == other.outer_loss


@pytest.mark.crossed
@pytest.mark.parametrize("cls", UNROLLED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("steps", [1, 2, 4, 19])
def test_checkpoints_give_the_numbers_of_stored_iterates_bit_for_bit(cls: type, steps: int) -> None:
    case = tree_case("dict", "dict")
    solver = SOLVERS[cls].make(case.problem, steps=min(steps, 4) if cls is bl.Newton else steps)
    both = [bl.hypergradient(case.problem, solver, e, case.hparams) for e in (CHECKPOINT, bl.FullUnroll())]
    same(*both)
    assert both[0].certificate == both[1].certificate


def test_checkpoints_serve_runs_that_end_by_tolerance_and_warm_starts() -> None:
    case = quadratic_case()  # of long runs: trees are above
    for solver in (bl.HeavyBall(0.1, 0.5, tol=1e-6), bl.Adam(0.05, tol=1e-4, steps=500)):
        carry = None
        for _ in range(2):
            both = [
                bl.hypergradient(case.problem, solver, e, case.hparams, carry=carry)
                for e in (CHECKPOINT, bl.FullUnroll())
            ]
            same(*both)
            carry = both[0].carry
            solver = replace(solver, tol=solver.tol / 100)


def test_a_pullback_that_is_called_again_computes_the_same_states_again() -> None:
    case = tree_case("dict", "dict")
    u = tree.attach(case.hparams)
    rows = []
    for estimator in (CHECKPOINT, bl.FullUnroll()):
        x = bl.solution(case.problem, bl.Nesterov(0.1, 0.5, steps=20), estimator, u)
        loss = [x["a"].sum(), x["b"]["d"].square().sum()]
        rows.append([torch.autograd.grad(value, tree.leaves(u), retain_graph=True) for value in loss])
    for ours, stored in zip(*rows, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, stored, strict=True))


def run(steps: int) -> tuple[CheckpointedStates, list[bl.InnerState], bl.BilevelProblem, Any]:
    """A recorded run, as checkpoints and in full."""
    case = tree_case("tensor", "tensor")
    inner, solver = case.problem.bind(case.hparams), bl.HeavyBall(0.1, 0.5)
    kept, states = CheckpointedStates(inner, solver, lambda: None), []
    state = solver.init(inner, case.start)
    for _ in range(steps):
        kept.append(state)
        states.append(state)
        state = solver.step(inner, state)
    return kept, states, case.problem, inner


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 9, 50, 129, 1000])
def test_checkpoints_hold_the_whole_run_in_at_most_two_and_a_fifth_square_roots(steps: int) -> None:
    kept, states, _, inner = run(steps)
    assert len(kept) == steps
    assert len(kept._kept) + kept._spacing <= 2.2 * math.sqrt(steps) + 1
    taken = inner.counts["gradient"]
    backward = list(reversed(kept))
    assert [state.steps for state in backward] == [state.steps for state in reversed(states)]
    assert all(torch.equal(a.params, b.params) for a, b in zip(backward, reversed(states), strict=True))
    # Every step between two checkpoints is taken once more.
    assert inner.counts["gradient"] - taken == steps - len(kept._kept)
    if steps < 200:
        assert all(torch.equal(a.params, b.params) for a, b in zip(kept, states, strict=True))
        assert torch.equal(kept[-1].params, states[-1].params)
        assert [state.steps for state in kept[1:steps:7]] == list(range(1, steps, 7))
    with pytest.raises(IndexError):
        kept[steps]


def test_the_cost_counts_the_gradients_that_are_computed_again() -> None:
    case = quadratic_case()
    solver = bl.GradientDescent(0.05, steps=100)
    stored, checkpointed = (
        bl.hypergradient(case.problem, solver, e, case.hparams).cost.counts for e in (bl.FullUnroll(), CHECKPOINT)
    )
    assert checkpointed["vjp"] == stored["vjp"] == 100
    assert 80 <= checkpointed["gradient"] - stored["gradient"] <= 100


def network(features: int = 20, hidden: int = 30) -> tuple[bl.BilevelProblem, Any, Any]:
    """A small MLP with a weight decay for each tensor, and its losses."""
    X, y, V, z = normal(1, 40, features), normal(2, 40), normal(3, 30, features), normal(4, 30)
    params = {
        "W": 0.2 * normal(5, features, hidden),
        "b": torch.zeros(hidden, dtype=F64),
        "v": 0.2 * normal(6, hidden),
        "c": torch.zeros((), dtype=F64),
    }

    def model(p: Any, X: Tensor) -> Tensor:
        return torch.tanh(X @ p["W"] + p["b"]) @ p["v"] + p["c"]

    def inner(p: Any, u: Any) -> Tensor:
        return (model(p, X) - y).square().mean() + sum(u[k].exp() * p[k].square().sum() for k in p)

    def outer(p: Any, u: Any) -> Tensor:
        return (model(p, V) - z).square().mean()

    return bl.BilevelProblem(inner, outer, params), inner, outer


DECAY = {key: torch.tensor(-4.0, dtype=F64) for key in "Wbvc"}


def by_plain_autograd(problem: bl.BilevelProblem, inner: Any, outer: Any, step_size: float, steps: int) -> Tensor:
    u = tree.attach(DECAY)
    x = tree.attach(problem.params)
    for _ in range(steps):
        gradient = torch.autograd.grad(inner(x, u), list(x.values()), create_graph=True)
        x = {key: value - step_size * g for (key, value), g in zip(x.items(), gradient, strict=True)}
    return flat(dict(zip(u, torch.autograd.grad(outer(x, u), list(u.values())), strict=True)))


@pytest.mark.parametrize(
    "estimator",
    [CHECKPOINT, bl.FullUnroll(), bl.FullUnroll(memory="graph"), bl.FullUnroll(mode="forward")],
    ids=repr,
)
@pytest.mark.parametrize("traced", [False, True])
def test_unrolling_a_network_for_many_steps_equals_autograd_through_the_whole_run(estimator: Any, traced: bool) -> None:
    problem, inner, outer = network()
    expected = by_plain_autograd(problem, inner, outer, 0.05, 40)
    problem = bl.trace(problem) if traced else problem
    estimate = bl.hypergradient(problem, bl.GradientDescent(0.05, steps=40), estimator, DECAY)
    torch.testing.assert_close(flat(estimate.hypergradient), expected, rtol=1e-10, atol=1e-14)


def evaluations(problem: bl.BilevelProblem) -> list[int]:
    """Count the evaluations of the inner loss from now on."""
    count, loss = [0], problem.inner_loss

    def counted(params: Any, hparams: Any) -> Tensor:
        count[0] += 1
        return loss(params, hparams)

    problem.inner_loss = counted
    return count


def test_a_reverse_sweep_evaluates_the_loss_once_for_each_step_and_frees_each_graph() -> None:
    problem, *_ = network()
    # What the first call looks at once for a problem object is no part of a sweep.
    bl.hypergradient(problem, bl.GradientDescent(0.05, steps=10), bl.FullUnroll(), DECAY)
    count = evaluations(problem)
    bl.hypergradient(problem, bl.GradientDescent(0.05, steps=10), bl.FullUnroll(), DECAY, check=False)
    # Ten steps, two looks at the residual (the first one at the start, whose gradient is no longer kept), ten VJPs.
    assert count[0] <= 10 + 2 + 10
    point = problem.bind(DECAY).linearize(problem.params)
    before = count[0]
    point.vjp(problem.params)
    assert point._gradient_graph is None
    assert count[0] == before + 1


def test_a_linear_solve_evaluates_the_loss_once_however_many_products_it_takes() -> None:
    problem, *_ = network()
    point = problem.bind(DECAY).linearize(problem.params)
    count = evaluations(problem)
    first = [point.hvp(problem.params) for _ in range(5)]
    by_params, by_hparams = point.vjp(problem.params)
    again, cross = point.hvp(problem.params), point.cross(problem.params)
    assert count[0] == 1
    torch.testing.assert_close(flat(by_params), flat(first[0]), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(flat(again), flat(first[0]), rtol=0, atol=0)
    torch.testing.assert_close(flat(by_hparams), flat(cross), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("solver", [bl.GradientDescent(0.05), bl.HeavyBall(0.05, 0.5)], ids=repr)
def test_forward_mode_linearises_once_for_all_directions(solver: Any) -> None:
    problem, *_ = network()
    solver, estimator = replace(solver, steps=10), bl.FullUnroll(mode="forward")
    bl.hypergradient(problem, solver, estimator, DECAY)
    count = evaluations(problem)
    bl.hypergradient(problem, solver, estimator, DECAY, check=False)
    assert count[0] <= 10 + 2 + 10


def peak(problem: bl.BilevelProblem, estimator: Any, steps: int) -> int:
    gc.collect()
    estimate = bl.hypergradient(problem, bl.GradientDescent(0.01, steps=steps), estimator, DECAY)
    assert estimate.cost.peak_memory is not None
    return estimate.cost.peak_memory


def test_memory_grows_with_the_steps_for_iterates_with_their_root_for_checkpoints_and_not_at_all_forward() -> None:
    problem, *_ = network(100, 100)
    one = tree.nbytes(problem.params)
    if bl.hypergradient(problem, bl.GradientDescent(0.01, steps=1), bl.FullUnroll(), DECAY).cost.peak_memory is None:
        pytest.skip("this system does not tell its allocations")
    growth = {
        name: (peak(problem, estimator, 50) - peak(problem, estimator, 20)) / one
        for name, estimator in {
            "iterates": bl.FullUnroll(),
            "checkpoint": CHECKPOINT,
            "forward": bl.FullUnroll(mode="forward"),
        }.items()
    }
    assert 28 < growth["iterates"] < 32
    assert growth["checkpoint"] < 2.2 * (50**0.5 - 20**0.5) + 6
    assert abs(growth["forward"]) < 3
