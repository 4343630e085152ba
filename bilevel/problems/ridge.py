"""Ridge regression."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.dense import EIGENBASIS, EIGENVALUES, symmetric_product
from bilevel.numerics.eigenbasis import Eigenbasis, diagonalise
from bilevel.numerics.inverse import ByFactor
from bilevel.numerics.lanczos import Spectrum, lanczos
from bilevel.oracles import batching as batches
from bilevel.oracles.exact import Exact
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.kernels import Affine, Kernels
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.structure import QuadraticForm, Structure
from bilevel.problems.design import Design
from bilevel.problems.host import known_on_host, on_host
from bilevel.problems.kernels import ModelKernels
from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.linear_oracles import LinearModelInner, LinearModelPoint
from bilevel.problems.losses import Squared
from bilevel.problems.ridge_host import HostRidge
from bilevel.problems.splits import Split


class RidgePoint(LinearModelPoint):
    """The gradient of ridge regression, linearised: its Hessian is the same everywhere."""

    inner: RidgeInner

    def _hvp(self, v: Tensor) -> Tensor:
        return self.inner.product(v)

    def data_hessian(self, dtype: torch.dtype | None = None) -> Tensor:
        gram: Tensor = self.inner.problem.gram
        return gram if dtype is None else gram.to(dtype)


class RidgeInner(LinearModelInner):
    """Ridge regression at fixed penalties; with no fewer rows than features, on the Gram matrix."""

    linearization = RidgePoint

    @cached_property
    def hessian(self) -> Tensor | None:
        """H on the Gram matrix; None where products go through the rows, or there are several problems."""
        problem = self.problem
        if not problem.on_gram or problem.batch is not None:
            return None
        return torch.addcmul(problem.gram, self.penalty, problem.identity)

    def _few(self) -> Tensor | None:
        """Return H of few features; of many it costs as much as several products, of which no more may be asked."""
        return self.hessian if self.problem.params.shape[-1] <= EIGENVALUES else None

    def product(self, v: Tensor) -> Tensor:
        """Return ``H v``, not counted."""
        if (hessian := self._few()) is not None:
            return torch.mv(hessian, v)
        problem = self.problem
        if problem.on_gram:
            return torch.addcmul(problem.gram_product(v), self.penalty, v)
        return self._collect(problem.predict(problem.train.X, v), v)

    def kernels(self) -> Kernels | None:
        problem = self.problem
        if problem.batch is not None and problem.on_gram:
            linear = -problem.moment.expand(problem.params.shape)
            return Affine(problem.gram + torch.diag_embed(self.flat_penalty), linear, self._rows_sum)
        if self.hessian is None:
            kernels = super().kernels()
            return kernels if kernels is None or problem.penalty != "scalar" else Wide(self)
        return Affine(self.hessian, -problem.moment, self._cross_sum, lambda x: self.slope_rows * x)

    def _rows_sum(self, points: Tensor, vectors: Tensor, rows: slice) -> Tensor:
        """Return the hyperparameters' derivatives of some rows, beside zeros."""
        one = self.slope.shape[-1] == 1  # penalty for each row
        total = torch.zeros_like(self.slope if one else self.problem.params)
        if one:
            torch.bmm(points.flatten(1)[:, None], vectors.flatten(1)[:, :, None], out=total[rows][..., None])
        else:
            total[rows] = (points * vectors).sum(-2)
        return self.problem.gather(self.slope * total)

    def _grad(self, params: Tensor) -> Tensor:
        problem = self.problem
        if (hessian := self._few()) is not None:
            return torch.addmv(problem.moment, hessian, params, beta=-1.0)
        if problem.on_gram:
            return self.product(params) - problem.moment
        return self._collect(problem.predict(problem.train.X, params) - problem.train.y, params)

    def _collect(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return ``c X' rows + pen weights``."""
        return torch.add(
            self.penalty * weights, self.problem.collect(self.problem.train.X, rows), alpha=self.problem.scale
        )

    def curvature(self, params: Tensor) -> Spectrum:
        """Return the ends of the spectrum: exact up to 300 features, else the upper by Lanczos and a lower bound."""
        if self.hessian is None or len(self.hessian) > EIGENVALUES:
            measured = lanczos(self.linearize(params).hvp, params)
            return replace(measured, smallest=float(self.penalty.min()), exact=False)
        basis = self.problem.spectrum()
        values = torch.linalg.eigvalsh(self.hessian) if basis is None else basis.bind(self.hparams).values
        return Spectrum(float(values[0]), float(values[-1]), exact=True)


OUTSIDE = 64.0
"""Rounding units of a vector that may lie outside a space in which it is."""


class Wide(ModelKernels):
    """Fewer rows than features under one penalty: a run from zero stays in what the rows span, of fewer dimensions."""

    def within(self, vectors: Tensor) -> Kernels:
        problem, inner = self.inner.problem, self.inner
        basis, data = problem.row_space
        outside = vectors - (vectors @ basis) @ basis.t()
        if float(outside.norm()) > OUTSIDE * torch.finfo(vectors.dtype).eps * float(vectors.norm()):
            return self
        penalty, slope = inner.penalty.reshape(()), inner.slope.reshape(())
        hessian = torch.addmm(
            penalty * torch.eye(len(data), dtype=data.dtype, device=data.device), data, data.t(), alpha=problem.scale
        )
        kernels = Affine(
            hessian,
            -problem.scale * (data @ problem.train.y),
            lambda points, vectors: slope * (points * vectors).sum(),
            lambda z: slope * z[None],
        )
        kernels.basis = basis
        return kernels


class RidgeProblem(LinearModelProblem):
    """Ridge regression with tuned penalties.

        inner   c/2 |X w - y|^2 + 1/2 sum_j pen_j w_j^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/(2m) |X_val w - y_val|^2

    Options are those of `LinearModelProblem`. There is no intercept: centre X and y, or add a column of ones.

    >>> X = torch.eye(3, dtype=torch.float64)
    >>> y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> problem = RidgeProblem(X, y, X, y, loss="sum")
    >>> problem.solve(torch.zeros((), dtype=torch.float64))
    tensor([0.5000, 1.0000, 1.5000], dtype=torch.float64)
    """

    task = "regression"
    inner_problem: type[InnerProblem] = RidgeInner
    glm = Squared()
    structure = Structure(quadratic=True)

    @property
    def on_gram(self) -> bool:
        """Whether products go through the Gram matrix: cheaper with no fewer rows than features."""
        return self.train.rows >= self.train.X.shape[-2]

    @cached_property
    def gram(self) -> Tensor:
        """``c X'X``, of shape (features, features), or (batch, features, features) for stacked data."""
        X = self.train.X
        return (symmetric_product(X, X) if X.dim() == 2 else X @ X.mT).mul_(self.scale)

    @cached_property
    def row_space(self) -> tuple[Tensor, Tensor]:
        """An orthonormal basis of what the rows span, (features, rows), and the rows in it, (rows, rows)."""
        basis, data = torch.linalg.qr(self.train.X)
        return basis, data

    @cached_property
    def identity(self) -> Tensor:
        """The identity, of shape (features, features)."""
        return torch.eye(len(self.train.X), dtype=self.train.X.dtype, device=self.train.X.device)

    @cached_property
    def moment(self) -> Tensor:
        """``c X'y``, of shape (features,), or (batch, features) for stacked data."""
        X, y = self.train.X, self.train.y
        return self.scale * (X @ y if X.dim() == 2 else torch.bmm(X, y[:, :, None])[:, :, 0])

    def gram_product(self, v: Tensor) -> Tensor:
        """Return ``c X'X v`` of problems side by side."""
        return v @ self.gram if self.gram.dim() == 2 else torch.bmm(self.gram, v[:, :, None])[:, :, 0]

    def _rows(self, single: Sequence[BilevelProblem], *data: Split) -> BilevelProblem:
        if self.on_gram and not data:
            _ = self.gram, self.moment  # kept here, for the next batch of these data, too
        rows: Any = super()._rows(single, *data)
        for name in ("gram", "moment") if data else ():
            if name in vars(rows):
                delattr(rows, name)  # those of the first problem's data
        return rows

    def outer_value_and_grads(self, params: Tree, hparams: Tree) -> tuple[Tensor, Tree, Tree]:
        if self.batch is not None:
            return super().outer_value_and_grads(params, hparams)
        X, y = self.val.X, self.val.y
        residuals = torch.addmv(y, X.t(), params, beta=-1.0)
        scaled = residuals / self.val.rows
        return 0.5 * torch.dot(residuals, scaled), torch.mv(X, scaled), torch.zeros_like(hparams)

    @cached_property
    def _host(self) -> HostRidge | None:
        known = self.solved_on_host and type(self.glm) is Squared and self.nonsmooth is None
        return HostRidge.of(self) if known else None

    def exact(self, hparams: Tensor) -> Exact | None:
        """Return the result by a Cholesky factor, and in the eigenbasis where one penalty is asked for again."""
        host = None if self.batch is not None else self._host
        if host is None or not on_host(hparams, self.hparams_shape()):
            return None
        return host.exact(self, hparams, self.spectrum() if self.recurring else None)

    def stepped(self, hparams: Tree, start: Tree, numbers: tuple[float, ...], steps: int) -> Exact | None:
        host = None if self.batch is not None or not self.has_spectrum else self._host
        if host is None or not on_host(hparams, ()) or not on_host(start, self.params_shape()):
            return None
        return host.stepped(self, hparams, self._eigenbasis, start.numpy(), numbers, steps)

    def quadratic_form(self, hparams: Tensor) -> QuadraticForm:
        u, shape = hparams.detach(), self.params_shape()
        penalties, flat = self.penalties(u).expand(shape), tree.Raveler(u)
        units = torch.eye(flat.size, dtype=u.dtype, device=u.device)
        slopes = torch.stack([self.spread(flat.unravel(row)).expand(shape) for row in units])
        slopes = slopes * penalties if self.parametrization == "log" else slopes
        return QuadraticForm(self.gram + torch.diag(penalties), -self.moment, slopes, torch.zeros_like(slopes))

    def spectrum(self) -> Eigenbasis | None:
        """Return the eigenbasis of the Gram matrix of up to 5,000 features, for one penalty; computed once."""
        return self._eigenbasis if self.has_spectrum else None

    @property
    def has_spectrum(self) -> bool:
        return self.batch is None and self.penalty == "scalar" and len(self.train.X) <= EIGENBASIS

    @cached_property
    def _eigenbasis(self) -> Eigenbasis:
        wide = self._widened()
        return diagonalise(wide.gram, -wide.moment, self._shift)

    @cached_property
    def in_double(self) -> RidgeProblem:
        """This problem in float64, where it computes as this class does."""
        ours = self.batch is None and known_on_host(type(self)) and type(self.glm) is Squared
        return self._widened() if ours else self

    def _widened(self) -> RidgeProblem:
        """Return the problem in float64: the Gram matrix is that of exact numbers, not its rounding."""
        if self.train.X.dtype is torch.float64:
            return self
        wide = copy.copy(self)
        for name in ("gram", "moment", "row_space", "identity", "_host", "_eigenbasis"):
            vars(wide).pop(name, None)
        wide.train, wide.val, wide.params = self.train.in_double(), self.val.in_double(), self.params.double()
        wide.design, wide._val_design = Design(wide.train.X), Design(wide.val.X)
        return wide

    def _shift(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        if self.parametrization == "direct":
            return hparams, torch.ones_like(hparams)
        penalty = hparams.double().exp()
        return penalty, penalty

    def solve(self, hparams: Tensor) -> Tensor:
        """Return the exact inner solution ``(c X'X + diag(pen))^-1 c X'y``."""
        if self.batch is not None:
            return torch.stack([self.member(index).solve(u) for index, u in enumerate(hparams)])  # type: ignore[attr-defined]
        return self._apply_inverse(hparams.detach(), self.moment)

    def exact_hypergradient(self, hparams: Tensor) -> Tensor:
        """Return ``-(d pen/du) w H^-1 f_w``, summed over each group, by dense algebra."""
        if self.batch is not None:
            return batches.exact_hypergradient(self, hparams)
        hparams = hparams.detach()
        w = self.solve(hparams)
        _, by_params, _ = self.outer_value_and_grads(w, hparams)
        adjoint = self._apply_inverse(hparams, by_params)
        slope = self.penalties(hparams) if self.parametrization == "log" else 1.0
        return -self.gather(slope * w * adjoint)

    def _apply_inverse(self, hparams: Tensor, right: Tensor) -> Tensor:
        hessian = self.gram + torch.diag(self.penalties(hparams).expand(self.params_shape()))
        inverse = ByFactor(hessian)
        if inverse.fails:
            raise ValueError("the ridge problem is singular at these penalties: it has no unique solution.")
        x = inverse(right)
        return x + inverse(right - hessian @ x)  # one step of iterative refinement
