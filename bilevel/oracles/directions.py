"""`Directions`: what one step of a stochastic single loop asks of a problem, on flat vectors.

    inner, batch i   g(w, u),  H v,  and C' v          outer, batch j   f_w(w, u)  and  f_u(w, u)

for params w, an adjoint v that approximates ``-H^-1 f_w``, and hyperparameters u. A problem with closed forms gives its
own (`AtOnce.directions`), in which the part of the inner loss without data, its penalty, is exact and never sampled.
Here they are recorded from the losses as they are written: one graph, of which both batches are arguments.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.lanczos import Spectrum, lanczos
from bilevel.oracles import batching as batches
from bilevel.oracles.cut import dependence, derivatives, tensors
from bilevel.oracles.folding import fold
from bilevel.oracles.recording import NotRecordedError, Part, record
from bilevel.oracles.tracing import signature

Array = Any
"""A NumPy array or a tensor; only operators and methods that both have are used on it."""
MEASURED, STEPS = 3, 12
"""Batches whose curvature is measured for a step size, of which the largest counts, and products for each."""
MARGIN = 1.1
"""By how much the curvature of another batch may be above them."""


HELD = 2**28
"""Bytes of batches, with what is made of them alone, that stay."""
POINT, INNER, OUTER = 1, 2, 4


class Directions(ABC):
    """The parts of a step's direction. With params of d numbers and k hyperparameters, z is (w, v), of 2 d numbers.

    Attributes:
        form: how they are made.
        size: d.
        parts: how many batches the inner and the outer loss have; None where each step has batches of its own.
        shares: of the rows that one batch holds.
    """

    form: str
    size: int
    parts: tuple[int | None, int | None]
    shares: tuple[float, float]

    def array(self, flat: Tensor) -> Array:
        """Return a vector as what steps work on; a copy."""
        return flat.clone()

    def tensor(self, array: Array) -> Tensor:
        """Return what `array` has made of a vector, as a tensor."""
        made: Tensor = array
        return made

    @abstractmethod
    def sampled(self, i: int, j: int, z: Array, u: Array) -> tuple[Array, Array]:
        """Return, on batches i and j, (g, H v[, C' v]) and (f_w[, f_u]): what batches have a say in, as new vectors."""

    @abstractmethod
    def complete(self, direction: Array, z: Array, u: Array) -> tuple[Array, Array, Array]:
        """Return the directions of z and u, of which what batches have a say in is given, and the penalty for `shrunk`.

        Where there is a penalty, the first lacks it.
        """

    def shrunk(self, z: Array, rate: float, penalty: Array) -> Array:
        """Return z after an implicit step on the penalty, ``z / (1 + rate penalty)``; z itself without one."""
        return z

    @abstractmethod
    def curvature(self, z: Array, u: Array) -> Spectrum:
        """Return how large the curvature is that explicit steps on a batch meet, and about how small."""

    def least(self, penalty: Array, measured: float) -> Array | None:
        """Return about the smallest curvature of the inner loss, as it was measured by default; None where unknown."""
        return measured or None


def partitioned(sampler: Any, fresh: str) -> Sequence[Tree] | Callable[[int], Tree]:
    """Return the batches of a sampler: those of one partition of its rows where it has one, else one for each step."""
    if sampler is None:
        return [()]
    if fresh == "never":
        return [sampler.full()]
    parts: Sequence[Tree] | None = getattr(sampler, "partition", lambda: None)()
    return sampler if parts is None else parts


def on_batches(problem: Any, inner: Tree, outer: Tree) -> Any:
    """Return a view of a problem whose losses are those of two batches."""
    view, sampling = copy.copy(problem.on_batch(inner)), problem._sampling
    if sampling is not None and sampling.outer_sampler is not None:
        view.outer_loss = batches.with_last(sampling.outer_loss, outer)
    view.sampler = None
    return view


def on_all_data(problem: Any) -> Any:
    """Return a view of a problem whose losses are those of all data."""
    sampling = problem._sampling
    if sampling is None:
        return problem
    samplers = sampling.sampler, sampling.outer_sampler
    view = on_batches(problem, *(() if each is None else each.full() for each in samplers))
    view._sampling = None
    return view


class LossDirections(Directions):
    """The directions of any losses: recorded, or by autograd where they are not the same operations at every call.

    What depends on a batch alone is made once for each batch that stays.

    Args:
        problem: the problem; its samplers say which batches there are.
        params: their form.
        hparams: likewise.
    """

    def __init__(self, problem: Any, params: Tree, hparams: Tree) -> None:
        sampling = problem._sampling
        self.problem, self._ravelers = problem, (tree.Raveler(params), tree.Raveler(hparams))
        self.size = self._ravelers[0].size
        samplers = (None, None) if sampling is None else (sampling.sampler, sampling.outer_sampler)
        fresh = "never" if sampling is None else sampling.fresh_batch
        self._batches = [partitioned(each, mode) for each, mode in zip(samplers, (fresh, "outer step"), strict=True)]
        self.parts = tuple(len(each) if isinstance(each, list) else None for each in self._batches)  # type: ignore[assignment]
        first = [tensors(self._batch(level, 0)) for level in (0, 1)]
        self._kinds = [signature(self._batch(level, 0)) for level in (0, 1)]
        pairs = zip(samplers, first, strict=True)
        self.shares = tuple(1.0 if s is None else _rows(b) / _rows(tensors(s.full())) for s, b in pairs)  # type: ignore[assignment]
        z, u = (of.ravel(tree.copied(part)) for of, part in zip(self._ravelers, (params, hparams), strict=True))
        self._made: list[dict[int, list[Tensor]]] = [{}, {}]
        self._derived: list[Callable[..., Any]] = [lambda *leaves: ()] * 2
        self._call = plain = self._plainly(*(self._batch(level, 0) for level in (0, 1)))
        self.form = "recorded"
        try:
            self._record(torch.cat([z, torch.zeros_like(z)]), u, first)
        except Exception as error:
            self._call, self._derived = plain, [lambda *leaves: ()] * 2
            self._made = [{}, {}]
            self.form = f"by autograd, as the losses are not recorded: {str(error).splitlines()[0]}"

    def _batch(self, level: int, index: int) -> Tree:
        each = self._batches[level]
        return each[index] if isinstance(each, list) else each(index)  # type: ignore[operator]

    def _given(self, level: int, index: int) -> list[Tensor]:
        """Return the tensors of a batch, and what is made of them alone."""
        known = self._made[level].get(index)
        if known is None:
            batch = self._batch(level, index)
            if signature(batch) != self._kinds[level]:
                raise ValueError(
                    "the batches of a sampler differ in their shapes, or in what is no tensor: "
                    "SingleLoop takes batches that differ in the numbers of their tensors alone."
                )
            leaves = tensors(batch)
            known = [*leaves, *self._derived[level](*leaves)]
            if self.parts[level] is not None and (self.parts[level] or 0) * sum(each.nbytes for each in known) <= HELD:
                self._made[level][index] = known
        return known

    def _plainly(self, *like: Tree) -> Callable[..., Any]:
        """Return (z, u, inner tensors and outer tensors) -> both directions, by autograd."""

        def both(z: Tensor, u: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
            feed = iter(leaves)
            given = [tree.tree_map(lambda x: next(feed) if isinstance(x, Tensor) else x, each) for each in like]
            view, (of_params, of_hparams) = on_batches(self.problem, *given), self._ravelers
            hparams = of_hparams.unravel(u)
            inner = derivatives(view, of_params, hparams, z[: self.size], z[self.size :])
            _, *outer = view.outer_value_and_grads(of_params.unravel(z[: self.size]), hparams)
            flat = [leaf.reshape(-1) for part in outer for leaf in tree.leaves(part)]
            return torch.cat([each.reshape(-1) for each in inner]), torch.cat(flat)

        return both

    def _record(self, z: Tensor, u: Tensor, leaves: Sequence[list[Tensor]]) -> None:
        """Replace autograd by a recording, if its numbers are those of autograd at another point."""
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each) for each in (z, u)]
        # At other numbers than those of a run, and no two arguments one tensor.
        given = [leaf.clone() for each in leaves for leaf in each]
        module, plain = record(self._call, [z + noise[0], u + 0.1 * noise[1], *given]), self._call
        nodes = list(module.graph.nodes)
        if impure := [node for node in nodes if node.op == "call_function" and node.is_impure()]:
            raise NotRecordedError(f"{impure[0].target} writes in place or draws random numbers")
        at, rest = nodes[:2], [node for node in nodes if node.op == "placeholder"][2:]
        levels = rest[: len(leaves[0])], rest[len(leaves[0]) :]
        known = dict.fromkeys(at, POINT) | dict.fromkeys(levels[0], INNER) | dict.fromkeys(levels[1], OUTER)
        levels_of = dependence(module, known)
        fold(module.graph, {node: 2 if on & POINT else 1 if on else 0 for node, on in levels_of.items()})
        depends, nodes = dependence(module, known), list(module.graph.nodes)
        (outputs,) = next(node for node in nodes if node.op == "output").args
        calls = [node for node in nodes if node.op == "call_function"]
        constant, *own = (
            [node for node in calls if depends[node] == kind and any(depends[user] != kind for user in node.users)]
            for kind in (0, INNER, OUTER)
        )
        values = Part(module, [], [], constant).function()()
        inputs = [*at, *levels[0], *own[0], *levels[1], *own[1]]
        self._call = Part(module, constant, inputs, outputs).function(*values)
        pairs = zip(levels, own, strict=True)
        self._derived = [Part(module, constant, level, mine).function(*values) for level, mine in pairs]
        point = z + 0.5 * noise[0], u
        expected = plain(*point, *leaves[0], *leaves[1])
        for got, wanted in zip(self._call(*point, *self._given(0, 0), *self._given(1, 0)), expected, strict=True):
            rtol = torch.finfo(wanted.dtype).eps ** 0.6
            if not torch.allclose(got, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()), equal_nan=True):
                raise NotRecordedError("their numbers depend on more than their arguments")

    def sampled(self, i: int, j: int, z: Array, u: Array) -> tuple[Array, Array]:
        q, f = self._call(z, u, *self._given(0, i), *self._given(1, j))
        return q, f

    def complete(self, direction: Array, z: Array, u: Array) -> tuple[Array, Array, Array]:
        return direction[: 2 * self.size], direction[2 * self.size :], None

    def curvature(self, z: Array, u: Array) -> Spectrum:
        w, parts = z[: self.size], self.parts[0]

        def product(index: int, v: Tensor) -> Tensor:
            return self.sampled(index, 0, torch.cat([w, v]), u)[0][self.size : 2 * self.size]

        count = MEASURED if parts is None else min(MEASURED, parts)
        ends = [lanczos(partial(product, index), w, steps=STEPS, rtol=0.02) for index in range(count)]
        return Spectrum(min(end.smallest for end in ends), MARGIN * max(end.largest for end in ends))


def _rows(leaves: list[Tensor]) -> int:
    return leaves[0].shape[0] if leaves and leaves[0].dim() else 1
