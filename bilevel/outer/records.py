"""What an outer run leaves behind: one `Record` for each step, the result, and the rules by which a run ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bilevel.base import Estimate
from bilevel.core import tree
from bilevel.core.options import is_int, is_number, is_positive, shown_value
from bilevel.core.status import Status
from bilevel.core.tree import Tree
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class Record:
    """One outer step, as numbers; the hypergradient was taken before the step moved the hyperparameters."""

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


@dataclass(frozen=True)
class OuterResult:
    """How an outer run ended.

    Attributes:
        hparams: the hyperparameters after the last step.
        best_hparams: those with the smallest outer loss seen.
        best_loss: that loss.
        history: one `Record` for each step.
        stopped: why the run ended, in words.
    """

    hparams: Tree
    best_hparams: Tree
    best_loss: float
    history: Sequence[Record] = field(repr=False)
    stopped: str


def no_descent(status: str, error: float | None, hypergradient_norm: float) -> str:
    """Return why a hypergradient that missed its target supports no step, or an empty string.

    Where ``|p - dF/du| < |p|``, p has a positive inner product with dF/du, so that -p descends; without such a figure
    nobody knows.

    >>> no_descent("TARGET_NOT_REACHED", 0.1, 1.0)
    ''
    """
    if status != Status.TARGET_NOT_REACHED.name or (error is not None and error < hypergradient_norm):
        return ""
    figure = "no figure" if error is None else f"an error of up to {error:.1e}"
    return f"no certain descent: {figure} for a hypergradient of norm {hypergradient_norm:.1e}, whose target was missed"


def steps_without_progress(losses: Iterable[float], min_progress: float) -> int:
    """Return how many of the last losses came without one below the best before them by more than `min_progress`.

    >>> steps_without_progress([3.0, 1.0, 2.0, 1.0], 0.0)
    2
    """
    best, waited = math.inf, 0
    for loss in losses:
        waited += 1
        if loss < best - min_progress:
            best, waited = loss, 0
    return waited


LAST = 5
"""Steps over which the fall of the outer loss is measured."""
SMALL = 1e-3
"""A hypergradient this much smaller than the largest one counts as converged where no tolerance was asked for."""


def not_converged(taken: str, norms: Sequence[float], losses: Sequence[float], tol: float | None = None) -> str:
    """Return how far a run is that ended by its number of steps, or by its budget.

    Args:
        taken: that end in words.
        norms: the norm of the hypergradient at every step.
        losses: the outer loss at every step.
        tol: the norm that was asked for.

    >>> not_converged("took 3 steps", [2.0, 1.5, 1.0], [5.0, 4.0, 3.5])
    'took 3 steps, not converged: |hypergradient| = 1.0e+00, was 2.0e+00, outer loss still falling by 7.5e-01 a step'
    """
    if not norms or not math.isfinite(norms[-1] + losses[-1]):
        return taken
    reached = f"|hypergradient| = {norms[-1]:.1e}, was {norms[0]:.1e}"
    if tol is None and norms[-1] <= SMALL * max(norms):
        return f"{taken}: {reached}"
    count = min(LAST, len(losses) - 1)
    fall = (losses[-1 - count] - losses[-1]) / count if count else 0.0
    falling = fall > 1e-9 * abs(losses[-1])
    trend = f", outer loss still falling by {fall:.1e} a step" if falling else ", outer loss no longer falling"
    return f"{taken}, not converged: {reached}{trend if count else ''}"


@dataclass(frozen=True)
class StoppingRules:
    """When a run ends; a function of its history alone. The attributes are the options of `OuterOptimizer.run`."""

    budget: float | None
    tol: float | None
    patience: int | None
    min_progress: float

    def __post_init__(self) -> None:
        for name, allowed, ok in (
            ("budget", "a positive number or None", self.budget is None or is_positive(self.budget)),
            ("tol", "a positive number or None", self.tol is None or is_positive(self.tol)),
            ("patience", "a positive int or None", self.patience is None or is_int(self.patience)),
            ("min_progress", "a number that is not negative", is_number(self.min_progress) and self.min_progress >= 0),
        ):
            if not ok:
                raise ValueError(f"`{name}` must be {allowed}, got {shown_value(getattr(self, name))}.")

    def end(self, taken: str, history: Sequence[Record], comparable: bool) -> str:
        """Return how a run ended that took all its steps; losses of changing problems do not compare."""
        if not comparable:
            return taken
        return not_converged(
            taken,
            [record.hypergradient_norm for record in history],
            [record.outer_loss for record in history],
            self.tol,
        )

    def met(self, status: str, error: float | None, norms: Sequence[float], losses: Sequence[float]) -> str:
        """Return which rule ends a run here, or an empty string; the budget is asked for elsewhere.

        A hypergradient that supports no step is named first: a small norm means nothing where its error is larger.

        Args:
            status: the name of the last status.
            error: the error of the last hypergradient, where one is known.
            norms: the norm of the hypergradient at every step.
            losses: the outer loss at every step.
        """
        refused = no_descent(status, error, norms[-1])
        if refused:
            return refused
        if self.tol is not None and norms[-1] <= self.tol:
            return f"the hypergradient norm reached {self.tol:g}"
        if self.patience is not None and steps_without_progress(losses, self.min_progress) >= self.patience:
            return f"no progress for {self.patience} steps"
        return ""

    def reason(self, history: Sequence[Record]) -> str:
        """Return why a run with this history ends, or an empty string."""
        if not history:
            return ""
        last, norms = history[-1], [record.hypergradient_norm for record in history]
        met = self.met(last.status, last.error, norms, [record.outer_loss for record in history])
        if not met and self.budget is not None and sum(each.gradient_equivalents for each in history) >= self.budget:
            return self.end(f"the budget of {self.budget:g} gradient-equivalents is used", history, True)
        return met


def with_remark(stopped: str, problem: BilevelProblem, params: Tree, hparams: Tree) -> str:
    """Return why a run ended, with what is odd about the outer loss there."""
    remark = problem.remark(params, hparams)
    return f"{stopped}; {remark}" if remark else stopped


def record_of(step: int, estimate: Estimate) -> Record:
    """Return an outer step as numbers."""
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
    )


def shown_record(record: Record) -> str:
    """Return the figures of a step that the progress line shows."""
    error = "-" if record.error is None else f"{record.error:.1e}"
    return (
        f"loss {record.outer_loss:.5g}, |hypergradient| {record.hypergradient_norm:.2e}, "
        f"inner residual {record.inner_residual:.1e}, error {error}"
    )
