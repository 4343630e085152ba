"""Small problems, each with one fault that makes hypergradients wrong, and words that the report on it must contain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bilevel as bl

F64 = torch.float64
Planted = tuple[bl.BilevelProblem, Any, bl.InnerSolver | None]


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


X, X_VAL, WEIGHTS = normal(1, 30, 4), normal(2, 20, 4), normal(3, 4)
Y, Y_VAL = X @ WEIGHTS + 0.3 * normal(4, 30), X_VAL @ WEIGHTS + 0.3 * normal(5, 20)
START = torch.full((4,), 0.3, dtype=F64)
PENALTY = torch.tensor(-1.5, dtype=F64)
PENALTIES = torch.tensor([-1.5, -1.0, -2.0, -0.5], dtype=F64)


def fit(w: Tensor) -> Tensor:
    return (X @ w - Y).square().mean()


def inner(w: Tensor, u: Tensor) -> Tensor:
    return fit(w) + (u.exp() * w.square()).sum()


def outer(w: Tensor, u: Tensor) -> Tensor:
    return (X_VAL @ w - Y_VAL).square().mean()


def made(
    inner_loss: Callable[..., Tensor] = inner,
    outer_loss: Callable[..., Tensor] = outer,
    hparams: Any = PENALTY,
    params: Tensor = START,
    solver: bl.InnerSolver | None = None,
) -> Planted:
    return bl.BilevelProblem(inner_loss, outer_loss, params), hparams, solver


# Derivatives that are wrong -----------------------------------------------------------------------------------------


class WrongSquares(torch.autograd.Function):
    """The sum of squares, whose backward forgets the factor 2."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.square().sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0]


def wrong_inner_gradient() -> Planted:
    return made(lambda w, u: fit(w) + u.exp() * WrongSquares.apply(w))


def wrong_outer_gradient() -> Planted:
    return made(outer_loss=lambda w, u: WrongSquares.apply(X_VAL @ w - Y_VAL) / 20)


class ConstantBackward(torch.autograd.Function):
    """The sum of fourth powers, whose first derivative is right and whose second is missing."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.slope = 4 * w.detach() ** 3
        return w.pow(4).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.slope


def missing_second_derivative() -> Planted:
    return made(lambda w, u: inner(w, u) + ConstantBackward.apply(w))


class Rotated(torch.autograd.Function):
    """Half the sum of squares, with a gradient that is turned: no loss has it."""

    TURN = torch.eye(4, dtype=F64) + 0.5 * torch.triu(torch.ones(4, 4, dtype=F64), 1)

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return 0.5 * w.square().sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * (Rotated.TURN @ ctx.saved_tensors[0])


def asymmetric_hessian() -> Planted:
    return made(lambda w, u: inner(w, u) + Rotated.apply(w))


class OnlyOnce(torch.autograd.Function):
    """Squares, marked as differentiable once."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * 2 * ctx.saved_tensors[0]


def differentiable_once() -> Planted:
    return made(lambda w, u: fit(w) + u.exp() * OnlyOnce.apply(w))


# Hyperparameters that do not arrive ---------------------------------------------------------------------------------


def detached_hyperparameter() -> Planted:
    hparams = {"penalty": PENALTY, "shift": torch.tensor(0.2, dtype=F64)}
    return made(
        lambda w, u: fit(w) + u["penalty"].detach().exp() * w.square().sum() + u["shift"] * w.sum(), outer, hparams
    )


def half_detached_hyperparameter() -> Planted:
    return made(lambda w, u: fit(w) + (u.exp() * u.detach().exp()) * w.square().sum())


def hyperparameter_as_a_number() -> Planted:
    return made(lambda w, u: fit(w) + (u[0].item() ** 2 + u[1].exp()) * w.square().sum(), outer, PENALTIES[:2])


def hyperparameter_without_influence() -> Planted:
    return made(lambda w, u: fit(w) + (u[:3].exp() * w[:3].square()).sum() + 0.0 * u[3], outer, PENALTIES)


def hyperparameter_of_the_outer_constant() -> Planted:
    return made(lambda w, u: inner(w, u[0]), lambda w, u: outer(w, u) + u[1].square(), PENALTIES[:2])


# Losses that are no functions ---------------------------------------------------------------------------------------


def active_dropout() -> Planted:
    return made(lambda w, u: (X @ torch.nn.functional.dropout(w, 0.5) - Y).square().mean() + u.exp() * w.square().sum())


def reshuffled_data() -> Planted:
    def batch_loss(w: Tensor, u: Tensor) -> Tensor:
        rows = torch.randperm(30)[:10]
        return (X[rows] @ w - Y[rows]).square().mean() + u.exp() * w.square().sum()

    return made(batch_loss)


def counter() -> Planted:
    calls = itertools.count()
    return made(lambda w, u: fit(w) + (u.exp() + 0.01 * next(calls)) * w.square().sum())


def slow_counter() -> Planted:
    calls = itertools.count()
    return made(lambda w, u: fit(w) + (u.exp() + 0.5 * (next(calls) > 300)) * w.square().sum())


def running_statistics() -> Planted:
    mean = torch.zeros(4, dtype=F64)

    def loss(w: Tensor, u: Tensor) -> Tensor:
        mean.lerp_(w.detach(), 0.1)
        return fit(w) + u.exp() * (w - mean).square().sum()

    return made(loss)


# Inner problems without a solution map ------------------------------------------------------------------------------


def indefinite_hessian() -> Planted:
    curved = torch.tensor([1.0, 2.0, 3.0, -0.5], dtype=F64)
    return made(lambda w, u: 0.5 * (curved * w * w).sum() + u * w.sum(), solver=bl.GradientDescent(0.1, steps=20))


def saddle() -> Planted:
    """Steps converge to a saddle, as they start on its ridge."""
    return made(
        lambda w, u: w[:3].square().sum() + 0.25 * (w[3] ** 2 - 1) ** 2 + u * w[:3].sum(),
        params=torch.tensor([0.3, 0.3, 0.3, 0.0], dtype=F64),
        solver=bl.GradientDescent(0.1, steps=400),
    )


def singular_hessian() -> Planted:
    return made(lambda w, u: (X[:, :3] @ w[:3] - Y).square().mean() + u.exp() * w[:3].square().sum())


def loss_with_a_jump() -> Planted:
    return made(lambda w, u: inner(w, u) + 0.1 * (4 * w).round().square().sum())


def rounded_hyperparameter() -> Planted:
    return made(lambda w, u: fit(w) + ((4 * u).round() / 4).exp() * w.square().sum() + 0.01 * u.exp() * w.sum())


# Operations, numbers and steps --------------------------------------------------------------------------------------


def attention_without_double_backward() -> Planted:
    tokens = normal(6, 1, 2, 5, 4)

    def attended(w: Tensor, u: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(tokens * w, tokens, tokens)
        return (out - 0.1).square().mean() + u.exp() * w.square().sum()

    return made(attended)


def in_place() -> Planted:
    def loss(w: Tensor, u: Tensor) -> Tensor:
        z = (X @ w).exp()
        total = z.sum()
        z.mul_(2.0)
        return (total - z.square().mean()).square() + u.exp() * w.square().sum()

    return made(loss)


def log_of_zero() -> Planted:
    return made(lambda w, u: fit(w) - w.log().sum() + u.exp() * w.square().sum(), params=torch.zeros(4, dtype=F64))


def infinite_slope() -> Planted:
    return made(lambda w, u: inner(w, u) + w.square().sum().sqrt(), params=torch.zeros(4, dtype=F64))


def step_size_too_large() -> Planted:
    return made(solver=bl.GradientDescent(1.2, steps=12))


def expanding_update() -> Planted:
    target = normal(7, 4)

    def update(w: Tensor, u: Tensor) -> Tensor:
        return target + 1.3 * (w - u.exp() * target)

    return bl.BilevelProblem.from_fixed_point(update, outer, START), PENALTY, bl.FixedPoint(update, steps=5)


def cancellation() -> Planted:
    single = [part.float() for part in (X, Y, X_VAL, Y_VAL, START, PENALTY)]
    x, y, x_val, y_val, start, penalty = single
    problem = bl.BilevelProblem(
        lambda w, u: ((x @ w + 1e5) - (y + 1e5)).square().mean() + u.exp() * w.square().sum(),
        lambda w, u: (x_val @ w - y_val).square().mean(),
        start,
    )
    return problem, penalty, None


def wrong_sign() -> Planted:
    gradient = torch.func.grad(inner)
    problem = bl.BilevelProblem(outer_loss=outer, params=START, optimality=lambda w, u: -gradient(w, u))
    return problem, PENALTY, bl.GradientDescent(0.05, steps=20)


def forgetful_sampler() -> Planted:
    class Reshuffling:
        def __call__(self, step: int) -> Tensor:
            return torch.randperm(30)[:10]

        def full(self) -> Tensor:
            return torch.arange(30)

    problem = bl.BilevelProblem(
        lambda w, u, rows: (X[rows] @ w - Y[rows]).square().mean() + u.exp() * w.square().sum(),
        outer,
        START,
        sampler=Reshuffling(),
    )
    return problem, PENALTY, bl.GradientDescent(0.1, steps=50)


FAULTS: list[tuple[str, Callable[[], Planted], tuple[str, ...]]] = [
    ("wrong inner gradient", wrong_inner_gradient, ("inner gradient", "differs from differences of its values")),
    ("wrong outer gradient", wrong_outer_gradient, ("outer gradient", "differs from differences of its values")),
    ("missing second derivative", missing_second_derivative, ("second derivatives", "not differentiable itself")),
    ("asymmetric Hessian", asymmetric_hessian, ("symmetry", "not symmetric")),
    ("differentiable once", differentiable_once, ("@once_differentiable",)),
    ("detached hyperparameter", detached_hyperparameter, ("hparams['penalty']", "detached")),
    ("half detached hyperparameter", half_detached_hyperparameter, ("second derivatives", "`hparams`", "detached")),
    ("hyperparameter as a number", hyperparameter_as_a_number, ("hparams[0]", "turned into a number")),
    ("hyperparameter without influence", hyperparameter_without_influence, ("hparams[3]", "no influence")),
    ("hyperparameter of the outer constant", hyperparameter_of_the_outer_constant, ("hparams[1]", "only adds")),
    ("active dropout", active_dropout, ("inputs", "`inner_loss` draws random numbers")),
    ("reshuffled data", reshuffled_data, ("inputs", "`inner_loss` draws random numbers", "sampler")),
    ("counter", counter, ("inputs", "a counter")),
    ("slow counter", slow_counter, ("determinism", "a counter")),
    ("running statistics", running_statistics, ("inputs", "writes into `mean`")),
    ("indefinite Hessian", indefinite_hessian, ("curvature", "eigenvalue -0.5", "damping above 0.5")),
    ("saddle", saddle, ("curvature", "eigenvalue -1", "damping above 1")),
    ("singular Hessian", singular_hessian, ("curvature", "singular", "not unique")),
    ("loss with a jump", loss_with_a_jump, ("jumps", "the inner loss jumps", "as params move")),
    ("rounded hyperparameter", rounded_hyperparameter, ("jumps", "as hparams move")),
    ("attention", attention_without_double_backward, ("scaled_dot_product", "SDPBackend.MATH")),
    ("in place", in_place, ("in place", "the result of Exp")),
    ("log of zero", log_of_zero, ("inputs", "`log` made")),
    ("infinite slope", infinite_slope, ("inputs", "the derivative of `Sqrt`")),
    ("step size too large", step_size_too_large, ("contraction", "stability limit")),
    ("expanding update", expanding_update, ("curvature", "the update expands")),
    ("cancellation", cancellation, ("precision", "cancellation")),
    ("wrong sign", wrong_sign, ("curvature", "sign is wrong")),
    ("forgetful sampler", forgetful_sampler, ("inputs", "the sampler returns another batch")),
]
"""(name, function that makes (problem, hparams, solver or None), words that the report must contain)."""
