"""Estimators that leave something out on purpose: one step (all steps but the last), first order (all of them)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_cases import DIRECT
from helpers import BIASED_ESTIMATORS, F64, SOLVERS, STEP, UNROLLED, flat, normal, quadratic_case, tree_case
from pretend_accelerator import DEVICE, accelerator
from torch import Tensor

import bilevel as bl

TASKS = normal(61, 4, 3)


def inner(change: Tensor, start: Tensor, target: Tensor) -> Tensor:
    return (0.5 * (start + change - target) ** 2).sum() + (start + change).cosh().sum()


def outer(change: Tensor, start: Tensor, target: Tensor) -> Tensor:
    return (start + change - 2.0 * target).square().sum()


def adaptation(device: Any = "cpu") -> bl.BilevelProblem:
    """A few steps from a shared start towards a target: the losses of MAML."""
    zeros = torch.zeros(3, dtype=F64, device=device)
    return bl.BilevelProblem(inner, outer, zeros, data=TASKS[0].to(device))


def first_order_maml(start: Tensor, target: Tensor, steps: int) -> Tensor:
    """The gradient of the outer loss at the adapted weights, as Finn et al. write it."""
    weights = start.clone()
    for _ in range(steps):
        weights = weights - STEP * (weights - target + weights.sinh())
    return 2.0 * (weights - 2.0 * target)


@pytest.mark.parametrize("steps", [1, 5])
def test_first_order_is_the_gradient_at_the_adapted_weights(steps: int) -> None:
    u, solver = normal(62, 3), bl.GradientDescent(STEP, steps=steps)
    estimate = bl.hypergradient(adaptation(), solver, bl.FirstOrder(), u)
    torch.testing.assert_close(estimate.hypergradient, first_order_maml(u, TASKS[0], steps), rtol=1e-13, atol=1e-13)
    assert set(estimate.cost.counts) == {"gradient", "outer"}


def test_first_order_runs_a_batch_of_tasks() -> None:
    u, solver = normal(62, 4, 3), bl.GradientDescent(STEP, steps=3)
    estimates = bl.hypergradient(adaptation().batched(4, TASKS), solver, bl.FirstOrder(), u)
    for start, target, estimate in zip(u, TASKS, estimates, strict=True):
        torch.testing.assert_close(estimate.hypergradient, first_order_maml(start, target, 3), rtol=1e-12, atol=1e-13)
        assert "the indirect term, through the inner solution, is dropped" in estimate.certificate.error_note


def test_first_order_says_what_it_drops_and_a_certificate_says_how_much() -> None:
    case = tree_case("dict", "dict")
    estimate = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), bl.FirstOrder(), case.hparams)
    direct = case.outer(case.solution(), flat(case.hparams))[1]
    torch.testing.assert_close(flat(estimate.hypergradient), direct, rtol=1e-9, atol=1e-11)
    assert "the indirect term, through the inner solution, is dropped" in estimate.certificate.error_note
    # What is dropped is larger than what is kept, and the certificate says so.
    with pytest.warns(bl.BilevelWarning, match="the error of the hypergradient may be .*INACCURATE"):
        certified = bl.hypergradient(case.problem, bl.Newton(tol=1e-12), bl.FirstOrder(), case.hparams, certify=True)
    assert certified.certificate.error == pytest.approx(float((direct - case.hypergradient()).norm()), rel=0.3)


def test_first_order_refuses_hyperparameters_without_a_direct_term() -> None:
    def loss(w: Any, u: Any) -> Tensor:
        return w.square().sum() * u["seen"] + w.sum() * u["unseen"]

    hparams = {"seen": torch.tensor(1.0, dtype=F64), "unseen": torch.tensor(0.5, dtype=F64)}
    start = torch.ones(2, dtype=F64)
    for outer_loss, name in ((lambda w, u: u["seen"] * w.sum(), "unseen"), (lambda w, u: w.sum(), "seen")):
        problem = bl.BilevelProblem(loss, outer_loss, start)
        sentence = rf"`outer_loss` does not depend on `hparams\['{name}'\]` directly, and FirstOrder drops the indirect"
        with pytest.raises(ValueError, match=sentence):
            bl.hypergradient(problem, bl.GradientDescent(STEP, steps=2), bl.FirstOrder(), hparams)
    problem = bl.BilevelProblem(loss, lambda w, u: u["seen"] * w.sum(), start).batched(2)
    with pytest.raises(ValueError, match="directly, and FirstOrder drops the indirect"):
        bl.hypergradient(
            problem, bl.GradientDescent(STEP, steps=2), bl.FirstOrder(), {k: v.expand(2) for k, v in hparams.items()}
        )


@pytest.mark.parametrize("name", DIRECT)
def test_a_direct_estimator_stays_on_its_device(name: str) -> None:
    u, solver = normal(62, 3), bl.GradientDescent(STEP, steps=8)
    here = bl.hypergradient(adaptation(), solver, DIRECT[name], u)
    with accelerator() as log:
        there = bl.hypergradient(adaptation(DEVICE), solver, DIRECT[name], u.to(DEVICE))
        assert there.hypergradient.device == DEVICE
        assert log.host_scalars.total() == 0
        torch.testing.assert_close(there.hypergradient.cpu(), here.hypergradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", BIASED_ESTIMATORS.values(), ids=repr)
def test_inputs_keep_their_shape_and_are_not_modified(estimator: Any) -> None:
    case = tree_case("dict", "dict")
    before = flat(case.hparams).clone()
    estimate = bl.hypergradient(case.problem, bl.GradientDescent(STEP, steps=5), estimator, case.hparams)
    assert bl.tree.names(estimate.hypergradient) == bl.tree.names(case.hparams)
    assert torch.equal(flat(case.hparams), before)


# One step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", UNROLLED, ids=lambda cls: cls.__name__)
def test_one_step_is_the_derivative_of_the_last_step_of_every_solver(cls: type) -> None:
    case = tree_case()
    solver = SOLVERS[cls].make(case.problem, steps=4)
    estimate = bl.hypergradient(case.problem, solver, bl.OneStep(), case.hparams)
    formula, u = SOLVERS[cls].formula, case.hparams.clone().requires_grad_()
    x = flat(case.start)
    state = solver.init(case.problem.bind(case.hparams), case.start)
    memory = tuple(bl.tree.leaves(state.memory))
    for k in range(4):
        x, memory = x.detach(), tuple(part.detach() for part in memory)
        x, memory = formula(lambda y: case.grad(y, u), x, memory, k)
    by_x, by_u = case.outer(x.detach(), case.hparams)
    (expected,) = torch.autograd.grad(x, u, by_x)
    torch.testing.assert_close(estimate.hypergradient, by_u + expected, rtol=1e-9, atol=1e-11)
    assert estimate.certificate.adjoint_steps == 1


@pytest.mark.parametrize("steps", [5, 8])
def test_one_step_of_newton_is_exact_at_the_solution(steps: int) -> None:
    case = tree_case("dict", "dict")
    estimate = bl.hypergradient(case.problem, bl.Newton(steps=steps), bl.OneStep(), case.hparams)
    torch.testing.assert_close(flat(estimate.hypergradient), case.hypergradient(), rtol=1e-7, atol=1e-9)


def test_the_error_of_one_step_of_gradient_descent_is_within_its_bound_and_does_not_fall() -> None:
    case = quadratic_case()
    x, u = case.solution(), flat(case.hparams)
    H, C, (by_x, by_u) = case.hessian(x, u), case.cross(x, u), case.outer(x, u)
    rho = float(torch.linalg.matrix_norm(torch.eye(len(x), dtype=F64) - STEP * H, 2))
    assert 0.5 < rho < 1
    bound = rho / (1 - rho) * STEP * float(torch.linalg.matrix_norm(C, 2)) * float(by_x.norm())
    errors = []
    for steps in (200, 2000):
        solver = bl.GradientDescent(STEP, steps=steps)
        estimate = bl.hypergradient(case.problem, solver, bl.OneStep(), case.hparams)
        torch.testing.assert_close(estimate.hypergradient, by_u - STEP * C.t() @ by_x, rtol=1e-6, atol=1e-8)
        errors.append(float((estimate.hypergradient - case.hypergradient()).norm()))
    assert 0.01 * bound < errors[0] <= bound
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_one_step_refuses_a_solver_whose_steps_are_not_differentiated() -> None:
    case = tree_case()
    with pytest.raises(ValueError, match="the steps of QuasiNewton are not differentiated: use Implicit"):
        bl.hypergradient(case.problem, bl.QuasiNewton(steps=3), bl.OneStep(), case.hparams)
