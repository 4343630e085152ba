"""The pullback of the adaptive unrolls: sweep back as far as the budget pays for, then choose a tail or extrapolate.

A sweep back over the last n states gives the derivatives ``U_1, ..., U_n`` of ever longer tails. For a linear multistep
solver it also gives, without a further product, the adjoint sums

    lam_n = - sum_j v_j,   v_j the cotangent of the inner gradient at the j-th step back     (lam_n -> H^-1 w)

whose differences are the powers of one matrix on a vector near the solution: reduced rank extrapolation of lam_n and of
the iterates gives ``g_RRE = -C(xh)' lam``, far closer to the limit than ``U_n`` where n is short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Pullback, Variables
from bilevel.core import tree
from bilevel.core.status import GOOD, StepFailure, Verdict
from bilevel.core.tree import Tree
from bilevel.hypergrad.extrapolation import ADJOINT_ORDERS, OMEGA, best, counted, reduced_rank
from bilevel.inner.multistep import LinearMultistep
from bilevel.oracles.inner_problem import InnerProblem

SAFEGUARDS = 6.0
"""Gradient-equivalents of a look at the extrapolated iterate (1), two adjoint residuals (4) and a cross product (1)."""


@dataclass(frozen=True)
class Point:
    """The extrapolated iterate xh, accepted, and its inner residual, below that of the last iterate."""

    params: Tree
    residual: float


@dataclass(frozen=True)
class TailPullback:
    """The pullback of a run whose last states have been kept.

    Attributes:
        kept: states that the differentiated steps start from, in forward order.
        allowance: gradient-equivalents for one pullback; a step that would exceed them is not taken.
        choose: return the tail that is closest to ``g_RRE`` instead of the longest.
        extrapolate: return ``g_RRE``.
        point: the extrapolated iterate, or None where it was refused.
        note: why it was refused.
    """

    inner: InnerProblem
    solver: InnerSolver
    kept: Sequence[InnerState]
    allowance: float = float("inf")
    choose: bool = False
    extrapolate: bool = False
    point: Point | None = None
    note: str = ""

    def __call__(self, cotangent: Tree) -> Pullback:
        """Pull back one cotangent."""
        memory = tree.zeros_like(self.kept[-1].memory) if self.kept else ()
        # Adam's or a user's step is no linear iteration, so its adjoint sums have no limit to extrapolate to.
        sweep = self._multistep if self.solver.traits.multistep else self._stepwise
        swept = sweep((cotangent, memory))
        plain = Pullback(swept.total, steps=swept.steps, verdict=swept.verdict, error_note=self.note)
        if len(swept.adjoints) < 3:
            return plain
        adjoint = best(reduced_rank([*swept.adjoints], ADJOINT_ORDERS)).vector
        return self._closest(swept, adjoint) if self.choose else self._accept(swept, adjoint, cotangent, plain)

    def _multistep(self, cotangent: Variables) -> _Swept:
        """Sweep back by steps of one `vjp` each, so that what can be paid for is known before."""
        looks = self.extrapolate and self.point is not None
        limit = self.allowance - (SAFEGUARDS - 1.0 if looks else 0.0)
        most = (min(limit, OMEGA * len(self.kept)) + 1e-9) // OMEGA
        states = list(self.kept)[-max(1, int(most)) :]
        if not (self.choose or looks):
            return _Swept(self.solver.sweep_vjp(self.inner, states, cotangent)[1], len(states))
        solver, swept = cast(LinearMultistep, self.solver), _Swept(tree.zeros_like(self.inner.hparams), len(states))
        adjoint: Tree = None
        ravel_x, ravel_u = tree.Raveler(cotangent[0]), tree.Raveler(self.inner.hparams)

        def see(v: Tree) -> None:
            nonlocal adjoint
            adjoint = tree.scale(-1.0, v) if adjoint is None else tree.add(adjoint, v, -1.0)
            swept.adjoints.append(ravel_x.ravel(adjoint))

        for before in reversed(states):
            cotangent, part = solver.step_vjp(self.inner, before, cotangent, see)
            swept.total = tree.add(swept.total, part)
            if self.choose:
                swept.totals.append(ravel_u.ravel(swept.total))
        return swept

    def _stepwise(self, cotangent: Variables) -> _Swept:
        """Sweep back by steps of any cost; the most expensive one so far has to fit into what is left."""
        swept, dearest, start = _Swept(tree.zeros_like(self.inner.hparams)), 0.0, counted(self.inner)
        for before in reversed(self.kept):
            spent = counted(self.inner) - start
            if spent + dearest > self.allowance + 1e-9:
                break
            try:
                cotangent, part = self.solver.step_vjp(self.inner, before, cotangent)
            except StepFailure as failure:
                swept.verdict = failure.verdict
                break
            dearest = max(dearest, counted(self.inner) - start - spent)
            swept.total = tree.add(swept.total, part)
            swept.steps += 1
        return swept

    def _closest(self, swept: _Swept, adjoint: Tensor) -> Pullback:
        """Return the tail whose derivative is closest to the extrapolated one."""
        params = self.point.params if self.point is not None else self.solver.params(self.kept[-1])
        cross = self.inner.linearize(params).cross(tree.Raveler(params).unravel(adjoint))
        raveler = tree.Raveler(self.inner.hparams)
        distances = torch.linalg.vector_norm(torch.stack(swept.totals) + raveler.ravel(cross), dim=1)
        index = int(torch.argmin(distances))
        return Pullback(raveler.unravel(swept.totals[index]), steps=index + 1)

    def _accept(self, swept: _Swept, adjoint: Tensor, cotangent: Tree, plain: Pullback) -> Pullback:
        """Return ``g_RRE`` if extrapolation lowered the adjoint residual, else the plain tail with the reason."""
        assert self.point is not None
        point = self.inner.linearize(self.point.params)
        raveler = tree.Raveler(cotangent)

        def residual(vector: Tensor) -> float:
            return float(tree.norm(tree.add(cotangent, point.hvp(raveler.unravel(vector)), -1.0)))

        after, before = residual(adjoint), residual(swept.adjoints[-1])
        if not after < before:
            note = f"no extrapolation: it would raise the adjoint residual from {before:.2e} to {after:.2e}"
            return Pullback(plain.hparams, steps=plain.steps, error_note=note)
        solution = raveler.unravel(adjoint)
        size = float(tree.norm(cotangent))
        relative = after / size if size > 0 else 0.0
        return Pullback(tree.scale(-1.0, point.cross(solution)), solution, relative, swept.steps)


@dataclass
class _Swept:
    """What a sweep collects."""

    total: Tree
    steps: int = 0
    verdict: Verdict = GOOD
    adjoints: deque[Tensor] = field(default_factory=lambda: deque(maxlen=ADJOINT_ORDERS[-1] + 2))
    totals: list[Tensor] = field(default_factory=list)
