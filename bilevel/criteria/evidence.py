"""The evidence of ridge regression: no held-out rows, a likelihood of the targets with coefficients integrated out."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria.criterion import Array, Criterion, Evaluation, Fit, shared
from bilevel.criteria.data import LinearData, Rows
from bilevel.criteria.penalties import Penalties
from bilevel.numerics.small import factor, is_regular
from bilevel.problems.losses import Squared


class Evidence(Criterion):
    """Minus the logarithm of the evidence of ridge regression for each row, up to a constant.

    Coefficients have the prior ``N(0, sigma^2 / a_j)``, targets the noise sigma, whose best value is put in. With
    ``G = X'SX + A``, ``Q = |S^(1/2) (y - Xw)|^2 + w'Aw`` and m the rows (less one for an intercept),

        value = 1/2 log(Q / m) + (log det G - sum_j log a_j) / (2 m)
        dvalue/du_j = a_j w_j^2 / (2 Q) + (a_j (G^-1)_jj - 1) / (2 m)

    (MacKay 1992). The Gauss-Newton matrix is the Fisher information of the penalties, the squared entries of
    ``I - A^(1/2) G^-1 A^(1/2)`` over 2 m. It is a criterion to compare with, and no default: with many penalties it
    over-fits as leave-one-out does. It leaves out no rows: losses are the value, repeated, and predictions those of all
    rows.

    Args:
        data: the rows, of one target.
        penalties: which coefficients share a penalty.

    Raises:
        ValueError: for several targets.

    >>> data = LinearData.of([[0.0], [1.0], [3.0]], [0.0, 1.0, 2.0])
    >>> round(Evidence(data, Penalties.scalar(1)).evaluate(np.zeros(1)).value, 4)
    -0.2957
    """

    name = "evidence"

    def __init__(self, data: LinearData, penalties: Penalties) -> None:
        super().__init__(data, Squared(), penalties)
        if data.y.dim() != 1:
            raise ValueError("the evidence is of one target: make a criterion for each, or use 'loo'.")

    def unit(self, single: float) -> float:
        return 1.0

    @shared
    def _moments(self) -> tuple[Tensor, Tensor, float, Tensor]:
        """X'SX, X'Sy, y'Sy of centred targets, and their mean."""
        data, s = self.data, self.data.weights
        mean = (s * data.y).mean() if data.intercept else data.y.new_zeros(())
        y = data.y - mean
        return data.gram(s), data.collect(s * y), float(s @ y.square()), mean

    def _solve(self, u: Array) -> tuple[Tensor, Tensor, Tensor]:
        gram, cross, _, _ = self._moments
        a = self.penalties.spread(u).exp().to(gram)
        L = factor(gram.clone(), a)
        return a, L, torch.cholesky_solve(cross[:, None], L)[:, 0]

    def compute(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        data, (_, cross, total, mean) = self.data, self._moments
        a, L, w = self._solve(u)
        count = data.counted - int(data.intercept)
        rest = max(total - float(cross @ w), torch.finfo(w.dtype).tiny)
        complexity = float(2.0 * L.diagonal().log().sum() - a.log().sum())
        value = 0.5 * float(np.log(rest / count)) + complexity / (2 * count)
        value = value if is_regular(L, self._moments[0]) else np.inf
        inverse = torch.cholesky_inverse(L)
        gradient = a * w.square() / (2.0 * rest) + (a * inverse.diagonal() - 1.0) / (2 * count)
        gauss_newton = None
        if second:
            root = a.sqrt()
            shrunk = torch.eye(len(a)).to(a) - root[:, None] * inverse * root
            by_column = self.penalties.gather(shrunk.square() / (2 * count))
            gauss_newton = self.penalties.gather(by_column.T).double().cpu().numpy()
        z = data.product(w) + mean
        slopes, weight = data.weights * (z - data.y), data.weights
        by_penalty = self.penalties.gather(gradient).double().cpu().numpy()
        return Evaluation(value, by_penalty, gauss_newton, np.full(data.rows, value), z, slopes, weight, None)

    def refit(self, u: Array, warm: Any = None) -> Fit:
        return self.given(self._solve(u)[2], self._moments[3])

    def remark(self, evaluation: Evaluation) -> str:
        """Return nothing: a likelihood of all rows is no sum over them."""
        return ""

    def take(self, rows: Rows) -> Self:
        return type(self)(self.data.take(rows), self.penalties)
