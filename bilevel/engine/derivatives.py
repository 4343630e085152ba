"""Whether the derivatives that a problem supplies are those of its values: differences along a few random directions.

A hypergradient and every evidence that is made of the same Hessian-vector products share a mistake in them. With d and
e random directions of params and hparams, of the size of these, differences of the inner gradient g and of both losses

    (g(x + t d) - g(x - t d)) / 2t  against  H d           <d, g(x, u + t e) - g(x, u - t e)> / 2t  against  <C' d, e>

see it. One step length that agrees acquits. Else a ladder of them decides: a derivative is called wrong only where the
differences at the three smallest steps above rounding agree with each other and forward differences with backward
ones. At a kink they do not, so that it is no wrong derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.core import rows, tree
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.derivative_lines import FAILURES, LONGEST, Claim, Line, Point, inner_lines, outer_lines
from bilevel.oracles.precision import widened
from bilevel.oracles.problem import BilevelProblem

STEPS = 8
"""Steps of the ladder, each a tenth of the one before, from `LONGEST` on."""
AGREED = 3
"""Steps that have to agree with each other before a derivative is called wrong."""
SHARE = 0.1
"""How far these may be apart, and how large rounding may be, as a share of the error."""
AGREES = 0.35
"""Power of the rounding unit: a smaller relative error is none (3e-6 in float64, 4e-3 in float32)."""
LEAST = 1e-4
"""The smallest relative error that is called wrong."""


def check_derivatives(
    problem: BilevelProblem, hparams: Tree, params: Tree, *, again: bool = False, outer: bool = True
) -> Verdict:
    """Return WRONG_DERIVATIVE where the derivatives of a loss at (params, hparams) are not those of its values.

    The verdict names the leaf and the size of the disagreement. A problem object, no batch, is looked at once, or
    `again`, one of this package's only then; the calls are not counted: like the look at the inputs they belong to the
    first call alone.
    """
    verdict = GOOD
    if problem.tested and not again:
        return verdict
    for which, lines in (("inner", inner_lines), ("outer", outer_lines)):
        if which == "outer" and not outer:
            continue
        seen = problem.derivatives_seen.get(which)
        if seen is None or (again and seen.status.ok):
            seen = problem.derivatives_seen[which] = _judged(problem, hparams, params, lines)
        verdict = verdict.worse(seen)
    return verdict


def looked_through(problem: BilevelProblem) -> bool:
    """Whether the losses of a problem and their derivatives have been looked at, here or by the package's tests."""
    seen, purity = problem.derivatives_seen, problem.purity
    looked = purity.known and purity.first is None
    return problem.tested or (looked and seen.get("inner") is GOOD and seen.get("outer") is GOOD)


def check_members(problem: BilevelProblem, hparams: Tree, params: Tree, usable: Sequence[bool], each: bool) -> Verdict:
    """Look at the members of a batch: at the first that is usable, or at each; the arguments are stacked."""
    verdict = GOOD
    for index in [index for index, good in enumerate(usable) if good][: None if each else 1]:
        u, x = rows.row(hparams, index), rows.row(params, index)
        verdict = verdict.worse(check_derivatives(problem.member(index), u, x, again=each))
    return verdict


def _judged(problem: BilevelProblem, hparams: Tree, params: Tree, lines: Any) -> Verdict:
    """Judge all lines, in float64 where the dtype of the problem leaves a doubt."""
    rest = problem.deterministic().smooth
    point = Point(rest, problem.trainable(params), hparams)
    try:
        if all(_agrees(line, point.eps) for make, groups in lines(point) for line in map(make, groups)):
            return GOOD
        if point.eps > torch.finfo(torch.float64).eps:
            x, u = (tree.tree_map(widened, each) for each in (point.params, hparams))
            point = Point(rest, x, u, wide=True)
        for make, groups in lines(point):
            result = [each for each in (_wrong(make(group), point.eps) for group in groups) if each is not None]
            if not result:
                continue
            # A direction in several leaves has found it: which of them is it?
            single = [_wrong(make([leaf]), point.eps) for group in groups if len(group) > 1 for leaf in group]
            error, claim = max([each for each in single if each is not None] or result, key=lambda each: each[0])
            detail = f"{claim.what} differs from differences of {claim.values} by {error:.2g} times its size"
            return Verdict(Status.WRONG_DERIVATIVE, detail)
    except FAILURES:
        return GOOD
    return GOOD


def _agrees(line: Line, eps: float) -> bool:
    """Whether differences of one good step length confirm all claims."""
    h = eps ** (1 / 3)
    ends = line.at(h), line.at(-h)
    if ends[0] is None or ends[1] is None:
        return False
    for claim in line.claims(0.0):
        gap, size = claim.error((ends[0][claim.part] - ends[1][claim.part]) / (2 * h))
        if not gap <= eps**AGREES * size:
            return False
    return True


def _wrong(line: Line, eps: float) -> tuple[float, Claim] | None:
    """Return the claim with the largest relative error among those that are certainly wrong, or None."""
    if _agrees(line, eps):
        return None
    middle = line.at(0.0)
    if middle is None:
        return None
    claims = list(line.claims(0.0))
    pending: dict[int, list[_Seen]] = {index: [] for index in range(len(claims))}
    h, last = line.longest, LONGEST * 0.1 ** (STEPS - 1)
    while h > 0.5 * last and pending:
        up, down = line.at(h), line.at(-h)
        for index in list(pending) if up is not None and down is not None else ():
            claim = claims[index]
            seen = _Seen.of(claim, up[claim.part], middle[claim.part], down[claim.part], h, eps)  # type: ignore[index]
            if seen is not None and seen.gap <= eps**AGREES * seen.size:
                del pending[index]
            elif seen is not None and seen.gap > seen.noise / SHARE:
                pending[index].append(seen)
        h *= 0.1
    errors = {index: _certain(seen) for index, seen in pending.items()}
    wrong = max(errors, key=lambda index: errors[index], default=None)
    if wrong is None or errors[wrong] < LEAST:
        return None
    # What is claimed at the ends of the smallest step is the same, unless the loss has a feature narrower than that.
    last_seen = pending[wrong][-1]
    for t in (last_seen.step, -last_seen.step):
        if not float((list(line.claims(t))[wrong].slope - claims[wrong].slope).norm()) <= SHARE * last_seen.gap:
            return None
    return errors[wrong], claims[wrong]


@dataclass(frozen=True)
class _Seen:
    """The differences at one step length."""

    step: float
    slope: Tensor  # the central difference
    gap: float  # its distance to the claim
    size: float  # what that is relative to
    curvature: float  # forward minus backward difference
    noise: float  # what rounding makes of the difference

    @classmethod
    def of(cls, claim: Claim, up: Tensor, middle: Tensor, down: Tensor, h: float, eps: float) -> _Seen | None:
        """Return it, or None where a value is not finite."""
        slope = (up - down) / (2 * h)
        gap, size = claim.error(slope)
        curvature = float((up - 2 * middle + down).norm()) / h
        # Sums that cancel have more rounding than their result shows: a thousand units of it.
        sizes = float(up.norm()), float(down.norm()), float(claim.slope.norm()), claim.size, claim.parts
        noise = 1e3 * eps * max(sizes) / h
        return cls(h, slope, gap, size, curvature, noise) if gap < float("inf") else None


def _certain(seen: Sequence[_Seen]) -> float:
    """Return the relative error if the smallest steps agree about it, else zero."""
    last = seen[-AGREED:]
    if len(last) < AGREED:
        return 0.0
    gap = min(each.gap for each in last)
    apart = max(float((a.slope - b.slope).norm()) for a in last for b in last)
    if max(apart, *(each.curvature for each in last)) > SHARE * gap:
        return 0.0
    return gap / max(each.size for each in last)
