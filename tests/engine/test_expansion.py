"""Runs that lead away from a solution, and maps whose fixed point is none: a status says so, without false alarms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import F64, normal

import bilevel as bl

ESTIMATORS = [bl.Implicit(bl.GMRES()), bl.FullUnroll(), bl.TruncatedUnroll(tail=3)]


def rotation(angle: float, modulus: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return modulus * torch.tensor([[c, -s], [s, c]], dtype=F64)


EXPANDING: dict[str, tuple[torch.Tensor, int]] = {
    "1.01": (1.01 * torch.eye(2, dtype=F64), 100),
    "slow": (1.0001 * torch.eye(2, dtype=F64), 30),
    "alternating": (-1.02 * torch.eye(2, dtype=F64), 30),
    "rotation": (rotation(0.3, 1.01), 30),
    "slow rotation": (rotation(1.3, 1.001), 100),
    "one direction of two": (torch.diag(torch.tensor([0.5, 1.02], dtype=F64)), 100),
}
CONTRACTING: dict[str, tuple[torch.Tensor, int]] = {
    "0.9": (0.9 * torch.eye(2, dtype=F64), 30),
    "rotation": (rotation(0.3, 0.99), 30),
    "not normal, while it grows": (torch.tensor([[0.9, 5.0], [0.0, 0.9]], dtype=F64), 5),
    "not normal, slow, while it grows": (torch.tensor([[0.99, 5.0], [0.0, 0.99]], dtype=F64), 30),
    "not normal, and slower still": (torch.tensor([[0.996, 5.0], [0.0, 0.996]], dtype=F64), 30),
    "not normal, after its peak": (torch.tensor([[0.9, 5.0], [0.0, 0.9]], dtype=F64), 300),
}


def of_map(update: Callable[[Any, Any], Any], steps: int, estimator: Any, dtype: torch.dtype = F64) -> bl.Estimate:
    """The hypergradient of a problem that is stated by a map of two unknowns."""
    problem = bl.BilevelProblem.from_fixed_point(update, lambda w, u: w.square().sum(), torch.zeros(2, dtype=dtype))
    solver = bl.FixedPoint(update, steps=steps)
    return bl.hypergradient(problem, solver, estimator, torch.ones(2, dtype=dtype), on_failure="return")


@pytest.mark.parametrize("name", EXPANDING)
def test_a_map_that_expands_is_called_so(name: str) -> None:
    matrix, steps = EXPANDING[name]
    for estimator in ESTIMATORS:
        found = of_map(lambda w, u: matrix @ w + u, steps, estimator)
        assert found.status is bl.Status.DIVERGED
        assert "FixedPoint leads away from a solution: its residual grew from 1.41" in found.verdict.detail
    single = of_map(lambda w, u: matrix.float() @ w + u, steps, bl.FullUnroll(), torch.float32)
    assert single.status is bl.Status.DIVERGED


def test_a_map_on_growing_ellipses_is_called_so_though_its_residual_rises_and_falls() -> None:
    scale = torch.diag(torch.tensor([1.0, 5.0], dtype=F64))
    matrix = scale @ rotation(0.3, 1.01) @ scale.inverse()
    assert of_map(lambda w, u: matrix @ w + u, 35, bl.FullUnroll()).status is bl.Status.DIVERGED


@pytest.mark.parametrize("name", CONTRACTING)
def test_a_contraction_is_not_called_expanding_whatever_it_does_at_first(name: str) -> None:
    matrix, steps = CONTRACTING[name]
    for estimator in ESTIMATORS[1:]:
        assert of_map(lambda w, u: matrix @ w + u, steps, estimator).status is not bl.Status.DIVERGED


def quadratic(curvatures: list[float]) -> bl.BilevelProblem:
    c = torch.tensor(curvatures, dtype=F64)
    return bl.BilevelProblem(
        lambda x, u: (0.5 * c * x * x).sum() - u * x.sum(), lambda x, u: (x - 1).square().sum(), torch.zeros_like(c)
    )


@pytest.mark.crossed
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(
    ("curvatures", "solver"),
    [
        ([-0.1], bl.GradientDescent(step_size=0.1, steps=100)),
        ([1.0, -0.2], bl.GradientDescent(step_size=0.1, steps=100)),
        ([1.0, 0.1], bl.GradientDescent(step_size=2.01, steps=100)),
        ([1.0, -0.02], bl.Nesterov(step_size=0.5, steps=30)),
    ],
    ids=["maximum", "saddle", "step too large", "momentum"],
)
def test_descent_along_a_concave_direction_or_with_too_large_steps_is_called_so(
    curvatures: list[float], solver: Any, estimator: Any
) -> None:
    u = torch.tensor(0.5, dtype=F64)
    found = bl.hypergradient(quadratic(curvatures), solver, estimator, u, on_failure="return")
    assert found.status is bl.Status.DIVERGED
    assert "leads away from a solution" in found.verdict.detail


def test_a_member_of_a_batch_that_leads_away_is_called_so_and_spoils_no_other() -> None:
    curvatures = torch.tensor([[1.0, 0.5], [1.0, -0.2]], dtype=F64)
    problem = bl.BilevelProblem(
        lambda x, u, c: (0.5 * c * x * x).sum() - u * x.sum(),
        lambda x, u, c: (x - 1).square().sum(),
        torch.zeros(2, dtype=F64),
        data=curvatures[0],
    ).batched(2, curvatures)
    solver = bl.GradientDescent(step_size=0.1, steps=100)
    found = bl.hypergradient(problem, solver, bl.FullUnroll(), torch.full((2,), 0.5, dtype=F64), on_failure="return")
    assert [each.status for each in found] == [bl.Status.OK, bl.Status.DIVERGED]
    assert "leads away from a solution" in found[1].verdict.detail


def test_ripples_of_a_momentum_and_gradients_that_grow_for_a_while_are_no_divergence() -> None:
    u = torch.tensor(0.5, dtype=F64)
    for steps in (3, 7, 20, 50):
        solver = bl.HeavyBall(step_size=1.0, momentum=0.99, steps=steps)
        assert bl.hypergradient(quadratic([1.0, 0.001]), solver, bl.FullUnroll(), u).status.ok
    # Near the saddle of a double well the gradient grows until the iterate has left it.
    well = bl.BilevelProblem(
        lambda x, u: 0.25 * (x**4).sum() - 0.5 * (x * x).sum() - 1e-3 * u * x.sum(),
        lambda x, u: x.sum(),
        torch.full((2,), 0.05, dtype=F64),
    )
    for steps in (10, 20, 30, 200):
        solver = bl.GradientDescent(step_size=0.1, steps=steps)
        assert bl.hypergradient(well, solver, bl.FullUnroll(), u).status.ok


def test_a_fixed_point_ends_by_its_own_residual() -> None:
    curvatures = torch.tensor([1e6, 3e6], dtype=F64)
    problem = bl.BilevelProblem(
        lambda x, u: (0.5 * curvatures * x * x).sum() - u * x.sum(),
        lambda x, u: (x - 1).square().sum(),
        torch.zeros(2, dtype=F64),
    )

    def update(x: Any, u: Any) -> Any:
        return x - 3e-7 * (curvatures * x - u)

    u = torch.tensor(2e6, dtype=F64)
    found = bl.hypergradient(problem, bl.FixedPoint(update, tol=1e-6), bl.Implicit(), u)
    x = found.params
    assert float((x - update(x, u)).norm()) <= 1e-6
    assert found.certificate.inner_residual == pytest.approx(float((x - update(x, u)).norm()))
    exact = 2 * ((u / curvatures - 1) / curvatures).sum()
    assert float(found.hypergradient) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"tol": 1e-9}, {"steps": 200}], ids=repr)
def test_a_fixed_point_that_does_not_minimise_the_inner_loss_is_noticed(options: dict[str, Any]) -> None:
    u = torch.tensor(0.5, dtype=F64)
    elsewhere = bl.FixedPoint(lambda x, u: 0.5 * x + u, **options)
    for linear_solver in (bl.CG(), bl.Direct()):
        found = bl.hypergradient(quadratic([1.0, 3.0]), elsewhere, bl.Implicit(linear_solver), u, on_failure="return")
        assert found.status is bl.Status.INACCURATE
        assert "the fixed point of `update` does not solve the inner problem" in found.verdict.detail
    c = torch.tensor([1.0, 3.0], dtype=F64)
    right = bl.FixedPoint(lambda x, u: x - 0.3 * (c * x - u), **options)
    assert bl.hypergradient(quadratic([1.0, 3.0]), right, bl.Implicit(), u).status.ok
    # Likewise beside an optimality map of another update.
    other = bl.BilevelProblem.from_fixed_point(
        lambda x, u: 0.3 * x + u, lambda x, u: x.square().sum(), torch.zeros(2, dtype=F64)
    )
    found = bl.hypergradient(other, elsewhere, bl.Implicit(bl.GMRES()), u, on_failure="return")
    assert found.status is bl.Status.INACCURATE


def test_a_warm_start_at_a_fixed_point_raises_no_alarm() -> None:
    update = lambda x, u: torch.tanh(0.5 * x) + u * normal(5, 2)  # noqa: E731
    problem = bl.BilevelProblem.from_fixed_point(update, lambda x, u: x.square().sum(), torch.zeros(2, dtype=F64))
    u, solver = torch.tensor(0.7, dtype=F64), bl.FixedPoint(update, steps=60)
    first = bl.hypergradient(problem, solver, bl.Implicit(bl.GMRES()), u)
    again = bl.hypergradient(problem, solver, bl.Implicit(bl.GMRES()), u, carry=first.carry)
    assert again.status.ok
    assert float(again.hypergradient) == pytest.approx(float(first.hypergradient), rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "step_size", "memory"),
    [(3, 0.01, "iterates"), (3, 0.01, "graph"), (30, 0.01, "iterates"), (30, 0.01, "graph"), (3, 0.001, "iterates")],
)
def test_steps_from_near_a_maximum_to_a_minimum_are_no_divergence_and_no_cost(
    steps: int, step_size: float, memory: Any
) -> None:
    problem = bl.BilevelProblem(
        lambda x, u: (x**4 / 4 - x * x / 2).sum() + u * x.sum(),
        lambda x, u: (x - 1).square().sum(),
        torch.full((2,), 0.05, dtype=F64),
    )
    solver = bl.GradientDescent(step_size=step_size, steps=steps)
    found = bl.hypergradient(problem, solver, bl.FullUnroll(memory=memory), torch.tensor(0.01, dtype=F64))
    assert found.status is bl.Status.OK
    assert found.cost.counts["gradient"] <= steps + 2
