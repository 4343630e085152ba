"""`Searches`: the outer searches of a run, one for each row, in place of a torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bilevel.base import Carry, Estimate, InnerSolver
from bilevel.core import rows, tree
from bilevel.core.options import describe, first_line
from bilevel.core.status import report
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator
from bilevel.engine.one_by_one import joined
from bilevel.hypergrad.hypergradient import hypergradient
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.accuracy import chooses_accuracy
from bilevel.outer.checks import check_search
from bilevel.outer.hyper_lbfgs import HyperLBFGS
from bilevel.outer.hyper_newton import HyperNewton
from bilevel.outer.moves import where
from bilevel.outer.records import record_of
from bilevel.outer.search import OuterSearch
from bilevel.outer.searcher import MATRIX, OutsideLimits, Searcher
from bilevel.outer.state import WarmStart


def auto_search(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    warm_start: WarmStart,
    *,
    params: Tree = None,
    constraints: Any = None,
    scheduler: Any = None,
    tol: float = 1e-6,
    outside: bool = True,
) -> tuple[OuterSearch[Any] | None, str]:
    """Return the search that fits a run, with the reason; None for Adam, where outer losses do not compare.

    The options are those of `OuterOptimizer`. Hyperparameters that start outside the limits of a search are left to
    Adam or, where `outside` is false, refused.

    Raises:
        ValueError: for such a start that is refused.
    """
    count = tree.size(hparams) // (problem.batch or 1)
    size = tree.size(problem.start(params)) // (problem.batch or 1)
    if solver.steps is not None and not estimator.differentiates_steps:
        return (
            None,
            f"{describe(solver)} may end before it converges, and outer losses are known only as well as it does",
        )
    reason = f"{size} inner variables and {count} hyperparameters have dense second derivatives"
    for search in (HyperNewton(tol), HyperLBFGS(tol)):
        if isinstance(search, HyperNewton) and count > MATRIX:
            reason = f"{count} hyperparameters are more than the {MATRIX} of which second derivatives are held"
            continue
        if isinstance(search, HyperNewton) and problem.wrong_third is not None:
            reason = f"{problem.wrong_third} has no right third derivatives"
            continue
        try:
            check_search(search, problem, solver, estimator, size, scheduler, warm_start)
            Searches(search, problem, hparams, constraints, params)
        except ValueError as error:
            if isinstance(error, OutsideLimits) and not outside:
                raise
            reason = first_line(error).rstrip(".")
            continue
        return search, reason
    return None, reason


def searches_of(
    optimizer: Any,
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    warm_start: WarmStart,
    schedule: Any,
    **options: Any,
) -> tuple[Searches | None, str]:
    """Return the searches of a run, None where a torch optimizer moves it, and what "auto" says of its choice.

    The options are params, constraints and scheduler, see `auto_search`.
    """
    choice, params = "", options["params"]
    if isinstance(optimizer, str):
        optimizer, reason = auto_search(problem, solver, estimator, hparams, warm_start, **options)
        schedule = None  # the search that was found chooses its own accuracies
        choice = f"auto chose {'Adam' if optimizer is None else describe(optimizer)}: {reason}"
    if not isinstance(optimizer, OuterSearch):
        return None, choice
    size = tree.size(problem.start(params)) // (problem.batch or 1)
    check_search(optimizer, problem, solver, estimator, size, options["scheduler"], warm_start, schedule)
    chooses = chooses_accuracy(problem, solver, estimator)
    return Searches(optimizer, problem, hparams, options["constraints"], params, chooses), choice


class Searches:
    """The searches of one problem, or of the rows of a batch, each with its own phase and end; see `Searcher`."""

    scheduler = None

    def __init__(
        self,
        search: OuterSearch[Any],
        problem: BilevelProblem,
        hparams: Tree,
        constraints: Any,
        params: Tree,
        chooses: bool = False,
    ) -> None:
        self.optimizer, self.size, begun = search, problem.batch, problem.start(params)
        members = [(problem, hparams, begun)]
        if self.size is not None:
            members = [(problem.member(i), rows.row(hparams, i), rows.row(begun, i)) for i in range(self.size)]
        self.each = [Searcher(search, *member, constraints, chooses) for member in members]

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

    def asked(
        self, solver: InnerSolver, estimator: HypergradEstimator, carry: Carry
    ) -> tuple[InnerSolver, HypergradEstimator, Carry]:
        """Return inner solver, estimator and warm start of the evaluation to come, as exact as it is to be.

        Of rows, the inner tolerance is the smallest that one asks for. The same run goes on where a value is to be
        known better.
        """
        alone = self.each[0]
        if alone.accuracy is not None:
            solver, estimator = alone.accuracy.asked(solver, estimator, alone.state)
            carry = alone.accuracy.pending or carry
        elif tolerances := [each.tol for each in self.each if each.tol is not None]:
            solver = replace(solver, tol=min(tolerances))
        trial = alone.state.trial
        again = self.size is None and trial is not None and trial.kind == "again"
        return solver, estimator, replace(carry, ongoing=True) if again else carry

    def tell(self, estimate: Any, going: Sequence[bool]) -> list[dict[str, Any] | None]:
        """Hand an evaluation to the searches that go on, and return what the record of each says besides, else None."""
        estimates: list[Estimate] = [estimate] if self.size is None else [estimate[i] for i in range(self.size)]
        told: list[dict[str, Any] | None] = []
        for each, one, goes in zip(self.each, estimates, going, strict=True):
            if not goes or each.state.stopped:
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


def take(outer: Any, estimate: Any) -> Any:
    """Hand an evaluation to the searches of an outer loop; a failure is reported where nothing succeeded before."""
    alone, search, size = outer.search.each[0], outer.search, outer.size
    told = search.tell(estimate, outer._going)
    if size is None and not estimate.status.usable and alone.stopped and alone.accepted() is None:
        report(estimate.verdict, outer.on_failure, estimate)
    outer._checked = True
    for index, says in enumerate(told):
        if says is not None:
            history = outer.histories[index]
            history.append(record_of(len(history) + 1, estimate if size is None else estimate[index], **says))
    taken = [says is not None and says["accepted"] for says in told]
    chosen = [index for index, each in enumerate(taken) if each]
    pairs = zip((estimate.outer_loss, outer.current), outer.best, strict=True)
    outer.best = tuple(where(chosen, size, new, old) for new, old in pairs)
    outer.carry = _carried(outer, outer.warm_start.part_of(estimate.carry), taken)
    outer.current = search.propose()
    return estimate


def _carried(outer: Any, new: Carry, taken: Sequence[bool]) -> Carry:
    """Return the warm starts of the accepted points: the new ones where a point was taken."""
    old: Carry = outer.carry
    if outer.size is None or not any(taken) or old.state is None:
        return new if any(taken) else old
    parts = [(new if each else old).row(index) for index, each in enumerate(taken)]
    return joined(outer.problem, outer.solver, outer.current, outer.problem.start(outer.params), parts)


def certify_ends(outer: Any) -> None:
    """Take the hypergradients where all searches have ended once more, to the error that was asked for."""
    if outer.search is None or outer.target_error is None or not all(each.stopped for each in outer.search.each):
        return
    if any(history[-1].phase == "certified" for history in outer.histories):
        return
    options = {"carry": outer.carry, "target_error": outer.target_error, "on_failure": "return"}
    estimate: Any = hypergradient(outer.problem, outer.solver, outer.estimator, outer.hparams, outer.params, **options)
    for index, history in enumerate(outer.histories):
        one = estimate if outer.size is None else estimate[index]
        history.append(record_of(len(history) + 1, one, phase="certified"))
