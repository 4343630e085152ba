"""When an outer run ends, and in what words: the loop and the cells of comparisons ask the same rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bilevel.core.options import is_int, is_number, is_positive, shown_value
from bilevel.core.status import Status, Verdict
from bilevel.core.tree import Tree
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.records import Record


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


def not_converged(
    taken: str,
    norms: Sequence[float],
    losses: Sequence[float],
    tol: float | None = None,
    steps: Sequence[int] | None = None,
) -> str:
    """Return how far a run is that ended by its number of steps, or by its budget: `taken` says that in words.

    The norm of the hypergradient and the outer loss are those at some `steps`, by default at every one; `tol` is the
    norm that was asked for.

    >>> not_converged("took 3 steps", [2.0, 1.5, 1.0], [5.0, 4.0, 3.5])
    'took 3 steps, not converged: |hypergradient| = 1.0e+00, was 2.0e+00, outer loss still falling by 7.5e-01 a step'
    """
    if not norms or not math.isfinite(norms[-1] + losses[-1]):
        return taken
    reached = f"|hypergradient| = {norms[-1]:.1e}, was {norms[0]:.1e}"
    if tol is None and norms[-1] <= SMALL * max(norms):
        return f"{taken}: {reached}"
    at = range(len(losses)) if steps is None else steps
    count = next((back for back in range(1, len(at)) if at[-1] - at[-1 - back] >= LAST), len(losses) - 1)
    fall = (losses[-1 - count] - losses[-1]) / (at[-1] - at[-1 - count]) if count else 0.0
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

    def end(
        self,
        taken: str,
        norms: Sequence[float],
        losses: Sequence[float],
        comparable: bool,
        steps: Sequence[int] | None = None,
    ) -> str:
        """Return how a run ended that took all its steps; losses of changing problems do not compare."""
        return not_converged(taken, norms, losses, self.tol, steps) if comparable else taken

    def met(self, status: str, error: float | None, norms: Sequence[float], losses: Sequence[float]) -> str:
        """Return which rule ends a run here, or an empty string; the budget is asked for elsewhere.

        A hypergradient that supports no step is named first: a small norm means nothing where its error is larger.
        Status and error are the last ones; the norms of the hypergradient and the outer losses, those of every step.
        """
        if refused := no_descent(status, error, norms[-1]):
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
        last = history[-1]
        # Asked at every step: only what a rule needs is read of a long history.
        losses = [] if self.patience is None else [record.outer_loss for record in history]
        met = self.met(last.status, last.error, [last.hypergradient_norm], losses)
        if not met and self.budget is not None and sum(each.gradient_equivalents for each in history) >= self.budget:
            taken = f"the budget of {self.budget:g} gradient-equivalents is used"
            return self.end(taken, *columns(history), True, [each.step for each in history])
        return met


def columns(history: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Return the norm of the hypergradient and the outer loss at every step."""
    return [record.hypergradient_norm for record in history], [record.outer_loss for record in history]


def failure(history: Sequence[Record], verdict: Verdict | None = None) -> str:
    """Return why a run with this history cannot go on, or an empty string; `verdict` is that of the last step."""
    if not history or Status[history[-1].status].usable:
        return ""
    return f"a hypergradient failed: {verdict or Status[history[-1].status].remedy}"


def lower(records: Mapping[int, Record], best: Sequence[float], sure: list[bool]) -> list[int]:
    """Return the rows whose outer loss is lower than the best so far.

    A doubtful loss, such as that of an inner run that has not converged, may be lower for nothing: it counts while a
    row has no other. `sure` says which rows have one, and is brought up to date.
    """
    better = []
    for index, record in records.items():
        ok = record.status == Status.OK.name
        if ok > sure[index] or (ok == sure[index] and record.outer_loss < best[index]):
            better.append(index)
        sure[index] |= ok
    return better


def all_doubtful(statuses: Iterable[str]) -> str:
    """Return what is to be said where no outer loss of a run is beyond doubt, or an empty string.

    >>> all_doubtful(["INNER_NOT_CONVERGED", "INNER_NOT_CONVERGED"])
    '; every outer loss is doubtful (INNER_NOT_CONVERGED), the best one, too'
    """
    names = dict.fromkeys(status for status in statuses if Status[status].usable)
    if not names or Status.OK.name in names:
        return ""
    return f"; every outer loss is doubtful ({', '.join(names)}), the best one, too"


def with_remark(
    stopped: str, problem: BilevelProblem, params: Tree, hparams: Tree, statuses: Iterable[str] = ()
) -> str:
    """Return why a run ended, with what is odd about its outer losses: that of the end, and those of all statuses."""
    stopped += "" if problem.structure.resampled else all_doubtful(statuses)
    remark = problem.remark(params, hparams)
    return f"{stopped}; {remark}" if remark else stopped
