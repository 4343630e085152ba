"""Honest losses of the nodes of a path: of rows that no part of the tuning has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from bilevel.criteria.criterion import Array, Criterion, Fit
from bilevel.criteria.data import LinearData
from bilevel.selection.gate import paired
from bilevel.selection.path import PathPoint, follow

FEWEST = 3
"""Folds with a finite score without which those that have none are not left out."""
LEAST = 0.05
"""One minus the influence of a row on its own hyperparameters is at least this."""

RISE = 0.02
"""A loss has risen clearly where it is larger by more than this part."""

Fold = tuple[Any, Any]
"""Indices of the training rows, and of the rows held out."""
Score = Callable[[Fit, NDArray[np.intp]], float]


class FoldLosses(NamedTuple):
    """What a node has in a fold: its model, weighted losses of the rows held out, and evaluations."""

    fit: Fit
    losses: Array
    evaluations: int


@dataclass(frozen=True, eq=False)
class HonestLosses:
    """Losses of single rows under every node.

    Attributes:
        losses: weighted so that the mean over rows is the honest loss, (nodes, rows).
        rows: the rows' indices, (rows,); those of folds where a score has the place of the loss.
        evaluations: of the criterion that they took.
        fits: the model of every node in every fold; empty without folds.
    """

    losses: Array
    rows: NDArray[np.intp]
    evaluations: int
    fits: tuple[tuple[Fit, ...], ...] = ()


class HeldOut:
    """Folds of the rows of a criterion, and what the rows that they hold out have in common.

    Args:
        criterion: of all rows.
        folds: pairs of indices, (training rows, rows held out).

    Attributes:
        folds: the same as tensors; of classes, a row is held out only where its fold trains on its class.
        rows: those with a weight that are held out at all.

    Raises:
        ValueError: in one sentence, where a fold cannot be fitted.
    """

    def __init__(self, criterion: Criterion, folds: Sequence[Fold]) -> None:
        self._criterion = criterion
        self.folds = [_indices(fold, index, criterion) for index, fold in enumerate(folds, 1)]
        self._weights = criterion.data.weights.cpu().numpy()
        self._count = np.zeros(criterion.data.rows)
        for _, held in self.folds:
            self._count[held] += 1
        self.rows = np.flatnonzero((self._count > 0) & (self._weights > 0))

    def losses(self, predictions: Sequence[Tensor]) -> list[Array]:
        """Return the weighted losses of the rows that each fold holds out, from predictions for them, (..., held)."""
        pairs = zip(predictions, self.folds, strict=True)
        return [held_losses(self._criterion, z, rows) for z, (_, rows) in pairs]

    def pooled(self, parts: Sequence[Array]) -> Array:
        """Return the losses of rows, (..., rows), whose mean is the honest loss; of a row in several folds the mean.

        Args:
            parts: for every fold, weighted losses of the rows that it holds out, (..., held).
        """
        total = np.zeros((*parts[0].shape[:-1], len(self._count)))
        for (_, held), part in zip(self.folds, parts, strict=True):
            total[..., held.numpy()] += part
        found: Array = total[..., self.rows] / self._count[self.rows] / self._weights[self.rows].mean()
        return found

    def others(self, held: Tensor) -> NDArray[np.bool_]:
        """Return which of `rows` a fold does not hold out; all of them, where it holds out every one."""
        without = ~np.isin(self.rows, held.numpy())
        return without if without.any() else ~without

    def shares(self, held: Tensor) -> Array:
        """Return the weights of rows that a fold holds out, divided by the folds that do."""
        index = held.numpy()
        return np.asarray(self._weights[index] / self._count[index])


def nested(
    criterion: Criterion,
    folds: Sequence[Fold],
    taus: Sequence[float],
    *,
    anchored: bool,
    score: Score | None = None,
    n_jobs: int | None = None,
    progress: bool = False,
    **options: Any,
) -> HonestLosses:
    """Return losses of held-out rows after the whole tuning, its one penalty included, of the other rows of a fold.

    Everything begins anew in every fold: a start at the penalties of all rows would know the rows held out. A row that
    several folds hold out has its mean loss; rows that none holds out, of weight zero, or whose class its fold does
    not know, have none. All folds go through the path side by side, until their loss has clearly risen: weaker
    hyperpriors are worse.

    Args:
        criterion: of all rows.
        folds: pairs of indices, (training rows, rows held out).
        taus: of the path, decreasing.
        anchored: see `path`.
        score: of a model on rows that it has not seen, the larger the better, (fit, indices) -> float. Its negative
            takes the place of the losses, with one for every fold in place of every row. Folds on which it is not
            finite with one penalty are left out, if at least three remain.
        n_jobs: of joblib, over folds; None for one.
        progress: whether a line shows it.
        options: see `path`.

    Raises:
        ValueError: in one sentence, where a fold cannot be fitted.
    """
    walk: Callable[..., Iterator[FoldLosses]] = partial(
        _fold_losses, criterion, taus=taus, score=score, anchored=anchored, **options
    )
    held_out = HeldOut(criterion, folds)
    pairs = held_out.folds
    walks: Sequence[Iterable[FoldLosses]]
    walks = in_folds(walk if n_jobs in (None, 1) else partial(_listed, walk), pairs, n_jobs)
    losses: list[Array] = []
    fits: list[tuple[Fit, ...]] = []
    evaluations = 0
    steps = zip(*walks, strict=True)
    with tqdm(total=len(taus) + 1, disable=not progress, unit="node", desc="outer loop") as line:
        for found in steps:
            line.update()
            evaluations += sum(each.evaluations for each in found)
            fits.append(tuple(each.fit for each in found))
            if score is not None:
                losses.append(np.concatenate([each.losses for each in found]))
                continue
            losses.append(held_out.pooled([each.losses for each in found]))
            if has_risen(losses):
                line.total = len(losses)  # that is all of the path
                break
    if score is None:
        return HonestLosses(np.stack(losses), held_out.rows, evaluations, tuple(fits))
    return of_scores(np.stack(losses), evaluations, tuple(fits))


def of_scores(losses: Array, evaluations: int, fits: tuple[tuple[Fit, ...], ...] = ()) -> HonestLosses:
    """Return honest losses that are scores of folds times minus one.

    Args:
        losses: of every fold, (nodes, folds). Folds where that of the first node is not finite are left out, if at
            least three remain.
        evaluations: see `HonestLosses`.
        fits: likewise.
    """
    scored = np.flatnonzero(np.isfinite(losses[0]))
    scored = scored if len(scored) >= FEWEST else np.arange(losses.shape[1])
    return HonestLosses(losses[:, scored], scored, evaluations, fits)


def in_folds(function: Callable[..., Any], folds: Sequence[tuple[Any, ...]], n_jobs: int | None) -> list[Any]:
    """Return a function of every fold, in processes of joblib where these are asked for."""
    if n_jobs in (None, 1):
        return [function(*fold) for fold in folds]
    from joblib import Parallel, delayed

    return list(Parallel(n_jobs=n_jobs)(delayed(function)(*fold) for fold in folds))


def has_risen(losses: Sequence[Array]) -> bool:
    """Return whether the last node is worse than the best before it: by more than a standard error and 2 %.

    Where the signal is strong, the first steps change all losses alike and little, so that their error is tiny.

    Args:
        losses: of rows, for every node so far.
    """
    best = min(losses, key=lambda each: float(each.mean()))
    excess, error = paired(losses[-1], best)
    return bool(excess > error and excess > RISE * best.mean())


def _indices(fold: Fold, index: int, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """Return a fold as tensors of indices.

    Raises:
        ValueError: in one sentence.
    """
    train, held = (torch.as_tensor(np.asarray(part)) for part in fold)
    y = criterion.data.y
    if not len(train) or not len(held):
        raise ValueError(f"fold {index} has no {'held-out' if len(train) else 'training'} rows: give it some.")
    if criterion.loss.separable and bool((y[train] == y[train][0]).all()):
        raise ValueError(f"the training rows of fold {index} are all of one class: use fewer or stratified folds.")
    if criterion.loss.separable:
        held = held[torch.isin(y[held], y[train]).cpu()]
    for name, part in (("training", train), ("held-out", held)):
        if not bool(criterion.data.weights[part].any()):
            raise ValueError(f"fold {index} has no {name} rows with a weight: leave out rows of weight zero.")
    return train, held


def _fold_losses(
    criterion: Criterion, train: Tensor, held: Tensor, score: Score | None, **options: Any
) -> Iterator[FoldLosses]:
    """Yield the losses of the rows that a fold holds out, node by node.

    Args:
        criterion: of all rows.
        train: indices of the training rows.
        held: indices of the rows held out.
        score: see `nested`.
        options: of `follow`.
    """
    part = criterion.take(train).coarse()
    for node in follow(part, **options):
        fit = part.refit(node.u, node.evaluation.warm)
        if score is None:
            losses = held_losses(criterion, predictions(criterion.data, fit, held), held)
        else:
            losses = np.array([-score(fit, held.numpy())])
        yield FoldLosses(fit, losses, node.evaluations)


def _listed(walk: Callable[..., Iterable[FoldLosses]], *pair: Tensor) -> list[FoldLosses]:
    """Return all that a fold yields, for a process of its own."""
    return list(walk(*pair))


def held_losses(criterion: Criterion, z: Tensor, rows: Tensor) -> Array:
    """Return the weighted losses of rows, (..., rows), of several targets the mean.

    Args:
        criterion: whose data and loss they are of.
        z: predictions for the rows, of any number of models of one prediction, or of one model.
        rows: their indices.
    """
    losses = criterion.loss.value(z, criterion.data.y[..., rows]) * criterion.data.weights[rows]
    losses = losses.mean(0) if criterion.data.y.dim() == 2 else losses
    return np.asarray(losses.double().cpu().numpy())


def predictions(data: LinearData, fit: Fit, rows: Tensor | None = None) -> Tensor:
    """Return the predictions for rows, standardised as they are, of models in the units of the X that was given."""
    return data.product(fit.coef * data.scale, rows) + (fit.intercept + fit.coef @ data.offset)[..., None]


def second_level(criterion: Criterion, points: Sequence[PathPoint]) -> HonestLosses:
    """Return losses of every row under penalties that were tuned without its loss, to first order, without a refit.

    The tuned penalties are an M-estimator with a loss term for each row, so leaving one out is one Newton step here,
    too. With t the leave-one-out predictions, ``J = dt/du`` and ``H = J' diag(l'') J / n + R''``,

        t_i <- t_i + v_i l'_i / max(1 - v_i l''_i, 0.05),     v_i = J_i' H^-1 J_i / n

    The predictions for the other rows still know the row. It flatters penalties that nearly interpolate the rows: for
    at most half as many penalties as rows. With few penalties it asks for too much: H lacks the curvature of the
    predictions, and of several targets each leaves alone, though penalties are tuned on all of a row. On 60 rows and 4
    columns of normal variables its losses rise 2 to 4 times as far above the criterion as those of refits, of 3
    targets 2 to 7 times, so that a gate by them is too strict.

    Args:
        criterion: with `Criterion.leaves_one_out`.
        points: of its path.
    """
    data, losses, evaluations = criterion.data, [], 0
    for point in points:
        # Of the first point, that of one penalty, only the level moves.
        scalar = point.prior is None
        found = criterion.evaluate(point.u, point.evaluation.warm, full=True)
        evaluations += 1
        J = found.jacobian
        assert J is not None
        J = (J.sum(-1, keepdim=True) if scalar else J).double()
        slopes, curvatures = found.slopes.double(), found.curvatures.double()
        prior = 0.0 if point.prior is None else torch.from_numpy(point.prior.hessian).to(J)
        flat = J.reshape(-1, J.shape[-1])
        H = flat.T @ (flat * curvatures.reshape(-1, 1)) / data.rows + prior
        H.diagonal().add_(1e-9 * float(H.diagonal().max()) + 1e-300)
        influence = (flat * torch.linalg.solve(H, flat.T).T).sum(-1).clamp_min(0.0).reshape(slopes.shape) / data.rows
        shift = influence * slopes / (1.0 - influence * curvatures).clamp_min(LEAST)
        moved = (found.predictions.double() + shift).to(found.predictions)
        losses.append(criterion.weighted(criterion.loss.value(moved, data.y)).double().cpu().numpy())
    rows = np.flatnonzero(data.weights.cpu().numpy())
    return HonestLosses(np.stack(losses)[:, rows] * (data.counted / data.rows), rows, evaluations)
