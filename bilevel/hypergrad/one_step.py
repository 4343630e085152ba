"""One-step differentiation: the derivative of the last inner step, at an iterate taken for a constant.

With one inner step ``x_K = A(x_{K-1}, u)``,

    u' = (dA/du)(x_{K-1}, u)' w          in place of          (dA/du)' (I - (dA/dx)')^{-1} w

(Bolte, Pauwels & Vaiter 2023). It is a truncated unroll with a tail of one step.
"""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.base import Solution
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.hypergrad.unroll import TruncatedUnroll

LAST = TruncatedUnroll(tail=1)


@dataclass(frozen=True)
class OneStep(HypergradEstimator):
    """Differentiate the last inner step alone: `TruncatedUnroll` with ``tail=1``, under its own name.

    It costs one VJP of a step and keeps one state. Where a step contracts by rho (the norm of dA/dx at the solution),
    the Jacobian of the solution map is wrong by ``rho / (1 - rho)`` times that of the step, and more steps do not help:
    for gradient descent with ``h = 1/L`` it is ``-h C`` in place of ``-H^-1 C``, too short by up to the condition
    number (with h = 1 this is the T1-T2 method of Luketina et al. 2016). For a superlinear solver rho is zero at the
    solution: with `Newton` it is exact there, up to the distance of the last two iterates. Do not use it with slow
    solvers where the length of the hypergradient matters, such as for a comparison of its components.

    >>> import torch
    >>> from bilevel import Newton, QuadraticProblem, hypergradient
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> u = torch.zeros(2, dtype=torch.float64)
    >>> estimate = hypergradient(problem, Newton(), OneStep(), u)
    >>> torch.allclose(estimate.hypergradient, problem.exact_hypergradient(u))
    True
    """

    requires = frozenset({"differentiable_steps"})
    rowwise = True
    taskwise = True

    @property
    def differentiates_steps(self) -> bool:
        return True

    def solve(self, run: Run) -> Solution:
        return LAST.solve(run)
