"""The evidence about a stochastic single loop: where it is, seen on all data, and how far from the inner solution."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import torch

from bilevel.base import Carry, Certificate, Estimate
from bilevel.core import tree
from bilevel.core.cost import Cost
from bilevel.core.status import Status, Verdict
from bilevel.engine.attempt import error_verdict
from bilevel.hypergrad.hypergradient import hypergradient
from bilevel.hypergrad.implicit import Implicit
from bilevel.inner import QuasiNewton


def evaluated(loop: Any, verdict: Verdict, steps: int, began: float) -> tuple[Estimate, float]:
    """Return the estimate at the present (w, v, u) of a `SingleLoop`, and the outer loss by which they compare.

    Args:
        loop: the loop.
        verdict: what is to be said of the steps.
        steps: since the last record.
        began: when they began.

    Returns:
        The estimate, whose hypergradient is ``f_u + C' v`` on all data, and the outer loss at the inner solution where
        that is known, else at w.
    """
    counts: Counter[str] = Counter()
    w, v, u = loop.params, loop.adjoint, loop.hparams
    inner = loop.all_data.bind(u, counts)
    gradient = inner.grad(w)
    product, cross = inner.linearize(w).vjp(v)
    loss, of_w, of_u = loop.all_data.outer_value_and_grads(w, u)
    counts["outer"] += 1
    slope = tree.add(of_u, cross)
    value, size, residual = float(loss), float(tree.norm(of_w)), float(tree.norm(gradient))
    if verdict.status.usable and not math.isfinite(value + residual + float(tree.norm(slope))):
        verdict = Verdict(Status.NOT_FINITE, f"at step {loop.steps_taken} a loss or its gradient on all data is")
    error, note, best = None, "ask with certify=True", value
    counts += _spent(loop, steps)
    if loop.certify and verdict.status.usable:
        exact = hypergradient(loop.all_data, QuasiNewton(), Implicit(), u, w, check=False, on_failure="return")
        counts += Counter(exact.cost.counts)
        note = f"there is no hypergradient at the inner solution: {exact.verdict}"
        if exact.status.usable:
            best, note = exact.outer_loss, "the distance to the hypergradient at the inner solution"
            error = float(tree.norm(tree.add(slope, exact.hypergradient, -1.0)))
            verdict = verdict.worse(exact.verdict).worse(error_verdict(loop.all_data, u, w, slope, v, error))
    certificate = Certificate(
        inner_residual=residual,
        adjoint_residual=float(tree.norm(tree.add(product, of_w))) / size if size > 0 else 0.0,
        inner_steps=steps,
        adjoint_steps=steps,
        error=error,
        error_kind="none" if error is None else "estimate",
        error_note=note,
        value_error=-float(tree.dot(v, gradient)),
        measured={"step_size": loop.state.rate},
        form=loop.directions.form,
    )
    if not verdict.status.usable:
        slope = tree.tree_map(lambda leaf: torch.full_like(leaf, math.nan), slope)
    cost = Cost(counts, time.perf_counter() - began)
    return Estimate(value, slope, w, certificate, cost, verdict, Carry()), best


def _spent(loop: Any, steps: int) -> Counter[str]:
    """Return the oracle calls that steps stand for: a batch counts by its share of the rows."""
    inner, outer = loop.directions.shares
    passes = loop.method.first_passes if loop.steps_taken == steps else 0
    calls = {"gradient": steps * inner, "vjp": steps * inner, "outer": steps * outer}
    return Counter({kind: count + passes for kind, count in calls.items()})
