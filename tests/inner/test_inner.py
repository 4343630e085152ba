"""Inner solvers: the published step, its derivatives, stopping, warm starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    F64,
    HPARAMS,
    MOMENTUM,
    PARAMS,
    PROBLEMS,
    SOLVERS,
    STEP,
    UNROLLED,
    Case,
    exported,
    flat,
    logistic_case,
    normal,
    quadratic_case,
    ridge_case,
    shaped,
    tree_case,
)
from torch import Tensor

import bilevel as bl
import bilevel.inner
from bilevel.engine.loop import run_inner

every_solver = pytest.mark.parametrize("cls", SOLVERS, ids=lambda cls: cls.__name__)
every_unrolled = pytest.mark.parametrize("cls", UNROLLED, ids=lambda cls: cls.__name__)
every_tree = pytest.mark.parametrize("tree", PARAMS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def mid_run(cls: type, case: Case, steps: int = 3) -> tuple[bl.InnerSolver, Any, bl.InnerState]:
    """Return (solver, bound problem, state after some steps, so that its memory is filled)."""
    solver = SOLVERS[cls].make(case.problem, steps=10)
    inner = case.problem.bind(case.hparams)
    state = solver.init(inner, case.start)
    # Newton is nearly exact after three steps; one leaves something to differentiate.
    with torch.no_grad():  # as the loop runs it
        for _ in range(1 if cls is bl.Newton else steps):
            state = solver.step(inner, state)
    return solver, inner, state


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, which for a solver without derivatives may also hold numbers and names."""
    return [leaf for leaf in bl.tree.leaves(tree) if isinstance(leaf, Tensor)]


def formula_at(cls: type, case: Case, state: bl.InnerState) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]:
    """Return (z, u -> next z) written out on flat vectors, z = (x, memory), with the present (x, memory, u)."""
    n = flat(state.params).numel()
    k = state.steps

    def step(x: Tensor, memory: Tensor, u: Tensor) -> Tensor:
        new, parts = SOLVERS[cls].formula(lambda y: case.grad(y, u), x, memory.split(n) if memory.numel() else (), k)
        return torch.cat([new, *parts])

    return step, flat(state.params), flat(state.memory), flat(case.hparams)


def test_every_exported_inner_solver_has_a_row_of_gold_options() -> None:
    assert set(SOLVERS) == set(exported(bilevel.inner, bl.InnerSolver))
    assert set(SOLVERS) == set(exported(bl, bl.InnerSolver))


@pytest.mark.crossed
@every_unrolled
@every_tree
def test_one_step_equals_the_published_formula(cls: type, tree: str) -> None:
    case = tree_case(tree)
    solver, inner, state = mid_run(cls, case)
    step, *z, u = formula_at(cls, case, state)
    after = solver.step(inner, state)
    torch.testing.assert_close(torch.cat([flat(after.params), flat(after.memory)]), step(*z, u), rtol=0, atol=1e-13)
    assert after.steps == state.steps + 1


@pytest.mark.crossed
@every_unrolled
@every_tree
@pytest.mark.parametrize("hparams", HPARAMS)
def test_step_vjp_equals_autograd_of_the_published_formula(cls: type, tree: str, hparams: str) -> None:
    case = tree_case(tree, hparams)
    solver, inner, state = mid_run(cls, case)
    step, *z, u = formula_at(cls, case, state)
    roots = [part.detach().clone().requires_grad_() for part in (*z, u)]
    after = step(*roots)
    weights = normal(31, after.numel())
    expected = torch.autograd.grad(after, roots, weights, materialize_grads=True)
    n = z[0].numel()
    cotangent = (shaped(weights[:n], state.params), unflat(weights[n:], state.memory))
    (by_params, by_memory), by_hparams = solver.step_vjp(inner, state, cotangent)
    for got, want in zip((by_params, by_memory, by_hparams), expected, strict=True):
        torch.testing.assert_close(flat(got), want, rtol=0, atol=1e-11)


@pytest.mark.crossed
@every_unrolled
@every_tree
def test_step_jvp_is_the_transpose_of_step_vjp_and_equals_autograd_of_the_formula(cls: type, tree: str) -> None:
    case = tree_case(tree, "dict")
    solver, inner, state = mid_run(cls, case)
    step, *z, u = formula_at(cls, case, state)
    tangents = [normal(40 + i, part.numel()) for i, part in enumerate((*z, u))]
    pushed = (shaped(tangents[0], state.params), unflat(tangents[1], state.memory))
    hparams = [shaped(tangents[2], case.hparams), shaped(-2.0 * tangents[2], case.hparams)]
    if not SOLVERS[cls].forward:
        with pytest.raises(ValueError, match=r"forward mode does not cover .*: use FullUnroll\(mode='reverse'\)"):
            solver.step_jvp(inner, state, [pushed, pushed], hparams)
        return
    first, second = solver.step_jvp(inner, state, [pushed, pushed], hparams)
    got = torch.cat([flat(first[0]), flat(first[1])])
    _, expected = torch.autograd.functional.jvp(step, (*z, u), tuple(tangents))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    _, other = torch.autograd.functional.jvp(step, (*z, u), (*tangents[:2], -2.0 * tangents[2]))
    torch.testing.assert_close(torch.cat([flat(second[0]), flat(second[1])]), other, rtol=0, atol=1e-11)
    weights = normal(44, got.numel())
    n = z[0].numel()
    cotangent = (shaped(weights[:n], state.params), unflat(weights[n:], state.memory))
    (by_params, by_memory), by_hparams = solver.step_vjp(inner, state, cotangent)
    pulled = torch.cat([flat(by_params), flat(by_memory), flat(by_hparams)])
    torch.testing.assert_close(got @ weights, pulled @ torch.cat(tangents), rtol=1e-11, atol=1e-11)


def unflat(vector: Tensor, memory: Any) -> Any:
    """The vector in the structure of a solver's memory, a tuple or a dict of trees."""
    if isinstance(memory, dict):
        return shaped(vector, memory)
    sizes = [flat(part).numel() for part in memory]
    return tuple(shaped(part, like) for part, like in zip(vector.split(sizes), memory, strict=True)) if sizes else ()


@pytest.mark.parametrize("tree", ["tensor", "0-d", "dict"])
def test_adam_equals_torch_adam_step_for_step(tree: str) -> None:
    case = tree_case(tree)
    solver = bl.Adam(0.03, betas=(0.8, 0.95), eps=1e-6, steps=50)
    inner = case.problem.bind(case.hparams)
    state = solver.init(inner, case.start)
    x = flat(case.start).clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    for _ in range(50):
        x.grad = case.grad(x.detach(), flat(case.hparams))
        optimizer.step()
        state = solver.step(inner, state)
        torch.testing.assert_close(flat(state.params), x.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_methods_equal_torch_sgd_under_the_usual_change_of_variables(nesterov: bool) -> None:
    case = tree_case("dict")
    solver = (bl.Nesterov if nesterov else bl.HeavyBall)(STEP, MOMENTUM, steps=30)
    inner = case.problem.bind(case.hparams)
    state = solver.init(inner, case.start)
    p = flat(case.start).clone().requires_grad_()
    optimizer = torch.optim.SGD([p], lr=STEP, momentum=MOMENTUM, nesterov=nesterov)
    for _ in range(30):
        p.grad = case.grad(p.detach(), flat(case.hparams))
        optimizer.step()
        state = solver.step(inner, state)
        x, before = flat(state.params), flat(state.memory[0])
        # torch stores the extrapolated point of Nesterov's method, we store the iterate.
        ours = x + MOMENTUM * (x - before) if nesterov else x
        torch.testing.assert_close(ours, p.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda cls: cls.__name__)
@every_solver
def test_it_converges_to_the_minimum_found_by_dense_newton(cls: type, problem: type) -> None:
    case, row = PROBLEMS[problem](), SOLVERS[cls]
    tol = max(row.reaches, 1e-7)
    solver = row.make(case.problem, tol=tol, steps=5000)
    run = run_inner(case.problem.bind(case.hparams), solver, solver.init(case.problem.bind(case.hparams), case.start))
    assert run.verdict.status.ok, run.verdict
    solution = case.solution()
    smallest = float(torch.linalg.eigvalsh(case.hessian(solution, flat(case.hparams)))[0])
    distance = float((flat(solver.params(run.state)) - solution).norm())
    # A map ends by its own residual, here |STEP g|.
    tol = tol / STEP if cls is bl.FixedPoint else tol
    assert distance <= 1.5 * tol / smallest + 1e-13


@every_solver
def test_options_are_frozen_and_states_are_never_modified_in_place(cls: type) -> None:
    case = tree_case("dict")
    solver, inner, state = mid_run(cls, case)
    with pytest.raises(FrozenInstanceError):
        solver.steps = 3  # type: ignore[misc]
    before = copy.deepcopy(state)
    versions = [leaf._version for leaf in tensors(state.variables)]
    solver.step(inner, state)
    if SOLVERS[cls].unrolls:
        ones = bl.tree.tree_map(torch.ones_like, state.variables)
        solver.step_vjp(inner, state, ones)
        if SOLVERS[cls].forward:
            solver.step_jvp(inner, state, [ones], [case.hparams])
    solver.warm_start(inner, state)
    for leaf, old in zip(tensors(state.variables), tensors(before.variables), strict=True):
        torch.testing.assert_close(leaf, old, rtol=0, atol=0)
    assert [leaf._version for leaf in tensors(state.variables)] == versions
    assert state.steps == before.steps


@every_solver
def test_warm_start_continues_from_the_iterate_with_what_the_method_remembers(cls: type) -> None:
    case = tree_case("dict")
    solver, _, state = mid_run(cls, case)
    moved = case.problem.bind(case.hparams + 0.1)
    warm = solver.warm_start(moved, state)
    torch.testing.assert_close(flat(warm.params), flat(state.params), rtol=0, atol=0)
    # Coefficients and tuned options count the steps of the solve; all others go on.
    anew = issubclass(cls, bl.inner.LinearMultistep | bl.inner.ElementwiseSolver)
    assert warm.steps == (0 if anew else state.steps)
    if issubclass(cls, bl.inner.ElementwiseSolver):
        assert warm.index == state.index
    if cls in (bl.HeavyBall, bl.Nesterov, bl.Adam, bl.AdamW, bl.SGD, bl.RMSprop):
        torch.testing.assert_close(flat(warm.memory), flat(state.memory), rtol=0, atol=0)
        assert not torch.equal(flat(warm.memory), flat(warm.params))


@pytest.mark.crossed
@every_solver
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_without_tolerance_exactly_the_number_of_steps_is_taken(cls: type, steps: int) -> None:
    case = tree_case()
    solver = SOLVERS[cls].make(case.problem, steps=steps)
    inner = case.problem.bind(case.hparams)
    run = run_inner(inner, solver, solver.init(inner, case.start))
    state = solver.init(inner, case.start)
    for _ in range(steps):
        state = solver.step(inner, state)
    assert run.steps == steps == run.state.steps
    torch.testing.assert_close(run.state.params, state.params, rtol=0, atol=0)


@every_solver
def test_with_tolerance_the_returned_iterate_itself_has_the_residual_reported(cls: type) -> None:
    case = tree_case("dict")
    tol = max(1e-7, SOLVERS[cls].reaches)
    solver = SOLVERS[cls].make(case.problem, tol=tol)
    inner = case.problem.bind(case.hparams)
    run = run_inner(inner, solver, solver.init(inner, case.start))
    true = float(case.grad(flat(solver.params(run.state)), flat(case.hparams)).norm())
    # A map ends by its own residual, here |STEP g|.
    true = STEP * true if cls is bl.FixedPoint else true
    assert run.verdict.status.ok
    assert true <= tol * (1 + 1e-6)
    assert run.residual == pytest.approx(true, rel=1e-6)
    fewer = replace(solver, steps=max(run.steps - solver.traits.check_every, 1))
    stopped = run_inner(inner, fewer, fewer.init(inner, case.start))
    assert stopped.verdict.status is bl.Status.INNER_NOT_CONVERGED
    assert f"{stopped.residual:.2e}" in str(stopped.verdict)
    assert str(stopped.steps) in str(stopped.verdict)


def test_a_solver_without_limits_runs_to_the_default_tolerance_of_the_dtype() -> None:
    case = quadratic_case()
    inner = case.problem.bind(case.hparams)
    start = bl.GradientDescent().init(inner, case.start)
    run = run_inner(inner, bl.GradientDescent(), start)
    share = torch.finfo(F64).eps ** (2 / 3)
    assert 0.5 * share < run.residual / bl.tree.norm(inner.grad(case.start)) <= share


AUTOMATIC = [
    bl.GradientDescent(),
    bl.HeavyBall(),
    bl.HeavyBall(momentum="auto"),
    bl.Nesterov(),
    bl.Nesterov(momentum="auto"),
]


@pytest.mark.crossed
@pytest.mark.parametrize("solver", AUTOMATIC, ids=repr)
@pytest.mark.parametrize("make", [quadratic_case, ridge_case, logistic_case, tree_case])
def test_automatic_options_are_stable_and_shown_in_the_certificate(solver: Any, make: Callable[[], Case]) -> None:
    case = make()
    estimate = bl.hypergradient(case.problem, replace(solver, tol=1e-9), bl.Implicit(), case.hparams, case.start)
    measured = estimate.certificate.measured
    x = case.solution()
    largest = float(torch.linalg.eigvalsh(case.hessian(x, flat(case.hparams)))[-1])
    assert {"step_size", "largest_curvature"} <= set(measured)
    assert ("momentum" in measured) == (solver.momentum == "auto" if hasattr(solver, "momentum") else False)
    m = measured.get("momentum", getattr(solver, "momentum", 0.0))
    limit = {bl.GradientDescent: 2.0, bl.HeavyBall: 2 * (1 + m), bl.Nesterov: 2 * (1 + m) / (1 + 2 * m)}[type(solver)]
    assert 0.05 < measured["step_size"] * largest < limit
    assert estimate.status.ok


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("cls", [bl.GradientDescent, bl.HeavyBall, bl.Nesterov])
def test_steps_contract_up_to_the_stability_limit_and_not_beyond(cls: Any, momentum: float) -> None:
    if cls is bl.GradientDescent:
        solver, radius = cls(0.1), lambda q: abs(1 - q)
    elif cls is bl.HeavyBall:
        solver, radius = cls(0.1, momentum), lambda q: max(abs(np.roots([1, -(1 + momentum - q), momentum])))
    else:
        along = lambda q: [1, -(1 + momentum) * (1 - q), momentum * (1 - q)]  # noqa: E731
        solver, radius = cls(0.1, momentum), lambda q: max(abs(np.roots(along(q))))
    limit = 4.0 * solver.max_step_size(bl.base.InnerState(None), 4.0)
    assert radius(0.999 * limit) < 1 < radius(1.001 * limit)


def test_automatic_momenta_are_the_formulas_of_nesterov_and_polyak() -> None:
    curvatures = torch.tensor([0.2, 1.0, 5.0], dtype=F64)
    problem = bl.BilevelProblem(
        lambda x, u: 0.5 * (curvatures * x * x).sum() - u * x.sum(), lambda x, u: x.sum(), torch.zeros(3, dtype=F64)
    )
    smallest, largest = 0.2, 1.02 * 5.0
    low, high = smallest**0.5, largest**0.5
    expected = {
        bl.Nesterov: (1 / largest, (high - low) / (high + low)),
        bl.HeavyBall: (4 / (low + high) ** 2, ((high - low) / (high + low)) ** 2),
    }
    for cls, (step_size, momentum) in expected.items():
        solver = cls(momentum="auto", steps=5)
        estimate = bl.hypergradient(problem, solver, bl.FullUnroll(), torch.ones((), dtype=F64))
        measured = estimate.certificate.measured
        assert (measured["step_size"], measured["momentum"]) == pytest.approx((step_size, momentum), rel=1e-6)


@pytest.mark.parametrize("cls", [bl.HeavyBall, bl.Nesterov])
def test_automatic_momentum_needs_fewer_steps_than_gradient_descent_when_ill_conditioned(cls: type) -> None:
    problem = bl.QuadraticProblem.random(20, 1, condition=1000.0, seed=1)
    u = torch.zeros(1, dtype=F64)
    taken = [
        bl.hypergradient(problem, solver, bl.Implicit(), u).certificate.inner_steps
        for solver in (bl.GradientDescent(tol=1e-8), cls(momentum="auto", tol=1e-8))
    ]
    assert taken[1] < taken[0] / 5


def test_adam_has_a_finite_derivative_where_the_gradient_is_exactly_zero() -> None:
    problem = bl.BilevelProblem(
        lambda x, u: (x[0] - u[0]) ** 2 + u[1] * x[1] ** 2,
        lambda x, u: (x - 1.0).square().sum(),
        torch.zeros(2, dtype=F64),
    )
    u = torch.tensor([0.5, 1.0], dtype=F64)
    for estimator in (bl.FullUnroll(), bl.FullUnroll(memory="graph"), bl.FullUnroll(mode="forward")):
        estimate = bl.hypergradient(problem, bl.Adam(0.1, steps=5), estimator, u)
        assert torch.isfinite(estimate.hypergradient).all()
        assert estimate.hypergradient[1] == 0  # x_1 stays at zero whatever its curvature
        assert estimate.hypergradient[0] != 0


@every_unrolled
def test_float32_stays_float32(cls: type) -> None:
    X, y = normal(1, 12, 3).float(), normal(2, 12).float()
    problem = bl.BilevelProblem(
        lambda w, u: ((X @ w - y) ** 2).mean() + u.exp() * (w * w).sum(),
        lambda w, u: ((X @ w - y) ** 2).mean(),
        torch.zeros(3),
    )
    solver = SOLVERS[cls].make(problem, steps=3)
    inner = problem.bind(torch.tensor(0.0))
    state = solver.step(inner, solver.init(inner, problem.params))
    (by_params, _), by_hparams = solver.step_vjp(inner, state, (torch.ones(3), state.memory))
    assert state.params.dtype == by_params.dtype == by_hparams.dtype == torch.float32


@pytest.mark.gpu
@needs_cuda
@every_unrolled
def test_steps_on_the_gpu_equal_steps_on_the_cpu(cls: type) -> None:
    X, y = normal(1, 12, 3), normal(2, 12)
    results = []
    for device in ("cpu", "cuda"):
        A, b = X.to(device), y.to(device)
        problem = bl.BilevelProblem(
            lambda w, u, A=A, b=b: ((A @ w - b) ** 2).mean() + u.exp() * (w * w).sum(),
            lambda w, u, A=A, b=b: ((A @ w - b) ** 2).mean(),
            torch.zeros(3, dtype=F64, device=device),
        )
        solver = SOLVERS[cls].make(problem, steps=4)
        u = torch.zeros((), dtype=F64, device=device)
        results.append(bl.hypergradient(problem, solver, bl.FullUnroll(), u).hypergradient.cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_adam_handed_on_after_five_steps_equals_ten_steps() -> None:
    problem = bl.QuadraticProblem.random(size=4, hyperparameters=2, condition=10.0, seed=0)
    u = torch.zeros(2, dtype=torch.float64)
    first = bl.hypergradient(problem, bl.Adam(0.05, steps=5), bl.Implicit(), u)
    second = bl.hypergradient(problem, bl.Adam(0.05, steps=5), bl.Implicit(), u, carry=first.carry)
    whole = bl.hypergradient(problem, bl.Adam(0.05, steps=10), bl.Implicit(), u)
    torch.testing.assert_close(second.params, whole.params, rtol=0, atol=0)


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("tail", [1, 2])
def test_newton_steps_at_the_rounding_floor_keep_their_whole_derivative(steps: int, tail: int) -> None:
    # A line search that followed rounding noise would scale the derivative by its step length.
    for seed in range(4):
        problem = bl.QuadraticProblem.random(size=4, hyperparameters=3, condition=10.0, seed=seed)
        u = torch.zeros(3, dtype=torch.float64)
        estimator = bl.TruncatedUnroll(min(tail, steps))
        estimate = bl.hypergradient(problem, bl.Newton(steps=steps), estimator, u, torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(estimate.hypergradient, problem.exact_hypergradient(u), rtol=1e-9, atol=1e-11)
