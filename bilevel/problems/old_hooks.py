"""Linear models that state their loss by methods of the problem (`loss_at`, ...): deprecated, for one release."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bilevel.core.status import warn
from bilevel.problems.losses import GLMLoss, Targets
from bilevel.problems.splits import Split

HOOKS = (
    *("loss_at", "slope_at", "curvature_at", "bend", "rate_at", "prepare_targets", "max_loss_curvature"),
    *("loss_constants", "scores", "constant_prediction"),
)
"""Members of a problem class that a `GLMLoss` has instead."""


class _Nothing(GLMLoss):
    """A loss all of whose methods the problem has to give."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    slope = curvature = value


@cache
def _hooks(cls: Any) -> list[str]:
    return [name for name in HOOKS if hasattr(cls, name)]


def with_hooks(problem: Any, loss: GLMLoss | None) -> GLMLoss | None:
    """Return the loss of a problem whose class defines some `HOOKS`, for one prediction a row; without any, `loss`."""
    cls: Any = type(problem)
    names = _hooks(cls)
    if not names:
        return loss
    given = {name: getattr(problem, name) for name in names}
    warn(
        f"{type(problem).__name__} defines {', '.join(given)}: state its loss by a bilevel.problems.GLMLoss, named in "
        "the class as `glm`.",
        DeprecationWarning,
    )
    result = _Nothing() if loss is None else copy.copy(loss)
    for name, value in ({"response": lambda y, outputs: None} | _methods(given)).items():
        setattr(result, name, value)
    return result


def _methods(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of a `GLMLoss` that old ones stand for, by name."""
    names = {"slope_at": "slope", "max_loss_curvature": "max_curvature", "loss_constants": "constants"}
    result = {new: given[old] for old, new in (names | {"scores": "scores"}).items() if old in given}
    if "loss_at" in given:
        result["value"] = _by_row(given["loss_at"])
    if "curvature_at" in given:
        bend = given.get("bend", torch.mul)
        result["curvature"] = lambda z, y: bend(given["curvature_at"](z), torch.ones_like(z))
    if "rate_at" in given:
        result["curvature_norm"] = lambda z, y: given["rate_at"](z)
    if "constant_prediction" in given:
        result["constant_prediction"] = lambda y: given["constant_prediction"]()
    if "prepare_targets" in given:

        def encode(splits: Mapping[str, Split]) -> Targets:
            given["prepare_targets"]()
            return {name: split.y for name, split in splits.items()}

        result["encode"] = encode
    return result


def _by_row(loss_at: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the losses of rows from a function that sums them."""
    each = torch.func.vmap(loss_at)
    return lambda z, y: each(z.reshape(-1, 1), y.expand_as(z).reshape(-1, 1)).reshape(z.shape)
