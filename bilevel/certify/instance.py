"""A certifiable problem at fixed hyperparameters: its oracles in float64, with proved bounds of their rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.error_model import MAX_DENSE, UNIT, Certifiable, Rows, Tuned, gamma, roundings

LIBRARY = 16
"""Roundings allowed to an elementary function (exp, sigmoid) and the few operations around it."""


class Instance:
    """A certifiable problem at fixed hyperparameters.

    Args:
        model: what the problem tells of itself.
        hparams: hyperparameters of any floating dtype; they are taken as exact numbers.
    """

    def __init__(self, model: Certifiable, hparams: Tree) -> None:
        self.model = model
        self.constants = model.constants
        self.tuned: Tuned = model.tuned(tree.tree_map(lambda leaf: leaf.detach().double(), hparams))
        self.penalty = self.tuned.penalty
        self.shape = self.penalty.shape
        self.features = self.shape[-1]
        self.several = len(self.shape) > 1
        self.owner = self.tuned.penalty_owner.reshape(-1)
        self.products = 0

    @cached_property
    def least_penalty(self) -> float:
        """The smallest penalty; zero where a weight is unpenalised."""
        return float(self.penalty.min())

    @cached_property
    def steepest(self) -> float:
        """The largest ``|d pen_j / du|``."""
        return float(self.tuned.penalty_slope.abs().max())

    @cached_property
    def inverse_penalty(self) -> Tensor:
        """``1 / pen`` as (classes, features); infinite where a weight is unpenalised."""
        return self.penalty.reshape(-1, self.features).reciprocal()

    def predict(self, rows: Rows, W: Tensor) -> Tensor:
        """Return the predictions of weights W, in the shape that the loss takes."""
        z = rows.predict(W.reshape(-1, self.features))
        return z if self.several else z[0]

    def training_predictions(self, x: Tensor) -> Tensor:
        """Return the training predictions of x; none where the Hessian is a Gram matrix, which needs none."""
        return x.new_zeros(0) if self.gram_scale is not None else self.predict(self.model.train, x)

    def collect(self, rows: Rows, S: Tensor) -> Tensor:
        """Return ``sum_i S_i a_i``, shaped as params."""
        return rows.collect(S.reshape(-1, rows.count)).reshape(self.shape)

    def gradient(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the inner gradient at x, whose predictions are z."""
        if self.gram_scale is not None:
            train = self.model.train
            return self.gram_scale * (train.gram @ x - train.moment) + self.penalty * x
        slopes = self.model.loss.slope(z, self.model.train.y)
        return self.collect(self.model.train, self.tuned.weights * slopes) + self.penalty * x

    def turned(self, z: Tensor, dz: Tensor) -> Tensor:
        """Return the second derivatives of the training losses at predictions z, applied to dz."""
        loss = self.model.loss
        return loss.hessian_product(loss.curvature(z, self.model.train.y), dz)

    def product(self, z: Tensor, v: Tensor) -> Tensor:
        """Return ``H v`` at predictions z, without blocks: for linear solves, whose error is measured afterwards."""
        self.products += 1
        if self.gram_scale is not None:
            return self.gram_scale * (self.model.train.gram @ v) + self.penalty * v
        X = self.model.train.X
        return (self.tuned.weights * self.turned(z, v @ X)) @ X.t() + self.penalty * v

    def outer_gradient(self, x: Tensor) -> Tensor:
        """Return the outer gradient at x."""
        val = self.model.val
        if self.gram_scale is not None:
            return val.gram @ x - val.moment
        return self.collect(val, self.model.loss.slope(self.predict(val, x), val.y) / val.count)

    def extent(self, v: Tensor) -> Tensor:
        """Return the range of every row's predictions: the absolute value of one, ``max - min`` of several."""
        return v.amax(0) - v.amin(0) if self.several else v.abs()

    def dual(self, slopes: Tensor) -> Tensor:
        """Return the dual norm of every row's slopes, which sum to zero where there are several."""
        return 0.5 * slopes.abs().sum(0) if self.several else slopes.abs()

    @cached_property
    def gram_scale(self) -> float | None:
        """The data part of the Hessian in units of the Gram matrix, where it is a multiple; None elsewhere."""
        train, weights = self.model.train, self.tuned.weights
        fits = self.constants.concordance == 0 and not self.several and self.features <= min(MAX_DENSE, train.count)
        return float(weights[0]) * train.count if fits and self.tuned.weight_slope is None else None

    @cached_property
    def row_squares(self) -> Tensor:
        """Squared row norms in the inverse penalties, (classes, rows); infinite where a weight is unpenalised."""
        train = self.model.train
        if self.least_penalty == 0:
            return train.X.new_full((len(self.inverse_penalty), train.count), float("inf"))
        return train.weighted_squares(self.inverse_penalty)

    @cached_property
    def row_lengths(self) -> Tensor:
        """How far ``|e| <= 1`` in the norm of the penalties can move the range of every row's predictions."""
        squares = self.row_squares
        return squares[0].sqrt() if len(squares) == 1 else squares.topk(2, dim=0).values.sum(0).sqrt()

    @cached_property
    def outer_curvature(self) -> float:
        """Largest eigenvalue of the outer Hessian at any point, relative to the penalties: an upper bound."""
        if self.least_penalty == 0:
            return float("inf")
        rows = torch.unique(self.inverse_penalty, dim=0) if self.several else self.inverse_penalty
        return max(self._outer_curvature(row) for row in rows)

    def _outer_curvature(self, inverse: Tensor) -> float:
        """Return the bound for one class, whose inverse penalties are given."""
        val = self.model.val
        # At most a row's worth of roundings, in `mean_squares` and here.
        trace = float(torch.dot(inverse, val.mean_squares)) * (1 + 2 * gamma(val.count + self.features))
        if self.features > MAX_DENSE:
            return self.constants.curvature * trace
        return self.constants.curvature * min(val.scaled_gram_top(inverse.sqrt()), trace)

    def in_penalties(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the squares of some params-shaped vectors over the penalties; ``0 / 0`` counts as nothing."""
        stacked = torch.stack([vector.reshape(-1) for vector in vectors])
        squares = stacked.square() * self.inverse_penalty.reshape(-1)
        return squares if self.least_penalty > 0 else torch.where(stacked == 0, 0.0, squares)

    def penalty_groups(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the norms in the inverse penalties of the parts that each hyperparameter owns, row by row."""
        return self.per_hyperparameter(self.in_penalties(vectors)).sqrt()

    def penalty_norms(self, vectors: Sequence[Tensor]) -> list[float]:
        """Return norms in the inverse penalties; infinite where a vector has an unpenalised part."""
        # One transfer for all of them.
        norms = [float(norm) for norm in self.in_penalties(vectors).sum(1).sqrt().cpu()]
        return norms

    def per_hyperparameter(self, values: Tensor) -> Tensor:
        """Return the sums of rows of flat values over the weights that each hyperparameter owns."""
        return values.new_zeros(len(values), self.tuned.size).index_add(1, self.owner, values)

    @cached_property
    def largest_ratios(self) -> Tensor:
        """The largest ``|d pen_j/du| / pen_j`` over the weights that each hyperparameter owns."""
        slope = self.tuned.penalty_slope.abs()
        ratios = torch.where(slope == 0, 0.0, slope / self.penalty).reshape(-1)
        return ratios.new_zeros(self.tuned.size).scatter_reduce(0, self.owner, ratios, "amax")

    def per_row(self, values: Tensor) -> Tensor:
        """Return the sums of row values over the rows that each hyperparameter owns."""
        assert self.tuned.weight_owner is not None
        return values.new_zeros(self.tuned.size).index_add(0, self.tuned.weight_owner, values)


@dataclass(frozen=True)
class Evaluation:
    """Residuals and hypergradient of a pair (x, w), each with a bound of its rounding.

    Attributes:
        instance: the problem.
        x: inner iterate, float64, shaped as params.
        w: approximate adjoint ``H^-1 f_x``.
        z: training predictions of x.
        v: training predictions of w.
        slopes: ``loss'(z)``.
        outer: ``f_x``.
        s: inner gradient, and `s_rounding` a bound of ``|computed - exact|``, elementwise.
        r: adjoint residual ``H w - f_x``, likewise.
        p: ``p(x, w) = f_u - C' w`` over the flattened hyperparameters, likewise.
        blur: bound of the rounding of z, for every row.
        blur_adjoint: bound of the rounding of v, for every row.
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
        return self.instance.penalty_groups(self.slopes_at)

    @property
    def by_row(self) -> bool:
        """Whether the bounds ask how far single predictions are off: all but quadratic losses of fixed weights."""
        return bool(self.instance.constants.concordance) or self.instance.tuned.weight_slope is not None


def evaluate(instance: Instance, x: Tensor, w: Tensor) -> Evaluation:
    """Evaluate the pair (x, w): two passes over the training rows and two over the validation rows.

    Args:
        instance: the problem.
        x: inner iterate, float64, shaped as params.
        w: approximate adjoint, likewise.

    Returns:
        The `Evaluation`. Rounding is bounded by Cauchy-Schwarz on scaled features, which takes no further pass. Where
        the Hessian is a Gram matrix, no row is read, and nothing is said of rows.
    """
    if instance.gram_scale is not None:
        return _evaluate_on_gram(instance, x, w)
    model, tuned = instance.model, instance.tuned
    train, val = model.train, model.val
    both = train.predict(torch.cat((x.reshape(-1, instance.features), w.reshape(-1, instance.features))))
    half = len(both) // 2
    z, v = (both[:half], both[half:]) if instance.several else (both[0], both[1])
    slopes, bent = model.loss.slope(z, train.y), instance.turned(z, v)
    sums = train.collect(
        torch.cat(((tuned.weights * slopes).reshape(-1, train.count), (tuned.weights * bent).reshape(-1, train.count)))
    )
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
    bent_size = _largest(v) if instance.several else bent.abs()
    bent_errors = rate * (width * blur_adjoint + turned) + 2 * gamma(terms) * bent_size
    s_rounding = _collected(train, tuned.weights * (slope_errors + add * slopes.abs()))
    r_rounding = _collected(train, tuned.weights * (bent_errors + add * bent.abs()))
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
    return Evaluation(
        instance=instance,
        x=x,
        w=w,
        z=z,
        v=v,
        slopes=slopes,
        outer=outer,
        s=s,
        s_rounding=s_rounding.reshape(instance.shape) + small * (instance.penalty * x.abs() + s.abs()),
        r=r,
        r_rounding=r_rounding.reshape(instance.shape) + small * (instance.penalty * w.abs() + outer.abs() + r.abs()),
        p=p,
        p_rounding=p_rounding,
        blur=blur,
        blur_adjoint=blur_adjoint,
    )


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
    return Evaluation(
        instance=instance,
        x=x,
        w=w,
        z=none,
        v=none,
        slopes=none,
        outer=outer,
        s=residuals[0],
        s_rounding=s_rounding,
        r=residuals[1],
        r_rounding=r_rounding + (1 + 8 * UNIT) * rounded_val[0],
        p=p,
        p_rounding=p_rounding,
        blur=none,
        blur_adjoint=none,
    )


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
