"""`NetClassifier`: logistic regression of two classes as a combination with elastic nets."""

from __future__ import annotations

from numbers import Real
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_scalar
from torch import Tensor

from bilevel.problems.losses import Logistic
from bilevel.selection.elastic_cv import Kind
from bilevel.sklearn.combined import CombinedModel
from bilevel.sklearn.splits import Folds

CS, EPS = 14, 10**-2.5
"""Penalties of an elastic net for each l1_ratio, and the ratio of their ends."""


class NetClassifier(CombinedModel):
    """What `LogisticRegressionCV` does with l1_ratios; a mixin."""

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
        for index, each in enumerate(given):
            check_scalar(each, f"l1_ratios[{index}]", Real, min_val=0.0, max_val=1.0)
        ratios = tuple(float(each) for each in given if each > 0)
        if self.penalty == "l1" and set(given) - {1.0}:
            raise ValueError(f"penalty='l1' is not that of l1_ratios={self.l1_ratios!r}: leave it out.")
        if self.penalty == "elasticnet" and not given:
            raise ValueError("penalty='elasticnet' needs l1_ratios, such as [0.5, 0.9, 1.0].")
        ratios = (1.0,) if self.penalty == "l1" else ratios
        if ratios and self.penalty_structure not in ("scalar", "feature"):
            raise ValueError(
                f"penalty_structure={self.penalty_structure!r} is of squares: with l1_ratios use 'scalar' or 'feature'."
            )
        if ratios and (self.scoring not in (None, self._own_scoring) or self.honest == "alo"):
            raise ValueError(
                "with l1_ratios, candidates are chosen by the log loss of held-out folds: leave scoring and honest out."
            )
        return ratios

    def _fit_nets(
        self, X: Any, labels: Tensor, weights: NDArray[np.float64], folds: Folds, l1_ratios: tuple[float, ...]
    ) -> Self:
        """Return self, fitted as a combination of ridge penalties, elastic net and adaptive lasso.

        Args:
            X: of shape (rows, features).
            labels: -1 and +1, (rows,).
            weights: of shape (rows,).
            folds: of the outer loop.
            l1_ratios: of the elastic net.

        Raises:
            ValueError: for more than two classes.
        """
        if len(self.classes_) > 2:
            raise ValueError(
                f"l1_ratios other than zero are of two classes, and y has {len(self.classes_)}: leave them out, or use "
                "OneVsRestClassifier."
            )
        kinds: set[Kind] = {"ridge", "elastic_net"}
        if self.penalty_structure == "feature":
            kinds |= {"path", "adaptive_lasso"}
        candidates, unit = self._candidates(), float(weights.sum())
        grid: dict[str, Any] = {"alphas": CS if candidates is None else candidates / unit, "eps": EPS}
        combined = self._combine(X, labels, weights, Logistic(), folds, kinds, unit, l1_ratios=l1_ratios, **grid)
        for name in ("Cs_", "scores_", "coefs_paths_"):
            self.__dict__.pop(name, None)
        self._set_model(combined.fit, X.dtype, (1,))
        self.penalties_ = self.penalties_.reshape(self.coef_.shape)
        net = combined.net
        C, ratio = 1.0 / (net.alpha * unit), net.l1_ratio
        self.C_, self.l1_ratio_ = (np.array([C]), np.array([ratio])) if self.use_legacy_attributes else (C, ratio)
        self.l1_ratios_, self.n_iter_ = np.asarray(l1_ratios), net.rounds
        if candidates is not None:
            self.Cs_ = 1.0 / (net.alphas[0] * unit)
        return self
