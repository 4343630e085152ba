"""Central differences of the inner solver's result: the referee that knows no derivative at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bilevel.base import Pullback, Solution
from bilevel.core import tree
from bilevel.core.options import is_positive, option, optional
from bilevel.core.status import Verdict
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import run_inner


@dataclass(frozen=True)
class FiniteDifference(HypergradEstimator):
    """``dx/du_j ~ (x(u + e_j s_j) - x(u - e_j s_j)) / (2 s_j)``, with two more inner solves for each hyperparameter.

    Every solve starts at the same point, so it differentiates the map that the inner solver computes, stopped where it
    stops. Its error is ``O(s^2)`` and rounding / s: about 1e-10 relative in float64 at best.

    Args:
        step: s_j is this times ``max(1, |u_j|)``; default ``eps ** (1/3)`` (6e-6 in float64).

    >>> FiniteDifference(step=1e-4).step
    0.0001
    """

    second_derivatives: ClassVar[bool] = False

    step: float | None = option(None, "a positive number or None", optional(is_positive))

    @property
    def differentiates_steps(self) -> bool:
        return True

    def solve(self, run: Run) -> Solution:
        """Run the inner solver at the hyperparameters; the perturbed runs follow in the pullback."""
        hparams, solver = run.hparams, run.solver
        middle = run.solve()

        def at(u: Tree) -> InnerRun:
            there = replace(run, hparams=u)
            # What the solver measures (an automatic step size) is a constant of the map, for every estimator alike.
            return run_inner(there.inner(), solver, replace(there.begin(), measured=middle.state.measured))

        step = self.step or torch.finfo(tree.leaves(hparams)[0].dtype).eps ** (1 / 3)

        def pullback(cotangent: Tree) -> Pullback:
            verdict: Verdict = middle.verdict
            products, raveler = [], tree.Raveler(hparams)
            for direction in raveler.units():
                size = step * max(1.0, abs(float(tree.dot(direction, hparams))))
                ends = [at(tree.add(hparams, direction, sign * size)) for sign in (1.0, -1.0)]
                up, down = (solver.params(end.state) for end in ends)
                products.append(tree.dot(tree.add(up, down, -1.0), cotangent) / (2 * size))
                verdict = verdict.worse(ends[0].verdict).worse(ends[1].verdict)
            return Pullback(raveler.unravel(torch.stack(products)), steps=2 * len(products), verdict=verdict)

        return middle.solution(solver.params(middle.state), pullback)
