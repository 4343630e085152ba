"""`Auto`: the estimator that fits problem, inner solver and memory, and one line that says which and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from bilevel.base import Carry, InnerSolver, Pullback, Solution, describe
from bilevel.core import tree
from bilevel.core.options import is_bool, is_positive, option, optional
from bilevel.core.status import Verdict
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.hypergrad.balanced_implicit import BalancedImplicit
from bilevel.hypergrad.balanced_run import FALLBACK
from bilevel.hypergrad.closed_form import ClosedForm
from bilevel.hypergrad.implicit import Implicit
from bilevel.hypergrad.spectral import Spectral
from bilevel.hypergrad.unroll import FullUnroll, TruncatedUnroll
from bilevel.linear import CG, GMRES
from bilevel.numerics.dense import FACTORED
from bilevel.oracles.exact import Exact
from bilevel.oracles.problem import BilevelProblem

CLOSED_FORM, BY_CG = ClosedForm(), Implicit(CG())


@dataclass(frozen=True)
class Choice:
    """An estimator and the reason for it, a clause."""

    estimator: HypergradEstimator
    reason: str

    def __str__(self) -> str:
        return _said(self)


OF_A_SPECTRUM = Choice(CLOSED_FORM, "the spectrum of the inner Hessian is known")


@dataclass(frozen=True)
class Auto(HypergradEstimator):
    """Choose an estimator by the structure of the problem; the status says in one line which and why.

    For the derivative of the solution, in this order:

    - `ClosedForm` where the inner loss is quadratic and its Hessian fits into memory (or its spectrum is known);
    - ``Implicit(GMRES())`` for an optimality map, whose Jacobian need not be symmetric;
    - ``Implicit(CG())`` where a run ends at a tolerance and the inner loss is known to be convex, and where a balanced
      run is refused: batches, samplers, solvers whose steps have no derivative to fall back on, too little memory;
    - `BalancedImplicit` otherwise, which takes a truncated tail where the Hessian is not positive definite.

    With ``unroll=True``, for the derivative of the iterate itself: `Spectral` where there is a spectrum, else
    `FullUnroll`: with stored iterates if they fit, forward if there is one hyperparameter, with checkpoints if those
    fit, and at last `TruncatedUnroll` with as long a tail as fits. ``"auto"`` stands for ``Auto()`` wherever an
    estimator is asked for.

    Args:
        memory_limit: bytes that an estimator may keep; default 1 GiB.
        unroll: differentiate the inner steps that are taken, not the solution.
        tol: relative residual of the adjoint system, where one is solved; default: the linear solver's.

    >>> from bilevel import GradientDescent, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> str(Auto().choose(problem, GradientDescent(), problem.start(), problem.start()))
    'auto chose ClosedForm(): the inner loss is quadratic, and its Hessian fits into memory'
    """

    memory_limit: float = option(2.0**30, "a positive number of bytes", is_positive)
    unroll: bool = option(False, "True or False", is_bool)
    tol: float | None = option(None, "a positive number or None", optional(is_positive))

    rowwise = True

    @property
    def resumes(self) -> bool:  # type: ignore[override]
        return not self.unroll

    @property
    def differentiates_steps(self) -> bool:
        return self.unroll

    def at_tolerance(self, tol: float) -> Auto:
        return replace(self, tol=max(tol, self.tol or 0.0))

    def choose(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree) -> Choice:
        """Return the estimator and the reason; of hparams and params the sizes count."""
        chosen = (self._unrolled if self.unroll else self._of_the_solution)(problem, solver, hparams, params)
        if self.tol is None:
            return chosen
        return replace(chosen, estimator=chosen.estimator.at_tolerance(self.tol))

    def _of_the_solution(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree) -> Choice:
        if problem.batch is not None:
            return Choice(BY_CG, "the members of a batch share the products of one linear solve")
        if problem.nonsmooth is not None:
            return Choice(BY_CG, "with a nonsmooth term the solution moves on its support alone")
        if problem.has_spectrum:
            return OF_A_SPECTRUM
        (like, *_), size = tree.leaves(params), tree.size(params)
        bytes_each = like.element_size()
        if problem.structure.quadratic and size <= FACTORED and 3 * size**2 * bytes_each <= self.memory_limit:
            return Choice(CLOSED_FORM, "the inner loss is quadratic, and its Hessian fits into memory")
        if not problem.symmetric:
            return Choice(Implicit(GMRES()), "the Jacobian of an optimality map need not be symmetric")
        if problem.variation:
            return Choice(BY_CG, f"with {problem.variation}, a run cannot be balanced or extrapolated")
        if not solver.traits.differentiable:
            return Choice(BY_CG, f"the steps of {type(solver).__name__} have no derivative")
        _, tol = solver.limits(like.dtype)
        if tol is not None and problem.certifiable() is not None:
            return Choice(BY_CG, "the run ends at a tolerance, near the minimum of a convex loss")
        if FALLBACK * size * bytes_each > self.memory_limit:
            return Choice(BY_CG, f"{FALLBACK} iterates, which a balanced run keeps, do not fit into memory")
        return Choice(BalancedImplicit(), "it shares the work, and takes a tail where the Hessian is indefinite")

    def _unrolled(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree) -> Choice:
        (like, *_), size, count = tree.leaves(params), tree.size(params), tree.size(hparams)
        fixed = solver.traits.multistep and solver.tol is None and solver.steps is not None
        if fixed and problem.batch is None and problem.has_spectrum:
            return Choice(Spectral(), "the steps of a linear method happen on the spectrum, which is known")
        steps, _ = solver.limits(like.dtype)
        state = 3 * size * like.element_size()
        fits = int(self.memory_limit // state)
        if steps <= fits:
            return Choice(FullUnroll(), f"{steps} states fit into memory")
        if count == 1:
            return Choice(FullUnroll(mode="forward"), f"{steps} states do not fit, and there is one hyperparameter")
        if 2 * steps**0.5 <= fits and problem.batch is None:
            return Choice(FullUnroll(memory="checkpoint"), f"{steps} states do not fit into memory, but checkpoints do")
        return Choice(TruncatedUnroll(tail=max(1, fits)), f"of {steps} states the last {max(1, fits)} fit into memory")

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Let what it chooses check, after a look at the solver; ValueError as there."""
        super().check(problem, solver, hparams)
        self.choose(problem, solver, hparams, problem.start()).estimator.check(problem, solver, hparams)

    def at_once(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry | None
    ) -> Exact | None:
        if self.unroll or problem.params is None:
            return None
        choice = self.choose(problem, solver, hparams, problem.params)
        exact = choice.estimator.at_once(problem, solver, hparams, params, carry)
        return None if exact is None else exact._replace(detail=str(choice))

    def solve(self, run: Run) -> Solution:
        choice = self.choose(run.problem, run.solver, run.hparams, run.params)
        solved = choice.estimator.solve(run)

        def pullback(cotangent: Tree) -> Pullback:
            pulled = solved.pullback(cotangent)
            # A verdict that is fine says nothing, so that the one that names the choice stands.
            return replace(pulled, verdict=_named(choice, pulled.verdict, doubts=True))

        return replace(solved, pullback=pullback, verdict=_named(choice, solved.verdict))


AUTO = Auto()


@lru_cache
def _said(choice: Choice) -> str:
    return f"auto chose {describe(choice.estimator)}: {choice.reason}"


def as_estimator(given: Any) -> Any:
    """Return `Auto` for "auto", and anything else as it is."""
    return AUTO if isinstance(given, str) and given == "auto" else given


def _named(choice: Choice, verdict: Any, doubts: bool = False) -> Any:
    """Put the choice in front of what a verdict says, or each of those of rows; `doubts`: of none that is fine."""
    if not isinstance(verdict, Verdict):
        return [_named(choice, each, doubts) for each in verdict]
    if doubts and verdict.status.ok:
        return verdict
    return replace(verdict, detail=f"{choice}; {verdict.detail}" if verdict.detail else str(choice))
