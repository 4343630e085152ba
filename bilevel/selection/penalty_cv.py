"""`penalty_cv`: penalties of a linear model, tuned by a criterion, and kept only where tuning is proved to help."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar, cast, get_args

from bilevel.core.options import require_value
from bilevel.core.status import warn
from bilevel.core.threads import one_blas_thread, short_operations
from bilevel.criteria.criterion import Array, Criterion
from bilevel.selection.folds import make_folds
from bilevel.selection.gate import Choice, Rule, choose, kappa_of, rounding_of
from bilevel.selection.honest import Fold, HonestLosses, Score, nested, second_level
from bilevel.selection.path import default_taus, is_wide, path
from bilevel.selection.selected import Selected, nodes_of, remarks_of

Guard = Literal["auto", "best", "one_se", "off"]
Honest = Literal["auto", "nested", "alo"]


SHORT = 1_000_000
"""Entries of X up to which one thread of torch is quicker than several, which wait for each other."""

Function = TypeVar("Function", bound=Callable[..., Any])


def in_short_operations(function: Function) -> Function:
    """Let a function of a criterion of few rows run on one thread of torch and of BLAS, which have theirs back then."""

    @wraps(function)
    def run(criterion: Criterion, **options: Any) -> Any:
        if criterion.data.rows * criterion.data.features > SHORT:
            return function(criterion, **options)
        with short_operations(), one_blas_thread():
            return function(criterion, **options)

    return cast(Function, run)


@in_short_operations
def penalty_cv(
    criterion: Criterion,
    *,
    guard: Guard = "auto",
    honest: Honest = "auto",
    folds: int | Sequence[Fold] = 5,
    groups: Any = None,
    ordered: bool = False,
    taus: Sequence[float] | None = None,
    kappa: float | None = None,
    anchored: bool | None = None,
    tol: float = 1e-6,
    steps: int = 25,
    candidates: Array | None = None,
    start: float | None = None,
    score: Score | None = None,
    random_state: int = 0,
    n_jobs: int | None = None,
    progress: bool = False,
) -> Selected:
    """Return the model of all rows with tuned penalties, or with one, whichever held-out rows speak for.

    Many penalties that minimise a criterion over-fit it, whatever it is. So a path goes from one penalty for all to
    tuned ones under a weaker and weaker hyperprior; an outer loop repeats all of that without some of the rows; and a
    gate keeps one penalty unless the gain on the rows left out is more than ``kappa`` standard errors.

    Args:
        criterion: what is descended: of the data, with the penalties.
        guard: "best" lets the node with the least honest loss through the gate, "one_se" the first node within one
            standard error of it; "auto" takes the second where there are as many penalties as rows, or with
            honest="alo". "off" takes the last node, without an outer loop.
        honest: how honest losses are taken: by "nested" folds ("auto"), or by approximate leave-one-out of the tuning
            itself, "alo", which costs no refit, for a criterion that leaves out single rows, and at most half as many
            penalties as rows.
        folds: of the outer loop: how many, shuffled and stratified by class, or pairs of indices, (training rows, rows
            held out).
        groups: of rows, (rows,): a group is held out together; for a number of `folds`.
        ordered: whether contiguous blocks of rows are held out; for a number of `folds`.
        taus: weights of the hyperprior, decreasing; None for 1 to 0.01, and down to 0.001 where there are more than
            ten rows for each penalty.
        kappa: standard errors of the gain that open the gate; None for 1, for 3 where rows are nearly separated and
            2 where penalties are more than half as many: see `kappa_of`.
        anchored: whether the hyperprior holds penalties at the single best one, not at their mean; None: where there
            are as many features as rows.
        tol: relative gain at which the descent of the one penalty ends, and without an outer loop any. With one, tuned
            penalties take the few steps after which they begin to fit the rows, in the folds as on all rows.
        steps: the most steps of such a descent.
        candidates: log penalties, of which the one penalty, where the path begins, is the best; None for any.
        start: a log penalty that the search of the one begins at, in place of a scan; for all rows only.
        score: what the outer loop chooses by in place of the loss: see `nested`.
        random_state: seed of the folds.
        n_jobs: of joblib, over folds.
        progress: whether a line shows the folds.

    Raises:
        ValueError: in one sentence, for options that do not fit the data.

    >>> import numpy as np
    >>> from bilevel.criteria import LinearData, Penalties, RidgeLeaveOneOut
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((80, 12))
    >>> data = LinearData.of(X, X[:, 0] + rng.standard_normal(80))
    >>> selected = penalty_cv(RidgeLeaveOneOut(data, Penalties.feature(12)))
    >>> selected.open, selected.node.loss < selected.scalar.loss
    (True, True)
    """
    began = time.process_time()
    data, size = criterion.data, criterion.penalties.size
    _check(criterion, guard, honest)
    taus = default_taus(data.counted, size) if taus is None else tuple(taus)
    anchored = is_wide(criterion) if anchored is None else anchored
    guarded = size > 1 and guard != "off"
    pairs: tuple[Fold, ...] = ()
    if guarded and honest != "alo":
        pairs = tuple(outer_folds(criterion, folds, groups, ordered, random_state))
    options: dict[str, Any] = {"anchored": anchored, "candidates": candidates, "tol": tol, "steps": steps}
    losses: HonestLosses | None = None
    choice: Choice | None = None
    if pairs:
        losses = nested(criterion, pairs, taus, score=score, n_jobs=n_jobs, progress=progress, **options)
        taus = taus[: len(losses.losses) - 1]
    points = path(criterion, taus, start=start, converge=not guarded, **options)
    chosen, remarks = len(points) - 1, []
    rule: Rule | Literal["last"] = "last"
    if guarded:
        losses = second_level(criterion, points) if losses is None else losses
        if kappa is None:
            kappa = 1.0 if score is not None else kappa_of(criterion.loss, losses.losses[0], size)
        rule = _rule(guard, honest, size, data.counted)
        exact, rows = rounding_of(criterion.loss, data), losses.rows
        choice = choose(losses.losses, kappa, rule, *((0.0, None) if score is not None else (exact, rows)))
        chosen = choice.node
    elif size > data.counted:
        remarks.append(_risk(size, data.counted))
    point = points[chosen]
    named = criterion.remark(point.evaluation)
    if not named and choice is not None and choice.lone_row:
        named = f"{choice.lone_row} of held-out rows: look at it."
        remarks.append(named)
    if named:
        warn(named)
    return Selected(
        fit=criterion.refit(point.u, point.evaluation.warm),
        nodes=nodes_of(criterion, points, losses, choice),
        chosen=chosen,
        choice=choice,
        honest="none" if losses is None else "alo" if honest == "alo" else "nested",
        rule=rule,
        losses=losses,
        folds=pairs,
        evaluations=sum(each.evaluations for each in points) + (losses.evaluations if losses is not None else 0),
        seconds=time.process_time() - began,
        remarks=(*remarks, *remarks_of(criterion, point)),
        scanned=points[0].scanned,
    )


def _check(criterion: Criterion, guard: str, honest: str) -> None:
    """Refuse options that are none, and honest losses that would flatter.

    Raises:
        ValueError: in one sentence.
    """
    for name, value, kind in (("guard", guard, Guard), ("honest", honest, Honest)):
        require_value(name, value, f"one of {', '.join(map(repr, get_args(kind)))}", value in get_args(kind))
    size, rows = criterion.penalties.size, criterion.data.counted
    asked = honest == "alo" and guard != "off"
    if asked and size > 1 and not criterion.leaves_one_out:
        raise ValueError(
            f"honest='alo' takes a criterion that leaves out single rows, and {type(criterion).__name__} does not: use "
            "honest='nested'."
        )
    if asked and 2 * size > rows:
        raise ValueError(
            f"honest='alo' flatters penalties that are more than half as many as the rows, here {size} and {rows}: use "
            "honest='nested'."
        )


def outer_folds(criterion: Criterion, folds: Any, groups: Any, ordered: bool, seed: int) -> Sequence[Fold]:
    """Return the folds of the outer loop; of those made here, the ones that hold out rows with a weight."""
    if not isinstance(folds, int):
        return list(folds)
    y, weights = criterion.data.y, criterion.data.weights.cpu().numpy()
    labels = y.cpu().numpy() if criterion.loss.separable and groups is None and not ordered else None
    made = make_folds(criterion.data.rows, folds, labels=labels, groups=groups, ordered=ordered, seed=seed)
    return [(train, held) for train, held in made if weights[held].any()]


def _rule(guard: Guard, honest: Honest, size: int, rows: int) -> Rule:
    """Return what an open gate lets through."""
    if guard == "best" or guard == "one_se":
        return guard
    return "one_se" if honest == "alo" or size >= rows else "best"


def _risk(size: int, rows: int) -> str:
    """Say, and return, what becomes of more penalties than rows without an outer loop."""
    risk = (
        f"{size} penalties were tuned on {rows} rows without an outer loop: they may fit these rows and predict worse "
        "than one penalty would; use guard='auto'."
    )
    warn(risk)
    return risk
