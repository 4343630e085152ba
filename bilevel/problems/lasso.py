"""Lasso and elastic net: squared loss with L1 penalties, whose kinks a proximal step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.core.options import is_number, require_value
from bilevel.core.tree import Tree
from bilevel.numerics.eigenbasis import Eigenbasis
from bilevel.numerics.elastic_net import minimise_quadratic
from bilevel.oracles import batching as batches
from bilevel.oracles.error_model import Certifiable
from bilevel.oracles.nonsmooth import L1
from bilevel.problems.data_problem import with_options_of
from bilevel.problems.ridge import RidgeProblem


@with_options_of(RidgeProblem)
class LassoProblem(RidgeProblem):
    """Lasso with tuned penalties, or an elastic net of a fixed mixture (Tibshirani 1996; Zou & Hastie 2005).

        inner   c/2 |X w - y|^2 + sum_j pen_j (r |w_j| + (1 - r)/2 w_j^2),   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/(2m) |X_val w - y_val|^2

    Hyperparameters are logarithms of the penalties, by `penalty` as those of `RidgeProblem`; with loss="mean" and one
    penalty, ``exp(u)`` and r are `alpha` and `l1_ratio` of scikit-learn's. Inner solvers are `ProximalGradient`,
    `FISTA` and `CoordinateDescent`. There is no intercept: centre X and y.

    Other options are those of `LinearModelProblem`.

    Args:
        l1_ratio: r, in (0, 1].

    >>> X = torch.eye(3, dtype=torch.float64)
    >>> y = torch.tensor([0.5, 2.0, -3.0], dtype=torch.float64)
    >>> LassoProblem(X, y, X, y, loss="sum").solve(torch.zeros((), dtype=torch.float64))
    tensor([ 0.,  1., -2.], dtype=torch.float64)
    """

    parametrizations = ("log",)

    def __init__(self, *data: Any, l1_ratio: float = 1.0, **options: Any) -> None:
        fits = is_number(l1_ratio) and 0 < l1_ratio <= 1
        require_value(f"{type(self).__name__}.l1_ratio", l1_ratio, "a number in (0, 1]", fits)
        self.l1_ratio = float(l1_ratio)
        super().__init__(*data, **options)
        shape = self._group_shape
        self.nonsmooth = L1(lambda hparams: self.l1_penalty(hparams).reshape(shape))

    def l1_penalty(self, hparams: Tensor) -> Tensor:
        """Return the weights of ``|w|`` of one problem, as many as there are penalties."""
        return self.l1_ratio * hparams.exp()

    def penalties(self, hparams: Tensor) -> Tensor:
        """Return the weights of ``w^2 / 2``, broadcastable to the weights."""
        return (1.0 - self.l1_ratio) * super().penalties(hparams)

    # What rests on a quadratic inner loss -----------------------------------------------------------------------------

    def certifiable(self) -> Certifiable | None:
        return None

    def spectrum(self) -> Eigenbasis | None:
        return None

    def penalty_scales(self, hparams: Tree) -> Tree | None:
        """Return the least penalty at which all weights are zero, ``max |c X'y| / r``, for every penalty."""
        largest = self.moment.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(self.moment.dtype).tiny)
        return (largest / self.l1_ratio).expand(self._group_shape).reshape(self.hparams_shape())

    def hyper_hessians(self, hparams: Tree, params: Tree, adjoint: Tree) -> tuple[Tensor, Tensor] | None:
        return None

    def solve(self, hparams: Tensor) -> Tensor:
        """Return the exact inner solution, by active sets on the Gram matrix."""
        if self.batch is not None:
            return super().solve(hparams)
        u = hparams.detach()
        l1, l2 = self.l1_penalty(u).reshape(self._group_shape), self.penalties(u)
        ones = torch.ones_like(self.moment)
        return minimise_quadratic(self.gram, self.moment, l1 * ones, l2 * ones, torch.zeros_like(ones))

    def exact_hypergradient(self, hparams: Tensor) -> Tensor:
        """Return it by dense algebra on the support."""
        if self.batch is not None:
            return batches.exact_hypergradient(self, hparams)
        w = self.solve(hparams)
        inner = self.bind(hparams)
        _, by_params, _ = self.outer_value_and_grads(w, hparams)
        cotangent, _ = inner.equilibrium_vjp(w, by_params)
        point = inner.linearize(w)
        return -point.cross(torch.linalg.solve(point.dense_hessian(), cotangent))


@with_options_of(RidgeProblem)
class ElasticNetProblem(LassoProblem):
    """Elastic net whose two penalties are both tuned.

        inner   c/2 |X w - y|^2 + sum_j (l1_j |w_j| + l2_j/2 w_j^2)

    Hyperparameters are of shape (2,), or (2, features) with penalty="per_feature": the logarithms of l1, then those of
    l2. The rest is as in `LassoProblem`.

    >>> X = torch.eye(2, dtype=torch.float64)
    >>> y = torch.tensor([0.5, 3.0], dtype=torch.float64)
    >>> ElasticNetProblem(X, y, X, y, loss="sum").solve(torch.zeros(2, dtype=torch.float64)).round(decimals=9)
    tensor([0., 1.], dtype=torch.float64)
    """

    def __init__(self, *data: Any, **options: Any) -> None:
        self.refuse_options({name: value for name, value in options.items() if name == "l1_ratio"})
        super().__init__(*data, **options)
        self._hparams_shape = (2, *self._hparams_shape)

    def l1_penalty(self, hparams: Tensor) -> Tensor:
        return hparams[0].exp()

    def penalties(self, hparams: Tensor) -> Tensor:
        return self.spread(hparams.exp())

    def spread(self, hparams: Tensor) -> Tensor:
        """Return the second half, of the l2 penalties, in a shape that broadcasts to the weights."""
        return hparams.select(0 if self.batch is None else 1, 1).reshape(self._group_shape)

    def penalty_scales(self, hparams: Tree) -> Tree | None:
        """Return those of `LassoProblem` for L1, and the mean curvature of each group for L2."""
        first = self.moment.abs().amax(-1, keepdim=True).expand(self._group_shape)
        curvature = self.scale * self.train.X.square().sum(-1)
        second = curvature if self.penalty != "scalar" else curvature.mean(-1, keepdim=True)
        scales = torch.stack((first, second), dim=-2).reshape(self.hparams_shape())
        return scales.clamp_min(torch.finfo(scales.dtype).tiny)

    def gather(self, weights: Tensor) -> Tensor:
        """Return the sums over each group as the second half, beside zeros."""
        batch = () if self.batch is None else (self.batch,)
        sums = weights.sum_to_size(self._group_shape).reshape((*batch, *self._hparams_shape[len(batch) + 1 :]))
        return torch.stack((torch.zeros_like(sums), sums), dim=len(batch))

    def labels(self, features: Sequence[str]) -> list[str]:
        names = ["all weights"] if self.penalty == "scalar" else list(features)
        return [f"{kind} of {name}" for kind in ("L1", "L2") for name in names]
