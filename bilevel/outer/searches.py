"""`Searches`: the outer searches of a run, one for each row, in place of a torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bilevel.base import Carry, Estimate, InnerSolver
from bilevel.core import rows, tree
from bilevel.core.options import first_line
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.hyper_lbfgs import HyperLBFGS
from bilevel.outer.hyper_newton import HyperNewton
from bilevel.outer.search import OuterSearch
from bilevel.outer.searcher import MATRIX, Searcher, check_search
from bilevel.outer.warm_start import WarmStart


def auto_search(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    warm_start: WarmStart,
    *,
    constraints: Any = None,
    scheduler: Any = None,
    schedule: Any = None,
    tol: float = 1e-6,
) -> tuple[OuterSearch[Any] | None, str]:
    """Return the search that fits a run, with the reason; None for Adam, where outer losses do not compare.

    Args:
        problem: the problem.
        solver: the inner solver.
        estimator: the hypergradient estimator.
        hparams: where to start.
        warm_start: what one step hands to the next.
        constraints: see `OuterOptimizer`.
        scheduler: a scheduler belongs to a torch optimizer.
        schedule: a schedule of tolerances does, too.
        tol: relative decrease of the outer loss that may be left.
    """
    count = tree.size(hparams) // (problem.batch or 1)
    size = tree.size(problem.start(None)) // (problem.batch or 1)
    reason = f"{size} inner variables and {count} hyperparameters have dense second derivatives"
    for search in (HyperNewton(tol), HyperLBFGS(tol)):
        if isinstance(search, HyperNewton) and count > MATRIX:
            reason = f"{count} hyperparameters are more than the {MATRIX} of which second derivatives are held"
            continue
        if isinstance(search, HyperNewton) and problem.wrong_third is not None:
            reason = f"{problem.wrong_third} has no right third derivatives"
            continue
        try:
            check_search(search, problem, solver, estimator, hparams, scheduler, warm_start, schedule)
            Searches(search, problem, hparams, constraints, problem.batch)
        except ValueError as error:
            reason = first_line(error).rstrip(".")
            continue
        return search, reason
    return None, reason


class Searches:
    """The searches of one problem, or of the rows of a batch, each with its own phase and end.

    Args:
        search: the search.
        problem: the problem.
        hparams: where to start; of rows with a leading dimension.
        constraints: None, or bounds, see `Searcher`.
        size: number of rows, None for one problem.
    """

    scheduler = None

    def __init__(
        self, search: OuterSearch[Any], problem: BilevelProblem, hparams: Tree, constraints: Any, size: int | None
    ) -> None:
        self.optimizer, self.size = search, size
        if size is None:
            self.each = [Searcher(search, problem, hparams, constraints)]
        else:
            starts = [rows.row(hparams, index) for index in range(size)]
            self.each = [Searcher(search, problem.member(i), start, constraints) for i, start in enumerate(starts)]

    def _together(self, trees: Sequence[Tree]) -> Tree:
        return trees[0] if self.size is None else rows.stack(trees)

    def propose(self) -> Tree:
        """Return where the next hypergradients are wanted; of a search that has ended, its accepted point."""
        return self._together([each.propose() for each in self.each])

    def accepted(self, otherwise: Tree) -> Tree:
        """Return the accepted hyperparameters; where there are none yet, the others."""
        points = []
        for index, each in enumerate(self.each):
            point = each.accepted()
            points.append((otherwise if self.size is None else rows.row(otherwise, index)) if point is None else point)
        return self._together(points)

    def solver(self, solver: InnerSolver) -> InnerSolver:
        """Return the inner solver with the smallest tolerance that a value is to be known by."""
        asked = [each.tol for each in self.each if each.tol is not None]
        return replace(solver, tol=min(asked)) if asked else solver

    def carry(self, carry: Carry) -> Carry:
        """Return the warm start of what comes: the same run goes on where a value is to be known better."""
        trial = self.each[0].state.trial
        ongoing = self.size is None and trial is not None and trial.kind == "again"
        return replace(carry, ongoing=True) if ongoing else carry

    def tell(self, estimate: Any, going: Sequence[bool]) -> list[dict[str, Any] | None]:
        """Hand an evaluation to the searches that go on.

        Returns:
            For each what its record says besides: phase, accepted and predicted; None for a search that has ended.
        """
        estimates: list[Estimate] = [estimate] if self.size is None else [estimate[i] for i in range(self.size)]
        told: list[dict[str, Any] | None] = []
        for each, one, goes in zip(self.each, estimates, going, strict=True):
            if not goes or each.stopped:
                told.append(None)
                continue
            phase, predicted = each.trial()
            told.append({"phase": phase, "predicted": predicted, "accepted": each.tell(one)})
        return told

    def clipped(self, hparams: Tree) -> Tree:
        """Return hyperparameters of one problem within the limits."""
        return self.each[0].clipped(hparams)

    def saved(self) -> dict[str, Any]:
        """Return the states in plain containers and tensors."""
        return {
            "free": tree.leaves(self._together([each.start for each in self.each])),
            "optimizer": {"searches": [each.saved() for each in self.each]},
            "scheduler": None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `saved` returned."""
        for each, saved in zip(self.each, state["optimizer"]["searches"], strict=True):
            each.restore(saved)
