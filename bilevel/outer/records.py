"""What an outer run leaves behind: one `Record` for each step, and the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bilevel.base import Estimate, describe
from bilevel.core import rows, tree
from bilevel.core.status import Status
from bilevel.core.tree import Tree


@dataclass(frozen=True)
class Record:
    """One outer step, as numbers; the hypergradient was taken before the step moved the hyperparameters.

    A search also says its phase, whether the point was accepted, and by how much the outer loss was to fall.
    """

    step: int
    outer_loss: float
    hypergradient_norm: float
    inner_residual: float
    adjoint_residual: float | None
    error: float | None
    error_kind: str
    status: str
    inner_steps: int
    adjoint_steps: int
    gradient_equivalents: float
    seconds: float
    peak_memory: int | None
    phase: str = ""
    accepted: bool | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class OuterResult(Sequence["OuterResult"]):
    """How an outer run ended; of rows, ``result[i]`` is how row i did, and every attribute holds one entry for each.

    There are the hyperparameters after the last step, those with the smallest outer loss seen, that loss, a `Record`
    for each step, and why the run ended, in words.
    """

    hparams: Tree
    best_hparams: Tree
    best_loss: Any
    history: Sequence[Any] = field(repr=False)
    stopped: Any

    def __len__(self) -> int:
        return 1 if isinstance(self.stopped, str) else len(self.stopped)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if isinstance(self.stopped, str):
            return self
        return OuterResult(
            rows.row(self.hparams, index),
            rows.row(self.best_hparams, index),
            float(self.best_loss[index]),
            self.history[index],
            self.stopped[index],
        )


BatchOuterResult = OuterResult
"""The name of the result of rows, for code that was written when it had a class of its own."""


def record_of(step: int, estimate: Estimate, **says: Any) -> Record:
    """Return an outer step as numbers, with what a search says of it."""
    c = estimate.certificate
    return Record(
        step=step,
        outer_loss=estimate.outer_loss,
        hypergradient_norm=float(tree.norm(estimate.hypergradient)),
        inner_residual=c.inner_residual,
        adjoint_residual=c.adjoint_residual,
        error=c.error,
        error_kind=c.error_kind,
        status=estimate.status.name,
        inner_steps=c.inner_steps,
        adjoint_steps=c.adjoint_steps,
        gradient_equivalents=estimate.cost.gradient_equivalents,
        seconds=estimate.cost.seconds,
        peak_memory=estimate.cost.peak_memory,
        **says,
    )


def described(outer: Any) -> str:
    """Return the parts of an outer loop, how its hyperparameters move, and why where "auto" chose that."""
    parts = [type(outer.problem).__name__, *map(describe, (outer.solver, outer.estimator))]
    moved = describe(outer.optimizer) if outer.search is not None else type(outer.optimizer).__name__
    steps = f"{outer.steps_taken} steps taken"
    return f"OuterOptimizer({', '.join(parts)}, {moved}: {steps}{outer.choice and '; '}{outer.choice})"


def shown_record(record: Record) -> str:
    """Return the figures of a step that the progress line shows."""
    error = "-" if record.error is None else f"{record.error:.1e}"
    return (
        f"loss {record.outer_loss:.5g}, |hypergradient| {record.hypergradient_norm:.2e}, "
        f"inner residual {record.inner_residual:.1e}, error {error}"
    )


def shown_rows(last: Sequence[Record], going: int, size: int) -> str:
    """Return the figures of the last steps of some rows that the progress line shows."""
    losses = [record.outer_loss for record in last if Status[record.status].usable]
    mean = sum(losses) / len(losses) if losses else math.nan
    residual = max(record.inner_residual for record in last)
    return (
        f"loss {mean:.5g} on average, {max(losses, default=math.nan):.5g} at worst, inner residual {residual:.1e} "
        f"at worst, {going} of {size} going"
    )
