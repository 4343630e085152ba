"""`LogisticRegressionCV`: logistic regression with tuned penalties, in place of scikit-learn's class of that name."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import linear_model
from sklearn.base import _fit_context
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.extmath import softmax
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from bilevel.criteria import Criterion, Fit
from bilevel.problems.losses import Logistic, Softmax
from bilevel.selection import Selected
from bilevel.sklearn.inputs import check_range, nearest, places_of, read, set_parameters
from bilevel.sklearn.logistic_nets import NetClassifier
from bilevel.sklearn.splits import folds_of
from bilevel.sklearn.tuned import STRUCTURES, TunedLinearModel

SOLVERS = {"lbfgs", "liblinear", "newton-cg", "newton-cholesky", "sag", "saga"}


class LogisticRegressionCV(NetClassifier, linear_model.LogisticRegressionCV):
    """Logistic regression whose penalties are tuned by a criterion, and kept only where that generalises.

    minimise over w, b   sum_i s_i nll(x_i'w + b, y_i) + 1/2 sum_j w_j^2 / C_j

    with penalties of columns with deviation 1 for dense X, and of the columns as they are for sparse X, unless
    `standardize` says otherwise; `coef_` and `intercept_` are in the units of X. Several classes are
    multinomial. docs/sklearn.md has the parameters and the fitted attributes in full.

    Args:
        Cs: inverse penalties of which that of the one penalty, where the path begins, is the best: a list, or so many
            from 1e-4 to 1e4; None for any. `Cs_` has them, and `scores_` and `coefs_paths_` what every fold of the
            criterion gives at each: minus the log loss, and coefficients.
        l1_ratios: None or zeros for squares. With others, the elastic net and the adaptive lasso are
            candidates, too, and are combined where that is proved to predict better: see `ElasticNetCV`.
        cv: folds, for the criterion and the outer loop: None (approximate leave-one-out for two classes, and five), a
            number, a splitter, or pairs.
        dual, solver, intercept_scaling: accepted, without effect.
        penalty: "l1" for l1_ratios of 1; else l1_ratios decide.
        scoring: what the outer loop chooses by, and `score` returns: a scorer of scikit-learn; None for the log loss,
            and for accuracy.
        max_iter: the most steps of a descent on all rows; with l1_ratios also an eighth of the most rounds of the
            solver of an elastic net.
        class_weight: by label, or "balanced".
        refit: True.
        use_legacy_attributes: whether `scores_`, `coefs_paths_`, `C_` and `l1_ratio_` are dicts and arrays by class.
        penalty_structure: what shares a penalty: "scalar", "group", "feature", "class" or "class_feature".
        criterion: "auto", "alo", "kfold" or "holdout".
        warm_start: see `RidgeCV`; with l1_ratios without effect.
        candidates: with l1_ratios, as of `ElasticNetCV`; with penalty_structure="scalar" None leaves out "path" and
            "adaptive_lasso".
        **others: see `RidgeCV`.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((80, 3))
    >>> labels = np.where(X[:, 0] + rng.logistic(size=80) > 0, "up", "down")
    >>> model = LogisticRegressionCV(penalty_structure="scalar").fit(X, labels)
    >>> model.predict([[2.0, 0.0, 0.0]])
    array(['up'], dtype='<U4')
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **TunedLinearModel._shared_constraints,
        "Cs": [None, Interval(Integral, 1, None, closed="left"), "array-like"],
        "l1_ratios": ["array-like", None],
        "dual": ["boolean"],
        "penalty": [StrOptions({"l1", "l2", "elasticnet", "deprecated"})],
        "solver": [StrOptions(SOLVERS)],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "refit": [Options(bool, {True})],
        "intercept_scaling": [Interval(Real, 0, None, closed="neither")],
        "use_legacy_attributes": ["boolean"],
        "penalty_structure": [StrOptions(STRUCTURES | {"class", "class_feature"})],
        "candidates": ["array-like", None],
    }
    _loss_name = "log loss"
    _penalty_name = "C"
    _own_scoring = "neg_log_loss"
    C_: Any
    l1_ratio_: Any
    scores_: Any
    coefs_paths_: Any

    def __init__(
        self,
        *,
        Cs: Any = None,
        l1_ratios: Any = None,
        fit_intercept: bool = True,
        cv: Any = None,
        dual: bool = False,
        penalty: str = "l2",
        scoring: Any = None,
        solver: str = "lbfgs",
        tol: float = 1e-4,
        max_iter: int = 25,
        class_weight: Any = None,
        n_jobs: int | None = None,
        verbose: Any = 0,
        refit: bool = True,
        intercept_scaling: float = 1.0,
        random_state: Any = None,
        use_legacy_attributes: bool = False,
        penalty_structure: str = "feature",
        groups: Any = None,
        criterion: str = "auto",
        guard: str = "auto",
        honest: str = "auto",
        standardize: bool | str = "auto",
        device: Any = None,
        warm_start: bool = False,
        candidates: Any = None,
    ) -> None:
        set_parameters(locals())

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> Self:
        """Return self, fitted to all rows with tuned penalties; a row of weight 2 is fitted as two rows."""
        l1_ratios = self._net_ratios()
        X, y = read(self, X, y)
        check_range(self, X)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        weights = self._weights(sample_weight, X)
        self.classes_, encoded = np.unique(y, return_inverse=True)
        _check_present(self.classes_, encoded, weights)
        split, scored = self._routed(None if sample_weight is None else weights, params)
        weights = weights * self._class_weights(encoded, weights)[encoded]
        folds = folds_of(self.cv, X, encoded, self.classes_, split, self.random_state)
        binary = len(self.classes_) == 2
        labels = torch.from_numpy(encoded * 2.0 - 1.0 if binary else encoded)
        leading = (1,) if binary else ()
        score = self._score_of(X, y, leading, scored)
        for name in ("Cs_", "scores_", "coefs_paths_", "best_score_"):
            self.__dict__.pop(name, None)
        if l1_ratios:
            self.l1_ratios_ = np.array(l1_ratios, dtype=np.float64)
            return self._fit_nets(X, labels, weights, folds, l1_ratios, score)
        loss = Logistic() if binary else Softmax()
        selected, criterion = self._tune(X, labels, weights, loss, self.penalty_structure, folds, score)
        self._set_model(selected.fit, X.dtype, leading)
        self.penalties_ = self.penalties_.reshape(self.coef_.shape)
        shape = self.coef_.shape if self.penalty_structure == "class_feature" else (-1,)
        self.C_ = 1.0 / self._penalty(selected, shape)
        self.l1_ratio_, self.l1_ratios_ = 0.0, np.zeros(1)
        self._set_grid(selected, criterion)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.floating[Any]]:
        """Return the probabilities of the classes, in the order of `classes_`."""
        check_is_fitted(self)
        z = self.decision_function(X)
        return softmax(np.column_stack([np.zeros_like(z), z]) if z.ndim == 1 else z, copy=False)

    def _set_grid(self, selected: Selected, criterion: Criterion) -> None:
        """Set the attributes of a grid of Cs, in the shapes that scikit-learn's have."""
        legacy, several = self.use_legacy_attributes, len(self.coef_)
        one = isinstance(self.C_, float)
        if self.Cs is not None:
            self.Cs_ = grid = self._grid()
            self.C_ = nearest(self.C_, grid) if one else self.C_
        if legacy and one:
            self.C_, self.l1_ratio_ = np.full(several, self.C_), np.zeros(several)
        if self.Cs is None or not criterion.folds:
            return
        places, ends = places_of(1.0 / grid), np.cumsum([len(held) for _, held in criterion.folds])[:-1]
        share = np.split(criterion.share.cpu().numpy(), ends)
        found = [selected.scanned[place] for place in places]
        losses = [np.split(each.losses, ends) for each in found]
        scores = -np.array([[part.sum() / s.sum() for part, s in zip(each, share, strict=True)] for each in losses]).T
        paths = np.stack([self._of_folds(criterion.fits(each) or []) for each in found], 1)
        if not legacy:
            self.scores_, self.coefs_paths_ = scores[:, None], paths[:, None]
            return
        at = () if self.l1_ratios is None else (None,)
        labels = self.classes_[-several:]
        self.scores_ = dict.fromkeys(labels, scores[(..., *at)])
        self.coefs_paths_ = {label: paths[(slice(None), slice(None), *at, index)] for index, label in enumerate(labels)}

    def _of_folds(self, fits: list[tuple[Fit, Any]]) -> NDArray[np.float64]:
        """Return the coefficients of the models of folds, the intercept last, (folds, classes, features [+ 1])."""
        every = []
        for fit, _ in fits:
            w = np.atleast_2d(fit.coef.cpu().numpy())
            b = np.reshape(fit.intercept.cpu().numpy(), (-1, 1))
            every.append(np.hstack([w, b]) if self.fit_intercept else w)
        return np.stack(every)

    def __getattr__(self, name: str) -> Any:
        if name in ("Cs_", "scores_", "coefs_paths_") and "tuning_report_" in self.__dict__:
            why = "there is no grid of Cs: read C_ and tuning_report_, or give Cs."
            if "Cs_" in self.__dict__:
                why = (
                    "only folds of one penalty leave them behind: read tuning_report_, or give cv, and l1_ratios=None."
                )
            raise AttributeError(f"{type(self).__name__} has no {name}, as {why}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _candidates(self) -> NDArray[np.float64] | None:
        if self.Cs is None:
            return None
        return 1.0 / self._grid()

    def _class_weights(self, encoded: NDArray[np.intp], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the weight of each class; "balanced" gives all classes the same sum of weights.

        Raises:
            ValueError: for weights of classes that y does not hold.
        """
        labels = self.classes_.tolist()
        if self.class_weight is None:
            return np.ones(len(labels))
        if isinstance(self.class_weight, str):
            return weights.sum() / (len(labels) * np.bincount(encoded, weights))
        if unknown := set(self.class_weight) - set(labels):
            raise ValueError(
                "The given class_weight dict must have the class labels as keys; "
                f"classes={labels} but key={sorted(unknown, key=str)}."
            )
        return np.array([self.class_weight.get(label, 1.0) for label in labels])


def _check_present(classes: Any, encoded: Any, weights: NDArray[np.float64]) -> None:
    """Refuse labels of a single class, and classes whose rows have no weight.

    Raises:
        ValueError: in one sentence.
    """
    present = np.bincount(encoded, weights, minlength=len(classes)) > 0
    if present.sum() < 2:
        only = classes[int(np.argmax(present))]
        raise ValueError(f"y needs weighted rows of at least 2 classes, but the data contain only one class: {only}.")
    if not present.all():
        raise ValueError(f"All rows of class {classes[int(np.argmin(present))]} have weight zero: leave them out.")
