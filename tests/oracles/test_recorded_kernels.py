"""Runs on recordings of losses as they are written, against the same runs step by step; and what is not recorded."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import F64, flat, normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel as bl
from bilevel.core import cost, tree
from bilevel.engine import lean
from bilevel.inner.multistep import LinearMultistep
from bilevel.oracles import recorded_kernels

STEPS = 50
X, Y, LABELS = normal(1, 30, 5), normal(2, 30), normal(3, 30, 3).argmax(1)
HALF = torch.tensor(0.5, dtype=F64)


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first run be recorded."""
    monkeypatch.setattr(recorded_kernels, "WORTH", 0)


def logistic(w: Tensor, u: Tensor) -> Tensor:
    z = X @ w
    z.mul_(u[:1].exp())  # into a tensor that nothing else refers to
    return nn.functional.softplus(z).mean() + (u.exp() * w.square()).sum()


def network(p: Any, u: Any) -> Tensor:
    logits = torch.tanh(X @ p["W"] + p["b"]) @ p["V"]
    return nn.functional.cross_entropy(logits, LABELS) + bl.weight_decay(p, u)


def quadratic(w: Tensor, u: Tensor) -> Tensor:
    return (u[0].exp() * (X @ w - Y).square()).mean() + u[1:].exp() @ w.square()


def batch_loss(w: Tensor, u: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.softplus(-y * (x @ w) * u[:1].exp()).mean() + (u.exp() * w.square()).sum()


def outer(p: Any, u: Any) -> Tensor:
    return (flat(p) - 0.1).square().sum()


NETWORK = {"W": 0.3 * normal(4, 5, 4), "b": 0.1 * normal(5, 4), "V": 0.3 * normal(6, 4, 3)}
M = 0.2 * normal(20, 5, 5) + torch.eye(5, dtype=F64)
PROBLEMS: dict[str, tuple[bl.BilevelProblem, Any]] = {
    "logistic": (bl.BilevelProblem(logistic, outer, normal(8, 5)), normal(9, 5) - 2.0),
    "network": (bl.BilevelProblem(network, outer, NETWORK), {key: HALF - 3.0 - i for i, key in enumerate(NETWORK)}),
    "quadratic": (bl.BilevelProblem(quadratic, outer, normal(8, 5)), normal(10, 6) - 2.0),
    "optimality": (
        bl.BilevelProblem(optimality=lambda w, u: M @ w + u * w.tanh() - 1.0, outer_loss=outer, params=normal(8, 5)),
        HALF,
    ),
    "batches": (
        bl.BilevelProblem(batch_loss, outer, normal(8, 5), sampler=bl.MiniBatches((X, Y.sign()), 6, seed=0)),
        normal(9, 5) - 2.0,
    ),
}
DESCENT = bl.GradientDescent(0.05, steps=STEPS)
METHODS: dict[str, tuple[Any, Any]] = {
    "gradient descent": (DESCENT, bl.FullUnroll()),
    "nesterov": (bl.Nesterov(0.05, 0.6, steps=STEPS), bl.FullUnroll(memory="checkpoint")),
    "sobolev": (bl.Sobolev(l=0.05, L=12.0, steps=STEPS), bl.TruncatedUnroll(7)),
}


def by_steps(
    problem: Any, solver: Any, estimator: Any, u: Any, on_failure: Any = "raise", **options: Any
) -> bl.Estimate:
    """Return the estimate of a run that is made step by step."""
    with mock.patch.object(LinearMultistep, "follows_coefficients", False):
        return bl.hypergradient(problem, solver, estimator, u, on_failure=on_failure, **options)


def agree(ours: bl.Estimate, theirs: bl.Estimate, tol: float = 1e-12) -> None:
    for one, other in ((ours.hypergradient, theirs.hypergradient), (ours.params, theirs.params)):
        scale = float(flat(other).nan_to_num().abs().max())
        torch.testing.assert_close(flat(one), flat(other), rtol=tol, atol=tol * scale, equal_nan=True)
    assert ours.cost.counts.get("vjp") == theirs.cost.counts.get("vjp")
    assert ours.status is theirs.status


# Each problem and each method in turn.
PAIRS = [("logistic", "sobolev"), ("network", "gradient descent"), ("quadratic", "nesterov"), ("optimality", "sobolev")]
PAIRS += [("batches", "nesterov"), ("logistic", "nesterov")]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_recorded_run_is_the_run_of_its_steps(name: str, method: str) -> None:
    (problem, u), (solver, estimator) = PROBLEMS[name], METHODS[method]
    ours = bl.hypergradient(problem, solver, estimator, u, check=False, on_failure="return")
    assert ours.certificate.form in ("recorded", "doubled")
    agree(ours, by_steps(problem, solver, estimator, u, check=False, on_failure="return"))
    if method == "nesterov":
        moved = tree.tree_map(lambda leaf: leaf + 0.1, u)
        runs = (bl.hypergradient, by_steps)
        agree(*(run(problem, solver, bl.TruncatedUnroll(9), moved, carry=ours.carry, check=False) for run in runs))


@pytest.mark.parametrize("name", ["logistic", "network", "quadratic"])
@pytest.mark.parametrize("method", METHODS)
def test_recorded_derivatives_are_carried_along(name: str, method: str) -> None:
    (problem, u), (solver, _) = PROBLEMS[name], METHODS[method]
    run = problem, solver, bl.FullUnroll(mode="forward"), u
    ours = bl.hypergradient(*run, check=False, on_failure="return")
    assert ours.certificate.form == "recorded"
    agree(ours, by_steps(*run, "return", check=False))
    assert ours.cost.counts == by_steps(*run, "return", check=False).cost.counts


def test_a_run_that_ends_where_its_gradient_is_rounding_is_recorded() -> None:
    problem, u = PROBLEMS["logistic"]
    solver = bl.GradientDescent(0.2, steps=3_000)
    ours = bl.hypergradient(problem, solver, bl.TruncatedUnroll(10), u, check=False)
    assert ours.certificate.form == "recorded"
    assert ours.certificate.inner_residual < 1e-14
    again = bl.hypergradient(problem, solver, bl.TruncatedUnroll(60), u, check=False, carry=ours.carry)
    assert again.certificate.form == "recorded"


def test_gradients_that_products_read_stay_as_they_are() -> None:
    for loss in (lambda w, u: (u.exp() * w.exp()).sum(), lambda w, u: u.exp() @ w.exp().view(5, 1)[:, 0]):
        problem = bl.BilevelProblem(loss, outer, normal(8, 5))
        for solver in (DESCENT, bl.HeavyBall(0.05, 0.6, steps=STEPS)):
            run = problem, solver, bl.FullUnroll(), 0.1 * normal(9, 5)
            agree(bl.hypergradient(*run, check=False, on_failure="return"), by_steps(*run, "return", check=False))


def test_quadratic_losses_are_found_and_doubled() -> None:
    problem, u = PROBLEMS["quadratic"]
    solver = bl.HeavyBall(0.05, 0.6, steps=200)
    ours = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False)
    assert ours.certificate.form == "doubled"
    agree(ours, by_steps(problem, solver, bl.FullUnroll(), u, check=False), 1e-11)
    nearly = bl.BilevelProblem(lambda w, u: quadratic(w, u) + 1e-7 * w.pow(4).sum(), outer, normal(8, 5))
    other = bl.hypergradient(nearly, solver, bl.FullUnroll(), u, check=False)
    assert other.certificate.form == "recorded"
    agree(other, by_steps(nearly, solver, bl.FullUnroll(), u, check=False))


PIECES = {
    "abs": lambda w, u: (w - 1.05).abs() @ u[1:].exp(),
    "relu": lambda w, u: (w - 1).relu() @ u[1:].exp(),
    "where": lambda w, u: torch.where(w > 0.1, w, 2 * w) @ u[1:].exp(),
    "mask": lambda w, u: (w * (w > 0)) @ u[1:].exp(),
    "clamp": lambda w, u: w.clamp(min=0.2).square() @ u[1:].exp(),
    "huber": lambda w, u: nn.functional.huber_loss(u[0] * w, torch.ones_like(w)),
    "rounding": lambda w, u: 0.1 * w @ torch.div(w.detach(), 2.5, rounding_mode="trunc"),
    "whole numbers": lambda w, u: 0.1 * w @ (3 * w).long().double(),
    "digits": lambda w, u: 0.5 * w @ w.detach().float().double(),
    "detached": lambda w, u: 0.5 * w @ w.detach(),
}


@pytest.mark.parametrize("piece", PIECES)
def test_losses_of_quadratic_pieces_are_no_quadratics(piece: str) -> None:
    """Their products are the same at almost every point, and are not those of an affine gradient."""
    problem = bl.BilevelProblem(lambda w, u: quadratic(w, u) + PIECES[piece](w, u), outer, 3.0 * normal(8, 5))
    u, solver = normal(10, 6) - 2.0, bl.GradientDescent(0.05, steps=150)
    for estimator in (bl.FullUnroll(), bl.TruncatedUnroll(9)):
        ours = bl.hypergradient(problem, solver, estimator, u, check=False, on_failure="return")
        assert ours.certificate.form == "recorded"
        agree(ours, by_steps(problem, solver, estimator, u, check=False, on_failure="return"))


@pytest.mark.parametrize(
    "piece",
    [
        lambda w, u: nn.functional.embedding(torch.arange(2), (w * u)[:4].view(2, 2)).square().sum(),
        lambda w, u: (torch.complex(w, u) * torch.complex(w, u).conj()).real.sum(),
    ],
    ids=["embedding", "complex"],
)
def test_losses_of_operations_without_rules_for_stacks_are_pulled_back_one_by_one(piece: Any) -> None:
    problem = bl.BilevelProblem(lambda w, u: logistic(w, u) + 0.1 * piece(w, u), outer, normal(8, 5))
    u, solver = normal(10, 5) - 2.0, bl.GradientDescent(0.05, steps=60)
    ours = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False)
    assert ours.certificate.form == "recorded"
    agree(ours, by_steps(problem, solver, bl.FullUnroll(), u, check=False))


@pytest.mark.parametrize("name", ["batches"])
def test_products_that_make_again_what_they_need_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem, u), (solver, _) = PROBLEMS[name], METHODS["nesterov"]
    expected = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False)
    monkeypatch.setattr(recorded_kernels, "HELD", 0)
    monkeypatch.setattr(lean, "WIDE", 1)
    ours = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False)
    torch.testing.assert_close(flat(ours.hypergradient), flat(expected.hypergradient), rtol=1e-13, atol=1e-15)


def test_a_run_to_a_tolerance_is_that_of_its_steps() -> None:
    problem, u = PROBLEMS["logistic"]
    solver = bl.GradientDescent(0.2, tol=1e-6)
    ours = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False)
    assert ours.certificate.form == "recorded"
    agree(ours, by_steps(problem, solver, bl.FullUnroll(), u, check=False))


@pytest.mark.parametrize("estimator", [bl.Implicit(), bl.TruncatedUnroll(1), bl.FullUnroll()], ids=repr)
def test_a_run_to_a_tolerance_holds_what_is_asked_for_and_not_what_its_chunks_leave(estimator: Any) -> None:
    """Each gradient leaves about half a megabyte, and a chunk has up to 128 steps."""
    A, y = normal(1, 1000, 5), normal(2, 1000)
    problem = bl.BilevelProblem(
        lambda w, u: ((torch.tanh(A @ w.view(5, 30)).sum(1) - y) ** 2).mean() + (u.exp() * w * w).sum(),
        lambda w, u: (w * w).sum(),
        0.1 * normal(3, 150),
    )
    most = [cost.allocated_bytes() or 0]

    class Peak(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            most.append(cost.allocated_bytes() or 0)
            return function(*args, **kwargs or {})

    solver = bl.GradientDescent(0.01, steps=250, tol=1e-12)
    with Peak():
        found = bl.hypergradient(problem, solver, estimator, torch.zeros(150, dtype=F64) - 2.0, on_failure="return")
    assert found.certificate.form == "recorded"
    assert max(most) - most[0] < 2 * recorded_kernels.HELD


CALLS = [0]


def counting(w: Tensor, u: Tensor) -> Tensor:
    CALLS[0] += 1
    return logistic(w, u) * (1.0 if CALLS[0] % 2 else 1.5)


def in_place(w: Tensor, u: Tensor) -> Tensor:
    z = X @ w
    z[:3] = 2.0
    return nn.functional.softplus(z).mean() + (u.exp() * w.square()).sum()


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 3, dtype=F64), nn.BatchNorm1d(3, dtype=F64)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.first(x)))


def module_loss(model: Any, p: Any, u: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(X), LABELS) + u.exp() * flat(p).square().sum()


REFUSED: dict[str, tuple[Any, str]] = {
    "random numbers": (lambda w, u: logistic(w, u) + 0.0 * torch.rand(5, dtype=F64) @ w, "draws random numbers"),
    "a branch": (lambda w, u: logistic(w, u) * (2.0 if w.sum() > 0 else 1.0), "reads the values of tensors"),
    "a number": (lambda w, u: logistic(w, u) * (1.0 + w.detach().norm().item()), "reads the values of tensors"),
    "a mask": (lambda w, u: logistic(w, u) + w[w > 0].square().sum(), "depends on the values of tensors"),
    "an array": (
        lambda w, u: logistic(w, u) * (1.0 + float(np.sign(w.detach().numpy()).sum())),
        "numpy() reads the val",
    ),
    "a list": (lambda w, u: logistic(w, u) * (1.0 + w.detach().tolist()[0]), "tolist() reads the values of tensors"),
    "a generator": (
        lambda w, u: logistic(w, u) + 0.0 * torch.rand(5, generator=torch.Generator(), dtype=F64) @ w,
        "it draws random numbers from a torch.Generator",
    ),
    "writing in place": (in_place, "writes in place"),
    "a counter": (counting, "more than its arguments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_fixed_list_of_operations_runs_step_by_step_and_says_so(name: str) -> None:
    loss, reason = REFUSED[name]
    problem, u, solver = bl.BilevelProblem(loss, outer, normal(8, 5)), normal(9, 5) - 2.0, DESCENT
    results = []
    for run in (bl.hypergradient, by_steps):
        CALLS[0] = 0
        torch.manual_seed(0)
        results.append(run(problem, solver, bl.FullUnroll(), u, check=False, on_failure="return"))
    said = results[0].certificate.form
    assert said.startswith("step by step, as the loss is not recorded: ")
    assert reason in said
    if name != "a counter":  # a look at the loss counts, too
        agree(*results)


def test_modules_with_draws_and_statistics_of_their_own_run_step_by_step() -> None:
    u, solver = HALF - 3.0, DESCENT
    for module, seed in ((Dropping(), 0), (Dropping().norm, None), (Dropping().eval(), None)):
        layers = module if isinstance(module, Dropping) else nn.Sequential(nn.Linear(5, 3, dtype=F64), module)
        problem = bl.ModuleProblem(layers, module_loss, module_loss, seed=seed)
        ours = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False)
        assert (ours.certificate.form == "recorded") is (not layers.training)
        agree(ours, by_steps(problem, solver, bl.FullUnroll(), u, check=False))


@pytest.mark.parametrize(
    ("at", "why"),
    [
        (lambda k: slice(k % 3, 5 + k % 3), "got a `slice`: take a tensor"),
        (lambda k: np.arange(k % 3, 5 + k % 3), "got a `ndarray`: take a tensor"),
        (lambda k: [k % 3, 4], "its batches differ"),
        (lambda k: X[k % 3 :], "its batches differ"),
    ],
)
def test_what_batches_are_not_recorded_is_said(at: Any, why: str) -> None:
    class Places:
        def __call__(self, index: int) -> Any:
            return at(index)

        def full(self) -> Any:
            return at(0)

    def loss(w: Tensor, u: Tensor, batch: Any) -> Tensor:
        rows = batch if isinstance(batch, Tensor) else X[batch].reshape(-1, 5)
        return batch_loss(w, u, (rows, rows[:, 0]))

    problem, u = bl.BilevelProblem(loss, outer, normal(8, 5), sampler=Places()), normal(9, 5) - 2.0
    ours = bl.hypergradient(problem, DESCENT, bl.FullUnroll(), u)
    assert ours.certificate.form.startswith("step by step, as the loss is not recorded: ")
    assert why in ours.certificate.form
    loop = bl.SingleLoop(problem, bl.SOBA(inner_step=0.05, every=20), u)
    loop.run(20, progress=False)
    assert loop.directions.form.startswith("by autograd, as the losses are not recorded: ")
    assert why in loop.directions.form


def test_recorded_runs_over_batches_are_confirmed_on_the_last() -> None:
    held = {"scale": 1.0}

    class Replacing:
        def __call__(self, index: int) -> Any:
            held["scale"] = 1.0 + index % 2
            return X, Y

        def full(self) -> Any:
            return X, Y

    def loss(w: Tensor, u: Tensor, batch: Any) -> Tensor:
        return held["scale"] * batch_loss(w, u, batch)

    problem, u = bl.BilevelProblem(loss, outer, normal(8, 5), sampler=Replacing()), normal(9, 5) - 2.0
    ours = bl.hypergradient(problem, DESCENT, bl.FullUnroll(), u, check=False)
    assert ours.certificate.form.endswith("its recording gives other numbers at the end")
    agree(ours, by_steps(problem, DESCENT, bl.FullUnroll(), u, check=False))


def test_data_that_are_replaced_or_changed_between_runs_are_seen() -> None:
    held = {"X": X, "scale": torch.ones(5, dtype=F64)}
    problem = bl.BilevelProblem(
        lambda w, u: nn.functional.softplus(held["X"] @ (w * held["scale"])).mean() + (u.exp() * w.square()).sum(),
        outer,
        normal(8, 5),
    )
    u, solver = normal(9, 5) - 2.0, DESCENT
    for _ in range(3):
        ours = bl.hypergradient(problem, solver, bl.FullUnroll(), u, check=False)
        assert ours.certificate.form == "recorded"
        agree(ours, by_steps(problem, solver, bl.FullUnroll(), u, check=False))
        held["scale"].mul_(1.1)
        held["X"] = held["X"] + 0.1
    again = pickle.loads(pickle.dumps(PROBLEMS["logistic"][0].traces))
    assert not again.made


def test_params_and_hyperparameters_may_be_one_tensor_and_single_precision_is_kept() -> None:
    same, solver = torch.zeros(5, dtype=F64), replace(DESCENT, steps=55)
    problem = bl.BilevelProblem(lambda w, u: logistic(w + same, u + same), outer, same)
    ours, theirs = (run(problem, solver, bl.FullUnroll(), same, check=False) for run in (bl.hypergradient, by_steps))
    agree(ours, theirs)
    single = bl.BilevelProblem(
        lambda w, u: nn.functional.softplus(X.float() @ w).mean() + (u.exp() * w.square()).sum(), outer, same.float()
    )
    ours, theirs = (
        run(single, solver, bl.FullUnroll(), same.float(), check=False) for run in (bl.hypergradient, by_steps)
    )
    assert ours.hypergradient.dtype is torch.float32
    agree(ours, theirs, 1e-5)


def test_short_runs_are_recorded_once_their_sum_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_kernels, "WORTH", 150)
    problem, u = bl.BilevelProblem(logistic, outer, normal(8, 5)), normal(9, 5) - 2.0
    said = [bl.hypergradient(problem, DESCENT, bl.FullUnroll(), u, check=False).certificate.form for _ in range(3)]
    assert said == ["step by step", "step by step", "recorded"]
