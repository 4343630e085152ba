"""`Preconditioner`: an approximation of the inverse Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bilevel.core.tree import Tree


@dataclass(frozen=True)
class Preconditioner:
    """An approximation of the inverse Hessian, symmetric positive definite: it changes how fast, never whereto.

    Attributes:
        apply: flat v of shape (size,) -> flat approximation of ``H^-1 v``; None for the identity.
        cache: a tree of tensors from which one for other params and hparams can be made cheaply; None for nothing.
        rough: whether it only helps CG: a step that takes it for the Hessian would be poor.
    """

    apply: Callable[[Tensor], Tensor] | None = None
    cache: Tree = None
    rough: bool = False
