"""Losses of generalised linear models: what `LinearModelProblem` needs to know of a row's predictions and its target.

A loss of one's own is a subclass of `GLMLoss` with three methods: value, slope and curvature. Its problem is a subclass
of `LinearModelProblem` whose class attribute `glm` is the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel.core.options import check_fields, is_positive, option
from bilevel.oracles.error_model import LossConstants
from bilevel.problems.glm_loss import GLMLoss as GLMLoss
from bilevel.problems.glm_loss import Response
from bilevel.problems.glm_loss import Targets as Targets
from bilevel.problems.splits import Split, class_labels, signs, training_classes


class Squared(GLMLoss):
    """``1/2 (z - y)^2``.

    >>> Squared().value(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
    tensor([0.5000, 2.0000])
    """

    max_curvature = 1.0
    constants = LossConstants(curvature=1.0, concordance=0.0, third=0.0, slope=1.0)
    quadratic = True

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z - y).square()

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return z - y

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(z)

    def hessian_product(self, curvature: Tensor, dz: Tensor) -> Tensor:
        return dz

    def response(self, y: Tensor, outputs: int | None) -> Response:
        return Response(_same, torch.ones_like, target=y)

    def third(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def constant_prediction(self, y: Tensor) -> Tensor:
        return y.mean()

    def scores(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> dict[str, float]:
        return {"r2": r_squared(z, y, weights)}


class Logistic(GLMLoss):
    """``log(1 + exp(-y z))`` for labels y of -1 and +1.

    Constants: ``|sigma''| <= sigma'`` and ``|sigma''| <= 1 / (6 sqrt 3)`` (Bach 2010).

    >>> Logistic().slope(torch.zeros(2), torch.tensor([-1.0, 1.0]))
    tensor([ 0.5000, -0.5000])
    """

    max_curvature = 0.25
    constants = LossConstants(curvature=0.25, concordance=1.0, third=1.0 / (6.0 * math.sqrt(3.0)), slope=0.25)
    likelihood = True
    separable = True

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return softplus(-y * z)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return -y * torch.sigmoid(-y * z)

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def response(self, y: Tensor, outputs: int | None) -> Response:
        return Response(torch.sigmoid_, _bernoulli, sign=-y, value=softplus)

    def third(self, z: Tensor, y: Tensor) -> Tensor:
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        return p * q * (q - p)

    def encode(self, splits: Mapping[str, Split]) -> Targets:
        return signs(splits, "LogisticProblem")

    def constant_prediction(self, y: Tensor) -> Tensor:
        return torch.logit((y > 0).to(y.dtype).mean())

    def scores(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> dict[str, float]:
        return {"accuracy": mean_of(z * y > 0, weights)}


class Softmax(GLMLoss):
    """``logsumexp(z) - z[y]`` for labels y of 0, 1, ..., with a prediction for each class.

    Constants: the third cumulant of (a, v, d) is at most range(v) sd(a) sd(d); Popoviciu bounds the deviations.

    >>> Softmax().slope(torch.zeros(2, 1), torch.tensor([1]))
    tensor([[ 0.5000],
            [-0.5000]])
    """

    max_curvature = 0.5
    constants = LossConstants(curvature=0.5, concordance=1.0, third=1.0 / (2.0 * math.sqrt(2.0)), slope=0.25)
    likelihood = True
    separable = True

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.logsumexp(z, -2) - z.gather(-2, _index(z, y)).squeeze(-2)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        label = _index(z, y)
        return torch.softmax(z, -2).scatter_add(-2, label, z.new_full((), -1.0).expand_as(label))

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ``p = softmax(z)``."""
        return torch.softmax(z, -2)

    def response(self, y: Tensor, outputs: int | None) -> Response:
        unit = torch.arange(outputs or 0, device=y.device)[:, None] == y
        return Response(_softmax_, _same, target=unit)

    def hessian_product(self, curvature: Tensor, dz: Tensor) -> Tensor:
        """Return ``(diag(p) - p p') dz`` in every row."""
        curvature = curvature if curvature.shape == dz.shape else curvature.expand_as(dz)
        return torch._softmax_backward_data(dz, curvature, -2, dz.dtype)

    def curvature_norm(self, z: Tensor, y: Tensor) -> Tensor:
        """Return a variance over a range of one: at most 1/4, and the probability outside the likeliest class."""
        return (1.0 - torch.softmax(z, -2).amax(-2)).clamp(0.0, 0.25)

    def encode(self, splits: Mapping[str, Split]) -> Targets:
        classes = training_classes(splits["train"])
        return {name: class_labels(split, classes) for name, split in splits.items()}

    def outputs(self, y: Tensor) -> int:
        return int(y.max()) + 1

    def curvature_at_zero(self, outputs: int) -> float:
        """``(C - 1) / C^2`` for C classes."""
        return (outputs - 1) / outputs**2

    def constant_prediction(self, y: Tensor) -> Tensor:
        return (torch.bincount(y).double() / len(y)).log()

    def scores(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> dict[str, float]:
        return {"accuracy": mean_of(z.argmax(0) == y, weights)}


class Poisson(GLMLoss):
    """``exp(z) - y z + y log y - y``, half the deviance of counts or rates ``y >= 0`` whose expectation is ``exp(z)``.

    Its curvature ``exp(z)`` has no bound, so no step size is safe everywhere, and errors are estimated, not bounded.

    >>> Poisson().value(torch.zeros(2), torch.tensor([0.0, 1.0]))
    tensor([1., 0.])
    """

    likelihood = True

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return z.exp() - y * z + (torch.xlogy(y, y) - y)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return z.exp() - y

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return z.exp()

    def response(self, y: Tensor, outputs: int | None) -> Response:
        return Response(torch.exp_, _same, target=y)

    def third(self, z: Tensor, y: Tensor) -> Tensor:
        return z.exp()

    def encode(self, splits: Mapping[str, Split]) -> Targets:
        for name, split in splits.items():
            if bool((split.y < 0).any()):
                row = int((split.y < 0).nonzero()[0])
                raise ValueError(
                    f"y_{name} is negative ({split.y[row].item():g} in row {row + 1}): PoissonProblem takes counts or "
                    "rates, from 0 on."
                )
        if not bool(splits["train"].y.any()):
            raise ValueError("y_train is all zeros: the logarithm of their mean, which PoissonProblem fits, is -inf.")
        return super().encode(splits)

    def constant_prediction(self, y: Tensor) -> Tensor:
        return y.mean().log()

    def scores(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> dict[str, float]:
        """Return D^2, the share of the deviance that is explained; NaN where a constant explains all."""
        constant = torch.tensor(mean_of(y, weights), dtype=torch.float64).log().to(z)
        alone = mean_of(self.value(constant.expand_as(y), y), weights)
        return {"d2": 1.0 - mean_of(self.value(z, y), weights) / alone if alone > 0 else math.nan}


class SquaredHinge(GLMLoss):
    """``1/2 max(0, 1 - y z)^2`` for labels y of -1 and +1: the loss of an L2 support vector machine.

    The curvature jumps from one to zero at the margin: no bound of errors is proved, they are estimated.

    >>> SquaredHinge().value(torch.tensor([0.5, 3.0]), torch.tensor([-1.0, 1.0]))
    tensor([1.1250, 0.0000])
    """

    max_curvature = 1.0
    separable = True

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (1.0 - y * z).relu().square()

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return -y * (1.0 - y * z).relu()

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return (y * z < 1.0).to(z.dtype)

    def response(self, y: Tensor, outputs: int | None) -> Response:
        return Response(_hinge_, _positive, sign=-y)

    def encode(self, splits: Mapping[str, Split]) -> Targets:
        return signs(splits, "SquaredHingeProblem")

    def constant_prediction(self, y: Tensor) -> Tensor:
        return y.mean()

    def scores(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> dict[str, float]:
        return {"accuracy": mean_of(z * y > 0, weights)}


@dataclass(frozen=True)
class Huber(GLMLoss):
    """``1/2 r^2`` of residuals ``r = z - y`` up to a width, and ``width |r| - width^2 / 2`` beyond (Huber 1964).

    The curvature jumps from one to zero at the width: no bound of errors is proved, they are estimated.

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


def _index(z: Tensor, y: Tensor) -> Tensor:
    """Return labels in a shape that gathers from predictions of shape (..., classes, rows)."""
    return y[None] if z.dim() == 2 else y.expand(*z.shape[:-2], z.shape[-1]).unsqueeze(-2)


def mean_of(values: Tensor, weights: Tensor | None) -> float:
    """Return the weighted mean of values of rows."""
    values = values.double()
    return float(values.mean() if weights is None else (values * weights).sum() / weights.sum())


def r_squared(z: Tensor, y: Tensor, weights: Tensor | None = None) -> float:
    """Return ``1 - sum_i s_i (z_i - y_i)^2 / sum_i s_i (y_i - mean(y))^2``; NaN for constant targets."""
    spread = mean_of((y - mean_of(y, weights)).square(), weights)
    return 1.0 - mean_of((z - y).square(), weights) / spread if spread > 0 else math.nan


# Of a `Response`; functions with a name, since problems that hold one are pickled.


def _same(z: Tensor) -> Tensor:
    return z


def _bernoulli(p: Tensor) -> Tensor:
    """Return the variances ``p (1 - p)``."""
    return torch.addcmul(p, p, p, value=-1.0)


def _softmax_(z: Tensor) -> Tensor:
    return torch.softmax(z, -2, out=z)


def _hinge_(z: Tensor) -> Tensor:
    return z.add_(1.0).relu_()


def _positive(p: Tensor) -> Tensor:
    return (p > 0).to(p.dtype)
