"""Weight decay as an autograd node that keeps nothing, for as many decays as there are weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree


def weight_decay(params: Tree, log_decay: Tree) -> Tensor:
    """Return ``1/2 sum_i exp(u_i) w_i^2``, whose gradient by w is ``exp(u) w``, as ``weight_decay`` of torch.optim.

    The same number as by torch's own operations, and as often differentiable. Those keep about five tensors of the size
    of w for second derivatives; this node computes them again, which is cheap, and keeps none: for a decay for each
    weight of a large network.

    Args:
        params: the weights w.
        log_decay: u, a tree of the structure of `params`; each leaf has the shape of the weights or broadcasts to it,
            such as a 0-d tensor for each layer.

    Raises:
        ValueError: if the trees do not fit.

    >>> float(weight_decay({"w": torch.tensor([1.0, 2.0])}, {"w": torch.zeros(())}))
    2.5
    """
    pairs = list(zip(tree.leaves(params), tree.leaves(log_decay), strict=False))
    if tree.names(params) != tree.names(log_decay) or any(_broadcast(w, u) != w.shape for w, u in pairs):
        raise ValueError("`log_decay` must be a tree like `params`, of leaves that broadcast to its shapes.")
    return torch.stack([_Decay.apply(w, u) for w, u in pairs]).sum()  # type: ignore[no-untyped-call]


def _broadcast(w: Tensor, u: Tensor) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(w.shape, u.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None


class _Decay(torch.autograd.Function):
    """(w, u) -> 1/2 sum exp(u) w^2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, u: Tensor) -> Tensor:
        return (u.exp() * w.square()).sum() / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        w, u = ctx.saved_tensors
        by_w = _Slope.apply(w, u, g) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        by_u = (g / 2 * u.exp() * w.square()).sum_to_size(u.shape) if ctx.needs_input_grad[1] else None
        return by_w, by_u


class _Slope(torch.autograd.Function):
    """(w, u, g) -> g exp(u) w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, u: Tensor, g: Tensor) -> Tensor:
        return u.exp() * w * g

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        w, u, g = ctx.saved_tensors
        product, (need_w, need_u, need_g) = u.exp() * v, ctx.needs_input_grad
        return (
            product * g if need_w else None,
            (product * w * g).sum_to_size(u.shape) if need_u else None,
            (product * w).sum() if need_g else None,
        )
