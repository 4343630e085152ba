"""Tolerances from a target: the error is what was asked for, the work little, refusal loud, runs resumable."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import F64, Case, logistic_case, normal, ridge_case, sample_weight_case, softmax_case, tree_case
from torch import Tensor

import bilevel as bl
from bilevel.certify import ErrorBound, bound_error
from bilevel.outer import no_descent
from bilevel.problems import RidgeProblem

CASES = {
    "ridge": ridge_case,
    "logistic": logistic_case,
    "softmax": softmax_case,
    "sample weights": sample_weight_case,
    "no bound known": tree_case,
}


def true_error(case: Case, found: bl.Estimate) -> float:
    """The relative error against dense algebra."""
    exact = case.hypergradient()
    return float((found.hypergradient.reshape(-1) - exact).norm() / exact.norm())


@pytest.mark.crossed
@pytest.mark.parametrize("target", [0.3, 1e-3, 1e-7])
@pytest.mark.parametrize("name", CASES)
def test_the_error_is_below_the_target_and_the_certificate_says_so(name: str, target: float) -> None:
    case = CASES[name]()
    found = bl.hypergradient(
        case.problem, bl.GradientDescent(), bl.Implicit(), case.hparams, case.start, target_error=target
    )
    size = float(found.hypergradient.norm())
    assert found.status.ok
    assert found.certificate.error_kind == ("estimate" if name == "no bound known" else "bound")
    assert found.certificate.error <= target / (1 + target) * size
    assert true_error(case, found) <= target


@pytest.mark.parametrize(
    "estimator",
    [
        bl.Implicit(bl.GMRES()),
        bl.Implicit(bl.FixedPointIteration()),
        bl.Implicit(bl.Direct()),
        bl.BalancedImplicit(),
        bl.FullUnroll(),
        bl.FullUnroll(mode="forward"),
        bl.TruncatedUnroll(tail=0.5),
        bl.AdaptiveUnroll(),
        bl.Auto(),
        bl.Auto(unroll=True),
    ],
    ids=bl.base.describe,
)
@pytest.mark.parametrize("name", ["logistic", "no bound known"])
def test_every_estimator_that_takes_a_target_reaches_it(name: str, estimator: bl.HypergradEstimator) -> None:
    case = CASES[name]()
    found = bl.hypergradient(case.problem, bl.GradientDescent(), estimator, case.hparams, case.start, target_error=1e-3)
    assert found.status.ok
    assert true_error(case, found) <= 1e-3


def test_a_looser_target_costs_less_and_all_passes_and_looks_are_counted() -> None:
    case = logistic_case()
    given = (case.problem, bl.GradientDescent(), bl.Implicit(), case.hparams)
    costs = [bl.hypergradient(*given, target_error=t).cost for t in (1e-1, 1e-3, 1e-6)]
    assert costs[0].gradient_equivalents < costs[1].gradient_equivalents < costs[2].gradient_equivalents
    # One outer loss for every pass and one for every look.
    assert all(cost.counts["outer"] >= 2 for cost in costs)


def test_passes_continue_the_same_run_and_end_where_one_run_ends() -> None:
    case = logistic_case()
    solver = bl.GradientDescent(step_size=0.3)
    found = bl.hypergradient(case.problem, solver, bl.Implicit(), case.hparams, case.start, target_error=1e-6)
    steps = found.certificate.inner_steps
    x = case.start.clone()
    for _ in range(steps):
        x = x - 0.3 * case.grad(x, case.hparams)
    assert torch.allclose(found.params, x, rtol=1e-12, atol=1e-14)
    # The residual is looked at once a step, once at the start, and twice by each of the looks.
    assert found.cost.counts["gradient"] <= steps + 20


def test_a_measured_step_size_is_measured_once_for_all_passes() -> None:
    case = tree_case()
    given = (case.problem, bl.GradientDescent(), bl.Implicit(bl.Direct()), case.hparams)
    rough, fine = (bl.hypergradient(*given, target_error=t, on_failure="return") for t in (0.5, 1e-8))
    once = bl.hypergradient(*given)
    assert fine.certificate.measured == rough.certificate.measured == once.certificate.measured


def test_a_good_warm_start_takes_no_step() -> None:
    case = logistic_case()
    given = (case.problem, bl.GradientDescent(), bl.Implicit(), case.hparams)
    fine = bl.hypergradient(*given, target_error=1e-6)
    again = bl.hypergradient(*given, target_error=1e-3, carry=fine.carry)
    assert again.certificate.inner_steps == 0
    assert again.status.ok
    assert not again.carry.ongoing


def test_the_parts_of_a_bound_shrink_with_their_own_residuals() -> None:
    for case in (logistic_case(), softmax_case(), sample_weight_case()):
        x = case.solution()
        w = torch.linalg.solve(case.hessian(x, case.hparams), case.outer(x, case.hparams)[0])
        shape = case.problem.start().shape
        bound = ErrorBound(case.problem, case.hparams)
        off = 1e-5 * normal(40, len(w))

        def at(
            dx: float,
            dw: float,
            bound: Any = bound,
            x: Any = x,
            w: Any = w,
            off: Any = off,
            case: Any = case,
            shape: Any = shape,
        ) -> Any:
            moved, adjoint = x + dx * off, w + dw * off
            p = case.outer(moved, case.hparams)[1] - case.cross(moved, case.hparams).t() @ adjoint
            return bound(moved.reshape(shape), p, adjoint.reshape(shape))

        only_w, only_x = at(0.0, 1.0), at(1.0, 0.0)
        assert only_w.adjoint_part > 0.95 * only_w.value
        # A wrong x makes the adjoint residual wrong too, by its share.
        assert only_x.value - only_x.adjoint_part > 0.05 * only_x.value
        assert at(0.0, 0.1).adjoint_part == pytest.approx(0.1 * only_w.adjoint_part, rel=1e-3)


def float32_problem() -> tuple[RidgeProblem, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(30, 6, generator=generator)
    problem = RidgeProblem(X, X.sum(1), X, torch.randn(30, generator=generator))
    return problem, torch.tensor(-6.0)


def test_a_target_below_the_rounding_floor_is_refused_with_what_would_reach_it() -> None:
    problem, u = float32_problem()
    with pytest.warns(
        bl.BilevelWarning, match="target is below the rounding floor of float32.* use float64 or a larger"
    ):
        found = bl.hypergradient(problem, bl.GradientDescent(), bl.Implicit(), u, target_error=1e-12)
    assert found.status is bl.Status.TARGET_NOT_REACHED
    assert found.status.usable
    double = RidgeProblem(
        problem.train.X.t().double(), problem.train.y.double(), problem.val.X.t().double(), problem.val.y.double()
    )
    assert bl.hypergradient(double, bl.QuasiNewton(), bl.Implicit(), u.double(), target_error=1e-9).status.ok


@pytest.mark.parametrize(
    ("solver", "linear_solver", "why"),
    [
        (bl.GradientDescent(steps=3), bl.CG(), "GradientDescent has used its 3 steps"),
        (bl.GradientDescent(tol=1e-1), bl.CG(), "the `tol` that was given stops the run first"),
    ],
    ids=["steps", "tol"],
)
def test_a_target_that_the_options_do_not_allow_is_missed_with_the_reason(
    solver: bl.InnerSolver, linear_solver: bl.LinearSolver, why: str
) -> None:
    case = logistic_case()
    found = bl.hypergradient(
        case.problem, solver, bl.Implicit(linear_solver), case.hparams, target_error=1e-6, on_failure="return"
    )
    assert found.status is bl.Status.TARGET_NOT_REACHED
    assert found.verdict.detail.startswith("target_error=1e-06 was not reached (the bound ")
    assert found.verdict.detail.endswith(why)


def test_a_failed_solve_keeps_its_own_status() -> None:
    case = logistic_case()
    found = bl.hypergradient(
        case.problem, bl.GradientDescent(1e3), bl.Implicit(), case.hparams, target_error=0.1, on_failure="return"
    )
    assert not found.status.usable


@pytest.mark.parametrize(
    ("options", "estimator", "message"),
    [
        ({"target_error": 0}, bl.Implicit(), "`target_error` must be a number in (0, 1), the relative error of the"),
        ({"target_error": -1e-3}, bl.Implicit(), "hypergradient, got -0.001."),
        ({"target_error": 1.0}, bl.Implicit(), "hypergradient, got 1.0."),
        ({"target_error": "1e-3"}, bl.Implicit(), "hypergradient, got '1e-3'."),
        ({"target_error": 0.1, "certify": True}, bl.Implicit(), "brings its own certificate: leave out certify=True."),
        ({"target_error": 0.1}, bl.Implicit(damping=0.1), "`Implicit.damping` 0.1 biases the hypergradient, so that"),
        (
            {"target_error": 0.1},
            bl.Implicit(curvature="gauss-newton"),
            "`Implicit.curvature` 'gauss-newton' biases the hypergradient, so that no tolerance leads to a",
        ),
        (
            {"target_error": 0.1},
            bl.Implicit(bl.Neumann(steps=7)),
            "Neumann(steps=7) takes 7 products, whatever a `target_error` asks for: use CG().",
        ),
        (
            {"target_error": 0.1},
            bl.Implicit(bl.CG(steps=5)),
            "CG(steps=5) takes 5 products, whatever a `target_error` asks for: use CG().",
        ),
        ({"target_error": 0.1}, bl.OneStep(), "OneStep() has no tolerance that leads to a `target_error`: use"),
        ({"target_error": 0.1}, bl.FirstOrder(), "FirstOrder() has no tolerance that leads to a `target_error`: use"),
        (
            {"target_error": 0.1},
            bl.BalancedImplicit(budget=200),
            "`BalancedImplicit.budget` and a `target_error` both say when to stop: give one of them.",
        ),
        (
            {"target_error": 0.1},
            bl.TruncatedUnroll(tail=5),
            "a tail of 5 steps leaves an error that no tolerance takes",
        ),
        (
            {"target_error": 0.1},
            bl.AdaptiveUnroll(budget=200),
            "`AdaptiveUnroll.budget` and a `target_error` both say when to stop: give one of them.",
        ),
        (
            {"target_error": 0.1},
            bl.FiniteDifference(),
            "has no tolerance that leads to a `target_error`: use Implicit()",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence_by_both_calls(
    options: dict[str, Any], estimator: bl.HypergradEstimator, message: str
) -> None:
    case = logistic_case()
    given = (case.problem, bl.GradientDescent(), estimator, case.hparams)
    for call in (bl.hypergradient, bl.OuterOptimizer):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            call(*given, **options)
        assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("solver", "estimator", "message"),
    [
        (
            bl.AdamW(0.01),
            bl.FullUnroll(),
            "`target_error` asks for the derivative of the inner solution, but `AdamW.weight_decay` leads the steps "
            "away from the minimiser of the inner loss (a penalty in the inner loss does not): leave it out.",
        ),
        (
            bl.SGD(step_size=lambda u: 0.1 * u[0].exp()),
            "auto",
            "`SGD.step_size` is a function of the hyperparameters, on which the solution does not depend: leave it "
            "out.",
        ),
        (
            bl.TorchOptimizer(lambda params: torch.optim.AdamW(params, lr=0.01)),
            bl.Implicit(),
            "weight_decay=0.01 of AdamW leads the steps away from the minimiser of the inner loss: set it to 0 and put",
        ),
    ],
    ids=["decay", "tuned step size", "torch's decay"],
)
def test_steps_that_decide_the_result_are_refused(solver: bl.InnerSolver, estimator: Any, message: str) -> None:
    case = logistic_case()
    for call in (bl.hypergradient, bl.OuterOptimizer):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            call(case.problem, solver, estimator, case.hparams, target_error=0.1)
        assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["logistic", "no bound known"])
@pytest.mark.parametrize(
    ("solver", "estimator"),
    [
        # Of its own tolerances LBFGS would stand still before the target.
        (
            bl.TorchOptimizer(lambda w: torch.optim.LBFGS(w, tolerance_grad=0, tolerance_change=0), steps=40),
            bl.Implicit(),
        ),
        (bl.QuasiNewton(), bl.Auto()),
        (bl.QuasiNewton(), bl.Implicit(bl.Nystrom(rank=100))),
    ],
    ids=["torch's LBFGS", "QuasiNewton", "Nystrom of full rank"],
)
def test_other_solvers_reach_the_target(name: str, solver: bl.InnerSolver, estimator: Any) -> None:
    case = CASES[name]()
    found = bl.hypergradient(case.problem, solver, estimator, case.hparams, case.start, target_error=1e-4)
    assert found.status.ok
    assert true_error(case, found) <= 1e-4


def test_a_low_rank_has_no_target_to_reach() -> None:
    case = logistic_case()
    with pytest.raises(ValueError, match="it needs something on the diagonal"):
        bl.hypergradient(case.problem, bl.QuasiNewton(), bl.Implicit(bl.Nystrom(2)), case.hparams, target_error=0.1)


def test_a_tail_that_auto_shortens_to_fit_into_memory_is_refused_a_target() -> None:
    case = logistic_case()
    rule = bl.Auto(unroll=True, memory_limit=2.0**10)
    with pytest.raises(ValueError, match="steps leaves an error that no tolerance takes away"):
        bl.hypergradient(case.problem, bl.GradientDescent(), rule, case.hparams, target_error=0.1)


def with_random_layers() -> bl.BilevelProblem:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1)).double()
    return network(model, seed=0)


def with_running_statistics() -> bl.BilevelProblem:
    return network(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double())


def network(model: torch.nn.Module, **options: Any) -> bl.BilevelProblem:
    X, y = normal(0, 8, 2), normal(1, 8, 1)
    return bl.ModuleProblem(
        model,
        lambda net, w, u: ((net(X) - y) ** 2).mean() + u.exp() * sum((leaf**2).sum() for leaf in w.values()),
        lambda net, w, u: ((net.eval()(X) - y) ** 2).mean(),
        **options,
    )


@pytest.mark.parametrize(
    ("make", "has"),
    [
        (with_random_layers, "random layers, whose steps see different draws"),
        (with_running_statistics, "running statistics, which move besides the parameters"),
    ],
)
def test_networks_whose_steps_vary_are_refused(make: Any, has: str) -> None:
    u = torch.tensor(-3.0, dtype=F64)
    for estimator in (bl.Implicit(), bl.FullUnroll(), "auto"):
        with pytest.raises(ValueError, match=f"falls below any tolerance, but this problem has {has}: leave it out."):
            bl.hypergradient(make(), bl.GradientDescent(0.1), estimator, u, target_error=0.1)


def test_members_of_a_batch_reach_their_targets_one_after_the_other_and_outer_loops_of_batches_are_refused() -> None:
    case = logistic_case()
    stacked = torch.stack([case.hparams, case.hparams + 1.0])
    given = (case.problem, bl.GradientDescent(), bl.Implicit(), stacked)
    for index, each in enumerate(bl.hypergradient(*given, batch=2, target_error=0.1)):
        alone = bl.hypergradient(*given[:3], stacked[index], target_error=0.1)
        assert torch.equal(each.hypergradient, alone.hypergradient)
        assert each.certificate.error_kind == alone.certificate.error_kind == "bound"
        assert "`target_error`" in each.certificate.measured["rows"]
    with pytest.raises(ValueError, match="`target_error` is for one problem at a time, but this is a batch"):
        bl.OuterOptimizer(*given, batch=2, target_error=0.1)


def test_optimality_maps_are_refused() -> None:
    fixed = bl.BilevelProblem.from_fixed_point(lambda x, u: 0.5 * x + u, lambda x, u: (x**2).sum(), torch.zeros(2))
    with pytest.raises(ValueError, match="`target_error` needs a certificate, and an optimality map"):
        bl.hypergradient(
            fixed, bl.FixedPoint(lambda x, u: 0.5 * x + u), bl.Implicit(bl.GMRES()), torch.ones(2), target_error=0.1
        )


# Schedules and the outer loop ---------------------------------------------------------------------------------------


def test_the_schedules_are_those_of_the_formulas() -> None:
    steps = torch.arange(1, 30, dtype=F64)
    for name, expected in (
        ("quadratic", 0.1 / steps**2),
        ("cubic", 0.1 / steps**3),
        ("exponential", 0.1 * 0.9 ** (steps - 1)),
    ):
        schedule = bl.ToleranceSchedule(name)
        found = torch.tensor([schedule.at(k) for k in range(1, 30)], dtype=F64)
        assert torch.allclose(found, expected.clamp_min(1e-6), rtol=1e-13)


def outer(case: Case, **options: Any) -> bl.OuterOptimizer:
    return bl.OuterOptimizer(
        case.problem,
        bl.GradientDescent(),
        bl.Implicit(),
        case.hparams,
        lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        **options,
    )


SEARCH = r"^`schedule` is deprecated: HyperNewton and HyperLBFGS .* choose their own accuracies, "


def test_every_outer_step_has_the_error_that_the_schedule_says() -> None:
    with pytest.warns(DeprecationWarning, match=SEARCH) as caught:
        run = outer(logistic_case(), schedule="cubic", target_error=1e-3)
    assert caught[0].filename == __file__
    history = run.run(6, progress=False).history
    for record in history:
        allowed = max(1e-3, 0.1 / record.step**3)
        assert record.error <= allowed / (1 + allowed) * record.hypergradient_norm
        assert record.error_kind == "bound"


def test_an_outer_run_with_a_target_ends_where_an_exact_one_does_for_less() -> None:
    case = logistic_case()
    loose, exact = outer(case, target_error=1e-2), outer(case)
    ends = [run.run(10, progress=False).hparams for run in (loose, exact)]
    moved = float((ends[1] - case.hparams).norm())
    assert float((ends[0] - ends[1]).norm()) < 2e-2 * moved
    assert loose.gradient_equivalents < exact.gradient_equivalents


def test_a_resumed_run_with_a_schedule_equals_an_undisturbed_one_bit_for_bit() -> None:
    case = softmax_case()
    with pytest.warns(DeprecationWarning, match=SEARCH):
        whole, first, second = (outer(case, schedule=bl.ToleranceSchedule()) for _ in range(3))
    expected = whole.run(6, progress=False)
    first.run(3, progress=False)
    second.load_state_dict(first.state_dict())
    found = second.run(3, progress=False)
    assert torch.equal(found.hparams, expected.hparams)
    assert [r.gradient_equivalents for r in found.history] == [r.gradient_equivalents for r in expected.history]


def test_a_step_without_certain_descent_is_not_taken_and_ends_the_run() -> None:
    case = logistic_case()
    run = bl.OuterOptimizer(
        case.problem,
        bl.GradientDescent(steps=1),
        bl.Implicit(),
        case.hparams,
        None,
        target_error=0.5,
        on_failure="return",
    )
    result = run.run(5, progress=False)
    (record,) = result.history
    assert record.error >= record.hypergradient_norm
    assert torch.equal(result.hparams, case.hparams)
    assert result.stopped.startswith("no certain descent: an error of up to ")


def test_a_missed_target_with_certain_descent_still_moves() -> None:
    assert no_descent("TARGET_NOT_REACHED", 0.9, 1.0) == ""
    assert no_descent("OK", None, 1.0) == ""
    assert no_descent("TARGET_NOT_REACHED", 1.0, 1.0) != ""
    assert "no figure" in no_descent("TARGET_NOT_REACHED", None, 1.0)
    case = logistic_case()
    run = bl.OuterOptimizer(
        case.problem,
        bl.GradientDescent(tol=3e-2),
        bl.Implicit(),
        case.hparams,
        None,
        target_error=1e-9,
        on_failure="return",
    )
    run.step()
    moved = not torch.equal(run.hparams, case.hparams)
    assert moved == (run.history[0].error < run.history[0].hypergradient_norm)


@pytest.mark.parametrize(
    ("schedule", "target", "message"),
    [
        (
            "linear",
            None,
            "`schedule` must be 'quadratic', 'cubic', 'exponential' or a ToleranceSchedule, got 'linear'.",
        ),
        (0.9, None, "`schedule` must be 'quadratic', 'cubic', 'exponential' or a ToleranceSchedule, got 0.9."),
        ("quadratic", 2.0, "`ToleranceSchedule.least` must be a number in (0, 1), got 2.0."),
        (bl.ToleranceSchedule(), 0.1, "give `target_error` or the `least` of the ToleranceSchedule, not both."),
    ],
)
def test_bad_schedules_are_refused(schedule: Any, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        outer(logistic_case(), schedule=schedule, target_error=target)


def test_a_schedule_without_an_optimizer_leaves_accuracies_to_the_search() -> None:
    case = logistic_case()
    with pytest.warns(DeprecationWarning, match=SEARCH):
        run = bl.OuterOptimizer(case.problem, bl.QuasiNewton(), bl.Implicit(), case.hparams, schedule="quadratic")
    assert run.choice.startswith("auto chose HyperNewton()")
    assert run.run(40, progress=False).stopped.startswith("converged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decrease": "fast"},
            "`ToleranceSchedule.decrease` must be 'quadratic', 'cubic' or 'exponential', got 'fast'.",
        ),
        ({"first": 1.0}, "`ToleranceSchedule.first` must be a number in (0, 1), got 1.0."),
        ({"rate": 0}, "`ToleranceSchedule.rate` must be a number in (0, 1), got 0."),
    ],
)
def test_bad_options_of_a_schedule_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bl.ToleranceSchedule(**options)


def test_the_bound_of_a_kept_instance_is_that_of_a_new_one() -> None:
    case = logistic_case()
    found = bl.hypergradient(case.problem, bl.GradientDescent(steps=50), bl.Implicit(), case.hparams)
    pair = (found.params, found.hypergradient, found.carry.adjoint)
    kept = ErrorBound(case.problem, case.hparams)
    kept(*pair)
    assert kept(*pair).value == bound_error(case.problem, case.hparams, *pair).value


def test_a_balanced_run_carries_its_own_estimate_and_none_where_its_status_is_not_ok() -> None:
    case = tree_case()
    estimator = bl.BalancedImplicit()
    solved = bl.hypergradient(case.problem, bl.GradientDescent(tol=1e-6), estimator, case.hparams, case.start)
    assert solved.certificate.error_kind == "estimate"
    distance = float((solved.hypergradient.reshape(-1) - case.hypergradient()).norm())
    assert 0.1 * distance <= solved.certificate.error
    cut = bl.GradientDescent(tol=1e-12, steps=3)
    doubted = bl.hypergradient(case.problem, cut, estimator, case.hparams, case.start, on_failure="return")
    assert doubted.status is bl.Status.INNER_NOT_CONVERGED
    assert (doubted.certificate.error, doubted.certificate.error_kind) == (None, "none")
