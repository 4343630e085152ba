"""Stochastic methods of a single loop: how a batch's direction and those of earlier steps make the direction of a step.

    D_w = g(w, u),   D_v = H v + f_w,   D_u = C' v + f_u,   all at the same (w, v, u), on batches i and j

and then ``w -= rate D_w``, ``v -= rate D_v``, and u moves by D_u. SOBA and SABA: Dagreou et al. 2022 (arXiv
2201.13409), with v of the other sign.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from bilevel.core.options import check_fields, is_int, is_number, is_positive, option, optional, or_auto
from bilevel.oracles.directions import Array, Directions

DRAWS = 1000
"""Steps whose batches are drawn at once."""
SAFE = 0.5
"""Share of ``1 / curvature`` that an automatic step size is."""
SETTLED = 16.0
"""Steps, times rate and curvature, in which w and v move alone."""
APART, RENEWED = 0.5, 0.2
"""How far a hyperparameter may be from where the preconditioner was made, and from where on it is made anew."""
LEAST = 0.25
"""About the smallest curvature in its metric, as of a logistic loss, whose bound is four times its typical one."""
CAP = 1.0
"""Largest move of a hyperparameter while w and v relax, ``1 / (rate least curvature)`` steps: they have to follow."""


def drawn(seed: int, first: int, count: int, parts: Sequence[int | None]) -> list[list[int]]:
    """Return the batches of some steps, for each loss: a pure function of (seed, step); where parts is None, the step.

    Step k takes entry ``k mod 1000`` of the draws ``default_rng((seed, k // 1000)).integers(parts, size=1000)``, first
    those of the inner loss.

    >>> drawn(0, 0, 4, (3, None))
    [[2, 1, 1, 0], [0, 1, 2, 3]]
    """
    taken: list[list[int]] = [[], []]
    while len(taken[0]) < count:
        at = first + len(taken[0])
        chunk, offset = divmod(at, DRAWS)
        stop = min(DRAWS, offset + count - len(taken[0]))
        for each, chosen, size in zip(taken, _chunk(seed, chunk, tuple(parts)), parts, strict=True):
            each += chosen[offset:stop] if size is not None else range(at, at + stop - offset)
    return taken


@lru_cache(maxsize=8)
def _chunk(seed: int, chunk: int, parts: tuple[int | None, ...]) -> list[list[int]]:
    random = np.random.default_rng((seed, chunk))
    return [random.integers(size or 1, size=DRAWS).tolist() for size in parts]


class Memory:
    """What a method knows of earlier steps about one sampled quantity; the plain one knows nothing."""

    def __call__(self, index: int, new: Array) -> Array:
        """Return the direction from that on a batch, as a new vector or `new` itself."""
        return new

    def copied(self) -> Memory:
        """Return a memory that changes by itself."""
        return self

    def saved(self, directions: Directions) -> Any:
        """Return what it holds, as tensors."""
        return None


class Averages(Memory):
    """SAGA: the direction last seen on every batch, and their mean."""

    def __init__(self, table: list[Array], mean: Array) -> None:
        self.table, self.mean = table, mean

    def __call__(self, index: int, new: Array) -> Array:
        change = new - self.table[index]
        self.table[index], direction = new, change + self.mean
        change /= len(self.table)
        self.mean = self.mean + change
        return direction

    def copied(self) -> Averages:
        return Averages(list(self.table), self.mean)

    def saved(self, directions: Directions) -> Any:
        return torch.stack([directions.tensor(each) for each in (*self.table, self.mean)])


@dataclass(frozen=True)
class StochasticMethod(ABC):
    """A method of `SingleLoop`: a subclass makes its memories.

    Args:
        batch_size: rows in a batch of a problem that has rows; None for 64. Other problems take theirs from their
            samplers.
        inner_step: the rate of w and v; "auto": half of the inverse of the largest curvature that a batch meets, which
            is measured again as params and hyperparameters move, unless it is known from the model.
        outer_step: how far hyperparameters move; "auto": 1 with a preconditioner, else 0.3.
        scaling: "adagrad": each by ``outer_step D_u / sqrt(sum of D_u^2)``, a step in their own unit, which needs no
            tuning; "none": by ``outer_step D_u``.
        preconditioner: "auto": w and v move by ``rate P D``, with P the inverse of a bound of the Hessian of 4,096 rows
            and the penalty, made anew before any hyperparameter has moved by 0.5; for linear models of one prediction
            on the host with at most 500 features and ``inner_step="auto"``. "none": without.
        decay: rates are multiplied by ``(1 + k / decay_after)^-decay`` at step k; of "adagrad" the inner one alone.
        decay_after: see there; None for one pass through the batches.
        freeze: steps at the start in which w and v alone move; "auto": as many as they need to settle a little.
        every: steps between two records.
        seed: of the order of the rows and of the batches that are drawn.
    """

    batch_size: int | None = option(None, "a positive int or None", optional(is_int))
    inner_step: float | str = option("auto", "a positive number or 'auto'", or_auto(is_positive))
    outer_step: float | str = option("auto", "a positive number or 'auto'", or_auto(is_positive))
    scaling: str = option("adagrad", "'adagrad' or 'none'", lambda value: value in ("adagrad", "none"))
    preconditioner: str = option("auto", "'auto' or 'none'", ("auto", "none").__contains__)
    decay: float = option(0.0, "a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
    decay_after: float | None = option(None, "a positive number or None", optional(is_positive))
    freeze: int | str = option("auto", "an int that is not negative or 'auto'", or_auto(lambda v: is_int(v, 0)))
    every: int = option(1000, "a positive int", is_int)
    seed: int = option(0, "an int that is not negative", lambda value: is_int(value, 0))

    fixed: ClassVar[bool] = False
    """Whether batches have to stay the same."""
    first_passes: ClassVar[int] = 0
    """Passes through the data that `memories` takes."""
    differentiates_steps: ClassVar[bool] = False
    second_derivatives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def memories(self, directions: Directions, z: Array, u: Array) -> list[Memory]:
        """Return what is known at the start, of the inner and of the outer part."""

    def restored(self, directions: Directions, saved: Sequence[Any]) -> list[Memory]:
        """Return memories from what they have saved."""
        return [Memory(), Memory()]

    def moved(
        self, u: Array, direction: Array, root: Array, length: float, factor: float, cap: Any
    ) -> tuple[Array, Array]:
        """Return hyperparameters after a step, and the root of the sum of the squares of their directions."""
        step = length * direction
        if self.scaling == "none":
            return u - factor * step, root
        root = torch.hypot(root, direction) if isinstance(root, torch.Tensor) else np.hypot(root, direction)
        step = step / root
        return u - (step if cap is None else step.clip(-cap, cap)), root

    def check(self, problem: Any, solver: Any, hparams: Any) -> None:
        """Refuse nothing: the loop looks at what it is made of."""
        return

    def one_by_one(self, solver: Any) -> str:
        """Return why members of a batch run one after the other."""
        return f"{type(self).__name__} takes one problem at a time"


@dataclass(frozen=True)
class SOBA(StochasticMethod):
    """Stochastic bilevel descent without a memory: each step moves by the directions on its batches.

    With constant rates it stays at a distance from the solution that falls with the rates, so they decay.

    >>> SOBA(batch_size=32).decay
    0.5
    """

    decay: float = option(0.5, "a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)

    def memories(self, directions: Directions, z: Array, u: Array) -> list[Memory]:
        return [Memory(), Memory()]


@dataclass(frozen=True)
class SABA(StochasticMethod):
    """Stochastic bilevel descent with the averages of SAGA: with constant rates it converges to the solution.

    It keeps the direction on every batch, (rows / batch_size) (2 d + k) numbers, and begins with a pass through them.
    """

    fixed: ClassVar[bool] = True
    first_passes: ClassVar[int] = 1

    def memories(self, directions: Directions, z: Array, u: Array) -> list[Memory]:
        inner, outer = directions.parts
        assert inner is not None
        assert outer is not None
        first = [directions.sampled(i % inner, i % outer, z, u) for i in range(max(inner, outer))]
        tables = [[pair[level] for pair in first[:size]] for level, size in ((0, inner), (1, outer))]
        return [Averages(table, sum(table[1:], table[0]) / len(table)) for table in tables]

    def restored(self, directions: Directions, saved: Sequence[Any]) -> list[Memory]:
        made = [[directions.array(row) for row in each] for each in saved]
        return [Averages(rows[:-1], rows[-1]) for rows in made]
