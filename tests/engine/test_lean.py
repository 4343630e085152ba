"""Runs on flat vectors, doubled or not, against the same runs step by step; and when they are made step by step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import F64, normal
from torch import Tensor

import bilevel as bl
from bilevel.core import tree
from bilevel.engine.affine import block, doubles
from bilevel.engine.estimator import Run
from bilevel.engine.loop import Looks
from bilevel.hypergrad.flat_unroll import pushed, unrolled
from bilevel.inner.coefficients import Coefficients

STEPS = 30


class Shrunk(bl.GradientDescent):
    """Takes its gradients away from the iterates."""

    def coefficients(self, state: bl.InnerState) -> Coefficients:
        return Coefficients(read=(0.9,), mix=((1.0,),), write=(-0.05,))


METHODS: dict[str, bl.InnerSolver] = {
    "gradient descent": bl.GradientDescent(0.05),
    "heavy ball": bl.HeavyBall(0.05, 0.6),
    "heavy ball, half": bl.HeavyBall(0.05, 0.6, first_step="half"),
    "nesterov": bl.Nesterov(0.05, 0.6),
    "chebyshev": bl.Chebyshev(l=0.05, L=12.0),
    "sobolev": bl.Sobolev(l=0.05, L=12.0),
    "asymptotic sobolev": bl.AsymptoticSobolev(l=0.05, L=12.0),
    "of the user's own": Shrunk(0.05),
}


def data(rows: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    X = normal(seed, rows, features)
    return X, X @ normal(seed + 1, features) + normal(seed + 2, rows)


X, Y = data(25, 5)
WIDE, WIDE_Y = data(4, 6, seed=5)
LABELS, CLASSES, COUNTS = (Y > 0).double(), torch.arange(25) % 3, (Y.abs() * 2).round()
PROBLEMS: dict[str, bl.BilevelProblem] = {
    "quadratic": bl.QuadraticProblem.random(size=4, hyperparameters=2, condition=10.0, seed=1),
    "ridge": bl.problems.RidgeProblem(X, Y, X + 0.1, Y, penalty="per_feature"),
    "ridge, one penalty": bl.problems.RidgeProblem(X, Y, X + 0.1, Y, penalty="scalar"),
    "wide ridge": bl.problems.RidgeProblem(WIDE, WIDE_Y, WIDE + 0.1, WIDE_Y, penalty="per_feature"),
    "wide ridge, one penalty": bl.problems.RidgeProblem(WIDE, WIDE_Y, WIDE + 0.1, WIDE_Y, penalty="scalar"),
    "logistic": bl.problems.LogisticProblem(X, LABELS, X + 0.1, LABELS, penalty="per_feature"),
    "softmax": bl.problems.SoftmaxProblem(X, CLASSES, X + 0.1, CLASSES, penalty="per_feature"),
    "poisson": bl.problems.PoissonProblem(0.3 * X, COUNTS, 0.3 * X, COUNTS, penalty="scalar"),
    "squared hinge": bl.problems.SquaredHingeProblem(X, LABELS, X + 0.1, LABELS, penalty="scalar"),
    "huber": bl.problems.HuberProblem(X, Y, X + 0.1, Y, penalty="scalar"),
}


def hparams(problem: Any) -> Tensor:
    u: Tensor = problem.initial_hparams() if hasattr(problem, "initial_hparams") else torch.zeros(2, dtype=F64)
    return u + 0.1 * normal(9, *u.shape) if u.dim() else u - 0.5


def by_steps(problem: Any, solver: bl.InnerSolver, u: Tensor, tail: int, state: Any = None) -> tuple[Tensor, Tensor]:
    """Return the last iterate and the hypergradient by `step` and `step_vjp` alone."""
    params, totals = by_tails(problem, solver, u, state)
    return params, totals[min(tail, len(totals)) - 1]


def by_tails(problem: Any, solver: bl.InnerSolver, u: Tensor, state: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Return the last iterate and the hypergradients of the last step, of the last two, ..., of all."""
    inner = problem.bind(u)
    state = solver.init(inner, problem.start()) if state is None else solver.warm_start(inner, state)
    states = []
    for _ in range(solver.steps or 0):
        states.append(state)
        state = solver.step(inner, state)
    _, by_params, total = problem.outer_value_and_grads(state.params, u)
    cotangent = (by_params, tree.zeros_like(state.memory))
    totals = []
    for before in reversed(states):
        cotangent, part = solver.step_vjp(inner, before, cotangent)
        total = total + part
        totals.append(total)
    return state.params, totals


def agree(one: Tensor, other: Tensor) -> None:
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-12 * float(other.abs().max()))


def some(cases: Iterable[Any], of: int, name: str, method: str) -> list[Any]:
    """Return one in so many of some cases: others for every problem and method, so that each meets all."""
    shift = [*PROBLEMS, *BATCHES].index(name) + [*METHODS].index(method)
    return [case for index, case in enumerate(cases) if (index + shift) % of == 0]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_flat_vectors_is_the_run_of_its_steps(name: str, method: str) -> None:
    problem, solver = PROBLEMS[name], replace(METHODS[method], steps=STEPS)
    u = hparams(problem)
    params, totals = by_tails(problem, solver, u)
    others = (
        (STEPS, bl.FullUnroll(mode="forward")),
        (STEPS, bl.FullUnroll(memory="checkpoint")),
        (1, bl.TruncatedUnroll(1)),
        (20, bl.TruncatedUnroll(20)),
    )
    for tail, estimator in (*some(others, 2, name, method), (STEPS, bl.FullUnroll())):
        estimate = bl.hypergradient(problem, solver, estimator, u, check=False, on_failure="return")
        assert set(estimate.certificate.form.split(" and ")) <= {"doubled", "flat"}
        agree(estimate.params, params)
        agree(estimate.hypergradient, totals[tail - 1])
        counts = estimate.cost.counts
        assert counts.get("vjp", 0) + counts.get("jvp", 0) / u.numel() == tail
    # A warm start takes all stored vectors along.
    again = bl.hypergradient(
        problem, solver, bl.FullUnroll(), u + 0.1, carry=estimate.carry, check=False, on_failure="return"
    )
    params, total = by_steps(problem, solver, u + 0.1, STEPS, estimate.carry.state)
    agree(again.params, params)
    agree(again.hypergradient, total)


def stepwise(*arguments: Any, **options: Any) -> bl.Estimate:
    """Return the hypergradient of a problem that has no kernels."""
    nothing = {"flat_run": lambda *_, **__: None}
    with (
        mock.patch.multiple("bilevel.engine.estimator", **nothing),
        mock.patch.multiple("bilevel.hypergrad.flat_unroll", **nothing),
    ):
        return bl.hypergradient(*arguments, **options)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_to_a_tolerance_ends_where_its_steps_end(name: str, method: str) -> None:
    problem = PROBLEMS[name]
    u = hparams(problem)
    cases = (
        (1e-4, None, bl.FullUnroll(), False),
        (1e-2, 150, bl.TruncatedUnroll(0.3), True),
        (1e-30, 90, bl.TruncatedUnroll(70), False),
        (1e3, None, bl.TruncatedUnroll(3), False),
        (1e-3, None, bl.FullUnroll(memory="checkpoint"), True),
        (1e-5, 400, bl.Implicit(), False),
        (1e-3, None, bl.FullUnroll(mode="forward"), True),
    )
    chosen = some(cases, 4, name, method)
    if any(warm for *_, warm in chosen):
        before = replace(METHODS[method], steps=20)
        begun = stepwise(problem, before, bl.TruncatedUnroll(1), u - 0.3, check=False, on_failure="return").carry
    for tol, steps, estimator, warm in chosen:
        carry = begun if warm else None
        solver = replace(METHODS[method], tol=tol, steps=steps)
        one, other = (
            call(problem, solver, estimator, u, carry=carry, check=False, on_failure="return")
            for call in (bl.hypergradient, stepwise)
        )
        assert one.verdict.status == other.verdict.status
        assert one.certificate.inner_steps == other.certificate.inner_steps
        if estimator != bl.FullUnroll(memory="checkpoint"):
            assert one.cost.counts == other.cost.counts
        agree(one.params, other.params)
        agree(one.hypergradient, other.hypergradient)


@pytest.mark.parametrize("tail", [10, 300])
def test_a_tail_begins_before_the_stretch_in_which_its_run_ends(tail: int) -> None:
    problem, u = PROBLEMS["ridge"], hparams(PROBLEMS["ridge"])
    for tol in (1e-1, 1e-4):
        solver = bl.GradientDescent(0.01, tol=tol)
        one, other = (call(problem, solver, bl.TruncatedUnroll(tail), u) for call in (bl.hypergradient, stepwise))
        assert one.certificate.inner_steps == other.certificate.inner_steps
        assert one.cost.counts == other.cost.counts
        agree(one.hypergradient, other.hypergradient)


def test_looks_before_the_steps_that_are_asked_for_note_no_best_residual() -> None:
    solver = bl.HeavyBall(0.05, 0.6, tol=1e-9)
    run = Run(RIDGE, solver, hparams(RIDGE), RIDGE.start())
    looks, taken = Looks(run.inner(), solver, run.begin(), 1e-9, at_least=100), np.arange(1, 121)
    assert [int(taken[k]) for k in looks.that_may_end(np.where(taken == 50, 0.5, 1.0), taken)] == []
    # As of single steps, or a run at its floor would have waited since then.
    assert (looks.goal.best, looks.goal.best_at) == (1.0, 100)


ROWS = 11
ESTIMATORS = (bl.FullUnroll(), bl.TruncatedUnroll(17), bl.FullUnroll(mode="forward"), bl.Implicit())
BATCHES: dict[str, bl.BilevelProblem] = {
    "quadratics": bl.stack([bl.QuadraticProblem.random(size=4, hyperparameters=2, seed=seed) for seed in range(ROWS)]),
    "ridge, penalties": PROBLEMS["ridge"].batched(ROWS),
    "ridge, data": bl.stack([bl.problems.RidgeProblem(*data(25, 5, seed), X, Y) for seed in range(ROWS)]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("method", METHODS)
def test_rows_on_flat_vectors_are_those_of_their_steps(name: str, method: str) -> None:
    problem: Any = BATCHES[name]
    u = 0.3 * normal(7, ROWS, *(problem.hparams_shape()[1:] if hasattr(problem, "hparams_shape") else (2,)))
    own: dict[str, bl.InnerSolver] = {
        "gradient descent": bl.GradientDescent(steps=40),
        "nesterov": bl.Nesterov(momentum="auto", steps=40),
    }
    fixed = replace(METHODS[method], steps=40)
    solvers = (fixed, own[method]) if method in own else (fixed,)
    for solver, estimator in some(product(solvers, ESTIMATORS), 3, name, method):
        carry = stepwise(problem, replace(solver, steps=3), bl.TruncatedUnroll(1), u - 0.1, check=False).carry
        one, other = (
            call(problem, solver, estimator, u, carry=carry, check=False, on_failure="return")
            for call in (bl.hypergradient, stepwise)
        )
        assert [each.counts for each in one.costs] == [each.counts for each in other.costs]
        assert [each.status for each in one.verdicts] == [each.status for each in other.verdicts]
        agree(one.params, other.params)
        agree(one.hypergradient, other.hypergradient)


class Watched(bl.GradientDescent):
    """Gradient descent that takes its steps itself."""

    def step(self, inner: Any, state: Any) -> Any:
        return super().step(inner, state)


RIDGE = PROBLEMS["ridge"]


def estimates(problem: Any, step_size: float, steps: int, u: Tensor) -> list[bl.Estimate]:
    """Return the estimates of a run on flat vectors, and of its steps."""
    solvers = (bl.GradientDescent(step_size, steps=steps), Watched(step_size, steps=steps))
    return [bl.hypergradient(problem, solver, bl.FullUnroll(), u, on_failure="return") for solver in solvers]


def test_a_solver_that_takes_its_steps_itself_takes_them() -> None:
    u = hparams(RIDGE)
    assert unrolled(Run(RIDGE, Watched(0.05, steps=9), u, RIDGE.start()), lambda steps: steps) is None
    flat, stepped = estimates(RIDGE, 0.05, 30, u)
    assert flat.cost.counts == stepped.cost.counts
    agree(flat.hypergradient, stepped.hypergradient)


def test_the_certificate_says_how_the_steps_were_made() -> None:
    u, solver = hparams(RIDGE), bl.GradientDescent(0.05, steps=30)
    scalar, one = PROBLEMS["ridge, one penalty"], torch.tensor(-1.0, dtype=F64)
    for form, problem, method, estimator, at in (
        ("doubled", RIDGE, solver, bl.FullUnroll(), u),
        ("doubled and flat", RIDGE, solver, bl.TruncatedUnroll(3), u),
        ("flat and doubled", RIDGE, bl.HeavyBall(0.05, 0.6, first_step="half", steps=30), bl.FullUnroll(), u),
        ("flat", RIDGE, bl.Sobolev(l=0.05, L=12.0, steps=30), bl.FullUnroll(), u),
        ("flat", RIDGE, solver, bl.FullUnroll(mode="forward"), u),
        ("step by step", RIDGE, Watched(0.05, steps=30), bl.FullUnroll(), u),
        ("doubled", RIDGE, bl.GradientDescent(0.05, tol=1e-3), bl.Implicit(), u),
        ("eigenbasis", scalar, solver, bl.Spectral(), one),
        ("closed form", scalar, solver, bl.ClosedForm(), one),
    ):
        estimate = bl.hypergradient(problem, method, estimator, at, on_failure="return")
        assert estimate.certificate.form == form, (method, estimator)


@pytest.mark.parametrize(
    ("name", "step_size", "steps"), [("ridge", 2.0, 40), ("ridge", 50.0, 4_000), ("logistic", 1e201, 40)]
)
def test_failures_are_named_as_by_the_steps(name: str, step_size: float, steps: int) -> None:
    flat, stepped = estimates(PROBLEMS[name], step_size, steps, hparams(PROBLEMS[name]))
    assert not flat.status.usable
    assert flat.cost.counts == stepped.cost.counts
    assert flat.verdict.detail == stepped.verdict.detail.replace("Watched", "GradientDescent")


def test_doubling_stops_where_sums_would_lose_digits() -> None:
    plain = bl.GradientDescent(1.0).coefficients(None)  # type: ignore[arg-type]
    momentum = Coefficients(read=(1.0, 0.0), mix=((1.99, -0.99), (1.0, 0.0)), write=(-1.0, 0.0))
    assert doubles(6, 1.0, [plain], 1_000)
    assert not doubles(6, 1.0, [plain], 100_000)
    assert doubles(6, 1.0, [plain], 100_000, lambda: 1e-3)
    assert not doubles(6, 1.0, [plain], 100_000, lambda: 1e-9)
    assert not doubles(6, 1.0, [momentum], 1_000)
    assert not doubles(6, 1.0, [Coefficients(read=(1.0,), mix=((9.0,),), write=(-1.0,))], 1_000)
    assert (block(1_000, 30), block(1_000, 1_000), block(3, 1)) == (256, 8, 2)


def test_ill_conditioned_runs_are_as_exact_as_their_steps() -> None:
    u = torch.zeros(2, dtype=F64)
    for steps in (200, 3_000):
        problem = bl.QuadraticProblem.random(size=8, hyperparameters=2, condition=1e5, seed=2)
        flat, stepped = estimates(problem, 1e-5, steps, u)
        torch.testing.assert_close(flat.hypergradient, stepped.hypergradient, rtol=1e-10, atol=0)


def test_checkpoints_make_long_runs_again_to_the_same_bits() -> None:
    for name, solver in (
        ("ridge", bl.HeavyBall(0.05, 0.6, steps=900)),
        ("logistic", bl.Nesterov(0.05, 0.6, steps=200)),
    ):
        u = hparams(PROBLEMS[name])
        one, other = (
            bl.hypergradient(PROBLEMS[name], solver, bl.FullUnroll(memory=m), u) for m in ("iterates", "checkpoint")
        )
        assert torch.equal(one.hypergradient, other.hypergradient)
        agree(one.hypergradient, by_steps(PROBLEMS[name], solver, u, solver.steps or 0)[1])
        assert other.cost.counts["gradient"] == one.cost.counts["gradient"] + (solver.steps or 0)


def test_single_precision_is_no_worse_than_its_steps() -> None:
    exact, _ = estimates(RIDGE, 0.05, 300, hparams(RIDGE))
    single = bl.problems.RidgeProblem(X.float(), Y.float(), (X + 0.1).float(), Y.float(), penalty="per_feature")
    errors = [
        float((each.hypergradient - exact.hypergradient).norm())
        for each in estimates(single, 0.05, 300, hparams(RIDGE).float())
    ]
    assert errors[0] <= 1.5 * errors[1] + 1e-9


def test_wide_rows_in_single_precision_run_to_a_tolerance() -> None:
    wide = normal(5, 4, 8).float()
    problem = bl.problems.RidgeProblem(wide, wide[:, 0], wide + 0.1, wide[:, 0])
    made = bl.hypergradient(problem, bl.GradientDescent(), bl.FullUnroll(), torch.tensor(-12.0), on_failure="return")
    exact = bl.hypergradient(problem, bl.Newton(), bl.ClosedForm(), torch.tensor(-12.0))
    torch.testing.assert_close(made.params, exact.params, rtol=1e-3, atol=1e-3)


def test_a_tolerance_below_single_precision_is_not_said_to_be_reached() -> None:
    u = hparams(RIDGE).float()
    problem = bl.problems.RidgeProblem(X.float(), Y.float(), X.float(), Y.float(), penalty="per_feature")
    for tol in (1e-12, 1e-3):
        solver = bl.GradientDescent(0.05, tol=tol)
        one, other = (
            call(problem, solver, bl.Implicit(), u, check=False, on_failure="return")
            for call in (bl.hypergradient, stepwise)
        )
        assert one.status == other.status
        residual = float(problem.bind(u).grad(one.params).norm())
        assert one.certificate.inner_residual == pytest.approx(residual, rel=0.1, abs=1e-6)


def test_many_data_have_no_kernels() -> None:
    big, labels = normal(0, 2_100, 100), torch.arange(2_100) % 2
    problem = bl.problems.LogisticProblem(big, labels, big[:10], labels[:10])
    assert problem.bind(hparams(problem)).kernels() is None
    assert PROBLEMS["logistic"].bind(hparams(PROBLEMS["logistic"])).kernels() is not None


class Smooth(bl.problems.losses.Logistic):
    """Logistic loss of labels that are wrong in one row of ten."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.9 * super().value(z, y) + 0.1 * super().value(z, -y)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.9 * super().slope(z, y) + 0.1 * super().slope(z, -y)


class SmoothProblem(bl.problems.LogisticProblem):
    glm = Smooth()


class Doubling(bl.problems.LogisticProblem):
    """Predictions that are twice as large."""

    def predict(self, X: Tensor, w: Tensor) -> Tensor:
        return 2.0 * super().predict(X, w)

    def collect(self, X: Tensor, slopes: Tensor) -> Tensor:
        return 2.0 * super().collect(X, slopes)


class Shifted(bl.problems.ridge.RidgeInner):
    """The gradient of another ridge problem."""

    def _grad(self, params: Tensor) -> Tensor:
        return super()._grad(params) + 0.1


class ShiftedProblem(bl.problems.RidgeProblem):
    inner_problem = Shifted

    def inner_loss(self, params: Any, hparams: Any) -> Tensor:
        return super().inner_loss(params, hparams) + 0.1 * params.sum()


class Cautious(bl.GradientDescent):
    """Steps that are shorter far from zero."""

    def coefficients(self, state: Any) -> Coefficients:
        return Coefficients(read=(1.0,), mix=((1.0,),), write=(-0.05 / (1.0 + float(state.params.norm())),))


class CautiousMomentum(bl.HeavyBall):
    """Momentum that is smaller far from zero."""

    def coefficients(self, state: Any) -> Coefficients:
        m = 0.5 / (1.0 + float(state.params.norm()))
        return Coefficients(read=(1.0, 0.0), mix=((1.0 + m, -m), (1.0, 0.0)), write=(-0.01, 0.0))


@pytest.mark.parametrize("make", [SmoothProblem, Doubling, ShiftedProblem], ids=lambda make: make.__name__)
def test_what_a_subclass_changes_is_what_its_steps_see(make: Any) -> None:
    problem = make(X, Y if make is ShiftedProblem else LABELS, X + 0.1, Y if make is ShiftedProblem else LABELS)
    u, solver = hparams(problem), bl.HeavyBall(0.05, 0.6, steps=30)
    estimate = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False, on_failure="return")
    params, total = by_steps(problem, solver, u, 30)
    agree(estimate.params, params)
    agree(estimate.hypergradient, total)


def test_numbers_that_depend_on_the_iterate_are_those_of_its_steps() -> None:
    u, solver = hparams(RIDGE), Cautious(0.05, steps=6)
    for estimator in (bl.FullUnroll(), bl.FullUnroll(mode="forward")):
        estimate = bl.hypergradient(RIDGE, solver, estimator, u)
        agree(estimate.hypergradient, by_steps(RIDGE, solver, u, 6)[1])


def test_no_more_steps_are_swept_than_taken_and_data_that_ask_for_derivatives_get_none() -> None:
    u, solver = hparams(RIDGE), bl.GradientDescent(0.05, steps=3)
    estimate = bl.hypergradient(RIDGE, solver, bl.TruncatedUnroll(tail=7), u, check=False)
    agree(estimate.hypergradient, by_steps(RIDGE, solver, u, 3)[1])
    eye = torch.eye(3, dtype=F64).requires_grad_()
    problem = bl.QuadraticProblem(eye, torch.ones(3, dtype=F64), hessian_directions=eye.detach()[None])
    run = Run(problem, solver, torch.zeros(1, dtype=F64), problem.start())
    for found in (unrolled(run, lambda steps: steps), pushed(run)):
        assert found is not None
        pulled = found.pullback(torch.ones(3, dtype=F64)).hparams
        assert not (found.params.requires_grad)
        assert not (pulled.requires_grad)


def test_forward_mode_holds_no_more_for_more_steps() -> None:
    made: list[int] = []
    problem = PROBLEMS["logistic"]
    run = Run(problem, bl.GradientDescent(0.05, steps=400), hparams(problem), problem.start())

    def watched(self: Tensor, *size: int) -> Tensor:
        made.append(size[0])
        return new_empty(self, *size)

    new_empty = Tensor.new_empty
    with mock.patch.object(Tensor, "new_empty", watched):
        assert pushed(run) is not None
    assert max(made) == 1 + hparams(problem).numel()


def test_what_a_run_in_vain_has_measured_is_counted_once() -> None:
    wide = normal(3, 330, 320)
    problem = bl.problems.RidgeProblem(wide, wide[:, 0], wide[:5], wide[:5, 0])
    solver = bl.HeavyBall(momentum=0.999, steps=40)  # measures the curvature by products
    run = Run(problem, solver, hparams(problem), problem.start())
    run.begin()
    once = dict(run.meter.counts)
    vain = Run(problem, CautiousMomentum(momentum=0.999, steps=40), hparams(problem), problem.start())
    assert once
    assert unrolled(vain, lambda steps: steps) is None
    vain.begin()
    assert vain.meter.counts == once
