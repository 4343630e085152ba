"""`Run` and `HypergradEstimator`: an inner solve, and a rule for the VJP of the solution map that it approximates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from inspect import signature
from typing import Any, ClassVar

import torch

from bilevel.base import Carry, InnerSolver, InnerState, Solution, describe
from bilevel.base.requirements import check_requirements
from bilevel.core.cost import Meter
from bilevel.core.declared import given_after
from bilevel.core.options import check_fields
from bilevel.core.status import warn
from bilevel.core.tree import Tree
from bilevel.engine.flat import flat_run
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import begin, run_inner
from bilevel.oracles.exact import Exact
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class Run:
    """One inner solve that an estimator is asked to differentiate. It stands in `engine`, as it runs the loop.

    Attributes:
        problem: the problem.
        solver: the inner solver.
        hparams: hyperparameters, detached.
        params: where a cold start begins.
        carry: what the previous outer step left; empty, the default, for a cold start.
        meter: counts the oracle calls of `inner`, and samples memory where an estimator calls ``meter.sample()``; by
            default it only counts.
        of_outer: whether what is pulled back is the gradient of the problem's outer loss, which moves with params.
    """

    problem: BilevelProblem
    solver: InnerSolver
    hparams: Tree
    params: Tree
    carry: Carry = field(default_factory=Carry)
    meter: Meter = field(default_factory=lambda: Meter(torch.device("cpu"), memory=False))
    of_outer: bool = True

    @cached_property
    def _inner(self) -> InnerProblem:
        return self.problem.bind(self.hparams, self.meter.counts)

    @cached_property
    def _first(self) -> InnerState:
        return begin(self.inner(), self.solver, self.params, self.carry)

    def inner(self) -> InnerProblem:
        """Return the problem at `hparams`, bound once."""
        return self._inner

    def begin(self) -> InnerState:
        """Return the first state, made once: warm where `carry` holds one, else cold at `params`."""
        return self._first

    def solve(self, visit: Callable[..., object] | None = None, *, at_least: int = 0) -> InnerRun:
        """Run the solver from a first state to its tolerance or its number of steps.

        Args:
            visit: is shown every state that a step starts from; a result of True ends the run there, before the step.
                Of rows, it is also given what `RowsVisit` says, and ends nothing.
            at_least: steps to take even where the tolerance is reached before.

        Returns:
            The last state, its own residual (never that of an iterate before it), and a verdict; failure is a verdict.
        """
        inner, first = self.inner(), self.begin()
        if visit is None and (flat := flat_run(inner, self.solver, first, at_least=at_least)) is not None:
            return flat.end
        end = run_inner(inner, self.solver, first, visit, at_least=at_least)
        if not inner.refused:
            return end
        return replace(end, form=f"step by step, as the loss is not recorded: {inner.refused}")


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

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def differentiates_steps(self) -> bool:
        """Whether the derivative is that of the steps, whose options may then be hyperparameters; default: no."""
        return False

    @property
    def open_tolerance(self) -> bool:
        """Whether it solves a system to a tolerance that nobody gave, so that a search may choose it; default: no."""
        return False

    @property
    def requires(self) -> Set[str]:
        """What a problem and an inner solver must have, by the names of `bilevel.base.requirements`.

        The default is that the inner solution decides the hypergradient, unless the steps are differentiated.
        """
        return frozenset(() if self.differentiates_steps else ("inner_solution",))

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Refuse a combination that the estimator does not cover: by default what lacks something that it `requires`.

        Raises:
            ValueError: with the remedy.
        """
        check_requirements(self, problem, solver)

    @property
    def rowwise(self) -> bool:
        """Whether `solve` takes rows: a problem that is a batch, of which each row ends by itself; default: no."""
        return False

    @property
    def taskwise(self) -> bool:
        """Whether of tasks that share nothing but hparams it gives the mean of what it gives of each; default: no."""
        return False

    def by_graph(self) -> HypergradEstimator:
        """Return what gives the same by letting autograd record the run, where there is that; by default itself."""
        return self

    def one_by_one(self, solver: InnerSolver) -> str:
        """Return why the rows of a batch run one after the other, and not side by side; empty where they do not."""
        if not self.rowwise:
            return f"{describe(self)} takes one problem at a time"
        return "" if solver.traits.rowwise else f"{describe(solver)} takes one problem at a time"

    def at_tolerance(self, tol: float) -> HypergradEstimator:
        """Return the estimator that a `target_error` asks for next, together with a smaller inner tolerance.

        `tol` is a relative residual of the adjoint system, where one is solved; the smallest is its own, where given.

        Raises:
            ValueError: for an estimator whose error no tolerance makes as small as one likes.
        """
        raise ValueError(
            f"{describe(self)} has no tolerance that leads to a `target_error`: use Implicit() or FullUnroll()."
        )

    def at_once(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry | None
    ) -> Exact | None:
        """Return the hypergradient with all its evidence where arrays on the host give it sooner than `solve`.

        The arguments are those of `hypergradient`, not looked at. None, the default, where there is no such way, and
        where anything is to be said of the arguments or the result: `hypergradient` then goes on as ever.
        """
        return None

    @abstractmethod
    def solve(self, run: Run) -> Solution:
        """Run the inner solver (``run.solve()``), and say how its result is differentiated."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls).get("solve")
        if given_after(cls, ("solve",), "at_once"):
            cls.at_once = HypergradEstimator.at_once  # type: ignore[method-assign]
        if given_after(cls, ("solve",), "taskwise"):
            cls.taskwise = HypergradEstimator.taskwise  # type: ignore[method-assign]
        if own is not None and "meter" in signature(own).parameters:
            warn(f"{cls.__name__}.solve takes one argument now: `solve(self, run)`.", DeprecationWarning)
            cls.solve = _of_six(own)  # type: ignore[method-assign, assignment]


def _of_six(solve: Callable[..., Solution]) -> Callable[[Any, Run], Solution]:
    """Return `solve(self, run)` of a method that takes the six values of a `Run` as arguments."""

    @wraps(solve)
    def of_run(self: Any, run: Run) -> Solution:
        return solve(self, run.problem, run.solver, run.hparams, run.params, run.carry, run.meter)

    return of_run
