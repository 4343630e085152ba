"""Penalties of a linear model of a table, tuned by folds, kept where they generalise, beside simpler models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bilevel.core.status import BilevelWarning
from bilevel.criteria import Criterion, Fit, LinearData, Penalties
from bilevel.criteria.choose import choose_criterion
from bilevel.data.rows import Rows
from bilevel.data.table import Array
from bilevel.problems.losses import GLMLoss, Logistic, Softmax, Squared, mean_of
from bilevel.problems.splits import Split
from bilevel.selection import Selected, make_folds, penalty_cv
from bilevel.selection.honest import Fold, predictions
from bilevel.tables.beside import scikit_learn
from bilevel.tables.model import TableModel
from bilevel.tables.shares import groups_of, plain, weighted_by_class

PENALTIES = ("scalar", "per_feature", "per_column", "group", "per_class", "per_weight")
ALIASES = {"feature": "per_feature", "class": "per_class", "class_feature": "per_weight"}
"""Names that `bilevel.sklearn` has for the same."""
LOSSES = {
    "Squared": ("mean squared error", 2.0),
    "Logistic": ("log loss", 1.0),
    "Softmax": ("log loss", 1.0),
    "Poisson": ("half the mean deviance", 1.0),
    "Huber": ("Huber loss", 1.0),
    "SquaredHinge": ("squared hinge loss", 1.0),
}
"""How the loss of a row is called, and what the library's is multiplied by to be that."""
CRITERIA = {
    "RidgeLeaveOneOut": "exact leave-one-out",
    "ApproximateLeaveOneOut": "approximate leave-one-out",
    "RidgeFolds": "K-fold",
    "KFold": "K-fold",
}
CONSTANT = 30.0
"""A log penalty this far above log n leaves the intercept alone."""


@dataclass(frozen=True)
class FoldOptions:
    """How a table is tuned: the keys of a config without a solver.

    Attributes:
        penalty: which coefficients share a penalty, of `PENALTIES`; "per_column": the categories of a column do.
        groups: for "group", the columns of each group, by its name; None otherwise.
        class_weight: by label, or "balanced": the same sum of weights for every class; None for equal ones.
        criterion: "auto", "loo", "alo", "kfold" or "holdout": see `choose_criterion`.
        guard: see `penalty_cv`.
        honest: see `penalty_cv`.
        folds: of the outer loop, and of the criterion "kfold".
        kappa: see `penalty_cv`.
        beside: "scikit-learn": its own cross-validation on the same folds is shown, too.
        seed: of folds.
        jobs: processes.
        device: where it is computed.
    """

    penalty: str = "per_feature"
    groups: Mapping[str, Sequence[str]] | None = None
    class_weight: Mapping[Any, float] | str | None = None
    criterion: str = "auto"
    guard: Any = "auto"
    honest: Any = "auto"
    folds: int = 5
    kappa: float | None = None
    beside: str | None = None
    seed: int = 0
    jobs: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Score:
    """Losses and figures of merit of one model; None where there is none.

    Attributes:
        model: in words.
        criterion: the criterion's value.
        held_out: the mean loss on rows that the outer folds held out, or that of the approximate leave-one-out.
        test: the mean loss on the test part.
        merits: accuracy, r2 or d2 on the test part.
    """

    model: str
    criterion: float | None
    held_out: float | None
    test: float | None
    merits: dict[str, float]


@dataclass(frozen=True, eq=False)
class TunedTable:
    """A tuned model of a table and what stands beside it.

    Attributes:
        model: of all rows but the test part.
        selected: the nodes, with losses as they are called.
        scores: of the model, of one penalty, of a constant, and of scikit-learn where asked for.
        loss_name: what the losses are.
        criterion: what was descended, in words.
        penalties: of every feature, shaped as the weights, of standardised columns and sums of losses.
    """

    model: TableModel
    selected: Selected
    scores: tuple[Score, ...]
    loss_name: str
    criterion: str
    penalties: Array


def tune_rows(name: str, rows: Rows, options: FoldOptions, loss: GLMLoss | None = None) -> TunedTable:
    """Return the model of the rows with tuned penalties, or with one, whichever held-out rows speak for.

    Args:
        name: of the problem.
        rows: of `load_rows`.
        options: how.
        loss: by default squared for numbers, logistic for two classes and softmax for more.

    Raises:
        ValueError: in one sentence, for options that do not fit the data.
    """
    loss = loss or (Squared() if rows.classes is None else Logistic() if len(rows.classes) == 2 else Softmax())
    X = rows.X if hasattr(rows.X, "tocsr") else torch.as_tensor(rows.X, device=options.device)
    rows = weighted_by_class(rows, options.class_weight)
    data = LinearData.of(X, rows.y, rows.weights, loss=loss)
    penalties = _penalties(options, rows, loss.outputs(data.y))
    folds = _folds(rows, options)
    dependent = "ordered in time" if rows.ordered else "grouped" if rows.groups is not None else None
    # The rows of a hold-out lie in several of the outer folds, each of which keeps some of them.
    other = replace(options, folds=options.folds + 1, seed=options.seed + 1)
    pairs = _folds(rows, other)[1:2] if options.criterion == "holdout" else folds
    criterion = choose_criterion(options.criterion, data, loss, penalties, folds=pairs, dependent=dependent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)  # remarks say the same
        selected = penalty_cv(
            *(criterion,),
            guard=options.guard,
            honest=options.honest,
            folds=folds,
            kappa=options.kappa,
            n_jobs=options.jobs,
            progress=True,
        )
    words, factor = LOSSES[type(loss).__name__]
    scores = _scores(rows, criterion, selected, folds, factor, options.beside)
    selected = _scaled(selected, factor)
    return TunedTable(
        _model(name, rows, criterion, selected),
        selected,
        scores,
        words,
        CRITERIA.get(type(criterion).__name__, type(criterion).__name__),
        selected.node.penalties.cpu().numpy(),
    )


def _penalties(options: FoldOptions, rows: Rows, outputs: int | None) -> Penalties:
    name, features = options.penalty, rows.X.shape[1]
    if (name == "group") != (options.groups is not None):
        needs = "needs `groups`, the columns of each" if name == "group" else "takes no `groups`: say 'group'"
        raise ValueError(f"`penalty` {name!r} {needs}.")
    if options.groups is not None:
        return Penalties.groups(groups_of(options.groups, rows.encoder.owners), outputs)
    if name in ("per_class", "per_weight"):
        if outputs is None:
            raise ValueError(
                f"`penalty` {name!r} is for more than two classes: use 'scalar', 'per_feature' or 'per_column'."
            )
        make = Penalties.output if name == "per_class" else Penalties.output_feature
        return make(features, outputs)
    if name == "per_column":
        return Penalties.groups(list(rows.encoder.owners), outputs)
    return Penalties.scalar(features, outputs) if name == "scalar" else Penalties.feature(features, outputs)


def _folds(rows: Rows, options: FoldOptions) -> list[Fold]:
    """Return the folds: blocks of ordered rows, whole groups, or shuffled rows, stratified by class."""
    most = len(rows.y) if rows.groups is None else len(np.unique(rows.groups))
    if most < 2:
        raise ValueError(f"tuning by folds needs at least 2 {'rows' if rows.groups is None else 'groups'}, got {most}.")
    labels = rows.y if rows.classes is not None and rows.groups is None and not rows.ordered else None
    folds = make_folds(
        *(len(rows.y), min(options.folds, most)),
        labels=labels,
        groups=None if rows.ordered else rows.groups,
        ordered=rows.ordered,
        seed=options.seed,
    )
    for number, (train, _) in enumerate(folds, 1):
        if rows.classes is not None and len(lacking := np.setdiff1d(rows.y, rows.y[train])):
            why = "blocks of rows in time" if rows.ordered else "whole groups" if rows.groups is not None else "small"
            raise ValueError(
                f"fold {number} would train on no row of the class {rows.classes[lacking[0]]!r}, as folds are {why}: "
                "name other groups, split at random, or take fewer folds."
            )
    return list(folds)


def _scores(
    rows: Rows, criterion: Criterion, selected: Selected, folds: Sequence[Fold], factor: float, beside: str | None
) -> tuple[Score, ...]:
    """Return the scores of the model and of those beside it."""
    data = criterion.data
    one = criterion.with_penalties(Penalties.scalar(data.features, criterion.penalties.outputs))
    constant = np.array([math.log(data.rows) + CONSTANT])
    found = []
    for index, label in _shown(selected):
        node = selected.nodes[index]
        held = None if selected.honest == "none" else factor * node.loss
        fit = selected.fit if index == selected.chosen else criterion.refit(node.u)
        found.append(Score(label, factor * node.value, held, *_tested(rows, criterion, fit, factor)))
    held = None
    if selected.honest == "nested":
        parts = [(one.take(torch.as_tensor(np.asarray(train))), out) for train, out in folds]
        held = factor * _held_out(criterion, [(part.refit(constant), out) for part, out in parts])
    value = factor * one.evaluate(constant, second=False).value
    fit = one.refit(constant)
    alone = Fit(torch.zeros_like(fit.coef), fit.intercept)  # of balanced classes, what is left of slopes would decide
    found.append(Score("a constant", value, held, *_tested(rows, criterion, alone, factor)))
    if beside:
        label, fit_of = scikit_learn(rows, criterion.loss)
        loss = factor * _held_out(criterion, [(fit_of(train), out) for train, out in folds])
        fit = fit_of(np.arange(data.rows)) if rows.X_test is not None else selected.fit
        found.append(Score(label, None, loss, *_tested(rows, criterion, fit, factor)))
    return tuple(found)


def _shown(selected: Selected) -> list[tuple[int, str]]:
    """Return the nodes that are shown, the model first, then the best of the other kind, with their names."""
    chosen, count = selected.chosen, selected.nodes[-1].u.size
    if chosen:
        return [(chosen, f"{count} tuned penalties (the model)"), (0, "one penalty")]
    if count == 1:
        return [(0, "one penalty (the model)")]
    best = 1 + int(np.argmin([node.loss for node in selected.nodes[1:]]))
    return [(0, "one penalty (the model)"), (best, f"{count} tuned penalties, not kept")]


def _held_out(criterion: Criterion, fits: Sequence[tuple[Fit, Any]]) -> float:
    """Return the weighted mean loss of held-out rows under the models of their folds."""
    data, total, weight = criterion.data, 0.0, 0.0
    for fit, held in fits:
        losses = criterion.weighted(criterion.loss.value(predictions(data, fit), data.y))
        total += float(losses[torch.as_tensor(np.asarray(held))].sum())
        weight += float(data.weights[torch.as_tensor(np.asarray(held))].sum())
    return total / weight


def _tested(rows: Rows, criterion: Criterion, fit: Fit, factor: float) -> tuple[float | None, dict[str, float]]:
    """Return the loss and the figures of merit of a model on the test part."""
    if rows.X_test is None or rows.y_test is None:
        return None, {}
    loss = criterion.loss
    given = rows.X_test.toarray() if hasattr(rows.X_test, "toarray") else rows.X_test
    X = torch.as_tensor(given, dtype=torch.float64)
    z = Fit(fit.coef.cpu(), fit.intercept.cpu()).predict(X)
    # Encoded beside the training targets, whose classes are those of the model.
    parts = {"train": rows.y, "test": rows.y_test}
    y = loss.encode({part: Split(part, X.new_ones(len(y), 1), torch.as_tensor(y)) for part, y in parts.items()})["test"]
    weights = None if rows.weights_test is None else torch.as_tensor(rows.weights_test, dtype=torch.float64)
    return factor * mean_of(loss.value(z, y), weights), loss.scores(z, y, weights)


def _scaled(selected: Selected, factor: float) -> Selected:
    """Return the same with losses times a factor."""
    names = ("value", "loss", "std_error", "gain", "gain_error")
    nodes = tuple(replace(node, **{name: factor * getattr(node, name) for name in names}) for node in selected.nodes)
    return replace(selected, nodes=nodes)


def _model(name: str, rows: Rows, criterion: Criterion, selected: Selected) -> TableModel:
    """Return the model in the units of standardised features."""
    mean, scale = (part.double().cpu().numpy() for part in (criterion.data.offset, criterion.data.scale))
    coef, intercept = (part.double().cpu().numpy() for part in (selected.coef, selected.intercept))
    return TableModel(
        name=name,
        loss=type(criterion.loss).__name__,
        task="regression" if rows.classes is None else rows.task,
        weights=coef * scale,
        intercept=intercept + coef @ mean,
        mean=mean,
        scale=scale,
        encoder=rows.encoder,
        classes=None if rows.classes is None else tuple(map(plain, rows.classes)),
        target=rows.target,
        ignored=rows.ignored,
        separator=rows.separator,
        decimal=rows.decimal,
        zero_based=rows.zero_based,
        summary=selected.summary,
    )
