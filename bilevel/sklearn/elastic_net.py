"""`ElasticNetCV` and `LassoCV`: sparse linear regression that is taken where held-out rows speak for it."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn import linear_model
from sklearn.base import _fit_context
from sklearn.metrics import check_scoring
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metadata_routing import MethodMapping
from sklearn.utils.validation import column_or_1d

from bilevel.problems.losses import Squared
from bilevel.selection.elastic_cv import ALPHAS, L1_RATIOS, Kind
from bilevel.sklearn.combined import CombinedModel
from bilevel.sklearn.inputs import numbers, set_parameters, validated
from bilevel.sklearn.splits import folds_of
from bilevel.sklearn.tuned import TunedLinearModel


class _TunedNet(CombinedModel):
    """What both estimators share."""

    _net_constraints: ClassVar[dict[str, Any]] = {
        name: TunedLinearModel._shared_constraints[name]
        for name in ("fit_intercept", "cv", "scoring", "criterion", "standardize", "tol", "max_iter")
    } | {
        "random_state": ["random_state"],
        "n_jobs": [None, Integral],
        "eps": [Interval(Real, 0, 1, closed="neither")],
        "n_alphas": [Interval(Integral, 1, None, closed="left"), StrOptions({"deprecated"})],
        "alphas": [Interval(Integral, 1, None, closed="left"), "array-like", None],
        "precompute": [StrOptions({"auto"}), "array-like", "boolean"],
        "copy_X": ["boolean"],
        "verbose": ["verbose"],
        "positive": ["boolean"],
        "selection": [StrOptions({"cyclic", "random"})],
        "candidates": ["array-like", None],
        "stacking": ["boolean"],
        "guard": [StrOptions({"auto", "off"})],
    }
    _loss_name = "mean squared error"
    _loss_factor = 2.0
    _own_scoring = "neg_mean_squared_error"
    honest = "nested"
    eps: float
    n_alphas: Any
    alphas: Any
    positive: bool
    stacking: bool

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> Self:
        """Return self, fitted to all rows; a row of weight 2 is fitted as two rows."""
        l1_ratios, alphas = self._l1_ratios(), self._alphas()
        point = not isinstance(alphas, int) and len(alphas) == len(l1_ratios) == 1
        candidates = self._candidate_kinds(point, {"ridge", "path"} if self.positive else set())
        if not all(l1_ratios) and isinstance(alphas, int):
            raise ValueError(
                "Automatic alpha grid generation is not supported for l1_ratio=0. Please supply a grid by providing "
                "your estimator with the appropriate `alphas=` argument."
            )
        X, y = validated(self, X, y)
        if y.ndim > 1 and y.shape[1] > 1:
            raise ValueError(f"For multi-task outputs, use MultiTask{type(self).__name__}")
        y = column_or_1d(y, warn=True)
        weights = self._weights(sample_weight, X)
        split, scored = self._routed(None if sample_weight is None else weights, params)
        folds = folds_of(self.cv, X, y, None, split, self.random_state)
        targets = torch.from_numpy(np.array(y, dtype=np.float64))
        options: dict[str, Any] = {
            "alphas": alphas,
            "eps": self.eps,
            "positive": self.positive,
            "stacking": self.stacking,
        }
        options |= {"l1_ratios": l1_ratios, "rounds": int(self.max_iter), "steps": int(self.max_iter)}
        score = self._score_of(X, y, (), scored)
        combined = self._combine(X, targets, weights, Squared(), folds, candidates, score, **options)
        net = combined.net
        self.alpha_, self.dual_gap_, self.n_iter_ = net.alpha, net.dual_gap, net.rounds
        self.alphas_ = net.alphas[0] if len(net.alphas) == 1 or np.ndim(self.alphas) else net.alphas
        self.mse_path_ = np.squeeze(self._loss_factor * net.losses)
        if hasattr(self, "l1_ratio"):
            self.l1_ratio_ = net.l1_ratio
        self._set_model(combined.fit, X.dtype, ())
        return self

    def get_metadata_routing(self) -> Any:
        """Return what becomes of metadata: the splitter and the scorer take some."""
        router = super().get_metadata_routing()  # type: ignore[misc]
        scorer = None if self.scoring is None else check_scoring(self, scoring=self.scoring)
        return router.add(scorer=scorer, method_mapping=MethodMapping().add(caller="fit", callee="score"))

    def _l1_ratios(self) -> tuple[float, ...]:
        """Return the candidates of the l1_ratio."""
        raise NotImplementedError

    def _alphas(self) -> Any:
        """Return how many penalties, or which.

        Raises:
            ValueError: in one sentence.
        """
        if self.alphas is not None and not isinstance(self.alphas, Integral):
            return numbers("alphas", self.alphas, min_val=0.0)
        if isinstance(self.n_alphas, Integral):
            return int(self.n_alphas)
        return ALPHAS if self.alphas is None else int(self.alphas)


class ElasticNetCV(_TunedNet, linear_model.ElasticNetCV):
    """Ridge regression, or a combination with the elastic net, the adaptive lasso and tuned penalties where proved.

        minimise over w, b   1/(2n) sum_i s_i (y_i - x_i'w - b)^2 + alpha sum_j (r |w_j| + (1 - r)/2 w_j^2)

    with penalties of columns with deviation 1 for dense X, and of the columns as they are for sparse X, unless
    `standardize` says otherwise; `coef_` and `intercept_` are in the units of X.
    The elastic net is that of the alpha and the l1_ratio r with the least loss of held-out rows: `alpha_`, `l1_ratio_`,
    `mse_path_`, `dual_gap_` and `n_iter_` are its own, as in scikit-learn, whichever candidate is taken.
    docs/sklearn.md has the fitted attributes in full.

    Args:
        l1_ratio: candidates of r, from 0 to 1.
        eps: ratio of the least alpha of a grid to the largest.
        alphas: how many for each l1_ratio, from the one at which all coefficients are zero; or penalties, of the
            elastic net alone: the adaptive lasso, whose columns are scaled, has a grid of its own, and ridge penalties
            are free.
        n_alphas: how many, the name of older versions.
        fit_intercept: see `RidgeCV`.
        precompute: accepted, without effect.
        max_iter: rounds of the solver at most, for each penalty, and steps of the descent of the one ridge penalty.
        tol: relative gain at which the descent of the one ridge penalty ends; elastic nets are solved exactly.
        cv: folds of the outer loop: None (five), a number, a splitter, or pairs.
        copy_X: accepted, without effect: X is never written to.
        verbose: see `RidgeCV`.
        n_jobs: likewise.
        positive: whether no coefficient is negative; "ridge" and "path" are no candidates then.
        random_state: see `RidgeCV`.
        selection: accepted, without effect.
        candidates: of "ridge", "path", "elastic_net" (always) and "adaptive_lasso"; None for all, but with one alpha
            and one l1_ratio for that elastic net alone.
        stacking: whether candidates are combined where the gate is open; else, and with `scoring`, the best is taken.
        scoring: what chooses among candidates: a scorer of scikit-learn; None for the loss. `alpha_` and `l1_ratio_`
            have the least loss whatever it is.
        guard: "auto" keeps the first candidate unless the gain of the best is proved; "off" does not.
        criterion: what ridge regression is tuned by: see `RidgeCV`.
        standardize: likewise.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((80, 3))
    >>> model = ElasticNetCV().fit(X, 2.0 * X[:, 0] + 1.0)
    >>> model.predict([[1.0, 0.0, 0.0]]).round(2)
    array([3.])
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_TunedNet._net_constraints,
        "l1_ratio": [Interval(Real, 0, 1, closed="both"), "array-like"],
    }

    def __init__(
        self,
        *,
        l1_ratio: Any = L1_RATIOS,
        eps: float = 1e-3,
        alphas: Any = ALPHAS,
        n_alphas: Any = "deprecated",
        fit_intercept: bool = True,
        precompute: Any = "auto",
        max_iter: int = 1000,
        tol: float = 1e-4,
        cv: Any = None,
        copy_X: bool = True,
        verbose: Any = 0,
        n_jobs: int | None = None,
        positive: bool = False,
        random_state: Any = None,
        selection: str = "cyclic",
        candidates: Any = None,
        stacking: bool = True,
        scoring: Any = None,
        guard: str = "auto",
        criterion: str = "auto",
        standardize: bool | str = "auto",
    ) -> None:
        set_parameters(locals())

    def _l1_ratios(self) -> tuple[float, ...]:
        return tuple(numbers("l1_ratio", np.atleast_1d(self.l1_ratio).tolist(), min_val=0.0, max_val=1.0).tolist())


class LassoCV(_TunedNet, linear_model.LassoCV):
    """The lasso, or the adaptive lasso where held-out rows prove that it predicts better.

        minimise over w, b   1/(2n) sum_i s_i (y_i - x_i'w - b)^2 + alpha sum_j f_j |w_j|

    with penalties of columns with deviation 1 for dense X, and of the columns as they are for sparse X, unless
    `standardize` says otherwise; `coef_` and `intercept_` are in the units of X.
    Coefficients that are out are exactly zero. f is 1 for the lasso; for the adaptive lasso it is small where a tuned
    ridge regression has large coefficients. `alpha_`, `mse_path_`, `dual_gap_` and `n_iter_` are those of the lasso, as
    in scikit-learn, whichever is taken. docs/sklearn.md has the fitted attributes in full.

    Args:
        candidates: of "lasso" (always) and "adaptive_lasso"; None for both, with one alpha for the lasso.
        stacking: whether they are combined where the gate is open; else, and with `scoring`, the best is taken.
        **others: see `ElasticNetCV`.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((80, 3))
    >>> LassoCV().fit(X, 2.0 * X[:, 0] + 1.0).coef_.round(1)
    array([2., 0., 0.])
    """

    _kinds: ClassVar[dict[str, Kind]] = {"lasso": "elastic_net", "adaptive_lasso": "adaptive_lasso"}
    _parameter_constraints: ClassVar[dict[str, Any]] = {**_TunedNet._net_constraints}

    def __init__(
        self,
        *,
        eps: float = 1e-3,
        alphas: Any = ALPHAS,
        n_alphas: Any = "deprecated",
        fit_intercept: bool = True,
        precompute: Any = "auto",
        max_iter: int = 1000,
        tol: float = 1e-4,
        copy_X: bool = True,
        cv: Any = None,
        verbose: Any = False,
        n_jobs: int | None = None,
        positive: bool = False,
        random_state: Any = None,
        selection: str = "cyclic",
        candidates: Any = None,
        stacking: bool = False,
        scoring: Any = None,
        guard: str = "auto",
        criterion: str = "auto",
        standardize: bool | str = "auto",
    ) -> None:
        set_parameters(locals())

    def _l1_ratios(self) -> tuple[float, ...]:
        return (1.0,)
