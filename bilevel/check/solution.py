"""Checks at the inner solution: whether it is reached, and how the Hessian is curved there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.check.losses import kinks as kinks_between
from bilevel.check.report import Finding, Judgement
from bilevel.check.subject import Subject
from bilevel.core import tree
from bilevel.core.options import default_tolerance
from bilevel.core.tree import Tree
from bilevel.engine.judge import InnerRun
from bilevel.engine.kinks import kinked
from bilevel.engine.loop import run_inner
from bilevel.inner import QuasiNewton
from bilevel.inner.newton import newton_to_rounding
from bilevel.numerics.dense import EIGENVALUES
from bilevel.numerics.lanczos import lanczos

LANCZOS_STEPS = 100


@dataclass(frozen=True)
class Solved:
    """The inner problem solved twice: as the user does (`run`), and as well as possible from there.

    `reached` are the params of the run without running statistics, `params` the inner solution, or None where none was
    found, and `residual` is the norm of the inner gradient there.
    """

    run: InnerRun
    reached: Tree
    params: Tree
    residual: float
    finding: Finding


@dataclass(frozen=True)
class Curvature:
    """The ends of the spectrum of the Hessian at the solution; of a Jacobian, those of the real parts.

    `flat` is the share of the outer gradient in directions without curvature, `ends` the sum of the eigenvectors of
    both ends, or else a random direction; of length one.
    """

    smallest: float
    largest: float
    flat: float
    ends: Tree


def solve(subject: Subject) -> Solved:
    """Run the inner solver, and go on from its result with a solver that converges where one can."""
    inner = subject.problem.bind(subject.hparams)
    first = float(tree.norm(inner.grad(subject.start)))
    given, solver = subject.given.bind(subject.hparams), subject.given.augmented(subject.solver)
    run = run_inner(given, solver, solver.init(given, subject.given_start))
    status, sentence = run.verdict.status, str(run.verdict)
    reached = subject.given.trainable(solver.params(run.state))
    params, residual = _polished(subject, reached if status.usable else subject.start)
    if status.ok:
        name = type(subject.solver).__name__
        sentence = f"{name} took {run.steps} steps; the inner gradient norm fell from {first:.2g}."
    judgement: Judgement = "ok" if status.ok else "note" if status.usable else "fault"
    finding = Finding("inner solve", judgement, sentence, run.residual, status)
    scale = max(first, float(tree.norm(inner.grad(subject.away[0]))))
    if not residual <= max(1e3 * default_tolerance(subject.dtype), 1e-5 * scale):
        params = None
    return Solved(run, reached, params, residual, finding)


def kinks(subject: Subject, solved: Solved) -> Finding:
    """Look for kinks of the inner loss on the way of the user's run, and where it ends."""
    run = solved.run
    if run.verdict.status.usable and not 0 <= run.residual <= default_tolerance(subject.dtype):
        start = float(tree.norm(subject.gradient(subject.start, subject.hparams)))
        kink = kinked(subject.given, subject.hparams, subject.solver, run.state, run.residual, start)
        if not kink.status.ok:
            return Finding("kinks", "fault", str(kink), run.residual, kink.status)
    return kinks_between(subject, solved.reached)


def _polished(subject: Subject, params: Tree) -> tuple[Tree, float]:
    """Return the inner solution found from some params, with its residual."""
    inner = subject.problem.bind(subject.hparams)
    before = float(tree.norm(inner.grad(params)))
    if subject.problem.symmetric:
        solver = QuasiNewton(tol=default_tolerance(subject.dtype), steps=500)
        run = run_inner(inner, solver, solver.init(inner, params))
        # At the rounding floor the last search may fail; the state is still the best one.
        result = solver.params(run.state)
    else:
        small = tree.size(params) <= EIGENVALUES
        result = newton_to_rounding(inner, params)[0] if small else params
    after = float(tree.norm(inner.grad(result)))
    return (result, after) if after <= before or not math.isfinite(before) else (params, before)


# Curvature -----------------------------------------------------------------------------------------------------------


def curvature(subject: Subject, params: Tree) -> Curvature:
    """Measure the ends of the spectrum, by a dense eigenproblem or by Lanczos."""
    point = subject.problem.bind(subject.hparams).linearize(params)
    raveler, random = tree.Raveler(params), subject.direction(params, 700)
    if raveler.size > EIGENVALUES:
        measured = lanczos(
            lambda v: raveler.ravel(point.hvp(raveler.unravel(v))), raveler.ravel(params), LANCZOS_STEPS, rtol=0.0
        )
        return Curvature(measured.smallest, measured.largest, 0.0, random)
    matrix = point.dense_hessian().double()
    if not subject.problem.symmetric:
        values = torch.linalg.eigvals(matrix).real
        return Curvature(float(values.min()), float(values.max()), 0.0, random)
    values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
    null = vectors[:, values.abs() <= _flat_below(subject, float(values[-1]))]
    _, by_params, _ = subject.problem.outer_value_and_grads(params, subject.hparams)
    flat = _share(null, raveler.ravel(by_params).double())
    both = vectors[:, 0] + vectors[:, -1] if raveler.size > 1 else vectors[:, 0]
    ends = raveler.unravel((both / both.norm()).to(subject.dtype))
    return Curvature(float(values[0]), float(values[-1]), flat, ends)


def _flat_below(subject: Subject, largest: float) -> float:
    """Return the curvature below which a direction counts as flat."""
    return abs(largest) * max(1e-10, 100 * subject.eps)


def _share(basis: Tensor, vector: Tensor) -> float:
    size = float(vector.norm())
    return float((basis.t() @ vector).norm()) / size if size > 0 and basis.shape[1] else 0.0


def definiteness(subject: Subject, solved: Solved, result: Curvature) -> Finding:
    """Judge the curvature at the solution, and at the params that the user's solver returned."""
    name, low, high = "curvature", result.smallest, result.largest
    flat = _flat_below(subject, high)
    if low < -max(flat, 1e-8 * abs(high)):
        return Finding(name, "fault", _negative(subject, low, high), low)
    if low <= flat:
        if result.flat > 1e-6:
            sentence = (
                f"the inner Hessian is singular at the solution (eigenvalues from {low:.1e} to {high:.2g}), and "
                f"{result.flat:.0%} of the outer gradient lies in flat directions: the inner solution is not unique; "
                "add a penalty, or `Implicit(damping=...)`."
            )
            return Finding(name, "fault", sentence, low)
        sentence = (
            f"the inner Hessian is singular to rounding at the solution (eigenvalues from {low:.1e} to {high:.2g}), in "
            "directions that the outer loss does not see."
        )
        return Finding(name, "note", sentence, low)
    if subject.problem.symmetric and solved.run.verdict.status.usable:
        there = curvature(subject, solved.reached)
        if there.smallest < -1e-8 * abs(there.largest):
            sentence = (
                "positive definite at the solution, but at the last inner iterate the Hessian has the eigenvalue "
                f"{there.smallest:.2g}: take more inner steps before Implicit, or unroll."
            )
            return Finding(name, "note", sentence, there.smallest)
    condition = high / low
    if condition > 1e8:
        sentence = (
            f"the inner Hessian is nearly singular (condition number {condition:.1e}): linear solves and unrolls need "
            "very many steps; add a penalty."
        )
        return Finding(name, "note", sentence, condition)
    what = "spectrum" if subject.problem.symmetric else "real parts of the eigenvalues"
    return Finding(
        name, "ok", f"{what} in [{low:.3g}, {high:.3g}] at the solution, condition number {condition:.3g}.", low
    )


def no_solution(subject: Subject, solved: Solved) -> Finding:
    """Say what the curvature is where the search for a solution ended, or at the start."""
    usable = solved.run.verdict.status.usable
    result = curvature(subject, solved.reached if usable else subject.start)
    if result.smallest < -1e-8 * abs(result.largest):
        where = "at the last inner iterate" if usable else "at the start"
        sentence = (
            f"the inner Hessian has the eigenvalue {result.smallest:.3g} {where} (negative curvature; the largest is "
            f"{result.largest:.3g}) and no minimum was found: add a penalty or a damping above {-result.smallest:.2g}."
        )
        return Finding("curvature", "fault", sentence, result.smallest)
    sentence = (
        f"no inner solution was found (the gradient norm stays at {solved.residual:.1e}), so implicit differentiation "
        "does not apply: take more inner steps, add a penalty, or unroll."
    )
    return Finding("curvature", "note", sentence, solved.residual)


def _negative(subject: Subject, low: float, high: float) -> str:
    if not subject.problem.symmetric:
        return (
            f"the Jacobian of the optimality map has an eigenvalue with real part {low:.3g} at its zero, so the step "
            "`params - optimality(params, hparams)` moves away from it: the update expands, or the map's sign is "
            "wrong."
        )
    return (
        f"the inner Hessian has the eigenvalue {low:.3g} at the inner solution (negative curvature; the largest is "
        f"{high:.3g}), so this is no minimum: add a penalty or a damping above {-low:.2g}, or start elsewhere."
    )
