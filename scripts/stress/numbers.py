"""Wrong numbers that look right: units, derivatives, side effects, random numbers, threads."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bilevel as bl

Result = tuple[str, bool, str]
F64 = torch.float64
U = torch.tensor(-1.0, dtype=F64)
SOLVERS: Sequence[tuple[str, Callable[[], bl.InnerSolver]]] = (
    ("GradientDescent", bl.GradientDescent),
    ("Nesterov", lambda: bl.Nesterov(momentum="auto")),
    ("Chebyshev", bl.Chebyshev),
    ("Newton", bl.Newton),
    ("QuasiNewton", bl.QuasiNewton),
)
LINEAR: Sequence[tuple[str, Callable[[], bl.LinearSolver]]] = (
    ("CG", bl.CG),
    ("GMRES", bl.GMRES),
    ("Direct", bl.Direct),
    ("FixedPointIteration", bl.FixedPointIteration),
)
SCALES = (1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9, 1e12, 1e15)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# Units ---------------------------------------------------------------------------------------------------------------


def units(count: int, seed: int) -> Iterator[Result]:
    """Multiply losses, targets and features by numbers: the hypergradient is what scaling makes it, or it is not OK.

    Args:
        count: how many combinations of scale, what is scaled, dtype, inner and linear solver.
        seed: of their choice.

    Yields:
        For each: its name, whether the number was right or not OK, and else both numbers.
    """
    every = [*itertools.product(SCALES, ("inner loss", "outer loss", "y", "X"), (F64, torch.float32), SOLVERS, LINEAR)]
    for scale, what, dtype, (name, solver), (linear_name, linear) in random.Random(seed).sample(every, count):
        title = f"{scale:g} {what}, {dtype}, {name}, {linear_name}"
        problem, expected = _scaled(what, scale, dtype)
        estimate = bl.hypergradient(
            problem, solver(), bl.Implicit(linear()), U.to(dtype), on_failure="return", check=False
        )
        came = float(estimate.hypergradient)
        close = abs(came - expected) <= (1e-4 if dtype == F64 else 3e-2) * abs(expected)
        yield title, close or not estimate.status.ok, f"expected {expected:.6g}, came {came:.6g} {estimate.status.name}"


def _scaled(what: str, c: float, dtype: torch.dtype) -> tuple[bl.BilevelProblem, float]:
    """Return ridge regression in other units, and its hypergradient by dense algebra in the usual ones."""
    X, V = _normal(0, 20, 3), _normal(1, 20, 3)
    y, z = X.sum(1) + 0.3 * _normal(2, 20), V.sum(1) + 0.3 * _normal(3, 20)
    penalty = U.exp()
    hessian = X.t() @ X / 20 + penalty * torch.eye(3, dtype=F64)
    w = torch.linalg.solve(hessian, X.t() @ y / 20)
    expected = float(-penalty * w @ torch.linalg.solve(hessian, V.t() @ (V @ w - z) / 20))
    inner_scale, outer_scale, of_X, of_y = 1.0, 1.0, 1.0, 1.0
    if what == "inner loss":
        inner_scale = c
    elif what == "outer loss":
        outer_scale, expected = c, c * expected
    elif what == "y":
        of_y, expected = c, c * c * expected
    else:
        # Features in other units, with the penalty in theirs: w is divided by c, predictions and the loss stay.
        of_X = c
    X, V, y, z = (each.to(dtype) for each in (of_X * X, of_X * V, of_y * y, of_y * z))

    def inner(params: Tensor, u: Tensor) -> Tensor:
        return inner_scale * (0.5 * (X @ params - y).square().mean() + 0.5 * u.exp() * (of_X * params).square().sum())

    def outer(params: Tensor, u: Tensor) -> Tensor:
        return outer_scale * 0.5 * (V @ params - z).square().mean()

    return bl.BilevelProblem(inner, outer, torch.zeros(3, dtype=dtype)), expected


# Derivatives ---------------------------------------------------------------------------------------------------------


class _OnContext(torch.autograd.Function):
    """w^3 whose derivative is right, and whose second derivative is not: the square is a constant to it."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.square = w * w
        return ctx.square * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.square


class _Numpy(torch.autograd.Function):
    """The same with numpy in the backward."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return torch.as_tensor(w.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.as_tensor(3 * ctx.saved_tensors[0].detach().numpy() ** 2) * g


class _WrongBackward(torch.autograd.Function):
    """w^3 whose derivative itself is a tenth too large."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3.3 * g * ctx.saved_tensors[0] ** 2


class _WrongBend(_WrongBackward):
    """w^3 in two nodes, of which the second has another derivative than its own."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * _Triple.apply(ctx.saved_tensors[0])


class _Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return 3 * w**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 5 * g * ctx.saved_tensors[0]


CUBES: Sequence[tuple[str, Callable[[Tensor], Any]]] = (
    ("a value on ctx", _OnContext.apply),
    ("numpy in a backward", _Numpy.apply),
    ("a wrong backward", _WrongBackward.apply),
    ("a wrong second backward", _WrongBend.apply),
    ("a detached weight", lambda w: w.detach().abs() * w.abs() * w.sign()),
    ("a detached cross term", lambda w: w.detach() * w * w),
)
RULES: Sequence[tuple[str, Callable[[], Any]]] = (
    ("Implicit", bl.Implicit),
    ("FullUnroll", bl.FullUnroll),
    ("TruncatedUnroll", lambda: bl.TruncatedUnroll(tail=20)),
    ("OneStep", bl.OneStep),
    ("auto", lambda: "auto"),
)


def derivatives() -> Iterator[Result]:
    """Losses whose second derivative is not that of their gradient, by all estimators, certified or not.

    Yields:
        For each: its name, whether it was refused or not OK, and else what came.
    """
    a = torch.tensor([1.0, 2.0, -1.5], dtype=F64)
    for (title, cube), (name, rule), certify in itertools.product(CUBES, RULES, (False, True)):

        def inner(w: Tensor, u: Tensor, cube: Any = cube) -> Tensor:
            return (w - a).square().sum() + u.exp() * (cube(w) * w).sum() / 4

        problem = bl.BilevelProblem(inner, lambda w, u: w.square().sum(), torch.full((3,), 0.1, dtype=F64))
        solver = bl.GradientDescent(step_size=0.05, steps=400)
        what = f"{title}, {name}{', certified' * certify}"
        yield _refused(what, lambda p=problem, s=solver, r=rule, c=certify: _taken(p, s, r(), certify=c))


def _taken(problem: bl.BilevelProblem, solver: Any, rule: Any, **options: Any) -> Any:
    return bl.hypergradient(problem, solver, rule, torch.tensor(0.0, dtype=F64), on_failure="return", **options)


def _refused(what: str, call: Callable[[], Any]) -> Result:
    """Say whether a call was refused in words, or gave a number that is not OK."""
    try:
        estimate = call()
    except (ValueError, RuntimeError) as error:
        return what, bool(str(error)), "an error without words"
    return what, not estimate.status.ok, f"came {estimate.hypergradient} {estimate.status.name}"


# Side effects --------------------------------------------------------------------------------------------------------


def _by_data(x: Tensor) -> None:
    x.data.clamp_(min=0.2)


def _without_grad(x: Tensor) -> None:
    with torch.no_grad():
        x.clamp_(min=0.2)


def _by_copy(x: Tensor) -> None:
    with torch.no_grad():
        x.copy_(x + 0.01)


def _by_numpy(x: Tensor) -> None:
    x.detach().numpy()[...] += 0.01


def _by_storage(x: Tensor) -> None:
    x.detach().view(-1)[0] = 7.0


WRITES = (_by_data, _without_grad, _by_copy, _by_numpy, _by_storage)


def effects() -> Iterator[Result]:
    """Losses that write to their arguments or to the data that they hold.

    Yields:
        For each: its name, whether it was refused with the caller's tensors as they were, and else what happened.
    """
    for write, place, level in itertools.product(WRITES, ("params", "hparams", "data"), ("inner", "outer")):
        data, start, hparams = _normal(5, 3), torch.full((3,), 0.1, dtype=F64), torch.tensor([0.3, -0.2, 0.1]).double()
        before = [each.clone() for each in (start, hparams)]

        def loss(w: Tensor, u: Tensor, at: str, data: Tensor = data, spoilt: Any = (write, place, level)) -> Tensor:
            by, where, which = spoilt
            if at == which:
                by({"params": w, "hparams": u, "data": data}[where])
            return (w - data).square().sum() + (u.exp() * w * w).sum() * (at == "inner")

        problem = bl.BilevelProblem(lambda w, u, f=loss: f(w, u, "inner"), lambda w, u, f=loss: f(w, u, "outer"), start)
        for rule in (bl.FullUnroll(), bl.Implicit()):
            what = f"{write.__name__.strip('_').replace('_', ' ')}, {place} in the {level} loss, {type(rule).__name__}"
            solver = bl.GradientDescent(step_size=0.05, steps=30)
            try:
                estimate = bl.hypergradient(problem, solver, rule, hparams, on_failure="return")
                ok, reason = not estimate.status.ok, f"came {estimate.hypergradient.tolist()} {estimate.status.name}"
            except (ValueError, RuntimeError) as error:
                ok, reason = True, str(error)
            if not all(map(torch.equal, before, (start, hparams))):
                ok, reason = False, f"the caller's tensors have changed; {reason}"
            yield what, ok, reason


# Random numbers ------------------------------------------------------------------------------------------------------

OWN = torch.Generator().manual_seed(3)
CHANCE: Sequence[tuple[str, Callable[[], float]]] = (
    ("torch", lambda: float(torch.rand(()))),
    ("a generator", lambda: float(torch.rand((), generator=OWN))),
    ("numpy", np.random.rand),
    ("a numpy generator", np.random.default_rng(0).random),
    ("Python's random", random.random),
    ("the clock", lambda: time.perf_counter_ns() % 1_000_003 / 1_000_003),
    ("a counter", itertools.count().__next__),
)


def chance() -> Iterator[Result]:
    """Losses that are another function at each call.

    Yields:
        For each: its name, whether it was refused, and else what came.
    """
    for (title, number), level, rule in itertools.product(CHANCE, ("inner", "outer"), (bl.Implicit(), bl.FullUnroll())):

        def loss(w: Tensor, u: Tensor, at: str, number: Any = number, level: str = level) -> Tensor:
            noise = 1e-3 * number() if at == level else 0.0
            return (w - 1.0 - noise).square().sum() + u.exp() * w.square().sum() * (at == "inner")

        problem = bl.BilevelProblem(
            lambda w, u, f=loss: f(w, u, "inner"),
            lambda w, u, f=loss: f(w, u, "outer"),
            torch.full((2,), 0.1, dtype=F64),
        )
        solver = bl.GradientDescent(step_size=0.1, steps=40)
        what = f"{title} in the {level} loss, {type(rule).__name__}"
        yield _refused(what, lambda p=problem, s=solver, r=rule: _taken(p, s, r))


# Threads -------------------------------------------------------------------------------------------------------------


def _shared_problems() -> Iterator[tuple[str, bl.BilevelProblem, bl.InnerSolver, Any]]:
    X = _normal(7, 120, 5)
    y = X.sum(1) + 0.1 * _normal(8, 120)

    def batch_loss(w: Tensor, u: Tensor, batch: Any) -> Tensor:
        return (batch[0] @ w - batch[1]).square().mean() + u.exp() * w.square().sum()

    def outer(w: Tensor, u: Tensor) -> Tensor:
        return (X @ w - y).square().mean()

    def of_module(model: Any, params: Any, u: Tensor) -> Tensor:
        return (model(X)[:, 0] - y).square().mean() + u.exp() * sum(p.square().sum() for p in params.values())

    def module(*extra: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 1)).double()

    sgd = bl.SGD(step_size=0.05, steps=60)
    zeros = torch.zeros(5, dtype=F64)
    batches = bl.MiniBatches((X, y), batch_size=16, seed=0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=16, shuffle=True)
    yield "MiniBatches", bl.BilevelProblem(batch_loss, outer, zeros, sampler=batches), sgd, bl.FullUnroll()
    yield "a DataLoader", bl.BilevelProblem(batch_loss, outer, zeros, sampler=loader), sgd, bl.FullUnroll()
    make = bl.ModuleProblem
    short = bl.SGD(step_size=0.05, steps=20)
    yield "a module", make(module(), of_module, of_module), short, bl.FullUnroll()
    yield "seeded dropout", make(module(nn.Dropout(0.3)), of_module, of_module, seed=1), short, bl.FullUnroll()
    yield "batch norm", make(module(nn.BatchNorm1d(8)), of_module, of_module), short, bl.FullUnroll()
    ridge = bl.problems.RidgeProblem(X[:60], y[:60], X[60:], y[60:], penalty="scalar")
    yield "ridge regression", ridge, bl.QuasiNewton(), bl.Implicit()


def in_threads(count: int) -> Iterator[Result]:
    """One problem in 8 threads: the numbers are those of one thread, bit for bit.

    Args:
        count: hyperparameters of each problem.

    Yields:
        For each problem: its name, whether all numbers are equal, and else how many are not.
    """
    values = [-3.0 + 0.1 * index for index in range(count)]
    for name, problem, solver, rule in _shared_problems():

        def one(u: float, p: Any = problem, s: Any = solver, r: Any = rule) -> float:
            return float(bl.hypergradient(p, s, r, torch.tensor(u, dtype=F64)).hypergradient)

        alone = [one(u) for u in values]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(one, values))
        apart = sum(a != b for a, b in zip(alone, together, strict=True))
        yield name, not apart, f"{apart} of {count} numbers differ"
