"""Values of a problem along lines through a point, and the derivatives that the problem claims of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import Linearization
from bilevel.oracles.precision import DoublePrecision, widened
from bilevel.oracles.problem import BilevelProblem

GROUPS = 8
"""The most directions of hparams: one for each leaf, or for some leaves together where there are more."""
LONGEST = 0.1
FAILURES = (ValueError, RuntimeError, ArithmeticError, AssertionError, TypeError, LookupError)
"""What a loss may raise at hyperparameters that it does not allow: nothing is concluded from those."""


@dataclass(frozen=True)
class Claim:
    """The derivative that a problem claims of one of the values on a line."""

    what: str  # how the sentence calls it
    values: str  # and what it should be the derivative of
    part: int  # which value
    slope: Tensor  # the claim, in float64
    size: float  # errors are relative to at least this
    parts: float = 0.0  # what sums up to the values may be as large, and be rounded so, where it cancels

    def error(self, measured: Tensor) -> tuple[float, float]:
        """Return (distance, what it is relative to)."""
        sizes = float(measured.norm()), float(self.slope.norm()), self.size
        return float((measured - self.slope).norm()), max(sizes)


@dataclass(frozen=True)
class Line:
    """Values along a line through the point, and the derivatives that are claimed there."""

    values: Callable[[float], Sequence[Tensor]]
    claims: Callable[[float], Iterable[Claim]]
    longest: float = LONGEST

    def at(self, t: float) -> Sequence[Tensor] | None:
        """Return the values in float64, or None where they cannot be had."""
        try:
            return [part.detach().double().reshape(-1) for part in self.values(t)]
        except FAILURES:
            return None


class Point:
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

    def products(self, params: Tree, hparams: Tree) -> Products:
        """Return the products with d and e there, by each oracle that has a code of its own."""
        with self.wide():
            there = self.problem.bind(hparams).linearize(params)
            kind, pulled, pushed = type(there), [there.vjp(self.d)], []
            if kind._vjp is not Linearization._vjp:
                pulled.append((there.hvp(self.d), there.cross(self.d)))
            if kind._jvp is not Linearization._jvp or kind._cross_jvp is not Linearization._cross_jvp:
                still = tree.zeros_like(params), tree.zeros_like(hparams)
                pushed = [(there.jvp(self.d, still[1]), there.jvp(still[0], self.e))]
        return Products(pulled, pushed)


@dataclass(frozen=True)
class Products:
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

Lines = Iterator[tuple[Callable[[Sequence[int]], Line], Sequence[Sequence[int]]]]
"""Pairs of (a function of leaf positions that returns the line along these leaves, groups of positions)."""


def inner_lines(point: Point) -> Lines:
    """Yield the lines of the inner gradient in params and in hparams, and of the inner loss."""
    problem, x, u, d, e = point.problem, point.params, point.hparams, point.d, point.e
    here = point.products(x, u)
    # At a solution the gradient is zero because its parts cancel; ``H d`` is of their size.
    parts = float(_terms(here.pulled[0][0], d).norm())
    what, values = "the derivative of the inner gradient by", "that gradient"

    def in_params(positions: Sequence[int]) -> Line:
        along = d if problem.symmetric else _only(d, positions)

        def claims(t: float) -> Iterator[Claim]:
            products = here if t == 0 else point.products(tree.add(x, along, t), u)
            if not problem.symmetric:
                for product, _ in products.pulled:
                    yield _claim(f"{what} {_named('params', x, positions)}", values, product, along)
                return
            # A symmetric Hessian gives the whole derivative along a direction, and so names the leaf that is wrong.
            for product, _ in [*products.pulled, *products.pushed]:
                least = torch.finfo(torch.float64).eps ** 0.5 * float(tree.norm(tree.tree_map(widened, product)))
                for i, (name, leaf) in enumerate(zip(tree.names(x), tree.leaves(product), strict=True)):
                    yield Claim(f"{what} `params{name}`", values, i, _flat(leaf), least)

        def value(t: float) -> list[Tensor]:
            gradient = point.gradient(tree.add(x, along, t), u)
            return tree.leaves(gradient) if problem.symmetric else [_dot(d, gradient)]

        return Line(value, claims)

    def in_hparams(positions: Sequence[int]) -> Line:
        along, name = _only(e, positions), f"{what} {_named('hparams', u, positions)}"

        def claims(t: float) -> Iterator[Claim]:
            products = here if t == 0 else point.products(x, tree.add(u, along, t))
            for _, product in products.pulled:
                yield replace(_claim(name, values, product, along), parts=parts)
            for _, product in products.pushed if len(positions) == len(tree.leaves(u)) else ():
                yield Claim(name, values, 0, _dot(d, product).reshape(1), 0.0, parts)

        return Line(
            lambda t: [_dot(d, point.gradient(x, tree.add(u, along, t)))],
            claims,
            LONGEST * max(1.0, 1.0 / (_size(along) or 1.0)),
        )

    def loss(positions: Sequence[int]) -> Line:
        along, name = _only(d, positions), f"the gradient of the inner loss by {_named('params', x, positions)}"
        # At a solution the gradient is zero: what counts is how far an error moves the solution.
        curvature = abs(float(_dot(d, here.pulled[0][0])))
        return Line(
            lambda t: [point.value(problem.inner_loss, tree.add(x, along, t), u)],
            lambda t: [_claim(name, "that loss", point.gradient(tree.add(x, along, t), u), along, curvature)],
        )

    yield in_params, [[0]] if problem.symmetric else [range(len(tree.leaves(x)))]
    count = len(tree.leaves(u))
    yield in_hparams, [range(i, count, GROUPS) for i in range(min(count, GROUPS))]
    if problem.optimality is None:
        yield loss, [range(len(tree.leaves(x)))]


def outer_lines(point: Point) -> Lines:
    """Yield the lines of the outer loss."""
    loss, gradients = point.problem.outer_loss, point.problem.outer_value_and_grads

    def line(which: int, positions: Sequence[int]) -> Line:
        what, base = ("params", "hparams")[which], (point.params, point.hparams)
        along = _only((point.d, point.e)[which], positions)
        name = f"the gradient of the outer loss by {_named(what, base[which], positions)}"

        def moved(t: float) -> tuple[Tree, Tree]:
            there = tree.add(base[which], along, t)
            return (there, base[1]) if which == 0 else (base[0], there)

        def claims(t: float) -> list[Claim]:
            with point.wide():
                return [_claim(name, "that loss", gradients(*moved(t))[1 + which], along)]

        return Line(lambda t: [point.value(loss, *moved(t))], claims)

    for which, values in enumerate((point.params, point.hparams)):
        yield partial(line, which), [range(len(tree.leaves(values)))]


def _claim(what: str, values: str, gradient: Tree, along: Tree, size: float = 0.0) -> Claim:
    """Return the claim that a gradient makes along a direction, of the size that is usual for random directions."""
    terms = _terms(gradient, along)
    return Claim(what, values, 0, terms.sum().reshape(1), max(size, float(terms.norm())))


def _terms(gradient: Tree, along: Tree) -> Tensor:
    return torch.cat([_flat(g) * _flat(d) for g, d in zip(tree.leaves(gradient), tree.leaves(along), strict=True)])


def _flat(leaf: Tensor) -> Tensor:
    return leaf.detach().double().reshape(-1)


def _dot(a: Tree, b: Tree) -> Tensor:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return torch.stack([torch.dot(_flat(x), _flat(y)) for x, y in pairs]).sum()
