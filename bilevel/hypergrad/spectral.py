"""Unrolling on the spectrum: the number that `FullUnroll` gives, from d numbers instead of K steps.

For a quadratic inner loss whose Hessian is ``A + s(u) I``, all inner steps of a linear multistep solver happen
coordinate by coordinate in the eigenbasis of A, and so does their derivative:

    x_K = Q z_K(lam, b),   lam = a + s(u):      u' = (ds/du)' sum_i w_i dz_i/dlam_i + ...,   w = Q' cotangent

Gradient descent has ``z_K = r^K z_0 - h b (1 - r^K) / (1 - r)``, r = 1 - h lam, in closed form; the other methods run
their own recurrence on the spectrum (`bilevel.hypergrad.recurrence`). The residual polynomials are those of
Scieur et al. 2022, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from bilevel.base import Carry, InnerSolver, InnerState, Pullback, Solution
from bilevel.core.options import option, optional
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.loop import conclude
from bilevel.hypergrad.eigenbasis_sweep import Sweep, outer_at, stacked
from bilevel.hypergrad.recurrence import unroll
from bilevel.hypergrad.tail import check_length, is_tail, length_of
from bilevel.inner.multistep import LinearMultistep
from bilevel.numerics.eigenbasis import Eigenbasis
from bilevel.oracles.exact import Exact
from bilevel.oracles.precision import DoublePrecision
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class Spectral(HypergradEstimator):
    """Differentiate all inner steps, or the last of them, on the spectrum of a quadratic inner loss.

    Params, hypergradient and warm start are those of `FullUnroll` (or of `TruncatedUnroll(tail)`) to rounding, at a
    cost that does not grow with the number of steps for solvers whose numbers settle (gradient descent, heavy ball,
    Nesterov, asymptotic Sobolev), and by a few operations on d numbers a step for the others. It needs a problem with a
    `spectrum`: ridge regression with one penalty for all weights, or a `QuadraticProblem` whose H_j are multiples of
    the identity. The eigenproblem is solved once for each problem; neither it nor a step on the spectrum is counted.
    All of that is arithmetic in float64, the outer gradient included: float32 is the dtype of data and results alone.

    Args:
        tail: number of last steps that are differentiated (an int), their fraction (a float in (0, 1]), or None: all.

    >>> Spectral(tail=0.5)
    Spectral(tail=0.5)
    """

    tail: int | float | None = option(
        None, "a positive int (steps), a float in (0, 1] (fraction) or None", optional(is_tail)
    )

    requires = frozenset({"eigenbasis", "multistep", "fixed_steps"})
    measures_memory = False

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Refuse, besides what lacks something that is required, a tail longer than the run; ValueError says so."""
        super().check(problem, solver, hparams)
        check_length(self, solver)

    def at_once(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry | None
    ) -> Exact | None:
        state = None if carry is None else carry.state
        start = state.params if state is not None else problem.params if params is None else params
        multistep, same = cast(LinearMultistep, solver), solver.traits.stationary_from == 0
        if self.tail is not None or solver.steps is None or solver.tol is not None or not same:
            return None
        if not solver.follows_coefficients or not multistep.begins_as_given:
            return None
        if multistep.automatic or multistep.vectors(start):
            return None
        numbers = multistep.coefficients(InnerState(None))
        of_all = numbers.mix[0][0], numbers.read[0], numbers.write[0]
        return problem.stepped(hparams, start, of_all, solver.steps)

    def solve(self, run: Run) -> Solution:
        basis, multistep, steps = self._parts(run.problem, run.solver, run.hparams)
        tail, inner, first = length_of(self.tail, steps), run.inner(), run.begin()
        diagonal = basis.bind(inner.hparams)
        vectors = torch.stack([basis.turn(vector) for vector in (first.params, *first.memory)])
        moving = unroll(multistep, [first], diagonal, vectors, tail)
        reached = [basis.back(vector) for vector in moving.vectors]
        last, *memory = [vector.to(first.params) for vector in reached]
        state = InnerState(last, tuple(memory), first.steps + steps, first.measured)
        end = conclude(inner, multistep, first, state, steps)
        by_value, by_linear = moving.by_value[0], moving.by_linear[0]

        def pullback(cotangent: Tree) -> Pullback:
            right = cotangent
            if run.of_outer and right.dtype != reached[0].dtype:
                # At the params before they are rounded, which the factors of a near-singular H enlarge.
                with DoublePrecision():
                    _, right, _ = run.problem.outer_value_and_grads(reached[0], inner.hparams)
            weights = basis.turn(right)
            return Pullback(diagonal.pull(weights * by_value, weights * by_linear).to(cotangent), steps=tail)

        return replace(end.solution(last, pullback), form="eigenbasis")

    def sweep(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tensor, params: Tree = None) -> Sweep:
        """Return outer losses and hypergradients at many hyperparameter vectors at once, each from a cold start.

        Numbers that are "auto" are measured for each vector. A run that diverges shows in its residual.

        Args:
            problem: a problem with a spectrum.
            solver: a linear multistep solver with a number of steps.
            hparams: B hyperparameter vectors, stacked along the first dimension.
            params: where the runs start, one for all or B stacked ones; default: the problem's start.

        Raises:
            ValueError: as `check` does, or if `hparams` is no stack.
        """
        basis, multistep, steps = self._parts(problem, solver, hparams)
        starts, hparams = stacked(problem, hparams, params)
        # What is measured depends on the hyperparameters; given numbers are the same for all of them.
        count = len(hparams) if multistep.automatic else 1
        states = [multistep.init(problem.bind(u), x) for u, x in zip(hparams[:count], starts[:count], strict=True)]
        diagonal = basis.bind(hparams)
        first = basis.turn(torch.stack([starts, *multistep.vectors(starts)]))
        moving = unroll(multistep, states, diagonal, first, length_of(self.tail, steps))
        iterates = moving.vectors[0]
        residuals = torch.linalg.vector_norm(diagonal.values * iterates + diagonal.linear, dim=-1)
        solved = basis.back(iterates)
        values, by_params, by_hparams = outer_at(problem, solved, hparams)
        weights = basis.turn(by_params)
        pulled = diagonal.pull(weights * moving.by_value[0], weights * moving.by_linear[0])
        values, gradients, solved, residuals = (x.to(starts) for x in (values, by_hparams + pulled, solved, residuals))
        return Sweep(values, gradients, solved, residuals)

    def _parts(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree
    ) -> tuple[Eigenbasis, LinearMultistep, int]:
        """Return the eigenbasis, the solver and its number of steps; ValueError where `check` refuses them."""
        self.check(problem, solver, hparams)
        return cast(Eigenbasis, problem.spectrum()), cast(LinearMultistep, solver), cast(int, solver.steps)
