"""`elastic_cv`: ridge regression, elastic nets and the adaptive lasso, and what held-out rows make of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch

from bilevel.core.options import require_value
from bilevel.core.status import warn
from bilevel.criteria.criterion import Array, Criterion, Fit
from bilevel.criteria.penalties import Penalties
from bilevel.numerics.elastic_net import ROUNDS
from bilevel.selection.candidates import Column, NetSearch, RidgeSearch
from bilevel.selection.combined import Candidate, Combined
from bilevel.selection.gate import Choice, choose, kappa_of, rounding_of
from bilevel.selection.honest import Fold, HeldOut, HonestLosses, Score, of_scores, predictions
from bilevel.selection.path import default_taus
from bilevel.selection.penalty_cv import in_short_operations, outer_folds
from bilevel.selection.selected import judge
from bilevel.selection.stack import stack

Kind = Literal["ridge", "path", "elastic_net", "adaptive_lasso"]
KINDS: tuple[Kind, ...] = get_args(Kind)

L1_RATIOS = (0.5, 0.9, 1.0)
ALPHAS, EPS = 40, 1e-3
"""Penalties of a grid, and the ratio of its ends."""
ADAPTIVE = (1.0, 0.3, 0.1)
"""The path to the node whose coefficients are the weights of the adaptive lasso."""
MOST = 1500
"""Features up to which each has a penalty of its own: the model of a step is a matrix of that size."""


@in_short_operations
def elastic_cv(
    criterion: Criterion,
    *,
    candidates: Sequence[Kind] = KINDS,
    l1_ratios: Sequence[float] = L1_RATIOS,
    alphas: int | Array = ALPHAS,
    eps: float = EPS,
    stacking: bool = True,
    guard: Literal["auto", "off"] = "auto",
    kappa: float | None = None,
    folds: int | Sequence[Fold] = 5,
    groups: Any = None,
    ordered: bool = False,
    taus: Sequence[float] | None = None,
    positive: bool = False,
    score: Score | None = None,
    tol: float = 1e-6,
    steps: int = 25,
    rounds: int = ROUNDS,
    random_state: int = 0,
    n_jobs: int | None = None,
    progress: bool = False,
) -> Combined:
    """Return ridge regression, or the elastic net, adaptive lasso and tuned penalties where held-out rows prove them.

    Candidates are ridge regression with one penalty, the nodes of its path of tuned ones, the elastic net with the
    least loss of held-out rows on a grid, and the adaptive lasso likewise: the lasso of columns scaled by
    ``|w_j| / max |w| + 1e-4``, with w of a node of the path of the same rows. All are judged on one set of folds, each
    by models of its other rows: ridge penalties are tuned on these rows, and a point of a grid is that with the least
    loss of the other folds' rows. The model of all rows, and the combination, take the point with the least loss of all
    held-out rows. Unless the best gains more than ``kappa`` standard errors, the first, simplest one is kept. Else the
    model is their convex combination with the least loss of held-out rows, ``coef = sum_k omega_k coef_k``.

    Args:
        criterion: what ridge regression is tuned by: of the data, and a loss of one prediction or of several classes.
        candidates: which of "ridge", "path", "elastic_net" (always) and "adaptive_lasso".
        l1_ratios: of the elastic net, from 0 to 1.
        alphas: how many penalties for each l1_ratio, from the one at which all coefficients are zero; or penalties,
            in the units of scikit-learn (of mean losses). Given ones are of the elastic net alone: the adaptive lasso,
            whose columns are scaled, has a grid of its own, and ridge penalties are free.
        eps: ratio of the least penalty of a grid to the largest.
        stacking: whether candidates are combined; else the best is taken.
        guard: "off" for no gate: the combination, or the best, is taken whatever it gains.
        kappa: standard errors of the gain that open the gate; None: see `kappa_of`.
        folds: how many, shuffled and stratified by class, or pairs of indices, (training rows, rows held out).
        groups: of rows, (rows,): a group is held out together; for a number of `folds`.
        ordered: whether contiguous blocks of rows are held out; for a number of `folds`.
        taus: of the path; None: see `penalty_cv`.
        positive: whether no coefficient is negative: of elastic net and adaptive lasso only, so "ridge" and "path"
            are no candidates then.
        score: what chooses among the candidates in place of the loss: see `nested`. It does not choose the point of a
            grid, or ridge penalties, and the best candidate is taken alone, since a combination has no score.
        tol: relative gain at which the descent of the one ridge penalty ends.
        steps: the most steps of a descent.
        rounds: the most rounds of the solver of an elastic net.
        random_state: seed of the folds.
        n_jobs: of joblib, over folds.
        progress: whether a line shows the outer loop.

    Raises:
        ValueError: in one sentence, for options that do not fit the data.

    >>> import numpy as np
    >>> from bilevel.criteria import LinearData, Penalties, RidgeLeaveOneOut
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((80, 12))
    >>> data = LinearData.of(X, X[:, 0] + rng.standard_normal(80))
    >>> combined = elastic_cv(RidgeLeaveOneOut(data, Penalties.feature(12)))
    >>> combined.open, combined.best.loss < combined.candidates[0].loss
    (True, True)
    """
    began = time.process_time()
    kinds = _checked(criterion, candidates, positive, guard)
    alphas = _checked_alphas(l1_ratios, alphas, eps)
    pairs = tuple(outer_folds(criterion, folds, groups, ordered, random_state))
    held_out = HeldOut(criterion, pairs)
    ridge: RidgeSearch | None = None
    remarks: list[str] = []
    if kinds & {"ridge", "path", "adaptive_lasso"}:
        options = {"tol": tol, "steps": steps, "n_jobs": n_jobs, "progress": progress}
        ridge, kinds, remarks = _ridge(criterion, held_out, kinds, taus, options)
    columns = [] if ridge is None else ridge.columns("ridge" in kinds, "path" in kinds)
    search = NetSearch(criterion, held_out, ridge, positive, rounds)
    grids = [search.grid("lasso" if set(l1_ratios) == {1.0} else "elastic net", l1_ratios, alphas, eps)]
    if "adaptive_lasso" in kinds:
        count = alphas if isinstance(alphas, int) else ALPHAS
        grids.append(search.grid("adaptive lasso", (1.0,), count, eps, adaptive=True))
    if len(pairs) == 1 and grids[0].alphas.size > 1:
        remarks.append("one fold both chooses the penalties of elastic nets and judges them, which flatters these.")
    nets, net = search.columns(grids, n_jobs)
    columns += nets
    evaluations = 0 if ridge is None else ridge.evaluations
    losses = _judged(criterion, held_out, columns, score, evaluations)
    if kappa is None:
        kappa = 1.0 if score is not None else kappa_of(criterion.loss, losses.losses[0], criterion.data.features)
    exact, rows = rounding_of(criterion.loss, criterion.data), losses.rows
    choice = choose(losses.losses, kappa, "best", *((0.0, None) if score is not None else (exact, rows)))
    if choice.lone_row:
        remarks.append(f"{choice.lone_row} of held-out rows: look at it.")
        warn(remarks[-1])
    weights = _weights(criterion, held_out, columns, choice, guard, stacking and score is None)
    return Combined(
        fit=_sum(columns, weights),
        candidates=_candidates(columns, weights, judge(len(columns), losses, choice)),
        choice=choice,
        net=net,
        losses=losses,
        folds=pairs,
        evaluations=evaluations,
        solved=search.solved,
        converged=search.converged and (ridge is None or ridge.converged),
        seconds=time.process_time() - began,
        remarks=tuple(remarks),
    )


def _judged(
    criterion: Criterion, held_out: HeldOut, columns: Sequence[Column], score: Score | None, evaluations: int
) -> HonestLosses:
    """Return the honest losses of the candidates, or their scores times minus one."""
    if score is not None:
        held = [rows.numpy() for _, rows in held_out.folds]
        scores = [[score(fit, rows) for fit, rows in zip(each.judged, held, strict=True)] for each in columns]
        return of_scores(-np.array(scores), evaluations)
    z = [
        torch.stack([predictions(criterion.data, each.judged[fold], rows) for each in columns])
        for fold, (_, rows) in enumerate(held_out.folds)
    ]
    return HonestLosses(held_out.pooled(held_out.losses(z)), held_out.rows, evaluations)


def _ridge(
    criterion: Criterion, held_out: HeldOut, kinds: set[Kind], taus: Sequence[float] | None, options: dict[str, Any]
) -> tuple[RidgeSearch, set[Kind], list[str]]:
    """Return the path of ridge penalties that the candidates need, the candidates that it leaves, and remarks."""
    data, tuned, remarks = criterion.data, bool(kinds & {"path", "adaptive_lasso"}), []
    if tuned and data.features > MOST:
        tuned, kinds = False, kinds - {"path"}
        remarks = [f"{data.features} features are too many for a ridge penalty of each: all have the same."]
    outputs = criterion.penalties.outputs
    penalties = Penalties.feature(data.features, outputs) if tuned else Penalties.scalar(data.features, outputs)
    if taus is None:
        taus = default_taus(data.counted, data.features) if "path" in kinds else ADAPTIVE
    search = RidgeSearch(criterion.with_penalties(penalties), held_out, taus if tuned else (), options)
    return search, kinds, remarks


def _sum(columns: Sequence[Column], weights: Array) -> Fit:
    """Return the weighted sum of the models."""
    pairs = [(float(weight), each.fit) for weight, each in zip(weights, columns, strict=True) if weight > 0]
    coef = torch.stack([weight * fit.coef for weight, fit in pairs]).sum(0)
    return Fit(coef, torch.stack([weight * fit.intercept for weight, fit in pairs]).sum(0))


def _candidates(columns: Sequence[Column], weights: Array, judged: Sequence[dict[str, float]]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(
            name=each.name,
            fit=each.fit,
            penalties=each.penalties,
            l1_ratio=each.l1_ratio,
            value=each.value,
            weight=float(weight),
            **said,
        )
        for each, weight, said in zip(columns, weights, judged, strict=True)
    )


def _weights(
    criterion: Criterion, held_out: HeldOut, columns: Sequence[Column], choice: Choice, guard: str, stacking: bool
) -> Array:
    """Return the share of each candidate in the model."""
    weights = np.zeros(len(columns))
    if not choice.open and guard != "off":
        weights[0] = 1.0
    elif not stacking:
        weights[choice.best] = 1.0
    else:
        z = torch.stack([torch.cat(each.held, -1) for each in columns])
        rows = torch.cat([held for _, held in held_out.folds])
        shares = torch.from_numpy(np.concatenate([held_out.shares(held) for _, held in held_out.folds]))
        weights = stack(z, criterion.data.y[rows], criterion.loss, shares.to(z.device))
    return weights


def _checked_alphas(l1_ratios: Sequence[float], alphas: int | Array, eps: float) -> int | Array:
    """Return how many penalties a grid has, or which.

    Raises:
        ValueError: in one sentence, for a grid that is none.
    """
    ratios, counted = np.asarray(l1_ratios, dtype=np.float64), isinstance(alphas, Integral)
    if ratios.ndim != 1 or not ratios.size or not ((ratios >= 0) & (ratios <= 1)).all():
        raise ValueError(f"`l1_ratios` must hold numbers from 0 to 1, at least one, got {l1_ratios!r}.")
    if counted and not ratios.all():
        raise ValueError("at an l1_ratio of 0 no penalty makes all coefficients zero: give `alphas`, not how many.")
    if not 0 < eps < 1:
        raise ValueError(f"`eps` must be between 0 and 1, got {eps!r}.")
    given = np.asarray(alphas, dtype=np.float64)
    fine = given.ndim == 0 and given >= 1 if counted else given.ndim == 1 and given.size and (given >= 0).all()
    if not fine or not np.isfinite(given).all():
        raise ValueError(f"`alphas` must be a positive whole number, or hold finite numbers from 0 on, got {alphas!r}.")
    return int(given) if counted else given


def _checked(criterion: Criterion, candidates: Sequence[Kind], positive: bool, guard: str) -> set[Kind]:
    """Return the candidates.

    Raises:
        ValueError: in one sentence.
    """
    if unknown := set(candidates) - set(KINDS):
        raise ValueError(f"`candidates` must be of {', '.join(map(repr, KINDS))}, got {sorted(unknown)}.")
    require_value("guard", guard, "'auto' or 'off'", guard in ("auto", "off"))
    if "elastic_net" not in candidates:
        raise ValueError("`candidates` must hold 'elastic_net': without it, use penalty_cv.")
    if positive and not {"ridge", "path"}.isdisjoint(candidates):
        raise ValueError("ridge regression has negative coefficients: with positive=True give other `candidates`.")
    if criterion.data.y.dim() == 2:
        raise ValueError("elastic nets are of one target: several take one each.")
    return set(candidates)
