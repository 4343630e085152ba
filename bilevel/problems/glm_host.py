"""Dense Newton steps of small generalised linear models, and the adjoint at their end, by arrays on the host.

    H step = gradient,      H a = f_w,      dF/du = -(d pen/du) a w,      H = c X' D X + diag(pen)

The data Hessian of one step serves for the next ones while they are quick, and that of the end for the next penalties:
a step by it takes two products with X, and a Hessian many. A step is halved until the norm of the gradient falls, as in
`Newton`. Where it does not, or more is to be said of the run, there is no result, and the solver takes its steps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.core.options import Relative
from bilevel.core.tree import Tree
from bilevel.numerics.factored import Factored, FactoredRows
from bilevel.oracles.exact import Exact
from bilevel.problems.glm_loss import GLMLoss
from bilevel.problems.host import Array, norm, on_host, penalties_on_host
from bilevel.problems.splits import Split

SMALL = 400
"""Rows or features, whichever are fewer, up to which dense steps are quicker than others."""
WORK, WIDE_WORK = 5e7, 1e8
"""Numbers of X times that many, up to which they are: for a Hessian of each step, and for a matrix of the penalties."""
LOWER, SHORTEST = 1e-4, 1e-3
"""The share of its length by which a step has to lower the norm of the gradient, and the least length."""
STEPS, COLUMNS, MOST = 2.0, 10.0, 10.0
"""A new Hessian costs about as much as so many steps, and one more for every so many columns; at most so many."""
SINGULAR = 1e-12
"""A factor with a pivot below this share of the largest diagonal is left to others."""
ROUGH = 1e-9
"""Relative residual of an adjoint above which the linear solver has the word."""
FAR = 1e-4
"""Share of the outer loss that it may be away from its value at the solution, unless somebody judges that."""


def is_wide(X: Tensor) -> bool:
    """Whether so few rows belong to the features, (features, rows), that systems are solved in their space."""
    return X.shape[-2] > X.shape[-1]


class HostRows:
    """The rows of a split, and the losses of a linear model there, up to a sign of every row that X has, too."""

    def __init__(self, split: Split, loss: GLMLoss) -> None:
        self.y, self.loss, self.response = split.y, loss, loss.response(split.y, None)
        self.sign = None if self.response is None else self.response.sign
        self.X = split.X.numpy() if self.sign is None else (split.X * self.sign).numpy()

    def value(self, z: Tensor) -> float:
        """Return the sum of the losses at predictions."""
        if self.response is not None and self.response.value is not None:
            return self.response.value(z).sum().item()
        return self.loss.value(z if self.sign is None else z * self.sign, self.y).sum().item()

    def slopes(self, z: Tensor) -> Array:
        """Return the slopes of the losses at predictions, which become what `curvatures` takes."""
        response = self.response
        if response is None:
            return self.loss.slope(z, self.y).numpy()
        response.apply(z)
        return z.numpy() if response.target is None else (z - response.target).numpy()

    def curvatures(self, z: Tensor) -> Array:
        """Return the second derivatives of the losses."""
        made = self.loss.curvature(z, self.y) if self.response is None else self.response.curvature(z)
        return made.numpy()


class HostModel:
    """A linear model of one prediction for each row, as arrays.

    Args:
        problem: a `LinearModelProblem` that is no batch, on the host.
    """

    def __init__(self, problem: Any) -> None:
        self.train, self.val = (HostRows(split, problem.glm) for split in (problem.train, problem.val))
        self.scale, self.origin = problem.scale, problem.params.numpy()
        self.wide = is_wide(problem.train.X)
        self.patience = STEPS if self.wide else min(STEPS + len(self.train.X) / COLUMNS, MOST)

    @staticmethod
    def of(problem: Any) -> HostModel | None:
        """Return the arrays of a problem, or None where other steps are quicker, or its tensors are elsewhere."""
        X = problem.train.X
        least = min(X.shape[-2:])
        small = least <= SMALL and least * X.numel() <= (WIDE_WORK if is_wide(X) else WORK)
        parts = (X, problem.train.y, problem.val.X, problem.val.y)
        return HostModel(problem) if small and problem.outputs is None and all(map(on_host, parts)) else None

    def newton(
        self, problem: Any, hparams: Tensor, start: Tensor, most: int, tol: float, cache: Tree = None
    ) -> Exact | None:
        """Return the result of at most so many steps that end at a tolerance; None where something is to be said."""
        penalty = penalties_on_host(problem, hparams)
        if penalty is None:
            return None
        return Run(self, np.full(start.shape, penalty), start.numpy(), tol).result(problem, most, cache)


class Run:
    """One run of steps, from a start to a tolerance, at the penalties of all weights."""

    def __init__(self, model: HostModel, penalty: Array, start: Array, tol: float) -> None:
        self.model, self.penalty, self.start, self.tol = model, penalty, start, tol
        self.made = self.tried = self.steps = 0
        self.kernel: Array | None = None  # of the rows, which the curvatures leave as it is
        self.z = torch.empty(model.train.X.shape[1], dtype=torch.float64)
        self.predictions = self.z.numpy()

    @np.errstate(all="ignore")  # what overflows is no step
    def result(self, problem: Any, most: int, cache: Tree) -> Exact | None:
        """Return where at most so many steps lead, with the adjoint; None where something is to be said."""
        w = base = step = self.start
        H, slope = self._known(cache)
        seen = slope is None  # a gradient that is known shortens the way, but shows nothing
        gradient = self._gradient(w) if slope is None else slope + self.penalty * w
        before, t, own, by_own = math.inf, 1.0, False, False
        while True:
            residual = norm(gradient)
            if not residual <= (1.0 - LOWER * t) * before:  # NaN included
                if t < SHORTEST or before == math.inf:  # a start without a gradient
                    return None
                if by_own:
                    t /= 2
                    w = base - t * step
                else:
                    w, before, H = base, math.inf, None
                gradient = self._gradient(w)
                continue
            if H is None:
                H, own = self._hessian(), True
            goal = self._goal(H, w, residual)
            if not own and (residual <= goal or self._is_slow(residual / before, goal / residual)):
                if seen:
                    H, own = self._hessian(), True
                    goal = self._goal(H, w, residual)
                else:
                    gradient, seen = self._gradient(w), True
                    continue
            if own and residual <= goal:
                return self._judged(problem, w, gradient, residual, H)
            if self.steps == most or residual == math.inf:
                return None
            base, step, before, t = w, H.solve(gradient), residual, 1.0
            w, own, by_own, seen, self.steps = base - step, False, own, True, self.steps + 1
            gradient = self._gradient(w)

    def _known(self, cache: Tree) -> tuple[Factored | None, Array | None]:
        """Return the Hessian and the gradient of the losses at the start that an earlier run has left."""
        features, rows = self.model.train.X.shape
        name, shape = ("curvature", (rows,)) if self.model.wide else ("gram", (features, features))
        if not isinstance(cache, dict) or not on_host(cache.get("slope"), self.start.shape):
            return None, None
        if not on_host(cache.get(name), shape):
            return None, None
        known, slope = cache[name].numpy(), cache["slope"].numpy()
        return (self._factored(known) if self.model.wide else self._factored(gram=known)), slope

    def _factored(self, d: Any = None, gram: Any = None) -> Factored:
        X1 = self.model.train.X.T
        if not self.model.wide:
            return Factored(X1, d, self.penalty, gram)
        H = FactoredRows(X1, d, self.penalty, False, self.kernel)
        self.kernel = H.gram
        return H

    def _gradient(self, w: Array) -> Array:
        """Return the gradient, and leave what curvatures are made of."""
        X = self.model.train.X
        np.dot(w, X, out=self.predictions)
        gradient: Array = X.dot(self.model.train.slopes(self.z))
        gradient *= self.model.scale
        gradient += self.penalty * w
        self.tried += 1
        return gradient

    def _hessian(self) -> Factored:
        """Return the Hessian where the last gradient was taken."""
        self.made += 1
        return self._factored(self.model.scale * self.model.train.curvatures(self.z))

    def _is_slow(self, rate: float, left: float) -> bool:
        """Whether more steps are to be expected, at the rate of the last one, than a new Hessian costs."""
        return rate > 0 and left > 0 and not rate**self.model.patience <= left

    def _goal(self, H: Factored, w: Array, residual: float) -> float:
        """Return the norm of the gradient at which the run ends; see `bilevel.engine.tolerance`."""
        if not isinstance(self.tol, Relative):
            return self.tol
        ways = (w, w - self.start, w - self.model.origin)
        parts = H.product(max(ways, key=lambda way: way.dot(way)))
        return self.tol * (norm(parts) or residual)

    def _judged(self, problem: Any, w: Array, gradient: Array, residual: float, H: Factored) -> Exact | None:
        val, count = self.model.val, problem.val.rows
        z = torch.from_numpy(w.dot(val.X))
        loss = val.value(z) / count
        f = val.X.dot(val.slopes(z)) / count
        a = H.solve(f)
        rest, size, value_error = f - H.product(a), norm(f), float(a.dot(gradient))
        adjoint_residual = norm(rest) / size if size > 0 else 0.0
        by_weight = -a * w * self.penalty if problem.parametrization == "log" else -a * w
        sure = abs(value_error) <= FAR * abs(loss) and adjoint_residual <= ROUGH and self._is_regular(H)
        if not sure or not math.isfinite(loss + by_weight.dot(by_weight)):
            return None
        slope = torch.from_numpy(gradient - self.penalty * w)
        cache = {"slope": slope, **self._cached(H)}
        params, adjoint, total = map(torch.from_numpy, (w, a, by_weight))
        counts = {"gradient": self.tried, "curvature": self.made, "cross": 1}
        result = (params, adjoint, loss, problem.gather(total), residual, adjoint_residual, counts)
        return Exact(*result, self.steps, 1, value_error, "dense Newton", cache=cache)

    def _is_regular(self, H: Factored) -> bool:
        """Whether H was factored as it is, far from singular."""
        if self.model.wide:
            return bool(self.penalty.min() > 0)
        pivots, most = H.L.diagonal(), (H.gram.diagonal() + self.penalty).max()
        return bool(pivots.min() ** 2 > SINGULAR * most)

    def _cached(self, H: Factored) -> dict[str, Tensor]:
        """Return what the next run may begin with; `LinearModelPoint.preconditioner` reads it, too."""
        if self.model.wide:
            return {"curvature": torch.from_numpy(H.d)}
        factor, diagonal = torch.from_numpy(H.L), torch.from_numpy(self.penalty.copy())
        return {"gram": torch.from_numpy(H.gram), "factor": factor, "diagonal": diagonal}
