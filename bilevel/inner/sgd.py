"""SGD as torch has it: gradient descent with momentum, dampening, Nesterov's form and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.core.options import is_number, option, require
from bilevel.inner.elementwise import ElementwiseSolver, Parts, Value, accepts_lr, plus
from bilevel.inner.tuned import Option


@accepts_lr
@dataclass(frozen=True)
class SGD(ElementwiseSolver):
    """Stochastic gradient descent, equal to ``torch.optim.SGD`` step for step.

        g <- grad(x) + d x,   b <- m b + (1 - a) g   (b = g in the first step),   x <- x - h b

    With ``nesterov`` the last step is ``x <- x - h (g + m b)``, and without momentum ``x <- x - h g``. The gradient is
    that of the step's batch where the problem has a sampler. `GradientDescent`, `HeavyBall` and `Nesterov` take the
    same steps without dampening and weight decay, faster and with step sizes that they measure.

    Args:
        step_size: h, or ``lr``; a positive number, or a function of the hyperparameters (see `ElementwiseSolver`).
        momentum: m in [0, 1), or a function likewise.
        dampening: a in [0, 1].
        weight_decay: d, not negative, or a function likewise.
        nesterov: take Nesterov's form; needs momentum, and no dampening.

    >>> SGD(step_size=0.1, momentum=0.9, steps=100).momentum
    0.9
    >>> tuned = SGD(step_size=lambda hparams, step: hparams["log_rates"][step].exp(), steps=10)
    """

    momentum: Option = 0.0
    dampening: float = option(0.0, "a number in [0, 1]", lambda share: is_number(share) and 0 <= share <= 1)
    weight_decay: Option = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = bool(self.momentum) and not self.dampening
        ok = isinstance(self.nesterov, bool) and (fits or not self.nesterov)
        require(self, "nesterov", "a bool, and False without momentum or with dampening", ok)

    def options(self) -> dict[str, Option]:
        return super().options() | {"momentum": self.momentum, "weight_decay": self.weight_decay}

    def vectors(self) -> tuple[str, ...]:
        return ("buffer",) if self.momentum else ()

    def move(
        self, x: Tensor, gradient: Tensor, parts: Parts, options: Mapping[str, Value], index: Any
    ) -> tuple[Tensor, Parts]:
        momentum, step_size = options["momentum"], options["step_size"]
        gradient = plus(gradient, options["weight_decay"], x)
        if not parts:
            return plus(x, -step_size, gradient), parts
        buffer = plus(momentum * parts["buffer"], self._share(index, x), gradient)
        along = plus(gradient, momentum, buffer) if self.nesterov else buffer
        return plus(x, -step_size, along), {"buffer": buffer}

    def _share(self, index: Any, like: Tensor) -> Value:
        """Return the share of the gradient that enters the momentum: all of it in the first step."""
        if isinstance(index, Tensor):
            return (1.0 - self.dampening * index.clamp(max=1)).to(like.dtype)
        return 1.0 - self.dampening if index else 1.0
