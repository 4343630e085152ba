"""Checkpoints of an inner run whose length nobody knows in advance, and the states between them, computed again.

Every s-th state is kept. Once more than 2 s of them are, every second one is dropped and s doubles, so that after K
steps there are between s / 2 and 2 s checkpoints with ``s <= sqrt(2 K)``. On the way back the steps between two
checkpoints are taken again, one segment of s states at a time: at most ``2.2 sqrt(K)`` states at once, for one more
inner run of work. With K known, the best spacing sqrt(K) would need ``2 sqrt(K)`` (Griewank & Walther 2008, section
12.3; their binomial schedules trade further runs for fewer states).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch

from bilevel.base import InnerSolver, InnerState
from bilevel.oracles.inner_problem import InnerProblem


class CheckpointedStates(Sequence[InnerState]):
    """The states of an inner run as a sequence that keeps O(sqrt(K)) of them; made to be walked from its end.

    The states that it computes again are equal bit for bit to those of the run, because the same operations make them;
    their gradients are counted by `inner`. `watch` is called where most states are held.
    """

    def __init__(self, inner: InnerProblem, solver: InnerSolver, watch: Callable[[], None]) -> None:
        self._inner, self._solver, self._watch = inner, solver, watch
        self._kept: list[InnerState] = []
        self._spacing = 1
        self._length = 0

    def append(self, state: InnerState) -> None:
        """Add the next state of the run."""
        if self._length % self._spacing == 0:
            self._kept.append(state)
            if len(self._kept) > 2 * self._spacing:
                self._kept = self._kept[::2]
                self._spacing *= 2
        self._length += 1

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> InnerState: ...

    @overload
    def __getitem__(self, index: slice) -> list[InnerState]: ...

    def __getitem__(self, index: int | slice) -> InnerState | list[InnerState]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        index = range(self._length)[index]
        return self._segment(index // self._spacing)[index % self._spacing]

    def __iter__(self) -> Iterator[InnerState]:
        for number in range(len(self._kept)):
            yield from self._segment(number)

    def __reversed__(self) -> Iterator[InnerState]:
        for number in reversed(range(len(self._kept))):
            segment = self._segment(number)
            self._watch()
            while segment:
                # What has been swept is let go of at once.
                yield segment.pop()

    def _segment(self, number: int) -> list[InnerState]:
        """Return the states from a checkpoint up to the next one."""
        states = [self._kept[number]]
        steps = min(self._spacing, self._length - number * self._spacing) - 1
        with torch.no_grad():
            for _ in range(steps):
                states.append(self._solver.step(self._inner.on_step(states[-1].index), states[-1]))
        return states
