"""DataLoaders as samplers, and when a problem sees another batch: against plain torch loops over the same rows."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import F64, normal
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import bilevel as bl

X, Y, V, Z = normal(1, 23, 4), normal(2, 23), normal(3, 15, 4), normal(4, 15)
ROWS = TensorDataset(X, Y)
U = torch.tensor([-1.0, -2.0], dtype=F64)
START = torch.zeros(4, dtype=F64)
STEP = 0.05


def inner(w: Tensor, u: Tensor, batch: Any) -> Tensor:
    X, y = batch
    return (torch.tanh(X @ w) - y).square().mean() + (u.exp() * w.reshape(2, 2).square().sum(1)).sum()


def outer(w: Tensor, u: Tensor, batch: Any = (V, Z)) -> Tensor:
    X, y = batch
    return (torch.tanh(X @ w) - y).square().mean() + u[0].square()


def in_order(rows: int, size: int = 5) -> DataLoader[Any]:
    """A loader whose batches are known without asking it: rows in order, the last batch smaller."""
    return DataLoader(TensorDataset(X[:rows], Y[:rows]), batch_size=size)


def batch_in_order(index: int, rows: int = 23, size: int = 5) -> tuple[Tensor, Tensor]:
    first = size * (index % -(-rows // size))
    return X[:rows][first : first + size], Y[:rows][first : first + size]


def descended(u: Tensor, batches: list[Any]) -> Tensor:
    """Return the end of a plain torch loop of gradient steps, differentiable by u."""
    w = START.clone().requires_grad_()
    for batch in batches:
        (gradient,) = torch.autograd.grad(inner(w, u, batch), w, create_graph=True)
        w = w - STEP * gradient
    return w


def tuned(hypergradient: Callable[[int, Tensor], Tensor], steps: int) -> Tensor:
    """Return the end of a plain torch loop of outer steps."""
    u = U.clone().requires_grad_()
    optimizer = torch.optim.Adam([u], lr=0.1)
    for index in range(steps):
        u.grad = hypergradient(index, u)
        optimizer.step()
    return u.detach()


def by_unroll(u: Tensor, batches: list[Any], validation: Any = (V, Z)) -> Tensor:
    return torch.autograd.grad(outer(descended(u, batches), u, validation), u)[0]


def ours(steps: int, estimator: Any = None, inner_steps: int = 7, outer_loss: Any = None, **options: Any) -> Tensor:
    """Return the hyperparameters after cold-started outer steps of the library."""
    problem = bl.BilevelProblem(inner, outer_loss or (lambda w, u: outer(w, u)), START, **options)
    solver = bl.GradientDescent(STEP, steps=inner_steps)
    loop = bl.OuterOptimizer(problem, solver, estimator or bl.FullUnroll(), U, warm_start=False)
    return loop.run(steps, progress=False).hparams


def same(one: Tensor, other: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=tol, atol=1e-14)


# When another batch is seen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["iterates", "checkpoint", "graph"])
def test_a_fresh_batch_for_each_inner_step_is_a_torch_loop_over_the_loader(memory: str) -> None:
    expected = tuned(lambda i, u: by_unroll(u, [batch_in_order(k) for k in range(7)]), 3)
    same(ours(3, bl.FullUnroll(memory=memory), sampler=in_order(23)), expected)


@pytest.mark.parametrize("estimator", [bl.FullUnroll(), bl.TruncatedUnroll(tail=1.0), bl.FullUnroll(mode="forward")])
def test_a_fresh_batch_for_each_outer_step_is_a_torch_loop_with_all_inner_steps_on_it(estimator: Any) -> None:
    expected = tuned(lambda i, u: by_unroll(u, [batch_in_order(i)] * 7), 6)
    same(ours(6, estimator, sampler=in_order(23), fresh_batch="outer step"), expected)


def test_never_a_fresh_batch_is_all_data_of_the_loader_in_every_step() -> None:
    expected = tuned(lambda i, u: by_unroll(u, [(X, Y)] * 7), 3)
    same(ours(3, sampler=in_order(23), fresh_batch="never"), expected)
    shuffled = DataLoader(ROWS, batch_size=5, shuffle=True, drop_last=True)
    same(ours(3, sampler=shuffled, fresh_batch="never"), expected, 1e-10)


def test_the_outer_loss_sees_another_validation_batch_each_outer_step() -> None:
    validation = DataLoader(TensorDataset(V, Z), batch_size=4)

    def hypergradient(i: int, u: Tensor) -> Tensor:
        first = 4 * (i % 4)
        return by_unroll(u, [batch_in_order(k) for k in range(7)], (V[first : first + 4], Z[first : first + 4]))

    same(ours(6, sampler=in_order(23), outer_loss=outer, outer_sampler=validation), tuned(hypergradient, 6))


def test_an_outer_sampler_does_without_a_sampler() -> None:
    problem = bl.BilevelProblem(
        lambda w, u: inner(w, u, (X, Y)), outer, START, outer_sampler=bl.MiniBatches((V, Z), 6, seed=1)
    )
    drawn = bl.MiniBatches((V, Z), 6, seed=1)
    for index in (0, 1, 5):
        value, _, _ = problem.on_outer_step(index).outer_value_and_grads(START + 1.0, U)
        same(value, outer(START + 1.0, U, drawn(index)))
    assert problem.on_outer_step(3).minibatch == ()


def test_a_single_call_sees_what_outer_step_zero_sees() -> None:
    problem = bl.BilevelProblem(
        inner, outer, START, sampler=in_order(23), fresh_batch="outer step", outer_sampler=in_order(20)
    )
    estimate = bl.hypergradient(problem, bl.GradientDescent(STEP, steps=7), bl.FullUnroll(), U)
    same(estimate.hypergradient, by_unroll(U.clone().requires_grad_(), [batch_in_order(0)] * 7, batch_in_order(0)))


def by_dense_formula(u: Tensor, batch: Any, w: Tensor) -> Tensor:
    """Return the implicit hypergradient at w with the Hessian of one batch, by dense algebra."""
    gradient = torch.func.grad(inner)
    hessian, cross = (torch.func.jacrev(gradient, argnums=i)(w, u, batch) for i in (0, 1))
    by_w, by_u = (torch.func.grad(outer, argnums=i)(w, u) for i in (0, 1))
    return by_u - cross.t() @ torch.linalg.solve(hessian, by_w)


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_products_and_the_residual_are_of_one_evaluation_batch_that_changes_with_the_outer_step(kind: str) -> None:
    sampler: Any = (
        bl.MiniBatches((X, Y), 5, seed=2, evaluation_size=9)
        if kind == "tensors"
        else bl.LoaderBatches(DataLoader(ROWS, 5, shuffle=True), seed=2, evaluation_size=9)
    )
    problem = bl.BilevelProblem(inner, lambda w, u: outer(w, u), START, sampler=sampler)
    solver, seen = bl.GradientDescent(STEP, steps=40), []
    for index in (0, 1, 7):
        batch = sampler.between_steps(index)
        assert [len(leaf) for leaf in batch] == [9, 9]
        assert len({tuple(row) for row in batch[0].tolist()} & {tuple(row) for row in X.tolist()}) == 9
        seen.append(batch[0])
        estimate = bl.hypergradient(problem.on_outer_step(index), solver, bl.Implicit(bl.CG(tol=1e-13)), U)
        same(estimate.hypergradient, by_dense_formula(U, batch, estimate.params), 1e-9)
        residual = float(torch.func.grad(inner)(estimate.params, U, batch).norm())
        assert estimate.certificate.inner_residual == pytest.approx(residual, rel=1e-12)
        # The inner steps saw their own batches all the same.
        same(estimate.params, descended(U, [sampler(k) for k in range(40)]))
    assert not torch.equal(seen[0], seen[1])


def test_an_evaluation_batch_is_drawn_apart_from_the_order_of_the_epoch_with_its_number() -> None:
    sampler = bl.MiniBatches((X, Y), 5, seed=2, evaluation_size=5)
    for index in (0, 1, 7):
        first_of_the_epoch = sampler(index * (len(X) // 5))
        assert not torch.equal(sampler.between_steps(index)[0], first_of_the_epoch[0])


def test_all_of_an_outer_step_is_on_its_batch_so_that_methods_for_one_inner_loss_apply() -> None:
    problem = bl.BilevelProblem(
        inner, lambda w, u: outer(w, u), START, sampler=in_order(20), fresh_batch="outer step"
    ).on_outer_step(2)
    batch = batch_in_order(2)
    estimate = bl.hypergradient(problem, bl.GradientDescent(0.2, tol=1e-12), bl.Implicit(bl.CG(tol=1e-13)), U)
    same(estimate.hypergradient, by_dense_formula(U, batch, estimate.params), 1e-9)
    for estimator in (bl.AdaptiveUnroll(), bl.BalancedImplicit()):
        close = bl.hypergradient(problem, bl.GradientDescent(0.2, steps=400), estimator, U)
        same(close.hypergradient, estimate.hypergradient, 1e-4)


@pytest.mark.parametrize("fresh_batch", ["inner step", "outer step"])
def test_traced_oracles_take_the_batch_of_every_outer_step(fresh_batch: Any) -> None:
    def problem() -> bl.BilevelProblem:
        return bl.BilevelProblem(
            inner, outer, START, sampler=in_order(20), fresh_batch=fresh_batch, outer_sampler=in_order(20)
        )

    runs = [
        bl.OuterOptimizer(each, bl.GradientDescent(STEP, steps=3), bl.FullUnroll(), U).run(5, progress=False)
        for each in (problem(), bl.trace(problem()))
    ]
    same(runs[0].hparams, runs[1].hparams)


def test_a_module_takes_loaders_for_both_losses() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, dtype=F64)

    def error(model: Any, params: Any, u: Tensor, batch: Any) -> Tensor:
        X, y = batch
        return (model(X)[:, 0] - y).square().mean()

    def penalised(model: Any, params: Any, u: Tensor, batch: Any) -> Tensor:
        return error(model, params, u, batch) + u.exp() * params["weight"].square().sum()

    problem = bl.ModuleProblem(
        model, penalised, error, sampler=in_order(20), fresh_batch="outer step", outer_sampler=in_order(20, 4)
    ).on_outer_step(1)
    exact = bl.hypergradient(problem, bl.Newton(), bl.Implicit(bl.Direct()), torch.tensor(-1.0, dtype=F64))
    (A, y), (B, t) = batch_in_order(1, 20), batch_in_order(1, 20, 4)
    A, B = (torch.cat([M, torch.ones(len(M), 1, dtype=F64)], 1) for M in (A, B))
    ridge, mask = np.exp(-1.0), torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=F64))
    hessian = 2 * A.t() @ A / 5 + 2 * ridge * mask
    w = torch.linalg.solve(hessian, 2 * A.t() @ y / 5)
    adjoint = torch.linalg.solve(hessian, 2 * B.t() @ (B @ w - t) / 4)
    same(exact.hypergradient, -adjoint @ (2 * ridge * mask @ w), 1e-9)


# A loader's batches, asked for again ---------------------------------------------------------------------------------


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(23)), batch_size=5, shuffle=True, **options)


def epoch(batches: bl.LoaderBatches, index: int, length: int) -> list[int]:
    return [i for k in range(index * length, (index + 1) * length) for i in batches(k)[0].tolist()]


def test_an_epoch_goes_through_all_examples_in_another_order_than_the_last() -> None:
    batches = bl.LoaderBatches(shuffled(), seed=0)
    epochs = [epoch(batches, e, 5) for e in range(4)]
    assert all(sorted(each) == list(range(23)) for each in epochs)
    assert len({tuple(each) for each in epochs}) == 4
    assert sorted(batches.full()[0].tolist()) == list(range(23))


def test_dropped_examples_wait_for_another_epoch_and_all_examples_have_them() -> None:
    batches = bl.LoaderBatches(shuffled(drop_last=True), seed=0)
    epochs = [epoch(batches, e, 4) for e in range(6)]
    assert {len(set(each)) for each in epochs} == {20}
    assert set().union(*epochs) == set(batches.full()[0].tolist()) == set(range(23))


def test_batches_follow_from_the_seed_alone_and_leave_the_generators_of_the_process_alone() -> None:
    generator = torch.Generator().manual_seed(7)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)  # noqa: NPY002
        before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), generator.get_state())  # noqa: NPY002
        batches = bl.LoaderBatches(shuffled(generator=generator), seed=3)
        found.append([batches(k)[0].tolist() for k in (7, 0, 3, 7)])
        after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), generator.get_state())  # noqa: NPY002
        assert all(
            torch.equal(one, other) if isinstance(one, Tensor) else one == other
            for one, other in zip(before, after, strict=True)
        )
    assert found[0] == found[1]
    assert found[0][0] == found[0][3]
    assert bl.LoaderBatches(shuffled(), seed=4)(0)[0].tolist() != found[0][1]


class Augmented(Dataset[Any]):
    """Rows with noise from three global generators; counts what is fetched."""

    def __init__(self) -> None:
        self.fetched: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fetched[index] += 1
        noise = [float(torch.randn(())), np.random.standard_normal(), random.gauss(0.0, 1.0), 0.0]  # noqa: NPY002
        return X[index] + 0.1 * torch.tensor(noise, dtype=F64), Y[index]


def test_random_augmentation_is_the_same_whenever_a_step_is_taken_and_another_in_another_epoch() -> None:
    batches, again = (bl.LoaderBatches(DataLoader(Augmented(), 23), seed=0, kept=1) for _ in range(2))
    first = batches(0)[0]
    assert (batches(1)[0] != first)[:, :3].all()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    assert torch.equal(batches(0)[0], first)
    again.full()
    assert torch.equal(again(0)[0], first)
    assert torch.equal(batches.full()[0], again.full()[0])


def test_augmented_steps_unrolled_from_checkpoints_equal_the_graph() -> None:
    def hypergradient(estimator: Any, kept: int) -> Tensor:
        sampler = bl.LoaderBatches(DataLoader(Augmented(), 5, shuffle=True), kept=kept)
        problem = bl.BilevelProblem(inner, lambda w, u: outer(w, u), START, sampler=sampler)
        return bl.hypergradient(problem, bl.GradientDescent(STEP, steps=17), estimator, U).hypergradient

    expected = hypergradient(bl.FullUnroll(memory="graph"), 17)
    same(hypergradient(bl.FullUnroll(memory="checkpoint"), 1), expected)
    same(hypergradient(bl.FullUnroll(), 16), expected)


def test_kept_batches_are_not_fetched_again() -> None:
    data = Augmented()
    batches = bl.LoaderBatches(DataLoader(data, 5), kept=3)
    for step in (0, 1, 2, 2, 1, 0):
        batches(step)
    assert set(data.fetched.values()) == {1}
    batches(3), batches(0), batches(2)
    assert (data.fetched[0], data.fetched[10], data.fetched[15]) == (1, 2, 1)


@pytest.mark.parametrize("fresh_batch", ["inner step", "outer step", "never"])
def test_a_run_resumes_in_the_middle_of_an_epoch_bit_for_bit(fresh_batch: Any, tmp_path: Any) -> None:
    def fresh() -> bl.OuterOptimizer:
        problem = bl.BilevelProblem(
            inner,
            outer,
            START,
            sampler=DataLoader(Augmented(), 5, shuffle=True),
            fresh_batch=fresh_batch,
            outer_sampler=DataLoader(TensorDataset(V, Z), 4, shuffle=True),
        )
        return bl.OuterOptimizer(problem, bl.Adam(STEP, steps=3), bl.FullUnroll(memory="checkpoint"), U)

    whole, part = fresh(), fresh()
    whole.run(7, progress=False)
    part.run(3, progress=False)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    resumed = fresh()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.run(4, progress=False)
    assert torch.equal(resumed.hparams, whole.hparams)
    assert [record.outer_loss for record in resumed.history] == [record.outer_loss for record in whole.history]


def test_samplers_of_torch_keep_their_meaning() -> None:
    data = TensorDataset(torch.arange(23))
    chosen = [3, 5, 8, 13, 21]
    subset = bl.LoaderBatches(DataLoader(data, 2, sampler=SubsetRandomSampler(chosen)))
    assert sorted(epoch(subset, 4, 3)) == sorted(subset.full()[0].tolist()) == chosen
    weights = torch.zeros(23)
    weights[[2, 4]] = 1.0
    generator = torch.Generator()
    weighted = bl.LoaderBatches(DataLoader(data, 5, sampler=WeightedRandomSampler(weights, 20, generator=generator)))
    assert set(epoch(weighted, 0, 4)) == {2, 4}
    assert epoch(weighted, 0, 4) != epoch(weighted, 1, 4)
    distributed = DistributedSampler(data, num_replicas=2, rank=1, shuffle=True, seed=5)
    ranked = bl.LoaderBatches(DataLoader(data, 4, sampler=distributed))
    for e in (3, 0):
        distributed.set_epoch(e)
        assert epoch(ranked, e, 3) == list(distributed)
    listed = bl.LoaderBatches(DataLoader(data, batch_sampler=[[0, 1], [2], [7, 8, 9]]))
    assert [listed(k)[0].tolist() for k in (1, 2, 3)] == [[2], [7, 8, 9], [0, 1]]
    assert listed.full()[0].tolist() == [0, 1, 2, 7, 8, 9]


def test_a_dataset_that_fetches_together_and_a_collate_function_are_used() -> None:
    class Together(TensorDataset):
        def __getitems__(self, indices: list[int]) -> Tensor:
            return self.tensors[0][indices]

    loader = DataLoader(Together(X), 5, collate_fn=lambda rows: {"rows": rows, "names": ["a"]})
    batch = bl.LoaderBatches(loader, device="meta")(1)
    assert (batch["rows"].device.type, batch["names"]) == ("meta", ["a"])
    assert torch.equal(bl.LoaderBatches(loader)(1)["rows"], X[5:10])


def test_a_loaders_batches_are_pickled_and_copied() -> None:
    batches = bl.LoaderBatches(shuffled(), seed=5)
    for other in (pickle.loads(pickle.dumps(batches)), copy.deepcopy(batches)):
        assert [other(k)[0].tolist() for k in range(7)] == [batches(k)[0].tolist() for k in range(7)]


# Sentences -----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """Rows without an index."""

    def __iter__(self) -> Iterator[Any]:
        return iter(X)


class OwnGenerator:
    """An order that goes on from a generator nobody else sees."""

    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __len__(self) -> int:
        return 23

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.sample(range(23), 23))


class Endless(OwnGenerator):
    """An order without a length."""

    __len__ = None


class Shrinking:
    """Batches that grow fewer from epoch to epoch."""

    epoch = 0

    def __len__(self) -> int:
        return 3

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], [1], [2]][self.epoch :])


LOADERS: dict[str, Callable[[], Any]] = {
    "`LoaderBatches.loader` must be a torch.utils.data.DataLoader, got TensorDataset.": lambda: bl.LoaderBatches(ROWS),
    "the DataLoader yields nothing: its dataset is empty.": lambda: bl.LoaderBatches(DataLoader([], 5)),
    "the DataLoader yields nothing: drop_last=True leaves out the only batch, of 23 examples instead of 24.": (
        lambda: bl.LoaderBatches(DataLoader(ROWS, 24, drop_last=True))
    ),
    "the dataset Stream has no index, so its batches cannot be asked for again: use DataLoader(list(dataset), ...)": (
        lambda: bl.LoaderBatches(DataLoader(Stream(), 5))
    ),
    "the DataLoader has batch_size=None: give it a batch_size, so that it makes batches.": (
        lambda: bl.LoaderBatches(DataLoader(ROWS, None))
    ),
    "the order of the DataLoader's OwnGenerator cannot be drawn again, as it does not follow from the generators of": (
        lambda: bl.LoaderBatches(DataLoader(ROWS, 5, sampler=OwnGenerator()))
    ),
    "the DataLoader's sampler has no length: give it a __len__.": (
        lambda: bl.LoaderBatches(DataLoader(ROWS, 5, sampler=Endless()))
    ),
    "the DataLoader yields 2 batches in epoch 1, but its length is 3: every epoch must have as many batches.": (
        lambda: bl.LoaderBatches(DataLoader(ROWS, batch_sampler=Shrinking()))(3)
    ),
    "`LoaderBatches.seed` must be an int that is not negative, got 1.5.": lambda: bl.LoaderBatches(in_order(20), 1.5),
    "`LoaderBatches.kept` must be a positive int, got 0.": lambda: bl.LoaderBatches(in_order(20), kept=0),
    "`LoaderBatches.evaluation_size` must be an int from 1 to the 20 rows of the data or None, got 21.": (
        lambda: bl.LoaderBatches(in_order(20), evaluation_size=21)
    ),
    "`MiniBatches.evaluation_size` must be an int from 1 to the 23 rows of the data or None, got 0.": (
        lambda: bl.MiniBatches((X, Y), 5, evaluation_size=0)
    ),
    "`fresh_batch` must be 'inner step', 'outer step' or 'never', got 'step'.": (
        lambda: bl.BilevelProblem(inner, outer, START, sampler=in_order(20), fresh_batch="step")
    ),
    "`fresh_batch` is 'outer step', but there is no `sampler` to take batches from.": (
        lambda: bl.BilevelProblem(lambda w, u: w.sum(), outer, START, fresh_batch="outer step")
    ),
    "`outer_sampler` needs an `outer_loss` (params, hparams, batch), and must be a function of the step": (
        lambda: bl.BilevelProblem(lambda w, u: w.sum(), outer, START, outer_sampler=ROWS)
    ),
    "`outer_loss` must be a function of (params, hparams, batch), got one of (w, u).": (
        lambda: bl.BilevelProblem(lambda w, u: w.sum(), lambda w, u: w.sum(), START, outer_sampler=in_order(20))
    ),
    "`outer_loss` must be a function of (model, params, hparams, batch), got one of (m, p, u).": (
        lambda: bl.ModuleProblem(
            torch.nn.Linear(4, 1), lambda m, p, u: p, lambda m, p, u: p, outer_sampler=in_order(20)
        )
    ),
    "give `data` or a `sampler`, not both": (
        lambda: bl.BilevelProblem(inner, outer, START, outer_sampler=in_order(20), data=X)
    ),
    "a problem with a sampler does not run in batches: give its data by `data=` instead, or take rows='loop'.": (
        lambda: bl.BilevelProblem(inner, outer, START, sampler=in_order(20), fresh_batch="outer step").batched(2)
    ),
}


@pytest.mark.parametrize("text", LOADERS)
def test_batches_that_cannot_be_had_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        LOADERS[text]()
