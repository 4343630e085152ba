"""Accuracies that searches choose: what they cost, that their values are right, and that a saved run goes on."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import bilevel as bl
from bilevel.base import Carry
from bilevel.outer.accuracy import Accuracy, chooses_accuracy
from bilevel.outer.coordinates import Coordinates
from bilevel.outer.search import SearchState

RULES = [bl.HyperNewton(), bl.HyperLBFGS()]


def problem_of(seed: int, rows: int = 60, features: int = 6, mixed: float = 0.4) -> bl.problems.RidgeProblem:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(features) * (rng.random(features) < 0.6)
    mixing = np.eye(features) + mixed * rng.standard_normal((features, features))

    def data() -> list[Any]:
        X = rng.standard_normal((rows, features)) @ mixing
        return [torch.from_numpy(X), torch.from_numpy(X @ w + 2 * rng.standard_normal(rows))]

    return bl.problems.RidgeProblem(*data(), *data(), "per_feature")


def outer_of(
    problem: Any, rule: Any, tol: float | None = None, solver: Any = None, **options: Any
) -> bl.OuterOptimizer:
    solver = solver or bl.PreconditionedGradientDescent(tol=tol)
    u = torch.linspace(-5, 3, 6, dtype=torch.float64)
    return bl.OuterOptimizer(problem, solver, bl.Implicit(bl.CG(tol=tol)), u, rule, on_failure="return", **options)


def exact(problem: Any, u: Any) -> float:
    """The outer loss of ridge regression by its normal equations."""
    X, y, X_val, y_val = (
        each.numpy() for each in (problem.train.X.t(), problem.train.y, problem.val.X.t(), problem.val.y)
    )
    w = np.linalg.solve(X.T @ X / len(y) + np.diag(np.exp(u.numpy())), X.T @ y / len(y))
    return float(0.5 * np.mean((X_val @ w - y_val) ** 2))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_that_chooses_accuracies_ends_where_exact_values_end_for_half_the_price(rule: Any, seed: int) -> None:
    problem = problem_of(seed)
    own, fixed = outer_of(problem, rule), outer_of(problem, rule, 1e-9)
    ends = [outer.run(80, progress=False) for outer in (own, fixed)]
    assert all(end.stopped.startswith("converged") for end in ends)
    losses = [exact(problem, end.hparams) for end in ends]
    assert losses[0] == pytest.approx(losses[1], rel=3e-6)
    assert own.gradient_equivalents <= 0.5 * fixed.gradient_equivalents
    # Values of the scan are rough, and the accepted one is known at the end.
    assert max(record.inner_residual for record in own.history) > 1e-3
    answer = own.search.each[0].state.accepted.answer
    assert abs(answer.value - losses[0]) <= 1e-6 * losses[0]
    assert abs(answer.value - losses[0]) <= 3 * answer.error + 1e-12


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_accepted_values_are_known_to_a_share_of_the_decrease_that_was_sought(rule: Any) -> None:
    problem, looks = problem_of(2), []

    def told(outer: Any, estimate: Any) -> None:
        record, accepted = outer.history[-1], outer.search.each[0].state.accepted
        if record.accepted and record.phase != "scan":
            looks.append(abs(accepted.answer.value - exact(problem, outer.hparams)) / record.predicted)

    outer_of(problem, rule, callbacks=[told]).run(80, progress=False)
    assert len(looks) > 3
    assert max(looks) <= 0.3


def test_a_run_that_is_saved_after_any_evaluation_goes_on_bit_for_bit_in_the_middle_of_a_point() -> None:
    problem = problem_of(2)
    for rule in RULES:
        whole, state = outer_of(problem, rule), None
        whole.run(80, progress=False)
        assert any(record.phase == "again" for record in whole.history)
        part, pending = outer_of(problem, rule), 0
        for _ in whole.history:
            part = outer_of(problem, rule)
            if state is not None:
                part.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
            part.step()
            pending += part.search.each[0].accuracy.pending is not None
            buffer = io.BytesIO()
            torch.save(part.state_dict(), buffer)
            state = buffer.getvalue()
        assert [record.outer_loss for record in part.history] == [record.outer_loss for record in whole.history]
        assert torch.equal(part.hparams, whole.hparams)
        assert pending


def test_a_point_of_the_scan_costs_at_most_what_ends_it() -> None:
    problem = problem_of(4, rows=8, mixed=3.0)
    outer = outer_of(problem, bl.HyperNewton(), solver=bl.GradientDescent())
    while outer.search.each[0].state.shift is not None:
        outer.step()
    costs = [record.gradient_equivalents for record in outer.history]
    assert all(cost <= 4 * sum(costs[:index]) + 100 for index, cost in enumerate(costs) if index > 2)


def test_two_looks_at_a_point_show_what_is_left_of_second_order() -> None:
    accuracy = Accuracy(bl.HyperNewton())
    zero = np.zeros(1)
    state = SearchState(Coordinates(zero, zero - 1, zero + 1), zero, shift=3.0)

    def look(value: float, first: float, residual: float) -> Any:
        evidence = SimpleNamespace(value_error=first, inner_residual=residual, inner_steps=1)
        cost = SimpleNamespace(gradient_equivalents=1.0)
        return SimpleNamespace(
            status=bl.Status.OK, outer_loss=value + first, cost=cost, certificate=evidence, carry=Carry()
        )

    assert accuracy.goes_on(state, look(1.0, 0.1, 0.2))
    assert not accuracy.goes_on(state, look(0.99, 0.001, 0.1))
    assert accuracy.bend == pytest.approx(0.01 / (0.2**2 - 0.1**2))
    accuracy.told(True)
    # To first order alone, 0.001 would do.
    assert accuracy.goes_on(state, look(0.98, 0.001, 0.4))


class Short(bl.PreconditionedGradientDescent):
    """Ends before it reaches small residuals."""

    default_max_steps = 40


def test_an_inner_solver_that_reaches_no_tolerance_never_converges() -> None:
    outer = outer_of(problem_of(5, rows=8, mixed=3.0), bl.HyperNewton(), solver=Short())
    stopped = outer.run(60, progress=False).stopped
    assert "not converged" in stopped or "accuracy of the inner solver" in stopped or "failed" in stopped


def test_accuracies_are_chosen_where_nobody_gave_one_and_digits_are_not_free() -> None:
    problem, descent, implicit = problem_of(0), bl.PreconditionedGradientDescent(), bl.Implicit()
    assert chooses_accuracy(problem, descent, implicit)
    assert chooses_accuracy(problem, bl.Nesterov(), implicit)
    for solver, estimator in (
        (bl.QuasiNewton(), implicit),
        (bl.Newton(), implicit),
        (bl.GradientDescent(tol=1e-6), implicit),
        (bl.GradientDescent(steps=100), implicit),
        (descent, bl.Implicit(bl.CG(tol=1e-6))),
        (descent, bl.ClosedForm()),
    ):
        assert not chooses_accuracy(problem, solver, estimator)
    assert not chooses_accuracy(problem.batched(2), descent, implicit)
