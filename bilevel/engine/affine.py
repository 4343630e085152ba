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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.inner.coefficients import Coefficients
from bilevel.oracles.kernels import Kernels, Stepped

ROUNDING = 2e-11
"""The largest ``eps |H| R`` at which steps are doubled."""
WORTH = 8.0
"""A power ``Z^t`` is made for trajectories of at least ``t p m / WORTH`` rows: a squaring costs ``2 (p m)^3``."""
AT_ONCE = 8
"""Rows of a batch that are made at once: their trajectories should fit into a cache."""
SHORTEST = 4
"""Blocks of fewer rows are no quicker than steps."""


class Powers:
    """``Z^(2^i)`` and the constants that belong to them, of one step; each is made when it is asked for.

    Of rows, each of which may have numbers of its own, everything has a leading dimension.
    """

    def __init__(self, kernels: Stepped, numbers: Sequence[Coefficients]) -> None:
        assert kernels.affine is not None
        # In float64 whatever the dtype: sums of powers lose digits that single steps would keep.
        self.H, self.b = H, b = [each.double() for each in kernels.affine]
        self.kernels, self.numbers = kernels, numbers
        read, mix, write = (
            torch.tensor(each[0] if len(numbers) == 1 else each, dtype=H.dtype).to(H.device)
            for each in ([getattr(one, name) for one in numbers] for name in ("read", "mix", "write"))
        )
        identity = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
        blocks = mix[..., :, None, :, None] * identity[:, None, :]
        blocks = blocks + (write[..., :, None] * read[..., None, :])[..., :, None, :, None] * H[..., None, :, None, :]
        size = mix.shape[-1] * H.shape[-1]
        self.matrices = [blocks.reshape(*H.shape[:-2], size, size)]
        self.constants = [(write[..., :, None] * b[..., None, :]).reshape(*H.shape[:-2], 1, size)]
        self.mm: Callable[..., Tensor] = torch.mm if H.dim() == 2 else torch.bmm
        self.add: Callable[..., Tensor] = torch.addmm if H.dim() == 2 else torch.baddbmm

    def at(self, index: int) -> tuple[Tensor, Tensor]:
        """Return ``Z^t`` and what t steps add, a row, for t = 2^index."""
        while len(self.matrices) <= index:
            Z, c = self.matrices[-1], self.constants[-1]
            self.constants.append(self.add(c, c, Z.mT))
            self.matrices.append(Z @ Z)
        return self.matrices[index], self.constants[index]

    def forward(self, rows: Tensor, longest: int) -> None:
        """Fill the rows of a trajectory, of shape (K + 1, p m), of which the first is known, by blocks of `longest`."""
        for index, have, new in _blocks(rows.shape[-2], longest):
            Z, c = self.at(index)
            self.add(c, rows.narrow(-2, have - (1 << index), new), Z.mT, out=rows.narrow(-2, have, new))

    def backward(self, rows: Tensor, longest: int) -> None:
        """Fill the rows of cotangents, of shape (K + 1, p m), of which the last is known."""
        for index, have, new in _blocks(rows.shape[-2], longest):
            first = rows.shape[-2] - have - new
            Z, _ = self.at(index)
            self.mm(rows.narrow(-2, first + (1 << index), new), Z, out=rows.narrow(-2, first, new))

    def jump(self, s: Tensor, count: int, longest: int) -> Tensor:
        """Return where `count` steps lead, with nothing kept between."""
        top, s = longest.bit_length() - 1, s[..., None, :]
        for index in [top] * (count >> top) + [index for index in range(top) if count >> index & 1]:
            Z, c = self.at(index)
            s = self.add(c, s, Z.mT)
        return s[..., 0, :]

    @property
    def size(self) -> int:
        """The numbers in the stored vectors."""
        return self.constants[0].shape[-1]

    @property
    def finite(self) -> Tensor:
        """Whether the highest power is finite, and with it all others, of shape ()."""
        return torch.isfinite(self.matrices[-1].sum())


def _blocks(count: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """Yield how the rows after the first are made: (i of ``Z^(2^i)``, how many rows there are, how many it makes)."""
    have, index = 1, 0
    while have < count:
        new = min(1 << index, count - have)
        yield index, have, new
        have += new
        index += have >= 2 << index and 2 << index <= longest


class Stretch(ABC):
    """Steps that follow one another, there and back."""

    count: int
    at_iterates: bool
    """Whether the gradients of the steps are taken at the iterates."""

    @abstractmethod
    def forward(self, s: Tensor, keep: bool) -> Tensor:
        """Return the stored vectors, (p, m), after the steps; with `keep`, those of every step stay for the sweep."""

    @abstractmethod
    def backward(self, a: Tensor) -> tuple[Tensor, Tree]:
        """Return the cotangents of the stored vectors, (p, m), before the steps, and ``sum_k C_k' v_k``."""

    @abstractmethod
    def vectors(self, after: int) -> Tensor:
        """Return the stored vectors, (p, m), after so many of the steps, which stay."""

    @abstractmethod
    def residuals(self, after: range) -> Tensor:
        """Return the norms of the gradients at the iterates after so many of the steps, which stay."""

    @abstractmethod
    def cut(self, low: int, high: int) -> None:
        """Leave the steps low, ..., high - 1 alone."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what stays for the sweep."""


class Doubled(Stretch):
    """So many equal steps on a quadratic; of rows, `AT_ONCE` rows after the other.

    Args:
        groups: the powers of the steps; of rows, those of each group of them.
        count: steps.
        longest: rows of a trajectory that are made at once, at most.
    """

    def __init__(self, groups: Sequence[Powers], count: int, longest: int) -> None:
        self.groups, self.count, self.longest = groups, count, longest
        self.at_iterates = all(numbers.reads == ((0, 1.0),) for numbers in groups[0].numbers)
        self.rows: list[Tensor] | None = None

    def forward(self, s: Tensor, keep: bool) -> Tensor:
        starts, ends = self._grouped(s), []
        self.dtype = s.dtype
        self.rows = [] if keep else None
        for powers, start in zip(self.groups, starts, strict=True):
            if self.rows is None:
                ends.append(powers.jump(start, self.count, self.longest))
                continue
            rows = start.new_empty(*start.shape[:-1], self.count + 1, start.shape[-1])
            rows.select(-2, 0).copy_(start)
            powers.forward(rows, self.longest)
            self.rows.append(rows)
            ends.append(rows.select(-2, -1).clone())  # a view would hold all rows
        return _joined(ends).view_as(s).to(s.dtype)

    def backward(self, a: Tensor) -> tuple[Tensor, Tree]:
        assert self.rows is not None
        starts, total = [], None
        for powers, rows, end in zip(self.groups, self.rows, self._grouped(a), strict=True):
            back = torch.empty_like(rows)
            back.select(-2, -1).copy_(end)
            powers.backward(back, self.longest)
            shape = (*rows.shape[:-2], self.count, *a.shape[-2:])
            points = _combined([one.read for one in powers.numbers], rows.narrow(-2, 0, self.count).view(shape))
            vectors = back.narrow(-2, 1, self.count).view(shape)
            used, writes = _used(one.write for one in powers.numbers)
            # C(x)'v is linear in v alone: a number that all vectors are multiplied by multiplies the sum instead.
            alone = len(writes) == len(used) == 1
            vectors = vectors.select(-2, used[0]) if alone else _combined(writes, vectors)
            part = cast(Kernels, powers.kernels).cross(points.to(a.dtype), vectors.to(a.dtype))
            part = tree.scale(writes[0][used[0]], part) if alone else part
            total = part if total is None else tree.add(total, part)
            starts.append(back.select(-2, 0))
        return _joined(starts).view_as(a).to(a.dtype), total

    def vectors(self, after: int) -> Tensor:
        assert self.rows is not None
        return self.rows[0][after].view(len(self.groups[0].numbers[0].write), -1)

    def residuals(self, after: range) -> Tensor:
        assert self.rows is not None
        (powers,), (rows,) = self.groups, self.rows
        # Of the iterates as they are handed on: rounding of single precision is part of their residual.
        H, b, points = (
            each.to(self.dtype) for each in (powers.H, powers.b, rows[after.start : after.stop : after.step])
        )
        return torch.linalg.vector_norm(torch.addmm(b, points[:, : len(b)], H), dim=1)

    def cut(self, low: int, high: int) -> None:
        self.count = high - low
        self.rows = None if self.rows is None else [rows.narrow(-2, low, high - low + 1) for rows in self.rows]

    def forget(self) -> None:
        self.rows = None

    def _grouped(self, s: Tensor) -> list[Tensor]:
        """Return stored vectors, ([rows,] p, m), as those of each group, ([rows,] p m), in float64."""
        flat = s.double().flatten(-2)
        return [flat] if flat.dim() == 1 else list(torch.split(flat, AT_ONCE))


def _joined(groups: list[Tensor]) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def _used(weights: Iterable[Sequence[float]]) -> tuple[list[int], list[Sequence[float]]]:
    """Return which columns of weights are not all zero, and the weights."""
    rows = list(weights)
    return [index for index, column in enumerate(zip(*rows, strict=True)) if any(column)], rows


def _combined(weights: Sequence[Sequence[float]], vectors: Tensor) -> Tensor:
    """Return ``sum_i weights_i vectors[:, i]`` of vectors of shape ([rows,] K, p, m), by the weights of each row."""
    used, _ = _used(weights)
    if len(weights) == len(used) == 1 and weights[0][used[0]] == 1.0:
        return vectors.select(-2, used[0])
    factors = vectors.new_tensor(weights if len(weights) > 1 else weights[0])[..., None, :, None]
    return (vectors * factors).sum(-2)


def block(count: int, size: int) -> int:
    """Return the length of the blocks, a power of two, in which `count` steps of vectors of `size` numbers are made."""
    return 1 << max(0, math.floor(math.log2(max(1.0, min(count, WORTH * count / size)))))


def doubles(
    size: int,
    norm: float,
    numbers: Sequence[Coefficients],
    count: int,
    least: Callable[[], float] = lambda: 0.0,
) -> bool:
    """Return whether so many equal steps are quicker by doubling, and as exact as steps but for ``eps |H| R``.

    R is what the steps make of a constant gradient of 1 where the curvature is least: about 1 / curvature after many.

    Args:
        size: m, the numbers in one vector.
        norm: ``|H|``, the Frobenius norm; of rows, the largest.
        numbers: of the step; of rows that differ, of each.
        count: steps.
        least: returns the smallest eigenvalue of H; asked for where no curvature at all is not enough.
    """
    if count < SHORTEST or block(count, len(numbers[0].write) * size) < SHORTEST:
        return False
    most = ROUNDING / (float(np.finfo(np.float64).eps) * norm) if norm > 0 else math.inf
    return _reach(tuple(numbers), count, 0.0) <= most or _reach(tuple(numbers), count, least()) <= most


@lru_cache(maxsize=256)
def _reach(numbers: tuple[Coefficients, ...], count: int, curvature: float) -> float:
    """Return R of so many steps; of rows, the largest."""
    p = len(numbers[0].write)
    read, write, mix = (np.array([getattr(one, name) for one in numbers]) for name in ("read", "write", "mix"))
    constant = np.zeros((len(numbers), p + 1, p + 1))
    constant[:, :p, :p] = mix + curvature * write[:, :, None] * read[:, None, :]
    constant[:, :p, p], constant[:, p, p] = write, 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.abs(np.linalg.matrix_power(constant, count)[:, 0, p]).max())
