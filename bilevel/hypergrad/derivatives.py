"""Whether the derivatives that a problem supplies are those of its values: differences along a few random directions.

A hypergradient and every evidence that is made of the same Hessian-vector products share a mistake in them. With d and
e random directions of params and hparams, of the size of these, differences of the inner gradient g and of both losses

    (g(x + t d) - g(x - t d)) / 2t  against  H d           <d, g(x, u + t e) - g(x, u - t e)> / 2t  against  <C' d, e>

see it. One step length that agrees acquits. Else a ladder of them decides: a derivative is called wrong only where the
differences at the three smallest steps above rounding agree with each other and forward differences with backward
ones. At a kink they do not, so that it is no wrong derivative.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import members, tree
from bilevel.base import Pullback, Solution
from bilevel.oracles import Linearization
from bilevel.precision import DoublePrecision, widened
from bilevel.problem import BilevelProblem
from bilevel.status import GOOD, Status, Verdict
from bilevel.tree import Tree

GROUPS = 8
"""The most directions of hparams: one for each leaf, or for some leaves together where there are more."""
STEPS = 8
"""Steps of the ladder, each a tenth of the one before, from `LONGEST` on."""
LONGEST = 0.1
AGREED = 3
"""Steps that have to agree with each other before a derivative is called wrong."""
SHARE = 0.1
"""How far these may be apart, and how large rounding may be, as a share of the error."""
LEAST = 1e-3
"""The smallest relative error that is called wrong."""
FAILURES = (ValueError, RuntimeError, ArithmeticError, AssertionError, TypeError, LookupError)
"""What a loss may raise at hyperparameters that it does not allow: nothing is concluded from those."""


@dataclass(frozen=True)
class _Claim:
    """The derivative that a problem claims of one of the values on a line.

    Attributes:
        what: how the sentence calls it.
        values: how the sentence calls what it should be the derivative of.
        part: which value.
        slope: the claim, in float64.
        size: errors are relative to at least this.
    """

    what: str
    values: str
    part: int
    slope: Tensor
    size: float

    def error(self, measured: Tensor) -> tuple[float, float]:
        """Return (distance, what it is relative to)."""
        sizes = float(measured.norm()), float(self.slope.norm()), self.size
        return float((measured - self.slope).norm()), max(sizes)


@dataclass(frozen=True)
class _Line:
    """Values along a line through the point, and the derivatives that are claimed there."""

    values: Callable[[float], Sequence[Tensor]]
    claims: Sequence[_Claim]
    longest: float = LONGEST

    def at(self, t: float) -> Sequence[Tensor] | None:
        """Return the values in float64, or None where they cannot be had."""
        try:
            return [part.detach().double().reshape(-1) for part in self.values(t)]
        except FAILURES:
            return None


def check_derivatives(
    problem: BilevelProblem, hparams: Tree, params: Tree, *, again: bool = False, outer: bool = True
) -> Verdict:
    """Compare the derivatives of both losses at one point with differences, once for a problem object.

    The calls are not counted: like the look at the inputs they belong to the first call alone.

    Args:
        problem: the problem, not a batch.
        hparams: hyperparameters, detached.
        params: the inner solution at which derivatives have been taken.
        again: look also where this problem has been looked at before.
        outer: whether the outer loss is looked at, too.

    Returns:
        `GOOD`, or WRONG_DERIVATIVE with the leaf and the size of the disagreement.
    """
    verdict = GOOD
    for which, lines in (("inner", _inner_lines), ("outer", _outer_lines)):
        if which == "outer" and not outer:
            continue
        seen = problem.derivatives_seen.get(which)
        if seen is None or (again and seen.status.ok):
            seen = problem.derivatives_seen[which] = _judged(problem, hparams, params, lines)
        verdict = verdict.worse(seen)
    return verdict


def confirmed(problem: BilevelProblem, hparams: Tree, solved: Solution) -> Solution:
    """Return the solution with a pullback that fails where derivatives of the inner loss are wrong.

    Args:
        problem: the problem; its outer loss is not used.
        hparams: hyperparameters, detached.
        solved: the solution.
    """

    def pullback(cotangent: Tree) -> Pullback:
        pulled = solved.pullback(cotangent)
        if not pulled.verdict.status.usable:
            return pulled
        wrong = check_derivatives(problem, hparams, solved.params, outer=False)
        return replace(pulled, verdict=pulled.verdict.worse(wrong))

    return replace(solved, pullback=pullback)


def check_members(problem: BilevelProblem, hparams: Tree, params: Tree, usable: Sequence[bool], each: bool) -> Verdict:
    """Look at the members of a batch: at the first that is usable, or at each; the arguments are stacked."""
    verdict = GOOD
    for index in [index for index, good in enumerate(usable) if good][: None if each else 1]:
        u, x = members.row(hparams, index), members.row(params, index)
        verdict = verdict.worse(check_derivatives(problem.member(index), u, x, again=each))
    return verdict


def _judged(problem: BilevelProblem, hparams: Tree, params: Tree, lines: Any) -> Verdict:
    """Judge all lines, in float64 where the dtype of the problem leaves a doubt."""
    rest = problem.at_rest()
    point = _Point(rest, problem.trainable(params), hparams)
    try:
        if all(_agrees(line, point.eps) for make, groups in lines(point) for line in map(make, groups)):
            return GOOD
        if point.eps > torch.finfo(torch.float64).eps:
            x, u = (tree.tree_map(widened, each) for each in (point.params, hparams))
            point = _Point(rest, x, u, wide=True)
        for make, groups in lines(point):
            found = [each for each in (_wrong(make(group), point.eps) for group in groups) if each is not None]
            if not found:
                continue
            # A direction in several leaves has found it: which of them is it?
            single = [_wrong(make([leaf]), point.eps) for group in groups if len(group) > 1 for leaf in group]
            error, claim = max([each for each in single if each is not None] or found, key=lambda each: each[0])
            detail = f"{claim.what} differs from differences of {claim.values} by {error:.2g} times its size"
            return Verdict(Status.WRONG_DERIVATIVE, detail)
    except FAILURES:
        return GOOD
    return GOOD


class _Point:
    """The point, and random directions of the size of what they move."""

    def __init__(self, problem: BilevelProblem, params: Tree, hparams: Tree, wide: bool = False) -> None:
        self.problem, self.params, self.hparams, self._wide = problem, params, hparams, wide
        self.eps = torch.finfo(tree.leaves(params)[0].dtype).eps
        self.d, self.e = _direction(params, 1), _direction(hparams, 2)

    def wide(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which data are widened, too."""
        return DoublePrecision() if self._wide else contextlib.nullcontext()

    def gradient(self, params: Tree, hparams: Tree) -> Tree:
        """Return the inner gradient, by the problem's own oracle."""
        with self.wide():
            return self.problem.bind(hparams).grad(params)


def _direction(values: Tree, seed: int) -> Tree:
    """Return normal numbers, in every leaf of the size of its numbers; of all where they are zero, or else one."""
    generator = torch.Generator().manual_seed(seed)
    overall = _size(values)

    def drawn(leaf: Tensor) -> Tensor:
        normal = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        return (normal * (_size(leaf) or overall or 1.0)).to(leaf)

    return tree.tree_map(drawn, values)


def _size(values: Tree) -> float:
    """Return the root mean square of all numbers, in float64, where squares of small ones do not vanish."""
    squares = sum(float(leaf.detach().double().square().sum()) for leaf in tree.leaves(values))
    return float((squares / tree.size(values)) ** 0.5)


def _only(values: Tree, positions: Sequence[int]) -> Tree:
    """Return the tree with zeros in all leaves but some."""
    leaves = [leaf if i in positions else torch.zeros_like(leaf) for i, leaf in enumerate(tree.leaves(values))]
    return tree.rebuild(values, leaves)


def _named(what: str, values: Tree, positions: Sequence[int]) -> str:
    return " and ".join(f"`{what}{name}`" for i, name in enumerate(tree.names(values)) if i in positions)


# Lines ---------------------------------------------------------------------------------------------------------------

_Lines = Iterator[tuple[Callable[[Sequence[int]], _Line], Sequence[Sequence[int]]]]
"""Pairs of (a function of leaf positions that returns the line along these leaves, groups of positions)."""


def _inner_lines(point: _Point) -> _Lines:
    """Yield the lines of the inner gradient in params and in hparams, and of the inner loss."""
    problem, x, u, d, e = point.problem, point.params, point.hparams, point.d, point.e
    with point.wide():
        here = problem.bind(u).linearize(x)
        products = _products(here, d)
        pushed = None
        if type(here)._jvp is not Linearization._jvp or type(here)._cross_jvp is not Linearization._cross_jvp:
            pushed = here.jvp(d, tree.zeros_like(u)), here.jvp(tree.zeros_like(x), e)
    every = range(len(tree.leaves(x)))
    what, values = "the derivative of the inner gradient by", "that gradient"

    def in_params(positions: Sequence[int]) -> _Line:
        claims = []
        if problem.symmetric:
            by_params = [product for product, _ in products] + ([] if pushed is None else [pushed[0]])
            names = tree.names(x)
            for product in by_params:
                whole = torch.finfo(torch.float64).eps ** 0.5 * float(tree.norm(tree.tree_map(widened, product)))
                for i, leaf in enumerate(tree.leaves(product)):
                    claims.append(_Claim(f"{what} `params{names[i]}`", values, i, _flat(leaf), whole))
            return _Line(lambda t: tree.leaves(point.gradient(tree.add(x, d, t), u)), claims)
        along = _only(d, positions)
        for product, _ in products:
            claims.append(_claim(f"{what} {_named('params', x, positions)}", values, product, along))
        return _Line(lambda t: [_dot(d, point.gradient(tree.add(x, along, t), u))], claims)

    def in_hparams(positions: Sequence[int]) -> _Line:
        along, name = _only(e, positions), f"{what} {_named('hparams', u, positions)}"
        claims = [_claim(name, values, product, along) for _, product in products]
        if pushed is not None and len(positions) == len(tree.leaves(u)):
            claims.append(_Claim(name, values, 0, _dot(d, pushed[1]).reshape(1), claims[0].size))
        largest = LONGEST * max(1.0, 1.0 / (_size(along) or 1.0))
        return _Line(lambda t: [_dot(d, point.gradient(x, tree.add(u, along, t)))], claims, largest)

    yield in_params, [every]
    count = len(tree.leaves(u))
    yield in_hparams, [range(i, count, GROUPS) for i in range(min(count, GROUPS))]
    if problem.optimality is not None:
        return
    gradient = point.gradient(x, u)
    bend = abs(float(_dot(d, products[0][0])))

    def loss(positions: Sequence[int]) -> _Line:
        along = _only(d, positions)
        name = f"the gradient of the inner loss by {_named('params', x, positions)}"
        claim = _claim(name, "that loss", gradient, along, bend)
        return _Line(lambda t: [_value(point, problem.inner_loss, tree.add(x, along, t), u)], [claim])

    yield loss, [every]


def _outer_lines(point: _Point) -> _Lines:
    """Yield the lines of the outer loss."""
    problem, x, u = point.problem, point.params, point.hparams
    with point.wide():
        _, by_params, by_hparams = problem.outer_value_and_grads(x, u)

    def loss(what: str, values: Tree, direction: Tree, gradient: Tree) -> Callable[[Sequence[int]], _Line]:
        def line(positions: Sequence[int]) -> _Line:
            along = _only(direction, positions)
            name = f"the gradient of the outer loss by {_named(what, values, positions)}"

            def value(t: float) -> list[Tensor]:
                moved = tree.add(values, along, t)
                return [_value(point, problem.outer_loss, *((moved, u) if what == "params" else (x, moved)))]

            return _Line(value, [_claim(name, "that loss", gradient, along)])

        return line

    yield loss("params", x, point.d, by_params), [range(len(tree.leaves(x)))]
    yield loss("hparams", u, point.e, by_hparams), [range(len(tree.leaves(u)))]


def _products(point: Linearization, d: Tree) -> list[tuple[Tree, Tree]]:
    """Return (H' d, C' d), by each oracle that has a code of its own."""
    own = type(point)._vjp is not Linearization._vjp
    return [point.vjp(d), (point.hvp(d), point.cross(d))] if own else [point.vjp(d)]


def _claim(what: str, values: str, gradient: Tree, along: Tree, size: float = 0.0) -> _Claim:
    """Return the claim that a gradient makes along a direction, of the size that is usual for random directions."""
    terms = torch.cat([(_flat(g) * _flat(d)) for g, d in zip(tree.leaves(gradient), tree.leaves(along), strict=True)])
    return _Claim(what, values, 0, terms.sum().reshape(1), max(size, float(terms.norm())))


def _flat(leaf: Tensor) -> Tensor:
    return leaf.detach().double().reshape(-1)


def _dot(a: Tree, b: Tree) -> Tensor:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return torch.stack([torch.dot(_flat(x), _flat(y)) for x, y in pairs]).sum()


def _value(point: _Point, loss: Callable[[Tree, Tree], Tensor], params: Tree, hparams: Tree) -> Tensor:
    with torch.no_grad(), point.wide():
        return loss(params, hparams)


# Judgement -----------------------------------------------------------------------------------------------------------


def _agrees(line: _Line, eps: float) -> bool:
    """Whether differences of one good step length confirm all claims."""
    h = eps ** (1 / 3)
    ends = line.at(h), line.at(-h)
    if ends[0] is None or ends[1] is None:
        return False
    for claim in line.claims:
        gap, size = claim.error((ends[0][claim.part] - ends[1][claim.part]) / (2 * h))
        if not gap <= eps**0.25 * size:
            return False
    return True


def _wrong(line: _Line, eps: float) -> tuple[float, _Claim] | None:
    """Return the claim with the largest relative error among those that are certainly wrong, or None."""
    if _agrees(line, eps):
        return None
    middle = line.at(0.0)
    if middle is None:
        return None
    pending: dict[int, list[_Seen]] = {index: [] for index in range(len(line.claims))}
    h, last = line.longest, LONGEST * 0.1 ** (STEPS - 1)
    while h > 0.5 * last and pending:
        up, down = line.at(h), line.at(-h)
        for index in list(pending) if up is not None and down is not None else ():
            claim = line.claims[index]
            seen = _Seen.of(claim, up[claim.part], middle[claim.part], down[claim.part], h, eps)  # type: ignore[index]
            if seen is not None and seen.gap <= eps**0.25 * seen.size:
                del pending[index]
            elif seen is not None and seen.gap > seen.noise / SHARE:
                pending[index].append(seen)
        h *= 0.1
    found = [(_certain(seen), line.claims[index]) for index, seen in pending.items()]
    return max(((error, claim) for error, claim in found if error >= LEAST), key=lambda each: each[0], default=None)


@dataclass(frozen=True)
class _Seen:
    """The differences at one step length.

    Attributes:
        slope: the central difference.
        gap: its distance to the claim.
        size: what that is relative to.
        bend: forward minus backward difference.
        noise: what rounding makes of the difference.
    """

    slope: Tensor
    gap: float
    size: float
    bend: float
    noise: float

    @classmethod
    def of(cls, claim: _Claim, up: Tensor, middle: Tensor, down: Tensor, h: float, eps: float) -> _Seen | None:
        """Return it, or None where a value is not finite."""
        slope = (up - down) / (2 * h)
        gap, size = claim.error(slope)
        bend = float((up - 2 * middle + down).norm()) / h
        # Sums that cancel have more rounding than their result shows: a thousand units of it.
        noise = 1e3 * eps * max(float(up.norm()), float(down.norm()), float(claim.slope.norm()), claim.size) / h
        return cls(slope, gap, size, bend, noise) if gap < float("inf") else None


def _certain(seen: Sequence[_Seen]) -> float:
    """Return the relative error if the smallest steps agree about it, else zero."""
    last = seen[-AGREED:]
    if len(last) < AGREED:
        return 0.0
    gap = min(each.gap for each in last)
    apart = max(float((a.slope - b.slope).norm()) for a in last for b in last)
    if max(apart, *(each.bend for each in last)) > SHARE * gap:
        return 0.0
    return gap / max(each.size for each in last)
