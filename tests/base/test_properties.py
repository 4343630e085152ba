"""What must hold for every problem: linear pullbacks, transposes, and results that do not depend on how they are asked.

Problems are drawn by hypothesis, which shrinks a failure to the smallest one that shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bilevel as bl
from bilevel.core import tree
from bilevel.problems import LogisticProblem, RidgeProblem, SoftmaxProblem

F64 = torch.float64
CPU = torch.device("cpu")
few = settings(max_examples=4, deadline=None, derandomize=True)

seeds = st.integers(0, 10**6)
scales = st.floats(-3.0, 3.0).map(lambda exponent: 10.0**exponent)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=F64)


@dataclass(frozen=True)
class Random:
    """A smooth, strongly convex inner loss and any smooth outer loss of vectors, made of some tensors."""

    data: dict[str, Tensor]
    start: Tensor
    hparams: Tensor
    generator: torch.Generator

    def inner(self, x: Tensor, u: Tensor) -> Tensor:
        d = self.data
        penalty = 0.5 + torch.sigmoid(d["P"] @ u)
        fit = x @ d["A"] @ x / 2 - x @ d["b"] + (x + d["S"] @ u).cosh().log().sum() / 5
        return fit + penalty @ x.square() / 2

    def outer(self, x: Tensor, u: Tensor) -> Tensor:
        d = self.data
        return (x - d["t"]).square().sum() / 2 + x.sin() @ d["S"] @ u + u.square().sum() / 3

    def problem(self, scale: float = 1.0) -> bl.BilevelProblem:
        return bl.BilevelProblem(
            lambda x, u: scale * self.inner(x, u), lambda x, u: scale * self.outer(x, u), self.start
        )

    def cotangent(self) -> Tensor:
        return draw(self.generator, self.start.numel())

    def to(self, device: str) -> Random:
        data = {name: value.to(device) for name, value in self.data.items()}
        return Random(data, self.start.to(device), self.hparams.to(device), self.generator)


@st.composite
def problems(draws: Any, least: int = 1) -> Random:
    size, count = draws(st.integers(least, 5)), draws(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draws(seeds))
    X = draw(generator, size + 2, size)
    data = {
        "A": X.t() @ X / len(X),
        "b": draw(generator, size),
        "S": draw(generator, size, count),
        "P": draw(generator, size, count),
        "t": draw(generator, size),
    }
    return Random(data, draw(generator, size), draw(generator, count), generator)


ESTIMATORS = {
    "full unroll": (bl.FullUnroll(), bl.GradientDescent(steps=15)),
    "forward mode": (bl.FullUnroll(mode="forward"), bl.Nesterov(steps=15)),
    "truncated unroll": (bl.TruncatedUnroll(tail=7), bl.HeavyBall(steps=15)),
    "adam": (bl.FullUnroll(), bl.Adam(step_size=0.05, steps=15)),
    "implicit, direct": (bl.Implicit(bl.Direct()), bl.Newton()),
    "implicit, CG": (bl.Implicit(bl.CG(tol=1e-13)), bl.Newton()),
    "implicit, GMRES": (bl.Implicit(bl.GMRES(tol=1e-13)), bl.Newton()),
}
estimators = pytest.mark.parametrize(("estimator", "solver"), ESTIMATORS.values(), ids=ESTIMATORS.keys())


def close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    for one, other in zip(tree.leaves(a), tree.leaves(b), strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(scale, 1e-3))


def pullback(random: Random, estimator: Any, solver: Any) -> Callable[[Tensor], Tensor]:
    run = bl.Run(random.problem(), solver, random.hparams, random.start)
    solution = estimator.solve(run)
    return lambda cotangent: solution.pullback(cotangent).hparams


@estimators
@few
@given(random=problems(), a=st.floats(-5, 5), b=st.floats(-5, 5))
def test_a_pullback_is_linear(estimator: Any, solver: Any, random: Random, a: float, b: float) -> None:
    pull, v, w = pullback(random, estimator, solver), random.cotangent(), random.cotangent()
    close(pull(a * v + b * w), a * pull(v) + b * pull(w), 1e-8)


@few
@given(random=problems())
def test_products_are_transposes_of_each_other(random: Random) -> None:
    point = random.problem().bind(random.hparams).linearize(random.start)
    dx, du, w = random.cotangent(), draw(random.generator, random.hparams.numel()), random.cotangent()
    by_x, by_u = point.vjp(w)
    close(point.jvp(dx, du) @ w, dx @ by_x + du @ by_u)
    close(point.hvp(dx) @ w, dx @ point.hvp(w))


@pytest.mark.parametrize("solver", [bl.GradientDescent(steps=9), bl.Chebyshev(steps=9), bl.Adam(steps=9)], ids=str)
@few
@given(random=problems())
def test_the_unrolled_pullback_is_the_transpose_of_the_pushforward(solver: Any, random: Random) -> None:
    w, problem = random.cotangent(), random.problem()
    inner = problem.bind(random.hparams)
    state = solver.init(inner, random.start)
    du = draw(random.generator, random.hparams.numel())
    pushed = [(tree.zeros_like(state.params), tree.zeros_like(state.memory))]
    for _ in range(9):
        pushed = solver.step_jvp(inner, state, pushed, [du])
        state = solver.step(inner, state)
    close(pushed[0][0] @ w, du @ pullback(random, bl.FullUnroll(), solver)(w))


class Packed(nn.Module):
    """The vector as two parameters of a module."""

    def __init__(self, start: Tensor, cut: int) -> None:
        super().__init__()
        self.head, self.tail = nn.Parameter(start[:cut].clone()), nn.Parameter(start[cut:].clone())

    def forward(self) -> Tensor:
        return torch.cat([self.head, self.tail])


@estimators
@few
@given(random=problems(least=2), data=st.data())
def test_packing_changes_no_hypergradient(estimator: Any, solver: Any, random: Random, data: Any) -> None:
    cut = data.draw(st.integers(1, random.start.numel() - 1))
    plain = bl.hypergradient(random.problem(), solver, estimator, random.hparams)
    as_dict = bl.BilevelProblem(
        lambda p, u: random.inner(torch.cat([p["b"], p["a"][0]]), u["u"]),
        lambda p, u: random.outer(torch.cat([p["b"], p["a"][0]]), u["u"]),
        {"b": random.start[:cut], "a": [random.start[cut:]]},
    )
    as_module = bl.ModuleProblem(
        Packed(random.start, cut),
        lambda model, params, u: random.inner(model(), u),
        lambda model, params, u: random.outer(model(), u),
    )
    packed = bl.hypergradient(as_dict, solver, estimator, {"u": random.hparams})
    close(packed.hypergradient["u"], plain.hypergradient)
    close(bl.hypergradient(as_module, solver, estimator, random.hparams).hypergradient, plain.hypergradient)


@estimators
@few
@given(random=problems(), scale=scales)
def test_scaling_both_losses_scales_the_hypergradient(
    estimator: Any, solver: Any, random: Random, scale: float
) -> None:
    if isinstance(solver, bl.Adam):
        # As small against every gradient as it can be: eps is no part of the loss's scale.
        solver = bl.Adam(step_size=0.05, steps=15, eps=1e-30)
    plain = bl.hypergradient(random.problem(), solver, estimator, random.hparams)
    scaled = bl.hypergradient(random.problem(scale), solver, estimator, random.hparams, on_failure="return")
    close(scaled.hypergradient, scale * plain.hypergradient, 1e-6)


BATCHED = {
    "full unroll": (bl.FullUnroll(), bl.GradientDescent(steps=15)),
    "truncated unroll": (bl.TruncatedUnroll(tail=7), bl.Adam(steps=15)),
    "implicit, CG": (bl.Implicit(bl.CG(tol=1e-13)), bl.GradientDescent(tol=1e-11)),
}


@pytest.mark.parametrize(("estimator", "solver"), BATCHED.values(), ids=BATCHED.keys())
@few
@given(random=problems(), size=st.integers(1, 3))
def test_a_batch_gives_what_a_loop_gives(estimator: Any, solver: Any, random: Random, size: int) -> None:
    problem = random.problem()
    hparams = torch.stack([random.hparams + 0.3 * i for i in range(size)])
    batch = bl.hypergradient(problem, solver, estimator, hparams, batch=size)
    for member, u in zip(batch, hparams, strict=True):
        close(member.hypergradient, bl.hypergradient(problem, solver, estimator, u).hypergradient, 1e-8)


FAMILIES = {"ridge": (RidgeProblem, 0), "logistic": (LogisticProblem, 2), "softmax": (SoftmaxProblem, 3)}


@pytest.mark.parametrize("penalty", ["scalar", "per_feature"])
@pytest.mark.parametrize(("family", "classes"), FAMILIES.values(), ids=FAMILIES.keys())
@few
@given(seed=seeds, features=st.integers(1, 5))
def test_the_order_of_features_changes_nothing_but_the_order(
    family: Any, classes: int, penalty: str, seed: int, features: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    splits = {}
    for part in ("train", "val", "test"):
        splits[f"X_{part}"] = draw(generator, 9, features)
        splits[f"y_{part}"] = torch.arange(9) % classes if classes else draw(generator, 9)
    order = torch.randperm(features, generator=generator)
    shuffled = {key: value[:, order] if key[0] == "X" else value for key, value in splits.items()}
    one, other = family(**splits, penalty=penalty), family(**shuffled, penalty=penalty)
    hparams = draw(generator, features) if penalty == "per_feature" else draw(generator, 1)[0]
    moved = hparams[order] if penalty == "per_feature" else hparams
    solver, estimator = bl.Newton(), bl.Implicit(bl.Direct())
    plain = bl.hypergradient(one, solver, estimator, hparams).hypergradient
    close(
        bl.hypergradient(other, solver, estimator, moved).hypergradient,
        plain[order] if penalty == "per_feature" else plain,
        1e-7,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@estimators
@few
@given(random=problems())
def test_cuda_gives_what_the_cpu_gives(estimator: Any, solver: Any, random: Random) -> None:
    here, there = (
        bl.hypergradient(each.problem(), solver, estimator, each.hparams).hypergradient
        for each in (random, random.to("cuda"))
    )
    close(there.cpu(), here)
