"""The reverse sweep's sum over steps: ``H(x_k) v_k`` one at a time, ``sum_k C(x_k)' v_k`` all together.

A sweep needs each ``H v`` at once, for the next step back, but of the cross products only their sum. Where
``C(x)' v`` is bilinear in x and v, as in linear models and quadratics, the sum is one contraction of stacked points and
vectors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree

CHUNK = 256
"""Points and vectors that are stacked at once, at most."""
NUMBERS = 32_768
"""Numbers in a stack, at most: beyond what a cache holds, a stack costs more than the calls that it saves."""


VJP: TypeAlias = Callable[[Tree, Tree], tuple[Tree, Tree]]
"""(params, v) -> ``(H' v, C' v)``: `InnerProblem.vjp_at`."""


class ProductSum:
    """The default: one `vjp` at each point; the sum is shaped as the hyperparameters."""

    def __init__(self, hparams: Tree) -> None:
        self._total = tree.zeros_like(hparams)

    def pull(self, vjp: VJP, params: Tree, v: Tree) -> Tree:
        """Return ``H' v`` at params, and add ``C' v`` to the sum; `vjp` is that of the problem as the step saw it."""
        by_params, by_hparams = vjp(params, v)
        self._total = tree.add(self._total, by_hparams)
        return by_params

    def total(self) -> Tree:
        """Return the sum of ``C' v`` over all calls of `pull`, shaped as the hyperparameters."""
        return self._total


class BilinearSum(ProductSum):
    """For params that are one Tensor and cross products that are bilinear; counted as one `vjp` for each point.

    `product` is (params, v) -> ``H' v``, not counted, and `contract` makes ``sum_k C(points_k)' vectors_k`` of points
    and vectors, both of shape (K, *params.shape).
    """

    def __init__(
        self,
        hparams: Tree,
        counts: Counter[str],
        product: Callable[[Tensor, Tensor], Tensor],
        contract: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(hparams)
        self._counts = counts
        self._product, self._contract = product, contract
        self._points: list[Tensor] = []
        self._vectors: list[Tensor] = []

    def pull(self, vjp: VJP, params: Tree, v: Tree) -> Tree:
        self._points.append(params)
        self._vectors.append(v)
        if len(self._points) == CHUNK or len(self._points) * params.numel() >= NUMBERS:
            self._flush()
        return self._product(params, v)

    def total(self) -> Tree:
        self._flush()
        return self._total

    def _flush(self) -> None:
        if self._points:
            self._counts["vjp"] += len(self._points)
            self._total = self._total + self._contract(torch.stack(self._points), torch.stack(self._vectors))
            self._points, self._vectors = [], []
