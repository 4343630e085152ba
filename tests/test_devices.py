"""Every solver and estimator on a device: nothing strays, nothing differs from the CPU, mixtures get their sentence.

The pretend accelerator stands for the device on every machine; the tests marked `gpu` take CUDA.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import device_cases as cases
import pytest
import torch
from device_cases import BUDGETED, ESTIMATORS, PROBLEMS, SOLVERS
from pretend_accelerator import DEVICE, accelerator

import bilevel as bl
from bilevel.engine.loop import LOOK

CPU = torch.device("cpu")


def each(table: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("name", table)


def solved(make: Callable[[Any], cases.Placed], device: Any, solver: Any, estimator: Any, **options: Any) -> Any:
    placed = make(device)
    return bl.hypergradient(placed.problem, solver, estimator, placed.hparams, on_failure="return", **options)


def close(there: Any, here: Any, tolerance: float) -> None:
    """Two trees agree, relative to their size."""
    for a, b in zip(bl.tree.leaves(there), bl.tree.leaves(here), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def on_device(tree: Any) -> bool:
    return all(leaf.device == DEVICE for leaf in bl.tree.leaves(tree) if isinstance(leaf, torch.Tensor))


@functools.cache
def looked_at(problem: str, device: Any) -> cases.Placed:
    """A problem after its first call, which looks at its derivatives, along random directions made on the host."""
    placed = PROBLEMS[problem].make(device)
    bl.hypergradient(placed.problem, bl.GradientDescent(steps=5), bl.FullUnroll(), placed.hparams)
    return placed


@pytest.mark.parametrize("problem", ["logistic", "dictionary"])
@each(ESTIMATORS)
def test_a_hypergradient_stays_on_its_device_and_equals_that_of_the_cpu(problem: str, name: str) -> None:
    row, solver = ESTIMATORS[name], bl.GradientDescent(steps=5)
    here = looked_at(problem, CPU)
    with accelerator() as log:
        placed = looked_at(problem, DEVICE)
        log.uploads.clear()
        there = bl.hypergradient(placed.problem, solver, row.estimator, placed.hparams)
        assert on_device([there.hypergradient, there.params, there.carry.state.variables])
        # Lanczos' start, for each measured step size; the weights of GMRES, for each restart.
        assert log.uploads.total() <= row.runs + 1 + 2 * row.flat  # what steps are made of, there and back
        assert log.host_scalars.total() == 0
        expected = bl.hypergradient(here.problem, solver, row.estimator, here.hparams)
        close(there.hypergradient, expected.hypergradient, row.agreement)


@each(BUDGETED)
def test_an_estimator_with_a_budget_stays_on_its_device(name: str) -> None:
    make, solver = PROBLEMS["logistic"].make, bl.GradientDescent(0.5)
    with accelerator() as log:
        there = solved(make, DEVICE, solver, BUDGETED[name])
        assert on_device([there.hypergradient, there.params, there.carry.state.variables])
        assert log.host_scalars.total() == 0
        close(there.hypergradient, solved(make, CPU, solver, BUDGETED[name]).hypergradient, 1e-4)


@each(SOLVERS)
def test_the_steps_of_a_solver_stay_on_their_device_and_equal_those_of_the_cpu(name: str) -> None:
    solver, make = replace(SOLVERS[name].solver, steps=3), PROBLEMS["logistic"].make
    with accelerator() as log:
        there = solved(make, DEVICE, solver, SOLVERS[name].estimator)
        assert on_device([there.hypergradient, there.carry.state.variables])
        assert log.host_scalars.total() == 0
        close(there.hypergradient, solved(make, CPU, solver, SOLVERS[name].estimator).hypergradient, 1e-10)


@each(PROBLEMS)
def test_an_outer_run_its_state_and_its_certificate_stay_on_their_device(name: str) -> None:
    def outer(device: Any) -> bl.OuterOptimizer:
        placed = PROBLEMS[name].make(device)
        solver, estimator = bl.GradientDescent(steps=5), bl.Implicit()
        return bl.OuterOptimizer(placed.problem, solver, estimator, placed.hparams, None, certify=True)

    with accelerator() as log:
        there = outer(DEVICE)
        there.run(1, progress=False)
        again = outer(DEVICE)
        again.load_state_dict(there.state_dict())
        again.run(1, progress=False)
        assert on_device([again.hparams, again.carry.state.variables, again.carry.adjoint])
        assert log.host_scalars.total() == 0
        here = outer(CPU)
        here.run(2, progress=False)
        close(again.hparams, here.hparams, 1e-10)
        assert again.history[-1].error == pytest.approx(here.history[-1].error, rel=1e-6)


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_an_outer_search_hands_its_points_to_the_device(name: str) -> None:
    def ends(device: Any) -> bl.OuterOptimizer:
        placed = PROBLEMS[name].make(device)
        return bl.OuterOptimizer(placed.problem, bl.Newton(), bl.Implicit(), placed.hparams, bl.HyperNewton())

    with accelerator():
        there, here = ends(DEVICE), ends(CPU)
        results = [outer.run(12, progress=False) for outer in (there, here)]
        assert on_device([there.hparams, there.current, there.carry.adjoint])
        close(results[0].hparams, results[1].hparams, 1e-6)


def test_the_layer_stays_on_its_device() -> None:
    with accelerator():
        placed = cases.quadratic(DEVICE)
        u = placed.hparams.clone().requires_grad_()
        x = bl.solution(placed.problem, bl.GradientDescent(steps=20), bl.Implicit(), u)
        x.square().sum().backward()
        assert on_device([x, u.grad])


def moved(problem: str) -> tuple[cases.Placed, cases.Placed]:
    return PROBLEMS[problem].make(CPU), PROBLEMS[problem].make(DEVICE)


CPU_, THERE = "torch.float64 on cpu", "torch.float64 on lazy:0"
SAME = "params and hparams must share dtype and device."


@each(PROBLEMS)
def test_hyperparameters_on_another_device_get_their_sentence(name: str) -> None:
    with accelerator():
        here, there = moved(name)
        leaf = bl.tree.names(here.hparams)[0]
        sentence = f"`hparams{leaf}` is {THERE}, but params are {CPU_}: {SAME}"
        with pytest.raises(ValueError, match=re.escape(sentence)):
            bl.hypergradient(here.problem, bl.GradientDescent(), bl.Implicit(), there.hparams)


def test_data_on_another_device_get_their_sentence() -> None:
    with accelerator():
        here, there = moved("dictionary")
        params = here.problem.params
        with pytest.raises(ValueError, match=f"`inner_loss` fails at the start, with params of {CPU_}: .*two devices"):
            bl.hypergradient(there.problem, bl.GradientDescent(), bl.Implicit(), here.hparams, params)
        here, there = moved("logistic")
        with pytest.raises(ValueError, match=re.escape(f"`params` is {CPU_}, but X_train is {THERE}: they must share")):
            bl.hypergradient(there.problem, bl.GradientDescent(), bl.Implicit(), here.hparams, here.problem.params)
        here, there = moved("quadratic")
        with pytest.raises(ValueError, match=re.escape(f"`params` is {CPU_}, but the problem is {THERE}: they must")):
            bl.hypergradient(there.problem, bl.GradientDescent(), bl.Implicit(), here.hparams, here.problem.params)


def test_parts_of_the_data_on_two_devices_get_their_sentence() -> None:
    X, y = torch.ones(3, 1, dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    with accelerator():
        X_there, y_there = X.to(DEVICE), y.to(DEVICE)
        with pytest.raises(ValueError, match=r"X_train is on lazy:0 but y_train on cpu: move one of them\."):
            bl.problems.RidgeProblem(X_there, y, X, y)
        with pytest.raises(ValueError, match=r"X_val is on lazy:0, but X_train on cpu\."):
            bl.problems.RidgeProblem(X, y, X_there, y_there)


# CUDA ----------------------------------------------------------------------------------------------------------------

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("problem", PROBLEMS)
@each(ESTIMATORS)
def test_every_estimator_on_cuda_equals_the_cpu(problem: str, name: str) -> None:
    make, row, solver = PROBLEMS[problem].make, ESTIMATORS[name], bl.GradientDescent(steps=12)
    there = solved(make, "cuda", solver, row.estimator)
    assert all(leaf.is_cuda for leaf in bl.tree.leaves([there.hypergradient, there.params]))
    close(there.hypergradient, solved(make, CPU, solver, row.estimator).hypergradient, row.agreement)


@pytest.mark.gpu
@on_cuda
@each(SOLVERS)
def test_every_solver_on_cuda_equals_the_cpu(name: str) -> None:
    make, solver = PROBLEMS["logistic"].make, replace(SOLVERS[name].solver, steps=4)
    there = solved(make, "cuda", solver, SOLVERS[name].estimator)
    close(there.hypergradient, solved(make, CPU, solver, SOLVERS[name].estimator).hypergradient, 1e-10)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("name", [name for name, row in SOLVERS.items() if not row.waits])
def test_a_step_on_cuda_never_waits(name: str) -> None:
    placed = cases.quadratic("cuda")
    inner, solver = placed.problem.bind(placed.hparams), SOLVERS[name].solver
    state = solver.init(inner, placed.problem.params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(LOOK):
            state = solver.step(inner, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
