"""`CombinedModel`: what the estimators share that judge candidates of different kinds, and combine them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from bilevel.core.status import warn
from bilevel.criteria import Criterion, LinearData, Penalties
from bilevel.criteria.choose import standardizes
from bilevel.problems.losses import GLMLoss
from bilevel.selection import Combined, elastic_cv
from bilevel.selection.elastic_cv import KINDS, Kind
from bilevel.sklearn.inputs import AS_THEY_ARE, on_device
from bilevel.sklearn.report import losses_of, shown
from bilevel.sklearn.splits import Folds
from bilevel.sklearn.tuned import TunedLinearModel


class CombinedModel(TunedLinearModel):
    """Ridge regression, elastic nets and the adaptive lasso on one set of folds; a mixin."""

    _kinds: ClassVar[dict[str, Kind]] = {name: name for name in KINDS}
    """What `candidates` may hold, and what `elastic_cv` calls it."""

    candidates: Any
    weights_: dict[str, float]

    def _candidate_kinds(self, point: bool, without: set[Kind]) -> set[Kind]:
        """Return the candidates as `elastic_cv` calls them.

        Args:
            point: whether the grid of the elastic net is one point: then there is only this, unless others are named.
            without: what is none unless it is named.

        Raises:
            ValueError: in one sentence.
        """
        first = next(name for name, kind in self._kinds.items() if kind == "elastic_net")
        if self.candidates is None:
            return {"elastic_net"} if point else set(self._kinds.values()) - without
        names = list(self.candidates)
        if first not in names or set(names) - set(self._kinds):
            raise ValueError(
                f"candidates must be of {list(self._kinds)}, with {first!r} among them, got {self.candidates!r}."
            )
        return {self._kinds[name] for name in names}

    def _combine(
        self,
        X: Any,
        y: Tensor,
        weights: NDArray[np.float64],
        loss: GLMLoss,
        folds: Folds,
        candidates: set[Kind],
        score: Any,
        unit: float = 1.0,
        **options: Any,
    ) -> Combined:
        """Return the combined model; `cv_results_`, `penalties_`, `tuning_report_` and `weights_` are set.

        Args:
            X: of shape (rows, features).
            y: as the loss takes it, (rows,).
            weights: of shape (rows,).
            loss: of a row.
            folds: of the outer loop.
            candidates: as `elastic_cv` takes them.
            score: of a model on some rows, (fit, rows) -> float; None for the loss.
            unit: what penalties of mean losses are multiplied by to be those that are shown.
            options: of `elastic_cv`.
        """
        scaled = standardizes(self.standardize, X)
        X = on_device(X, getattr(self, "device", None))
        data = LinearData.of(X, y, weights, intercept=self.fit_intercept, standardize=scaled)
        # Given folds are those of the outer loop; only dependent rows need them for the criterion, too.
        dependent = bool(folds.dependence)
        penalties = Penalties.feature(data.features, loss.outputs(y))
        criterion = self._criterion(data, loss, penalties, replace(folds, given=dependent))
        remarks = [AS_THEY_ARE] if self.standardize == "auto" and not scaled else []
        pairs = folds.outer(bool(criterion.folds), weights)
        if len(pairs) < 2:
            pairs, candidates = folds.pairs, candidates & {"elastic_net"}
            remarks.append("folds are too few for those of a criterion within them, so there is only the elastic net.")
        scorer = self._scorer_name(pairs) if score is not None else ""
        combined = elastic_cv(
            criterion,
            score=score,
            candidates=sorted(candidates),
            guard="off" if self.guard == "off" else "auto",
            folds=pairs,
            tol=self.tol,
            n_jobs=self.n_jobs,
            progress=bool(self.verbose),
            **options,
        )
        if not combined.converged:
            warn(
                f"A descent or a solver of the elastic net has used up its steps (max_iter={self.max_iter}): raise "
                "max_iter, or the least penalty of the grid.",
                ConvergenceWarning,
            )
        if scorer:
            remarks += self._unscored(combined, f"the {combined.candidates[0].name}")
        of_loss = 1.0 if scorer else self._loss_factor
        combined = replace(
            combined,
            candidates=shown(combined.candidates, self._unit_of(criterion)[0], of_loss),
            remarks=(*remarks, *combined.remarks),
        )
        self._set_candidates(combined, unit, criterion, scorer)
        return combined

    def _set_candidates(self, combined: Combined, unit: float, criterion: Criterion, scorer: str) -> None:
        candidates = combined.candidates
        names = ("value", "loss", "std_error", "gain", "gain_error", "gate", "weight", "l1_ratio")
        columns = {name: np.array([getattr(each, name) for each in candidates]) for name in names}
        self.weights_ = {each.name: each.weight for each in candidates}
        self.cv_results_ = {
            "candidate": np.array([each.name for each in candidates]),
            "criterion": columns.pop("value"),
            **columns,
            "penalties": unit * np.stack([each.penalties.cpu().numpy() for each in candidates]),
            "chosen": np.arange(len(candidates)) == combined.chosen,
        }
        self.penalties_ = self.cv_results_["penalties"][combined.chosen]
        more = {"honest": "nested", "n_penalties": self.penalties_.shape[-1], "summary": combined.summary_by(scorer)}
        more |= {"n_candidates": len(candidates), "n_folds": len(combined.folds), "n_nets": combined.solved}
        self._set_report(combined, criterion, scorer, losses_of(candidates, scored=bool(scorer)) | more)
