"""Candidates of `elastic_cv`: their models of all rows, and their predictions for rows that a fold holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria.criterion import Array, Criterion, Fit
from bilevel.criteria.data import LinearData
from bilevel.selection.combined import NetPath
from bilevel.selection.honest import HeldOut, in_folds, nested, predictions
from bilevel.selection.nets import Net
from bilevel.selection.path import is_wide, path

ADAPTIVE = 0.1
"""The hyperprior of the node whose coefficients are the weights of the adaptive lasso."""
LEAST = 1e-4
"""Added to the weights, as parts of the largest."""


class Column(NamedTuple):
    """A candidate.

    Attributes:
        name: what reports call it.
        fit: the model of all rows.
        held: predictions for the rows that each fold holds out, by a model that has not seen them.
        judged: the model of every fold under penalties that are not chosen by the rows that it holds out either.
        penalties: of mean losses, ([outputs,] features).
        l1_ratio: 0 for ridge regression.
        value: of the criterion of ridge regression; else NaN.
    """

    name: str
    fit: Fit
    held: list[Tensor]
    judged: list[Fit]
    penalties: Tensor
    l1_ratio: float
    value: float


class RidgeSearch:
    """The path of ridge penalties on all rows, and in every fold.

    Args:
        criterion: of the penalties.
        held_out: the folds.
        taus: of the path; none for one penalty.
        options: of `path` and `nested`.

    Attributes:
        weights: the model of all rows whose coefficients are the weights of the adaptive lasso.
        fold_weights: likewise, of every fold.
        evaluations: of the criterion.
        converged: whether no descent of the one penalty has used up its steps.
    """

    def __init__(self, criterion: Criterion, held_out: HeldOut, taus: Sequence[float], options: dict[str, Any]) -> None:
        self._criterion, self._held_out, anchored = criterion, held_out, is_wide(criterion)
        inner = {name: options[name] for name in ("tol", "steps")}
        losses = nested(criterion, held_out.folds, taus, anchored=anchored, **options)
        self._fits = losses.fits
        self._points = path(criterion, taus[: len(losses.losses) - 1], anchored=anchored, **inner)
        own = max(index for index, point in enumerate(self._points) if point.tau >= ADAPTIVE)
        self.weights, self.fold_weights = self._refit(own), losses.fits[own]
        self.evaluations = losses.evaluations + sum(each.evaluations for each in self._points)
        self.converged = all(each.converged for each in self._points)

    def columns(self, single: bool, tuned: bool) -> list[Column]:
        """Return the candidates: that with one penalty, and those with tuned ones."""
        columns, data = [], self._criterion.data
        for index, point in enumerate(self._points):
            if tuned if index else single:
                pairs = zip(self._fits[index], self._held_out.folds, strict=True)
                held = [predictions(data, fit, rows) for fit, (_, rows) in pairs]
                columns.append(
                    Column(
                        f"ridge, tau {point.tau:g}" if index else "ridge",
                        self._refit(index),
                        held,
                        list(self._fits[index]),
                        self._criterion.penalties.spread(point.u).exp() / data.rows,
                        0.0,
                        point.evaluation.value,
                    )
                )
        return columns

    def _refit(self, index: int) -> Fit:
        point = self._points[index]
        return self._criterion.refit(point.u, point.evaluation.warm)


@dataclass(frozen=True, eq=False)
class Grid:
    """Penalties that a candidate is chosen from.

    Attributes:
        name: what reports call the candidate.
        l1_ratios: (ratios,).
        alphas: decreasing for each l1_ratio, (ratios, m).
        adaptive: whether columns are weighted by coefficients of ridge regression.
    """

    name: str
    l1_ratios: Array
    alphas: Array
    adaptive: bool


class NetSearch:
    """Elastic nets on grids of penalties, in every fold, and the best of each grid on all rows.

    Args:
        criterion: whose data and loss they are of.
        held_out: the folds.
        ridge: where the weights of an adaptive lasso come from; None without one.
        positive: whether no coefficient is negative.
        rounds: of the solver, at most.

    Attributes:
        converged: whether no solver was short of rounds.
        solved: how many elastic nets were.
    """

    def __init__(
        self, criterion: Criterion, held_out: HeldOut, ridge: RidgeSearch | None, positive: bool, rounds: int
    ) -> None:
        self._criterion, self._held_out, self._ridge = criterion, held_out, ridge
        self._positive, self._rounds = positive, rounds
        self._net = self._net_of(criterion.data)
        self.converged, self.solved = True, 0

    def grid(
        self, name: str, l1_ratios: Sequence[float], alphas: int | Array, eps: float, adaptive: bool = False
    ) -> Grid:
        """Return a grid.

        Args:
            name: of the candidate.
            l1_ratios: of the penalty.
            alphas: the penalties, or how many, from the least one at which all coefficients are zero.
            eps: ratio of the least to the largest.
            adaptive: whether columns are weighted.
        """
        ratios = np.asarray(l1_ratios, dtype=np.float64)
        if not isinstance(alphas, int):
            return Grid(name, ratios, np.tile(np.sort(alphas)[::-1], (len(ratios), 1)), adaptive)
        largest = self._net.largest(self._factors(None) if adaptive else None)
        # A constant target has no coefficients at any penalty.
        least = np.finfo(np.float64).resolution
        steps = np.geomspace(1.0, eps, alphas) if largest > least else np.ones(alphas)
        return Grid(name, ratios, max(largest, least) / ratios[:, None] * steps, adaptive)

    def columns(self, grids: Sequence[Grid], n_jobs: int | None) -> tuple[list[Column], NetPath]:
        """Return the best of every grid as a candidate, and the grid of the first one.

        What a fold holds out is judged under the penalties with the least loss of the rows that it does not hold out.
        """
        data = self._criterion.data
        folds = [(grids, index, train) for index, (train, _) in enumerate(self._held_out.folds)]
        solved = in_folds(self._in_fold, folds, n_jobs)
        self.converged = self.converged and all(fine for _, fine in solved)
        columns = []
        for index, grid in enumerate(grids):
            fits = [found[index] for found, _ in solved]
            held = [predictions(data, fit, rows) for fit, (_, rows) in zip(fits, self._held_out.folds, strict=True)]
            losses = self._held_out.losses(held)
            pooled = self._held_out.pooled(losses)
            ratio, at = _least(pooled)
            places = [_least(pooled[..., self._held_out.others(rows)]) for _, rows in self._held_out.folds]
            l1_ratio, alphas = float(grid.l1_ratios[ratio]), grid.alphas[ratio, : at + 1]
            factors = self._factors(None) if grid.adaptive else None
            models = self._net.path(alphas, l1_ratio, factors)
            self.solved += grid.alphas.size * len(folds) + len(alphas)
            self.converged = self.converged and models.converged
            fit = Fit(models.fit.coef[-1], models.fit.intercept[-1])
            ones = np.ones(self._criterion.penalties.owner.shape) if factors is None else factors
            penalties = torch.from_numpy(alphas[-1] * ones)
            judged = [Fit(each.coef[at], each.intercept[at]) for each, at in zip(fits, places, strict=True)]
            columns.append(Column(grid.name, fit, [z[ratio, at] for z in held], judged, penalties, l1_ratio, np.nan))
            if not index:
                net = self._table(grid, losses, columns[0], float(alphas[-1]), int(models.rounds[-1]))
        return columns, net

    def _table(self, grid: Grid, losses: list[Array], column: Column, alpha: float, rounds: int) -> NetPath:
        weights = self._criterion.data.weights.cpu().numpy()
        totals = [weights[rows.numpy()].sum() for _, rows in self._held_out.folds]
        means = [each.sum(-1) / total for each, total in zip(losses, totals, strict=True)]
        squared = self._criterion.loss.quadratic
        gap = self._net.dual_gap(column.fit, alpha, column.l1_ratio) if squared else np.nan
        return NetPath(grid.l1_ratios, grid.alphas, np.stack(means, -1), alpha, column.l1_ratio, gap, rounds)

    def _in_fold(self, grids: Sequence[Grid], fold: int, train: Tensor) -> tuple[list[Fit], bool]:
        """Return the models of a fold on each grid, (ratios, m), and whether all solvers have converged."""
        net, found, fine = self._net_of(self._criterion.data.take(train)), [], True
        for grid in grids:
            factors = self._factors(fold, net.data) if grid.adaptive else None
            models = [net.path(*each, factors) for each in zip(grid.alphas, grid.l1_ratios.tolist(), strict=True)]
            coef = torch.stack([each.fit.coef for each in models])
            found.append(Fit(coef, torch.stack([each.fit.intercept for each in models])))
            fine = fine and all(each.converged for each in models)
        return found, fine

    def _net_of(self, data: LinearData) -> Net:
        return Net(data, self._criterion.loss, self._positive, self._rounds, self._criterion.penalties.outputs)

    def _factors(self, fold: int | None, data: LinearData | None = None) -> Array:
        """Return the factors of an adaptive lasso's penalties, shaped as coefficients: of a fold, or of all rows."""
        assert self._ridge is not None
        fit = self._ridge.weights if fold is None else self._ridge.fold_weights[fold]
        scale = (self._criterion.data if data is None else data).scale
        size = (fit.coef * scale).abs().double().cpu().numpy()
        return np.asarray(1.0 / (size / max(float(size.max()), 1e-300) + LEAST))


def _least(losses: Array) -> tuple[int, int]:
    """Return the place on a grid with the least mean loss of rows, from (ratios, m, rows)."""
    ratio, at = np.unravel_index(int(np.argmin(losses.mean(-1))), losses.shape[:-1])
    return int(ratio), int(at)
