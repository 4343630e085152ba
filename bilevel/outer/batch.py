"""`BatchOuterOptimizer`: the outer loops of a batch as one, each member with its own history, best and end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel.base import BatchEstimate, HypergradEstimator, InnerSolver, verdict_of
from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.status import GOOD, Status, Verdict, report
from bilevel.core.tree import Tree
from bilevel.hypergrad.batch_api import as_batch
from bilevel.oracles.batching import Rows
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.checks import check_steps
from bilevel.outer.loop import OuterOptimizer
from bilevel.outer.records import OuterResult, Record, StoppingRules, record_of, with_remark

MIXING = ("Adafactor", "Muon")
"""Optimizers of torch that take norms over a whole tensor, and so over all members."""

BatchCallback: TypeAlias = "Callable[[BatchOuterOptimizer, BatchEstimate], bool | None]"


@dataclass(frozen=True)
class BatchOuterResult(Sequence[OuterResult]):
    """How the outer run of a batch ended; ``result[i]`` is the `OuterResult` of member i.

    Attributes:
        hparams: the hyperparameters after the last step, stacked.
        best_hparams: those with the smallest outer loss that each member has seen.
        best_loss: those losses, of shape (members,).
        history: for each member, one `Record` for each of its steps.
        stopped: for each member, why it ended, in words.
    """

    hparams: Tree
    best_hparams: Tree
    best_loss: Tensor
    history: Sequence[Sequence[Record]] = field(repr=False)
    stopped: Sequence[str]

    def __len__(self) -> int:
        return len(self.stopped)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return OuterResult(
            members.row(self.hparams, index),
            members.row(self.best_hparams, index),
            float(self.best_loss[index]),
            self.history[index],
            self.stopped[index],
        )

    def __iter__(self) -> Iterator[OuterResult]:
        return (self[index] for index in range(len(self)))


class BatchOuterOptimizer(OuterOptimizer):
    """The outer loops of a batch as one; ``OuterOptimizer(..., batch=64)`` makes it.

    The torch optimizer works on the stacked hyperparameters. Element-wise ones (SGD, Adam, RMSprop, ...) treat members
    as if each were alone; those that take norms over a tensor do not, and torch's own of that kind are refused. A
    member whose hypergradient failed does not move in that step. `run` ends each member by itself: one that has ended
    does not move any more, though it takes part in the batch until all have ended.

    Args:
        problem: one problem, or a batch.
        solver: the inner solver.
        estimator: the hypergradient estimator.
        hparams: where to start: a row for each member in every leaf.
        optimizer: see `OuterOptimizer`.
        batch: number of members; None where the problem is a batch.
        rows: how they run; see `hypergradient`.
        options: the other options of `OuterOptimizer`; constraints hold for each member.

    >>> from bilevel import GradientDescent, Implicit, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> starts = torch.zeros(4, 2, dtype=torch.float64)
    >>> outer = OuterOptimizer(problem, GradientDescent(), Implicit(), starts, batch=4)
    >>> result = outer.run(5, progress=False)
    >>> len(result), [record.step for record in result[0].history]
    (4, [1, 2, 3, 4, 5])
    """

    history: list[list[Record]]  # type: ignore[assignment]
    best: tuple[Tensor, Tree]  # type: ignore[assignment]

    def __init__(
        self,
        problem: BilevelProblem,
        solver: InnerSolver,
        estimator: HypergradEstimator | str,
        hparams: Tree,
        optimizer: Any = None,
        *,
        batch: int | None = None,
        rows: Rows = "auto",
        **options: Any,
    ) -> None:
        problem = as_batch(problem, batch, rows)
        assert problem.batch is not None
        members.check_rows("hparams", hparams, problem.batch)
        super().__init__(problem, solver, estimator, hparams, optimizer, **options)
        if type(self.optimizer).__name__ in MIXING:
            raise ValueError(
                f"`{type(self.optimizer).__name__}` takes norms over all members of a batch: "
                "use an element-wise optimizer, such as torch.optim.Adam or SGD."
            )
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau follows one loss, but a batch has one for each member.")
        (like, *_) = tree.leaves(self._hparams)
        self.size = problem.batch
        self.history = [[] for _ in range(self.size)]
        self.best = (torch.full((self.size,), math.inf, dtype=like.dtype, device=like.device), self._hparams)
        self._going = torch.ones(self.size, dtype=torch.bool, device=like.device)

    @property
    def gradient_equivalents(self) -> float:
        """The cost of all steps of all members so far."""
        return sum(record.gradient_equivalents for records in self.history for record in records)

    @property
    def steps_taken(self) -> int:
        """Outer steps so far of the members that are still going."""
        return max(len(records) for records in self.history)

    def step(self) -> BatchEstimate:  # type: ignore[override]
        """Take the hypergradients at the present hyperparameters, then move the members that have one.

        Returns:
            The estimates, whose hypergradients and losses belong to the hyperparameters before the move.

        Raises:
            HypergradientError: for a failed member with ``on_failure="raise"``; nothing has moved then.
        """
        estimate: BatchEstimate = self._estimate()
        report(self._verdict(estimate), self.on_failure, estimate)
        self._checked = True
        usable = torch.tensor([verdict.status.usable for verdict in estimate.verdicts], device=self._going.device)
        moving = usable & self._going
        better = moving & (estimate.outer_loss < self.best[0])
        self.best = (
            torch.where(better, estimate.outer_loss, self.best[0]),
            members.where(better, self._hparams, self.best[1]),
        )
        if bool(moving.any()):
            estimate = self._move_rows(estimate, moving)
        self._follow(estimate.carry)
        for records, going, one in zip(self.history, self._going.cpu(), estimate, strict=True):
            if bool(going):
                records.append(record_of(len(records) + 1, one))
        return estimate

    def hold(self, index: int) -> None:
        """Let a member stand still from now on, until `run` is called."""
        self._going[index] = False

    def _verdict(self, estimate: BatchEstimate) -> Any:
        """Return the verdict about the members that have not ended."""
        going = [bool(flag) for flag in self._going.cpu()]
        good = verdict_of([])
        return verdict_of([v if flag else good for v, flag in zip(estimate.verdicts, going, strict=True)])

    def _judged(self) -> Verdict:
        """Members are judged one by one, by `_move_rows`."""
        return GOOD

    def _move_rows(self, estimate: BatchEstimate, moving: Tensor) -> BatchEstimate:
        """Move some members; the rows of the others, moments included, are put back as they were.

        Returns:
            The estimate, in which members that would have moved to NaN or infinity have failed; they did not move.
        """
        before, hparams = self._movable(), self._hparams
        self._move(members.where(moving, estimate.hypergradient, 0.0), math.nan)
        rows = [torch.isfinite(leaf).reshape(self.size, -1).all(dim=1) for leaf in tree.leaves(self._hparams)]
        finite = torch.stack(rows).all(dim=0)
        lost, moving = moving & ~finite, moving & finite
        if bool(lost.any()) and self.on_failure == "raise":
            moving = torch.zeros_like(moving)
        if not bool(moving.all()):
            self._put_back(before, hparams, moving)
        if not bool(lost.any()):
            return estimate
        detail = f"{type(self.optimizer).__name__} made its hyperparameters NaN or infinite, so it was not moved"
        failed = [Verdict(Status.NOT_FINITE, detail) if bool(flag) else GOOD for flag in lost.cpu()]
        verdicts = [verdict.worse(each) for verdict, each in zip(estimate.verdicts, failed, strict=True)]
        estimate = replace(estimate, verdicts=verdicts)
        report(verdict_of(failed), self.on_failure, estimate)
        return estimate

    def _put_back(self, before: Mapping[str, Any], hparams: Tree, moving: Tensor) -> None:
        """Undo the move of the members that do not move."""
        self._hparams = members.where(moving, self._hparams, hparams)
        with torch.no_grad():
            for leaf, old in zip(tree.leaves(self._free), before["free"], strict=True):
                leaf.copy_(members.where(moving, leaf, old))
            moments = self.optimizer.state_dict()["state"]
            for key, old_moments in before["optimizer"]["state"].items():
                for name, old in old_moments.items():
                    new = moments[key][name]
                    if isinstance(new, Tensor) and new.dim() > 0 and len(new) == self.size:
                        new.copy_(members.where(moving, new, old))

    def run(  # type: ignore[override]
        self,
        steps: int,
        *,
        budget: float | None = None,
        tol: float | None = None,
        patience: int | None = None,
        min_progress: float = 0.0,
        progress: bool = True,
    ) -> BatchOuterResult:
        """Take up to `steps` more steps; the rules are those of `OuterOptimizer.run`, for each member by itself.

        A member whose history meets a rule of this call has ended, also when the history is that of an earlier call.

        Args:
            steps: most steps.
            budget: gradient-equivalents of one member.
            tol: end a member once the norm of its hypergradient is at most this.
            patience: end a member after this many steps without a lower outer loss.
            min_progress: by how much the outer loss has to fall to count as progress.
            progress: show a progress line with the mean and the worst of the members.

        Returns:
            The result; a second call continues.

        Raises:
            ValueError: for `steps` that are not an int, or negative.
        """
        check_steps(steps)
        rules = StoppingRules(budget, tol, patience, min_progress)
        stopped = self._ended(rules)
        asked_to_stop, estimate = False, None
        with tqdm(total=steps, disable=not progress, unit="step") as line:
            for _ in range(steps):
                if all(stopped) or asked_to_stop:
                    break
                estimate = self.step()
                line.set_postfix_str(self._postfix(), refresh=False)
                line.update()
                asked = [callback(self, estimate) for callback in self.callbacks]
                asked_to_stop = any(answer is True for answer in asked)
                stopped = self._ended(rules)
        ends = [
            reason or ("a callback asked to stop" if asked_to_stop else self._end(rules, f"took {steps} steps", index))
            for index, reason in enumerate(stopped)
        ]
        if estimate is not None:
            ends = [self._remarked(end, estimate, index) for index, end in enumerate(ends)]
        self._going = torch.ones_like(self._going)
        return BatchOuterResult(
            self.hparams,
            self.best[1],
            self.best[0],
            tuple(tuple(records) for records in self.history),
            tuple(ends),
        )

    def _end(self, rules: StoppingRules, taken: str, index: int) -> str:
        return rules.end(taken, self.history[index], not self.problem.renewed)

    def _remarked(self, end: str, estimate: BatchEstimate, index: int) -> str:
        """Return why a member ended, with what is odd about its outer loss."""
        if _failure(self.history[index]):
            return end
        problem = self.problem.member(index)
        return with_remark(end, problem, members.row(estimate.params, index), members.row(self._hparams, index))

    def _ended(self, rules: StoppingRules) -> list[str]:
        """Return why each member has ended, empty for those that go on, which alone move from now on."""
        reasons = [_failure(records) or rules.reason(records) for records in self.history]
        self._going = torch.tensor([not reason for reason in reasons], device=self._going.device)
        return reasons

    def _postfix(self) -> str:
        last = [records[-1] for records in self.history if records]
        losses = [record.outer_loss for record in last if Status[record.status].usable]
        mean = sum(losses) / len(losses) if losses else math.nan
        residual = max(record.inner_residual for record in last)
        return (
            f"loss {mean:.5g} on average, {max(losses, default=math.nan):.5g} at worst, inner residual {residual:.1e} "
            f"at worst, {int(self._going.sum())} of {self.size} going"
        )

    def _saved_history(self) -> list[Any]:
        return [[asdict(record) for record in records] for records in self.history]

    def _read_history(self, saved: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Record]]:
        return [[Record(**record) for record in records] for records in saved]


def _failure(history: Sequence[Record]) -> str:
    """Return why a member with this history cannot go on, or an empty string."""
    if not history or Status[history[-1].status].usable:
        return ""
    return f"a hypergradient failed: {Status[history[-1].status].remedy}"
