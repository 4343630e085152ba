"""RMSprop (Tieleman & Hinton 2012), differentiable everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.core.options import is_bool, is_positive, option
from bilevel.inner.elementwise import (
    ElementwiseSolver,
    Parts,
    Value,
    accepts_lr,
    mean_of_squares,
    minus_quotient,
    plus,
    safe_sqrt,
)
from bilevel.inner.tuned import Option


@accepts_lr
@dataclass(frozen=True)
class RMSprop(ElementwiseSolver):
    """Gradient descent with a running root mean square, equal to ``torch.optim.RMSprop`` step for step.

        g <- grad(x) + d x,   v <- a v + (1 - a) g^2,   x <- x - h g / (sqrt(v) + eps)

    With ``centered`` the square root is of ``v - c^2`` with ``c <- a c + (1 - a) g``; with momentum
    ``b <- m b + g / (sqrt(v) + eps)`` and ``x <- x - h b``. Where the square root has no derivative, at zero, it is
    taken as zero. With a constant step size the iterates end in a cycle of its size about a minimum.

    Args:
        step_size: h, or ``lr``; a positive number, or a function of the hyperparameters (see `ElementwiseSolver`).
        alpha: a in [0, 1), or a function likewise.
        eps: positive.
        weight_decay: d, not negative, or a function likewise.
        momentum: m in [0, 1), or a function likewise.
        centered: divide by the standard deviation of the gradient.

    >>> RMSprop(alpha=0.9, steps=200).step_size
    0.01
    """

    step_size: Option = 1e-2
    alpha: Option = 0.99
    eps: float = option(1e-8, "a positive number", is_positive)
    weight_decay: Option = 0.0
    momentum: Option = 0.0
    centered: bool = option(False, "a bool", is_bool)

    def options(self) -> dict[str, Option]:
        names = ("alpha", "weight_decay", "momentum")
        return super().options() | {name: getattr(self, name) for name in names}

    def vectors(self) -> tuple[str, ...]:
        return ("square", *(("mean",) if self.centered else ()), *(("buffer",) if self.momentum else ()))

    def move(
        self, x: Tensor, gradient: Tensor, parts: Parts, options: Mapping[str, Value], index: Any
    ) -> tuple[Tensor, Parts]:
        alpha, step_size = options["alpha"], options["step_size"]
        gradient = plus(gradient, options["weight_decay"], x)
        square = variance = mean_of_squares(parts["square"], alpha, gradient)
        moved = {"square": square}
        if self.centered:
            mean = moved["mean"] = torch.lerp(parts["mean"], gradient, 1 - alpha)
            variance = torch.addcmul(square, mean, mean, value=-1)
        below = safe_sqrt(variance) + self.eps
        if not self.momentum:
            return minus_quotient(x, step_size, gradient, below), moved
        buffer = moved["buffer"] = torch.addcdiv(options["momentum"] * parts["buffer"], gradient, below)
        return plus(x, -step_size, buffer), moved
