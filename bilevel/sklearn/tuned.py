"""`TunedLinearModel`: what the estimators share: parameters, the way of the data, and fitted attributes."""

from __future__ import annotations

import copy
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import get_config
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring, get_scorer_names
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metadata_routing import process_routing
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor

from bilevel.core.status import warn
from bilevel.criteria import Criterion, Evidence, Fit, LinearData, Penalties, choose_criterion
from bilevel.criteria.choose import KINDS, standardizes
from bilevel.problems.losses import GLMLoss
from bilevel.selection import Combined, Selected, penalty_cv
from bilevel.sklearn.displays import PenaltiesDisplay, TuningPathDisplay
from bilevel.sklearn.inputs import AS_THEY_ARE, CHECKED, check_scorer, key_of, on_device
from bilevel.sklearn.report import TuningReport, losses_of, shown, summary_of
from bilevel.sklearn.splits import Folds, penalties_of

STRUCTURES = {"scalar", "group", "feature"}


class TunedLinearModel:
    """Penalties of a linear model, tuned by a criterion and kept only where that generalises; a mixin."""

    _shared_constraints: ClassVar[dict[str, Any]] = {
        "fit_intercept": ["boolean"],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "groups": ["array-like", None],
        "criterion": [StrOptions(set(KINDS))],
        "guard": [StrOptions({"auto", "best", "one_se", "off"})],
        "honest": [StrOptions({"auto", "nested", "alo"})],
        "standardize": ["boolean", StrOptions({"auto"})],
        "tol": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
        "n_jobs": [None, Integral],
        "device": [None, str, torch.device],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
    }
    _parameter_constraints: ClassVar[dict[str, Any]]
    _loss_name: ClassVar[str]
    _loss_factor: ClassVar[float] = 1.0
    """What a loss of `bilevel.criteria` is multiplied by to be the one that is shown."""
    _penalty_name: ClassVar[str] = "alpha"
    _own_scoring: ClassVar[str]
    """The scorer that is the negative loss."""

    fit_intercept: bool
    cv: Any
    scoring: Any
    groups: Any
    criterion: str
    guard: Any
    honest: Any
    standardize: Any
    tol: float
    max_iter: int
    warm_start: bool
    random_state: Any
    n_jobs: int | None
    device: Any
    verbose: Any
    cv_results_: Any
    tuning_report_: TuningReport

    def _validate_params(self) -> None:
        """Check parameters as scikit-learn does, which takes longer than a small fit: simple values once.

        Raises:
            ValueError: for a scorer as the criterion.
        """
        key = key_of(type(self), [vars(self).get(name) for name in self._parameter_constraints])
        if key in CHECKED:
            return
        check_scorer(type(self).__name__, getattr(self, "scoring", None))
        scorer = isinstance(self.criterion, str) and self.criterion in get_scorer_names()
        if scorer or callable(self.criterion):
            raise ValueError(
                f"criterion={self.criterion!r} is a scorer, and has no derivatives by the penalties: give it as "
                f"scoring, by which the outer loop then chooses, and leave criterion 'auto'."
            )
        super()._validate_params()  # type: ignore[misc]
        if key and len(CHECKED) < 1000:
            CHECKED.add(key)

    def _routed(
        self, sample_weight: NDArray[np.float64] | None, params: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what of the metadata goes to the splitter, and to the scorer.

        Raises:
            ValueError: for metadata that nobody takes.
        """
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        if get_config()["enable_metadata_routing"]:
            routed = process_routing(self, "fit", **weights, **params)
            return dict(routed.splitter.split), dict(routed.scorer.score) if "scorer" in routed else {}
        if unknown := params.keys() - {"groups"}:
            raise ValueError(
                f"{type(self).__name__}.fit takes {sorted(unknown)} with sklearn.set_config(enable_metadata_routing="
                "True) only; groups of rows for cv are taken without."
            )
        return params, weights

    def _weights(self, sample_weight: Any, X: Any) -> NDArray[np.float64]:
        """Return the weights of the rows, in float64.

        Raises:
            ValueError: for weights that are negative, or all zero.
        """
        if sample_weight is None:
            return np.ones(X.shape[0])
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not weights.any():
            raise ValueError("Sample weights must contain at least one non-zero number, got only zeros.")
        return weights

    def _tune(
        self, X: Any, y: Tensor, weights: NDArray[np.float64], loss: GLMLoss, structure: str, folds: Folds, score: Any
    ) -> tuple[Selected, Criterion]:
        """Return the tuned model and its criterion; the attributes that all estimators have are set.

        Args:
            X: of shape (rows, features).
            y: as the loss takes it, (rows,) or (rows, targets).
            weights: of shape (rows,).
            loss: of a row.
            structure: which coefficients share a penalty.
            folds: of the outer loop.
            score: of a model on some rows, (fit, rows) -> float; None for the loss.
        """
        outputs = y.shape[1] if y.dim() == 2 else loss.outputs(y)
        penalties = penalties_of(structure, self.groups, X.shape[1], outputs)
        scaled = standardizes(self.standardize, X)
        data = LinearData.of(on_device(X, self.device), y, weights, intercept=self.fit_intercept, standardize=scaled)
        criterion = self._criterion(data, loss, penalties, folds)
        outer: list[Any] = []
        remarks = [AS_THEY_ARE] if self.standardize == "auto" and not scaled else []
        if penalties.size > 1 and self.guard != "off":
            outer = folds.outer(bool(criterion.folds), weights)
            if len(outer) < 2:
                criterion = criterion.with_penalties(Penalties.scalar(X.shape[1], outputs))
                remarks.append("rows or folds are too few for an outer loop, so one penalty was tuned.")
                if folds.given:
                    whence = "groups of rows" if self.cv is None else f"cv={self.cv!r}"
                    warn(f"{whence}: {remarks[-1]}")
        scorer = self._scorer_name(outer) if score is not None else ""
        mean_weight = float(weights.mean())
        candidates = self._candidates()
        again = self.warm_start and hasattr(self, "tuning_report_")
        selected = penalty_cv(
            criterion,
            guard=self.guard,
            honest=self.honest,
            folds=outer,
            tol=self.tol,
            steps=int(self.max_iter),
            candidates=None if candidates is None else np.log(candidates / mean_weight),
            start=float(np.log(self.tuning_report_.nodes["penalties"][0, 0] / mean_weight)) if again else None,
            score=score,
            n_jobs=self.n_jobs,
            progress=bool(self.verbose),
        )
        if not selected.node.converged:
            warn(
                f"The search of penalties has used up its steps (max_iter={self.max_iter}): raise max_iter, or tol, "
                f"which is {self.tol:g}.",
                ConvergenceWarning,
            )
        if scorer:
            remarks += self._unscored(selected)
        selected = replace(selected, remarks=(*remarks, *selected.remarks))
        self._set_results(selected, mean_weight, criterion, scorer)
        return selected, criterion

    def _scorer_name(self, outer: list[Any]) -> str:
        """Return what reports call the scorer; empty without an outer loop, which is warned of.

        Raises:
            ValueError: with losses of single rows, which leave nothing to be scored.
        """
        if not outer:
            warn(
                f"scoring={self.scoring!r} has no say without an outer loop: the {self._loss_name} alone decides; see "
                "penalty_structure and guard.",
                UserWarning,
            )
            return ""
        if self.honest == "alo":
            raise ValueError(
                f"scoring={self.scoring!r} is of held-out folds, and honest='alo' has none: use honest='nested', or "
                "scoring=None."
            )
        return self.scoring if isinstance(self.scoring, str) else getattr(self.scoring, "__name__", "the score")

    def _unscored(self, selected: Selected | Combined, first: str = "one penalty") -> list[str]:
        """Warn of folds of the outer loop on which the scorer is not finite with the first model; return that."""
        assert selected.losses is not None
        scored = selected.losses.rows[np.isfinite(selected.losses.losses[0])]
        folds = np.setdiff1d(np.arange(len(selected.folds)), scored) + 1
        if not len(folds):
            return []
        kept = f"{first} is kept" if len(scored) < len(selected.losses.rows) else "the others decide"
        named = ", ".join(map(str, folds[:5])) + (", ..." if len(folds) > 5 else "")
        found = (
            f"scoring={self.scoring!r} is not finite on fold {named} of the outer loop, so {kept}: use fewer or "
            "stratified folds, which hold out rows of every class."
        )
        warn(found)
        return [found]

    def _candidates(self) -> NDArray[np.float64] | None:
        """Return the penalties that the one penalty is chosen from; None for any."""
        raise NotImplementedError

    def _score_of(self, X: Any, y: Any, leading: tuple[int, ...], params: dict[str, Any]) -> Any:
        """Return the score of a model on some of the rows, (fit, rows) -> float; None where it is the loss.

        Args:
            X: of all rows.
            y: likewise.
            leading: dimensions that scikit-learn gives coefficients of one prediction.
            params: of the scorer, of all rows.
        """
        if self.scoring is None or self.scoring == self._own_scoring:
            return None
        scorer = check_scoring(self, scoring=self.scoring)

        def score(fit: Fit, rows: NDArray[np.intp]) -> float:
            model = copy.copy(self)
            model.__dict__.pop("feature_names_in_", None)
            model._set_model(fit, X.dtype, leading)
            return float(scorer(model, X[rows], y[rows], **{name: np.asarray(params[name])[rows] for name in params}))

        return score

    def _criterion(self, data: LinearData, loss: GLMLoss, penalties: Penalties, folds: Folds) -> Criterion:
        """Return what is descended.

        Raises:
            ValueError: where it does not fit, such as single rows that would be left out of groups or of an order.
        """
        if self.criterion in ("loo", "alo") and folds.dependence:
            raise ValueError(
                f"criterion={self.criterion!r} leaves out single rows, but "
                f"{'groups say' if self.cv is None else f'cv={self.cv!r} or groups say'} that rows are "
                f"{folds.dependence}: use 'kfold' or 'auto', since a row's neighbours tell it."
            )
        if (self.criterion == "kfold" or loss.outputs(data.y) is not None) and not folds.pairs:
            raise ValueError(
                f"{'folds' if self.cv is None else f'cv={self.cv!r}'} can hold out no row: every class of y has so few "
                "that each fold has to train on all: add rows."
            )
        kind = "kfold" if self.criterion == "auto" and folds.given else self.criterion
        return choose_criterion(kind, data, loss, penalties, folds=iter(folds), dependent=folds.dependence or None)

    def _unit_of(self, criterion: Criterion) -> tuple[float, str]:
        """Return what values of the criterion are multiplied by to be those that are shown, and what these are."""
        evidence = criterion.name == Evidence.name
        return (1.0, "minus log evidence of a row") if evidence else (self._loss_factor, self._loss_name)

    def _set_results(self, selected: Selected, mean_weight: float, criterion: Criterion, scorer: str) -> None:
        """Set `penalties_`, `cv_results_`, `tuning_report_` and `n_iter_`.

        Args:
            selected: with losses as `bilevel.criteria` has them.
            mean_weight: of the rows: the criterion has weights of mean 1, penalties here belong to the given ones.
            criterion: what was descended.
            scorer: the name of what the outer loop has chosen by; empty for the loss.
        """
        nodes = shown(selected.nodes, self._unit_of(criterion)[0], 1.0 if scorer else self._loss_factor)
        selected = replace(selected, nodes=nodes)
        node = selected.node

        def of_nodes(name: str) -> NDArray[np.float64]:
            return np.array([getattr(each, name) for each in nodes])

        self.penalties_ = node.penalties.numpy() * mean_weight
        self.n_iter_ = sum(each.evaluations for each in nodes)
        self.cv_results_ = {
            "tau": of_nodes("tau"),
            "criterion": of_nodes("value"),
            "loss": of_nodes("loss"),
            "std_error": of_nodes("std_error"),
            "gain": of_nodes("gain"),
            "gain_error": of_nodes("gain_error"),
            "gate": of_nodes("gate"),
            "penalties": np.exp(of_nodes("u")) * mean_weight,
            "chosen": np.arange(len(nodes)) == selected.chosen,
        }
        self.best_score_ = -float(node.value if selected.choice is None else node.loss)
        summary = summary_of(selected, scorer, self._penalty_name, mean_weight)
        more = {"honest": selected.honest, "n_penalties": node.u.size, "summary": summary}
        self._set_report(selected, criterion, scorer, losses_of(nodes, scored=bool(scorer)) | more)

    def _set_report(self, found: Selected | Combined, criterion: Criterion, scorer: str, more: dict[str, Any]) -> None:
        """Set `tuning_report_`, by what it has of any model and by more."""
        self.tuning_report_ = TuningReport(
            estimator=type(self).__name__,
            loss_name=f"minus {scorer}" if scorer else self._loss_name,
            criterion=criterion.name,
            criterion_name=self._unit_of(criterion)[1],
            kappa=float("nan") if found.choice is None else found.choice.kappa,
            survived=found.open,
            n_evaluations=found.evaluations,
            seconds=found.seconds,
            remarks=found.remarks,
            nodes=self.cv_results_,
            **more,
        )

    def _set_model(self, fit: Fit, dtype: Any, leading: tuple[int, ...]) -> None:
        """Set `coef_` and `intercept_`, in the dtype of X, with a leading dimension where scikit-learn has one."""
        self.coef_ = fit.coef.cpu().numpy().astype(dtype).reshape((*leading, *fit.coef.shape))
        self.intercept_ = fit.intercept.cpu().numpy().astype(dtype).reshape((*leading, *fit.intercept.shape))[()]

    def _penalty(self, selected: Selected, shape: tuple[int, ...]) -> Any:
        """Return the chosen penalty, a float where it is one for all, else an array of the given shape."""
        chosen = self.tuning_report_.nodes["penalties"][selected.chosen]
        return float(chosen[0]) if np.isinf(selected.node.tau) else chosen.reshape(shape)

    def plot_path(self, *, ax: Any = None, **kwargs: Any) -> TuningPathDisplay:
        """Draw the losses from one penalty to freely tuned ones: see `TuningPathDisplay.from_estimator`."""
        return TuningPathDisplay.from_estimator(self, ax=ax, **kwargs)

    def plot_penalties(self, *, ax: Any = None, **kwargs: Any) -> PenaltiesDisplay:
        """Draw the penalty of each feature: see `PenaltiesDisplay.from_estimator`."""
        return PenaltiesDisplay.from_estimator(self, ax=ax, **kwargs)
