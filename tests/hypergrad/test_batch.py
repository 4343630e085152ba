"""A batch gives what a loop over its members gives, member by member, and a broken member breaks no other."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from batch_cases import F64, SIZE, case, close, general, inner_of_data, outer_of_data, regression, row
from helpers import normal, spd

import bilevel as bl
from bilevel.engine.rows_loop import RowStates
from bilevel.problems import RidgeProblem


def agree(batch: bl.BatchEstimate, single: list[bl.Estimate], rtol: float = 1e-12) -> None:
    assert len(batch) == len(single)
    for one, alone in zip(batch, single, strict=True):
        assert one.verdict.status == alone.verdict.status
        assert one.certificate.inner_steps == alone.certificate.inner_steps
        assert one.certificate.adjoint_steps == alone.certificate.adjoint_steps
        assert one.cost.counts == alone.cost.counts
        close(one.params, alone.params, rtol)
        close(one.hypergradient, alone.hypergradient, rtol)
        assert one.outer_loss == pytest.approx(alone.outer_loss, rel=1e-12)
        assert one.certificate.inner_residual == pytest.approx(alone.certificate.inner_residual, rel=1e-6, abs=1e-14)
        assert one.certificate.measured == pytest.approx(alone.certificate.measured, rel=1e-12)


KINDS = ["ridge", "ridge-per_feature", "wide", "logistic", "logistic-per_feature", "quadratic", "general"]
KINDS += ["softmax", "softmax-per_class", "softmax-per_feature", "softmax-per_weight"]
ESTIMATORS = [
    bl.FullUnroll(),
    bl.FullUnroll(mode="forward"),
    bl.TruncatedUnroll(tail=5),
    bl.TruncatedUnroll(tail=0.3),
    bl.OneStep(),
    bl.Implicit(bl.CG()),
    bl.Implicit(bl.Direct()),
    bl.Implicit(bl.CG(check_every=4), damping=0.1),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_batch_equals_a_loop_over_its_members(kind: str, estimator: Any) -> None:
    # Shared and stacked data in turn: every problem and every estimator has both.
    single, batch, hparams = case(kind, shared=(KINDS.index(kind) + ESTIMATORS.index(estimator)) % 2 == 0)
    for solver in (bl.GradientDescent(step_size=0.05, steps=8), bl.GradientDescent(tol=1e-2, steps=400)):
        together = bl.hypergradient(batch, solver, estimator, hparams, batch=SIZE)
        alone = [bl.hypergradient(p, solver, estimator, row(hparams, i)) for i, p in enumerate(single)]
        agree(together, alone)


SOLVERS = [
    bl.GradientDescent(steps=25),
    bl.HeavyBall(step_size=0.04, momentum=0.5, steps=25),
    bl.HeavyBall(momentum="auto", first_step="half", tol=1e-4),
    bl.Nesterov(momentum="auto", tol=1e-4),
    bl.Chebyshev(tol=1e-4),
    bl.Chebyshev(steps=70),
    bl.Sobolev(steps=20),
    bl.AsymptoticSobolev(tol=1e-3, first_step="half"),
    bl.Adam(step_size=0.05, steps=25),
    bl.Adam(step_size=0.05, tol=3e-2, steps=300),
]


@pytest.mark.crossed
@pytest.mark.parametrize("estimator", [*ESTIMATORS[:3], bl.OneStep(), bl.Implicit()], ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_memberwise_solver_runs_batches_with_steps_and_intervals_of_each_member(
    solver: Any, estimator: Any
) -> None:
    single, batch, hparams = case("ridge", shared=False)
    together = bl.hypergradient(batch, solver, estimator, hparams, on_failure="return")
    alone = [bl.hypergradient(p, solver, estimator, row(hparams, i), on_failure="return") for i, p in enumerate(single)]
    agree(together, alone)


def test_members_stop_at_their_own_steps_and_counts_are_those_of_a_loop() -> None:
    single, batch, hparams = case("ridge", shared=False)
    for estimator in (bl.TruncatedUnroll(tail=7), bl.Implicit(), bl.Implicit(bl.Direct())):
        together = bl.hypergradient(batch, bl.GradientDescent(tol=1e-6), estimator, hparams)
        alone = [bl.hypergradient(p, bl.GradientDescent(tol=1e-6), estimator, hparams[i]) for i, p in enumerate(single)]
        assert len({one.certificate.inner_steps for one in alone}) == SIZE
        agree(together, alone)
        for one, other in zip(together, alone, strict=True):
            assert one.cost.counts == other.cost.counts
        total = sum(one.cost.gradient_equivalents for one in alone)
        assert together.cost.gradient_equivalents == pytest.approx(total)


@pytest.mark.parametrize(
    "solver", [bl.GradientDescent(tol=1e-5), bl.Adam(step_size=0.05, tol=3e-2, steps=400)], ids=repr
)
def test_warm_starts_of_a_batch_are_those_of_its_members(solver: Any) -> None:
    single, batch, hparams = case("logistic", shared=False)
    together = bl.hypergradient(batch, solver, bl.Implicit(), hparams)
    alone = [bl.hypergradient(p, solver, bl.Implicit(), hparams[i]) for i, p in enumerate(single)]
    for step in range(3):
        moved = hparams + 0.1 * (step + 1)
        together = bl.hypergradient(batch, solver, bl.Implicit(), moved, carry=together.carry)
        alone = [
            bl.hypergradient(p, solver, bl.Implicit(), moved[i], carry=alone[i].carry) for i, p in enumerate(single)
        ]
        agree(together, alone, 1e-11)
    assert torch.equal(together[1].carry.state.params, together.carry.state.params[1])


def test_one_start_serves_all_members_and_a_stack_of_starts_one_each() -> None:
    single, batch, hparams = case("quadratic", shared=True)
    solver, estimator = bl.GradientDescent(step_size=0.1, steps=4), bl.FullUnroll()
    starts = normal(40, SIZE, 5)
    for start in (starts[0], starts):
        together = bl.hypergradient(batch, solver, estimator, hparams, start)
        alone = [
            bl.hypergradient(p, solver, estimator, hparams[i], start if start.dim() == 1 else start[i])
            for i, p in enumerate(single)
        ]
        agree(together, alone)


def test_a_problem_without_a_start_takes_either_kind() -> None:
    problem = bl.BilevelProblem(lambda x, u: (x - u).square().sum(), lambda x, u: x.square().sum())
    hparams = normal(1, 3, 2)
    for start in (torch.zeros(2, dtype=F64), torch.zeros(3, 2, dtype=F64)):
        estimates = bl.hypergradient(problem, bl.GradientDescent(), bl.Implicit(), hparams, start, batch=3)
        torch.testing.assert_close(estimates.hypergradient, 2 * hparams)


def test_a_batch_of_one_is_one_problem() -> None:
    single, _, hparams = case("ridge", shared=True)
    estimates = bl.hypergradient(single[0], bl.GradientDescent(), bl.Implicit(), hparams[:1], batch=1)
    agree(estimates, [bl.hypergradient(single[0], bl.GradientDescent(), bl.Implicit(), hparams[0])])


def test_the_exact_hypergradients_of_a_ridge_batch() -> None:
    _, batch, hparams = case("ridge-per_feature", shared=False)
    estimates = bl.hypergradient(batch, bl.GradientDescent(), bl.Implicit(bl.Direct()), hparams, certify=True)
    for i, one in enumerate(estimates):
        exact = batch.member(i).exact_hypergradient(hparams[i])
        torch.testing.assert_close(one.hypergradient, exact, rtol=1e-8, atol=1e-10)
        assert one.certificate.error_kind == "bound"
        assert one.certificate.error < 1e-8


def test_oracles_of_a_batch_are_block_diagonal() -> None:
    single, batch, hparams = case("general", shared=False)
    params, v = batch.start(), batch.start()
    point = batch.bind(hparams).linearize(params)
    by_params, by_hparams = point.vjp(v)
    dense = point.dense_hessian()
    for i, problem in enumerate(single):
        alone = problem.bind(row(hparams, i)).linearize(row(params, i))
        x, u = alone.vjp(row(v, i))
        close(row(by_params, i), x)
        close(row(by_hparams, i), u)
        close(dense[i], alone.dense_hessian())


def test_a_fixed_point_map_runs_in_a_batch() -> None:
    A = spd(3, 3) / 20

    def update(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(A @ x + u)

    problem = bl.BilevelProblem.from_fixed_point(update, lambda x, u: x.square().sum(), torch.zeros(3, dtype=F64))
    solver, hparams = bl.GradientDescent(step_size=1.0, tol=1e-10), normal(2, SIZE, 3)
    together = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams, batch=SIZE)
    agree(together, [bl.hypergradient(problem, solver, bl.FullUnroll(), u) for u in hparams])


def test_a_batch_estimate_is_a_sequence() -> None:
    _, batch, hparams = case("ridge", shared=True)
    estimates = bl.hypergradient(batch, bl.GradientDescent(), bl.Implicit(), hparams)
    assert torch.equal(estimates[-1].hypergradient, estimates.hypergradient[3])
    assert [one.outer_loss for one in estimates[1:3]] == [float(loss) for loss in estimates.outer_loss[1:3]]
    assert str(estimates).startswith("4 members, 4 usable, outer loss ")
    assert sum(one.cost.seconds for one in estimates) == pytest.approx(estimates.cost.seconds)
    with pytest.raises(IndexError):
        estimates[4]


def test_single_precision_stays_single() -> None:
    batch = regression(1).batched(3)
    single = RidgeProblem(*(each.float() for each in (normal(1, 14, 3), normal(2, 14), normal(3, 9, 3), normal(4, 9))))
    hparams = torch.linspace(-1.0, 0.0, 3)
    for solver in (bl.HeavyBall(momentum="auto"), bl.Adam(step_size=0.05, tol=1e-2, steps=300)):
        estimates = bl.hypergradient(single, solver, bl.Implicit(), hparams, batch=3)
        again = bl.hypergradient(single, solver, bl.Implicit(), hparams, batch=3, carry=estimates.carry)
        assert again.params.dtype == again.hypergradient.dtype == torch.float32
    assert batch.exact_hypergradient(hparams.double()).shape == (3,)


def test_a_module_runs_in_a_batch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    X, y = normal(1, 12, 3), normal(2, 12, 1)

    def inner(net: Any, params: Any, decay: torch.Tensor) -> torch.Tensor:
        return (net(X) - y).square().mean() + decay.exp() * sum(p.square().sum() for p in params.values())

    problem = bl.ModuleProblem(model, inner, lambda net, params, decay: (net(X[:5]) - y[:5]).square().mean())
    hparams, solver = torch.tensor([-3.0, -2.0], dtype=F64), bl.GradientDescent(step_size=0.1, steps=10)
    together = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams, batch=2)
    agree(together, [bl.hypergradient(problem, solver, bl.FullUnroll(), u) for u in hparams])


def test_states_before_every_tail_are_dropped() -> None:
    kept = RowStates(3)
    states = [bl.InnerState(normal(t, 2)) for t in range(12)]
    for t, state in enumerate(states):
        # The first member to converge did so after 8 steps.
        kept.visit(state, None, min(8, t + 1))
    assert kept.between(5, 12) == states[5:]
    assert len(kept._states) == 7


# Failures stay where they are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(
    "solver", [bl.GradientDescent(step_size=0.3, steps=200), bl.GradientDescent(step_size=0.3, tol=1e-6)], ids=repr
)
def test_a_member_that_diverges_spoils_no_other(estimator: Any, solver: Any) -> None:
    single, batch, hparams = case("ridge", shared=True)
    hparams[2] = 5.0
    together = bl.hypergradient(batch, solver, estimator, hparams, on_failure="return")
    alone = [bl.hypergradient(p, solver, estimator, hparams[i], on_failure="return") for i, p in enumerate(single)]
    assert [one.status.usable for one in alone] == [True, True, False, True]
    assert together.verdicts[2] == alone[2].verdict
    assert torch.isnan(together.hypergradient[2])
    assert torch.isnan(together.outer_loss[2])
    agree(together[:2] + together[3:], alone[:2] + alone[3:])


@pytest.mark.parametrize(
    "solver", [bl.GradientDescent(), bl.GradientDescent(step_size=0.02, steps=50), bl.Chebyshev(steps=20)], ids=repr
)
def test_nan_in_one_members_data_spoils_no_other(solver: Any) -> None:
    single, _, hparams = case("general", shared=False)
    A, y = single[1].data
    single[1] = bl.BilevelProblem(inner_of_data, outer_of_data, single[1].params, data=(A * float("nan"), y))
    batch = bl.stack(single)
    for estimator in (bl.FullUnroll(), bl.Implicit(), bl.Implicit(bl.Direct())):
        together = bl.hypergradient(batch, solver, estimator, hparams, on_failure="return")
        assert [verdict.status.usable for verdict in together.verdicts] == [True, False, True, True]
        for i in (0, 2, 3):
            agree(together[i : i + 1], [bl.hypergradient(single[i], solver, estimator, row(hparams, i))])


def test_failures_are_named_after_all_members_are_done() -> None:
    _, batch, hparams = case("ridge", shared=True)
    hparams[1:3] = 5.0
    solver = bl.GradientDescent(step_size=0.3, steps=300)
    words = r"^2 of 4 members failed: member 1: GradientDescent diverges: .*; member 2: GradientDescent diverges: .*"
    with pytest.raises(bl.HypergradientError, match=words) as caught:
        bl.hypergradient(batch, solver, bl.FullUnroll(), hparams)
    assert caught.value.estimate[0].status.ok
    with pytest.warns(bl.BilevelWarning, match=words):
        bl.hypergradient(batch, solver, bl.FullUnroll(), hparams, on_failure="warn")
    with pytest.warns(bl.BilevelWarning, match="4 of 4 members are in doubt: member 0: .*; member 2: .*; \\.\\.\\."):
        bl.hypergradient(batch, bl.GradientDescent(tol=1e-12, steps=3), bl.FullUnroll(), hparams)


def test_an_overflowing_penalty_is_one_members_failure() -> None:
    _, batch, hparams = case("logistic", shared=True)
    hparams[3] = 800.0
    together = bl.hypergradient(batch, bl.GradientDescent(), bl.Implicit(), hparams, on_failure="return")
    assert [verdict.status.usable for verdict in together.verdicts] == [True, True, True, False]
    assert "exp(u) overflows" in together.verdicts[3].detail


def test_a_member_without_a_step_size_fails_by_itself() -> None:
    problem = bl.BilevelProblem(
        lambda x, u: 0.5 * u * x.square().sum() - x.sum(), lambda x, u: x.sum(), torch.zeros(2, dtype=F64)
    )
    curvatures = torch.tensor([2.0, -1.0, 4.0], dtype=F64)
    solver = bl.GradientDescent(steps=3)
    found = bl.hypergradient(problem, solver, bl.FullUnroll(), curvatures, batch=3, on_failure="return")
    assert [member.status.usable for member in found] == [True, False, True]
    assert "measured a largest curvature of -1" in str(found[1].verdict)


def test_negative_curvature_of_one_member_is_its_own() -> None:
    problem = bl.BilevelProblem(
        lambda x, u: 0.5 * u[0] * x[0] ** 2 + 0.5 * x[1] ** 2 - u[1] * x.sum(),
        lambda x, u: x.square().sum(),
        torch.zeros(2, dtype=F64),
    )
    hparams = torch.tensor([[1.0, 0.5], [-0.5, 0.5], [2.0, 0.1]], dtype=F64)
    solver = bl.GradientDescent(step_size=0.1, steps=5)
    for linear_solver in (bl.CG(), bl.Direct()):
        estimator = bl.Implicit(linear_solver)
        together = bl.hypergradient(problem, solver, estimator, hparams, batch=3, on_failure="return")
        alone = [bl.hypergradient(problem, solver, estimator, u, on_failure="return") for u in hparams]
        assert alone[1].status is bl.Status.NEGATIVE_CURVATURE
        assert [one.verdict for one in together] == [one.verdict for one in alone]
        agree(together[::2], alone[::2])


def test_a_failed_member_keeps_its_warm_start() -> None:
    _, batch, hparams = case("ridge", shared=True)
    solver = bl.GradientDescent(step_size=0.3, tol=1e-6)
    before = bl.hypergradient(batch, solver, bl.Implicit(), hparams)
    moved = hparams.clone()
    moved[2] = 5.0
    failed = bl.hypergradient(batch, solver, bl.Implicit(), moved, carry=before.carry, on_failure="return")
    assert torch.equal(failed.carry.state.params[2], before.carry.state.params[2])
    assert torch.equal(failed.carry.adjoint[2], before.carry.adjoint[2])
    again = bl.hypergradient(batch, solver, bl.Implicit(), hparams, carry=failed.carry)
    assert again.status.ok
    assert again[2].certificate.inner_steps == 0


# What is refused ------------------------------------------------------------------------------------------------------


def call(**changes: Any) -> Any:
    _, batch, hparams = case("ridge", shared=True)
    options = {"problem": batch, "solver": bl.GradientDescent(), "estimator": bl.Implicit(), "hparams": hparams}
    return bl.hypergradient(**options | changes)


REFUSED = [
    ({"batch": 0}, "`batch` must be a positive int or None, got 0."),
    ({"batch": 5}, "`batch` is 5, but the problem holds 4 members."),
    (
        {"hparams": torch.zeros(3, dtype=F64)},
        "`hparams` must have the leading dimension 4 (one row for each member), got shape (3,).",
    ),
    (
        {"hparams": torch.zeros((), dtype=F64)},
        "`hparams` must have the leading dimension 4 (one row for each member), got shape (): hparams.expand(4)",
    ),
    (
        {"params": torch.zeros(2, 3, dtype=F64)},
        "`params` must have the leading dimension 4 (one row for each member), got shape (2, 3).",
    ),
    ({"estimator": bl.Implicit(bl.Direct(max_size=2))}, "`Direct.max_size` is 2 but the system has 3 unknowns"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_a_batch_cannot_do_is_refused_in_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        call(**changes)


GMRES = "Implicit(linear_solver=GMRES())"
ALONE = [
    ({"solver": bl.Newton()}, "Newton()"),
    ({"solver": bl.QuasiNewton()}, "QuasiNewton()"),
    ({"estimator": bl.Implicit(bl.GMRES())}, GMRES),
    ({"estimator": bl.FiniteDifference()}, "FiniteDifference()"),
    ({"estimator": bl.AdaptiveUnroll()}, "AdaptiveUnroll()"),
    ({"estimator": bl.BalancedImplicit()}, "BalancedImplicit()"),
    ({"estimator": bl.FullUnroll(memory="checkpoint")}, "FullUnroll(memory='checkpoint')"),
    ({"estimator": bl.ClosedForm()}, "ClosedForm()"),
]


@pytest.mark.parametrize(("changes", "name"), ALONE, ids=lambda value: value if isinstance(value, str) else "")
def test_what_takes_one_problem_at_a_time_runs_the_members_one_after_the_other(
    changes: dict[str, Any], name: str
) -> None:
    found, asked = call(**changes), call(**changes, rows="loop")
    assert torch.equal(found.hypergradient, asked.hypergradient)
    assert found.cost.counts == asked.cost.counts
    for each in found:
        assert each.certificate.measured["rows"] == f"one after the other, as {name} takes one problem at a time"


def test_stacks_of_unlike_problems_are_refused() -> None:
    ridge = regression(1)
    for problems, words in (
        ([], "`stack` needs at least one problem."),
        ([ridge, regression(1, "logistic")], "`stack` takes problems of one kind, but problem 0 is a RidgeProblem"),
        ([ridge, regression(1, rows=20)], "X_train has shape (3, 14) in problem 0 and (3, 20) in problem 1."),
        ([ridge, regression(1, loss="sum")], "`loss` is 'mean' in problem 0 and 'sum' in problem 1."),
        ([ridge.batched(2)], "`stack` takes single problems, but problem 0 is a batch of 2."),
        (
            [bl.BilevelProblem(lambda x, u: x * u, lambda x, u: x)],
            "`stack` needs the data of problem 0: make it by BilevelProblem(..., data=tree)",
        ),
        (
            [general(1), bl.BilevelProblem(inner_of_data, inner_of_data, general(1).params, data=general(1).data)],
            "`stack` takes problems that share their functions, but problem 1 has others.",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            bl.stack(problems)


def test_batches_of_batches_and_data_that_do_not_fit_are_refused() -> None:
    for make, words in (
        (lambda: regression(1).batched(2).batched(2), "this problem is a batch of 2 already."),
        (lambda: general(1).batched(2).batched(2), "this problem is a batch of 2 already."),
        (lambda: regression(1).batched(2, data=normal(1, 2)), "RidgeProblem holds its data itself"),
        (lambda: general(1).batched(2, data=normal(1, 3)), "`data` must have the leading dimension 2"),
        (lambda: general(1).batched(True), "`batch` must be a positive int or None, got True."),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            make()


def test_one_problem_is_asked_for_where_a_batch_makes_no_sense() -> None:
    _, batch, hparams = case("ridge", shared=True)
    for ask, words in (
        (lambda: bl.solution(batch, bl.GradientDescent(), bl.Implicit(), hparams), "`solution` takes one problem"),
        (
            lambda: bl.check_hypergradient(batch, bl.GradientDescent(), bl.Implicit(), hparams),
            "`check_hypergradient` takes one problem, got a batch of 4: check batch.member(i).",
        ),
        (lambda: batch.metrics(batch.params), "a batch has no metrics of its own"),
        (lambda: call(problem=bl.GradientDescent(), batch=4), "got GradientDescent in the place of BilevelProblem."),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            ask()


def test_a_negative_penalty_of_any_member_is_refused() -> None:
    batch = regression(1, parametrization="direct").batched(2)
    with pytest.raises(ValueError, match=r"a penalty is negative \(-1\)"):
        bl.hypergradient(batch, bl.GradientDescent(), bl.Implicit(), torch.tensor([1.0, -1.0], dtype=F64))


def test_a_problem_with_a_sampler_is_refused_in_batches_and_beside_data() -> None:
    rows = torch.ones(4, dtype=torch.float64)
    sampled = bl.BilevelProblem(
        lambda w, u, y: ((w - y) ** 2).mean() + u * w**2,
        lambda w, u: w**2,
        torch.zeros((), dtype=torch.float64),
        sampler=bl.MiniBatches(rows, batch_size=2),
    )
    with pytest.raises(ValueError, match="a problem with a sampler does not run in batches: give its data by `data=`"):
        sampled.batched(3)
    with pytest.raises(ValueError, match="give `data` or a `sampler`, not both"):
        bl.BilevelProblem(
            lambda w, u, y: w**2, lambda w, u: w**2, data=rows, sampler=bl.MiniBatches(rows, batch_size=2)
        )


@pytest.mark.parametrize("kind", ["PoissonProblem", "HuberProblem", "SquaredHingeProblem"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared data", "stacked data"])
def test_every_loss_runs_side_by_side(kind: str, shared: bool) -> None:
    def made(seed: int) -> Any:
        X, y = normal(seed, 14, 3), (normal(seed + 1, 14) > 0).long()
        return getattr(bl.problems, kind)(X, y, X, y, "per_feature")

    single = [made(5)] * 2 if shared else [made(5), made(6)]
    batch = single[0].batched(2) if shared else bl.stack(single)
    hparams = normal(4, 2, 3) - 2.0
    for estimator in (bl.FullUnroll(), bl.Implicit(bl.Direct())):
        solver = bl.GradientDescent(step_size=0.1, steps=30)
        together = bl.hypergradient(batch, solver, estimator, hparams, batch=2)
        agree(together, [bl.hypergradient(p, solver, estimator, u) for p, u in zip(single, hparams, strict=True)])


@pytest.mark.parametrize("make", [lambda problem: problem.batched(2), lambda problem: bl.stack([problem, problem])])
def test_tuned_weights_of_rows_run_one_after_the_other(make: Any) -> None:
    X, labels = normal(3, 6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    problem = bl.problems.SampleWeightProblem(X, labels, X, labels)
    hparams = normal(4, 2, 6)
    for solver in (bl.GradientDescent(steps=8), bl.Newton()):
        found = bl.hypergradient(make(problem), solver, bl.Implicit(), hparams, batch=2)
        for each, u in zip(found, hparams, strict=True):
            alone = bl.hypergradient(problem, solver, bl.Implicit(), u)
            assert torch.equal(each.hypergradient, alone.hypergradient)
            assert each.certificate.measured["rows"].startswith("one after the other, as SampleWeightProblem has")


def test_the_warm_start_of_a_batch_and_of_its_members_knows_its_solver() -> None:
    _, batch, hparams = case("ridge", shared=True)
    carry = bl.hypergradient(batch, bl.GradientDescent(steps=5), bl.Implicit(), hparams).carry
    member = bl.hypergradient(batch, bl.GradientDescent(steps=5), bl.Implicit(), hparams)[0].carry
    for kept, problem, u in ((carry, batch, hparams), (member, batch.member(0), hparams[0])):
        with pytest.raises(ValueError, match="this carry is of the inner solver GradientDescent"):
            bl.hypergradient(problem, bl.HeavyBall(steps=5), bl.Implicit(), u, carry=kept)
