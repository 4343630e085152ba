"""Members of a batch that run one after the other: the numbers of single calls, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal
from torch import Tensor, nn

import bilevel as bl
from bilevel.core import tree

F64 = torch.float64
X, Y = normal(1, 12, 3), normal(2, 12)
US = torch.tensor([-1.0, -1.5], dtype=F64)


def outer(w: Tensor, u: Tensor) -> Tensor:
    return (X @ w - Y).square().mean()


def of(inner: Any, **more: Any) -> bl.BilevelProblem:
    return bl.BilevelProblem(inner, outer, torch.ones(3, dtype=F64), **more)


def of_module(module: nn.Module, **more: Any) -> bl.BilevelProblem:
    def loss(m: Any, p: Any, u: Tensor) -> Tensor:
        return (m(X) - Y[:, None]).square().mean() + u.exp() * sum(v.square().sum() for v in p.values())

    return bl.ModuleProblem(module, loss, loss, **more)


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(1, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer(x[..., None])[0][:, -1])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * cotangent


def masked(w: Tensor, u: Tensor) -> Tensor:
    z = (X - w).clone()
    z[z <= 0] = z[z <= 0] * 0.2
    return z.square().mean() + u.exp() * w.square().sum()


def slope(w: Tensor, u: Tensor) -> Tensor:
    inside = torch.autograd.functional.jacobian(lambda v: (v**2).sum(), w, create_graph=True)
    return (inside - 1).square().sum() + u.exp() * w.square().sum()


def branching(w: Tensor, u: Tensor) -> Tensor:
    return (w - u).square().sum() if w.sum() > 0 else (w + u).square().sum()


ALONE: dict[str, Any] = {
    "LSTM": lambda: of_module(Lstm().double()),
    "branch": lambda: of(branching),
    "mask": lambda: of(masked),
    "jacobian inside": lambda: of(slope),
    "Function": lambda: of(lambda w, u: Square.apply(X @ w - Y).mean() + u.exp() * w.square().sum()),
    "item": lambda: of(lambda w, u: (w - u).square().sum() * (1.0 + 0.0 * w.detach().sum().item())),
}


def equal(one: Any, other: Any) -> None:
    assert one.outer_loss == other.outer_loss
    assert one.certificate.inner_residual == other.certificate.inner_residual
    for name in ("hypergradient", "params"):
        assert all(map(torch.equal, tree.leaves(getattr(one, name)), tree.leaves(getattr(other, name))))


@pytest.mark.parametrize("name", ALONE)
def test_losses_that_torch_cannot_vectorise_run_one_after_the_other(name: str) -> None:
    torch.manual_seed(0)
    problem, solver = ALONE[name](), bl.GradientDescent(0.05, steps=3)
    found = bl.hypergradient(problem, solver, bl.FullUnroll(), US, batch=2)
    for index, each in enumerate(found):
        equal(each, bl.hypergradient(problem, solver, bl.FullUnroll(), US[index]))
        assert each.certificate.measured["rows"].startswith("one after the other, as a loss cannot be vectorised over")


def quadratic(w: Tensor, u: Tensor, batch: Any = (X, Y)) -> Tensor:
    return (batch[0] @ w - batch[1]).square().mean() + u.exp() * w.square().sum()


ASKED: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "Newton": (lambda: of(quadratic), bl.Newton(), bl.Implicit(bl.Direct()), {"certify": True}),
    "QuasiNewton": (lambda: of(quadratic), bl.QuasiNewton(), bl.Implicit(), {}),
    "TorchOptimizer": (
        lambda: of(quadratic),
        bl.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), tol=1e-2),
        bl.Implicit(),
        {},
    ),
    "differences": (lambda: of(quadratic), bl.Newton(), bl.FiniteDifference(), {}),
    "target": (lambda: of(quadratic), bl.Newton(), bl.Implicit(), {"target_error": 1e-3}),
    "sampler": (
        lambda: of(quadratic, sampler=bl.MiniBatches((X, Y), 4)),
        bl.SGD(0.05, steps=5),
        bl.FullUnroll(),
        {},
    ),
    "dropout": (
        lambda: of_module(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1)).double(), seed=0),
        bl.SGD(0.05, steps=5),
        bl.FullUnroll(),
        {},
    ),
    "ridge": (
        lambda: bl.problems.RidgeProblem(X, Y, X, Y),
        bl.GradientDescent(),
        bl.Implicit(),
        {},
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_rows_that_are_asked_for_are_single_calls_with_any_part(name: str) -> None:
    make, solver, estimator, options = ASKED[name]
    problem = make()
    found = bl.hypergradient(problem, solver, estimator, US, batch=2, rows="loop", **options)
    again = bl.hypergradient(problem, solver, estimator, US, batch=2, rows="loop", carry=found.carry)
    assert len(again) == 2
    for index, each in enumerate(found):
        equal(each, bl.hypergradient(problem, solver, estimator, US[index], **options))
        assert "rows" not in each.certificate.measured
    assert found.cost.counts["gradient"] == sum(each.cost.counts["gradient"] for each in found)


def test_a_warm_start_goes_on_as_that_of_a_single_call() -> None:
    problem, solver = of(quadratic), bl.HeavyBall(0.05, 0.5, steps=4)
    first = bl.hypergradient(problem, solver, bl.FullUnroll(), US, batch=2, rows="loop")
    second = bl.hypergradient(problem, solver, bl.FullUnroll(), US, batch=2, rows="loop", carry=first.carry)
    for index, each in enumerate(second):
        alone = bl.hypergradient(problem, solver, bl.FullUnroll(), US[index])
        equal(each, bl.hypergradient(problem, solver, bl.FullUnroll(), US[index], carry=alone.carry))


@pytest.mark.parametrize("rows", ["auto", "loop"])
def test_an_outer_loop_over_rows_is_that_of_each_alone(rows: Any) -> None:
    def settings(u: Tensor, **more: Any) -> Any:
        problem = of(branching) if rows == "auto" else of(quadratic, sampler=bl.MiniBatches((X, Y), 4))
        return bl.OuterOptimizer(problem, bl.SGD(0.05, steps=3), bl.FullUnroll(), u, **more).run(3, progress=False)

    many = settings(US, batch=2, **({} if rows == "auto" else {"rows": "loop"}))
    for index, each in enumerate(many):
        alone = settings(US[index])
        assert torch.equal(each.hparams, alone.hparams)
        assert [r.outer_loss for r in each.history] == [r.outer_loss for r in alone.history]


def test_problems_of_other_data_stack_to_rows() -> None:
    problems = [bl.problems.RidgeProblem(X[:n], Y[:n], X, Y) for n in (8, 11)]
    found = bl.hypergradient(bl.stack(problems, rows="loop"), bl.Newton(), bl.Implicit(), US)
    for problem, each, u in zip(problems, found, US, strict=True):
        equal(each, bl.hypergradient(problem, bl.Newton(), bl.Implicit(), u))


def test_a_member_that_fails_spoils_no_other() -> None:
    us = torch.tensor([float("nan"), -1.5], dtype=F64)
    options: Any = {"batch": 2, "rows": "loop", "on_failure": "return"}
    bad, good = bl.hypergradient(of(quadratic), bl.GradientDescent(0.05, steps=3), bl.FullUnroll(), us, **options)
    assert not bad.status.usable
    equal(good, bl.hypergradient(of(quadratic), bl.GradientDescent(0.05, steps=3), bl.FullUnroll(), us[1]))


def test_mistakes_get_their_own_words() -> None:
    solver, rule = bl.GradientDescent(0.05, steps=2), bl.FullUnroll()
    wrong = of(lambda w, u: (w @ torch.ones(4, dtype=F64)) * u)
    with pytest.raises(ValueError, match=r"`inner_loss` fails at the start, .*inconsistent tensor size"):
        bl.hypergradient(wrong, solver, rule, US, batch=2)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        bl.hypergradient(wrong, solver, rule, US, batch=2, check=False)
    with pytest.raises(ValueError, match="`rows` must be 'auto' or 'loop', got 'all'"):
        bl.hypergradient(of(quadratic), solver, rule, US, batch=2, rows="all")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="give `batch=`, the number of members, too"):
        bl.hypergradient(of(quadratic), solver, rule, US[0], rows="loop")
    with pytest.raises(ValueError, match=r"`hparams` must have the leading dimension 3"):
        bl.hypergradient(of(quadratic), solver, rule, US, batch=3, rows="loop")
