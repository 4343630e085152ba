"""Many hyperparameter vectors at once, for estimators that work in one eigenbasis."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.core.status import Verdict
from bilevel.core.tree import Tree
from bilevel.oracles.precision import DoublePrecision
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.validation import check_trees


@dataclass(frozen=True)
class Sweep:
    """Hypergradients at B hyperparameter vectors, from `Spectral.sweep`.

    Attributes:
        outer_losses: of shape (B,).
        hypergradients: of the shape of the stacked hyperparameters, (B, ...).
        params: the inner iterates, of shape (B, d).
        residuals: norms of the inner gradients at `params`, of shape (B,).
        verdicts: of `ClosedForm.sweep`, the status of each hypergradient.
    """

    outer_losses: Tensor
    hypergradients: Tensor
    params: Tensor
    residuals: Tensor
    verdicts: tuple[Verdict, ...] = ()


def stacked(problem: BilevelProblem, hparams: Tensor, params: Tree) -> tuple[Tensor, Tensor]:
    """Return (starts, hparams), one row for each hyperparameter vector, after a look at both.

    Raises:
        ValueError: if `hparams` is no stack, or `params` neither one start nor a stack, and what the problem refuses.
    """
    start = problem.start(params)
    check_trees(start, hparams)
    if hparams.dim() == 0:
        raise ValueError("`hparams` of a sweep must be a stack of hyperparameter vectors, got a 0-d Tensor.")
    if start.dim() > 1 and len(start) != len(hparams):
        raise ValueError(
            f"`params` of a sweep must be one start or as many as hyperparameter vectors, {len(hparams)}, "
            f"got {len(start)}."
        )
    starts = start.expand(len(hparams), *start.shape[-1:])
    problem.check(starts[0], hparams[0])
    return starts, hparams.detach()


def precision(params: Tensor, hparams: Tensor) -> AbstractContextManager[object]:
    """Return the context in which a problem in float32 is evaluated at params in float64."""
    return DoublePrecision() if params.dtype != hparams.dtype else nullcontext()


def outer_at(problem: BilevelProblem, params: Tensor, hparams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outer losses and their partial gradients at every row, in the dtype of params."""
    with precision(params, hparams):
        values, by_params, by_hparams = torch.func.vmap(problem.outer_value_and_grads)(params, hparams.to(params))
    return values, by_params, by_hparams
