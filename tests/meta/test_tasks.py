"""How many tasks are solved at once, and that it changes nothing but time and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bilevel as bl
from bilevel.core import tree
from bilevel.core.status import HypergradientError
from bilevel.hypergrad import tasks
from bilevel.meta import MetaProblem, SineTasks
from bilevel.oracles import tracing
from bilevel.oracles.graph import NotRecordedError
from bilevel.oracles.separate import Separate, in_words

TASKS = SineTasks(shots=5, queries=7)
CPU = torch.device("cpu")
STEP = bl.GradientDescent(0.03, steps=3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()


class LearnedPrice(MetaProblem):
    def support_loss(self, offset: Any, hparams: Any, support: Any) -> Any:
        return super().support_loss(offset, hparams, support) + hparams["price"] * offset["1.weight"].square().sum()


class Largest(MetaProblem):
    """What tasks give is mixed."""

    def outer_loss(self, params: Any, hparams: Any) -> Any:
        return self._losses(self.query_loss, params, hparams, self.query).max()


def problem_of(kind: type[MetaProblem] = MetaProblem, tasks: Any = TASKS, **options: Any) -> MetaProblem:
    return kind(network(), nn.functional.mse_loss, tasks, 5, **options)


def hparams_of(problem: MetaProblem, solver: Any = None) -> Any:
    priced = isinstance(problem, LearnedPrice) or isinstance(solver, bl.SGD)
    return problem.initial_hparams(**({"price": torch.tensor(0.3, dtype=torch.float64)} if priced else {}))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Solve so many tasks at once, whatever they hold; None: all, as any other problem; record steps if `recorded`."""

    def set_to(number: int | None, recorded: bool = False) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(tasks, "WORTH", 0 if recorded else 10**9)
        if number is None:
            monkeypatch.setattr(MetaProblem, "separate", lambda self: None)
        else:
            monkeypatch.setattr(Separate, "at_once", lambda self, steps, device: min(number, self.count))

    return set_to


def close(one: Any, other: Any, tol: float = 1e-12) -> None:
    for ours, theirs in zip(tree.leaves(one), tree.leaves(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


@pytest.mark.parametrize(
    ("nbytes", "expected"), [(10_000, 64), (55_000, 54), (226_000, 13), (750_000, 4), (760_000, 1), (1_250_000, 1)]
)
def test_a_few_megabytes_of_a_step_are_solved_at_once_on_a_cpu(nbytes: int, expected: int) -> None:
    each = Separate(64, lambda low, high: None, nbytes)
    assert each.at_once(5, CPU) == each.at_once(500, CPU) == expected
    assert Separate(64, lambda low, high: None, nbytes, alike=False).at_once(5, CPU) == 1
    assert Separate(2, lambda low, high: None, nbytes).at_once(5, CPU) == min(2, expected)


def test_a_quarter_of_the_free_memory_is_used_on_a_gpu_and_never_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400_000_000, 0))
    cuda = torch.device("cuda", 0)
    assert Separate(64, lambda low, high: None, 1_250_000).at_once(5, cuda) == 16
    assert Separate(64, lambda low, high: None, 1_250_000).at_once(1, cuda) == 64


def test_what_a_step_of_a_task_holds_is_its_params_and_what_autograd_keeps() -> None:
    found = problem_of().separate()
    assert found is not None
    assert found.count == 5
    assert found.nbytes == 8 * (13 + 5 * 4 + 5)  # weights, what tanh gives, and the outputs
    assert problem_of(adapt=["3.*"]).separate().nbytes == 8 * (5 + 5 * 4 + 5)


@pytest.mark.crossed
@pytest.mark.parametrize(("number", "recorded"), [(1, False), (2, False), (2, True), (5, True)])
@pytest.mark.parametrize(
    ("solver", "estimator", "options"),
    [
        (STEP, bl.FullUnroll(), {}),
        (STEP, bl.FullUnroll(), {"proximity": 0.4, "adapt": ["3.*"]}),
        (STEP, bl.FullUnroll(memory="checkpoint"), {}),
        (STEP, bl.FullUnroll(memory="graph"), {"proximity": 0.4}),
        (STEP, bl.FullUnroll(), {"kind": LearnedPrice}),
        (bl.Nesterov(0.03, 0.5, steps=3), bl.FullUnroll(), {"proximity": 0.4}),
        (bl.HeavyBall(0.03, 0.5, steps=3), bl.TruncatedUnroll(tail=2), {}),
        (bl.SGD(lambda hparams: 0.1 * hparams["price"], steps=2), bl.FullUnroll(), {}),
        (bl.Adam(0.01, steps=2), bl.OneStep(), {}),
        (STEP, bl.FirstOrder(), {}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "-".join(value),
)
def test_how_many_are_solved_at_once_changes_nothing(
    at_once: Any, solver: Any, estimator: Any, options: Any, number: int, recorded: bool
) -> None:
    problem = problem_of(**options)
    hparams = hparams_of(problem, solver)
    at_once(None)
    whole = bl.hypergradient(problem, solver, estimator, hparams)
    at_once(number, recorded)
    given = tree.copied(hparams)
    ours = bl.hypergradient(problem, solver, estimator, given, check=False)
    for leaf in tree.leaves(given):
        leaf.zero_()  # as an outer step would move it: what is made when it is read is that of before
    asked = getattr(estimator, "memory", "iterates") != "iterates"  # which holds what it says
    assert ours.certificate.form == ("recorded" if recorded and not asked else "step by step")
    assert ours.outer_loss == pytest.approx(whole.outer_loss, rel=1e-13)
    close(ours.hypergradient, whole.hypergradient)
    close(ours.params, whole.params)
    close(ours.carry.state.params, ours.params)
    close(ours.carry.state.memory, whole.carry.state.memory)
    assert ours.certificate.inner_residual == pytest.approx(whole.certificate.inner_residual, rel=1e-12)
    assert ours.certificate.measured["tasks"] == in_words(5, number)
    assert (ours.certificate.inner_steps, ours.certificate.adjoint_steps) == (
        whole.certificate.inner_steps,
        whole.certificate.adjoint_steps,
    )
    assert ours.cost.counts.get("vjp") == whole.cost.counts.get("vjp")


@pytest.mark.parametrize("number", [1, 2])
def test_each_task_goes_on_from_its_own_warm_start(at_once: Any, number: int) -> None:
    problem, solver = problem_of(), bl.HeavyBall(0.03, 0.5, steps=2)
    hparams = hparams_of(problem)
    found = []
    for each in (None, number):
        at_once(each)
        first = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams)
        second = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams, carry=first.carry)
        third = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams, first.params)
        found.append([first.params, second.hypergradient, second.params, third.hypergradient])
    close(found[1], found[0])
    assert not torch.allclose(found[0][0]["1.weight"], found[0][2]["1.weight"])


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_task_that_fails_is_named_with_its_step(at_once: Any, number: int) -> None:
    def drawn(index: int) -> Any:
        (X, y), query = TASKS(index)
        return (X, y * (1e200 if index == 3 else 1.0)), query

    problem = problem_of(tasks=drawn)
    at_once(number)
    with pytest.raises(HypergradientError, match=r"task 3: GradientDescent.* is not finite at step \d"):
        bl.hypergradient(problem, STEP, bl.FullUnroll(), hparams_of(problem), check=False)


def test_what_mixes_tasks_is_solved_all_at_once() -> None:
    assert problem_of(Largest).separate() is None
    assert problem_of(LearnedPrice).separate() is not None
    problem, hparams = problem_of(), hparams_of(problem_of())
    for solver, estimator in (
        (bl.GradientDescent(0.03, tol=1e-1), bl.FullUnroll()),  # the tolerance is that of all
        (bl.GradientDescent(steps=3), bl.FullUnroll()),  # and so is the step size
        (STEP, bl.AdaptiveUnroll()),
    ):
        estimate = bl.hypergradient(problem, solver, estimator, hparams, on_failure="return")
        assert "tasks" not in estimate.certificate.measured


def test_an_outer_loop_takes_the_same_steps_however_many_are_solved_at_once(at_once: Any) -> None:
    runs = []
    for number in (None, 1, 2):
        at_once(number)
        problem = problem_of()
        outer = bl.OuterOptimizer(problem, STEP, bl.FullUnroll(), problem.initial_hparams())
        runs.append(outer.run(3, progress=False))
    for run in runs[1:]:
        close(run.hparams, runs[0].hparams, 1e-10)
        assert [each.outer_loss for each in run.history] == pytest.approx(
            [each.outer_loss for each in runs[0].history], rel=1e-10
        )


def test_recorded_steps_whose_products_make_again_what_they_need_are_the_same(
    at_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(proximity=0.4)
    hparams = hparams_of(problem)
    found = []
    for room in (tracing.HELD, 0):
        at_once(5, recorded=True)
        monkeypatch.setattr(tracing, "HELD", room)
        found.append(bl.hypergradient(problem, bl.Nesterov(0.03, 0.5, steps=3), bl.FullUnroll(), hparams))
    assert [each.certificate.form for each in found] == ["recorded", "recorded"]
    close(found[1].hypergradient, found[0].hypergradient)


def test_a_recording_that_no_longer_holds_is_not_used(at_once: Any) -> None:
    problem = problem_of()
    hparams = hparams_of(problem)
    at_once(5, recorded=True)
    bl.hypergradient(problem, STEP, bl.FullUnroll(), hparams)
    problem.proximity = 0.7
    stale, anew = (bl.hypergradient(problem, STEP, bl.FullUnroll(), hparams) for _ in range(2))
    at_once(None)
    whole = bl.hypergradient(problem, STEP, bl.FullUnroll(), hparams)
    assert anew.certificate.form == "recorded"
    for each in (stale, anew):
        close(each.hypergradient, whole.hypergradient)


def test_a_loss_that_is_not_recorded_says_why(at_once: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise NotRecordedError("it is a test")

    problem = problem_of()
    at_once(5, recorded=True)
    monkeypatch.setattr(tracing, "Halves", refuse)
    found = bl.hypergradient(problem, STEP, bl.FullUnroll(), hparams_of(problem))
    assert found.certificate.form == "step by step, as the loss is not recorded: it is a test"
