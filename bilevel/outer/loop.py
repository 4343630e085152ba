"""`OuterOptimizer`: descend hypergradients with any torch optimizer, warm starts, constraints and a resumable state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel.base import Carry, Estimate, HypergradEstimator, InnerSolver
from bilevel.core import tree
from bilevel.core.options import first_line, require, shown_value
from bilevel.core.status import GOOD, OnFailure, Status, Verdict, check_on_failure, report
from bilevel.core.tree import Tree
from bilevel.engine.checks import check_roles
from bilevel.hypergrad.auto import as_estimator
from bilevel.hypergrad.hypergradient import hypergradient
from bilevel.hypergrad.target_error import check_target
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.validation import check_tensors
from bilevel.outer.checks import check_callbacks, check_made, check_makers, check_scheduler, check_steps
from bilevel.outer.constraints import ConstraintTransform
from bilevel.outer.records import OuterResult, Record, StoppingRules, no_descent, record_of, shown_record, with_remark
from bilevel.outer.schedule import ToleranceSchedule, as_schedule
from bilevel.outer.state import FORMAT, check_state, generators, loaded, origin, restore_generators, restore_optimizer

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]
MakeScheduler: TypeAlias = Callable[[torch.optim.Optimizer], Any]
Callback: TypeAlias = "Callable[[OuterOptimizer, Estimate], bool | None]"


@dataclass(frozen=True)
class WarmStart:
    """Which parts one outer step hands to the next.

    Args:
        state: the inner state (iterate, momentum, moments).
        adjoint: the adjoint vector, the start of the linear solver.
    """

    state: bool = True
    adjoint: bool = True

    def __post_init__(self) -> None:
        for name in ("state", "adjoint"):
            require(self, name, "True or False", isinstance(getattr(self, name), bool))


class OuterOptimizer:
    """The outer loop: hypergradient, optimizer step, warm start.

    Each `step` takes the hypergradient at the present hyperparameters and moves them. With constraints, the torch
    optimizer moves free variables z and ``hparams = transform(z)``; the hypergradient is pulled back by the chain rule.

    Args:
        problem: the problem.
        solver: the inner solver.
        estimator: the hypergradient estimator; "auto" for `Auto()`.
        hparams: where to start; must satisfy the constraints.
        optimizer: makes a torch optimizer from the list of free tensors; default ``Adam(lr=0.1)``.
        scheduler: makes a torch scheduler from the optimizer; stepped once an outer step.
        constraints: a ``torch.distributions.constraints`` object for all hyperparameters, or a dict of them by key for
            dict hyperparameters (missing keys are free): positive, interval(a, b), simplex, ...
        warm_start: True, False, or a `WarmStart` that switches each part; always off where each outer step has an inner
            variable of its own (`BilevelProblem.renewed`).
        params: where the inner solver starts; default: the problem's start.
        certify: estimate the error of every hypergradient; costs a refinement round each.
        target_error: the largest relative error of every hypergradient, see `hypergradient`. A step that misses it is
            taken only while its certificate still proves descent, ``|p - dF/du| < |p|``; otherwise `run` ends there.
        schedule: "quadratic", "cubic", "exponential" or a `ToleranceSchedule`: rough hypergradients first, exact ones
            later; it ends at `target_error` where that is given too.
        on_failure: "raise" (default), "warn" or "return"; after a failed hypergradient the hyperparameters do not move.
        callbacks: called as ``callback(outer, estimate)`` after each step; a True return stops `run`.
        batch: number of members whose hyperparameters are tuned side by side, each with its own history and its own
            end: the object is then a `BatchOuterOptimizer`. A problem that is a batch already needs none. With
            ``rows="loop"`` they run one after the other, see `hypergradient`.

    >>> from bilevel import GradientDescent, Implicit, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> outer = OuterOptimizer(
    ...     problem, GradientDescent(), Implicit(), torch.zeros(2, dtype=torch.float64),
    ...     optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
    ... )
    >>> result = outer.run(5, progress=False)
    >>> [record.step for record in result.history]
    [1, 2, 3, 4, 5]
    """

    def __new__(
        cls, problem: BilevelProblem | None = None, *args: Any, batch: int | None = None, **options: Any
    ) -> OuterOptimizer:
        """Choose the class of the loop: one problem, or a batch."""
        many = batch is not None or "rows" in options or getattr(problem, "batch", None) is not None
        if cls is OuterOptimizer and many:
            from bilevel.outer.batch import BatchOuterOptimizer

            cls = BatchOuterOptimizer
        return super().__new__(cls)

    def __init__(
        self,
        problem: BilevelProblem,
        solver: InnerSolver,
        estimator: HypergradEstimator | str,
        hparams: Tree,
        optimizer: MakeOptimizer | None = None,
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
    ) -> None:
        check_on_failure(on_failure)
        if not isinstance(certify, bool):
            raise ValueError(f"`certify` must be True or False, got {shown_value(certify)}.")
        if not isinstance(warm_start, bool | WarmStart):
            raise ValueError(f"`warm_start` must be True, False or a WarmStart, got {warm_start!r}.")
        rule: HypergradEstimator = as_estimator(estimator)
        check_roles(problem, solver, rule)
        check_tensors("hparams", hparams)
        check_makers(optimizer, scheduler)
        self.target_error, self.schedule = target_error, as_schedule(schedule, target_error)
        first = target_error if self.schedule is None else self.schedule.at(1)
        if first is not None:
            check_target(first, problem, solver, rule, certify)
        self.problem, self.solver, self.estimator = problem, solver, rule
        self.warm_start = warm_start if isinstance(warm_start, WarmStart) else WarmStart(warm_start, warm_start)
        if problem.renewed:
            self.warm_start = WarmStart(state=False, adjoint=False)
        self.certify, self.on_failure, self.callbacks = certify, on_failure, check_callbacks(callbacks)
        self.params = params
        self._transform = ConstraintTransform(hparams, constraints)
        self._free = self._transform.inverse(hparams)
        # The first step starts exactly where the user said, not where the transform's rounding puts it.
        self._hparams = tree.tree_map(torch.clone, tree.detach(hparams))
        make = optimizer or (lambda tensors: torch.optim.Adam(tensors, lr=0.1))
        self.optimizer = make(tree.leaves(self._free))
        check_made(self.optimizer, tree.leaves(self._free))
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        check_scheduler(self.scheduler, self.optimizer)
        self.carry = Carry()
        self.history: list[Record] = []
        self.best: tuple[float, Tree] = (math.inf, self._hparams)
        self._checked = False

    @property
    def hparams(self) -> Tree:
        """The present hyperparameters, detached."""
        return tree.tree_map(torch.clone, self._hparams)

    @property
    def gradient_equivalents(self) -> float:
        """The cost of all steps so far."""
        return sum(record.gradient_equivalents for record in self.history)

    @property
    def steps_taken(self) -> int:
        """Outer steps so far, those before a resume included."""
        return len(self.history)

    def step(self) -> Estimate:
        """Take one hypergradient at the present hyperparameters, then move them.

        Returns:
            The estimate, whose hypergradient and loss belong to the hyperparameters before the move.

        Raises:
            HypergradientError: with ``on_failure="raise"`` for an unusable hypergradient, and for an optimizer step
                that would make the hyperparameters NaN or infinite; nothing has moved then.
        """
        estimate: Estimate = self._estimate()
        verdict = estimate.verdict
        report(verdict, self.on_failure, estimate)
        self._checked = True
        record = record_of(len(self.history) + 1, estimate)
        if verdict.status.usable:
            if self.problem.renewed or estimate.outer_loss < self.best[0]:
                self.best = (estimate.outer_loss, self._hparams)
            if not no_descent(record.status, record.error, record.hypergradient_norm):
                moved = self._move(estimate.hypergradient, estimate.outer_loss)
                estimate = replace(estimate, verdict=verdict.worse(moved))
                report(moved, self.on_failure, estimate)
                record = record_of(len(self.history) + 1, estimate)
            self._follow(estimate.carry)
        self.history.append(record)
        return estimate

    @property
    def _target(self) -> float | None:
        """The relative error for the next step."""
        return self.target_error if self.schedule is None else self.schedule.at(self.steps_taken + 1)

    def _estimate(self) -> Any:
        """Return the hypergradient at the present hyperparameters, of a batch those of all members."""
        return hypergradient(
            self.problem.on_outer_step(self.steps_taken),
            self.solver,
            self.estimator,
            self._hparams,
            self.params,
            carry=self.carry,
            certify=self.certify,
            target_error=self._target,
            check=not self._checked,
            on_failure="return",
        )

    def _follow(self, carry: Carry) -> None:
        """Keep the parts of a warm start that were asked for."""
        self.carry = Carry(
            carry.state if self.warm_start.state else None,
            carry.adjoint if self.warm_start.adjoint else None,
            carry.solver,
        )

    def _move(self, gradient: Tree, loss: float) -> Verdict:
        """Hand the pulled-back gradient to the optimizer and step; a step to NaN, or an interrupted one, is undone."""
        before, hparams = self._movable(), self._hparams
        try:
            pairs = zip(tree.leaves(self._free), self._transform.pull_back(self._free, gradient), strict=True)
            for leaf, part in pairs:
                leaf.grad = part
            self.optimizer.step()
            if self.scheduler is not None:
                plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                self.scheduler.step(*([loss] if plateau else []))
            # A copy: the identity transform returns the free tensors themselves, which the optimizer moves in place.
            self._hparams = tree.tree_map(torch.clone, tree.detach(self._transform(self._free)))
            verdict = self._judged()
            if not verdict.status.usable:
                self._restore(before)
                self._hparams = hparams
        except BaseException:
            self._restore(before)
            raise
        return verdict

    def _judged(self) -> Verdict:
        """Return what is to be said of the hyperparameters to which the optimizer moved."""
        for name, leaf in zip(tree.names(self._hparams), tree.leaves(self._hparams), strict=True):
            if not tree.is_finite(leaf):
                return Verdict(
                    Status.NOT_FINITE,
                    f"{type(self.optimizer).__name__} at outer step {self.steps_taken + 1} made `hparams{name}` NaN or "
                    "infinite, so it was not moved: use a smaller learning rate or constraints",
                )
        return GOOD

    def _movable(self) -> dict[str, Any]:
        """Return copies of what a move changes, besides the hyperparameters themselves."""
        return {
            "free": [leaf.detach().clone() for leaf in tree.leaves(self._free)],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `_movable` returned."""
        with torch.no_grad():
            for leaf, value in zip(tree.leaves(self._free), state["free"], strict=True):
                leaf.copy_(value)
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))

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
        """Take up to `steps` more steps.

        On a CPU, many short steps are quicker inside ``with bilevel.threads.short_operations():``, which the commands
        use and this method does not, as it would change the threads of your process.

        Args:
            steps: most steps.
            budget: stop once the cost of the whole history, in gradient-equivalents, has reached this.
            tol: stop once the norm of the hypergradient is at most this.
            patience: stop after this many steps without a lower outer loss.
            min_progress: by how much the outer loss has to fall to count as progress.
            progress: show a progress line.

        Returns:
            The result; a second call continues.

        Raises:
            ValueError: for `steps` that are not an int, or negative.
        """
        check_steps(steps)
        stopped, ended_well, estimate = "", True, None
        rules = StoppingRules(budget, tol, patience, min_progress)
        with tqdm(total=steps, disable=not progress, unit="step") as line:
            for _ in range(steps):
                estimate = self.step()
                line.set_postfix_str(shown_record(self.history[-1]), refresh=False)
                line.update()
                # A list, so that every callback is called.
                asked = [callback(self, estimate) for callback in self.callbacks]
                failed = "" if estimate.status.usable else f"a hypergradient failed: {estimate.verdict}"
                reason = failed or rules.reason(self.history)
                if any(answer is True for answer in asked):
                    reason = "a callback asked to stop"
                if reason:
                    stopped, ended_well = reason, not failed
                    break
        stopped = stopped or rules.end(f"took {steps} steps", self.history, not self.problem.renewed)
        if estimate is not None and ended_well:
            stopped = with_remark(stopped, self.problem, estimate.params, self._hparams)
        return OuterResult(self.hparams, tree.copied(self.best[1]), self.best[0], tuple(self.history), stopped)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, in plain containers and tensors: ``torch.load(weights_only=True)`` reads it.

        A run that loads it continues to the same numbers bit for bit (same machine, same numbers of threads and
        workers). It holds the generators of all CUDA devices where CUDA was used; a machine without them loads it too.
        """
        return {
            "format": FORMAT,
            **self._movable(),
            "hparams": [leaf.clone() for leaf in tree.leaves(self._hparams)],
            "inner_state": None if self.carry.state is None else self.carry.state.to_dict(),
            "adjoint": self.carry.adjoint,
            "solver": type(self.solver).__name__,
            "of": origin(self),
            "history": self._saved_history(),
            "best_loss": self.best[0],
            "best_hparams": [leaf.clone() for leaf in tree.leaves(self.best[1])],
            **generators(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Args:
            state: what `state_dict` returned, for the same problem, solver and estimator; it is not changed.

        Raises:
            ValueError: for something else, another format, problem, inner solver, estimator, optimizer or scheduler;
                nothing is loaded then.
        """
        check_state(state, self)
        before = {**self._movable(), **generators()}
        hparams, carry, best = loaded(state, self)
        history = self._read_history(state["history"])
        try:
            self._restore(state)
            restore_generators(state)
        except BaseException as error:
            self._restore(before)
            restore_generators(before)
            if not isinstance(error, Exception):
                raise
            raise ValueError(f"this state cannot be loaded, and nothing of it was: {first_line(error)}") from error
        self._hparams, self.carry, self.best, self.history = hparams, carry, best, history

    def _saved_history(self) -> list[Any]:
        return [asdict(record) for record in self.history]

    def _read_history(self, saved: Sequence[Any]) -> list[Any]:
        return [Record(**record) for record in saved]
