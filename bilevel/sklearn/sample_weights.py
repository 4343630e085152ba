"""`SampleWeights`: weights of the training rows of a linear model, learned on rows whose targets are trusted."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, MetaEstimatorMixin, _fit_context, clone, is_classifier, is_regressor
from sklearn.model_selection import check_cv
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, column_or_1d, has_fit_parameter

from bilevel.criteria import LinearData
from bilevel.problems.losses import Logistic, Softmax, Squared
from bilevel.selection import learn_row_weights, make_folds
from bilevel.sklearn.inputs import check_range, read, set_parameters
from bilevel.sklearn.logistic import LogisticRegressionCV
from bilevel.sklearn.weight_report import WeightReport, report_of, row_losses

SHARE = 4
"""One in so many rows is taken for trusted where fit is told of none."""


def _has(method: str) -> Any:
    """Return whether the model has a method."""

    def check(self: Any) -> bool:
        getattr(getattr(self, "estimator_", None) or self._estimator(), method)
        return True

    return check


class SampleWeights(MetaEstimatorMixin, BaseEstimator):
    """A linear model that is fitted with a learned weight for each training row, so that wrong rows count less.

    The weights are those with which a model of the rows predicts trusted rows better: see
    `bilevel.selection.learn_row_weights`. They are kept only where trusted rows that they were not learned on confirm
    the gain; else every row has the weight one.
    docs/sklearn.md has examples.

    Args:
        estimator: a classifier or a regressor with one target whose `fit` takes ``sample_weight``, such as
            `bilevel.sklearn.RidgeCV`; None for `bilevel.sklearn.LogisticRegressionCV`.
        validation: the trusted rows where `fit` is told of none: those that a splitter, or pairs of indices, hold out
            first; a number k takes one row in k; None for 4.
        guard: "auto", or "off" for weights that no outer loop confirms.
        folds: of the trusted rows, for the guard.
        random_state: of the folds, and of `validation` where it is a number; None is a fixed seed.
        verbose: whether a line shows the outer loop.

    Attributes:
        sample_weight_: the weight of every row of X, with mean 1; trusted rows among them have a full weight.
        estimator_: the model that is fitted with these weights.
        suspects_: indices of the rows of X that are not trusted, from the least learned weight on, whether or not the
            weights were kept.
        tuning_report_: what the weights gain, and whether that was confirmed: a `WeightReport`.
        n_features_in_: of X.
        classes_: labels, of a classifier.

    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((120, 3))
    >>> y = (X[:, 0] > 0).astype(int)
    >>> y[:10] = 1 - y[:10]
    >>> model = SampleWeights().fit(X[:80], y[:80], X_val=X[80:], y_val=y[80:])
    >>> bool(model.sample_weight_[:10].max() < model.sample_weight_[10:].mean())
    True
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "estimator": [HasMethods("fit"), None],
        "validation": ["cv_object"],
        "guard": [StrOptions({"auto", "off"})],
        "folds": [Interval(Integral, 2, None, closed="left")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }
    tuning_report_: WeightReport

    def __init__(
        self,
        estimator: Any = None,
        *,
        validation: Any = None,
        guard: str = "auto",
        folds: int = 5,
        random_state: Any = None,
        verbose: Any = 0,
    ) -> None:
        set_parameters(locals())

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any, trusted: Any = None, X_val: Any = None, y_val: Any = None) -> Self:
        """Return self, with weights of the rows and a model that is fitted with them.

        Args:
            X: array or sparse matrix of shape (n_samples, n_features).
            y: of shape (n_samples,).
            trusted: rows of X whose targets are right: a mask, or indices; the model is fitted to them, too.
            X_val: such rows besides X, which the model is not fitted to, of shape (n_trusted, n_features).
            y_val: their targets.

        Raises:
            ValueError: in one sentence, for data and parameters that do not fit.
        """
        model = self._estimator()
        _check_estimator(model)
        classifies = is_classifier(model)
        X, y = read(self, X, y, y_numeric=not classifies)
        check_range(self, X, y)
        y = column_or_1d(y, warn=True)
        if (X_val is None) != (y_val is None):
            raise ValueError("give X_val and y_val together, or neither.")
        if X_val is not None:
            if trusted is not None:
                raise ValueError("give trusted rows of X, or X_val and y_val, but not both.")
            X_val, y_val = read(self, X_val, y_val, reset=False, ensure_min_samples=1)
            check_range(self, X_val, y_val)
        if classifies:
            _check_classes(y, default=self.estimator is None)
            self.classes_ = np.unique(y)
        encoded = self._encoded(y, "y", classifies)
        seed = 0 if self.random_state is None else int(check_random_state(self.random_state).randint(2**31 - 1))
        remark = ""
        if X_val is not None:
            rows, held, V, t = np.arange(len(y)), np.arange(0), X_val, self._encoded(y_val, "y_val", classifies)
        else:
            held = self._held_out(X, y, encoded if classifies else None, trusted, seed)
            rows, V, t = np.setdiff1d(np.arange(len(y)), held), X[held], encoded[held]
            if trusted is None:
                remark = f"no rows were declared trusted: {len(held)} were taken for it."
        if missing := self._missing(encoded[rows], t, trusted is not None or X_val is not None):
            self._keep(model, X, y, np.ones(len(y)), rows, report_of(None, self, len(rows), len(t), missing))
            return self
        loss = (Logistic() if len(self.classes_) == 2 else Softmax()) if classifies else Squared()
        data = LinearData.of(X[rows], torch.from_numpy(encoded[rows]))
        found = learn_row_weights(
            data,
            V.toarray() if sparse.issparse(V) else V,
            torch.from_numpy(t),
            loss,
            guard=self.guard != "off",
            folds=int(self.folds),
            judge=self._judge(model, X[rows], y[rows], V, y[held] if X_val is None else y_val, keep=X_val is None),
            random_state=seed,
            progress=bool(self.verbose),
        )
        weights = np.ones(len(y))
        weights[rows] = found.weights
        report = report_of(found, self, len(rows), len(t), remark)
        self._keep(model, X, y, weights / weights.mean(), rows[np.argsort(found.learned, kind="stable")], report)
        return self

    def predict(self, X: Any) -> Any:
        """Return the predictions of the fitted model."""
        return self._delegated("predict", X)

    @available_if(_has("predict_proba"))
    def predict_proba(self, X: Any) -> Any:
        """Return the probabilities of the classes, in the order of `classes_`."""
        return self._delegated("predict_proba", X)

    @available_if(_has("predict_log_proba"))
    def predict_log_proba(self, X: Any) -> Any:
        """Return the logarithms of the probabilities of the classes."""
        return self._delegated("predict_log_proba", X)

    @available_if(_has("decision_function"))
    def decision_function(self, X: Any) -> Any:
        """Return the decision function of the fitted model."""
        return self._delegated("decision_function", X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the score of the fitted model."""
        return float(self._delegated("score", X, y, sample_weight=sample_weight))

    def _delegated(self, method: str, X: Any, *args: Any, **kwargs: Any) -> Any:
        check_is_fitted(self)
        X = read(self, X, reset=False, ensure_min_samples=1)
        return getattr(self.estimator_, method)(X, *args, **kwargs)

    def _estimator(self) -> Any:
        return LogisticRegressionCV() if self.estimator is None else self.estimator

    def _encoded(self, y: Any, name: str, classifies: bool) -> NDArray[Any]:
        """Return targets as the loss takes them.

        Raises:
            ValueError: for labels that y does not hold.
        """
        if not classifies:
            return np.asarray(y, dtype=np.float64)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y needs rows of at least 2 classes, but the data contain only one class: {self.classes_[0]}."
            )
        if len(unknown := np.setdiff1d(y, self.classes_)):
            raise ValueError(f"{name} holds the class {unknown[0]}, which no row of y has.")
        index = np.searchsorted(self.classes_, y)
        return index * 2.0 - 1.0 if len(self.classes_) == 2 else index

    def _held_out(self, X: Any, y: Any, labels: Any, trusted: Any, seed: int) -> NDArray[np.intp]:
        """Return the indices of the trusted rows of X.

        Raises:
            ValueError: for a mask of other rows, and indices of none.
        """
        count = len(y)
        if trusted is None and (self.validation is None or isinstance(self.validation, Integral)):
            parts = SHARE if self.validation is None else int(self.validation)
            if parts < 2:
                raise ValueError(f"validation={parts} must be at least 2: one row in so many is taken for trusted.")
            return make_folds(count, min(parts, count), labels=labels, seed=seed)[0][1]
        if trusted is None:
            given = next(iter(check_cv(self.validation, y, classifier=labels is not None).split(X, y)))[1]
        else:
            given = trusted
        given = np.asarray(given)
        if given.dtype == bool and given.shape == (count,):
            return np.flatnonzero(given)
        if given.ndim != 1 or given.dtype.kind not in "iu" or np.any((given < 0) | (given >= count)):
            raise ValueError(f"trusted must be a mask of the {count} rows of X, or indices of them.")
        return np.unique(given).astype(np.intp)

    def _missing(self, y: Any, t: Any, given: bool) -> str:
        """Return why there can be no weights of the rows with the targets y, given trusted ones t; empty if they can.

        Raises:
            ValueError: where that is so for trusted rows that were given.
        """
        why = ""
        if len(t) < 2 or len(y) < 2:
            why = f"weights need at least 2 trusted rows and 2 others, got {len(t)} and {len(y)}"
        elif is_classifier(self._estimator()) and len(np.unique(y)) < len(self.classes_):
            why = "every class needs a row that is not trusted"
        if why and given:
            raise ValueError(f"{why}: trust other rows.")
        return f"{why}: every row has the weight one." if why else ""

    def _judge(self, model: Any, X: Any, y: Any, V: Any, t: Any, *, keep: bool) -> Any:
        """Return the losses of the estimator itself: see `bilevel.selection.learn_row_weights`.

        Args:
            model: the estimator.
            X: rows with weights.
            y: their targets.
            V: trusted rows.
            t: their targets.
            keep: whether the model is fitted to trusted rows, too.
        """
        stack = sparse.vstack if sparse.issparse(X) else np.vstack

        def judge(weights: Any, learn: Any, held: Any) -> Any:
            learn = learn if keep else learn[:0]
            weights = np.append(weights, np.ones(len(learn)))
            rows, targets = stack([X, V[learn]]), np.append(y, t[learn])
            fitted = clone(model).fit(rows, targets, sample_weight=weights / weights.mean())
            return row_losses(fitted, V[held], t[held])

        return judge

    def _keep(self, model: Any, X: Any, y: Any, weights: Any, suspects: Any, report: WeightReport) -> None:
        """Set the fitted attributes."""
        self.sample_weight_, self.suspects_, self.tuning_report_ = weights, suspects, report
        self.estimator_ = clone(model).fit(X, y, sample_weight=weights)

    def __sklearn_tags__(self) -> Any:
        tags, own = super().__sklearn_tags__(), self._estimator().__sklearn_tags__()
        tags.estimator_type = own.estimator_type
        tags.classifier_tags, tags.regressor_tags = own.classifier_tags, own.regressor_tags
        tags.input_tags.sparse = own.input_tags.sparse
        if tags.classifier_tags is not None:
            tags.classifier_tags.multi_label = False
        tags.target_tags.required = True
        return tags


def _check_classes(y: Any, *, default: bool) -> None:
    """Refuse targets that are no classes.

    Raises:
        ValueError: in one sentence; where no estimator was given, with one for numbers.
    """
    if default and type_of_target(y) == "continuous":
        raise ValueError(
            "Unknown label type: continuous. Without an estimator SampleWeights takes classes: give "
            "estimator=bilevel.sklearn.RidgeCV() for numbers."
        )
    check_classification_targets(y)


def _check_estimator(model: Any) -> None:
    if not (is_classifier(model) or is_regressor(model)) or not has_fit_parameter(model, "sample_weight"):
        raise ValueError(
            f"estimator={model!r} must be a classifier or a regressor whose fit takes sample_weight, such as "
            "bilevel.sklearn.RidgeCV()."
        )
