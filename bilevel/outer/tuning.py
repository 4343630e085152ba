"""`tune`: descend the outer loss of a problem with all choices made, and say which and why."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.base import Estimate, InnerSolver, describe
from bilevel.core import tree
from bilevel.core.options import is_int, is_positive, require_value
from bilevel.core.threads import short_operations
from bilevel.core.tree import Tree
from bilevel.engine.checks import check_roles
from bilevel.engine.estimator import HypergradEstimator
from bilevel.hypergrad.auto import Auto, as_estimator
from bilevel.hypergrad.hypergradient import hypergradient
from bilevel.hypergrad.implicit import Implicit
from bilevel.inner import FISTA, QuasiNewton
from bilevel.linear import GMRES
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.checks import check_start, start_of
from bilevel.outer.loop import OuterOptimizer
from bilevel.outer.records import OuterResult, Record
from bilevel.outer.search import OuterSearch
from bilevel.outer.searches import auto_search
from bilevel.outer.state import WarmStart

MOST = 200
"""Evaluations of the outer loss, unless `tune` is told otherwise."""
JITTER = 1.5
"""Standard deviation of the changes by which further starts differ."""

WIDTH = 79
"""Of the lines of a result, so that they fit into a terminal."""


@dataclass(frozen=True)
class Tuned:
    """What `tune` has found.

    Attributes:
        hparams: the hyperparameters with the smallest outer loss.
        params: the inner solution at them.
        outer_loss: the outer loss there.
        stopped: how the search ended, in words.
        estimate: the hypergradient at them, with its evidence.
        history: one `Record` for each evaluation of the outer loss.
        choices: what was chosen and why, a line each.
        ends: the outer losses at which further starts ended, where there were some.
    """

    hparams: Tree
    params: Tree
    outer_loss: float
    stopped: str
    estimate: Estimate
    history: Sequence[Record]
    choices: tuple[str, ...]
    ends: tuple[float, ...] = ()

    def __str__(self) -> str:
        first = self.history[0].outer_loss
        seconds = sum(record.seconds for record in self.history)
        lines = [
            f"outer loss {self.outer_loss:.6g} after {len(self.history)} evaluations in {seconds:.2g} s, "
            f"{first:.6g} at the first",
            f"ended: {self.stopped}",
            f"evidence: {self.estimate}",
            *self.choices,
        ]
        if len(self.ends) > 1:
            spread = max(self.ends) / min(self.ends) - 1.0 if min(self.ends) > 0 else float("nan")
            lines.append(
                f"{len(self.ends)} starts ended at {min(self.ends):.6g} to {max(self.ends):.6g} ({spread:.1%})"
            )
        return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)

    def plot(self) -> Any:
        """Return a figure of the outer loss at every evaluation and the best so far; needs matplotlib."""
        from bilevel.core.figures import COLOURS, panels

        figure, ((axes,),) = panels(1, 1, (6.0, 3.5))
        steps = [record.step for record in self.history]
        losses = [record.outer_loss for record in self.history]
        axes.plot(steps, np.minimum.accumulate(losses), color=COLOURS[0], label="best so far")
        for colour, phase in zip(COLOURS[1:], dict.fromkeys(record.phase for record in self.history), strict=False):
            chosen = [(record.step, record.outer_loss) for record in self.history if record.phase == phase]
            axes.plot(*zip(*chosen, strict=True), "o", color=colour, label=phase or "step")
        axes.set(xlabel="evaluation", ylabel="outer loss")
        axes.legend(frameon=False)
        return figure


@short_operations()
def tune(
    problem: BilevelProblem,
    hparams: Tree = None,
    accuracy: float = 1e-3,
    *,
    solver: InnerSolver | None = None,
    estimator: HypergradEstimator | str | None = None,
    optimizer: Any = "auto",
    constraints: Any = None,
    steps: int = MOST,
    multi_start: int = 1,
    progress: bool = False,
) -> Tuned:
    """Minimise the outer loss by its hypergradients; what is not given is chosen, and the result says why.

    It runs in `threads.short_operations`, as the commands do.

    Args:
        problem: the problem.
        hparams: where to start; None for the problem's own ``initial_hparams()``.
        accuracy: relative decrease of the outer loss that may be left at the end.
        solver: the inner solver; None for `QuasiNewton`, and for `FISTA` where the problem has a nonsmooth term.
        estimator: the hypergradient estimator; None for one that gives the derivative of the inner solution.
        optimizer: "auto", an outer search, or what makes a torch optimizer, see `OuterOptimizer`.
        constraints: see `OuterOptimizer`.
        steps: most evaluations of the outer loss.
        multi_start: starts of the search; those after the first begin around the end of the first.
        progress: show a progress line.

    Returns:
        The best hyperparameters with the evidence about them; ``print`` shows it.

    Raises:
        ValueError: for options that do not fit, a problem that has no start, and a start outside the limits of the
            search.
        HypergradientError: where no evaluation of the outer loss succeeds.

    >>> from bilevel import QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> tuned = tune(problem, torch.zeros(2, dtype=torch.float64))
    >>> tuned.stopped.startswith("converged")
    True
    """
    require_value("problem", problem, "a BilevelProblem", isinstance(problem, BilevelProblem))
    require_value("accuracy", accuracy, "a positive number", is_positive(accuracy))
    require_value("multi_start", multi_start, "a positive int", is_int(multi_start))
    require_value("steps", steps, "a positive int", is_int(steps))
    used, first = chosen_solver(problem) if solver is None else (solver, "given")
    check_roles(problem, used, Implicit() if estimator is None else as_estimator(estimator))
    if problem.batch is not None:
        raise ValueError("`tune` takes one problem at a time, but this is a batch: use OuterOptimizer for its rows.")
    hparams = start_of(problem) if hparams is None else hparams
    check_start(hparams)
    rule, reason = chosen_estimator(problem, used, hparams) if estimator is None else (as_estimator(estimator), "given")
    search, why = optimizer, "given"
    if isinstance(optimizer, str) and optimizer == "auto":
        options: Any = {"constraints": constraints, "tol": accuracy, "outside": False}
        search, why = auto_search(problem, used, rule, hparams, WarmStart(), **options)
    runs: list[tuple[OuterOptimizer, OuterResult]] = []
    for number in range(multi_start):
        start = _jittered(runs[0][0], runs[0][1], number) if runs else hparams
        outer = OuterOptimizer(problem, used, rule, start, search, constraints=constraints)
        runs.append((outer, outer.run(steps, progress=progress)))
    outer, best = min(runs, key=lambda run: run[1].best_loss)
    tuned, carry = best.best_hparams, outer.carry
    estimate = hypergradient(problem, used, rule, tuned, carry=carry, certify=True, on_failure="return")
    choices = _choices(first, used, rule, reason, search, why)
    ends = tuple(result.best_loss for _, result in runs)
    return Tuned(tuned, estimate.params, min(ends), best.stopped, estimate, best.history, choices, ends)


def chosen_solver(problem: BilevelProblem) -> tuple[InnerSolver, str]:
    """Return an inner solver that takes the problem without a step size, and why."""
    if problem.nonsmooth is not None:
        term = type(problem.nonsmooth).__name__
        return FISTA(), f"it takes the nonsmooth term {term} by its proximal map, and needs no step size"
    return QuasiNewton(), "it measures curvature, and needs no step size"


def chosen_estimator(problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> tuple[HypergradEstimator, str]:
    """Return an estimator of the derivative of the inner solution, and why."""
    if problem.optimality is not None:
        return Implicit(GMRES()), "the Jacobian of an optimality map need not be symmetric"
    choice = Auto().choose(problem, solver, hparams, problem.start())
    if problem.structure.quadratic:
        return choice.estimator, choice.reason
    return Implicit(), "the derivative of the inner solution, with an adjoint vector"


def _choices(first: str, solver: InnerSolver, estimator: Any, second: str, search: Any, third: str) -> tuple[str, ...]:
    """Return what was chosen, with the reasons, a line each."""
    named = describe(search) if isinstance(search, OuterSearch) else "Adam" if search is None else "of torch"
    return (
        f"inner solver {describe(solver)}: {first}",
        f"estimator {describe(estimator)}: {second}",
        f"outer search {named}: {third}",
    )


def _jittered(outer: OuterOptimizer, result: OuterResult, seed: int) -> Tree:
    """Return hyperparameters around the end of a run, within the limits of its search."""
    generator, best = torch.Generator().manual_seed(seed), result.best_hparams
    leaves = [leaf + JITTER * torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in tree.leaves(best)]
    moved = tree.rebuild(best, leaves)
    return moved if outer.search is None else outer.search.clipped(moved)
