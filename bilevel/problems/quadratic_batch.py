"""Quadratics side by side: the closed forms of `QuadraticProblem` on a leading dimension of members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.oracles.batching import stacked_trees
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.problem import BilevelProblem


class QuadraticBatchPoint(Linearization):
    """The gradients of some quadratics, linearised."""

    inner: QuadraticBatchInner

    def _hvp(self, v: Tensor) -> Tensor:
        return torch.bmm(self.inner.hessian, v[:, :, None])[:, :, 0]

    def _cross(self, v: Tensor) -> Tensor:
        return torch.bmm(self._derivatives(), v[:, :, None])[:, :, 0]

    def _cross_jvp(self, hparams_tangent: Tensor) -> Tensor:
        return torch.bmm(hparams_tangent[:, None], self._derivatives())[:, 0]

    def _derivatives(self) -> Tensor:
        """Return ``H_j x + b_j``, of shape (batch, p, d)."""
        problem = self.inner.problem
        return (problem.hessian_directions @ self.params[:, None, :, None])[..., 0] + problem.linear_directions

    def dense_hessian(self) -> Tensor:
        """Return H(u) of every member."""
        return self.inner.hessian


class QuadraticBatchInner(InnerProblem):
    """Some quadratics at fixed hyperparameters."""

    linearization = QuadraticBatchPoint

    def __init__(self, problem: QuadraticProblemBatch, hparams: Tree, counts: Any = None) -> None:
        super().__init__(problem, hparams, counts)
        self.hessian, self.linear = problem.coefficients(self.hparams)

    def _grad(self, params: Tensor) -> Tensor:
        return self.linear + torch.bmm(self.hessian, params[:, :, None])[:, :, 0]


class QuadraticProblemBatch(BilevelProblem):
    """Quadratics side by side; see `QuadraticProblem.batched` and `bilevel.stack`.

    Args:
        problems: the members; their coefficients are stacked, those that are one and the same tensor are not copied.
    """

    inner_problem = QuadraticBatchInner

    hessian: Tensor
    linear: Tensor
    hessian_directions: Tensor
    linear_directions: Tensor
    target: Tensor

    def __init__(self, problems: Sequence[Any]) -> None:
        size = len(problems)
        for name in ("hessian", "linear", "hessian_directions", "linear_directions", "target", "params"):
            values = [getattr(problem, name) for problem in problems]
            shared = all(value is values[0] for value in values)
            setattr(self, name, values[0].expand(size, *values[0].shape) if shared else stacked_trees(name, values))
        super().__init__(params=self.params.contiguous())
        self.as_batch(problems)

    def coefficients(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        """Return H(u) and b(u) of every member."""
        hessian = self.hessian + torch.einsum("bp,bpij->bij", hparams, self.hessian_directions)
        return hessian, self.linear + torch.einsum("bp,bpi->bi", hparams, self.linear_directions)

    def inner_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """``1/2 x' H(u) x + b(u)' x``, summed over members."""
        hessian, linear = self.coefficients(hparams)
        return 0.5 * torch.einsum("bi,bij,bj->", params, hessian, params) + (linear * params).sum()

    def outer_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """``1/2 |x - target|^2`` of every member."""
        return 0.5 * (params - self.target).square().sum(-1)
