"""`Penalties`: which coefficients of a linear model share a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Penalties:
    """For every coefficient the index of its log penalty; made by one of the class methods.

    Models of one output have coefficients of shape (features,), those of several (a class or a target each)
    (outputs, features).

    Attributes:
        owner: shaped as the coefficients, with values 0, ..., size - 1.
        size: the number of penalties.

    >>> Penalties.groups([0, 0, 1]).spread(np.array([1.0, 2.0]))
    tensor([1., 1., 2.], dtype=torch.float64)
    """

    owner: Tensor
    size: int

    @classmethod
    def scalar(cls, features: int, outputs: int | None = None) -> Self:
        """Return one penalty for all coefficients."""
        return cls(torch.zeros(_shape(features, outputs), dtype=torch.long), 1)

    @classmethod
    def feature(cls, features: int, outputs: int | None = None) -> Self:
        """Return a penalty for every feature, which all outputs share."""
        return cls(torch.arange(features).expand(_shape(features, outputs)).contiguous(), features)

    @classmethod
    def groups(cls, labels: Any, outputs: int | None = None) -> Self:
        """Return a penalty for every group of features, in the sorted order of their labels.

        Args:
            labels: of shape (features,): numbers or strings.
            outputs: predictions of a row; None for one.
        """
        names, owner = np.unique(np.asarray(labels).reshape(-1), return_inverse=True)
        features = torch.as_tensor(owner.reshape(-1), dtype=torch.long)
        return cls(features.expand(_shape(len(owner), outputs)).contiguous(), len(names))

    @classmethod
    def output(cls, features: int, outputs: int) -> Self:
        """Return a penalty for every output: a class of softmax, a target of ridge."""
        return cls(torch.arange(outputs)[:, None].expand(outputs, features).contiguous(), outputs)

    @classmethod
    def output_feature(cls, features: int, outputs: int) -> Self:
        """Return a penalty for every coefficient of several outputs."""
        size = outputs * features
        return cls(torch.arange(size).reshape(outputs, features), size)

    @property
    def outputs(self) -> int | None:
        """Predictions of a row; None for one."""
        return None if self.owner.dim() == 1 else len(self.owner)

    @cached_property
    def weights(self) -> Array:
        """The share of the coefficients that each penalty has, of shape (size,): how a hyperprior weighs them."""
        return np.bincount(self.owner.reshape(-1).numpy(), minlength=self.size) / self.owner.numel()

    @cached_property
    def each(self) -> bool:
        """Whether every coefficient has a penalty of its own, in their order."""
        return self.size == self.owner.numel()

    @cached_property
    def even(self) -> bool:
        """Whether all coefficients of an output share one penalty."""
        return self.size == 1 or bool((self.owner == self.owner[..., :1]).all())

    def spread(self, u: Array) -> Tensor:
        """Return the log penalty of every coefficient, (..., *coefficients), in float64, of u of shape (..., size).

        Raises:
            ValueError: for another shape, and numbers that are not finite.
        """
        spread = self._checked(u)
        return spread if self.each and self.outputs is None else spread[..., self.owner]

    def spread_outputs(self, u: Array) -> Tensor:
        """Return the log penalty of every output, (..., outputs), or of the one, (..., 1), where these are `even`.

        Raises:
            ValueError: see `spread`.
        """
        spread = self._checked(u)
        return spread if self.size == 1 and self.outputs is None else spread[..., self.owner[..., 0]]

    def _checked(self, u: Array) -> Tensor:
        u = np.array(u, dtype=np.float64, order="C")
        if u.shape[-1:] != (self.size,) or not np.isfinite(u).all():
            raise ValueError(f"u must hold {self.size} finite log penalties, of shape ({self.size},), got {u.shape}.")
        return torch.from_numpy(u)

    def gather(self, values: Tensor) -> Tensor:
        """Return the sums over the coefficients of each penalty, (..., size), of values (..., *coefficients)."""
        flat = values.reshape(*values.shape[: values.dim() - self.owner.dim()], -1)
        if self.each:
            return flat
        if self.size == 1:
            return flat.sum(-1, keepdim=True)
        owner = self.owner.reshape(-1).to(values.device)
        return flat.new_zeros(*flat.shape[:-1], self.size).index_add_(-1, owner, flat)

    def gather_outputs(self, values: Tensor) -> Tensor:
        """Return the sums over the outputs of each penalty, (..., size), where these are `even`."""
        if self.size == 1 or self.outputs is None:
            return values.sum(-1, keepdim=True)
        owner = self.owner[:, 0].to(values.device)
        return values.new_zeros(*values.shape[:-1], self.size).index_add_(-1, owner, values)


def _shape(features: int, outputs: int | None) -> tuple[int, ...]:
    return (features,) if outputs is None else (outputs, features)
