"""`GLMLoss`: a loss of a row's prediction and its target, with its derivatives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.core.declared import given_after
from bilevel.oracles.error_model import LossConstants
from bilevel.problems.splits import Split

Targets = Mapping[str, Tensor]
"""Targets by the name of their part of the data, "train" among them."""


@dataclass(frozen=True)
class Response:
    """``slope = sign (response(sign z) - target)``, the form that steps on few data take the slopes in.

    Attributes:
        apply: turns ``sign z`` into the response, in place.
        curvature: the response -> what `GLMLoss.curvature` returns.
        sign: of every row, (rows,), 1 or -1; None for 1.
        target: shaped as z; None for 0.
        value: ``sign z`` -> the losses, shaped as z; None where `GLMLoss.value` has to say it.
    """

    apply: Callable[[Tensor], object]
    curvature: Callable[[Tensor], Tensor]
    sign: Tensor | None = None
    target: Tensor | None = None
    value: Callable[[Tensor], Tensor] | None = None


class GLMLoss(ABC):
    """A convex loss of a row's prediction z and target y, with its derivatives by z.

    Predictions have the shape (..., rows), those of several for each row (..., outputs, rows); targets have the shape
    (rows,) or (..., rows). Leading dimensions are those of problems side by side. A loss knows no data: what it holds
    are its own constants.
    """

    max_curvature: ClassVar[float] = math.inf
    """Largest eigenvalue of ``loss''`` over all predictions and targets: automatic step sizes are safe with it.

    Where it is infinite, no step size is safe, and solvers refuse to choose one.
    """
    constants: ClassVar[LossConstants | None] = None
    """Proved constants, for error bounds; None where there are none: errors are estimated then."""
    quadratic: ClassVar[bool] = False
    """Whether the loss is quadratic in the predictions."""
    likelihood: ClassVar[bool] = False
    """Whether it is a negative log likelihood, which has a unit of its own: criteria measure others by a constant's."""
    separable: ClassVar[bool] = False
    """Whether targets are classes whose loss vanishes where predictions separate them far enough."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A response that is inherited knows nothing of slopes that are not.
        if given_after(cls, ("value", "slope", "curvature", "hessian_product"), "response"):
            cls.response = GLMLoss.response  # type: ignore[method-assign]

    @abstractmethod
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the loss of every row, of shape (..., rows)."""

    @abstractmethod
    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the derivatives of the losses by z, shaped as z."""

    @abstractmethod
    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the second derivatives by z; of several predictions, what `hessian_product` needs, shaped as z."""

    def response(self, y: Tensor, outputs: int | None) -> Response | None:
        """Return the slopes and curvatures in another form, for encoded targets of one problem; None for none."""
        return None

    def hessian_product(self, curvature: Tensor, dz: Tensor) -> Tensor:
        """Return ``loss'' dz``, shaped as z, from what `curvature` has returned; several predictions override it."""
        return curvature * dz

    def third(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the third derivatives of one prediction by z, shaped as z; by default, autograd's of `curvature`.

        They are zero where the curvature is constant in pieces.

        Raises:
            ValueError: where autograd cannot differentiate the curvature.
        """
        with torch.enable_grad():
            try:
                z = z.detach().requires_grad_()
                curvature = self.curvature(z, y)
                return torch.autograd.grad(curvature.sum(), z)[0] if curvature.requires_grad else torch.zeros_like(z)
            except RuntimeError as error:
                name = type(self).__name__
                raise ValueError(
                    f"{name} has no third derivative, as autograd cannot differentiate {name}.curvature: write "
                    f"{name}.third(z, y), or use K-fold."
                ) from error

    def curvature_norm(self, z: Tensor, y: Tensor) -> Tensor:
        """Return, for every row, how fast the slope changes with the range of the predictions, for error bounds."""
        return self.curvature(z, y)

    def encode(self, splits: Mapping[str, Split]) -> Targets:
        """Return the targets of every part as `value` takes them; the default makes them floating.

        Raises:
            ValueError: in one sentence, for targets that the loss is not made for.
        """
        return {name: split.y.to(split.X.dtype) for name, split in splits.items()}

    def outputs(self, y: Tensor) -> int | None:
        """Return how many predictions a row has, given the encoded training targets; None (the default) for one."""
        return None

    def curvature_at_zero(self, outputs: int) -> float | None:
        """Return the curvature in each of several predictions where all are zero; None where they differ."""
        return None

    def typical_curvature(self, y: Tensor, outputs: int | None) -> float:
        """Return the curvature that scales of penalties are measured by: the largest, or that of a constant prediction.

        Args:
            y: the encoded training targets.
            outputs: predictions for each row.
        """
        at_zero = None if outputs is None else self.curvature_at_zero(outputs)
        if at_zero is not None or self.max_curvature < math.inf:
            return self.max_curvature if at_zero is None else at_zero
        z = self.constant_prediction(y)
        return 1.0 if z is None else float(self.curvature(z.expand(y.shape), y).mean())

    def constant_prediction(self, y: Tensor) -> Tensor | None:
        """Return the prediction, of shape () or (outputs,), with the least loss of all constants; None: not known."""
        return None

    def scores(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> dict[str, float]:
        """Return figures of merit of one problem's predictions besides the loss, of weighted rows; none by default."""
        return {}
