"""`weight_decay` against torch's own operations, and the memory that an implicit hypergradient of many decays takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import F64, flat, normal
from torch import Tensor

import bilevel as bl
from bilevel.core import tree

WEIGHTS = {"a": normal(1, 3, 4), "b": normal(2, 4), "c": normal(3, 1)[0]}
DECAYS = {
    "each": {"a": normal(4, 3, 4), "b": normal(5, 4), "c": normal(6, 1)[0]},
    "layer": {"a": normal(4, 1)[0], "b": normal(5, 1)[0], "c": normal(6, 1)[0]},
    "row": {"a": normal(4, 3, 1), "b": normal(5, 1), "c": normal(6, 1)[0]},
}


def by_hand(params: Any, log_decay: Any) -> Tensor:
    return sum((log_decay[name].exp() * w**2).sum() / 2 for name, w in params.items())


def derivatives(penalty: Any, u: Any) -> list[Tensor]:
    """Value, gradient, a Hessian-vector product, cross product and their third derivatives along fixed vectors."""
    params, decay = tree.attach(WEIGHTS), tree.attach(u)
    roots = [*params.values(), *decay.values()]
    value = penalty(params, decay) ** 2
    first = torch.autograd.grad(value, roots, create_graph=True)
    second = torch.autograd.grad(first, roots, [torch.ones_like(g) for g in first], create_graph=True)
    third = torch.autograd.grad(second, roots, [torch.ones_like(g) for g in second])
    return [value, *first, *second, *third]


@pytest.mark.parametrize("kind", DECAYS)
def test_value_and_three_derivatives_are_those_of_torch(kind: str) -> None:
    ours, torchs = (derivatives(penalty, DECAYS[kind]) for penalty in (bl.weight_decay, by_hand))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_its_gradient_is_the_weight_decay_of_torch_optim() -> None:
    w = normal(7, 5).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=1.0, weight_decay=0.3)
    w.grad = torch.zeros_like(w)
    before = w.detach().clone()
    optimizer.step()
    start = before.clone().requires_grad_()
    (slope,) = torch.autograd.grad(bl.weight_decay(start, torch.tensor(0.3, dtype=F64).log()), start)
    torch.testing.assert_close(before - slope, w.detach(), rtol=1e-14, atol=1e-15)


def test_it_runs_under_vmap_and_jacrev() -> None:
    w, u = normal(8, 6, 4), normal(9, 6, 4)
    values = torch.func.vmap(bl.weight_decay)(w, u)
    torch.testing.assert_close(values, (u.exp() * w**2).sum(1) / 2, rtol=1e-13, atol=1e-13)
    matrix = torch.func.jacrev(torch.func.grad(bl.weight_decay))(w[0], u[0])
    torch.testing.assert_close(matrix, torch.diag(u[0].exp()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "decay",
    [
        {"a": normal(4, 1)},
        {"a": normal(4, 1), "b": normal(5, 3), "c": normal(6, 1)[0]},
        DECAYS["each"] | {"c": normal(6, 2)},
    ],
)
def test_decays_that_do_not_fit_get_a_sentence(decay: Any) -> None:
    with pytest.raises(ValueError, match="`log_decay` must be a tree like `params`, of leaves that broadcast"):
        bl.weight_decay(WEIGHTS, decay)


def large(penalty: Any) -> tuple[bl.BilevelProblem, Any]:
    X, y, start = normal(11, 8, 300), normal(12, 8, 300), {"w": 0.05 * normal(13, 300, 300)}
    problem = bl.BilevelProblem(
        lambda p, u: (X @ p["w"] - y).square().mean() + penalty(p, u), lambda p, u: (X @ p["w"]).square().mean(), start
    )
    return problem, {"w": torch.full_like(start["w"], -1.0)}


@pytest.mark.parametrize("linear_solver", [bl.CG(steps=5), bl.Neumann(steps=5, step_size=0.5)], ids=repr)
def test_a_decay_for_each_weight_costs_few_copies_of_the_params_and_gives_the_same_number(linear_solver: Any) -> None:
    results, held = [], []
    for penalty in (bl.weight_decay, by_hand):
        problem, u = large(penalty)
        solver = bl.GradientDescent(0.1, steps=2)
        for _ in range(2):
            estimate = bl.hypergradient(problem, solver, bl.Implicit(linear_solver, damping=0.1), u, check=False)
        results.append(flat(estimate.hypergradient))
        held.append(estimate.cost.peak_memory)
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    if None in held:
        pytest.skip("this system does not tell its allocations")
    # Sampled between products, two inner iterates included.
    assert held[0] / tree.nbytes(u) < 8
    assert held[0] <= held[1]


def test_many_hyperparameters_and_few_have_the_same_products() -> None:
    for shape in ((1,), (300, 300)):
        problem, _ = large(lambda p, u: (u["w"].exp() * p["w"].square()).sum())
        u = {"w": torch.full(shape, -1.0, dtype=F64)}
        point = problem.bind(u).linearize(problem.params)
        v = {"w": normal(14, 300, 300)}
        separate = point.hvp(v), point.cross(v)
        joint = problem.bind(u).linearize(problem.params).vjp(v)
        for a, b in zip(separate, joint, strict=True):
            torch.testing.assert_close(a["w"], b["w"], rtol=1e-12, atol=1e-13)
