"""What models of a table score on rows that they have not seen: the tuned one, one penalty, a constant, and others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria import Criterion, Fit, Penalties
from bilevel.criteria.criterion import Evaluation
from bilevel.data.load import Rows
from bilevel.data.roles import target_names
from bilevel.data.table import Array
from bilevel.problems.losses import GLMLoss, Logistic, Softmax, Squared
from bilevel.problems.splits import Split
from bilevel.selection import Selected
from bilevel.selection.honest import Fold, predictions

CONSTANT = 30.0
"""A log penalty this far above log n leaves the intercept alone."""


@dataclass(frozen=True)
class Score:
    """Losses and figures of merit (accuracy, r2 or d2 on the test part) of one model; None where there is none.

    `held_out` is the mean loss on rows that the outer folds held out, or that of the approximate leave-one-out. Of
    several targets there is the same of each, in its own unit, by its name.
    """

    model: str
    criterion: float | None
    held_out: float | None
    test: float | None
    merits: dict[str, float]
    targets: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Judge:
    """What scores models of rows, whose targets are as they are tuned, by a criterion of all of them.

    `factor` makes a loss of the library the one that is shown; targets as they were given were divided by `scale`.
    """

    rows: Rows
    criterion: Criterion
    folds: Sequence[Fold]
    factor: float
    scale: Array

    def scores(self, selected: Selected, beside: str | None) -> tuple[Score, ...]:
        """Return the scores of a tuned model and of those beside it; `beside`: see `FoldOptions`."""
        criterion = self.criterion
        one = criterion.with_penalties(Penalties.scalar(criterion.data.features, criterion.penalties.outputs))
        constant = np.array([math.log(criterion.data.rows) + CONSTANT])
        found = []
        for index, label in shown(selected):
            node = selected.nodes[index]
            fit = selected.fit if index == selected.chosen else criterion.refit(node.u)
            held = None if selected.honest == "none" else self.factor * node.loss
            fits = selected.losses.fits[index] if selected.losses is not None and selected.losses.fits else None
            several = len(self.scale) > 1
            by_target = self._held_out(fits) if several and fits is not None else None
            value = self._criterion(criterion.evaluate(node.u, second=False)) if several else None
            found.append(self._score(label, (self.factor * node.value, value), (held, by_target), fit))
        held_out = None
        if selected.honest == "nested":
            parts = (one.take(torch.as_tensor(np.asarray(train))) for train, _ in self.folds)
            held_out = self._held_out(part.refit(constant) for part in parts)
        fit = one.refit(constant)
        # Of balanced classes, what is left of slopes would decide.
        alone = Fit(torch.zeros_like(fit.coef), fit.intercept)
        value = self._criterion(one.evaluate(constant, second=False))
        found.append(self._score("a constant", (None, value), (None, held_out), alone))
        if beside:
            label, fit_of = scikit_learn(self.rows, criterion.loss)
            held_out = self._held_out(fit_of(train) for train, _ in self.folds)
            fit = fit_of(np.arange(criterion.data.rows)) if self.rows.X_test is not None else selected.fit
            found.append(self._score(label, (None, None), (None, held_out), fit))
        return tuple(found)

    def _score(
        self,
        model: str,
        criterion: tuple[float | None, Array | None],
        held_out: tuple[float | None, Array | None],
        fit: Fit,
    ) -> Score:
        """Return a score; losses are given as that of all targets, None for the mean, and those of each, or None."""
        test, merits = self._tested(fit)
        each = (criterion[1], held_out[1], test)
        given = (criterion[0], held_out[0], None)
        means = (None if losses is None else float(losses.mean()) for losses in each)
        losses = [mean if known is None else known for known, mean in zip(given, means, strict=True)]
        mean = {name: float(np.mean([one[name] for one in merits])) for name in (merits[0] if merits else ())}
        if len(self.scale) == 1:
            return Score(model, losses[0], losses[1], losses[2], mean)
        targets = {}
        for index, name in enumerate(target_names(self.rows.target)):
            unit = self.scale[index] ** 2
            a, b, c = (None if losses is None else float(losses[index] * unit) for losses in each)
            targets[name] = Score(model, a, b, c, merits[index] if merits else {})
        return Score(model, losses[0], losses[1], losses[2], mean, targets)

    def _criterion(self, evaluation: Evaluation) -> Array:
        """Return the criterion of each target; of one, its value."""
        if len(self.scale) == 1:
            return np.array([self.factor * evaluation.value])
        y = self.criterion.data.y[:, self.criterion.held_out]
        return self._means(evaluation.predictions, y, self.criterion.share)

    def _held_out(self, fits: Iterable[Fit]) -> Array:
        """Return the weighted mean loss of held-out rows under the models of their folds, (targets,)."""
        data, total, weight = self.criterion.data, np.zeros(len(self.scale)), 0.0
        for fit, (_, held) in zip(fits, self.folds, strict=True):
            index = torch.as_tensor(np.asarray(held))
            share = data.weights[index]
            z = predictions(data, fit)[..., index]
            total += float(share.sum()) * self._means(z, data.y[..., index], share)
            weight += float(share.sum())
        return total / weight

    def _tested(self, fit: Fit) -> tuple[Array | None, list[dict[str, float]]]:
        """Return the losses and the figures of merit of a model on the test part, of each target."""
        rows, loss = self.rows, self.criterion.loss
        if rows.X_test is None or rows.y_test is None:
            return None, []
        given = rows.X_test.toarray() if hasattr(rows.X_test, "toarray") else rows.X_test
        X = torch.as_tensor(given, dtype=torch.float64)
        z = Fit(fit.coef.cpu(), fit.intercept.cpu()).predict(X)
        weights = None if rows.weights_test is None else torch.as_tensor(rows.weights_test, dtype=torch.float64)
        share = X.new_ones(len(X)) if weights is None else weights
        if rows.y.ndim == 2:
            y = torch.as_tensor(rows.y_test.T)
            return self._means(z, y, share), [loss.scores(*each, weights) for each in zip(z, y, strict=True)]
        # Encoded beside the training targets, whose classes are those of the model.
        parts = {"train": rows.y, "test": rows.y_test}
        splits = {part: Split(part, X.new_ones(len(y), 1), torch.as_tensor(y)) for part, y in parts.items()}
        y = loss.encode(splits)["test"]
        return self._means(z, y, share), [loss.scores(z, y, weights)]

    def _means(self, z: Tensor, y: Tensor, weights: Tensor) -> Array:
        """Return the weighted mean losses of rows, (targets,)."""
        losses = self.criterion.loss.value(z, y).double().reshape(len(self.scale), -1)
        return self.factor * ((losses * weights).sum(1) / weights.sum()).cpu().numpy()


def shown(selected: Selected) -> list[tuple[int, str]]:
    """Return the nodes that are shown, the model first, then the best of the other kind, with their names."""
    chosen, count = selected.chosen, selected.nodes[-1].u.size
    if chosen:
        return [(chosen, f"{count} tuned penalties (the model)"), (0, "one penalty")]
    if count == 1:
        return [(0, "one penalty (the model)")]
    best = 1 + int(np.argmin([node.loss for node in selected.nodes[1:]]))
    return [(0, "one penalty (the model)"), (best, f"{count} tuned penalties, not kept")]


ESTIMATORS: dict[type[GLMLoss], str] = {
    Squared: "RidgeCV",
    Logistic: "LogisticRegressionCV",
    Softmax: "LogisticRegressionCV",
}


def scikit_learn(rows: Rows, loss: GLMLoss) -> tuple[str, Callable[[Any], Fit]]:
    """Return the name of scikit-learn's estimator for a loss, and what makes its model of some of the rows.

    Columns are standardised by these rows. Ridge regression has 100 penalties from 1e-3 to 1e5, by leave-one-out;
    classes have scikit-learn's 10 from 1e-4 to 1e4, by the log loss of 5 folds. Its own defaults are 3 penalties, and
    accuracy.

    Raises:
        ValueError: for other losses than squared, logistic and softmax.
    """
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.preprocessing import StandardScaler

    if (estimator := ESTIMATORS.get(type(loss))) is None:
        raise ValueError(f"`beside: scikit-learn` has no cross-validation of {type(loss).__name__}: leave it out.")

    def fit(index: Any) -> Fit:
        index = np.asarray(index)
        X, y = rows.X[index], rows.y[index]
        weights = None if rows.weights is None else rows.weights[index]
        scaler = StandardScaler(with_mean=not hasattr(X, "tocsr")).fit(X, sample_weight=weights)
        model: Any
        if estimator == "RidgeCV":
            model = RidgeCV(np.logspace(-3, 5, 100)).fit(scaler.transform(X), y, sample_weight=weights)
        else:
            model = LogisticRegressionCV(Cs=10, scoring="neg_log_loss", max_iter=1000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of defaults that will change
                model = model.fit(scaler.transform(X), y, sample_weight=weights)
        coef = torch.as_tensor(np.atleast_2d(model.coef_) / scaler.scale_)
        mean = scaler.mean_ if scaler.with_mean else np.zeros(X.shape[1])
        intercept = torch.as_tensor(np.atleast_1d(model.intercept_)) - coef @ torch.as_tensor(mean)
        return Fit(coef, intercept) if len(coef) > 1 else Fit(coef[0], intercept[0])

    return f"scikit-learn's {estimator}", fit
