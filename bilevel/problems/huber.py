"""Huber regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bilevel.core.options import check_fields, is_positive, option
from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.losses import GLMLoss, r_squared


@dataclass(frozen=True)
class Huber(GLMLoss):
    """``1/2 r^2`` of residuals ``r = z - y`` up to a width, and ``width |r| - width^2 / 2`` beyond (Huber 1964).

    The curvature jumps from one to zero at the width: no bound of errors is proved, they are estimated.

    >>> import torch
    >>> Huber(1.0).value(torch.tensor([0.5, 3.0]), torch.zeros(2))
    tensor([0.1250, 2.5000])
    """

    width: float = option(1.0, "a positive number", is_positive)

    max_curvature: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """``s (r - s / 2)`` with s the slope."""
        s = self.slope(z, y)
        return s * (z - y - 0.5 * s)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).clamp(-self.width, self.width)

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return ((z - y).abs() <= self.width).to(z.dtype)

    def scores(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> dict[str, float]:
        return {"r2": r_squared(z, y, weights)}


class HuberProblem(LinearModelProblem):
    """Regression with the Huber loss and tuned penalties: rows far off pull no harder than those at the width.

        inner   c sum_i h(x_i'w - y_i) + 1/2 sum_j pen_j w_j^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/m sum_i h(x_i'w - y_i) over the validation rows

    with ``h(r) = r^2 / 2`` up to the width and ``width |r| - width^2 / 2`` beyond. The curvature jumps where a residual
    is the width exactly: there the hypergradient has two sides, and near it an error is an estimate.

    Options are those of `LinearModelProblem`, and `width`: up to which residuals count in squares, in units of the
    targets.

    >>> import torch
    >>> X, y = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0.5, 9.0], dtype=torch.float64)
    >>> problem = HuberProblem(X, y, X, y, width=1.5)
    >>> problem.bind(problem.initial_hparams()).grad(torch.zeros(1, dtype=torch.float64))
    tensor([-1.], dtype=torch.float64)
    """

    task = "regression"

    # The data's arguments are written out in each class: configs read names and defaults off a signature.
    def __init__(
        self,
        X_train: Any,
        y_train: Any,
        X_val: Any,
        y_val: Any,
        penalty: str = "scalar",
        *,
        width: float = 1.0,
        X_test: Any = None,
        y_test: Any = None,
        loss: str = "mean",
        parametrization: str = "log",
        **unknown: Any,
    ) -> None:
        self.glm = Huber(width)
        super().__init__(
            *(X_train, y_train, X_val, y_val, penalty),
            X_test=X_test,
            y_test=y_test,
            loss=loss,
            parametrization=parametrization,
            **unknown,
        )
