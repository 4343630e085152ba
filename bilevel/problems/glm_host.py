"""Dense Newton steps of small generalised linear models, and the adjoint at their end, by arrays on the host.

    H step = gradient,      H a = f_w,      dF/du = -(d pen/du) a w,      H = c X' D X + diag(pen)

A step is halved until the norm of the gradient falls, as in `Newton`. Where it does not, or anything else is to be said
of the run, there is no result, and the solver takes its steps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.core.options import Relative
from bilevel.oracles.exact import Exact
from bilevel.problems.glm_loss import GLMLoss
from bilevel.problems.ridge_host import ROUGH, Array, on_host, penalties_on_host
from bilevel.problems.splits import Split

FEATURES, WORK = 200, 1e7
"""The most features, and rows times squared features, for which dense steps are quicker than others."""
LOWER, SHORTEST = 1e-4, 1e-3
"""The share of its length by which a step has to lower the norm of the gradient, and the least length."""
FAR = 1e-4
"""Share of the outer loss that it may be away from its value at the solution, unless somebody judges that."""


class HostRows:
    """The rows of a split, and the losses of a linear model there."""

    def __init__(self, split: Split, loss: GLMLoss) -> None:
        self.X, self.y, self.loss = split.X.numpy(), split.y, loss
        self.response = loss.response(split.y, None)

    def value(self, z: Tensor) -> float:
        """Return the sum of the losses at predictions."""
        return self.loss.value(z, self.y).sum().item()

    def slopes(self, z: Tensor) -> Array:
        """Return the slopes of the losses at predictions, which become what `curvatures` takes."""
        response = self.response
        if response is None:
            return self.loss.slope(z, self.y).numpy()
        if response.sign is not None:
            z *= response.sign
        response.apply(z)
        slope = z if response.target is None else z - response.target
        return (slope if response.sign is None else slope * response.sign).numpy()

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

    @staticmethod
    def of(problem: Any) -> HostModel | None:
        """Return the arrays of a problem, or None where other steps are quicker, or its tensors are elsewhere."""
        features, rows = problem.train.X.shape[-2:]
        small = features <= FEATURES and rows * features**2 <= WORK and features <= 2 * rows
        parts = (problem.train.X, problem.train.y, problem.val.X, problem.val.y)
        return HostModel(problem) if small and problem.outputs is None and all(map(on_host, parts)) else None

    @np.errstate(all="ignore")  # what overflows is no step
    def newton(self, problem: Any, hparams: Tensor, start: Tensor, most: int, tol: float) -> Exact | None:
        """Return the result of at most so many steps that end at a tolerance; None where something is to be said."""
        X, scale = self.train.X, self.scale
        penalty = penalties_on_host(problem, hparams)
        if penalty is None:
            return None
        first = w = base = step = start.numpy().copy()
        before, steps, tried, t = math.inf, 0, 0, 1.0
        predictions, weighted = np.empty(X.shape[1]), np.empty_like(X)
        try:
            while True:
                z = torch.from_numpy(np.dot(w, X, out=predictions))
                gradient = scale * X.dot(self.train.slopes(z)) + penalty * w
                residual, tried = math.sqrt(gradient.dot(gradient)), tried + 1
                if not residual <= (1.0 - LOWER * t) * before:  # NaN included
                    t /= 2
                    if t < SHORTEST:
                        return None
                    w = base - t * step
                    continue
                H = np.multiply(X, scale * self.train.curvatures(z), out=weighted).dot(X.T)
                H.reshape(-1)[:: len(H) + 1] += penalty
                if residual <= self._goal(H, w, first, residual, tol):
                    np.linalg.cholesky(H)  # whether it is positive definite
                    return self._judged(problem, w, penalty, gradient, H, steps, tried)
                if steps == most or residual == math.inf:
                    return None
                base, step = w, np.linalg.solve(H, gradient)
                w, before, steps, t = base - step, residual, steps + 1, 1.0
        except np.linalg.LinAlgError:
            return None

    def _goal(self, H: Array, w: Array, first: Array, residual: float, tol: float) -> float:
        """Return the norm of the gradient at which the run ends; see `bilevel.engine.tolerance`."""
        if not isinstance(tol, Relative):
            return tol
        parts = H.dot(max((w, w - first, w - self.origin), key=lambda way: way.dot(way)))
        return tol * (math.sqrt(parts.dot(parts)) or residual)

    def _judged(
        self, problem: Any, w: Array, penalty: Array, gradient: Array, H: Array, steps: int, tried: int
    ) -> Exact | None:
        rows, z = problem.val.rows, torch.from_numpy(w.dot(self.val.X))
        loss = self.val.value(z) / rows
        f = self.val.X.dot(self.val.slopes(z)) / rows
        a = np.linalg.solve(H, f)
        rest, size, value_error = f - H.dot(a), math.sqrt(f.dot(f)), float(a.dot(gradient))
        adjoint_residual = math.sqrt(rest.dot(rest)) / size if size > 0 else 0.0
        by_weight = -a * w * penalty if problem.parametrization == "log" else -a * w
        sure = abs(value_error) <= FAR * abs(loss) and adjoint_residual <= ROUGH
        if not sure or not math.isfinite(loss + by_weight.dot(by_weight)):
            return None
        params, adjoint, total = map(torch.from_numpy, (w, a, by_weight))
        counts = {"gradient": tried, "curvature": steps + 1, "cross": 1}
        residual = math.sqrt(gradient.dot(gradient))
        result = (params, adjoint, loss, problem.gather(total), residual, adjoint_residual, counts)
        return Exact(*result, steps, 1, value_error, "dense Newton")
