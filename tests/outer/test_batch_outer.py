"""The outer loops of a batch: each member goes its way as it would alone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_cases import case, close, row

import bilevel as bl

F64 = torch.float64
ADAM, MOMENTUM = (
    lambda tensors: torch.optim.Adam(tensors, lr=0.1),
    lambda tensors: torch.optim.SGD(tensors, lr=0.3, momentum=0.5, weight_decay=0.01),
)


def loops(single: Any, hparams: Any, solver: Any, estimator: Any, **options: Any) -> list[bl.OuterOptimizer]:
    return [bl.OuterOptimizer(p, solver, estimator, row(hparams, i), **options) for i, p in enumerate(single)]


def same(result: Any, alone: list[Any], rtol: float = 1e-10) -> None:
    assert len(result) == len(alone)
    for one, other in zip(result, alone, strict=True):
        close(one.hparams, other.hparams, rtol)
        close(one.best_hparams, other.best_hparams, rtol)
        assert one.best_loss == pytest.approx(other.best_loss, rel=1e-10)
        assert len(one.history) == len(other.history)
        for a, b in zip(one.history, other.history, strict=True):
            assert (a.step, a.status, a.inner_steps) == (b.step, b.status, b.inner_steps)
            assert a.adjoint_steps == b.adjoint_steps
            assert a.gradient_equivalents == b.gradient_equivalents
            assert a.outer_loss == pytest.approx(b.outer_loss, rel=1e-10)
            assert a.hypergradient_norm == pytest.approx(b.hypergradient_norm, rel=1e-7)


@pytest.mark.crossed
@pytest.mark.parametrize("optimizer", [ADAM, MOMENTUM], ids=["Adam", "SGD"])
@pytest.mark.parametrize("estimator", [bl.Implicit(), bl.TruncatedUnroll(tail=10)], ids=repr)
@pytest.mark.parametrize("kind", ["ridge-per_feature", "quadratic"])
def test_a_batch_of_outer_loops_equals_the_loops_of_its_members(kind: str, estimator: Any, optimizer: Any) -> None:
    single, batch, hparams = case(kind, shared=False)
    solver = bl.GradientDescent(tol=1e-7)
    together = bl.OuterOptimizer(batch, solver, estimator, hparams, optimizer).run(6, progress=False)
    alone = [o.run(6, progress=False) for o in loops(single, hparams, solver, estimator, optimizer=optimizer)]
    same(together, alone)
    assert together.best_loss.shape == (4,)


def test_general_problems_with_constraints_and_a_scheduler() -> None:
    single, batch, hparams = case("general", shared=False)
    hparams["penalty"] = hparams["penalty"].exp()
    options: dict[str, Any] = {
        "constraints": {"penalty": torch.distributions.constraints.positive},
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
    }
    solver, estimator = bl.GradientDescent(step_size=0.05, steps=20), bl.Implicit(bl.Direct())
    together = bl.OuterOptimizer(batch, solver, estimator, hparams, **options).run(4, progress=False)
    same(together, [o.run(4, progress=False) for o in loops(single, hparams, solver, estimator, **options)])


@pytest.mark.parametrize("rule", [{"tol": 3e-3}, {"patience": 2}, {"budget": 300.0}], ids=str)
def test_each_member_ends_by_itself_and_moves_no_more(rule: Any) -> None:
    single, batch, hparams = case("ridge", shared=False)
    solver, options = bl.GradientDescent(tol=1e-7), {"optimizer": lambda t: torch.optim.Adam(t, lr=0.2)}
    together = bl.OuterOptimizer(batch, solver, bl.Implicit(), hparams, **options).run(25, progress=False, **rule)
    alone = [o.run(25, progress=False, **rule) for o in loops(single, hparams, solver, bl.Implicit(), **options)]
    same(together, alone, 1e-9)
    assert list(together.stopped) == [one.stopped for one in alone]
    assert len({len(records) for records in together.history}) > 1


@pytest.mark.parametrize("optimizer", [ADAM, MOMENTUM], ids=["Adam", "SGD"])
def test_a_member_that_fails_ends_and_the_others_go_on(optimizer: Any) -> None:
    single, batch, hparams = case("ridge", shared=True)
    hparams[2] = 5.0
    solver = bl.GradientDescent(step_size=0.3, steps=200)
    options = {"optimizer": optimizer, "on_failure": "return"}
    outer = bl.OuterOptimizer(batch, solver, bl.Implicit(), hparams, **options)
    together = outer.run(5, progress=False)
    alone = [o.run(5, progress=False) for o in loops(single, hparams, solver, bl.Implicit(), **options)]
    same(together[:2] + together[3:], alone[:2] + alone[3:])
    assert together.hparams[2] == 5.0
    assert together.best_loss[2] == float("inf")
    assert [record.status for record in together.history[2]] == ["DIVERGED"]
    assert together.stopped[2].startswith("a hypergradient failed: the inner solver diverges")


def test_a_failed_member_stops_a_run_that_raises_before_anything_moves() -> None:
    _, batch, hparams = case("ridge", shared=True)
    hparams[2] = 5.0
    outer = bl.OuterOptimizer(batch, bl.GradientDescent(step_size=0.3, steps=200), bl.Implicit(), hparams, None)
    with pytest.raises(bl.HypergradientError, match="1 of 4 members failed: member 2"):
        outer.run(2, progress=False)
    assert torch.equal(outer.hparams, hparams)


@pytest.mark.parametrize(
    "solver", [bl.GradientDescent(tol=1e-7), bl.Adam(step_size=0.05, tol=1e-2, steps=500)], ids=repr
)
def test_a_batch_resumes_bit_for_bit(solver: Any, tmp_path: Path) -> None:
    _, batch, hparams = case("logistic", shared=False)

    def start() -> bl.OuterOptimizer:
        return bl.OuterOptimizer(batch, solver, bl.Implicit(), hparams)

    whole = start()
    result = whole.run(8, tol=2e-2, progress=False)
    first = start()
    first.run(3, tol=2e-2, progress=False)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = start()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed = second.run(5, tol=2e-2, progress=False)
    assert torch.equal(resumed.hparams, result.hparams)
    assert torch.equal(resumed.best_loss, result.best_loss)
    losses = [[record.outer_loss for record in records] for records in result.history]
    assert losses == [[record.outer_loss for record in records] for records in resumed.history]
    assert whole.gradient_equivalents == second.gradient_equivalents


def test_callbacks_and_the_progress_line(capsys: Any) -> None:
    _, batch, hparams = case("ridge", shared=True)
    seen = []

    def stop(outer: Any, estimate: Any) -> bool:
        seen.append(len(estimate))
        return len(seen) == 2

    outer = bl.OuterOptimizer(batch, bl.GradientDescent(), bl.Implicit(), hparams, None, callbacks=[stop])
    result = outer.run(5)
    assert seen == [4, 4]
    assert set(result.stopped) == {"a callback asked to stop"}
    assert re.search(r"loss .* on average, .* at worst, .* 4 of 4 going", capsys.readouterr().err)


def test_starts_of_one_problem_by_the_batch_option() -> None:
    single, _, hparams = case("quadratic", shared=True)
    # Without a tolerance, a search of one problem chooses its own, and one of rows does not.
    solver = bl.GradientDescent(tol=1e-10)
    outer = bl.OuterOptimizer(single[0], solver, bl.Implicit(), hparams, batch=4)
    assert isinstance(outer, bl.BatchOuterOptimizer)
    same(outer.run(3, progress=False), [
        o.run(3, progress=False) for o in loops(single, hparams, solver, bl.Implicit())
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "`batch` must be a positive int or None, got 0."),
        ({"hparams": torch.zeros(3, dtype=F64)}, "`hparams` must have the leading dimension 4"),
        ({"optimizer": torch.optim.Adafactor}, "`Adafactor` takes norms over all members of a batch"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau follows one loss"),
    ],
    ids=["size", "rows", "optimizer", "scheduler"],
)
def test_what_a_batch_of_outer_loops_cannot_do_is_refused(options: dict[str, Any], words: str) -> None:
    single, _, hparams = case("ridge", shared=True)
    given = {"hparams": hparams, "batch": 4} | options
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        bl.OuterOptimizer(single[0], bl.GradientDescent(), bl.Implicit(), **given)


@pytest.mark.parametrize("steps", [-1, 2.5, True])
def test_a_number_of_steps_that_is_none_is_refused(steps: Any) -> None:
    single, _, hparams = case("ridge", shared=True)
    outer = bl.OuterOptimizer(single[0], bl.GradientDescent(), bl.Implicit(), hparams, batch=4)
    with pytest.raises(ValueError, match=f"^`steps` must be an int that is not negative, got {steps!r}"):
        outer.run(steps, progress=False)


def test_a_member_that_stands_still_keeps_its_moments() -> None:
    _, batch, hparams = case("ridge", shared=True)
    outer = bl.OuterOptimizer(batch, bl.GradientDescent(steps=20), bl.Implicit(), hparams, optimizer=ADAM)
    outer.step()
    outer.hold(1)

    def moments() -> list[torch.Tensor]:
        (state,) = outer.optimizer.state_dict()["state"].values()
        return [outer.hparams, state["exp_avg"].clone(), state["exp_avg_sq"].clone()]

    before = moments()
    outer.step()
    for old, new in zip(before, moments(), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])


def test_rows_of_which_none_moves_leave_no_trace_in_what_follows() -> None:
    _, batch, hparams = case("ridge", shared=True)
    options: dict[str, Any] = {"on_failure": "return", "warm_start": False}
    spoiled, plain = (
        bl.OuterOptimizer(batch, bl.GradientDescent(steps=20), bl.Implicit(), hparams, ADAM, **options)
        for _ in range(2)
    )
    (group,) = spoiled.optimizer.param_groups
    usual, group["lr"] = group["lr"], math.nan
    assert [verdict.status for verdict in spoiled.step().verdicts] == [bl.Status.NOT_FINITE] * 4
    (group,) = spoiled.optimizer.param_groups
    group["lr"] = usual
    for outer in (spoiled, plain):
        outer.step()
    assert torch.equal(spoiled.hparams, plain.hparams)


def test_rows_of_a_problem_that_changes_keep_the_last_as_the_best() -> None:
    problem = bl.meta.SineProblem(shots=2, queries=2, hidden=[2], batch_size=1)
    start = problem.initial_hparams()
    hparams = bl.tree.tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), start)
    solver = bl.GradientDescent(step_size=0.01, steps=1)
    result = bl.OuterOptimizer(problem, solver, bl.FullUnroll(), hparams, batch=2, rows="loop").run(2, progress=False)
    losses = torch.tensor([[record.outer_loss for record in records] for records in result.history])
    assert torch.equal(result.best_loss, losses[:, -1])
    assert bool((losses[:, -1] > losses.min(dim=1).values).all())
