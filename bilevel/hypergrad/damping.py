"""The linear system of implicit differentiation: the Hessian at a point, with something added to its diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import tree
from bilevel.linearization import Linearization
from bilevel.tree import Tree


def damped(point: Linearization, damping: float) -> tuple[Callable[[Tree], Tree], Callable[[], Tensor]]:
    """Return ``v -> H' v + damping v``, and what makes ``H + damping I`` as a matrix; of a batch, those of all members.

    Args:
        point: the linearised inner gradient.
        damping: added to the diagonal; not negative.
    """

    def matvec(v: Tree) -> Tree:
        product = point.hvp(v)
        return tree.add(product, v, damping) if damping else product

    def dense() -> Tensor:
        matrix = point.dense_hessian()
        return matrix + damping * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)

    return matvec, dense
