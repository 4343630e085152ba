"""What the linear models tell the error bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bilevel.core.tree import Tree
from bilevel.oracles.error_model import Certifiable, Rows, Tuned

if TYPE_CHECKING:
    from bilevel.problems.linear_model import LinearModelProblem
    from bilevel.problems.sample_weights import SampleWeightProblem


def certifiable_of(problem: LinearModelProblem) -> Certifiable:
    """Return a linear model as the error bounds see it, in float64."""
    assert problem.loss_constants is not None
    train, val = (
        Rows(split.X.double(), split.y.double() if split.y.is_floating_point() else split.y)
        for split in (problem.train, problem.val)
    )
    return Certifiable(
        train=train,
        val=val,
        slope=problem.slope_at,
        bend=problem.bend_at,
        rate=problem.rate_at,
        constants=problem.loss_constants,
        tuned=problem.tuned,
    )


def tuned_penalties(problem: LinearModelProblem, hparams: Tree) -> Tuned:
    """Return the coefficients of a linear model whose penalties are tuned."""
    shape = problem.params_shape()
    penalty = problem.penalties(hparams).expand(shape)
    return Tuned(
        penalty=penalty,
        penalty_slope=penalty if problem.parametrization == "log" else torch.ones_like(penalty),
        penalty_owner=problem.penalty_owner,
        weights=penalty.new_full((problem.train.rows,), problem.scale),
        size=hparams.numel(),
    )


def tuned_weights(problem: SampleWeightProblem, hparams: Tree) -> Tuned:
    """Return the coefficients of a model whose row weights are tuned at a fixed penalty."""
    penalty = problem.penalties(hparams).double().expand(problem.params_shape())
    weights = problem.weights(hparams)
    slopes = weights * torch.sigmoid(-hparams) if problem.parametrization == "sigmoid" else torch.ones_like(weights)
    return Tuned(
        penalty=penalty,
        penalty_slope=torch.zeros_like(penalty),
        penalty_owner=torch.zeros(penalty.shape, dtype=torch.int64, device=penalty.device),
        weights=problem.scale * weights,
        size=hparams.numel(),
        weight_slope=problem.scale * slopes,
        weight_owner=torch.arange(hparams.numel(), device=hparams.device),
    )
