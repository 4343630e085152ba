"""Nonsmooth terms of an inner problem, handed over by their proximal maps.

With one, the inner problem is to minimise ``inner_loss(x, u) + r(x, u)``: the inner loss is its smooth part, and the
term r is known by

    prox(v, s, u) = argmin over x of  r(x, u) + |x - v|^2 / (2 s)

A term says where it is smooth: on the *support* of x, the other variables held where they are (at zero).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.options import is_number, require, shown_value
from bilevel.core.tree import Tree

Weights: TypeAlias = float | Tensor | Callable[[Tree], Any]
"""A number, a Tensor, or a function of the hyperparameters that returns a Tensor or a tree shaped as params."""


class Nonsmooth(ABC):
    """A convex function r(params, hparams) with kinks, for ``BilevelProblem(..., nonsmooth=...)``.

    A subclass gives `value` and `prox`, in torch operations: hyperparameters inside them are differentiated.
    """

    curved: ClassVar[bool] = True
    """Whether r has curvature on the support."""

    @abstractmethod
    def value(self, params: Tree, hparams: Tree) -> Tensor:
        """Return r, a 0-d tensor; twice differentiable on the support."""

    @abstractmethod
    def prox(self, v: Tree, step: Tensor, hparams: Tree) -> Tree:
        """Return the proximal point of v for a 0-d step size, shaped as v."""

    def check(self, params: Tree, hparams: Tree) -> None:  # noqa: B027 (most terms have nothing to check)
        """Refuse weights of r that do not fit, once for each hyperparameters; ValueError says so."""

    def separable(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree, bool] | None:
        """Return (l1, l2, positive) of ``sum l1 |x| + l2/2 x^2``, with ``x >= 0`` where positive; None for another r.

        The weights are shaped as params. It serves coordinate descent.
        """
        return None

    def support(self, params: Tree) -> Tree:
        """Return which variables move with the hyperparameters, bools shaped as params: by default all but zeros."""
        return tree.tree_map(lambda leaf: leaf != 0, params)


def require_term(term: Any, optimality: Any) -> None:
    """Refuse what is no nonsmooth term, and one beside an optimality map; ValueError says so."""
    if not isinstance(term, Nonsmooth):
        raise ValueError(f"`nonsmooth` must be a Nonsmooth, such as L1(weights), got {shown_value(term)}.")
    if optimality is not None:
        raise ValueError(
            "`nonsmooth` is added to an `inner_loss`, but this problem is stated by an optimality map: put the "
            "proximal step into the map."
        )


def _check_weights(owner: Any, name: str) -> None:
    given = getattr(owner, name)
    fits = callable(given) or isinstance(given, Tensor) or (is_number(given) and given >= 0)
    require(owner, name, "a number that is not negative, a Tensor, or a function of the hyperparameters", fits)


def _check_by_leaf(owner: Any, name: str, shapes: Sequence[tuple[int, ...]], hparams: Tree) -> None:
    """Refuse weights at some hyperparameters that do not broadcast to the leaves of params, and negative ones."""
    weights, what = getattr(owner, name), f"`{type(owner).__name__}.{name}`"
    with torch.no_grad():
        value = weights(hparams) if callable(weights) else weights
        single = isinstance(value, Tensor | float | int)
        given = [value] * len(shapes) if single else tree.leaves(value)
        if len(given) != len(shapes) or not all(map(_broadcasts, given, shapes)):
            got = [tuple(each.shape) if isinstance(each, Tensor) else each for each in ([value] if single else given)]
            raise ValueError(
                f"{what} must be a number or a Tensor that broadcasts to {', '.join(map(str, shapes))}, or one for "
                f"each leaf of params, got {', '.join(map(str, got)) or 'none'}."
            )
        least = min(float(torch.as_tensor(each).amin()) for each in ([value] if single else given))
    if least < 0:
        raise ValueError(
            f"{what} must not be negative, but the least is {least:.4g}: tune their logarithms, as in "
            "`L1(lambda hparams: hparams.exp())`, or bound the hyperparameters by `constraints`."
        )


def _broadcasts(weight: Any, shape: tuple[int, ...]) -> bool:
    """Return whether a number or a Tensor broadcasts to a shape."""
    if not isinstance(weight, Tensor):
        return is_number(weight)
    missing = len(shape) - weight.dim()
    return missing >= 0 and all(a in (1, b) for a, b in zip(weight.shape, shape[missing:], strict=True))


def _shapes(params: Tree) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree.leaves(params)]


def _by_leaf(weights: Weights, params: Tree, hparams: Tree) -> list[Any]:
    """Return the weights of every leaf: one value for all, or those of a tree shaped as params."""
    value = weights(hparams) if callable(weights) else weights
    count = len(tree.leaves(params))
    return [value] * count if isinstance(value, Tensor | float | int) else tree.leaves(value)


def _full(weights: Weights, params: Tree, hparams: Tree) -> Tree:
    """Return the weights shaped as params."""
    pairs = zip(_by_leaf(weights, params, hparams), tree.leaves(params), strict=True)
    return tree.rebuild(params, [weight * torch.ones_like(leaf) for weight, leaf in pairs])


def soft_threshold(v: Tensor, threshold: Tensor) -> Tensor:
    """Return ``sign(v) max(|v| - threshold, 0)``.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor(1.0))
    tensor([-2.,  0.,  1.])
    """
    return v - torch.minimum(torch.maximum(v, -threshold), threshold)


@dataclass(frozen=True)
class L1(Nonsmooth):
    """``sum_j weights_j |x_j|``.

    Args:
        weights: a number, a Tensor, or a function of the hyperparameters; it broadcasts to every leaf of params.

    >>> term = L1(lambda hparams: hparams.exp())
    >>> term.prox(torch.tensor([3.0, -0.5]), torch.tensor(1.0), torch.tensor(0.0))
    tensor([2., 0.])
    """

    weights: Weights

    curved = False

    def __post_init__(self) -> None:
        _check_weights(self, "weights")

    def check(self, params: Tree, hparams: Tree) -> None:
        _check_by_leaf(self, "weights", _shapes(params), hparams)

    def value(self, params: Tree, hparams: Tree) -> Tensor:
        pairs = zip(_by_leaf(self.weights, params, hparams), tree.leaves(params), strict=True)
        return torch.stack([(weight * leaf.abs()).sum() for weight, leaf in pairs]).sum()

    def prox(self, v: Tree, step: Tensor, hparams: Tree) -> Tree:
        pairs = zip(_by_leaf(self.weights, v, hparams), tree.leaves(v), strict=True)
        return tree.rebuild(v, [soft_threshold(leaf, step * weight) for weight, leaf in pairs])

    def separable(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree, bool] | None:
        return _full(self.weights, params, hparams), tree.zeros_like(params), False


@dataclass(frozen=True)
class ElasticNet(Nonsmooth):
    """``sum_j l1_j |x_j| + 1/2 sum_j l2_j x_j^2`` (Zou & Hastie 2005).

    Args:
        l1: weights of the absolute values, as those of `L1`.
        l2: weights of the squares.

    >>> ElasticNet(1.0, 1.0).prox(torch.tensor([3.0, -0.5]), torch.tensor(1.0), torch.tensor(0.0))
    tensor([1., 0.])
    """

    l1: Weights
    l2: Weights

    def __post_init__(self) -> None:
        _check_weights(self, "l1")
        _check_weights(self, "l2")

    def check(self, params: Tree, hparams: Tree) -> None:
        for name in ("l1", "l2"):
            _check_by_leaf(self, name, _shapes(params), hparams)

    def value(self, params: Tree, hparams: Tree) -> Tensor:
        squares = [
            (weight * leaf * leaf).sum()
            for weight, leaf in zip(_by_leaf(self.l2, params, hparams), tree.leaves(params), strict=True)
        ]
        return L1(self.l1).value(params, hparams) + 0.5 * torch.stack(squares).sum()

    def prox(self, v: Tree, step: Tensor, hparams: Tree) -> Tree:
        shrunk = tree.leaves(L1(self.l1).prox(v, step, hparams))
        pairs = zip(_by_leaf(self.l2, v, hparams), shrunk, strict=True)
        return tree.rebuild(v, [leaf / (1.0 + step * weight) for weight, leaf in pairs])

    def separable(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree, bool] | None:
        return _full(self.l1, params, hparams), _full(self.l2, params, hparams), False


@dataclass(frozen=True, eq=False)
class GroupLasso(Nonsmooth):
    """``sum_g weights_g |x_g|``, with the Euclidean norms of groups of variables (Yuan & Lin 2006).

    Args:
        groups: the index of the group of each variable, 0, 1, ..., a tensor of integers shaped as params, which are one
            tensor.
        weights: as those of `L1`; they broadcast to the shape (number of groups,).

    >>> term = GroupLasso(torch.tensor([0, 0, 1]), 1.0)
    >>> term.prox(torch.tensor([3.0, 4.0, 0.5]), torch.tensor(1.0), torch.tensor(0.0))
    tensor([2.4000, 3.2000, 0.0000])
    """

    groups: Tensor
    weights: Weights

    def __post_init__(self) -> None:
        integers = isinstance(self.groups, Tensor) and not self.groups.is_floating_point() and self.groups.numel() > 0
        require(self, "groups", "a tensor of integers from 0 on, shaped as params", integers)
        count = int(self.groups.max()) + 1
        covered = int(self.groups.min()) >= 0 and len(torch.unique(self.groups)) == count
        require(self, "groups", "a tensor of integers 0, 1, ..., each of which occurs", covered)
        _check_weights(self, "weights")
        object.__setattr__(self, "_count", count)

    def check(self, params: Tree, hparams: Tree) -> None:
        _check_by_leaf(self, "weights", [(vars(self)["_count"],)], hparams)

    def squares(self, x: Tree) -> Tensor:
        """Return the squared norm of every group."""
        if not isinstance(x, Tensor) or x.shape != self.groups.shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"`GroupLasso.groups` has the shape {tuple(self.groups.shape)}, but params are {got}: "
                "give one index for each variable of one tensor."
            )
        count: int = vars(self)["_count"]
        return x.new_zeros(count).index_add(0, self.groups.reshape(-1).to(x.device), (x * x).reshape(-1))

    def norms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of every group, with derivatives of zero where it is zero, and where it is not."""
        squares = self.squares(x)
        active = squares > 0
        return torch.where(active, squares.where(active, torch.ones_like(squares)).sqrt(), 0.0), active

    def spread(self, values: Tensor) -> Tensor:
        """Return the value of its group for every variable."""
        index = self.groups.reshape(-1).to(values.device)
        return values.index_select(0, index).reshape(self.groups.shape)

    def value(self, params: Tree, hparams: Tree) -> Tensor:
        (weights,) = _by_leaf(self.weights, params, hparams)
        return (weights * self.norms(params)[0]).sum()

    def prox(self, v: Tree, step: Tensor, hparams: Tree) -> Tree:
        (weights,) = _by_leaf(self.weights, v, hparams)
        norms, active = self.norms(v)
        share = 1.0 - step * weights / torch.where(active, norms, 1.0)
        return v * self.spread(torch.where(active, share, 0.0).clamp_min(0.0))

    def support(self, params: Tree) -> Tree:
        return self.spread(self.squares(params)) > 0


@dataclass(frozen=True)
class NonNegative(Nonsmooth):
    """The constraint ``x >= 0``: r is zero there, and infinite elsewhere; the proximal map is the projection.

    >>> NonNegative().prox(torch.tensor([3.0, -0.5]), torch.tensor(1.0), torch.tensor(0.0))
    tensor([3., 0.])
    """

    curved = False

    def value(self, params: Tree, hparams: Tree) -> Tensor:
        """Return zero: iterates of a proximal method are feasible."""
        return torch.stack([0.0 * leaf.sum() for leaf in tree.leaves(params)]).sum()

    def prox(self, v: Tree, step: Tensor, hparams: Tree) -> Tree:
        return tree.tree_map(torch.relu, v)

    def support(self, params: Tree) -> Tree:
        return tree.tree_map(lambda leaf: leaf > 0, params)

    def separable(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree, bool] | None:
        return tree.zeros_like(params), tree.zeros_like(params), True
