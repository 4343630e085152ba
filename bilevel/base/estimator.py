"""`HypergradEstimator`: a rule for the VJP of the solution map; `Estimate`: its result with the evidence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from bilevel.base.inner_solver import InnerSolver, InnerState
from bilevel.core import rows, tree
from bilevel.core.cost import Cost, Meter
from bilevel.core.options import describe
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class Carry:
    """What one hypergradient leaves for the next: the warm start.

    Attributes:
        state: the inner state.
        adjoint: the adjoint vector, shaped as params.
        solver: the name of the inner solver that left the state, where it is known.
        ongoing: the hyperparameters are still the same: the inner run goes on as if it had not paused.
    """

    state: InnerState | None = None
    adjoint: Tree = None
    solver: str = ""
    ongoing: bool = False

    def copied(self) -> Carry:
        """Return the warm start with copies of the tensors that a loss is given."""
        state = self.state
        if state is not None:
            state = replace(state, params=tree.copied(state.params), memory=tree.copied(state.memory))
        return replace(self, state=state, adjoint=tree.copied(self.adjoint))


@dataclass(frozen=True)
class Pullback:
    """The VJP of the solution map at one cotangent, with its evidence; of rows, with a sequence of each figure.

    Attributes:
        hparams: the cotangent of the hyperparameters.
        adjoint: the adjoint vector, where the estimator has one: approximates ``H^-1 cotangent``.
        residual: relative adjoint residual, where there is one.
        steps: iterations of the linear solver, or differentiated steps.
        verdict: status of this half.
        error: the estimator's own estimate of the distance to the exact hypergradient, where it makes one.
        error_note: how it was obtained, or why there is none.
        value_error: ``|a' g|``, with the adjoint vector a and the inner gradient g, a 0-d tensor: to first order the
            distance of the outer loss to that at the inner solution; None where there is no adjoint vector. Of rows, of
            shape (rows,).
        counts: of rows, the oracle calls that each took part in.
    """

    hparams: Tree
    adjoint: Tree = None
    residual: Any = None
    steps: Any = 0
    verdict: Any = GOOD
    error: float | None = None
    error_note: str = ""
    value_error: Tensor | None = None
    counts: Sequence[Counter[str]] = ()

    def row(self, index: int) -> Pullback:
        """Return what is said of one row."""
        residual, steps, verdict = (rows.figure(each, index) for each in (self.residual, self.steps, self.verdict))
        adjoint = None if self.adjoint is None else rows.row(self.adjoint, index)
        error = None if self.value_error is None else self.value_error[index]
        hparams = rows.row(self.hparams, index)
        return Pullback(hparams, adjoint, residual, steps, verdict, error_note=self.error_note, value_error=error)


@dataclass(frozen=True)
class Solution:
    """An approximate inner solution that can be differentiated; of rows, with a sequence of each figure.

    Attributes:
        params: the approximate solution; the residual was computed at exactly these.
        state: the inner state, for a warm start.
        pullback: cotangent of params -> `Pullback`; may be called more than once.
        residual: norm of the inner gradient at `params`.
        steps: inner steps taken.
        verdict: status of the inner solve.
        counts: of rows, the oracle calls that each took part in.
    """

    params: Tree
    state: InnerState
    pullback: Callable[[Tree], Pullback]
    residual: Any
    steps: Any
    verdict: Any = GOOD
    counts: Sequence[Counter[str]] = ()

    def row(self, index: int) -> Solution:
        """Return the solution of one row; its pullback is that of all."""
        residual, steps, verdict = (rows.figure(each, index) for each in (self.residual, self.steps, self.verdict))
        params = rows.row(self.params, index)
        return Solution(params, self.state.row(index), self.pullback, residual, steps, verdict)


@dataclass(frozen=True)
class HypergradEstimator(ABC):
    """A rule for the vector-Jacobian product of the solution map; it owns the inner loop.

    A subclass is a frozen dataclass with a `solve`.
    """

    measures_memory: ClassVar[bool] = True
    """Whether peak memory is measured: not worth the time where nothing grows with the number of steps."""
    second_derivatives: ClassVar[bool] = True
    """Whether derivatives of the inner gradient are taken, so that a loss without them is refused before the work."""
    resumes: ClassVar[bool] = False
    """Whether a run that goes on from its `carry` gives what one longer run gives."""

    @property
    def differentiates_steps(self) -> bool:
        """Whether the derivative is that of the steps, whose options may then be hyperparameters; default: no."""
        return False

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Refuse a combination that the estimator does not cover.

        The default refuses a solver whose steps decide the hypergradient, unless the estimator differentiates them.

        Raises:
            ValueError: with the remedy.
        """
        reason = "" if self.differentiates_steps else solver.bias_reason(problem)
        if reason:
            remedy = (
                ": use FullUnroll, or TruncatedUnroll with a number as its tail" if solver.traits.differentiable else ""
            )
            raise ValueError(f"{describe(self)} rests on the inner solution, but {reason}{remedy}.")

    @property
    def rowwise(self) -> bool:
        """Whether `solve` takes rows: a problem that is a batch, of which each row ends by itself; default: no."""
        return False

    def one_by_one(self, solver: InnerSolver) -> str:
        """Return why the rows of a batch run one after the other, and not side by side; empty where they do not.

        Args:
            solver: the inner solver.
        """
        if not self.rowwise:
            return f"{describe(self)} takes one problem at a time"
        return "" if solver.traits.rowwise else f"{describe(solver)} takes one problem at a time"

    def at_tolerance(self, tol: float) -> HypergradEstimator:
        """Return the estimator that a `target_error` asks for next, together with a smaller inner tolerance.

        Args:
            tol: relative residual of the adjoint system, for an estimator that solves one; its own tolerance, where
                one is given, stays the smallest.

        Raises:
            ValueError: for an estimator whose error no tolerance makes as small as one likes.
        """
        raise ValueError(
            f"{describe(self)} has no tolerance that leads to a `target_error`: use Implicit() or FullUnroll()."
        )

    @abstractmethod
    def solve(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry, meter: Meter
    ) -> Solution:
        """Run the inner solver and say how its result is differentiated.

        Args:
            problem: the problem.
            solver: the inner solver.
            hparams: hyperparameters, detached.
            params: where a cold start begins.
            carry: what the previous outer step left; empty for a cold start.
            meter: counts oracle calls (``problem.bind(hparams, meter.counts)``) and samples memory.
        """


ErrorKind: TypeAlias = Literal["bound", "estimate", "none"]


@dataclass(frozen=True)
class Certificate:
    """The evidence that travels with a hypergradient.

    Attributes:
        inner_residual: norm of the inner gradient at the returned params.
        adjoint_residual: relative residual of the adjoint system, None where the estimator solves none.
        inner_steps: inner steps taken.
        adjoint_steps: iterations of the linear solver, or differentiated steps.
        error: distance to the exact hypergradient, of the kind that `error_kind` says; None for "none".
        error_kind: "bound" (proved), "estimate" or "none".
        error_note: why there is no figure, or how it was obtained.
        error_lower: for a bound: the error is proved to be at least this.
        components: for a bound: one for every component, shaped as the hyperparameters.
        corrected: for a bound: a hypergradient that is more accurate as a rule, from the work that the bound took.
        corrected_error: for a bound: the distance of `corrected` to the exact hypergradient is at most this.
        signs: for a bound: signs of the exact hypergradient's components, 0 where they are not certain.
        measured: numbers that the inner solver measured, such as its step size; of a batch under "rows" why its members
            ran one after the other, where nobody asked for it.
    """

    inner_residual: float
    adjoint_residual: float | None
    inner_steps: int
    adjoint_steps: int
    error: float | None = None
    error_kind: ErrorKind = "none"
    error_note: str = "ask with certify=True"
    error_lower: float | None = None
    components: Tree = None
    corrected: Tree = None
    corrected_error: float | None = None
    signs: Tree = None
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """A hypergradient and its evidence.

    Attributes:
        outer_loss: the outer loss at `params`.
        hypergradient: shaped as the hyperparameters; NaN where the status is not usable.
        params: the inner solution that was used.
        certificate: residuals and error estimate.
        cost: counted oracle calls, seconds, peak memory.
        verdict: status with the sentence about it.
        carry: the warm start for the next call.
    """

    outer_loss: float
    hypergradient: Tree
    params: Tree
    certificate: Certificate
    cost: Cost
    verdict: Verdict
    carry: Carry

    @property
    def status(self) -> Status:
        """The status alone."""
        return self.verdict.status

    def __str__(self) -> str:
        c = self.certificate
        error = f"none ({c.error_note})" if c.error is None else f"{c.error:.2e} ({c.error_kind})"
        adjoint = "" if c.adjoint_residual is None else f", adjoint residual {c.adjoint_residual:.2e}"
        return (
            f"outer loss {self.outer_loss:.6g}, |hypergradient| {float(tree.norm(self.hypergradient)):.4g}, "
            f"error {error}, inner residual {c.inner_residual:.2e} after {c.inner_steps} steps{adjoint}, "
            f"cost {self.cost.gradient_equivalents:.0f} gradient-equivalents, status {self.status.name}"
        )
