"""Constrained hyperparameters, through the transforms of ``torch.distributions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, identity_transform, transform_to
from torch.distributions import constraints as dist_constraints

from bilevel.core import tree
from bilevel.core.options import shown_value
from bilevel.core.tree import Tree


def check_constraints(constraints: Any) -> None:
    """Refuse what is no constraint, and no dict of them, before there are hyperparameters."""
    if isinstance(constraints, Mapping) and not constraints:
        raise ValueError("`constraints` is an empty dict: leave it out.")
    for each in constraints.values() if isinstance(constraints, Mapping) else [constraints]:
        _transform(each)


def bounds(hparams: Tree, constraints: Any) -> tuple[Tree, Tree]:
    """Return the least and the largest hyperparameters that constraints allow; refuse what has no bounds."""
    ends: list[list[Tensor]] = [[], []]
    for leaf, constraint in zip(tree.leaves(hparams), by_leaf(hparams, constraints), strict=True):
        if constraint is not None and not {"lower_bound", "upper_bound"} & set(vars(constraint)):
            raise ValueError(
                f"`constraints` holds {constraint}, but an outer search keeps to bounds alone, such as "
                "constraints.interval(-5.0, 5.0): use a torch optimizer."
            )
        for end, name, none in zip(ends, ("lower_bound", "upper_bound"), (-torch.inf, torch.inf), strict=True):
            end.append(torch.full_like(leaf, float(getattr(constraint, name, none))))
    return tree.rebuild(hparams, ends[0]), tree.rebuild(hparams, ends[1])


def by_leaf(hparams: Tree, constraints: Any) -> list[Any]:
    """Return the constraint of each leaf, None for a free one; refuse a dict of them that does not fit."""
    if not isinstance(constraints, Mapping):
        return [constraints] * len(tree.leaves(hparams))
    if not isinstance(hparams, Mapping):
        raise ValueError("`constraints` is a dict, but the hyperparameters are not.")
    if unknown := set(constraints) - set(hparams):
        raise ValueError(f"`constraints` names {sorted(unknown)}, but hparams has {sorted(hparams)}.")
    return [constraints.get(key) for key, value in hparams.items() for _ in tree.leaves(value)]


class ConstraintTransform:
    """From free variables z to constrained hyperparameters ``u = transform(z)``, leaf by leaf.

    The start must lie inside the constraints: a ``torch.distributions.constraints`` object for all leaves, a dict of
    them by key, or None.
    """

    def __init__(self, hparams: Tree, constraints: Any) -> None:
        limits = by_leaf(hparams, constraints)
        self._transforms = [_transform(constraint) for constraint in limits]
        for name, leaf, constraint in zip(tree.names(hparams), tree.leaves(hparams), limits, strict=True):
            if constraint is not None and not bool(constraint.check(leaf).all()):
                raise ValueError(
                    f"`hparams{name}` does not satisfy its constraint {constraint}: "
                    f"it goes from {float(leaf.min()):.4g} to {float(leaf.max()):.4g}."
                )
            if not bool(torch.isfinite(_transform(constraint).inv(leaf)).all()):
                raise ValueError(
                    f"`hparams{name}` lies on the boundary of its constraint {constraint}, "
                    "from where it could never move."
                )
        self._like = hparams
        self._identity = all(transform is identity_transform for transform in self._transforms)

    def __call__(self, free: Tree) -> Tree:
        """Return the hyperparameters of free variables; without constraints these are the same tensors."""
        if self._identity:
            return free
        pairs = zip(self._transforms, tree.leaves(free), strict=True)
        return tree.rebuild(self._like, [transform(leaf) for transform, leaf in pairs])

    def inverse(self, hparams: Tree) -> Tree:
        """Return free leaves that require gradients."""
        pairs = zip(self._transforms, tree.leaves(hparams), strict=True)
        free = [transform.inv(leaf.detach()).clone().requires_grad_() for transform, leaf in pairs]
        return tree.rebuild(self._like, free)

    def pull_back(self, free: Tree, gradient: Tree) -> list[Tensor]:
        """Return the gradient with respect to the free variables."""
        parts = tree.leaves(gradient)
        if self._identity:
            return parts
        for index, (transform, leaf) in enumerate(zip(self._transforms, tree.leaves(free), strict=True)):
            if transform is not identity_transform:
                with torch.enable_grad():
                    value = transform(leaf)
                (parts[index],) = torch.autograd.grad(value, leaf, parts[index])
        return parts


def _transform(constraint: Any) -> Transform:
    """Return the transform from all real numbers to a constraint; None stands for no constraint."""
    constraint = dist_constraints.real if constraint is None else constraint
    if not isinstance(constraint, dist_constraints.Constraint):
        raise ValueError(
            "`constraints` must be a constraint of torch.distributions.constraints, such as constraints.positive, "
            f"or a dict of them by key, got {shown_value(constraint)}."
        )
    try:
        return transform_to(constraint)
    except NotImplementedError:
        raise ValueError(f"`constraints` holds {constraint}, for which torch.distributions has no transform.") from None
