"""`LinearData`: the rows that a criterion of a linear model is made of, standardised by themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from bilevel.numerics.csr import csr, distinct, sparse_rows
from bilevel.numerics.small import array, finite, tensor
from bilevel.problems.losses import GLMLoss
from bilevel.problems.splits import Split
from bilevel.problems.tables import features, targets

CONSTANT = 1e-12
"""A column whose deviation is below this part of its size, or its mean square less that of its mean below this part of
the first, is constant: what is left are rounding errors."""
DENSE = 20_000_000
"""Entries up to which sparse inputs are made dense where a method needs that."""
BLOCK = 256
"""Columns or rows of a matrix that are made at once from products with sparse inputs."""

Rows = Tensor | Sequence[int]
"""Indices of rows."""


@dataclass(frozen=True, eq=False)
class LinearData:
    """Standardised rows of a linear model; made by `LinearData.of`.

    The standardised column j is ``(given - offset_j) / scale_j``, with the weighted mean and deviation of these rows;
    a constant column becomes zero, with scale 1. Dense X holds standardised columns. Sparse X holds what was given,
    and `product` and `collect` standardise implicitly.

    Attributes:
        X: of shape (rows, features), dense or sparse CSR; float64 on the CPU.
        y: targets as the loss takes them, of shape (rows,), or (targets, rows).
        weights: of shape (rows,), with mean 1.
        offset: of shape (features,); zeros without an intercept.
        scale: of shape (features,); ones without standardisation.
        intercept: whether the model has one, which is not penalised.
        standardize: whether columns are scaled, by these rows and again by those of every fold.
    """

    X: Tensor
    y: Tensor
    weights: Tensor
    offset: Tensor
    scale: Tensor
    intercept: bool = True
    standardize: bool = True

    @classmethod
    def of(
        cls,
        X: Any,
        y: Any,
        weights: Any = None,
        *,
        loss: GLMLoss | None = None,
        intercept: bool = True,
        standardize: bool = True,
    ) -> Self:
        """Return the data of rows as they were given.

        Args:
            X: of shape (rows, features): a tensor, an array, nested lists, or sparse (SciPy's, or a sparse tensor).
            y: of shape (rows,), or (rows, targets).
            weights: of shape (rows,), not negative: a row of weight 2 stands for two rows; None for equal ones.
            loss: which encodes y, such as two labels as -1 and +1; by default y is as the loss takes it.
            intercept: whether the model has an intercept.
            standardize: whether penalties are those of columns with deviation 1.

        Raises:
            ValueError: in one sentence, for shapes that do not fit, and numbers that are not finite.

        >>> data = LinearData.of([[0.0], [2.0]], [1.0, 3.0])
        >>> data.X, data.offset, data.scale
        (tensor([[-1.],
                [ 1.]], dtype=torch.float64), tensor([1.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
        """
        X = _inputs(X)
        y = _targets(y, X, loss)
        like = _values(X)
        weights = like.new_ones(len(X)) if weights is None else torch.as_tensor(weights).to(like)
        if weights.shape != (len(X),) or not array(weights).min() >= 0 or not array(weights).sum() > 0:
            raise ValueError(f"weights must have shape ({len(X)},), one for each row, none negative and not all zero.")
        zero = like.new_zeros(X.shape[1])
        raw = cls(X, y, weights, zero, torch.ones_like(zero), intercept, standardize)
        return raw.take(slice(None))

    def take(self, rows: Rows | slice) -> Self:
        """Return some of the rows, standardised by themselves, with weights of mean 1; `of` takes all of them.

        Args:
            rows: indices, or a slice.

        Raises:
            ValueError: where all of them have weight zero.
        """
        keep = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self.y.device)
        s, y, offset, scale = array(self.weights[keep]), self.y[..., keep], array(self.offset), array(self.scale)
        if not s.sum() > 0:
            raise ValueError("all rows of a part have weight zero.")
        s = s / s.mean()
        weights, kinds = tensor(s), (self.intercept, self.standardize)
        if self.sparse:
            X = sparse_rows(self.X, keep)
            mean, own = map(array, type(self)(X, y, weights, self.offset, self.scale, *kinds).moments(weights))
            own[own == 0] = 1.0
        else:
            rows, mean, own = _standardised(array(self.X[keep]), s, *kinds)
            X = tensor(rows)
        offset, scale = offset + scale * mean, scale * own if self.standardize else scale
        return type(self)(X, y, weights, tensor(offset), tensor(scale), *kinds)

    def __getstate__(self) -> dict[str, Any]:
        # Torch remarks in every process that loads a CSR tensor that all of CSR is a beta: its parts are loaded.
        state = {name: each for name, each in vars(self).items() if name != "Xt"}
        if self.sparse:
            X = self.X
            state["X"] = (X.crow_indices(), X.col_indices(), X.values(), (self.rows, self.features))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        X = state["X"]
        vars(self).update(state, X=csr(*X) if isinstance(X, tuple) else X)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.X.shape[0]

    @cached_property
    def counted(self) -> int:
        """Number of rows with a weight above zero: those that a model is of."""
        return int((self.weights > 0).sum())

    @property
    def features(self) -> int:
        """Number of features."""
        return self.X.shape[1]

    @cached_property
    def level(self) -> float:
        """The log penalty that shrinks a lone column of mean size by half: the log of the mean of ``sum_i s_i x_ij^2``.

        It is log n for standardised columns. Constant columns do not count.
        """
        size = math.log(self.rows)
        if self.standardize:
            return size
        squares = self.squares(self.weights)
        mean = float(squares.sum() / (squares > 0).sum().clamp_min(1))
        return math.log(mean) if mean > 0 else size

    @property
    def sparse(self) -> bool:
        """Whether X is sparse."""
        return self.X.layout == torch.sparse_csr

    @cached_property
    def Xt(self) -> Tensor:
        """The transpose of sparse X in rows of its own: products with it are then as quick as those with X."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls all of CSR a beta
            return self.X.t().to_sparse_csr()

    def to(self, dtype: torch.dtype) -> Self:
        """Return the data in another precision."""
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        parts = {name: getattr(self, name).to(dtype) for name in ("X", "weights", "offset", "scale")}
        return replace(self, y=y, **parts)

    def with_ones(self) -> Tensor:
        """Return dense X, with a last column of ones where there is an intercept."""
        X = self.dense()
        return torch.cat([X, X.new_ones(len(X), 1)], 1) if self.intercept else X

    def product(self, w: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the predictions without intercept, (..., rows), of standardised coefficients (..., features).

        Args:
            w: the coefficients.
            rows: indices of those that are wanted; None for all.
        """
        if not self.sparse:
            return w @ (self.X if rows is None else self.X[rows]).T
        w = w / self.scale
        flat = w.reshape(-1, self.features)
        product = ((self.X if rows is None else sparse_rows(self.X, rows)) @ flat.T - flat @ self.offset).T
        return product.reshape(*w.shape[:-1], product.shape[-1])

    def collect(self, r: Tensor) -> Tensor:
        """Return ``X' r`` of the standardised columns, (..., features), for r of shape (..., rows)."""
        if not self.sparse:
            return r @ self.X
        flat = r.reshape(-1, self.rows)
        collected = (self.Xt @ flat.T).T - flat.sum(1, keepdim=True) * self.offset
        return (collected / self.scale).reshape(*r.shape[:-1], self.features)

    def gram(self, d: Tensor, index: Tensor | None = None) -> Tensor:
        """Return ``X' diag(d) X`` of the standardised columns, (..., features, features), or rows of it.

        Args:
            d: of shape (rows,), or (..., 1, rows).
            index: of the rows that are wanted; None for all.
        """
        if not self.sparse:
            return ((self.X if index is None else self.X[:, index]).T * d) @ self.X
        blocks = _blocks(self.features, d) if index is None else [_units(index, self.features, d)]
        return torch.cat([self.collect(self.product(block) * d) for block in blocks], -2)

    def row_gram(self) -> Tensor:
        """Return ``X X'`` of the standardised columns, (rows, rows)."""
        if not self.sparse:
            X = array(self.X)
            return tensor(X @ X.T)  # NumPy computes one triangle
        return torch.cat([self.product(self.collect(block)) for block in _blocks(self.rows, self.scale)])

    def dense(self) -> Tensor:
        """Return the standardised columns as a dense matrix, (rows, features).

        Raises:
            ValueError: for sparse X of more than 20 million entries.
        """
        if not self.sparse:
            return self.X
        if self.rows * self.features > DENSE:
            raise ValueError(
                f"X is sparse, of shape ({self.rows}, {self.features}): a criterion that leaves out single rows with "
                "such penalties makes it dense, up to 20 million entries; use K-fold."
            )
        return (self.X.to_dense() - self.offset) / self.scale

    def moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the standardised columns under other weights, (..., features) each.

        The mean is zero without an intercept, and the deviation one about zero; it is 0 where a column is constant.

        Args:
            weights: of shape (..., rows), such as zeros for the rows of a fold.
        """
        share = weights / weights.sum(-1, keepdim=True)
        mean, square = self.collect(share), self.squares(share)
        mean = mean if self.intercept else torch.zeros_like(mean)
        variance = square - mean.square()
        return mean, _deviations(variance.masked_fill(variance <= CONSTANT * square, 0.0), square)

    def squares(self, weights: Tensor) -> Tensor:
        """Return the sums of the squares of the standardised columns, (..., features), under weights (..., rows)."""
        if not self.sparse:
            return weights @ self.X.square()
        flat = weights.reshape(-1, self.rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            squared = torch.sparse_csr_tensor(
                self.Xt.crow_indices(), self.Xt.col_indices(), self.Xt.values().square(), self.Xt.shape
            )
        first, second = (self.Xt @ flat.T).T, (squared @ flat.T).T
        total = second - 2.0 * self.offset * first + self.offset.square() * flat.sum(1, keepdim=True)
        return (total / self.scale.square()).reshape(*weights.shape[:-1], self.features)


def _blocks(size: int, like: Tensor) -> Sequence[Tensor]:
    """Return the rows of the identity in blocks."""
    return torch.eye(size, dtype=like.dtype, device=like.device).tensor_split(tuple(range(BLOCK, size, BLOCK)))


def _units(index: Tensor, size: int, like: Tensor) -> Tensor:
    """Return some rows of the identity, (k, size)."""
    rows = like.new_zeros(len(index), size)
    rows[torch.arange(len(index)), index] = 1.0
    return rows


def _standardised(X: Any, weights: Any, centred: bool, scaled: bool) -> tuple[Any, Any, Any]:
    """Return a copy of rows, an array or a tensor, about their mean and of deviation 1, with means and deviations.

    A constant column becomes zero, and has deviation 1.
    """
    share = weights / len(weights)
    mean = share @ X if centred else 0.0 * X[0]
    X = X - mean
    variance = share @ (X * X)
    deviation = _deviations(variance, variance + mean * mean)
    if not deviation.all():
        X[:, deviation == 0] = 0.0
        deviation[deviation == 0] = 1.0
    if scaled:
        X /= deviation
    return X, mean, deviation


def _deviations(variance: Any, square: Any) -> Any:
    """Return the roots of variances, zero where a column is constant up to rounding errors; square: its mean square."""
    deviation = variance.clip(0.0) ** 0.5
    deviation[deviation <= CONSTANT * square**0.5] = 0.0
    return deviation


def _inputs(given: Any) -> Tensor:
    """Return X as a floating tensor, dense or CSR: float64 on the CPU."""
    if hasattr(given, "tocsr"):
        table = given.tocsr()
        ends, columns, values = (torch.as_tensor(part) for part in (table.indptr, table.indices, table.data))
        X = distinct(csr(ends.long(), columns.long(), values.double(), table.shape))
    elif isinstance(given, Tensor) and given.layout != torch.strided:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            X = distinct(given.detach().to_sparse_csr())
    else:
        X = features("X", given)
    X = X.double() if X.device.type == "cpu" else X
    if X.dim() != 2 or 0 in X.shape:
        raise ValueError(f"X must have shape (rows, features), got {tuple(X.shape)}.")
    if not finite(_values(X)):
        raise ValueError("X holds NaN or infinite values: drop or fill those rows first.")
    return X


def _values(X: Tensor) -> Tensor:
    """Return the entries of X that are stored."""
    return X if X.layout == torch.strided else X.values()


def _targets(given: Any, X: Tensor, loss: GLMLoss | None) -> Tensor:
    """Return the targets as the loss takes them, (rows,) or (targets, rows)."""
    y = targets("y", given)
    if not isinstance(y, Tensor):
        raise ValueError("y holds strings: encode them as numbers.")
    if y.dim() not in (1, 2) or len(y) != len(X):
        raise ValueError(f"y must have shape ({len(X)},), one target for each row of X, got {tuple(y.shape)}.")
    if y.is_floating_point() and not finite(y):
        raise ValueError("y holds NaN or infinite values: drop or fill those rows first.")
    y = y.to(X.device)
    if y.dim() == 2:
        return y.T.to(X.dtype).contiguous()
    if loss is None:
        return y.to(X.dtype) if y.is_floating_point() else y
    try:
        return loss.encode({"train": Split("train", _values(X).new_ones(len(X), 1), y)})["train"]
    except ValueError as error:
        raise ValueError(str(error).replace("y_train", "y")) from None
