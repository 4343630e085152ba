"""`RidgeCV`: ridge regression with tuned penalties, in place of `sklearn.linear_model.RidgeCV`."""

from __future__ import annotations

import copy
from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import linear_model
from sklearn.base import _fit_context
from sklearn.utils._param_validation import Interval, StrOptions

from bilevel.criteria import Criterion, RidgeLeaveOneOut
from bilevel.problems.losses import Squared
from bilevel.selection import Selected, certify_range
from bilevel.sklearn.inputs import nearest, places_of, positive, set_parameters, validated
from bilevel.sklearn.splits import Folds, folds_of
from bilevel.sklearn.tuned import STRUCTURES, TunedLinearModel


class RidgeCV(TunedLinearModel, linear_model.RidgeCV):
    """Ridge regression whose penalties are tuned by a criterion, and kept only where that generalises.

        minimise over w, b   sum_i s_i (y_i - x_i'w - b)^2 + sum_j alpha_j w_j^2

    with penalties of columns with deviation 1 for dense X, and of the columns as they are for sparse X, unless
    `standardize` says otherwise; `coef_` and `intercept_` are in the units of X. docs/sklearn.md has the
    parameters and the fitted attributes in full.

    Args:
        alphas: penalties of which the one penalty, where the path begins, is the best; None for any.
        fit_intercept: whether there is an intercept, which is not penalised.
        scoring: what the outer loop chooses by: a scorer of scikit-learn; None for the criterion's loss.
        cv: folds, for the criterion and the outer loop: None (leave-one-out, and five), a number, a splitter, or pairs.
        gcv_mode: accepted, without effect.
        store_cv_results: whether `cv_results_` holds the squared leave-one-out error of every row at each of `alphas`,
            as scikit-learn's does, in place of the nodes of the path; these are in ``tuning_report_.nodes``, too.
        alpha_per_target: whether every target has penalties of its own: `alpha_` is (targets,) where one for each
            feature is not proved, and each is then the best for its target alone.
        penalty_structure: what shares a penalty: "scalar", "group", "feature", "target" or "target_feature".
        groups: the group of every feature, for "group".
        criterion: "auto", "loo", "alo", "kfold", "holdout", which takes a cv of one pair, such as ShuffleSplit(1), or
            "evidence": see `bilevel.criteria.choose_criterion`.
        guard: what an outer loop lets through: see `bilevel.selection.penalty_cv`; "off" for no outer loop.
        honest: how the losses of the outer loop are taken: see there.
        standardize: whether penalties are those of columns with deviation 1, not of the columns as they are; "auto" for
            the columns of dense X alone.
        certify: whether to prove that no single penalty from 1e-8 to 1e8 is better than the one of this fit by more
            than a share of the criterion: True for a thousandth, or the share. `certificate_` is then a
            `RangeCertificate`.
        tol: relative gain at which a descent ends.
        max_iter: the most steps of a descent on all rows.
        random_state: of the folds, for a number or None as cv; None is a fixed seed.
        n_jobs: of joblib, over folds.
        device: of torch, for the arithmetic; None for the CPU.
        verbose: whether a line shows the outer loop.
        warm_start: whether a further fit begins the search of the one penalty where the last one ended.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((80, 3))
    >>> model = RidgeCV(penalty_structure="scalar").fit(X, 2.0 * X[:, 0] + 1.0)
    >>> model.predict([[1.0, 0.0, 0.0]]).round(2)
    array([3.])
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **TunedLinearModel._shared_constraints,
        "alphas": [None, "array-like", Interval(Real, 0, None, closed="neither")],
        "gcv_mode": [StrOptions({"auto", "svd", "eigen"}), None],
        "store_cv_results": ["boolean"],
        "alpha_per_target": ["boolean"],
        "certify": ["boolean", Interval(Real, 0, 1, closed="neither")],
        "penalty_structure": [StrOptions(STRUCTURES | {"target", "target_feature"})],
    }
    _loss_name = "mean squared error"
    _loss_factor = 2.0
    _own_scoring = "neg_mean_squared_error"

    def __init__(
        self,
        alphas: Any = None,
        *,
        fit_intercept: bool = True,
        scoring: Any = None,
        cv: Any = None,
        gcv_mode: str | None = None,
        store_cv_results: bool = False,
        alpha_per_target: bool = False,
        penalty_structure: str = "feature",
        groups: Any = None,
        criterion: str = "auto",
        guard: str = "auto",
        honest: str = "auto",
        standardize: bool | str = "auto",
        certify: bool | float = False,
        tol: float = 1e-4,
        max_iter: int = 25,
        random_state: Any = None,
        n_jobs: int | None = None,
        device: Any = None,
        verbose: Any = 0,
        warm_start: bool = False,
    ) -> None:
        set_parameters(locals())

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> Self:
        """Return self, fitted to all rows with tuned penalties; a row of weight 2 is fitted as two rows."""
        X, y = validated(self, X, y)
        if self.store_cv_results and (self.alphas is None or self.scoring is not None):
            raise ValueError(
                "store_cv_results=True stores the squared errors of rows at each of the alphas: give alphas, and "
                "scoring=None; what a fit without alphas went through is in tuning_report_.nodes."
            )
        weights = self._weights(sample_weight, X)
        split, scored = self._routed(None if sample_weight is None else weights, params)
        folds = folds_of(self.cv, X, y, None, split, self.random_state)
        column = y.ndim == 2 and y.shape[1] == 1
        targets = torch.from_numpy(np.array(y.ravel() if column else y, dtype=np.float64))
        score = self._score_of(X, y, (), scored)
        selected, criterion = self._tune(X, targets, weights, Squared(), self._structure(), folds, score)
        self._set_model(selected.fit, X.dtype, ())
        if column and self.fit_intercept:
            self.intercept_ = np.reshape(self.intercept_, 1)  # as scikit-learn's
        self.penalties_ = self.penalties_.reshape(self.coef_.shape)
        per_target = self._structure() == "target_feature" and targets.dim() == 2
        self.alpha_ = self._penalty(selected, self.coef_.shape if per_target else (-1,))
        if self.alphas is not None and isinstance(self.alpha_, float):
            self.alpha_ = nearest(self.alpha_, positive("alphas", np.atleast_1d(self.alphas)))
        if self.alpha_per_target and targets.dim() == 2 and np.isinf(selected.node.tau):
            self._set_targets(X, y, sample_weight, params, folds)
        results = self.cv_results_
        if self.certify:
            share = 1e-3 if isinstance(self.certify, bool) else float(self.certify)
            # Half of the share is proved of the best penalty, the other half is left to the one that was found here.
            found, unit = certify_range(criterion, eps=share / 2), float(weights.mean())
            self.certificate_ = replace(
                found,
                penalty=float(results["penalties"][0, 0]),
                low=unit * found.low,
                high=unit * found.high,
                value=float(results["criterion"][0]),
                lower=self._loss_factor * found.lower,
                eps=share,
            )
        if self.store_cv_results:
            self.cv_results_ = self._errors(selected, criterion, y, weights)
        return self

    def _set_targets(self, X: Any, y: Any, sample_weight: Any, params: dict[str, Any], folds: Folds) -> None:
        """Set the models of single targets, each with the one penalty that is best for it."""
        models = []
        for target in y.T:
            model = copy.copy(self)
            model.penalty_structure, model.alpha_per_target, model.scoring = "scalar", False, None
            model.certify = model.store_cv_results = False
            model.cv = folds.pairs if folds.given else self.cv
            models.append(model.fit(X, target, sample_weight, **params))
        for name in ("coef_", "intercept_", "alpha_", "penalties_", "best_score_"):
            setattr(self, name, np.array([getattr(model, name) for model in models]))
        remark = "alpha_per_target=True: every target has the one penalty that is best for it alone, see alpha_."
        self.tuning_report_ = replace(self.tuning_report_, remarks=(*self.tuning_report_.remarks, remark))

    def _candidates(self) -> NDArray[np.float64] | None:
        return None if self.alphas is None else positive("alphas", np.atleast_1d(self.alphas))

    def _errors(self, selected: Selected, criterion: Criterion, y: Any, weights: Any) -> NDArray[np.float64]:
        """Return squared leave-one-out errors times the weights of rows, (rows, [targets,] alphas).

        Raises:
            ValueError: for another criterion.
        """
        if criterion.name != RidgeLeaveOneOut.name:
            raise ValueError("store_cv_results=True is of exact leave-one-out: leave cv and groups None, or say False.")
        found = np.stack([each.predictions.cpu().numpy().T.reshape(y.shape) for each in selected.scanned], -1)
        shape = (-1,) + (1,) * y.ndim
        errors: NDArray[np.float64] = weights.reshape(shape) * (y[..., None] - found) ** 2
        return errors[..., places_of(np.atleast_1d(self.alphas))]

    def _structure(self) -> str:
        """Return which coefficients share a penalty, `alpha_per_target` included.

        Raises:
            ValueError: for groups of each target.
        """
        if not self.alpha_per_target or self.penalty_structure.startswith("target"):
            return self.penalty_structure
        if self.penalty_structure == "group":
            raise ValueError("alpha_per_target=True takes no penalty_structure='group': use 'scalar' or 'feature'.")
        return "scalar" if self.penalty_structure == "scalar" else "target_feature"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = False
        return tags
