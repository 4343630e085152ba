"""A certifiable problem at fixed hyperparameters: its oracles in float64, with proved bounds of their rounding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.dense import BOUNDED
from bilevel.oracles.error_model import Certifiable, Rows, Tuned, gamma


class Instance:
    """A certifiable problem at fixed hyperparameters of any floating dtype; they are taken as exact numbers."""

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

    def hessian_product(self, z: Tensor, dz: Tensor) -> Tensor:
        """Return the second derivatives of the training losses at predictions z, applied to dz."""
        loss = self.model.loss
        return loss.hessian_product(loss.curvature(z, self.model.train.y), dz)

    def product(self, z: Tensor, v: Tensor) -> Tensor:
        """Return ``H v`` at predictions z, without blocks: for linear solves, whose error is measured afterwards."""
        self.products += 1
        if self.gram_scale is not None:
            return self.gram_scale * (self.model.train.gram @ v) + self.penalty * v
        X = self.model.train.X
        return (self.tuned.weights * self.hessian_product(z, v @ X)) @ X.t() + self.penalty * v

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
        fits = self.constants.concordance == 0 and not self.several and self.features <= min(BOUNDED, train.count)
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
        if self.features > BOUNDED:
            return self.constants.curvature * trace
        return self.constants.curvature * min(val.scaled_gram_top(inverse.sqrt()), trace)

    def in_penalties(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the squares of some params-shaped vectors over the penalties; ``0 / 0`` counts as nothing."""
        stacked = torch.stack([vector.reshape(-1) for vector in vectors])
        squares = stacked.square() * self.inverse_penalty.reshape(-1)
        return squares if self.least_penalty > 0 else torch.where(stacked == 0, 0.0, squares)

    def penalty_norms(self, vectors: Sequence[Tensor]) -> list[float]:
        """Return norms in the inverse penalties; infinite where a vector has an unpenalised part."""
        # One transfer for all of them.
        return [float(norm) for norm in self.in_penalties(vectors).sum(1).sqrt().cpu()]

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
