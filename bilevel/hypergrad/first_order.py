"""First order: the direct term of the hypergradient alone, as first-order MAML takes it.

    dF/du = d outer/du + (d params*/du)' d outer/d params   is replaced by   d outer/du

The inner solution is taken for a constant, so no derivative of the inner problem is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.base import InnerSolver, Pullback, Solution
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.oracles.problem import BilevelProblem

DROPPED = "the indirect term, through the inner solution, is dropped: ask with certify=True what that costs"


@dataclass(frozen=True)
class FirstOrder(HypergradEstimator):
    """Take the inner solution for a constant: the hypergradient is the outer loss's own derivative by `hparams`.

    The error is the whole indirect term ``(d params*/du)' d outer/d params``, whatever the inner solver does; it does
    not fall with more inner steps. It is small where the inner solution hardly moves with the hyperparameters beyond
    what the outer loss sees directly: with a shared initialisation u and the losses written in ``u + params``, the
    direct term is first-order MAML (Finn, Abbeel & Levine 2017, section 5.2). Do not use it for weight decays, example
    weights and whatever else acts through the inner solution: it refuses them, since their direct term is zero.

    >>> from bilevel import BilevelProblem, GradientDescent, hypergradient
    >>> problem = BilevelProblem(  # few-step adaptation of a shared start u, to the task 3
    ...     inner_loss=lambda change, u: (u + change - 3.0) ** 2,
    ...     outer_loss=lambda change, u: (u + change - 3.0) ** 2,
    ...     params=torch.tensor(0.0),
    ... )
    >>> solver = GradientDescent(step_size=0.25, steps=1)
    >>> hypergradient(problem, solver, FirstOrder(), torch.tensor(1.0)).hypergradient  # 2 (u + change - 3)
    tensor(-2.)
    """

    requires = frozenset[str]()
    measures_memory = False
    second_derivatives = False
    rowwise = True
    taskwise = True

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Refuse hyperparameters on which the outer loss does not depend directly; ValueError names the first one."""
        if problem.params is None:
            return
        params, attached = tree.attach(problem.start()), tree.attach(hparams)
        with torch.enable_grad():
            value = problem.outer_loss(params, attached).sum()
        leaves = tree.leaves(attached)
        parts = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        for name, part in zip(tree.names(hparams), parts, strict=True):
            if part is None:
                raise ValueError(
                    f"`outer_loss` does not depend on `hparams{name}` directly, and FirstOrder drops the indirect "
                    "term: its hypergradient would be a silent zero. Use OneStep(), TruncatedUnroll or Implicit."
                )

    def solve(self, run: Run) -> Solution:
        end = run.solve()

        def pullback(cotangent: Tree) -> Pullback:
            return Pullback(tree.zeros_like(run.hparams), error_note=DROPPED)

        return end.solution(run.solver.params(end.state), pullback)
