"""Sparse CSR tensors: rows of them, and entries that are stored once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def sparse_rows(X: Tensor, rows: Tensor | slice) -> Tensor:
    """Return some rows of a sparse CSR matrix."""
    if isinstance(rows, slice) and rows == slice(None):
        return X
    index = torch.arange(X.shape[0], device=X.device)[rows]
    start, length = X.crow_indices()[index], X.crow_indices().diff()[index]
    ends = torch.cat([length.new_zeros(1), length.cumsum(0)])
    entry = torch.arange(int(ends[-1]), device=X.device) + (start - ends[:-1]).repeat_interleave(length)
    return csr(ends, X.col_indices()[entry], X.values()[entry], (len(index), X.shape[1]))


def csr(ends: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a sparse CSR tensor without the remark that all of CSR is a beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(ends, columns, values, shape)


def distinct(X: Tensor) -> Tensor:
    """Return a CSR matrix whose entries are stored in order and once: several of one place are summed up."""
    columns, steps = X.col_indices().long(), X.crow_indices().diff()
    rows = torch.arange(len(steps), device=X.device).repeat_interleave(steps)
    if bool(((rows.diff() > 0) | (columns.diff() > 0)).all()):
        return X
    summed = torch.sparse_coo_tensor(torch.stack([rows, columns]), X.values(), X.shape).coalesce()
    lengths = torch.bincount(summed.indices()[0], minlength=len(steps))
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return csr(ends, summed.indices()[1], summed.values(), (X.shape[0], X.shape[1]))
