"""`NetClassifier`: logistic regression as a combination with elastic nets."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bilevel.problems.losses import Logistic, Softmax
from bilevel.selection.elastic_cv import Kind
from bilevel.sklearn.combined import CombinedModel
from bilevel.sklearn.inputs import nearest, numbers, positive
from bilevel.sklearn.splits import Folds

CS, EPS = 14, 10**-2.5
"""Penalties of an elastic net for each l1_ratio, and the ratio of their ends."""
ROUNDS = 8
"""Rounds of the solver of an elastic net for each of max_iter, whose default is one of few steps."""


class NetClassifier(CombinedModel):
    """What `LogisticRegressionCV` does with l1_ratios; a mixin."""

    Cs: Any
    l1_ratios: Any
    penalty: str
    penalty_structure: str
    use_legacy_attributes: bool
    classes_: Any
    C_: Any
    l1_ratio_: Any

    def _net_ratios(self) -> tuple[float, ...]:
        """Return the l1_ratios of the elastic net; none where penalties are squares.

        Raises:
            ValueError: in one sentence, for those that do not fit the penalty or other parameters.
        """
        given = () if self.l1_ratios is None else tuple(self.l1_ratios)
        if given:
            numbers("l1_ratios", given, min_val=0.0, max_val=1.0)
        named = self.candidates is not None and "ridge" not in self.candidates
        ratios = tuple(float(each) for each in given if each > 0 or named) if any(given) else ()
        if self.penalty == "l1" and set(given) - {1.0}:
            raise ValueError(f"penalty='l1' is not that of l1_ratios={self.l1_ratios!r}: leave it out.")
        if self.penalty == "elasticnet" and not given:
            raise ValueError("penalty='elasticnet' needs l1_ratios, such as [0.5, 0.9, 1.0].")
        ratios = (1.0,) if self.penalty == "l1" else ratios
        if ratios and not all(ratios) and self.Cs is None:
            raise ValueError("at an l1_ratio of 0 no penalty makes all coefficients zero: give Cs.")
        if self.candidates is not None and not ratios:
            raise ValueError("candidates are judged beside an elastic net: give l1_ratios, such as [0.5, 0.9, 1.0].")
        if ratios and self.penalty_structure not in ("scalar", "feature"):
            raise ValueError(
                f"penalty_structure={self.penalty_structure!r} is of squares: with l1_ratios use 'scalar' or 'feature'."
            )
        if ratios and self.honest == "alo":
            raise ValueError("with l1_ratios, candidates are judged by held-out folds: leave honest='alo' out.")
        if ratios and (self.guard not in ("auto", "off") or self.groups is not None):
            raise ValueError(
                "with l1_ratios, guard is 'auto' or 'off', and groups of features have no penalties: got "
                f"guard={self.guard!r}, groups={'None' if self.groups is None else 'some'}."
            )
        return ratios

    def _grid(self) -> NDArray[np.float64]:
        """Return the Cs, in the order in which they are given."""
        return np.logspace(-4, 4, int(self.Cs)) if isinstance(self.Cs, Integral) else positive("Cs", self.Cs)

    def _fit_nets(
        self,
        X: Any,
        labels: Tensor,
        weights: NDArray[np.float64],
        folds: Folds,
        l1_ratios: tuple[float, ...],
        score: Any,
    ) -> Self:
        """Return self, fitted as a combination of ridge penalties, elastic net and adaptive lasso.

        Args:
            X: of shape (rows, features).
            labels: -1 and +1, or indices of more than two classes, (rows,).
            weights: of shape (rows,).
            folds: of the outer loop.
            l1_ratios: of the elastic net.
            score: of a model on some rows, (fit, rows) -> float; None for the loss.
        """
        loss, leading = (Logistic(), (1,)) if len(self.classes_) == 2 else (Softmax(), ())
        candidates, unit = self._candidates(), float(weights.sum())
        point = candidates is not None and len(candidates) == np.size(self.l1_ratios) == 1
        scalar: set[Kind] = {"path", "adaptive_lasso"} if self.penalty_structure == "scalar" else set()
        kinds = self._candidate_kinds(point, scalar)
        grid: dict[str, Any] = {"alphas": CS if candidates is None else candidates / unit, "eps": EPS}
        grid |= {"l1_ratios": l1_ratios, "steps": int(self.max_iter), "rounds": ROUNDS * int(self.max_iter)}
        combined = self._combine(X, labels, weights, loss, folds, kinds, score, unit, **grid)
        for name in ("Cs_", "scores_", "coefs_paths_"):
            self.__dict__.pop(name, None)
        self._set_model(combined.fit, X.dtype, leading)
        self.penalties_ = self.penalties_.reshape(self.coef_.shape)
        net = combined.net
        C, ratio = 1.0 / (net.alpha * unit), net.l1_ratio
        if candidates is not None:
            self.Cs_ = self._grid()
            C = nearest(C, self.Cs_)
        each = np.ones(len(self.coef_))
        self.C_, self.l1_ratio_ = (C * each, ratio * each) if self.use_legacy_attributes else (C, ratio)
        self.l1_ratios_, self.n_iter_ = np.asarray(l1_ratios), net.rounds
        return self
