"""A pair of an iterate and an adjoint, evaluated with proved bounds of every rounding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.certify.instance import Instance
from bilevel.oracles.error_model import UNIT, Rows, gamma, roundings

LIBRARY = 16
"""Roundings allowed to an elementary function (exp, sigmoid) and the few operations around it."""


@dataclass(frozen=True)
class Evaluation:
    """Residuals and hypergradient of a pair (x, w), each with a bound of its rounding, elementwise.

    x is the inner iterate in float64, w the approximate adjoint ``H^-1 f_x``; z and v are their training predictions,
    whose rounding, for every row, is below `blur` and `blur_adjoint`. `slopes` are ``loss'(z)``, `outer` is f_x, s the
    inner gradient, r the adjoint residual ``H w - f_x``, and p is ``f_u - C' w`` over the flattened hyperparameters.
    """

    instance: Instance
    x: Tensor
    w: Tensor
    z: Tensor
    v: Tensor
    slopes: Tensor
    outer: Tensor
    s: Tensor
    s_rounding: Tensor
    r: Tensor
    r_rounding: Tensor
    p: Tensor
    p_rounding: Tensor
    blur: Tensor
    blur_adjoint: Tensor

    @cached_property
    def sizes(self) -> list[float]:
        """The norms in the inverse penalties of s, r, `s_rounding`, `r_rounding` and `outer`."""
        return self.instance.penalty_norms((self.s, self.r, self.s_rounding, self.r_rounding, self.outer))

    @cached_property
    def slopes_at(self) -> tuple[Tensor, Tensor]:
        """``|d pen / du|`` times w, and times x."""
        slope = self.instance.tuned.penalty_slope
        return slope * self.w, slope * self.x

    @cached_property
    def groups(self) -> Tensor:
        """The norms in the inverse penalties of `slopes_at`, of the part that each hyperparameter owns: (2, size)."""
        return self.instance.per_hyperparameter(self.instance.in_penalties(self.slopes_at)).sqrt()

    @property
    def by_row(self) -> bool:
        """Whether the bounds ask how far single predictions are off: all but quadratic losses of fixed weights."""
        return bool(self.instance.constants.concordance) or self.instance.tuned.weight_slope is not None


def evaluate(instance: Instance, x: Tensor, w: Tensor) -> Evaluation:
    """Return the pair (x, w) evaluated in float64: two passes over the training rows and two over the validation rows.

    Rounding is bounded by Cauchy-Schwarz on scaled features, which takes no further pass. Where the Hessian is a Gram
    matrix, no row is read, and nothing is said of rows.
    """
    if instance.gram_scale is not None:
        return _evaluate_on_gram(instance, x, w)
    model, tuned = instance.model, instance.tuned
    train, val = model.train, model.val
    both = train.predict(torch.cat((x.reshape(-1, instance.features), w.reshape(-1, instance.features))))
    half = len(both) // 2
    z, v = (both[:half], both[half:]) if instance.several else (both[0], both[1])
    slopes, curved = model.loss.slope(z, train.y), instance.hessian_product(z, v)
    sums = train.collect(torch.cat([(tuned.weights * each).reshape(-1, train.count) for each in (slopes, curved)]))
    s = sums[:half].reshape(instance.shape) + instance.penalty * x
    product = sums[half:].reshape(instance.shape) + instance.penalty * w
    z_val = instance.predict(val, x)
    slopes_val = model.loss.slope(z_val, val.y)
    outer = instance.collect(val, slopes_val / val.count)
    r = product - outer

    terms, width = LIBRARY + (len(z) if instance.several else 1), 2.0 if instance.several else 1.0
    blur, blur_adjoint, blur_val = (_blur(rows, weights) for rows, weights in ((train, x), (train, w), (val, x)))
    add, add_val = gamma(roundings(train.count) + 4), gamma(roundings(val.count) + 4)

    rate, rate_val = model.loss.curvature_norm(z, train.y), model.loss.curvature_norm(z_val, val.y)

    def slope_error(slopes: Tensor, rate: Tensor, blur: Tensor) -> Tensor:
        # Of a slope p - 1 the rounding is absolute, of all others relative.
        size = torch.where(slopes < 0, 1.0, slopes) if instance.several else slopes.abs()
        return rate * (width * blur * (width * blur).exp()) + gamma(terms) * size

    slope_errors = slope_error(slopes, rate, blur)
    turned = instance.constants.concordance * width * blur * (width * blur).exp() * instance.extent(v)
    curved_size = _largest(v) if instance.several else curved.abs()
    curved_errors = rate * (width * blur_adjoint + turned) + 2 * gamma(terms) * curved_size
    s_rounding = _collected(train, tuned.weights * (slope_errors + add * slopes.abs()))
    r_rounding = _collected(train, tuned.weights * (curved_errors + add * curved.abs()))
    r_rounding = r_rounding + _collected(
        val, (slope_error(slopes_val, rate_val, blur_val) + add_val * slopes_val.abs()) / val.count
    )
    p, p_rounding = _hypergradient(instance, x, w, v, slopes)
    if tuned.weight_slope is not None:
        # The errors of several slopes need not sum to zero: no dual norm for them.
        errors = slope_errors.sum(0) if instance.several else slope_errors
        rows = errors * _largest(v) + width * instance.dual(slopes) * blur_adjoint
        p_rounding = p_rounding + instance.per_row(tuned.weight_slope.abs() * rows)
    small = 8 * UNIT
    s_rounding = s_rounding.reshape(instance.shape) + small * (instance.penalty * x.abs() + s.abs())
    r_rounding = r_rounding.reshape(instance.shape) + small * (instance.penalty * w.abs() + outer.abs() + r.abs())
    sides = (s, s_rounding, r, r_rounding, p, p_rounding)
    return Evaluation(instance, x, w, z, v, slopes, outer, *sides, blur, blur_adjoint)


def _evaluate_on_gram(instance: Instance, x: Tensor, w: Tensor) -> Evaluation:
    """Evaluate a pair of a quadratic problem in the space of its weights."""
    train, val, scale = instance.model.train, instance.model.val, instance.gram_scale
    assert scale is not None
    pair = torch.stack((x, w))
    products, rounded = train.on_gram(pair)
    turned, rounded_val = val.on_gram(x[None])
    outer = turned[0] - val.moment
    products, pulls = scale * products, instance.penalty * pair
    rights = torch.stack((scale * train.moment, outer))
    residuals = products - rights + pulls
    sizes = products.abs() + rights.abs() + pulls.abs() + residuals.abs()
    s_rounding, r_rounding = (1 + 8 * UNIT) * scale * rounded + 8 * UNIT * sizes
    none = x.new_zeros(0)
    p, p_rounding = _hypergradient(instance, x, w, none, none)
    r_rounding = r_rounding + (1 + 8 * UNIT) * rounded_val[0]
    sides = (residuals[0], s_rounding, residuals[1], r_rounding, p, p_rounding)
    return Evaluation(instance, x, w, none, none, none, outer, *sides, none, none)


def _blur(rows: Rows, W: Tensor) -> Tensor:
    """Bound the rounding of the predictions of W, the largest over the classes of every row."""
    features = W.shape[-1]
    length = torch.linalg.vector_norm(W.reshape(-1, features) * rows.columns, dim=1).max()
    return gamma(roundings(features) + 4) * length * rows.scaled_lengths


def _collected(rows: Rows, errors: Tensor) -> Tensor:
    """Bound ``sum_i |a_ij| errors_i`` for every feature."""
    return torch.linalg.vector_norm(errors.reshape(-1, rows.count), dim=1)[:, None] * rows.columns


def _largest(v: Tensor) -> Tensor:
    return v.abs().amax(0) if v.dim() > 1 else v.abs()


def _hypergradient(instance: Instance, x: Tensor, w: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``-C' w`` and a bound of the rounding of its sums."""
    tuned = instance.tuned
    terms = (tuned.penalty_slope * x * w).reshape(-1)
    total, size = instance.per_hyperparameter(torch.stack((terms, terms.abs())))
    p, rounding = -total, gamma(x.numel() + LIBRARY) * size
    if tuned.weight_slope is not None:
        products = slopes * v
        by_row = tuned.weight_slope * (products.sum(0) if instance.several else products)
        row_size = tuned.weight_slope.abs() * (products.abs().sum(0) if instance.several else products.abs())
        p = p - instance.per_row(by_row)
        rounding = rounding + gamma(len(by_row) + x.numel() + LIBRARY) * instance.per_row(row_size)
    return p, rounding
