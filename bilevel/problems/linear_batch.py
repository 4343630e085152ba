"""Linear models side by side: the closed forms of `linear_model` on a leading dimension of members.

Weights have shape (batch, ...), hyperparameters likewise. The data are either shared, feature-major of shape
(features, rows), where one matrix product serves all members, or stacked, of shape (batch, features, rows).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.core import rows as members
from bilevel.core.tree import Tree
from bilevel.oracles import batching as batches
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.validation import Reads
from bilevel.problems.linear_oracles import PenalisedInner, PenalisedPoint, gram

OPTIONS = ("penalty", "loss", "parametrization")


def _is_cached(attribute: Any) -> bool:
    return isinstance(attribute, cached_property)


class LinearBatchPoint(PenalisedPoint):
    """The gradients of some linear models, linearised."""

    inner: LinearBatchInner

    @cached_property
    def curvature(self) -> Any:
        """The curvatures of the losses at the training predictions."""
        problem = self.inner.problem
        return problem.glm.curvature(problem.predict(problem.train.X, self.params), problem.train.y)

    def _hvp(self, v: Tensor) -> Tensor:
        problem = self.inner.problem
        turned = problem.glm.hessian_product(self.curvature, problem.predict(problem.train.X, v))
        return torch.addcmul(self.inner.penalty * v, problem.collect(problem.train.X, turned), self.inner.scale)

    def dense_hessian(self) -> Tensor:
        """Return the Hessians of all members, of shape (batch, size, size)."""
        shape = self.params.shape
        penalties = self.inner.penalty.expand(shape).reshape(shape[0], -1)
        return self.inner.problem.data_hessian(self.curvature) + torch.diag_embed(penalties)

    def rebind(self, inner: InnerProblem) -> Linearization:
        """Return the linearization for other penalties; the data part is kept."""
        other = super().rebind(inner)
        if "curvature" in self.__dict__:
            other.__dict__["curvature"] = self.curvature
        return other


class LinearBatchInner(PenalisedInner):
    """Linear models at fixed penalties. A penalty that is not finite makes its member fail, and no other."""

    linearization = LinearBatchPoint

    def __init__(self, problem: Any, hparams: Tree, counts: Any = None) -> None:
        super().__init__(problem, hparams, counts)
        self.penalty: Tensor = problem.penalties(self.hparams)
        self.slope: Tensor = self.penalty if problem.parametrization == "log" else torch.ones_like(self.penalty)
        self.scale = torch.full_like(self.penalty.reshape(-1)[0], problem.scale)

    def _grad(self, params: Tensor) -> Tensor:
        problem = self.problem
        slopes = problem.glm.slope(problem.predict(problem.train.X, params), problem.train.y)
        return torch.addcmul(self.penalty * params, problem.collect(problem.train.X, slopes), self.scale)


class LinearBatch:
    """Mixin that puts a leading dimension of members on a `LinearModelProblem`; before it in the list of bases."""

    train: Any
    val: Any
    scale: float

    @classmethod
    def of(cls, problem: Any, single: Sequence[BilevelProblem]) -> Any:
        """Return a batch of members that share the data of `problem`."""
        size = len(single)
        batch: Any = object.__new__(cls)
        # What the problem has computed belongs to its own data.
        computed = {name for kind in type(problem).__mro__ for name, of in vars(kind).items() if _is_cached(of)}
        batch.__dict__ |= {name: value for name, value in problem.__dict__.items() if name not in computed}
        batch.params = members.expand(problem.params, size)
        batch._hparams_shape = (size, *problem._hparams_shape)
        batch._group_shape = (size, *problem._group_shape)
        return batch.as_batch(single)

    @classmethod
    def stack(cls, problems: Sequence[Any]) -> Any:
        """Return problems of equal shapes and options, with their data stacked."""
        first = problems[0]
        for index, problem in enumerate(problems):
            for name in OPTIONS:
                value, wanted = getattr(problem, name), getattr(first, name)
                if value != wanted:
                    raise ValueError(
                        f"`stack` takes problems with equal options, but `{name}` is {wanted!r} in problem 0 and "
                        f"{value!r} in problem {index}."
                    )
        batch = cls.of(first, problems)
        batches.stacked_trees("the inner variable", [problem.params for problem in problems])
        # The test data are looked at by each member's own `metrics`, so they need no equal shapes.
        for name in ("train", "val"):
            parts = [getattr(problem, name) for problem in problems]
            split = copy.copy(parts[0])
            split.X = batches.stacked_trees(f"X_{name}", [part.X for part in parts])
            split.y = batches.stacked_trees(f"y_{name}", [part.y for part in parts])
            setattr(batch, name, split)
        return batch

    def predict(self, X: Tensor, w: Tensor) -> Tensor:
        """Return the predictions, of shape (batch, rows) or (batch, outputs, rows)."""
        if self.outputs is not None:
            return w @ X
        return w @ X if X.dim() == 2 else torch.bmm(w[:, None], X)[:, 0]

    def collect(self, X: Tensor, slopes: Tensor) -> Tensor:
        """Return ``X' slopes`` of every member, shaped as the weights."""
        if self.outputs is not None:
            return slopes @ X.mT
        return slopes @ X.t() if X.dim() == 2 else torch.bmm(X, slopes[:, :, None])[:, :, 0]

    def data_hessian(self, curvature: Any) -> Tensor:
        """Return ``c X' D X``, of shape (batch, features, features)."""
        return self.scale * gram(self.glm, self.train.X, curvature, self.outputs)

    def inner_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the sum of the members' penalised training losses, in plain torch."""
        loss = self.scale * self.glm.value(self.predict(self.train.X, params), self.train.y).sum(-1)
        return loss.sum() + 0.5 * (self.penalties(hparams) * params * params).sum()

    def outer_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the members' validation losses, of shape (batch,)."""
        return self.glm.value(self.predict(self.val.X, params), self.val.y).sum(-1) / self.val.y.shape[-1]

    def outer_value_and_grads(self, params: Tree, hparams: Tree) -> tuple[Tensor, Tree, Tree]:
        """Return the validation losses, of shape (batch,), and their gradients, in closed form."""
        z, rows = self.predict(self.val.X, params), self.val.y.shape[-1]
        gradient = self.collect(self.val.X, self.glm.slope(z, self.val.y)) / rows
        return self.glm.value(z, self.val.y).sum(-1) / rows, gradient, torch.zeros_like(hparams)

    def check(self, params: Tree, hparams: Tree, reads: Reads | None = None) -> None:
        """Look at shapes, dtype and device; refuse negative penalties.

        Raises:
            ValueError: in one sentence.
        """
        batches.check(self, params, hparams)  # type: ignore[arg-type]
        self.check_range(hparams)

    def metrics(self, params: Tree, hparams: Tree = None, solver: Any = None) -> dict[str, float]:
        """Refuse: figures of merit are those of one member.

        Raises:
            ValueError: always.
        """
        raise ValueError("a batch has no metrics of its own: use batch.member(i).metrics(params[i]).")

    # What the family gives -------------------------------------------------------------------------------------------

    glm: Any
    outputs: Any
    penalties: Any
    check_range: Any
