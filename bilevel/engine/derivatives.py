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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import Linearization
from bilevel.oracles.precision import DoublePrecision, widened
from bilevel.oracles.problem import BilevelProblem

GROUPS = 8
"""The most directions of hparams: one for each leaf, or for some leaves together where there are more."""
STEPS = 8
"""Steps of the ladder, each a tenth of the one before, from `LONGEST` on."""
LONGEST = 0.1
AGREED = 3
"""Steps that have to agree with each other before a derivative is called wrong."""
SHARE = 0.1
"""How far these may be apart, and how large rounding may be, as a share of the error."""
AGREES = 0.35
"""Power of the rounding unit: a smaller relative error is none (3e-6 in float64, 4e-3 in float32)."""
LEAST = 1e-4
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
        parts: what sums up to the values may be as large as this, and be rounded so, where it cancels.
    """

    what: str
    values: str
    part: int
    slope: Tensor
    size: float
    parts: float = 0.0

    def error(self, measured: Tensor) -> tuple[float, float]:
        """Return (distance, what it is relative to)."""
        sizes = float(measured.norm()), float(self.slope.norm()), self.size
        return float((measured - self.slope).norm()), max(sizes)


@dataclass(frozen=True)
class _Line:
    """Values along a line through the point, and the derivatives that are claimed there."""

    values: Callable[[float], Sequence[Tensor]]
    claims: Callable[[float], Iterable[_Claim]]
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

    def value(self, loss: Callable[[Tree, Tree], Tensor], params: Tree, hparams: Tree) -> Tensor:
        """Return a loss."""
        with torch.no_grad(), self.wide():
            return loss(params, hparams)

    def products(self, params: Tree, hparams: Tree) -> _Products:
        """Return the products with d and e there, by each oracle that has a code of its own."""
        with self.wide():
            there = self.problem.bind(hparams).linearize(params)
            kind, pulled, pushed = type(there), [there.vjp(self.d)], []
            if kind._vjp is not Linearization._vjp:
                pulled.append((there.hvp(self.d), there.cross(self.d)))
            if kind._jvp is not Linearization._jvp or kind._cross_jvp is not Linearization._cross_jvp:
                still = tree.zeros_like(params), tree.zeros_like(hparams)
                pushed = [(there.jvp(self.d, still[1]), there.jvp(still[0], self.e))]
        return _Products(pulled, pushed)


@dataclass(frozen=True)
class _Products:
    """Products of second derivatives: pairs (H' d, C' d), and pairs (H d, C e)."""

    pulled: Sequence[tuple[Tree, Tree]]
    pushed: Sequence[tuple[Tree, Tree]]


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
    here = point.products(x, u)
    # At a solution the gradient is zero because its parts cancel; ``H d`` is of their size.
    parts = float(_terms(here.pulled[0][0], d).norm())
    what, values = "the derivative of the inner gradient by", "that gradient"

    def in_params(positions: Sequence[int]) -> _Line:
        along = d if problem.symmetric else _only(d, positions)

        def claims(t: float) -> Iterator[_Claim]:
            products = here if t == 0 else point.products(tree.add(x, along, t), u)
            if not problem.symmetric:
                for product, _ in products.pulled:
                    yield _claim(f"{what} {_named('params', x, positions)}", values, product, along)
                return
            # A symmetric Hessian gives the whole derivative along a direction, and so names the leaf that is wrong.
            for product in [by_params for by_params, _ in products.pulled] + [
                by_params for by_params, _ in products.pushed
            ]:
                least = torch.finfo(torch.float64).eps ** 0.5 * float(tree.norm(tree.tree_map(widened, product)))
                for i, (name, leaf) in enumerate(zip(tree.names(x), tree.leaves(product), strict=True)):
                    yield _Claim(f"{what} `params{name}`", values, i, _flat(leaf), least)

        def value(t: float) -> list[Tensor]:
            gradient = point.gradient(tree.add(x, along, t), u)
            return tree.leaves(gradient) if problem.symmetric else [_dot(d, gradient)]

        return _Line(value, claims)

    def in_hparams(positions: Sequence[int]) -> _Line:
        along, name = _only(e, positions), f"{what} {_named('hparams', u, positions)}"

        def claims(t: float) -> Iterator[_Claim]:
            products = here if t == 0 else point.products(x, tree.add(u, along, t))
            for _, product in products.pulled:
                yield replace(_claim(name, values, product, along), parts=parts)
            for _, product in products.pushed if len(positions) == len(tree.leaves(u)) else ():
                yield _Claim(name, values, 0, _dot(d, product).reshape(1), 0.0, parts)

        return _Line(
            lambda t: [_dot(d, point.gradient(x, tree.add(u, along, t)))],
            claims,
            LONGEST * max(1.0, 1.0 / (_size(along) or 1.0)),
        )

    def loss(positions: Sequence[int]) -> _Line:
        along, name = _only(d, positions), f"the gradient of the inner loss by {_named('params', x, positions)}"
        # At a solution the gradient is zero: what counts is how far an error moves the solution.
        bend = abs(float(_dot(d, here.pulled[0][0])))
        return _Line(
            lambda t: [point.value(problem.inner_loss, tree.add(x, along, t), u)],
            lambda t: [_claim(name, "that loss", point.gradient(tree.add(x, along, t), u), along, bend)],
        )

    yield in_params, [[0]] if problem.symmetric else [range(len(tree.leaves(x)))]
    count = len(tree.leaves(u))
    yield in_hparams, [range(i, count, GROUPS) for i in range(min(count, GROUPS))]
    if problem.optimality is None:
        yield loss, [range(len(tree.leaves(x)))]


def _outer_lines(point: _Point) -> _Lines:
    """Yield the lines of the outer loss."""
    loss, gradients = point.problem.outer_loss, point.problem.outer_value_and_grads

    def line(which: int, positions: Sequence[int]) -> _Line:
        what, base = ("params", "hparams")[which], (point.params, point.hparams)
        along = _only((point.d, point.e)[which], positions)
        name = f"the gradient of the outer loss by {_named(what, base[which], positions)}"

        def moved(t: float) -> tuple[Tree, Tree]:
            there = tree.add(base[which], along, t)
            return (there, base[1]) if which == 0 else (base[0], there)

        def claims(t: float) -> list[_Claim]:
            with point.wide():
                return [_claim(name, "that loss", gradients(*moved(t))[1 + which], along)]

        return _Line(lambda t: [point.value(loss, *moved(t))], claims)

    for which, values in enumerate((point.params, point.hparams)):
        yield partial(line, which), [range(len(tree.leaves(values)))]


def _claim(what: str, values: str, gradient: Tree, along: Tree, size: float = 0.0) -> _Claim:
    """Return the claim that a gradient makes along a direction, of the size that is usual for random directions."""
    terms = _terms(gradient, along)
    return _Claim(what, values, 0, terms.sum().reshape(1), max(size, float(terms.norm())))


def _terms(gradient: Tree, along: Tree) -> Tensor:
    return torch.cat([_flat(g) * _flat(d) for g, d in zip(tree.leaves(gradient), tree.leaves(along), strict=True)])


def _flat(leaf: Tensor) -> Tensor:
    return leaf.detach().double().reshape(-1)


def _dot(a: Tree, b: Tree) -> Tensor:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return torch.stack([torch.dot(_flat(x), _flat(y)) for x, y in pairs]).sum()


# Judgement -----------------------------------------------------------------------------------------------------------


def _agrees(line: _Line, eps: float) -> bool:
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


def _wrong(line: _Line, eps: float) -> tuple[float, _Claim] | None:
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
    """The differences at one step length.

    Attributes:
        step: the step length.
        slope: the central difference.
        gap: its distance to the claim.
        size: what that is relative to.
        bend: forward minus backward difference.
        noise: what rounding makes of the difference.
    """

    step: float
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
        sizes = float(up.norm()), float(down.norm()), float(claim.slope.norm()), claim.size, claim.parts
        noise = 1e3 * eps * max(sizes) / h
        return cls(h, slope, gap, size, bend, noise) if gap < float("inf") else None


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
