"""What every solver and estimator asks of an accelerator, counted on a pretend one: kernels, waits, transfers.

The figures of the rows (tests/device_cases.py) are upper bounds: an operation too many in a hot loop fails here. Costs
of a step are slopes: the difference between a run of 2K steps and one of K.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import device_cases as cases
import pytest
import torch
from device_cases import BUDGETED, DIRECT, ESTIMATORS, LINEAR_SOLVERS, ON_THE_SPECTRUM, PROBLEMS, SOLVERS
from helpers import exported, normal, spd
from pretend_accelerator import DEVICE, Log, PretendTensor, accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel as bl
import bilevel.hypergrad
from bilevel.core.device import ON_ACCELERATOR
from bilevel.engine.loop import LOOK, run_inner
from bilevel.numerics.lanczos import lanczos
from bilevel.oracles.directions import Rule
from bilevel.problems import row_steps


def each(table: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("name", table)


def slope(work: Callable[[int], Log], steps: int) -> tuple[float, float]:
    """(kernels, waits) of one step."""
    once, twice = work(steps), work(2 * steps)
    return (twice.launches - once.launches) / steps, (twice.syncs - once.syncs) / steps


def inner_run(solver: bl.InnerSolver, make: Callable[[Any], cases.Placed] = cases.quadratic) -> Log:
    with accelerator() as log:
        placed = make(DEVICE)
        inner = placed.problem.bind(placed.hparams)
        run_inner(inner, solver, solver.init(inner, placed.problem.params))
    return log


def linear_solve(solver: bl.LinearSolver) -> Log:
    with accelerator() as log:
        matvec, b, matrix = cases.system(100, DEVICE)
        # Nystrom needs to know of something on the diagonal; the spectrum begins at 1.
        solver.solve(matvec, b, dense=lambda: matrix, damping=0.5)
    return log


def hypergradient(
    estimator: bl.HypergradEstimator,
    steps: int | None,
    make: Callable[[Any], cases.Placed] = cases.quadratic,
    step_size: float = 0.05,
) -> tuple[Log, bl.Estimate]:
    """What a later call asks for: the first looks at what a problem is made of, the second at its spectrum."""
    with accelerator():
        placed, solver = make(DEVICE), bl.GradientDescent(step_size, steps=steps)
        for _ in range(2):
            bl.hypergradient(placed.problem, solver, estimator, placed.hparams, on_failure="return")
    with accelerator() as log:
        options = {"check": False, "on_failure": "return"}
        estimate = bl.hypergradient(placed.problem, solver, estimator, placed.hparams, **options)
    return log, estimate


# The pretend accelerator itself --------------------------------------------------------------------------------------


def test_the_pretend_accelerator_counts_kernels_waits_and_uploads() -> None:
    with accelerator() as log:
        x = torch.ones(3, device=DEVICE)
        y = (x.view(3, 1) * 2.0).t()
        assert (log.launches, log.syncs) == (2, 0)
        assert float(y.sum()) == 6.0
        assert bool((x > 0).all())
        assert (log.launches, log.syncs) == (5, 2)
        x[x > 0], x.nonzero(), y.cpu(), torch.equal(x, x), torch.linalg.eigvalsh(torch.outer(x, x))
        assert log.syncs == 7
        assert log.uploads.total() == 0
        assert torch.zeros(2).to(DEVICE).device == DEVICE
        assert log.uploads.total() == 1
        torch.where(x > 0, x, torch.tensor(0.0, dtype=x.dtype))
        assert log.host_scalars.total() == 1


def test_the_pretend_accelerator_refuses_tensors_of_two_devices() -> None:
    with accelerator(), pytest.raises(RuntimeError, match="tensors on two devices, lazy:0 and a CPU tensor"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_the_pretend_accelerator_differentiates_twice() -> None:
    with accelerator():
        x = torch.tensor([1.0, 2.0]).to(DEVICE).requires_grad_()
        (gradient,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        (product,) = torch.autograd.grad(gradient, x, torch.ones_like(x))
        assert isinstance(product, PretendTensor)
        assert product.cpu().tolist() == [6.0, 12.0]


@pytest.mark.parametrize("room", ["inner", "linear", "hypergrad"])
def test_every_solver_and_estimator_has_a_row(room: str) -> None:
    table, base = {
        "inner": ([row.solver for row in SOLVERS.values()], bl.InnerSolver),
        "linear": ([row.solver for row in LINEAR_SOLVERS.values()], bl.LinearSolver),
        "hypergrad": (
            [*(row.estimator for row in ESTIMATORS.values()), *ON_THE_SPECTRUM.values(), *DIRECT.values()],
            bl.HypergradEstimator,
        ),
    }[room]
    classes = exported(getattr(bilevel, room), base)
    assert {cls for cls in classes if cls.__module__.startswith(f"bilevel.{room}")} <= {type(part) for part in table}


# Steps ---------------------------------------------------------------------------------------------------------------


def test_the_documented_distances_between_looks_are_those_of_the_code() -> None:
    assert (ON_ACCELERATOR, LOOK) == (8, 64)


@each(PROBLEMS)
def test_an_oracle_launches_no_more_than_its_arithmetic(name: str) -> None:
    row = PROBLEMS[name]
    with accelerator() as log:
        placed = row.make(DEVICE)
        inner, x = placed.problem.bind(placed.hparams), placed.problem.params
        v = bl.tree.tree_map(torch.ones_like, x)
        # What is computed once for all calls, such as a Gram matrix, is no part of a call.
        inner.grad(x), inner.linearize(x).vjp(v)
        # Points that no oracle has seen: what was computed at the last one would be known.
        first, second = (bl.tree.tree_map(torch.clone, x) for _ in range(2))
        start = log.launches, log.syncs
        inner._grad(first)
        middle = log.launches
        inner.linearize(second).vjp(v)
    assert middle - start[0] <= row.grad, row.reason
    assert log.launches - middle <= row.vjp, row.reason
    assert log.syncs == start[1]


@each(SOLVERS)
def test_a_step_launches_no_more_than_its_arithmetic_and_never_waits(name: str) -> None:
    row = SOLVERS[name]
    kernels, waits = slope(lambda k: inner_run(replace(row.solver, steps=k)), LOOK)
    if row.waits:
        # Newton ends where it converges: its steps are counted before that, on a loss that is not quadratic.
        make = PROBLEMS["logistic"].make
        kernels, waits = slope(lambda k: inner_run(replace(row.solver, steps=k), make), 2)
        assert waits <= row.waits, row.reason
    else:
        # One look in 64 steps at whether the iterate is finite: a norm, and the comparisons of its value.
        assert waits == 1 / LOOK
        kernels -= 5 / LOOK
    assert kernels <= row.kernels, row.reason


@pytest.mark.parametrize("name", [name for name, row in SOLVERS.items() if not row.waits])
def test_with_a_tolerance_a_solver_looks_every_eight_steps(name: str) -> None:
    solver = replace(SOLVERS[name].solver, tol=1e-30)
    _, waits = slope(lambda k: inner_run(replace(solver, steps=k)), LOOK)
    # One more in 64 steps where the residual has stopped falling.
    assert waits in (1 / ON_ACCELERATOR + 1 / LOOK, 1 / ON_ACCELERATOR + 2 / LOOK)


@each(LINEAR_SOLVERS)
def test_a_linear_solver_looks_every_eight_steps_or_never(name: str) -> None:
    row = LINEAR_SOLVERS[name]
    kernels, waits = slope(lambda k: linear_solve(row.fixed(k)), 32)
    assert waits == (1 / ON_ACCELERATOR if row.tolerance else 0)
    assert kernels <= row.kernels, row.reason


@each(LINEAR_SOLVERS)
def test_a_linear_solver_waits_at_most_four_times_besides_its_looks(name: str) -> None:
    row = LINEAR_SOLVERS[name]
    log = linear_solve(row.fixed(32))
    assert log.syncs <= 4 + (32 / ON_ACCELERATOR if row.tolerance else 0)


@each(LINEAR_SOLVERS)
@pytest.mark.parametrize("shift", [0.0, 5.5])
def test_a_linear_solver_ends_where_it_would_end_with_a_look_at_every_step(name: str, shift: float) -> None:
    # With a shift the matrix is indefinite, which all but GMRES report.
    matrix, b, solver = (
        spd(43, 30) - shift * torch.eye(30, dtype=torch.float64),
        normal(44, 30),
        LINEAR_SOLVERS[name].solver,
    )
    with accelerator():
        matrix_there = matrix.to(DEVICE)
        there = solver.solve(lambda v: matrix_there @ v, b.to(DEVICE), dense=lambda: matrix_there)
        x = there.x.cpu()
    here = solver.solve(lambda v: matrix @ v, b, dense=lambda: matrix)
    assert there.steps <= here.steps + (ON_ACCELERATOR - 1 if name == "FixedPointIteration" else 0)
    assert there.steps >= here.steps
    assert there.verdict.status is here.verdict.status
    torch.testing.assert_close(x, here.x, rtol=1e-9, atol=1e-9)


def test_a_product_that_is_not_finite_is_reported_from_between_two_looks() -> None:
    matrix, b = spd(43, 30), normal(44, 30)
    for name in ("CG", "GMRES"):
        with accelerator():
            there, calls = matrix.to(DEVICE), []

            def matvec(v: torch.Tensor, there: torch.Tensor = there, calls: list[int] = calls) -> torch.Tensor:
                calls.append(1)
                return there @ v * (float("nan") if len(calls) == 4 else 1.0)

            solution = LINEAR_SOLVERS[name].solver.solve(matvec, b.to(DEVICE))
        assert solution.verdict.status is bl.Status.NOT_FINITE


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_measured_spectrum_is_the_same_on_every_device(size: int) -> None:
    matrix = spd(45, size, 100.0)
    with accelerator():
        matrix_there = matrix.to(DEVICE)
        there = lanczos(lambda v: matrix_there @ v, matrix_there[0])
    here = lanczos(lambda v: matrix @ v, matrix[0])
    assert (there.steps, there.exact) == (here.steps, here.exact)
    assert (there.smallest, there.largest) == pytest.approx((here.smallest, here.largest), rel=1e-12)


@each(ESTIMATORS)
def test_a_differentiated_step_launches_no_more_than_its_arithmetic_and_never_waits(name: str) -> None:
    row = ESTIMATORS[name]
    kernels, waits = slope(lambda k: hypergradient(row.estimator, k)[0], LOOK)
    assert waits == (0 if row.flat else row.runs / LOOK)
    assert kernels - 5 * row.runs / LOOK <= row.kernels, row.reason


LONG_RUNS = {
    "doubled": ("ridge", bl.GradientDescent(0.005), 0.05),
    "doubled, momentum": ("ridge", bl.HeavyBall(0.005, 0.5), 0.05),
    "doubled, to a tolerance": ("ridge", bl.GradientDescent(0.005, tol=1e-30), 0.145),
    "stepped, quadratic": ("ridge", bl.Sobolev(l=0.05, L=200.0), 5.2),
    "stepped, logistic": ("logistic", bl.GradientDescent(0.05), 8.1),
    "stepped, to a tolerance": ("logistic", bl.GradientDescent(0.05, tol=1e-30), 10.4),
}
"""Runs on flat vectors: the problem, the solver, and the kernels that one step costs, there and back."""


@each(LONG_RUNS)
def test_steps_on_flat_vectors_launch_few_kernels_and_wait_once_a_stretch(name: str) -> None:
    problem, solver, most = LONG_RUNS[name]

    def run(steps: int) -> Log:
        with accelerator() as log:
            placed, method = PROBLEMS[problem].make(DEVICE), replace(solver, steps=steps)
            options = {"check": False, "on_failure": "return"}
            found = bl.hypergradient(placed.problem, method, bl.FullUnroll(), placed.hparams, **options)
            assert found.certificate.form == ("doubled" if "doubled" in name else "flat")
        return log

    kernels, waits = slope(run, 4 * LOOK)
    assert kernels <= most
    assert waits <= (1 / LOOK if solver.tol else 0)


STOCHASTIC = {"SOBA": (bl.SOBA(batch_size=8), 17), "SABA": (bl.SABA(batch_size=8), 21)}
"""Methods of a single loop, and the kernels that one step launches, on batches whose shares of the rows differ."""


@each(STOCHASTIC)
def test_a_step_of_a_single_loop_launches_few_kernels_and_never_waits(name: str) -> None:
    method, most = STOCHASTIC[name]
    with accelerator() as log:
        placed = PROBLEMS["logistic"].make(DEVICE)
        loop = bl.SingleLoop(placed.problem, replace(method, freeze=0), placed.hparams, certify=False)
        loop._block(loop.state, 1)  # the batches of 1,000 steps are drawn, and what steps write is made
        counts = []
        for steps in (32, 64):
            before = log.launches, log.syncs
            loop._block(loop.state, steps)
            counts.append((log.launches - before[0], log.syncs - before[1]))
    kernels, waits = ((twice - once) / 32 for once, twice in zip(*counts, strict=True))
    assert kernels == most
    assert counts[0][0] - 32 * most <= 16  # what a block copies, there and back
    assert waits == 0


class Written(TorchDispatchMode):
    """Where operations have written: in what they were given, and, by name, what is new."""

    def __init__(self) -> None:
        super().__init__()
        self.given: set[int] = set()
        self.new: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func._schema.is_mutable:
            self.given |= {each.data_ptr() for each in bl.tree.leaves(result)}
        elif not func.is_view:
            self.new[str(func)] += 1
        return result


@each(STOCHASTIC)
def test_steps_of_a_single_loop_write_to_the_same_places(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_steps, "ON_HOST", 0)
    placed = PROBLEMS["logistic"].make("cpu")
    loop = bl.SingleLoop(placed.problem, replace(STOCHASTIC[name][0], freeze=0), placed.hparams, certify=False)
    seen = []
    for steps in (10, 50, 50):
        loop.state = loop._block(loop.state, steps)
        made: Any = loop.directions
        with Written() as written:
            rule = Rule(loop.state.rate, loop.length, 1.0, 0, None)
            made.take(steps, name == "SABA", rule)
        seen.append(written)
    assert seen[0].given == seen[1].given == seen[2].given
    # The curvature of the loss alone is new, as a loss may say it in any form.
    assert [each.new for each in seen] == [{"aten.addcmul.default": steps} for steps in (10, 50, 50)]


@each(ESTIMATORS)
def test_a_hypergradient_waits_a_fixed_number_of_times(name: str) -> None:
    row = ESTIMATORS[name]
    assert hypergradient(row.estimator, LOOK)[0].syncs <= row.looks


@each(ON_THE_SPECTRUM)
def test_what_runs_on_the_spectrum_takes_as_much_for_more_steps(name: str) -> None:
    def run(steps: int) -> Log:
        return hypergradient(ON_THE_SPECTRUM[name], steps, cases.scalar_ridge)[0]

    assert slope(run, LOOK) == (0.0, 0.0)
    assert run(LOOK).syncs <= 8


@each(BUDGETED)
def test_an_estimator_with_a_budget_waits_less_often_than_it_steps(name: str) -> None:
    log, estimate = hypergradient(BUDGETED[name], None, step_size=0.001)
    assert log.syncs < estimate.certificate.inner_steps + estimate.certificate.adjoint_steps


@pytest.mark.parametrize("name", [name for name, row in SOLVERS.items() if not row.waits])
def test_a_step_and_its_derivative_run_on_fake_tensors_which_have_no_values(name: str) -> None:
    with FakeTensorMode() as fake:
        x, u = (fake.from_tensor(torch.ones(4, dtype=torch.float64)) for _ in range(2))
        problem = bl.BilevelProblem(lambda x, u: (u.exp() * x**2).sum(), lambda x, u: x.sum(), x)
        inner, solver = problem.bind(u), SOLVERS[name].solver
        state = solver.init(inner, x)
        for _ in range(3):
            state = solver.step(inner, state)
        (by_params, _), by_hparams = solver.step_vjp(inner, state, (x, state.memory))
    assert by_params.shape == by_hparams.shape == state.params.shape == (4,)
