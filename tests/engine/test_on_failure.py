"""Failure is loud: every status can be met, `on_failure` does what it says, and NaN is named where it is made."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import F64, normal, ridge_case, spd
from torch import Tensor

import bilevel as bl
from bilevel.core.status import OnFailure
from bilevel.outer import OuterOptions

U = torch.tensor(0.1, dtype=F64)
ONE = torch.ones(3, dtype=F64)


def problem(
    inner: Callable[..., Tensor] = lambda x, u: (x - 1.0).square().sum() + u.exp() * x.square().sum(),
    outer: Callable[..., Tensor] = lambda x, u: (x - 2.0).square().sum(),
    params: Any = ONE,
) -> bl.BilevelProblem:
    return bl.BilevelProblem(inner, outer, params)


def taken(
    made: bl.BilevelProblem, solver: bl.InnerSolver, estimator: bl.HypergradEstimator, hparams: Any = U, **options: Any
) -> bl.Estimate:
    return bl.hypergradient(made, solver, estimator, hparams, on_failure="return", **options)


# Every status ---------------------------------------------------------------------------------------------------------

SADDLE = problem(lambda x, u: 0.5 * (torch.tensor([1.0, 2.0, -0.5], dtype=F64) * x * x).sum() + u * x.sum())
FLAT = problem(lambda x, u: (x[:2] - 1.0).square().sum() + u * x[:2].sum() + 0.0 * x[2])
MATRIX = spd(1, 3, 1000.0)
STEEP = problem(lambda x, u: 0.5 * x @ (MATRIX @ x) + u * x.sum())
KINK = problem(lambda x, u: (2 * (x - 0.3).relu() - x).sum() + 0.05 * u.exp() * x.square().sum())

STATUSES: dict[bl.Status, Callable[[], bl.Estimate]] = {
    bl.Status.OK: lambda: taken(problem(), bl.Newton(), bl.Implicit()),
    bl.Status.INNER_NOT_CONVERGED: lambda: taken(problem(), bl.GradientDescent(0.1, steps=2, tol=1e-9), bl.Implicit()),
    bl.Status.TARGET_NOT_REACHED: lambda: taken(
        problem(), bl.GradientDescent(0.1, steps=2), bl.Implicit(), target_error=1e-6
    ),
    bl.Status.INACCURATE: lambda: taken(STEEP, bl.GradientDescent(steps=2), bl.FullUnroll(), certify=True),
    bl.Status.DIVERGED: lambda: taken(problem(), bl.GradientDescent(5.0, steps=30), bl.FullUnroll()),
    bl.Status.NOT_FINITE: lambda: taken(problem(outer=lambda x, u: (x - 0.5).log().sum()), bl.Newton(), bl.Implicit()),
    bl.Status.NEGATIVE_CURVATURE: lambda: taken(SADDLE, bl.GradientDescent(0.1, steps=2), bl.Implicit()),
    bl.Status.SINGULAR: lambda: taken(FLAT, bl.GradientDescent(0.1, steps=50), bl.Implicit(bl.Direct())),
    bl.Status.LINEAR_NOT_CONVERGED: lambda: taken(STEEP, bl.Newton(), bl.Implicit(bl.CG(max_steps=1))),
    bl.Status.LINEAR_DIVERGED: lambda: taken(
        STEEP, bl.Newton(), bl.Implicit(bl.FixedPointIteration(step_size=1.0, max_steps=20))
    ),
    bl.Status.WRONG_DERIVATIVE: lambda: taken(
        problem(lambda x, u: (x - 1.0).square().sum() + u.exp() * u.detach() * x.square().sum()),
        bl.Newton(),
        bl.Implicit(),
    ),
    bl.Status.NOT_SMOOTH: lambda: taken(
        problem(lambda x, u: (x - 0.1).square().sum() + u.exp() * x.abs().sum()),
        bl.GradientDescent(0.1, steps=60),
        bl.Implicit(),
    ),
    bl.Status.FAILED_STEP: lambda: taken(KINK, bl.Newton(), bl.Implicit()),
}


@pytest.mark.parametrize("status", bl.Status, ids=lambda status: status.name)
def test_every_status_is_met_with_a_number_or_with_nan_and_names_its_remedy(status: bl.Status) -> None:
    estimate = STATUSES[status]()
    assert estimate.status is status, estimate.verdict
    assert bool(torch.isfinite(estimate.hypergradient).all()) == status.usable
    assert status.remedy in str(estimate.verdict)
    if not status.ok:
        assert estimate.verdict.detail


# The three words ------------------------------------------------------------------------------------------------------

FAILING = bl.Implicit(bl.CG(max_steps=1))


def steep_outer(**options: Any) -> bl.OuterOptimizer:
    return bl.OuterOptimizer(STEEP, bl.Newton(), FAILING, U, **options)


def test_raise_raises_with_the_estimate() -> None:
    with pytest.raises(bl.HypergradientError, match="CG stopped after 1 steps") as caught:
        bl.hypergradient(STEEP, bl.Newton(), FAILING, U)
    assert caught.value.verdict.status is bl.Status.LINEAR_NOT_CONVERGED
    assert math.isnan(caught.value.estimate.hypergradient)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bl.hypergradient(STEEP, bl.Newton(), FAILING, U, on_failure="warn"),
        lambda: bl.hypergradient(
            STEEP, bl.GradientDescent(steps=50), FAILING, U[None].expand(2), batch=2, on_failure="warn"
        ),
        lambda: steep_outer(on_failure="warn").step(),
        lambda: steep_outer(on_failure="warn").run(3, progress=False),
    ],
    ids=["hypergradient", "a batch", "an outer step", "an outer run"],
)
def test_warn_warns_once_with_the_sentence_and_the_remedy(call: Callable[[], Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert [each.category for each in caught] == [bl.BilevelWarning]
    assert "CG stopped after 1 steps" in str(caught[0].message)
    assert bl.Status.LINEAR_NOT_CONVERGED.remedy in str(caught[0].message)


def test_return_is_silent_and_leaves_nan_with_its_verdict() -> None:
    estimate = bl.hypergradient(STEEP, bl.Newton(), FAILING, U, on_failure="return")
    assert math.isnan(estimate.hypergradient)
    assert estimate.status is bl.Status.LINEAR_NOT_CONVERGED
    warm = replace(bl.hypergradient(STEEP, bl.Newton(), bl.Implicit(), U).carry, adjoint=None)
    assert bl.hypergradient(STEEP, bl.Newton(), FAILING, U, carry=warm, on_failure="return").carry.adjoint is None
    outer = steep_outer(on_failure="return")
    assert math.isnan(outer.step().hypergradient)
    assert outer.hparams == U


def test_a_doubt_warns_and_never_raises() -> None:
    short = bl.GradientDescent(0.1, steps=2, tol=1e-9)
    for word in ("raise", "warn"):
        with pytest.warns(bl.BilevelWarning, match="stopped after 2 steps"):
            estimate = bl.hypergradient(problem(), short, bl.Implicit(), U, on_failure=word)  # type: ignore[arg-type]
        assert torch.isfinite(estimate.hypergradient)


# The differentiable layer ---------------------------------------------------------------------------------------------


def layer(made: bl.BilevelProblem, solver: bl.InnerSolver, estimator: Any, **options: Any) -> tuple[Tensor, Tensor]:
    u = U.clone().requires_grad_()
    x = bl.solution(made, solver, estimator, u, **options)
    x.sum().backward()
    assert u.grad is not None
    return x.detach(), u.grad


def test_a_failed_inner_solve_of_the_layer_raises_warns_once_or_returns_nan() -> None:
    solver = bl.GradientDescent(5.0, steps=30)
    with pytest.raises(bl.HypergradientError, match="diverges"):
        layer(problem(), solver, bl.Implicit())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, slope = layer(problem(), solver, bl.Implicit(), on_failure="warn")
    assert ["diverges" in str(each.message) for each in caught] == [True]
    assert torch.isnan(x).all()
    assert torch.isnan(slope)
    assert torch.isnan(layer(problem(), solver, bl.Implicit(), on_failure="return")[1])


def test_a_failed_pullback_of_the_layer_raises_warns_once_or_returns_nan() -> None:
    with pytest.raises(bl.HypergradientError, match="CG stopped after 1 steps"):
        layer(STEEP, bl.Newton(), FAILING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, slope = layer(STEEP, bl.Newton(), FAILING, on_failure="warn")
    assert ["CG stopped after 1 steps" in str(each.message) for each in caught] == [True]
    assert torch.isfinite(x).all()
    assert torch.isnan(slope)
    assert torch.isnan(layer(STEEP, bl.Newton(), FAILING, on_failure="return")[1])


def test_the_layer_refuses_another_word() -> None:
    with pytest.raises(ValueError, match="`on_failure` must be 'raise', 'warn' or 'return', got 'ignore'"):
        bl.solution(problem(), bl.Newton(), bl.Implicit(), U, on_failure="ignore")  # type: ignore[arg-type]


# NaN is named where it is made ----------------------------------------------------------------------------------------


def test_nan_in_the_start_data_is_named_with_the_operation_that_is_given_it() -> None:
    data = torch.tensor([1.0, float("nan"), 2.0], dtype=F64)
    with pytest.raises(
        ValueError, match=r"`inner_loss` is nan at the start: a tensor of shape \(3,\) that `sub` is given"
    ):
        bl.hypergradient(problem(lambda x, u: (x - data).square().sum() + u * x.sum()), bl.Newton(), bl.Implicit(), U)


def test_nan_of_the_outer_loss_is_named_with_the_operation() -> None:
    verdict = STATUSES[bl.Status.NOT_FINITE]().verdict
    assert "the outer loss is nan at the inner solution: `log` made the first value that is not finite" in str(verdict)
    assert "from a tensor of shape (3,) with entries from -0.025" in str(verdict)


@pytest.mark.parametrize("estimator", [bl.Implicit(), bl.FullUnroll(), bl.TruncatedUnroll(5)], ids=repr)
def test_an_infinite_slope_of_the_outer_loss_is_named_with_leaf_and_operation(estimator: Any) -> None:
    # The inner solution is zero, where the square root has no slope.
    params = {"a": torch.ones(2, dtype=F64), "b": torch.ones(2, dtype=F64)}
    made = problem(
        lambda x, u: x["a"].square().sum() + u.exp() * x["b"].square().sum(),
        lambda x, u: x["a"].sum() + x["b"].square().sum().sqrt(),
        params,
    )
    estimate = taken(made, bl.GradientDescent(0.5 / math.exp(0.1), steps=40), estimator)
    estimate = taken(made, bl.Newton(), estimator) if estimate.status.ok else estimate
    assert estimate.status is bl.Status.NOT_FINITE
    assert "the gradient of the outer loss by `params['b']` is not finite at the inner solution: " in str(
        estimate.verdict
    )
    assert "the derivative of `" in str(estimate.verdict)


def test_a_slope_of_the_outer_loss_by_a_hyperparameter_is_named() -> None:
    hparams = {"c": U, "d": torch.tensor(0.0, dtype=F64)}
    made = problem(lambda x, u: (x - u["c"]).square().sum() + u["d"] * x.sum(), lambda x, u: x.sum() + u["d"].sqrt())
    estimate = taken(made, bl.Newton(), bl.Implicit(), hparams)
    assert "by `hparams['d']` is not finite at the inner solution: the derivative of `Sqrt`" in str(estimate.verdict)


def test_nan_of_the_pullback_is_named_with_its_leaf() -> None:
    # The inner gradient is finite at u = 0, and its derivative by u is not.
    hparams = {"c": U, "d": torch.tensor(0.0, dtype=F64)}
    made = problem(lambda x, u: (x - u["c"]).square().sum() + (u["d"].sqrt() * x).sum())
    estimate = taken(made, bl.Newton(), bl.Implicit(), hparams, check=False)
    assert estimate.status is bl.Status.NOT_FINITE
    assert "the pullback to `hparams['d']` is not finite, though the outer gradient is" in str(estimate.verdict)


def overflowing(**options: Any) -> bl.OuterOptimizer:
    case = ridge_case()
    return bl.OuterOptimizer(
        case.problem,
        bl.Newton(),
        bl.Implicit(),
        case.hparams,
        lambda tensors: torch.optim.SGD(tensors, lr=math.inf),
        **options,
    )


def test_an_optimizer_step_to_infinity_is_not_taken_and_names_the_leaf() -> None:
    outer = overflowing()
    before = outer.hparams
    with pytest.raises(
        bl.HypergradientError, match=r"SGD at outer step 1 made `hparams` NaN or infinite, so it was not"
    ):
        outer.step()
    assert torch.equal(outer.hparams, before)
    assert outer.history == []
    with pytest.warns(bl.BilevelWarning, match="SGD at outer step 1 made"):
        overflowing(on_failure="warn").step()
    result = overflowing(on_failure="return").run(3, progress=False)
    assert [record.status for record in result.history] == ["NOT_FINITE"]
    assert "use a smaller learning rate or constraints" in result.stopped
    assert torch.equal(result.hparams, before)


def test_a_member_whose_step_goes_to_infinity_fails_alone() -> None:
    case = ridge_case()
    starts = torch.stack([case.hparams, case.hparams + 0.5])

    class Spoiled(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0][1] = math.nan

    def outer(word: Any) -> Any:
        return bl.OuterOptimizer(
            case.problem,
            bl.GradientDescent(),
            bl.Implicit(),
            starts,
            lambda tensors: Spoiled(tensors, lr=0.1),
            batch=2,
            on_failure=word,
        )

    quiet = outer("return")
    estimate = quiet.step()
    assert [each.status for each in estimate] == [bl.Status.OK, bl.Status.NOT_FINITE]
    assert torch.equal(quiet.hparams[1], starts[1])
    assert not torch.equal(quiet.hparams[0], starts[0])
    loud = outer("raise")
    with pytest.raises(bl.HypergradientError, match="1 of 2 members failed: member 1: Spoiled made"):
        loud.step()
    assert torch.equal(loud.hparams, starts)


def test_a_combination_that_a_formula_does_not_cover_is_refused_before_the_work() -> None:
    made = bl.BilevelProblem(
        outer_loss=lambda x, u: x.sum(), params=ONE, optimality=lambda x, u: x - torch.tanh(u * x + normal(1, 3))
    )
    with pytest.raises(ValueError, match="CG needs a symmetric matrix"):
        bl.hypergradient(made, bl.FixedPoint(lambda x, u: torch.tanh(u * x + normal(1, 3))), bl.Implicit(), U)
    with pytest.raises(ValueError, match="the steps of QuasiNewton are not differentiated"):
        bl.hypergradient(problem(), bl.QuasiNewton(), bl.FullUnroll(), U)


def test_a_solution_whose_params_are_far_from_it_is_in_doubt_on_the_way_back() -> None:
    problem = bl.QuadraticProblem.random(4, 2, condition=100.0, seed=0)

    def backward(steps: int, on_failure: OnFailure = "raise") -> None:
        u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        x = bl.solution(problem, bl.GradientDescent(steps=steps), bl.Implicit(), u, on_failure=on_failure)
        x.square().sum().backward()

    with pytest.warns(bl.BilevelWarning, match=r"along the cotangent that differs by about .* \[INACCURATE\]"):
        backward(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(10, "return")
        backward(2000)


def test_a_warning_names_the_line_that_called_into_the_package_however_many_frames_lie_between() -> None:
    solver = bl.GradientDescent(0.1, steps=2, tol=1e-9)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: bl.hypergradient(problem(), solver, bl.Implicit(), U),
        torch.no_grad()(lambda: bl.hypergradient(problem(), solver, bl.Implicit(), U, certify=True)),
        lambda: bl.solution(problem(), solver, bl.Implicit(), U),
        lambda: bl.OuterOptimizer(problem(), solver, bl.Implicit(), U).run(1),
        lambda: bl.trace(problem(), "inductor"),
        lambda: OuterOptions(schedule="quadratic"),
        lambda: type("Old", (bl.InnerSolver,), {"unrolls": False}),
    )
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert {each.filename for each in caught} == {__file__}


def test_all_warnings_of_the_package_are_given_in_one_way() -> None:
    for file in Path(bl.__file__).parent.rglob("*.py"):
        assert not re.search(r"warnings\.warn\(|from warnings import", file.read_text()), file
