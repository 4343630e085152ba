"""Breaks of certificates, targets, the checker and the theory."""

from __future__ import annotations

from .row import Break

EVIDENCE = (
    Break(
        "refine-accuracy", "bilevel/certify/inverse.py", "\nACCURACY = 0.01\n", "\nACCURACY = 0.9\n", "test_certify.py"
    ),
    Break(
        "refine-smallest-eigenvalue",
        "bilevel/certify/inverse.py",
        "run.residual <= ACCURACY * smallest * run.size)",
        "run.residual <= ACCURACY * run.size)",
        "test_certify.py",
    ),
    Break(
        "refine-not-widened",
        "bilevel/certify/refine.py",
        "error *= (1 + unsolved) / (1 - min(step.nonlinearity, 0.5))",
        "error *= 1.0",
        "test_certify.py",
    ),
    Break(
        "refine-outside-the-quadratic-regime",
        "bilevel/certify/refine.py",
        "elif step.nonlinearity > NONLINEAR:",
        "elif step.nonlinearity != step.nonlinearity:",
        "test_certify.py",
    ),
    Break(
        "refine-large-first-correction",
        "bilevel/certify/refine.py",
        "elif turn == 1 and error > FIRST_ROUND * size:",
        "elif turn == 1 and error != error:",
        "test_certify.py",
    ),
    Break(
        "refine-unsettled",
        "bilevel/certify/refine.py",
        "unsettled = adjoint is None and not at_floor and (before is None or moved > MOVEMENT * error)",
        "unsettled = False",
        "test_certify.py",
    ),
    Break(
        "refine-rounding-left-out",
        "bilevel/certify/refine.py",
        "error, note = error + floor, f",
        "error, note = error, f",
        "test_certify.py",
    ),
    Break(
        "refine-negative-curvature",
        "bilevel/certify/inverse.py",
        "if bool(info) or smallest <= len(matrix)",
        "if smallest <= -1e300 * len(matrix)",
        "test_certify.py",
    ),
    Break(
        "refine-far-from-a-solution",
        "bilevel/certify/refine.py",
        "doubtful=unsolved <= UNSOLVED and step.nonlinearity > NONLINEAR",
        "doubtful=False",
        "test_certify.py",
    ),
    Break(
        "theory-unroll-bound",
        "bilevel/theory/bounds.py",
        "rho**steps * d0 + C * steps * rho ** _previous(steps) * e0",
        "rho**steps * d0 + C * steps * rho**steps * e0",
        "test_theory.py",
    ),
    Break(
        "theory-budget",
        "bilevel/theory/budget.py",
        "steps + math.floor(weight * dropped + ROUNDING), steps - dropped",
        "steps + math.ceil(weight * dropped + ROUNDING), steps - dropped",
        "test_theory.py",
    ),
)
