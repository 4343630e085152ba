"""Linear models: one pass over the data for each linearisation, blocks of rows, preconditioners."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import F64, normal, spd, tree_case
from problem_cases import KEEPING, LINEAR, close, draw, multinomial, over, weighted

import bilevel as bl
from bilevel.base import LinearSystem
from bilevel.problems import LogisticProblem, SampleWeightProblem, design
from bilevel.problems.design import Design
from bilevel.problems.precondition import factored

CG = bl.CG(tol=1e-11)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the passes over training and validation data."""
    count = [0]
    sweep = Design.sweep

    def counted(self: Design, visit: Any) -> Any:
        count[0] += 1
        return sweep(self, visit)

    monkeypatch.setattr(Design, "sweep", counted)
    return count


# One pass for each linearisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logistic", "softmax", "weighted"])
def test_gradient_value_curvature_and_linearization_share_one_pass(name, passes):
    problem = KEEPING[name]()
    at = draw(problem)
    inner = problem.bind(at.u)
    inner.grad(at.x), inner.value(at.x), inner.linearize(at.x).curvature
    assert (passes[0], inner.counts["gradient"], inner.counts["value"]) == (1, 1, 0)
    inner.linearize(at.x).vjp(at.v)
    assert passes[0] == 2


@pytest.mark.parametrize("name", ["logistic", "softmax"])
def test_a_rebound_gradient_takes_no_pass_and_is_not_counted(name, passes):
    problem = KEEPING[name]()
    at = draw(problem)
    old = problem.bind(at.u)
    old.grad(at.x)
    new, fresh = problem.bind(at.u + 0.7), problem.bind(at.u + 0.7)
    expected = fresh.grad(at.x)
    before = passes[0]
    old.linearize(at.x).rebind(new)
    close(new.grad(at.x), expected)
    close(new.value(at.x), fresh.value(at.x))
    assert passes[0] == before
    assert new.counts["gradient"] == new.counts["value"] == 0


def test_other_weights_of_the_rows_take_half_a_pass_that_is_counted(passes):
    problem = weighted()
    at = draw(problem)
    old = problem.bind(at.u)
    old.grad(at.x)
    new = problem.bind(at.u + 0.7)
    expected = problem.bind(at.u + 0.7).grad(at.x)
    before = passes[0]
    problem.predict = None  # predictions are known
    old.linearize(at.x).rebind(new)
    close(new.grad(at.x), expected)
    assert (passes[0] - before, new.counts["gradient"]) == (1, 1)


@over(KEEPING)
def test_the_value_is_counted_where_it_takes_a_pass_only(factory):
    problem = factory()
    at = draw(problem)
    inner = problem.bind(at.u)
    close(inner.value(at.x), problem.inner_loss(at.x, at.u))
    assert inner.counts["value"] == 1
    close(inner.value(at.w), problem.inner_loss(at.w, at.u))
    assert inner.counts["value"] == 2


def test_a_general_problem_gives_the_value_of_its_last_gradient_for_nothing():
    case = tree_case("dict", "dict")
    inner = case.problem.bind(case.hparams)
    inner.grad(case.start)
    close(inner.value(case.start), case.problem.inner_loss(case.start, case.hparams))
    assert inner.counts["value"] == 0


# Blocks ---------------------------------------------------------------------------------------------------------------


@over(KEEPING)
@pytest.mark.parametrize("workers", [1, 3])
def test_oracles_in_blocks_equal_those_in_one_piece_for_any_number_of_workers(factory, workers, monkeypatch):
    whole = factory()
    monkeypatch.setenv("BILEVEL_WORKERS", str(workers))
    monkeypatch.setattr(design, "LARGE", 1)
    monkeypatch.setattr(design, "ROWS", 3)
    split = factory()
    assert len(split.design.blocks) == 5
    at = draw(whole)
    ours, theirs = (problem.bind(at.u).linearize(at.x) for problem in (split, whole))
    close(ours.vjp(at.v), theirs.vjp(at.v))
    close(ours.jvp(at.v, at.du), theirs.jvp(at.v, at.du))
    close(ours.cross(at.v), theirs.cross(at.v))
    close(ours.dense_hessian(), theirs.dense_hessian())
    close(split.bind(at.u).grad(at.x), whole.bind(at.u).grad(at.x))
    close(split.bind(at.u).value(at.x), whole.bind(at.u).value(at.x))
    close(split.outer_value_and_grads(at.x, at.u), whole.outer_value_and_grads(at.x, at.u))


def test_the_number_of_workers_changes_no_bit(monkeypatch):
    X = normal(1, 4100, 500)
    problem = LogisticProblem(X, (X[:, 0] > 0).long(), X, (X[:, 0] > 0).long())
    assert len(problem.design.blocks) == 2
    w, u = normal(2, 500), torch.tensor(-3.0, dtype=F64)
    results = []
    for workers in ("1", "2"):
        monkeypatch.setenv("BILEVEL_WORKERS", workers)
        inner = problem.bind(u)
        results.append((inner.grad(w), inner.linearize(w).hvp(w)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_what_a_worker_raises_reaches_the_caller(monkeypatch):
    monkeypatch.setenv("BILEVEL_WORKERS", "2")
    monkeypatch.setattr(design, "LARGE", 1)
    monkeypatch.setattr(design, "ROWS", 2)

    def fail(block: int, X: Any, rows: slice) -> Any:
        raise ValueError(f"block {block}")

    with pytest.raises(ValueError, match="block"):
        Design(torch.eye(6)).sweep(fail)


# Preconditioners ------------------------------------------------------------------------------------------------------


@over(LINEAR)
def test_the_preconditioner_is_the_inverse_hessian_in_float32_symmetric_and_positive(factory):
    problem = factory()
    at = draw(problem)
    point = problem.bind(at.u).linearize(at.x)
    inverse = point.preconditioner(lasting=True)
    size = at.x.numel()
    dense = torch.stack([inverse.apply(row) for row in torch.eye(size, dtype=F64)])
    torch.testing.assert_close(dense @ point.dense_hessian(), torch.eye(size, dtype=F64), rtol=0, atol=3e-4)
    torch.testing.assert_close(dense, dense.t(), rtol=1e-4, atol=1e-5 * float(dense.abs().max()))
    assert float(torch.linalg.eigvalsh((dense + dense.t()) / 2)[0]) > 0


@over(LINEAR)
def test_a_kept_preconditioner_takes_the_present_penalties(factory, passes):
    problem = factory()
    at = draw(problem)
    old, new = problem.bind(at.u), problem.bind(at.u + 1.0)
    cache = old.linearize(at.x).preconditioner(lasting=True).cache
    point = new.linearize(at.x)
    before = passes[0]
    inverse = point.preconditioner(cache)
    assert (passes[0], new.counts["curvature"], old.counts["curvature"]) == (before, 0, 1)
    if not isinstance(problem, SampleWeightProblem):
        v = at.v.reshape(-1)
        got = inverse.apply(point.dense_hessian() @ v)
        torch.testing.assert_close(got, v, rtol=1e-3, atol=1e-3)
    # Asked for again, it is the same one: it is factored once.
    assert point.preconditioner(inverse.cache) is inverse


def test_a_factor_is_used_again_while_penalties_move_little():
    gram, diagonal = spd(1, 5).float(), torch.ones(5)
    first = factored(gram, diagonal)
    assert factored(gram, 1.2 * diagonal, first.cache).cache is first.cache
    moved = factored(gram, 1.3 * diagonal, first.cache)
    assert moved.cache is not first.cache
    v = normal(2, 5)
    torch.testing.assert_close(moved.apply((gram + torch.diag(1.3 * diagonal)).double() @ v), v, rtol=1e-4, atol=1e-4)


def test_an_indefinite_matrix_is_shifted_or_given_up_never_wrong():
    nearly = torch.ones(3, 3)
    assert factored(nearly, torch.zeros(3)).apply is not None
    hopeless = factored(nearly, -torch.ones(3))
    assert hopeless.apply is None
    assert factored(nearly, torch.full((3,), float("nan"))).apply is None
    assert factored(nearly, -torch.ones(3), hopeless.cache).apply is None
    # What is kept of it is still of use at other penalties.
    again = factored(nearly, torch.ones(3), hopeless.cache)
    torch.testing.assert_close(again.apply(torch.ones(3)), torch.full((3,), 0.25), rtol=1e-5, atol=0)


def test_large_models_and_general_problems_have_no_preconditioner():
    case = tree_case()
    assert case.problem.bind(case.hparams).linearize(case.start).preconditioner(lasting=True).apply is None
    X = normal(3, 4, 2001)
    problem = LogisticProblem(X, torch.arange(4) % 2, X, torch.arange(4) % 2)
    point = problem.bind(problem.initial_hparams()).linearize(problem.params)
    assert point.preconditioner(lasting=True).apply is None
    # With penalties of their own, classes would need a rough preconditioner each.
    separate = multinomial(penalty="per_class")
    assert separate.bind(separate.initial_hparams()).linearize(separate.params).preconditioner().apply is None


@pytest.mark.parametrize("make", [multinomial, partial(multinomial, penalty="per_feature"), weighted])
def test_a_first_solve_of_softmax_regression_has_the_class_blocks_of_the_hessian_at_zero(make):
    problem = make()
    at = draw(problem)
    zero = problem.bind(at.u).linearize(torch.zeros_like(at.x))
    classes, features = at.x.shape
    hessian = zero.dense_hessian().reshape(classes, features, classes, features)
    blocks = torch.block_diag(*[hessian[c, :, c] for c in range(classes)])
    rough = problem.bind(at.u).linearize(at.x).preconditioner()
    assert rough.rough
    v = at.v.reshape(-1)
    torch.testing.assert_close(rough.apply(blocks @ v), v, rtol=1e-3, atol=1e-4)
    again = problem.bind(at.u + 0.1).linearize(at.x).preconditioner(rough.cache)
    torch.testing.assert_close(again.apply(v), rough.apply(v), rtol=0, atol=0)
    # What is to last is measured in full, whatever was kept before.
    assert not problem.bind(at.u).linearize(at.x).preconditioner(rough.cache, lasting=True).rough


def test_the_class_blocks_save_half_of_the_products_of_a_first_solve(monkeypatch):
    # Features of very different sizes, and labels of which half are random.
    X, noise = normal(5, 300, 12) * torch.logspace(-1.5, 0.5, 12, dtype=F64), normal(6, 300, 4)
    y = (X @ normal(7, 12, 4)).argmax(1).where(torch.arange(300) % 2 == 0, noise.argmax(1))
    problem = SampleWeightProblem(X[:200], y[:200], X[200:], y[200:], penalty=1e-3)
    u = problem.initial_hparams()

    def products() -> int:
        solve = (problem, bl.QuasiNewton(tol=1e-8), bl.Implicit(bl.CG(tol=1e-8)), u)
        return bl.hypergradient(*solve).cost.counts["hvp"]

    helped = products()
    monkeypatch.setattr(problem, "class_curvature_at_zero", None)
    assert helped < 0.6 * products()


@pytest.mark.parametrize("every", [1, 5])
def test_preconditioned_cg_solves_the_same_system_in_fewer_steps(every):
    matrix = spd(4, 40, 10.0)
    scales = torch.logspace(-3, 3, 40, dtype=F64)
    matrix = scales[:, None] * matrix * scales
    b, x = scales * normal(5, 40), None
    inverse = torch.linalg.inv(scales[:, None] * (spd(4, 40, 10.0) + 0.1 * torch.eye(40, dtype=F64)) * scales)
    solver = bl.CG(tol=1e-6, check_every=every, max_steps=30)
    for x in (None, normal(6, 40) / scales):
        solution = solver.solve(lambda v: matrix @ v, b, x, precondition=lambda v: inverse @ v)
        assert solution.verdict.status.ok
        assert solution.residual == pytest.approx(float((b - matrix @ solution.x).norm() / b.norm()), rel=1e-6)
        assert not solver.solve(lambda v: matrix @ v, b, x).verdict.status.ok


def test_preconditioned_cg_still_notices_negative_curvature_and_zero_start_costs_no_product():
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
    solution = CG.solve(lambda v: matrix @ v, torch.tensor([1.0, 2.0], dtype=F64), precondition=lambda v: 0.5 * v)
    assert solution.verdict.status is bl.Status.NEGATIVE_CURVATURE
    assert LinearSystem(lambda v: v, torch.ones(2), None, 1e-6).precondition is None
