"""The linear system of implicit differentiation: the curvature at a point, with something added to its diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import Linearization


def damped(product: Callable[[Tree], Tree], damping: float) -> Callable[[Tree], Tree]:
    """Return ``v -> A v + damping v`` for a product ``v -> A v``, such as `Linearization.hvp`; not negative."""
    if not damping:
        return product
    return lambda v: tree.add(product(v), v, damping)


def damped_matrix(point: Linearization, damping: float) -> Callable[[], Tensor]:
    """Return what makes ``H' + damping I`` as a matrix; of a batch, those of all members."""

    def dense() -> Tensor:
        matrix = point.dense_hessian().mT
        return matrix + damping * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)

    return dense
