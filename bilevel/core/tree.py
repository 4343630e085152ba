"""Arithmetic on pytrees of tensors: a Tensor, or dicts, lists and tuples of them.

The whole package treats ``params`` and ``hparams`` as such trees and never flattens them on the user's behalf;
only linear solvers work on one flat vector, through `Raveler`. Bare tensors, dicts and tuples take short paths, because
inner loops walk them thousands of times: torch's general pytree takes 20 microseconds for a dict of four.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree: TypeAlias = Any  # Tensor | dict[str, Tree] | list[Tree] | tuple[Tree, ...]


def leaves(tree: Tree) -> list[Tensor]:
    """Return the tensors of a tree, in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    kind = type(tree)
    if kind is dict or kind is tuple:
        return [leaf for part in (tree.values() if kind is dict else tree) for leaf in leaves(part)]
    return list(pytree.tree_leaves(tree))


def rebuild(like: Tree, tensors: Sequence[Tensor]) -> Tree:
    """Return a tree shaped as `like` with the given leaves."""
    if isinstance(like, Tensor):
        (only,) = tensors
        return only
    feed = iter(tensors)
    built = tree_map(lambda _: next(feed), like)
    if next(feed, None) is not None:
        raise ValueError("more tensors than the tree has leaves.")
    return built


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `function` leaf by leaf."""
    if isinstance(tree, Tensor):
        return function(tree, *rest)
    kind = type(tree)
    if kind is dict and all(type(other) is dict and other.keys() == tree.keys() for other in rest):
        return {key: tree_map(function, part, *[other[key] for other in rest]) for key, part in tree.items()}
    if kind is tuple and all(type(other) is tuple and len(other) == len(tree) for other in rest):
        return tuple(tree_map(function, *parts) for parts in zip(tree, *rest, strict=True))
    return pytree.tree_map(function, tree, *rest)


def names(tree: Tree) -> list[str]:
    """Return a readable name for every leaf, such as ``['weight']``; one empty string for a bare tensor.

    >>> names({"a": torch.zeros(2), "b": [torch.zeros(1)]})
    ["['a']", "['b'][0]"]
    """
    if isinstance(tree, Tensor):
        return [""]
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def matched(tree: Tree, like: Tree, what: str) -> Tree:
    """Return a tree that a user's function `what` made, with its leaves in the order of `like`.

    Two dicts with the same keys in another order are the same tree, but their leaves would pair up wrongly.

    Raises:
        ValueError: if the structure or a shape differs.
    """
    try:
        ordered = pytree.tree_map(lambda _, leaf: leaf, like, tree)
        fits = [leaf.shape for leaf in leaves(ordered)] == [leaf.shape for leaf in leaves(like)]
    except (ValueError, AttributeError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"`{what}` must return a tree of the structure and shapes of `params`.")
    return ordered


def detach(tree: Tree) -> Tree:
    """Return the tree without its autograd history; storage is shared."""
    if isinstance(tree, Tensor) and not tree.requires_grad:
        return tree
    return tree_map(Tensor.detach, tree)


def copied(tree: Tree) -> Tree:
    """Return detached copies of the leaves, which share storage with nothing; leaves that are no tensors stay."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def attach(tree: Tree) -> Tree:
    """Return detached leaves that require gradients: fresh roots of an autograd graph."""
    return tree_map(lambda leaf: leaf.detach().requires_grad_(), tree)


def zeros_like(tree: Tree) -> Tree:
    """Return zeros of the same structure, shapes, dtypes and devices."""
    return tree_map(torch.zeros_like, tree)


def add(x: Tree, y: Tree, alpha: float = 1.0) -> Tree:
    """Return ``x + alpha y``."""
    if isinstance(x, Tensor):
        return torch.add(x, y, alpha=alpha)
    return tree_map(lambda a, b: torch.add(a, b, alpha=alpha), x, y)


def scale(alpha: float, x: Tree) -> Tree:
    """Return ``alpha x``."""
    if isinstance(x, Tensor):
        return x * alpha
    return tree_map(lambda leaf: leaf * alpha, x)


def combine(weights: Sequence[float], trees: Sequence[Tree]) -> Tree:
    """Return ``sum_i weights[i] trees[i]``, skipping zero weights.

    A single term of weight one is returned as it is, without a copy: no caller writes into the result.

    >>> combine((1.0, 0.0, -2.0), (torch.ones(2), torch.ones(2), torch.ones(2)))
    tensor([-1., -1.])
    """
    return weighted_sum([(index, weight) for index, weight in enumerate(weights) if weight != 0], trees)


def weighted_sum(pairs: Sequence[tuple[int, float]], trees: Sequence[Tree]) -> Tree:
    """Return ``sum weight * trees[index]`` over the (index, weight) pairs: `combine`, for weights prepared once."""
    total = None
    for index, weight in pairs:
        term = trees[index]
        if total is None:
            total = term if weight == 1 else scale(weight, term)
        elif isinstance(term, Tensor):
            total = torch.add(total, term, alpha=weight)
        else:
            total = add(total, term, weight)
    return zeros_like(trees[0]) if total is None else total


def dot(x: Tree, y: Tree) -> Tensor:
    """Return the inner product of two trees, a 0-d tensor."""
    if isinstance(x, Tensor):
        return torch.dot(x.reshape(-1), y.reshape(-1))
    pairs = zip(leaves(x), leaves(y), strict=True)
    return torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in pairs]).sum()


def norm(x: Tree) -> Tensor:
    """Return the Euclidean norm over all leaves, a 0-d tensor."""
    if isinstance(x, Tensor):
        return vector_norm(x)
    return vector_norm(torch.stack([vector_norm(leaf) for leaf in leaves(x)]))


def vector_norm(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the Euclidean norm of a tensor; squares of float32 are summed in float64, whose range holds them all.

    >>> vector_norm(torch.tensor([3e-30, 4e-30]))
    tensor(5.0000e-30)
    """
    if x.dtype is not torch.float32 or x.device.type == "mps":
        return torch.linalg.vector_norm(x, dim=dim)
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64).to(x.dtype)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or infinite; on an accelerator this waits for it.

    >>> is_finite(torch.tensor([1.0, float("nan")]))
    False
    """
    tensor = detach(tensor)
    # One kernel and one transfer: a sum is NaN or infinite where one number is, and else only where it overflows.
    finite = math.isfinite(tensor if tensor.numel() == 1 else tensor.sum())
    return finite or math.isfinite(torch.linalg.vector_norm(tensor, torch.inf))


def size(tree: Tree) -> int:
    """Return the number of scalars in a tree."""
    return sum(leaf.numel() for leaf in leaves(tree))


def nbytes(tree: Tree) -> int:
    """Return the bytes that the leaves of a tree hold."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))


class Raveler:
    """Moves between a tree and one flat vector, or between a tree of a batch and one matrix.

    Args:
        like: the tree whose structure, shapes and order are used.
        batched: whether the leaves have a leading dimension, which then leads the matrix too.

    >>> raveler = Raveler({"a": torch.zeros(2), "b": torch.zeros(())})
    >>> raveler.unravel(torch.tensor([1.0, 2.0, 3.0]))
    {'a': tensor([1., 2.]), 'b': tensor(3.)}
    """

    def __init__(self, like: Tree, batched: bool = False) -> None:
        self._like = like
        self._shapes = [leaf.shape for leaf in leaves(like)]
        self._lead = self._shapes[0][:1] if batched else torch.Size()
        self._sizes = [(leaf[0] if batched else leaf).numel() for leaf in leaves(like)]
        self.size = sum(self._sizes)
        self._is_flat = isinstance(like, Tensor) and like.dim() == 1 + len(self._lead)

    def ravel(self, tree: Tree) -> Tensor:
        """Return the leaves as one vector of shape (size,), of a batch as a matrix of shape (members, size)."""
        if self._is_flat:
            return tree
        if isinstance(tree, Tensor):
            return tree.reshape(*self._lead, -1)
        return torch.cat([leaf.reshape(*self._lead, -1) for leaf in leaves(tree)], dim=-1)

    def unravel(self, flat: Tensor) -> Tree:
        """Return the vector or matrix as a tree (views where possible)."""
        if self._is_flat:
            return flat
        if isinstance(self._like, Tensor):
            return flat.reshape(self._shapes[0])
        parts = torch.split(flat, self._sizes, dim=-1)
        return rebuild(self._like, [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)])

    def units(self) -> list[Tree]:
        """Return the unit vectors as trees, of a batch each the same for all members."""
        (like, *_) = leaves(self._like)
        identity = torch.eye(self.size, dtype=like.dtype, device=like.device)
        return [self.unravel(unit.expand(*self._lead, -1)) for unit in identity]
