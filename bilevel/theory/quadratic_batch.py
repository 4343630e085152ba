"""Many quadratic problems of one shape, stacked: the closed form behind `error_curves`.

With ``H = Q diag(lam) Q'`` everything that a linear first-order method does happens coordinate by coordinate in the
eigenbasis, also its derivative: ``grad f = lam x + b``, ``d grad f / du = dH x + db`` and ``D_x A`` are a diagonal, a
matrix of shape (p, d) and a diagonal. A step of B problems is a handful of elementwise operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.oracles.problem import BilevelProblem

COMMUTES = 1e-13
"""Off-diagonal entries of ``Q' dH Q`` below this multiple of the largest entry are rounding."""


@dataclass(frozen=True)
class QuadraticBatch:
    """B quadratic inner losses ``1/2 x' H x + b' x`` at fixed hyperparameters, with the derivatives of H and b.

    Args:
        hessian: H, symmetric positive definite, of shape (B, d, d).
        linear: b, of shape (B, d).
        hessian_derivatives: dH/du_j, of shape (B, p, d, d).
        linear_derivatives: db/du_j, of shape (B, p, d).
        start: x_0, of shape (B, d); it does not depend on u.

    >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
    >>> batch = QuadraticBatch(2 * one, -one[0], one[None], 0 * one, one[0])
    >>> batch.solution, batch.jacobian
    (tensor([[0.5000]], dtype=torch.float64), tensor([[[-0.2500]]], dtype=torch.float64))
    """

    hessian: Tensor
    linear: Tensor
    hessian_derivatives: Tensor
    linear_derivatives: Tensor
    start: Tensor

    def __post_init__(self) -> None:
        count, size = self.linear.shape if self.linear.dim() == 2 else (-1, -1)
        p = self.linear_derivatives.shape[1] if self.linear_derivatives.dim() == 3 else -1
        for name, shape in (
            ("linear", (count, size)),
            ("hessian", (count, size, size)),
            ("hessian_derivatives", (count, p, size, size)),
            ("linear_derivatives", (count, p, size)),
            ("start", (count, size)),
        ):
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise ValueError(
                    f"`QuadraticBatch.{name}` must have shape {shape} for B={count} problems of size d={size} with "
                    f"p={p} hyperparameters, got {got}."
                )

    @classmethod
    def stack(
        cls, problems: Sequence[BilevelProblem], hparams: Sequence[Tree], starts: Sequence[Tree]
    ) -> QuadraticBatch | None:
        """Return B problems as one; None where one is not known to be quadratic, or their sizes differ."""
        forms = [problem.quadratic_form(u) for problem, u in zip(problems, hparams, strict=True)]
        known = [form for form in forms if form is not None]
        if len(known) < len(forms) or len({tuple(form.linear_derivatives.shape) for form in known}) > 1:
            return None
        parts = [
            (H, b, dH if dH.dim() == 3 else torch.diag_embed(dH), db, start)
            for (H, b, dH, db), start in zip(known, starts, strict=True)
        ]
        return cls(*(torch.stack(field) for field in zip(*parts, strict=True)))

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (B, d) in ascending order and eigenvectors (B, d, d) of H."""
        values, vectors = torch.linalg.eigh(self.hessian)
        return values, vectors

    @cached_property
    def turned(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, dH, db and x_0 in the eigenbasis; dH of shape (B, p, d) where all its matrices are diagonal there."""
        vectors = self.eigen[1]
        back = vectors.mT
        directions = back[:, None] @ self.hessian_derivatives @ vectors[:, None]
        diagonal = directions.diagonal(dim1=-2, dim2=-1)
        rest = directions - torch.diag_embed(diagonal)
        if bool(rest.abs().amax() <= COMMUTES * directions.abs().amax()):
            directions = diagonal
        turned_derivatives = (back[:, None] @ self.linear_derivatives[..., None])[..., 0]
        return self._turn(self.linear), directions, turned_derivatives, self._turn(self.start)

    def _turn(self, vectors: Tensor) -> Tensor:
        return (self.eigen[1].mT @ vectors[..., None])[..., 0]

    def cross(self, points: Tensor) -> Tensor:
        """Return ``dH y + db`` in the eigenbasis, of shape (B, p, d), for points y of shape (B, d) there."""
        _, directions, linear, _ = self.turned
        if directions.dim() == 3:
            return torch.addcmul(linear, directions, points[:, None])
        return linear + (directions @ points[:, None, :, None])[..., 0]

    @cached_property
    def turned_solution(self) -> tuple[Tensor, Tensor]:
        """``x* = -b / lam`` of shape (B, d) and ``dx* = -(dH x* + db) / lam`` of shape (B, p, d), in the eigenbasis."""
        values, linear = self.eigen[0], self.turned[0]
        solution = -linear / values
        return solution, -self.cross(solution) / values[:, None]

    @property
    def solution(self) -> Tensor:
        """``x* = -H^-1 b``, of shape (B, d)."""
        return (self.eigen[1] @ self.turned_solution[0][..., None])[..., 0]

    @property
    def jacobian(self) -> Tensor:
        """``dx*/du = -H^-1 (dH x* + db)``, of shape (B, d, p)."""
        return self.eigen[1] @ self.turned_solution[1].mT

    @cached_property
    def cross_lipschitz(self) -> Tensor:
        """Lipschitz constant of ``x -> dH x + db`` in the Frobenius norm: ``sqrt |sum_j dH_j^2|_2``, of shape (B,)."""
        _, directions, _, _ = self.turned
        if directions.dim() == 3:
            return directions.square().sum(1).amax(-1).sqrt()
        return torch.linalg.eigvalsh((directions.mT @ directions).sum(1))[:, -1].clamp(min=0).sqrt()
