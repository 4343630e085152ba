"""Inner steps on mini-batches: each estimator against autograd through the same sequence of batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import F64, flat, normal
from torch import Tensor, nn

import bilevel as bl
from bilevel.core import tree

X, Y, V, Z = normal(1, 23, 4), normal(2, 23), normal(3, 15, 4), normal(4, 15)
START = {"w": torch.zeros(4, dtype=F64), "c": torch.zeros((), dtype=F64)}
U = {"w": torch.tensor(-1.0, dtype=F64), "c": torch.tensor(-2.0, dtype=F64)}
STEP, MOMENTUM = 0.05, 0.5


def inner(p: Any, u: Any, batch: Any) -> Tensor:
    X, y = batch
    return (torch.tanh(X @ p["w"] + p["c"]) - y).square().mean() + sum(u[k].exp() * p[k].square().sum() for k in p)


def outer(p: Any, u: Any) -> Tensor:
    return (torch.tanh(V @ p["w"] + p["c"]) - Z).square().mean() + u["w"].square()


def batches(seed: int = 3) -> bl.MiniBatches:
    return bl.MiniBatches((X, Y), batch_size=5, seed=seed)


def problem() -> bl.BilevelProblem:
    return bl.BilevelProblem(inner, outer, START, sampler=batches())


def by_autograd(start: Any, first: int, steps: int, tail: int | None = None) -> tuple[Any, Tensor]:
    """Return (x, hypergradient) of heavy ball on batches first, first + 1, ..., from `start` at rest."""
    u, sampler = tree.attach(U), batches()
    x = previous = tree.attach(start)
    for k in range(first, first + steps):
        if k == first + steps - (tail or steps):
            x, previous = tree.detach(x), tree.detach(previous)
        x = tree.tree_map(lambda leaf: leaf if leaf.requires_grad else leaf.requires_grad_(), x)
        gradient = torch.autograd.grad(inner(x, u, sampler(k)), list(x.values()), create_graph=True)
        new = {key: x[key] - STEP * g + MOMENTUM * (x[key] - previous[key]) for key, g in zip(x, gradient, strict=True)}
        x, previous = new, x
    products = torch.autograd.grad(outer(x, u), list(u.values()))
    return tree.detach(x), flat(dict(zip(u, products, strict=True)))


def close(estimate: bl.Estimate, expected: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(flat(estimate.hypergradient), expected, rtol=tol, atol=1e-14)


UNROLLS = [
    bl.FullUnroll(),
    bl.FullUnroll(memory="checkpoint"),
    bl.FullUnroll(memory="graph"),
    bl.FullUnroll(mode="forward"),
    bl.TruncatedUnroll(tail=1.0),
]


@pytest.mark.parametrize("estimator", UNROLLS, ids=repr)
@pytest.mark.parametrize("traced", [False, True])
def test_an_unroll_differentiates_the_steps_on_their_own_batches(estimator: Any, traced: bool) -> None:
    x, expected = by_autograd(START, 0, 13)
    stochastic = bl.trace(problem()) if traced else problem()
    estimate = bl.hypergradient(stochastic, bl.HeavyBall(STEP, MOMENTUM, steps=13), estimator, U)
    close(estimate, expected)
    torch.testing.assert_close(flat(estimate.params), flat(x), rtol=1e-12, atol=1e-14)


def test_the_tail_of_a_truncated_unroll_sees_the_last_batches() -> None:
    _, expected = by_autograd(START, 0, 13, tail=4)
    close(bl.hypergradient(problem(), bl.HeavyBall(STEP, MOMENTUM, steps=13), bl.TruncatedUnroll(4), U), expected)


def test_a_step_sees_its_batch_where_the_full_batch_was_looked_at_before() -> None:
    whole, batch = problem().bind(U), batches()(2)
    step, roots = whole.on_step(2), tree.attach(START)
    loss = inner(roots, U, batch)
    expected = torch.autograd.grad(loss, list(roots.values()))
    assert (flat(whole.grad(START)) - flat(step.grad(START))).norm() > 1e-3
    assert whole.value(START) != step.value(START)
    torch.testing.assert_close(flat(step.grad(START)), torch.cat([g.reshape(-1) for g in expected]))
    torch.testing.assert_close(step.value(START), loss.detach())
    # A tolerance asks for the full batch's residual before every step.
    estimate = bl.hypergradient(problem(), bl.HeavyBall(STEP, MOMENTUM, tol=0.2), bl.FullUnroll(), U)
    assert 3 < estimate.certificate.inner_steps < 10
    close(estimate, by_autograd(START, 0, estimate.certificate.inner_steps)[1])


def test_batches_matter_so_the_comparisons_can_fail() -> None:
    other = bl.BilevelProblem(inner, outer, START, sampler=batches(seed=4))
    solver = bl.HeavyBall(STEP, MOMENTUM, steps=13)
    one, two = (bl.hypergradient(p, solver, bl.FullUnroll(), U) for p in (problem(), other))
    assert (flat(one.hypergradient) - flat(two.hypergradient)).norm() > 1e-3 * flat(one.hypergradient).norm()


@pytest.mark.parametrize("estimator", UNROLLS, ids=repr)
def test_a_warm_start_goes_on_to_fresh_batches(estimator: Any) -> None:
    solver = bl.GradientDescent(STEP, steps=6)
    first = bl.hypergradient(problem(), solver, estimator, U)
    second = bl.hypergradient(problem(), solver, estimator, U, carry=first.carry)
    assert (first.carry.state.index, second.carry.state.index) == (6, 12)
    u, sampler = tree.attach(U), batches()
    x = tree.attach(START)
    for k in range(12):
        if k == 6:
            x = tree.attach(x)
        gradient = torch.autograd.grad(inner(x, u, sampler(k)), list(x.values()), create_graph=True)
        x = {key: x[key] - STEP * g for key, g in zip(x, gradient, strict=True)}
    expected = dict(zip(u, torch.autograd.grad(outer(x, u), list(u.values())), strict=True))
    close(second, flat(expected))


@pytest.mark.parametrize("solver", [bl.Adam(0.05, steps=7), bl.HeavyBall(STEP, MOMENTUM, steps=7)], ids=repr)
def test_an_outer_run_on_batches_resumes_bit_for_bit(solver: Any, tmp_path: Any) -> None:
    def fresh() -> bl.OuterOptimizer:
        return bl.OuterOptimizer(problem(), solver, bl.FullUnroll(memory="checkpoint"), U)

    whole, part = fresh(), fresh()
    whole.run(5, progress=False)
    part.run(2, progress=False)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    resumed = fresh()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.run(3, progress=False)
    assert torch.equal(flat(resumed.hparams), flat(whole.hparams))
    assert resumed.carry.state.index == 35


@pytest.mark.parametrize("estimator", [bl.FullUnroll(), bl.FullUnroll(memory="checkpoint")], ids=repr)
def test_unrolled_adam_on_batches_equals_finite_differences(estimator: Any) -> None:
    solver = bl.Adam(0.05, steps=9)
    ours, differences = (bl.hypergradient(problem(), solver, e, U) for e in (estimator, bl.FiniteDifference()))
    torch.testing.assert_close(flat(ours.hypergradient), flat(differences.hypergradient), rtol=1e-6, atol=1e-8)


def test_implicit_differentiation_and_the_residual_are_of_the_full_batch() -> None:
    full = bl.BilevelProblem(lambda p, u: inner(p, u, (X, Y)), outer, START)
    estimate = bl.hypergradient(problem(), bl.GradientDescent(STEP, steps=400), bl.Implicit(bl.CG(tol=1e-13)), U)
    there = full.bind(U)
    residual = float(tree.norm(there.grad(estimate.params)))
    assert estimate.certificate.inner_residual == pytest.approx(residual, rel=1e-12)
    # The dense formula at the returned params, on all rows.
    x, u = tree.attach(estimate.params), tree.attach(U)

    def flat_loss(x: Tensor, u: Tensor) -> Tensor:
        return inner({"w": x[:4], "c": x[4]}, {"w": u[0], "c": u[1]}, (X, Y))

    gradient = torch.func.grad(flat_loss)
    hessian, cross = (torch.func.jacrev(gradient, argnums=i)(flat(x), flat(u)).detach() for i in (0, 1))
    by = torch.autograd.grad(outer(x, u), [*x.values(), *u.values()], materialize_grads=True)
    by_x, by_u = flat(list(by[:2])), flat(list(by[2:]))
    close(estimate, by_u - cross.t() @ torch.linalg.solve(hessian, by_x), 1e-9)


def test_a_module_is_trained_on_batches() -> None:
    model = nn.Linear(4, 1, dtype=F64)
    ours = bl.ModuleProblem(
        model,
        lambda model, p, u, batch: (
            (model(batch[0])[:, 0] - batch[1]).square().mean() + u.exp() * flat(p).square().sum()
        ),
        lambda model, p, u: (model(V)[:, 0] - Z).square().mean(),
        sampler=batches(),
    )
    u = torch.tensor(-1.0, dtype=F64, requires_grad=True)
    x, sampler = tree.attach(ours.params), batches()
    for k in range(8):
        rows, y = sampler(k)
        loss = (rows @ x["weight"][0] + x["bias"] - y).square().mean() + u.exp() * flat(x).square().sum()
        gradient = torch.autograd.grad(loss, list(x.values()), create_graph=True)
        x = {key: x[key] - STEP * g for key, g in zip(x, gradient, strict=True)}
    (expected,) = torch.autograd.grad((V @ x["weight"][0] + x["bias"] - Z).square().mean(), u)
    for each in (ours, bl.trace(ours)):
        estimate = bl.hypergradient(each, bl.GradientDescent(STEP, steps=8), bl.FullUnroll(), u.detach())
        close(estimate, expected.reshape(1))


def test_each_epoch_goes_through_the_rows_in_another_order_that_follows_from_the_seed() -> None:
    rows = torch.arange(10)
    ours = bl.MiniBatches(rows, 5, seed=1)
    epochs = [torch.cat([ours(2 * e), ours(2 * e + 1)]) for e in range(4)]
    assert all(torch.equal(epoch.sort().values, rows) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    again = bl.MiniBatches(rows, 5, seed=1)
    # Asked for in any order, and by another object, a step sees the same batch.
    assert torch.equal(again(7), ours(7))
    assert torch.equal(again(0), ours(0))
    assert not torch.equal(bl.MiniBatches(rows, 5, seed=2)(0), ours(0))
    assert torch.equal(ours.full(), rows)


def test_rows_that_are_left_over_wait_for_another_epoch() -> None:
    ours = bl.MiniBatches({"x": torch.arange(7)}, 3)
    seen = [ours(k)["x"] for k in range(20)]
    assert {tuple(batch.shape) for batch in seen} == {(3,)}
    assert set(torch.cat(seen).tolist()) == set(range(7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, 24), r"`MiniBatches.batch_size` must be an int from 1 to the 23 rows of the data, got 24."),
        ((X, 0), r"`MiniBatches.batch_size` must be an int from 1 to the 23 rows of the data, got 0."),
        (((X, V), 5), r"`MiniBatches.data` must hold tensors with the same number of rows, such as \(X, y\)."),
        ((torch.zeros(()), 1), r"`MiniBatches.data` must hold tensors with the same number of rows"),
        (((), 1), r"`MiniBatches.data` must hold tensors with the same number of rows"),
        ((X, 5, -1), r"`MiniBatches.seed` must be an int that is not negative, got -1."),
    ],
)
def test_batches_that_cannot_be_made_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bl.MiniBatches(*arguments)


@pytest.mark.parametrize("sampler", [lambda step: X, 5])
def test_a_sampler_without_a_full_batch_is_refused(sampler: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a function of the step with a method `full\(\)`"):
        bl.BilevelProblem(inner, outer, START, sampler=sampler)


def test_a_sampler_without_an_inner_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`sampler` needs an `inner_loss` \(params, hparams, batch\)"):
        bl.BilevelProblem(None, outer, START, optimality=lambda p, u: p, sampler=batches())


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (bl.AdaptiveUnroll(), "AdaptiveUnroll compares steps of one inner loss, but this problem has a sampler"),
        (bl.AdaptiveUnroll(budget=90, tail=2), "but this problem has a sampler, whose steps see different batches"),
        (bl.AdaptiveUnroll(tail=2, extrapolate=True), "use TruncatedUnroll."),
        (bl.BalancedImplicit(), "BalancedImplicit compares steps of one inner loss, but this problem has a"),
    ],
    ids=repr,
)
def test_estimators_that_compare_steps_refuse_batches(estimator: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(problem(), bl.GradientDescent(STEP, steps=20), estimator, U)


@dataclass
class Constant:
    """A user's own sampler."""

    batch: Any

    def __call__(self, step: int) -> Any:
        return self.batch

    def full(self) -> Any:
        return self.batch


def test_a_users_sampler_of_one_batch_is_the_problem_without_a_sampler() -> None:
    solver = bl.Nesterov(STEP, MOMENTUM, steps=10)
    fixed = bl.BilevelProblem(lambda p, u: inner(p, u, (X, Y)), outer, START)
    sampled = bl.BilevelProblem(inner, outer, START, sampler=Constant((X, Y)))
    one, other = (bl.hypergradient(p, solver, bl.FullUnroll(), U, certify=True) for p in (fixed, sampled))
    assert torch.equal(flat(one.hypergradient), flat(other.hypergradient))
    assert one.certificate == other.certificate
