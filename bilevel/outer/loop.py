"""`OuterOptimizer`: descend hypergradients by a search or any torch optimizer, with warm starts and a resumable state.

One problem is a run with one history; rows have one each, move together, and end by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from bilevel.base import Carry, InnerSolver, verdict_of
from bilevel.core import rows, tree
from bilevel.core.rows import check_rows
from bilevel.core.status import GOOD, OnFailure, Status, Verdict, check_on_failure, report
from bilevel.core.tree import Tree
from bilevel.engine.checks import check_roles
from bilevel.engine.estimator import HypergradEstimator
from bilevel.hypergrad.auto import as_estimator
from bilevel.hypergrad.hypergradient import hypergradient
from bilevel.hypergrad.side_by_side import as_batch
from bilevel.hypergrad.target_error import check_target
from bilevel.oracles.batching import Rows
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.checks import check_callbacks, check_makers, check_start, check_steps, check_switches
from bilevel.outer.moves import MakeOptimizer, MakeScheduler, Mover, where
from bilevel.outer.records import OuterResult, Record, described, record_of, shown_record, shown_rows
from bilevel.outer.schedule import ToleranceSchedule, as_schedule
from bilevel.outer.search import OuterSearch
from bilevel.outer.searches import certify_ends, searches_of, take
from bilevel.outer.state import WarmStart, load, saved
from bilevel.outer.stopping import StoppingRules, columns, failure, lower, no_descent, with_remark

Callback: TypeAlias = "Callable[[OuterOptimizer, Any], bool | None]"


class OuterOptimizer:
    """The outer loop: hypergradient, optimizer step, warm start.

    Each `step` takes the hypergradient at the present hyperparameters and moves them. With constraints, a torch
    optimizer moves free variables z and ``hparams = transform(z)``; the hypergradient is pulled back by the chain rule.
    The outer loops of rows run as one, on stacked hyperparameters; optimizers that take norms over a tensor are
    refused for them. A row whose hypergradient failed does not move in that step, and one that has ended moves no more.

    Args:
        problem: the problem.
        solver: the inner solver.
        estimator: the hypergradient estimator; "auto" for `Auto()`.
        hparams: where to start; must satisfy the constraints.
        optimizer: how the hyperparameters move. "auto" (the default) takes a search, `HyperNewton` or `HyperLBFGS`,
            which chooses its steps by values and slopes, ends by itself and takes one evaluation a step; where losses
            do not compare (mini-batches, new data, warm-started unrolls), or where a scheduler is given,
            ``Adam(lr=0.1)``; `choice` says which and why. Else one of these searches, or a function that makes a torch
            optimizer from the list of free tensors; None for that Adam.
        scheduler: makes a torch scheduler from the optimizer; stepped once an outer step.
        constraints: a ``torch.distributions.constraints`` object for all hyperparameters, or a dict of them by key for
            dict hyperparameters (missing keys are free): positive, interval(a, b), simplex, ...
        warm_start: True, False, or a `WarmStart`; always off where `Structure.resampled`.
        params: where the inner solver starts; default: the problem's start.
        certify: estimate the error of every hypergradient; costs a refinement round each.
        target_error: the largest relative error of every hypergradient, see `hypergradient`; of a search, that of
            the hypergradient at its end, the last record. A step of a torch optimizer that misses it is taken only
            while its certificate still proves descent, ``|p - dF/du| < |p|``; otherwise `run` ends there.
        schedule: deprecated, as a search chooses its own accuracies: the relative errors that the steps of a torch
            optimizer may have, by name or as a `ToleranceSchedule`; it ends at `target_error`.
        on_failure: "raise" (default), "warn" or "return"; after a failed hypergradient the hyperparameters do not move.
        callbacks: called as ``callback(outer, estimate)`` after each step; a True return stops `run`.
        batch: number of rows that are tuned side by side: every leaf of `hparams` then has a row for each, constraints
            hold for each, `history` has a list for each. A problem that is a batch needs none.
        rows: how they run, see `hypergradient`: with "loop" one after the other.

    >>> from bilevel import Implicit, QuadraticProblem, QuasiNewton
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> outer = OuterOptimizer(problem, QuasiNewton(), Implicit(), torch.zeros(2, dtype=torch.float64))
    >>> [record.step for record in outer.run(5, progress=False).history]
    [1, 2, 3, 4, 5]
    >>> starts = torch.zeros(4, 2, dtype=torch.float64)
    >>> many = OuterOptimizer(problem, QuasiNewton(), Implicit(), starts, batch=4).run(3, progress=False)
    >>> len(many), many.best_loss.shape
    (4, torch.Size([4]))
    """

    def __init__(
        self,
        problem: BilevelProblem,
        solver: InnerSolver,
        estimator: HypergradEstimator | str,
        hparams: Tree,
        optimizer: MakeOptimizer | OuterSearch[Any] | str | None = "auto",
        *,
        scheduler: MakeScheduler | None = None,
        constraints: Any = None,
        warm_start: bool | WarmStart = True,
        params: Tree = None,
        certify: bool = False,
        target_error: float | None = None,
        schedule: str | ToleranceSchedule | None = None,
        on_failure: OnFailure = "raise",
        callbacks: Sequence[Callback] = (),
        batch: int | None = None,
        rows: Rows = "auto",
    ) -> None:
        if batch is not None or rows != "auto":
            problem = as_batch(problem, batch, rows)
        check_on_failure(on_failure)
        check_switches(certify, warm_start)
        rule: HypergradEstimator = as_estimator(estimator)
        check_roles(problem, solver, rule)
        check_start(hparams)
        self.size: int | None = problem.batch
        if self.size is not None:
            check_rows("hparams", hparams, self.size)
        check_makers(optimizer, scheduler)
        self.target_error, self.schedule = target_error, as_schedule(schedule, target_error)
        first = target_error if self.schedule is None else self.schedule.at(1)
        if first is not None:
            check_target(first, problem, solver, rule, certify)
        problem.recurring = True
        self.problem, self.solver, self.estimator = problem, solver, rule
        self.warm_start = warm_start if isinstance(warm_start, WarmStart) else WarmStart(warm_start, warm_start)
        if problem.structure.resampled:
            self.warm_start = WarmStart(state=False, adjoint=False)
        self.certify, self.on_failure, self.callbacks = certify, on_failure, check_callbacks(callbacks)
        self.params = params
        options = {"params": params, "constraints": constraints, "scheduler": scheduler, "schedule": schedule}
        self.search, self.choice = searches_of(optimizer, problem, solver, rule, hparams, self.warm_start, **options)
        made = None if isinstance(optimizer, str) else optimizer
        self.mover: Any = self.search or Mover(hparams, made, scheduler, constraints, self.size)
        self.optimizer, self.scheduler = self.mover.optimizer, self.mover.scheduler
        # The first step starts exactly where the user said, not where the transform's rounding puts it.
        self.current = tree.tree_map(torch.clone, tree.detach(hparams))
        if self.search is not None:
            self.current = self.search.propose()
        self.carry = Carry()
        self.histories: list[list[Record]] = [[] for _ in range(self.size or 1)]
        (like, *_) = tree.leaves(self.current)
        nothing: Any = math.inf if self.size is None else like.new_full((self.size,), math.inf)
        self.best: tuple[Any, ...] = (nothing, self.current)
        self._going, self.sure = ([word] * len(self.histories) for word in (True, False))
        self._checked = False

    __repr__ = described

    @property
    def hparams(self) -> Tree:
        """The present hyperparameters, detached; of a search the best it has accepted."""
        return tree.tree_map(torch.clone, self.current if self.search is None else self.search.accepted(self.current))

    @property
    def history(self) -> list[Any]:
        """One `Record` for each step so far; of rows a list of them for each."""
        return self.histories[0] if self.size is None else self.histories

    @property
    def gradient_equivalents(self) -> float:
        """The cost of all steps so far, of all rows together."""
        return sum(record.gradient_equivalents for history in self.histories for record in history)

    @property
    def steps_taken(self) -> int:
        """Outer steps so far, those before a resume included; of rows those of the ones that are still going."""
        return max(map(len, self.histories))

    def step(self) -> Any:
        """Take the hypergradient at the present hyperparameters, then move them.

        Returns:
            The `Estimate` at the hyperparameters before the move; of rows the `BatchEstimate`.

        Raises:
            HypergradientError: with ``on_failure="raise"`` for an unusable hypergradient, and for an optimizer step
                that would make the hyperparameters NaN or infinite; nothing has moved then.
        """
        estimate = self._estimate()
        if self.search is not None:
            return take(self, estimate)
        report(self._verdict(estimate), self.on_failure, estimate)
        self._checked = True
        records = {
            index: record_of(len(history) + 1, estimate if self.size is None else estimate[index])
            for index, history in enumerate(self.histories)
            if self._going[index]
        }
        usable = {index: record for index, record in records.items() if Status[record.status].usable}
        self._keep_best(estimate.outer_loss, usable)
        descent = [i for i, r in usable.items() if not no_descent(r.status, r.error, r.hypergradient_norm)]
        judged: list[Verdict] = []
        if descent:
            self.current, judged = self.mover.move(
                self.current, estimate, descent, self.steps_taken + 1, self.on_failure == "raise"
            )
        if lost := [index for index, verdict in enumerate(judged) if not verdict.status.usable]:
            records |= {index: replace(records[index], status=judged[index].status.name) for index in lost}
            if self.size is None:
                estimate = replace(estimate, verdict=judged[0])
            else:
                pairs = zip(estimate.verdicts, judged, strict=True)
                estimate = replace(estimate, verdicts=[verdict.worse(other) for verdict, other in pairs])
            report(judged[0] if self.size is None else verdict_of(judged), self.on_failure, estimate)
        if usable:
            self.carry = self.warm_start.part_of(estimate.carry)
        for index, record in records.items():
            self.histories[index].append(record)
        return estimate

    def hold(self, index: int) -> None:
        """Let a row stand still from now on, until `run` is called."""
        self._going[index] = False

    def _verdict(self, estimate: Any) -> Verdict:
        """Return the verdict about the rows that have not ended."""
        if self.size is None:
            verdict: Verdict = estimate.verdict
            return verdict
        pairs = zip(estimate.verdicts, self._going, strict=True)
        return verdict_of([verdict if going else GOOD for verdict, going in pairs])

    def _keep_best(self, losses: Any, usable: Mapping[int, Record]) -> None:
        """Keep the hyperparameters with the smallest loss, or the last where losses do not compare."""
        best = [self.best[0]] if self.size is None else self.best[0].tolist()
        better = list(usable) if self.problem.structure.resampled else lower(usable, best, self.sure)
        if better:
            pairs = zip((losses, self.current), self.best, strict=True)
            self.best = tuple(where(better, self.size, new, old) for new, old in pairs)

    def _estimate(self) -> Any:
        """Return the hypergradient at the present hyperparameters, of rows all of them."""
        target = self.target_error if self.schedule is None else self.schedule.at(self.steps_taken + 1)
        solver, estimator, carry, self.evaluated = self.solver, self.estimator, self.carry, self.current
        if self.search is not None:
            target, (solver, estimator, carry) = None, self.search.asked(solver, estimator, carry)
        return hypergradient(
            self.problem.on_outer_step(self.steps_taken),
            solver,
            estimator,
            self.current,
            self.params,
            carry=carry,
            certify=self.certify,
            target_error=target,
            check=not self._checked,
            on_failure="return",
        )

    def run(
        self,
        steps: int,
        *,
        budget: float | None = None,
        tol: float | None = None,
        patience: int | None = None,
        min_progress: float = 0.0,
        progress: bool = True,
    ) -> OuterResult:
        """Take up to `steps` more steps; the rules hold for each row by itself.

        On a CPU, many short steps are quicker inside ``with bilevel.threads.short_operations():``, as the commands do.

        Args:
            steps: most steps.
            budget: stop once the cost of the whole history, in gradient-equivalents, has reached this.
            tol: stop once the norm of the hypergradient is at most this.
            patience: stop after this many steps without a lower outer loss.
            min_progress: by how much the outer loss has to fall to count as progress.
            progress: show a progress line; of rows, with the mean and the worst.

        Returns:
            The result; a second call continues.
        """
        check_steps(steps)
        rules = StoppingRules(budget, tol, patience, min_progress)
        reasons = [""] if self.size is None and self.search is None else self._ends(rules)
        asked, estimate = False, None
        try:
            with tqdm(total=steps, disable=not progress, unit="step") as line:
                for _ in range(steps):
                    if asked or all(reasons):
                        break
                    estimate = self.step()
                    if progress:
                        line.set_postfix_str(self._postfix(), refresh=False)
                        line.update()
                    # A list, so that every callback is called.
                    answers = [callback(self, estimate) for callback in self.callbacks]
                    asked = any(answer is True for answer in answers)
                    reasons = self._ends(rules, estimate)
            certify_ends(self)
        finally:
            self._going = [True] * len(self.histories)
        reasons = [reason or ("a callback asked to stop" if asked else "") for reason in reasons]
        ends = [self._end(rules, reason, steps, estimate, index) for index, reason in enumerate(reasons)]
        history = tuple(tuple(records) for records in self.histories)
        ended: Any = (history[0], ends[0]) if self.size is None else (history, tuple(ends))
        return OuterResult(self.hparams, tree.copied(self.best[1]), self.best[0], *ended)

    def _ends(self, rules: StoppingRules, estimate: Any = None) -> list[str]:
        """Return why each row has ended, empty for those that go on, which alone move from now on."""
        verdict = None if estimate is None or self.size is not None else estimate.verdict
        if self.search is not None:
            pairs = zip(self.search.each, self.histories, strict=True)
            reasons = [each.stopped or rules.reason(history) for each, history in pairs]
        else:
            reasons = [failure(history, verdict) or rules.reason(history) for history in self.histories]
        self._going = [not reason for reason in reasons]
        return reasons

    def _end(self, rules: StoppingRules, reason: str, steps: int, estimate: Any, index: int) -> str:
        """Return why a row ended, without a reason by its steps, with what is odd about its outer loss."""
        history = self.histories[index]
        if self.search is not None and not self.search.each[index].state.stopped:
            reason = f"{reason or f'took {steps} steps'}, not converged: {self.search.each[index].foreseen()}"
        end = reason or rules.end(f"took {steps} steps", *columns(history), not self.problem.structure.resampled)
        if estimate is None or failure(history):
            return end
        statuses = [] if self.search is not None else [record.status for record in history]
        if self.size is None:
            return with_remark(end, self.problem, estimate.params, self.current, statuses)
        params, hparams = rows.row(estimate.params, index), rows.row(self.current, index)
        return with_remark(end, self.problem.member(index), params, hparams, statuses)

    def _postfix(self) -> str:
        """Return what the progress line shows."""
        last = [records[-1] for records in self.histories if records]
        return shown_record(last[0]) if self.size is None else shown_rows(last, sum(self._going), self.size)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, in plain containers and tensors: ``torch.load(weights_only=True)`` reads it.

        A run that loads it continues to the same numbers bit for bit (same machine, same numbers of threads and
        workers). It holds the generators of all CUDA devices where CUDA was used; a machine without them loads it too.
        """
        return saved(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned for the same problem, solver and estimator; it is not changed.

        Raises:
            ValueError: for something else, another format, problem, inner solver, estimator, optimizer or scheduler;
                nothing is loaded then.
        """
        load(self, state)


BatchOuterOptimizer = OuterOptimizer
"""The name of the loop of rows, for code that was written when it had a class of its own."""
