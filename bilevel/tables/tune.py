"""Penalties of a linear model of a table, tuned by folds, kept where they generalise, beside simpler models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bilevel.core.options import suggest
from bilevel.core.status import BilevelWarning
from bilevel.criteria import Criterion, LinearData, Penalties
from bilevel.criteria.choose import choose_criterion, standardizes
from bilevel.data.columns import listed
from bilevel.data.load import Rows
from bilevel.data.roles import target_names
from bilevel.data.table import Array
from bilevel.problems.losses import GLMLoss, Logistic, Softmax, Squared
from bilevel.selection import Selected, make_folds, penalty_cv
from bilevel.selection.honest import Fold
from bilevel.tables.model import TableModel
from bilevel.tables.scores import Judge, Score

PENALTIES = ("scalar", "per_feature", "per_column", "group", "per_class", "per_target", "per_weight")
ALIASES = {
    "feature": "per_feature",
    "class": "per_class",
    "target": "per_target",
    "class_feature": "per_weight",
    "target_feature": "per_weight",
}
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
AS_THEY_ARE = (
    "columns of sparse inputs are left as they are; `standardize: true` in `data` scales them to deviation 1, as those "
    "of a table."
)
"""The remark where "auto" stands for unscaled columns."""
CRITERIA = {
    "RidgeLeaveOneOut": "exact leave-one-out",
    "ApproximateLeaveOneOut": "approximate leave-one-out",
    "RidgeFolds": "K-fold",
    "KFold": "K-fold",
}


@dataclass(frozen=True)
class FoldOptions:
    """How a table is tuned: the keys of a config without a solver.

    Attributes:
        penalty: which coefficients share a penalty, of `PENALTIES`; "per_column": the categories of a column do.
        groups: for "group", the columns of each group, by its name; None otherwise.
        standardize: whether penalties are those of columns with deviation 1; "auto" for the columns of dense X alone.
        class_weight: by label, or "balanced": the same sum of weights for every class; None for equal ones.
        criterion: "auto", "loo", "alo", "kfold" or "holdout": see `choose_criterion`.
        guard, honest, kappa: see `penalty_cv`.
        folds: of the outer loop, and of the criterion "kfold".
        beside: "scikit-learn": its own cross-validation on the same folds is shown, too.
    """

    penalty: str = "per_feature"
    groups: Mapping[str, Sequence[str]] | None = None
    class_weight: Mapping[Any, float] | str | None = None
    standardize: bool | str = "auto"
    criterion: str = "auto"
    guard: Any = "auto"
    honest: Any = "auto"
    folds: int = 5
    kappa: float | None = None
    beside: str | None = None
    seed: int = 0
    jobs: int = 1
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class TunedTable:
    """A tuned model of a table, of all rows but the test part, and what stands beside it.

    There are scores of the model, of one penalty, of a constant, and of scikit-learn where asked for. `penalties` are
    those of every feature, shaped as the weights, of the columns that were penalised and sums of losses.
    """

    model: TableModel
    selected: Selected
    scores: tuple[Score, ...]
    loss_name: str
    criterion: str
    penalties: Array


def tune_rows(name: str, rows: Rows, options: FoldOptions, loss: GLMLoss | None = None) -> TunedTable:
    """Return the model of the rows with tuned penalties, or with one, whichever held-out rows speak for.

    The loss is by default squared for numbers, logistic for two classes and softmax for more.

    Raises:
        ValueError: in one sentence, for options that do not fit the data.
    """
    loss = loss or (Squared() if rows.classes is None else Logistic() if len(rows.classes) == 2 else Softmax())
    X = rows.X if hasattr(rows.X, "tocsr") else torch.as_tensor(rows.X, device=options.device)
    rows = weighted_by_class(rows, options.class_weight)
    several, scale = rows.y.ndim == 2, np.ones(1)
    if several:
        scale = rows.y.std(0)
        rows = replace(rows, y=rows.y / scale, y_test=None if rows.y_test is None else rows.y_test / scale)
    scaled = standardizes(options.standardize, X)
    data = LinearData.of(X, rows.y, rows.weights, loss=loss, standardize=scaled)
    penalties = _penalties(options, rows, len(data.y) if several else loss.outputs(data.y))
    folds = _folds(rows, options)
    dependent = "ordered in time" if rows.options.ordered else "grouped" if rows.groups is not None else None
    # The rows of a hold-out lie in several of the outer folds, each of which keeps some of them.
    pairs = _folds(rows, options, other=1)[1:2] if options.criterion == "holdout" else folds
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
    scores = Judge(rows, criterion, folds, factor, scale).scores(selected, options.beside)
    selected = _scaled(selected, factor)
    if options.standardize == "auto" and not scaled:
        selected = replace(selected, remarks=(AS_THEY_ARE, *selected.remarks))
    return TunedTable(
        _model(name, rows, criterion, selected, scale),
        selected,
        scores,
        f"{words} / variance" if several else words,
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
    if name in ("per_class", "per_target", "per_weight"):
        several = {"per_class": "more than two classes", "per_target": "several targets"}
        if outputs is None or name == ("per_class" if rows.classes is None else "per_target"):
            what = f"`penalty` {name!r} is for {several.get(name, 'more than two classes or several targets')}"
            raise ValueError(f"{what}: use 'scalar', 'per_feature' or 'per_column'.")
        make = Penalties.output_feature if name == "per_weight" else Penalties.output
        return make(features, outputs)
    if name == "per_column":
        return Penalties.groups(list(rows.encoder.owners), outputs)
    return Penalties.scalar(features, outputs) if name == "scalar" else Penalties.feature(features, outputs)


def _folds(rows: Rows, options: FoldOptions, other: int = 0) -> list[Fold]:
    """Return the folds: blocks of ordered rows, whole groups, or shuffled rows, stratified by class; or `other` ones.

    Of fewer rows than the default has folds, each is one.

    Raises:
        ValueError: for less than two rows, more folds than rows, and folds that train on no row of a class.
    """
    most = len(rows.y) if rows.groups is None else len(np.unique(rows.groups))
    what = "rows" if rows.groups is None else "groups"
    if most < 2:
        raise ValueError(f"tuning by folds needs at least 2 {what}, got {most}.")
    if options.folds > max(most, FoldOptions.folds):
        raise ValueError(f"`folds` must be from 2 to {most}, the number of {what}, got {options.folds}.")
    labels = rows.y if rows.classes is not None and rows.groups is None and not rows.options.ordered else None
    folds = make_folds(
        *(len(rows.y), min(options.folds + other, most)),
        labels=labels,
        groups=None if rows.options.ordered else rows.groups,
        ordered=rows.options.ordered,
        seed=options.seed + other,
    )
    for number, (train, _) in enumerate(folds, 1):
        if rows.classes is not None and len(lacking := np.setdiff1d(rows.y, rows.y[train])):
            why = "folds are blocks of rows in time" if rows.options.ordered else "folds are whole groups"
            remedy = "name other groups, split at random, or take fewer folds"
            if labels is not None:
                why = f"it has {np.count_nonzero(rows.y == lacking[0])} in all"
                remedy = "leave it out, or say `task: regression` in `data` where targets are numbers"
            what = f"fold {number} would train on no row of the class {rows.classes[lacking[0]]!r}, as {why}"
            raise ValueError(f"{what}: {remedy}.")
    return list(folds)


def _scaled(selected: Selected, factor: float) -> Selected:
    """Return the same with losses times a factor."""
    names = ("value", "loss", "std_error", "gain", "gain_error")
    nodes = tuple(replace(node, **{name: factor * getattr(node, name) for name in names}) for node in selected.nodes)
    return replace(selected, nodes=nodes)


def _model(name: str, rows: Rows, criterion: Criterion, selected: Selected, unit: Array) -> TableModel:
    """Return the model of standardised features; `unit`: what the targets were divided by."""
    mean, scale = (part.double().cpu().numpy() for part in (criterion.data.offset, criterion.data.scale))
    coef, intercept = (part.double().cpu().numpy() for part in (selected.coef, selected.intercept))
    if rows.y.ndim == 2:
        coef, intercept = unit[:, None] * coef, unit * intercept
    task = "regression" if rows.classes is None else rows.task
    classes = None if rows.classes is None else tuple(map(plain, rows.classes))
    same: dict[str, Any] = {key: getattr(rows, key) for key in ("encoder", "target", "ignored", "zero_based")}
    same |= {key: getattr(rows.options, key) for key in ("separator", "decimal", "encoding")}
    arrays = {"weights": coef * scale, "intercept": intercept + coef @ mean, "mean": mean, "scale": scale}
    loss = type(criterion.loss).__name__
    return TableModel(name, loss, task, **arrays, classes=classes, summary=selected.summary, **same)


def weighted_by_class(rows: Rows, given: Mapping[Any, float] | str | None) -> Rows:
    """Return rows whose weights are multiplied by those of their classes; refuse a regression, and unknown labels."""
    if given is None:
        return rows
    if rows.classes is None:
        what = f"`class_weight` is for classes, and {listed(target_names(rows.target))} holds numbers"
        raise ValueError(f"{what}: leave it out.")
    weights = np.ones(len(rows.y)) if rows.weights is None else rows.weights
    sums = np.bincount(rows.y, weights, minlength=len(rows.classes))
    if isinstance(given, str):
        of_class = sums.sum() / (len(sums) * sums)
    else:
        known = {str(plain(label)): index for index, label in enumerate(rows.classes)}
        of_class = np.ones(len(sums))
        for label, weight in given.items():
            if str(label) not in known:
                classes = f"{', '.join(map(repr, known))}{suggest(str(label), known)}"
                raise ValueError(f"`class_weight` names {label!r}, but the classes are {classes}")
            of_class[known[str(label)]] = weight
    tested = rows.weights_test
    if rows.y_test is not None:
        tested = (np.ones(len(rows.y_test)) if tested is None else tested) * of_class[rows.y_test]
    return replace(rows, weights=weights * of_class[rows.y], weights_test=tested)


def groups_of(groups: Mapping[str, Sequence[str]], columns: Sequence[str]) -> list[str]:
    """Return the group of every feature, given its column; refuse columns in no group, in several, and unknown."""
    of_column: dict[str, str] = {}
    for group, members in groups.items():
        for column in members:
            if column in of_column or column not in columns:
                why = f"is in {of_column[column]!r}, too" if column in of_column else "is none that becomes a feature"
                raise ValueError(f"`groups.{group}` names the column {column!r}, which {why}.")
            of_column[column] = group
    if missing := [column for column in dict.fromkeys(columns) if column not in of_column]:
        raise ValueError(f"`groups` must name every column once, but no group has {listed(missing)}.")
    return [of_column[column] for column in columns]


def plain(label: Any) -> Any:
    """Return a label as a file holds it: whole numbers without a decimal point."""
    return int(label) if isinstance(label, float) and label.is_integer() else label
