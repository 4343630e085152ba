"""Arithmetic on trees of a batch: every leaf has a leading dimension, one row for each member.

A batch is many problems side by side. Nothing here mixes rows, so that a member comes out as it would alone, and a NaN
in one member stays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree

Weight: TypeAlias = "float | Tensor"
"""One number for all members, or a tensor of shape (members,)."""


def fit(value: Weight, leaf: Tensor) -> Any:
    """Return a per-member value in a shape and dtype that broadcast to a leaf; a number as it is.

    >>> fit(torch.tensor([1.0, 2.0]), torch.zeros(2, 3)).shape
    torch.Size([2, 1])
    """
    if not isinstance(value, Tensor):
        return value
    value = value if value.dtype in (torch.bool, leaf.dtype) else value.to(leaf.dtype)
    return value.reshape(value.shape + (1,) * (leaf.dim() - 1))


def norms(x: Tree) -> Tensor:
    """Return the Euclidean norm of every member over all leaves, of shape (members,)."""
    parts = [tree.vector_norm(leaf.reshape(len(leaf), -1), dim=1) for leaf in tree.leaves(x)]
    return parts[0] if len(parts) == 1 else tree.vector_norm(torch.stack(parts), dim=0)


def dots(x: Tree, y: Tree) -> Tensor:
    """Return the inner product of every member over all leaves, of shape (members,).

    >>> dots(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2))
    tensor([3., 7.])
    """
    pairs = zip(tree.leaves(x), tree.leaves(y), strict=True)
    return torch.stack([(a * b).reshape(len(a), -1).sum(dim=1) for a, b in pairs]).sum(dim=0)


def dot(x: Tree, y: Tree, size: int | None) -> Tensor:
    """Return the inner product of two trees, 0-d; of a batch of `size` members, of shape (members,)."""
    # torch.dot is up to four times faster on a vector than a sum of products over the rows of a batch of one.
    return tree.dot(x, y) if size is None else dots(x, y)


def where(mask: Tensor, x: Tree, y: Tree | float) -> Tree:
    """Return the members of x where the mask is True, and those of y (a tree, or one number) elsewhere.

    >>> where(torch.tensor([True, False]), torch.ones(2, 2), 0.0)
    tensor([[1., 1.],
            [0., 0.]])
    """
    if isinstance(y, float):
        return tree.tree_map(lambda a: torch.where(fit(mask, a), a, y), x)
    return tree.tree_map(lambda a, b: torch.where(fit(mask, a), a, b), x, y)


def row(x: Tree, index: int) -> Tree:
    """Return one member; leaves that are no tensors are those of all members."""
    return tree.tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, x)


def with_row(x: Tree, index: int, value: Tree) -> Tree:
    """Return a copy with another value in one row."""

    def replaced(leaf: Tensor, new: Tensor) -> Tensor:
        leaf = leaf.clone()
        leaf[index] = new
        return leaf

    return tree.tree_map(replaced, x, value)


def stack(members: Sequence[Tree]) -> Tree:
    """Return the batch of some members; leaves that are no tensors must be equal (ValueError)."""

    def stacked(*leaves: Any) -> Any:
        if isinstance(leaves[0], Tensor):
            return torch.stack(leaves)
        if any(leaf != leaves[0] for leaf in leaves):
            raise ValueError(f"members must share what is no tensor, got {leaves[0]!r} and another.")
        return leaves[0]

    return tree.tree_map(stacked, *members)


def expand(x: Tree, size: int) -> Tree:
    """Return a batch of equal members."""
    return tree.tree_map(lambda leaf: leaf.detach().expand(size, *leaf.shape).contiguous(), x)


def check_rows(what: str, x: Tree, size: int) -> None:
    """Refuse a tree, which messages call `what`, that is no batch of `size` members."""
    for name, leaf in zip(tree.names(x), tree.leaves(x), strict=True):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != size):
            remedy = (
                f": hparams.expand({size}) gives all members the same" if leaf.dim() == 0 and what == "hparams" else ""
            )
            raise ValueError(
                f"`{what}{name}` must have the leading dimension {size} (one row for each member), "
                f"got shape {tuple(leaf.shape)}{remedy}."
            )


def weighted_sum(pairs: Sequence[tuple[int, Weight]], trees: Sequence[Tree]) -> Tree:
    """Return ``sum weight * trees[index]`` over the (index, weight) pairs; weights may differ by member."""
    total = None
    for index, weight in pairs:
        term = trees[index]
        if total is None:
            total = term if isinstance(weight, float) and weight == 1 else scale(weight, term)
        elif isinstance(weight, Tensor):
            total = tree.tree_map(lambda a, b, w=weight: torch.addcmul(a, b, fit(w, b)), total, term)
        else:
            total = tree.add(total, term, weight)
    return tree.zeros_like(trees[0]) if total is None else total


def scale(weight: Weight, x: Tree) -> Tree:
    """Return every member times its weight."""
    return tree.tree_map(lambda leaf: leaf * fit(weight, leaf), x)


def raveler(like: Tree, size: int | None) -> tree.Raveler:
    """Return what moves between a tree and a vector; of a batch of `size` members, between it and a matrix.

    >>> batch = {"a": torch.zeros(3, 2), "b": torch.zeros(3)}
    >>> raveler(batch, 3).ravel(batch).shape
    torch.Size([3, 3])
    """
    return tree.Raveler(like, batched=size is not None)


def figure(value: Any, index: int | None) -> Any:
    """Return one member's figure: of a sequence its entry; a figure that is that of all members (None) as it is.

    >>> figure([1.0, 2.0], 1), figure(3.0, 1)
    (2.0, 3.0)
    """
    return value[index] if index is not None and isinstance(value, Sequence) else value
