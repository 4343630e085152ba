"""The reverse sweep of rows: each differentiates its own last steps.

Of row i, which took k_i steps, the last n_i are differentiated. To it, a step of the loop is a step where
``k_i - n_i <= t < k_i``; after its end it stood still, so the step is the identity, and before its tail the state is a
constant. Between two ends of such ranges the rows that are swept do not change, so the sweep is cut there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Pullback, Variables
from bilevel.core import rows, tree
from bilevel.core.status import GOOD, StepFailure, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.judge import InnerRun
from bilevel.oracles.inner_problem import InnerProblem


class RowStates:
    """The states of the longest tail that any member may still need; all of them where `tail` is None."""

    def __init__(self, tail: int | None) -> None:
        self._tail = tail
        self._states: deque[InnerState] = deque()
        self._dropped = 0

    def visit(self, state: InnerState, moving: Tensor | None, end: int) -> None:
        """Keep a state, and drop those that come before every member's tail, the earliest of which ends at `end`."""
        self._states.append(state)
        while self._tail is not None and self._dropped < end - self._tail:
            self._states.popleft()
            self._dropped += 1

    def between(self, low: int, high: int) -> list[InnerState]:
        """Return the states that the steps low, ..., high - 1 start from."""
        return list(islice(self._states, low - self._dropped, high - self._dropped))


def swept_rows(
    inner: InnerProblem, run: InnerRun, states: RowStates, length: Callable[[int], int]
) -> Callable[[Tree], Pullback]:
    """Return the pullback of the last steps of every row; `length` maps steps taken to steps differentiated."""
    tails = [min(length(count), count) for count in run.steps]
    # A failed row has no result: it is swept along with the others, and what comes of it is not used.
    good = [index for index, verdict in enumerate(run.verdict) if verdict.status.usable]
    ends = {index: (run.steps[index] - tails[index], run.steps[index]) for index in good}

    def pullback(cotangent: Tree) -> Pullback:
        verdict: Verdict = GOOD
        moving: Variables = (cotangent, tree.zeros_like(run.state.memory))
        total = tree.zeros_like(inner.hparams)
        counts: list[Counter[str]] = [Counter() for _ in tails]
        cuts = sorted({t for pair in ends.values() for t in pair})
        assert run.solver is not None
        try:
            for low, high in zip(reversed(cuts[:-1]), reversed(cuts[1:]), strict=True):
                swept = [ends.get(index, (low, high)) for index in range(len(tails))]
                mask = torch.tensor([start <= low and high <= end for start, end in swept], device=run.usable.device)
                before = Counter(inner.counts)
                moving, part = _sweep(inner, run.solver, states.between(low, high), moving, mask)
                total = tree.add(total, part)
                for count, swept_here in zip(counts, mask.cpu(), strict=True):
                    count.update(inner.counts - before if bool(swept_here) else ())
        except StepFailure as failure:
            verdict = failure.verdict
        return Pullback(total, steps=tails, verdict=verdict, counts=counts)

    return pullback


def _sweep(
    inner: InnerProblem, solver: InnerSolver, states: Sequence[InnerState], cotangent: Variables, mask: Tensor
) -> tuple[Variables, Tree]:
    """Sweep the members of the mask back over some steps that are the identity to the others."""
    if bool(mask.all()):
        return solver.sweep_vjp(inner, states, cotangent)
    if not bool(mask.any()):
        return cotangent, tree.zeros_like(inner.hparams)
    before, part = solver.sweep_vjp(inner, states, rows.where(mask, cotangent, 0.0))
    return rows.where(mask, before, cotangent), rows.where(mask, part, 0.0)
