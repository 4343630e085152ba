"""Algebra of small dense matrices: of NumPy arrays by BLAS and LAPACK, of tensors by torch.

On matrices of some hundred rows a call of torch takes two to five times as long as one of NumPy or SciPy. Arithmetic
that makes many such calls therefore takes `array(tensor)`, and stays with what arrays and tensors have in common:
``@``, ``*``, ``.T``, ``.sum(1)``, ``.clip(least)`` and the functions here.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGE = 200_000_000
"""Rows times squared columns from which one triangle of a Gram matrix of tensors is computed: by NumPy, or blocks."""
BLOCKS = 4
SINGULAR = 1e-13
"""The least square of a pivot, as a part of the entry of the matrix in its place, that is more than rounding."""
PAIRS = 25_000_000
"""Rows times squared columns up to which the products of pairs of columns are kept: half as many numbers."""


@cache
def lapack() -> Any:
    """Return SciPy's LAPACK; here, since `import bilevel` is not to wait for it."""
    from scipy.linalg import lapack

    return lapack


@cache
def _blas() -> Any:
    from scipy.linalg import blas

    return blas


def array(values: Tensor) -> Any:
    """Return the NumPy array that shares memory with a tensor on the CPU; tensors elsewhere as they are."""
    return values.numpy() if values.device.type == "cpu" else values


def tensor(values: Any) -> Tensor:
    """Return the tensor of an array, which shares memory with it."""
    return values if isinstance(values, Tensor) else torch.from_numpy(values)


def to_numpy(values: Any) -> NDArray[np.float64]:
    """Return an array, or a tensor of any device, as a NumPy array."""
    return values.double().cpu().numpy() if isinstance(values, Tensor) else values


@cache
def pairs_of(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return both members of all pairs of some indices, and the place of every pair among them, (size, size)."""
    one, two = torch.triu_indices(size, size)
    place = torch.empty(size, size, dtype=torch.long)
    place[one, two] = place[two, one] = torch.arange(len(one))
    return one, two, place


def paired(X: Tensor) -> Tensor | None:
    """Return the products of all pairs of columns, (pairs, rows); None where these are too many numbers to be kept."""
    if len(X) * X.shape[1] ** 2 > PAIRS:
        return None
    one, two, _ = pairs_of(X.shape[1])
    columns = X.T.contiguous()
    return columns[one] * columns[two]


def block_grams(pairs: Tensor, d: Tensor, size: int) -> Tensor:
    """Return ``X' diag(d_ab) X`` of several outputs as one matrix, (outputs size, outputs size).

    Args:
        pairs: of the columns of X: see `paired`.
        d: symmetric in its outputs, (outputs, outputs, rows).
        size: the number of columns.
    """
    one, two, place = pairs_of(len(d))
    blocks = (d[one, two] @ pairs.T)[:, pairs_of(size)[2]][place]
    return blocks.transpose(1, 2).reshape(len(d) * size, len(d) * size)


def finite(values: Tensor) -> bool:
    """Return whether all are finite: a sum sees them in one pass; one that overflows is looked at again."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def norm(x: Any) -> Any:
    """Return the root of the sum of squares: of an array a number, of a tensor one."""
    if isinstance(x, Tensor):
        return torch.linalg.vector_norm(x)
    flat = x if x.ndim == 1 else x.reshape(-1)
    return math.sqrt(flat.dot(flat))


def row_dots(A: Any, B: Any) -> Any:
    """Return the inner products of the rows of two matrices."""
    return (A * B).sum(1) if isinstance(A, Tensor) else np.einsum("ij,ij->i", A, B)


def factor(gram: Tensor, a: Tensor) -> Tensor:
    """Return the Cholesky factor of ``gram + diag(a)``, (..., p, p); where rounding leaves none, of a little more.

    `gram` is positive semidefinite, and changed in place; a is of shape (..., p), not negative.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += a
    L, info = torch.linalg.cholesky_ex(gram)
    more = 1e-14
    while bool(info.any()) and more < 1.0:
        diagonal += more * diagonal.amax(-1, keepdim=True) + torch.finfo(gram.dtype).tiny
        L, info = torch.linalg.cholesky_ex(gram)
        more *= 10.0
    return L


def is_regular(L: Any, gram: Any) -> bool:
    """Return whether the pivots of a factor are more than rounding of the matrix that penalties were added to."""
    if isinstance(L, Tensor):
        L, gram = (each.diagonal(dim1=-2, dim2=-1) for each in (L, gram))
    else:
        L, gram = L.diagonal(), gram.diagonal()
    return bool((SINGULAR * gram < L**2).all())


def cholesky(gram: Any, a: Any) -> Any:
    """Return the factor L of one matrix ``gram + diag(a)``, as `factor` does; gram stays as it is.

    Of an array, only the lower triangle of L is set.
    """
    if isinstance(gram, Tensor):
        return factor(gram.clone(), a)
    # LAPACK takes columns where NumPy has rows; the matrix is symmetric.
    matrix = np.array(gram, dtype=np.float64, order="C")
    diagonal = matrix.reshape(-1)[:: len(matrix) + 1]
    diagonal += a
    L, info = lapack().dpotrf(matrix.T, lower=1, clean=0)
    more = 1e-14
    while info and more < 1.0:
        diagonal += more * diagonal.max() + np.finfo(np.float64).tiny
        L, info = lapack().dpotrf(matrix.T, lower=1, clean=0)
        more *= 10.0
    return L


def solve(L: Any, r: Any) -> Any:
    """Return ``(L L')^-1 r`` of a vector."""
    if isinstance(L, Tensor):
        return torch.cholesky_solve(r[:, None], L)[:, 0]
    return lapack().dpotrs(L, r, lower=1)[0]


def half_solve(L: Any, B: Any, *, transposed: bool = False) -> Any:
    """Return ``L^-1 B``, or ``L'^-1 B``, of a matrix; of arrays quickest where B is the transpose of one of rows."""
    if isinstance(L, Tensor):
        return torch.linalg.solve_triangular(L.T if transposed else L, B, upper=transposed)
    return _blas().dtrsm(1.0, L, B, lower=1, trans_a=int(transposed))


def inverse(L: Any) -> Any:
    """Return ``(L L')^-1``."""
    if isinstance(L, Tensor):
        return torch.cholesky_inverse(L)
    lower = np.tril(lapack().dpotri(L, lower=1)[0])
    full = lower + lower.T
    full.reshape(-1)[:: len(full) + 1] *= 0.5
    return full


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix, increasing, and its eigenvectors as columns."""
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    found = np.linalg.eigh(array(matrix))
    return tensor(found.eigenvalues), tensor(found.eigenvectors)


def weighted_gram(X: Any, d: Any) -> Any:
    """Return ``X' diag(d) X``, (..., p, p), for d of shape (..., rows); of arrays for d of shape (rows,)."""
    if not isinstance(X, Tensor):
        if d.min() < 0:
            return (X.T * d) @ X
        scaled = X * np.sqrt(d)[:, None]
        return scaled.T @ scaled  # NumPy computes one triangle, where it sees the same matrix twice
    if d.dim() > 1 and d.numel() * X.shape[1] > 2_000_000:
        return torch.stack([weighted_gram(X, each) for each in d])
    size = X.shape[1]
    if d.dim() > 1 or len(X) * size**2 < LARGE:
        return (X.T * d[..., None, :]) @ X
    if X.device.type == "cpu" and not bool(d.min() < 0):
        scaled = X * d.sqrt()[:, None]
        return tensor(array(scaled).T @ array(scaled))
    # Of a symmetric matrix only the blocks on one side of the diagonal are computed.
    gram = X.new_empty(size, size)
    for start in range(0, size, -(-size // BLOCKS)):
        block = slice(start, start + -(-size // BLOCKS))
        gram[block, start:] = (X[:, block] * d[:, None]).T @ X[:, start:]
        gram[start:, block] = gram[block, start:].T
    return gram
