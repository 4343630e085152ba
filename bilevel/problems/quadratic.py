"""A quadratic inner problem with everything known in closed form: the referee of the test suite."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.numerics.eigenbasis import Eigenbasis, diagonalise
from bilevel.oracles import batching as batches
from bilevel.oracles.batching import check_own_data, stacked_trees
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.kernels import Affine, Kernels
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.purity import look
from bilevel.oracles.structure import QuadraticForm, Structure
from bilevel.oracles.validation import Reads, check_tensor, check_trees
from bilevel.problems.host import known_on_host


def product(matrix: Tensor, v: Tensor) -> Tensor:
    """Return ``matrix v``, of one problem or of each side by side."""
    return torch.mv(matrix, v) if v.dim() == 1 else torch.bmm(matrix, v[:, :, None])[:, :, 0]


class QuadraticPoint(Linearization):
    """The gradient of a quadratic, linearised."""

    inner: QuadraticInner

    def _hvp(self, v: Tensor) -> Tensor:
        return product(self.inner.hessian, v)

    def _cross(self, v: Tensor) -> Tensor:
        return product(self._derivatives(), v)

    def _cross_jvp(self, hparams_tangent: Tensor) -> Tensor:
        return product(self._derivatives().mT, hparams_tangent)

    def _derivatives(self) -> Tensor:
        """Return ``H_j x + b_j``, of shape (p, d), or (batch, p, d)."""
        problem = self.inner.problem
        params = self.params if problem.batch is None else self.params[:, None, :, None]
        turned = problem.hessian_directions @ params
        return (turned if problem.batch is None else turned[..., 0]) + problem.linear_directions

    def dense_hessian(self) -> Tensor:
        return self.inner.hessian


class QuadraticInner(InnerProblem):
    """A quadratic at fixed hyperparameters."""

    linearization = QuadraticPoint

    def __init__(self, problem: QuadraticProblem, hparams: Tree, counts: object = None) -> None:
        super().__init__(problem, hparams, counts)  # type: ignore[arg-type]
        self.hessian, self.linear = problem.coefficients(self.hparams)

    def kernels(self) -> Kernels | None:
        single = self.problem.batch is None
        return Affine(self.hessian, self.linear, self._cross_sum if single else self._rows_sum, self._moves)

    def _rows_sum(self, points: Tensor, vectors: Tensor, rows: slice) -> Tensor:
        """Return the hyperparameters' derivatives of some rows, beside zeros."""
        problem, total = self.problem, torch.zeros_like(self.hparams)
        total[rows] = torch.einsum("rpij,rij->rp", problem.hessian_directions[rows], vectors.mT @ points)
        total[rows] += torch.einsum("rpi,ri->rp", problem.linear_directions[rows], vectors.sum(-2))
        return total

    def _cross_sum(self, points: Tensor, vectors: Tensor) -> Tensor:
        problem = self.problem
        by_hessian = torch.tensordot(problem.hessian_directions, vectors.t() @ points, 2)
        return by_hessian + problem.linear_directions @ vectors.sum(0)

    def _moves(self, params: Tensor) -> Tensor:
        return self.problem.hessian_directions @ params + self.problem.linear_directions

    def _grad(self, params: Tensor) -> Tensor:
        if params.dim() == 1:
            return torch.addmv(self.linear, self.hessian, params)
        return self.linear + product(self.hessian, params)


TENSORS = ("hessian", "linear", "hessian_directions", "linear_directions", "target", "params")


class QuadraticProblem(BilevelProblem):
    """A quadratic inner loss whose Hessian and linear term are affine in u, and a quadratic outer loss.

        inner   1/2 x' H(u) x + b(u)' x,   H(u) = H_0 + sum_j u_j H_j,   b(u) = b_0 + sum_j u_j b_j
        outer   1/2 |x - target|^2

    so ``x*(u) = -H(u)^-1 b(u)``, ``dx*/du_j = -H^-1 (H_j x* + b_j)``, and the hypergradient is
    ``(dx*/du)' (x* - target)``.

    Args:
        hessian: H_0, symmetric, of shape (d, d).
        linear: b_0 of shape (d,).
        hessian_directions: H_j, symmetric, of shape (p, d, d); zeros by default.
        linear_directions: b_j, of shape (p, d); zeros by default. At least one of the two must be given.
        target: of shape (d,); zeros by default.
        params: where the inner solver starts; zeros by default.

    >>> problem = QuadraticProblem(
    ...     hessian=torch.eye(2, dtype=torch.float64),
    ...     linear=torch.tensor([-1.0, 1.0], dtype=torch.float64),
    ...     hessian_directions=torch.eye(2, dtype=torch.float64)[None],
    ... )
    >>> problem.exact_hypergradient(torch.tensor([1.0], dtype=torch.float64))
    tensor([-0.2500], dtype=torch.float64)
    """

    inner_problem = QuadraticInner
    structure = Structure(quadratic=True)

    def __init__(
        self,
        hessian: Tensor,
        linear: Tensor,
        hessian_directions: Tensor | None = None,
        linear_directions: Tensor | None = None,
        target: Tensor | None = None,
        params: Tensor | None = None,
    ) -> None:
        if hessian_directions is None and linear_directions is None:
            raise ValueError(
                "give `hessian_directions` or `linear_directions`: "
                "without them the inner problem does not depend on hparams."
            )
        if linear.dim() != 1:
            raise ValueError(f"`QuadraticProblem.linear` must have shape (d,), got {tuple(linear.shape)}.")
        d = len(linear)
        given = hessian_directions if hessian_directions is not None else linear_directions
        p = len(given) if given is not None else 0
        self.hessian, self.linear = hessian, linear
        self.hessian_directions = hessian.new_zeros(p, d, d) if hessian_directions is None else hessian_directions
        self.linear_directions = hessian.new_zeros(p, d) if linear_directions is None else linear_directions
        self.target = linear.new_zeros(d) if target is None else target
        for name, value, shape in (
            ("linear", linear, (d,)),
            ("hessian", hessian, (d, d)),
            ("hessian_directions", self.hessian_directions, (p, d, d)),
            ("linear_directions", self.linear_directions, (p, d)),
            ("target", self.target, (d,)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(f"`QuadraticProblem.{name}` must have shape {shape}, got {tuple(value.shape)}.")
            if (value.dtype, value.device) != (linear.dtype, linear.device):
                raise ValueError(
                    f"`QuadraticProblem.{name}` is {value.dtype} on {value.device}, "
                    f"but `linear` is {linear.dtype} on {linear.device}: they must share dtype and device."
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"`QuadraticProblem.{name}` holds NaN or infinite values.")
            if value.dim() > 1 and name.startswith("hessian") and not torch.allclose(value, value.mT):
                raise ValueError(f"`QuadraticProblem.{name}` must be symmetric.")
        super().__init__(params=linear.new_zeros(d) if params is None else params)

    @classmethod
    def random(cls, size: int, hyperparameters: int, condition: float = 10.0, seed: int = 0) -> QuadraticProblem:
        """Return a random problem in float64 with spectrum [1, condition] at u = 0, the same on every machine.

        The directions are positive semidefinite and small, so that H(u) stays positive definite for u > -1.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis, _ = torch.linalg.qr(normal(size, size))
        spectrum = torch.linspace(1.0, condition, size, dtype=torch.float64)
        hessian = basis @ torch.diag(spectrum) @ basis.t()
        roots = normal(hyperparameters, size, size) / (2.0 * size * hyperparameters) ** 0.5
        directions = roots @ roots.mT / 2.0
        return cls(
            (hessian + hessian.t()) / 2,
            normal(size),
            (directions + directions.mT) / 2,
            normal(hyperparameters, size),
            normal(size),
        )

    def coefficients(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        """Return H(u) and b(u)."""
        if self.batch is not None:
            hessian = self.hessian + torch.einsum("bp,bpij->bij", hparams, self.hessian_directions)
            return hessian, self.linear + torch.einsum("bp,bpi->bi", hparams, self.linear_directions)
        hessian = self.hessian + torch.tensordot(hparams, self.hessian_directions, 1)
        return hessian, self.linear + hparams @ self.linear_directions

    def quadratic_form(self, hparams: Tensor) -> QuadraticForm:
        return QuadraticForm(*self.coefficients(hparams), self.hessian_directions, self.linear_directions)

    def spectrum(self) -> Eigenbasis | None:
        """Return the eigenbasis of H_0, computed once, where every H_j is a multiple of the identity, else None."""
        return self._eigenbasis if self.batch is None else None

    @cached_property
    def _eigenbasis(self) -> Eigenbasis | None:
        rates = self.hessian_directions[:, 0, 0]
        if not torch.equal(self.hessian_directions, rates[:, None, None] * torch.eye(len(self.linear)).to(rates)):
            return None
        return diagonalise(self.hessian, self.linear, self._shift, self.linear_directions)

    def _shift(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        rates = self.hessian_directions[:, 0, 0].double()
        return hparams.double() @ rates, rates.expand_as(hparams)

    @cached_property
    def in_double(self) -> QuadraticProblem:
        """This problem in float64, where it computes as this class does."""
        if self.linear.dtype is torch.float64 or self.batch is not None or not known_on_host(type(self)):
            return self
        wide = copy.copy(self)
        vars(wide).pop("_eigenbasis", None)
        for name in TENSORS:
            setattr(wide, name, getattr(self, name).double())
        return wide

    def inner_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """``1/2 x' H(u) x + b(u)' x``."""
        hessian, linear = self.coefficients(hparams)
        if self.batch is not None:
            return 0.5 * (params * product(hessian, params)).sum() + (linear * params).sum()
        return 0.5 * torch.dot(params, hessian @ params) + torch.dot(linear, params)

    def outer_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """``1/2 |x - target|^2``."""
        return 0.5 * (params - self.target).square().sum(-1)

    def outer_value_and_grads(self, params: Tree, hparams: Tree) -> tuple[Tensor, Tree, Tree]:
        return self.outer_loss(params, hparams), params - self.target, torch.zeros_like(hparams)

    def solve(self, hparams: Tensor) -> Tensor:
        """Return ``x* = -H(u)^-1 b(u)``, of shape (d,), or (batch, d)."""
        if self.batch is not None:
            return torch.stack([self.member(index).solve(u) for index, u in enumerate(hparams)])  # type: ignore[attr-defined]
        hessian, linear = self.coefficients(hparams.detach())
        return -torch.linalg.solve(hessian, linear)

    def exact_jacobian(self, hparams: Tensor) -> Tensor:
        """Return ``dx*/du`` of shape (d, p)."""
        hessian, _ = self.coefficients(hparams.detach())
        x = self.solve(hparams)
        return -torch.linalg.solve(hessian, (self.hessian_directions @ x + self.linear_directions).t())

    def exact_hypergradient(self, hparams: Tensor) -> Tensor:
        if self.batch is not None:
            return batches.exact_hypergradient(self, hparams)
        return self.exact_jacobian(hparams).t() @ (self.solve(hparams) - self.target)

    def batched(self, size: int, data: Tree = None) -> BilevelProblem:
        check_own_data(self, size, data)
        return self.stacked([self] * size)

    def stacked(self, problems: Sequence[BilevelProblem]) -> BilevelProblem:
        rows: Any = copy.copy(self)
        for name in TENSORS:
            values = [getattr(problem, name) for problem in problems]
            shared = all(value is values[0] for value in values)
            each = values[0].expand(len(values), *values[0].shape) if shared else stacked_trees(name, values)
            setattr(rows, name, each)
        rows.params = rows.params.contiguous()
        return rows.as_batch(problems)

    def check(self, params: Tree, hparams: Tree, reads: Reads | None = None) -> None:
        if self.batch is not None:
            return batches.check(self, params, hparams, reads)
        check_trees(params, hparams)
        for name, value, size in (
            ("params", params, len(self.linear)),
            ("hparams", hparams, len(self.linear_directions)),
        ):
            check_tensor(name, value, (size,), self.linear, "QuadraticProblem", "the problem")
        look(self, params, hparams)
