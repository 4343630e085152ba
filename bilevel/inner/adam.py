"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), differentiable everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
class Adam(ElementwiseSolver):
    """Adam with bias correction, equal to ``torch.optim.Adam`` step for step.

        g <- grad(x) + d x,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        x <- x - h m/(1 - b1^k) / (sqrt(v/(1 - b2^k)) + eps)

    The square root has no derivative at v = 0 (a gradient that is exactly zero); there its derivative is taken as zero,
    so that no NaN appears. Adam does not converge to a tight tolerance with a constant step size: for implicit
    differentiation look at the inner residual in the certificate.

    Args:
        step_size: h, or ``lr``; a positive number, or a function of the hyperparameters (see `ElementwiseSolver`).
        betas: (b1, b2), both in [0, 1) or functions likewise.
        eps: positive.
        weight_decay: d, not negative, or a function likewise.
        amsgrad: divide by the largest v so far (Reddi et al. 2018).

    >>> Adam(step_size=0.01, steps=200).betas
    (0.9, 0.999)
    """

    betas: tuple[Option, Option] = option(
        (0.9, 0.999),
        "two numbers in [0, 1) or functions of the hyperparameters",
        lambda betas: isinstance(betas, tuple | list) and len(betas) == 2,
    )
    eps: float = option(1e-8, "a positive number", is_positive)
    weight_decay: Option = 0.0
    amsgrad: bool = option(False, "a bool", is_bool)

    decoupled: ClassVar[bool] = False
    """Whether weight decay shrinks params instead of adding to the gradient."""

    def options(self) -> dict[str, Option]:
        betas = {f"betas[{i}]": beta for i, beta in enumerate(self.betas)}
        return super().options() | betas | {"weight_decay": self.weight_decay}

    def vectors(self) -> tuple[str, ...]:
        return ("first", "second", "largest") if self.amsgrad else ("first", "second")

    def move(
        self, x: Tensor, gradient: Tensor, parts: Parts, options: Mapping[str, Value], index: Any
    ) -> tuple[Tensor, Parts]:
        b1, b2, step_size, decay = (options[name] for name in ("betas[0]", "betas[1]", "step_size", "weight_decay"))
        if self.decoupled:
            x = x * (1 - step_size * decay)
        else:
            gradient = plus(gradient, decay, x)
        # One kernel for each line of arithmetic where torch has it: on an accelerator launches are what a step costs.
        first = torch.lerp(parts["first"], gradient, 1 - b1)
        second = mean_of_squares(parts["second"], b2, gradient)
        moved = {"first": first, "second": second}
        if self.amsgrad:
            second = moved["largest"] = torch.maximum(parts["largest"], second)
        below = safe_sqrt(second) / _correction(b2, index, x) ** 0.5 + self.eps
        return minus_quotient(x, step_size / _correction(b1, index, x), first, below), moved


@accepts_lr
@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, equal to ``torch.optim.AdamW`` step for step.

        x <- (1 - h d) x,   then the step of `Adam` without weight decay

    Options are those of `Adam`.

    >>> AdamW(step_size=0.01, steps=200).weight_decay
    0.01
    """

    weight_decay: Option = 1e-2

    decoupled = True


def _correction(beta: Value, index: Any, like: Tensor) -> Any:
    """Return ``1 - beta^k`` for step k = index + 1."""
    correction = 1 - beta ** (index + 1)
    return correction.to(like.dtype) if isinstance(correction, Tensor) else correction
