"""Steps of a linear multistep solver on a quadratic, by doubling: products of matrices in place of steps.

With the gradient ``H y + b`` a step maps the p stored vectors, s of shape (p m,), by

    s+ = Z s + c,      Z = kron(mix, I) + kron(write read', H),      c = kron(write, b)

Where rows 0, ..., t - 1 of the trajectory are known, the t rows after them are one product with ``Z^t``, and the same
powers, transposed, take cotangents back. A thousand steps are some forty products of matrices.

Doubling sums what steps would add up one after the other: its error is about ``eps |H| R``, R being what the steps make
of a constant gradient of 1 where nothing bends, such as ``K h`` of gradient descent.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.inner.coefficients import Coefficients
from bilevel.oracles.kernels import Kernels, Stepped

ROUNDING = 2e-11
"""The largest ``eps |H| R`` at which steps are doubled."""
WORTH = 8.0
"""A power ``Z^t`` is made for trajectories of at least ``t p m / WORTH`` rows: a squaring costs ``2 (p m)^3``."""
SHORTEST = 4
"""Blocks of fewer rows are no quicker than steps."""


class Powers:
    """``Z^(2^i)`` and the constants that belong to them, of one step; each is made when it is asked for."""

    def __init__(self, kernels: Stepped, numbers: Coefficients) -> None:
        assert kernels.affine is not None
        # In float64 whatever the dtype: sums of powers lose digits that single steps would keep.
        H, b = (each.double() for each in kernels.affine)
        read, mix, write = (
            torch.tensor(each, dtype=H.dtype).to(H.device) for each in (numbers.read, numbers.mix, numbers.write)
        )
        identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
        self.matrices = [torch.kron(mix, identity) + torch.kron(torch.outer(write, read), H)]
        self.constants = [torch.kron(write, b)]

    def at(self, index: int) -> tuple[Tensor, Tensor]:
        """Return ``Z^t`` and what t steps add, for t = 2^index."""
        while len(self.matrices) <= index:
            Z, c = self.matrices[-1], self.constants[-1]
            self.constants.append(torch.addmv(c, Z, c))
            self.matrices.append(Z @ Z)
        return self.matrices[index], self.constants[index]

    def forward(self, rows: Tensor, longest: int) -> None:
        """Fill the rows of a trajectory, of shape (K + 1, p m), of which the first is known, by blocks of `longest`."""
        have, index = 1, 0
        while have < rows.shape[0]:
            t = 1 << index
            Z, c = self.at(index)
            new = min(t, rows.shape[0] - have)
            torch.addmm(c, rows[have - t : have - t + new], Z.t(), out=rows[have : have + new])
            have += new
            index += have >= 2 * t and 2 * t <= longest

    def backward(self, rows: Tensor, longest: int) -> None:
        """Fill the rows of cotangents, of shape (K + 1, p m), of which the last is known."""
        first, index = rows.shape[0] - 1, 0
        while first > 0:
            t = 1 << index
            Z, _ = self.at(index)
            new = min(t, first)
            torch.mm(rows[first + t - new : first + t], Z, out=rows[first - new : first])
            first -= new
            index += rows.shape[0] - first >= 2 * t and 2 * t <= longest

    def jump(self, s: Tensor, count: int, longest: int) -> Tensor:
        """Return where `count` steps lead, with nothing kept between."""
        top = longest.bit_length() - 1
        for index in [top] * (count >> top) + [index for index in range(top) if count >> index & 1]:
            Z, c = self.at(index)
            s = torch.addmv(c, Z, s)
        return s

    @property
    def size(self) -> int:
        """The numbers in the stored vectors."""
        return self.constants[0].shape[0]

    @property
    def finite(self) -> Tensor:
        """Whether the highest power is finite, and with it all others, of shape ()."""
        return torch.isfinite(self.matrices[-1].sum())


class Stretch(ABC):
    """Steps that follow one another, there and back."""

    @abstractmethod
    def forward(self, s: Tensor, keep: bool) -> Tensor:
        """Return the stored vectors, (p, m), after the steps; with `keep`, those of every step stay for the sweep."""

    @abstractmethod
    def backward(self, a: Tensor) -> tuple[Tensor, Tree]:
        """Return the cotangents of the stored vectors, (p, m), before the steps, and ``sum_k C_k' v_k``."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what stays for the sweep."""


class Doubled(Stretch):
    """So many equal steps on a quadratic."""

    def __init__(self, kernels: Kernels, powers: Powers, numbers: Coefficients, count: int, longest: int) -> None:
        self.kernels, self.powers, self.numbers = kernels, powers, numbers
        self.count, self.longest = count, longest
        self.rows: Tensor | None = None

    def forward(self, s: Tensor, keep: bool) -> Tensor:
        start = s.double().reshape(-1)
        if keep:
            self.rows = start.new_empty(self.count + 1, len(start))
            self.rows[0] = start
            self.powers.forward(self.rows, self.longest)
            end = self.rows[-1].clone()  # a view would hold all rows
        else:
            end = self.powers.jump(start, self.count, self.longest)
        return end.view_as(s).to(s.dtype)

    def backward(self, a: Tensor) -> tuple[Tensor, Tree]:
        assert self.rows is not None
        back = torch.empty_like(self.rows)
        back[-1] = a.double().reshape(-1)
        self.powers.backward(back, self.longest)
        shape = (self.count, *a.shape)
        points = combined(self.numbers.read, self.rows[:-1].view(shape))
        vectors = combined(self.numbers.write, back[1:].view(shape))
        total = self.kernels.cross(points.to(a.dtype), vectors.to(a.dtype))
        return back[0].view_as(a).to(a.dtype), total

    def forget(self) -> None:
        self.rows = None


def combined(weights: tuple[float, ...], vectors: Tensor) -> Tensor:
    """Return ``sum_i weights_i vectors[:, i]`` of vectors of shape (K, p, m)."""
    if sum(weight != 0 for weight in weights) == 1:
        index = next(index for index, weight in enumerate(weights) if weight)
        return vectors[:, index] if weights[index] == 1.0 else weights[index] * vectors[:, index]
    return torch.einsum("i,kim->km", torch.tensor(weights, dtype=vectors.dtype).to(vectors.device), vectors)


def block(count: int, size: int) -> int:
    """Return the length of the blocks, a power of two, in which `count` steps of vectors of `size` numbers are made."""
    return 1 << max(0, math.floor(math.log2(max(1.0, min(count, WORTH * count / size)))))


def doubles(size: int, norm: float, numbers: Coefficients, count: int) -> bool:
    """Return whether so many equal steps are quicker by doubling, and as exact as steps but for ``eps |H| R``.

    Args:
        size: m, the numbers in one vector.
        norm: ``|H|``, the Frobenius norm.
        numbers: of the step.
        count: steps.
    """
    p = len(numbers.write)
    if block(count, p * size) < SHORTEST:
        return False
    constant = np.zeros((p + 1, p + 1))
    constant[:p, :p], constant[:p, p], constant[p, p] = numbers.mix, numbers.write, 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        reach = abs(float(np.linalg.matrix_power(constant, count)[0, p]))
    return float(np.finfo(np.float64).eps) * reach * norm <= ROUNDING
