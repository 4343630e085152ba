"""Hypergradients of small generalised linear models at the end of dense Newton steps, by arrays on the host.

    H a = f_w,      dF/du = -(d pen/du) a w,      H = c X' D X + diag(pen)

The data Hessian at the end serves for the first steps at the next penalties; see `bilevel.numerics.dense_newton`. Where
steps do not converge, or more is to be said of the run, there is no result, and the solver takes its own steps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.core.options import Relative
from bilevel.core.tree import Tree
from bilevel.numerics.dense_newton import Model, Rows, minimise
from bilevel.numerics.factored import Factored, FactoredRows
from bilevel.numerics.small import norm
from bilevel.oracles.exact import Exact
from bilevel.problems.host import Array, on_host, penalties_on_host

SMALL = 400
"""Rows or features, whichever are fewer, up to which dense steps are quicker than others."""
WORK, WIDE_WORK = 5e7, 1e8
"""Numbers of X times that many, up to which they are: for a Hessian of each step, and for a matrix of the penalties."""
SINGULAR = 1e-12
"""A factor with a pivot below this share of the largest diagonal is left to others."""
ROUGH = 1e-9
"""Relative residual of an adjoint above which the linear solver has the word."""
FAR = 1e-4
"""Share of the outer loss that it may be away from its value at the solution, unless somebody judges that."""


class HostModel:
    """A linear model of one prediction for each row, as arrays.

    Args:
        problem: a `LinearModelProblem` that is no batch, on the host.
    """

    def __init__(self, problem: Any) -> None:
        train, val, glm = problem.train, problem.val, problem.glm
        self.train = Rows(train.X.numpy().T, problem.scale, train.y, glm, signed=True)
        self.val = Rows(val.X.numpy().T, 1.0 / val.rows, val.y, glm, signed=True)
        self.origin = problem.params.numpy()

    @staticmethod
    def of(problem: Any) -> HostModel | None:
        """Return the arrays of a problem, or None where other steps are quicker, or its tensors are elsewhere."""
        X = problem.train.X
        least, wide = min(X.shape), X.shape[0] > X.shape[1]
        small = least <= SMALL and least * X.numel() <= (WIDE_WORK if wide else WORK)
        parts = (X, problem.train.y, problem.val.X, problem.val.y)
        return HostModel(problem) if small and problem.outputs is None and all(map(on_host, parts)) else None

    def newton(
        self, problem: Any, hparams: Tensor, start: Tensor, most: int, tol: float, cache: Tree = None
    ) -> Exact | None:
        """Return the hypergradient where so many steps end at a tolerance; None where something is to be said."""
        penalty = penalties_on_host(problem, hparams)
        if penalty is None:
            return None
        a, first = np.full(start.shape, penalty), start.numpy()

        def share(w: Array, point: Any, H: Factored, gradient: Array, residual: float) -> float:
            goal: float = tol
            if isinstance(tol, Relative):  # see `bilevel.engine.tolerance`
                ways = (w, w - first, w - self.origin)
                goal = tol * (norm(H.product(max(ways, key=lambda way: way.dot(way)))) or residual)
            return goal / residual if residual > 0 else math.inf

        with np.errstate(all="ignore"):  # what overflows is no step
            model = minimise(self.train, a, first, self._known(cache, a), share, most)
            return self._judged(problem, a, model) if model.converged else None

    def _known(self, cache: Tree, a: Array) -> tuple[Factored | None, Any]:
        """Return the Hessian and the gradient of the losses at the start that an earlier run has left."""
        X1, wide = self.train.X1, self.train.wide
        name, shape = ("curvature", (len(X1),)) if wide else ("gram", (len(a), len(a)))
        if not isinstance(cache, dict) or not (
            on_host(cache.get("slope"), a.shape) and on_host(cache.get(name), shape)
        ):
            return None, None
        known, slope = cache[name].numpy(), cache["slope"].numpy()
        return FactoredRows(X1, known, a, False) if wide else Factored(X1, None, a, known), slope

    def _judged(self, problem: Any, penalty: Array, model: Model) -> Exact | None:
        """Return the hypergradient at the end of steps, with its evidence."""
        w, H, (tried, made, steps) = model.w, model.H, model.counts
        z, _, _, f = self.val.at(w)
        a, loss = H.solve(f), self.val.value(z)
        rest, size, value_error = f - H.product(a), norm(f), float(a.dot(model.gradient))
        adjoint_residual = norm(rest) / size if size > 0 else 0.0
        by_weight = -a * w * penalty if problem.parametrization == "log" else -a * w
        sure = abs(value_error) <= FAR * abs(loss) and adjoint_residual <= ROUGH and self._is_regular(H)
        if not sure or not math.isfinite(loss + by_weight.dot(by_weight)):
            return None
        if self.train.wide:
            known = {"slope": model.point.slope, "curvature": H.d}
        else:  # `LinearModelPoint.preconditioner` reads it, too
            known = {"slope": model.point.slope, "gram": H.gram, "factor": H.L, "diagonal": penalty}
        cache = {name: torch.from_numpy(each) for name, each in known.items()}
        params, adjoint, total = map(torch.from_numpy, (w, a, by_weight))
        counts = {"gradient": tried, "curvature": made, "cross": 1}
        result = (params, adjoint, loss, problem.gather(total), model.residual, adjoint_residual, counts)
        return Exact(*result, steps, 1, value_error, "dense Newton", cache=cache)

    def _is_regular(self, H: Factored) -> bool:
        """Whether H was factored as it is, far from singular."""
        if self.train.wide:
            return bool(H.a.min() > 0)
        pivots, most = H.L.diagonal(), (H.gram.diagonal() + H.a).max()
        return bool(pivots.min() ** 2 > SINGULAR * most)
