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
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.lanczos import Spectrum, lanczos
from bilevel.oracles import batching as batches
from bilevel.oracles.graph import NotRecordedError, Part, dependence, outputs_of
from bilevel.oracles.graph_folding import fold
from bilevel.oracles.recording import Recording, derivatives, flat, tensors, why

Array = Any
"""A NumPy array or a tensor; only operators and methods that both have are used on it."""
MEASURED, STEPS = 3, 12
"""Batches whose curvature is measured for a step size, of which the largest counts, and products for each."""
QUICK = 6
"""Products for the curvature on one batch, along a run: the largest one alone is close then."""
MARGIN = 1.1
"""By how much the curvature of another batch may be above them."""


HELD = 2**28
"""Bytes of batches, with what is made of them alone, that stay."""
POINT, INNER, OUTER = 1, 2, 4


class Rule(NamedTuple):
    """How a block of steps moves z and u: the rate of z, how far u moves, how far at most for a unit of curvature while
    z relaxes (None: steps by the direction itself), the steps that leave u alone, and its bounds.
    """  # noqa: D205

    rate: float
    length: float
    cap: float | None
    free: int
    bounds: Sequence[Array] | None


class Directions(ABC):
    """The parts of a step's direction. With params of d numbers and k hyperparameters, z is (w, v), of 2 d numbers.

    Attributes:
        form: how they are made.
        size: d.
        parts: how many batches the inner and the outer loss have; None where each step has batches of its own.
        shares: of the rows that one batch holds.
        static: whether `block` takes steps, on tensors that stay where they are.
        varies: whether `curvature` is another one at other params and hyperparameters.
    """

    form: str
    size: int
    parts: tuple[int | None, int | None]
    shares: tuple[float, float]
    varies = False
    static = False

    def block(
        self, state: Any, tables: Sequence[Any], draws: Sequence[Any], factors: Sequence[float], rule: Rule
    ) -> Any:
        """Take a block of steps at once, where `static` says so."""
        raise NotImplementedError

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

    def preconditioner(self, u: Array) -> tuple[Array, float] | None:
        """Return P, about the inverse of the largest Hessian, and the largest curvature on a batch in its metric.

        None where it would take more than steps do. The matrix is (d, d), for w and v alike.
        """
        return None

    def turned(self, direction: Array, z: Array, penalty: Array, P: Array) -> Array:
        """Return P times the direction of z, its penalty included."""
        raise NotImplementedError

    @abstractmethod
    def curvature(self, z: Array, u: Array, step: int | None = None) -> Spectrum:
        """Return how large the curvature is that explicit steps on a batch meet, and about how small.

        Where it is measured, that is on some of the batches, or at a step quickly on the one whose turn it is.
        """

    def begin(self, z: Array, u: Array) -> Self:
        """Return the directions of steps from here, with what they take on trust looked at again."""
        return self

    def held(self, i: int, j: int, z: Array, u: Array) -> bool:
        """Whether what was taken on trust has held over steps whose last batches were i and j."""
        return True

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

    varies = True

    def __init__(self, problem: Any, params: Tree, hparams: Tree) -> None:
        sampling = problem._sampling
        self.problem, self._ravelers = problem, (tree.Raveler(params), tree.Raveler(hparams))
        self.size = self._ravelers[0].size
        samplers = (None, None) if sampling is None else (sampling.sampler, sampling.outer_sampler)
        fresh = "never" if sampling is None else sampling.fresh_batch
        self._batches = [partitioned(each, mode) for each, mode in zip(samplers, (fresh, "outer step"), strict=True)]
        self.parts = tuple(len(each) if isinstance(each, list) else None for each in self._batches)  # type: ignore[assignment]
        first = [tensors(self._batch(level, 0)) for level in (0, 1)]
        pairs = zip(samplers, first, strict=True)
        self.shares = tuple(1.0 if s is None else _rows(b) / _rows(tensors(s.full())) for s, b in pairs)  # type: ignore[assignment]
        self._graph: LossGraph | None = None
        self._record(params, hparams)

    def _record(self, params: Tree, hparams: Tree) -> None:
        try:
            batches = (self._batch(level, 0) for level in (0, 1))
            graph = self.problem.traces.begin(LossGraph, self.problem, params, hparams, *batches)
        except Exception as error:
            self._refuse(error)
            return
        # A callback may have written to the batches.
        self._made: list[dict[int, list[Tensor]]] = [{}, {}]
        self._graph, self.form = graph, "recorded"

    def _refuse(self, reason: Exception) -> None:
        self._graph, self.form = None, f"by autograd, as the losses are not recorded: {why(reason)}"

    def _batch(self, level: int, index: int) -> Tree:
        each = self._batches[level]
        return each[index] if isinstance(each, list) else each(index)  # type: ignore[operator]

    def _given(self, graph: LossGraph, level: int, index: int) -> list[Tensor]:
        """Return the tensors of a batch, and what is made of them alone."""
        known = self._made[level].get(index)
        if known is None:
            leaves = graph.tensors(self._batch(level, index), level)
            known = [*leaves, *graph.derived[level](*leaves)]
            if self.parts[level] is not None and (self.parts[level] or 0) * sum(each.nbytes for each in known) <= HELD:
                self._made[level][index] = known
        return known

    def sampled(self, i: int, j: int, z: Array, u: Array) -> tuple[Array, Array]:
        if (graph := self._graph) is not None:
            try:
                made = graph.call(
                    z[: self.size], z[self.size :], u, *self._given(graph, 0, i), *self._given(graph, 1, j)
                )
                return torch.cat(made[:3]), torch.cat(made[3:])
            except NotRecordedError as reason:  # of the batch
                self._refuse(reason)
        batches = self._batch(0, i), self._batch(1, j)
        made = both_losses(self.problem, self._ravelers, z[: self.size], z[self.size :], u, *batches)
        return torch.cat(made[:3]), torch.cat(made[3:])

    def begin(self, z: Array, u: Array) -> Self:
        if self._graph is not None:
            self._record(self._ravelers[0].unravel(z[: self.size]), self._ravelers[1].unravel(u))
        return self

    def held(self, i: int, j: int, z: Array, u: Array) -> bool:
        if self._graph is None:
            return True
        x, v, batches = z[: self.size], z[self.size :], (self._batch(0, i), self._batch(1, j))
        expected = both_losses(self.problem, self._ravelers, x, v, u, *batches)
        try:
            given = *self._given(self._graph, 0, i), *self._given(self._graph, 1, j)
            self._graph.confirm(x, self._graph.call(x, v, u, *given), expected)
        except NotRecordedError:
            return False
        return True

    def complete(self, direction: Array, z: Array, u: Array) -> tuple[Array, Array, Array]:
        return direction[: 2 * self.size], direction[2 * self.size :], None

    def curvature(self, z: Array, u: Array, step: int | None = None) -> Spectrum:
        w, parts = z[: self.size], self.parts[0]

        def product(index: int, v: Tensor) -> Tensor:
            return self.sampled(index, 0, torch.cat([w, v]), u)[0][self.size : 2 * self.size]

        if step is not None:
            index = step % (parts or step + 1)
            end = lanczos(partial(product, index), w, steps=QUICK, rtol=0.1)
            return Spectrum(end.smallest, MARGIN * end.largest)
        count = MEASURED if parts is None else min(MEASURED, parts)
        ends = [lanczos(partial(product, index), w, steps=STEPS, rtol=0.02) for index in range(count)]
        return Spectrum(min(end.smallest for end in ends), MARGIN * max(end.largest for end in ends))


def _rows(leaves: list[Tensor]) -> int:
    return leaves[0].shape[0] if leaves and leaves[0].dim() else 1


def both_losses(problem: Any, ravelers: Any, x: Tensor, v: Tensor, u: Tensor, *batches: Tree) -> list[Tensor]:
    """Return ``g, H v, C' v`` of the inner loss on one batch, and ``f_w, f_u`` of the outer on another, as vectors."""
    view, (of_params, of_hparams) = on_batches(problem, *batches), ravelers
    params, hparams = of_params.unravel(x), of_hparams.unravel(u)
    inner = derivatives(view, params, of_params.unravel(v), hparams)
    _, *outer = view.outer_value_and_grads(params, hparams)
    return [*map(flat, inner), *(flat(tree.leaves(part)) for part in outer)]


class LossGraph(Recording):
    """The recording of both losses, each of which sees a batch of its own; params and hyperparameters are vectors."""

    def given(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree]:
        of_params, of_hparams = self.ravelers
        return of_params.ravel(params), of_hparams.ravel(hparams)

    def oracle(self, problem: Any, x: Tree, v: Tree, u: Tree, *batches: Tree) -> list[Tensor]:
        return both_losses(problem, self.ravelers, x, v, u, *batches)

    def split(self, module: fx.GraphModule, inputs: list[list[fx.Node]], outputs: list[fx.Node]) -> None:
        *at, inner, outer = inputs
        known = {node: POINT for each in at for node in each}
        known |= dict.fromkeys(inner, INNER) | dict.fromkeys(outer, OUTER)
        levels_of = dependence(module, known)
        fold(module.graph, {node: 2 if on & POINT else 1 if on else 0 for node, on in levels_of.items()})
        depends = dependence(module, known)
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        constant, *own = (
            [node for node in calls if depends[node] == kind and any(depends[user] != kind for user in node.users)]
            for kind in (0, INNER, OUTER)
        )
        values = Part(module, [], [], constant).function()()
        given = [*(node for each in at for node in each), *inner, *own[0], *outer, *own[1]]
        self.call = Part(module, constant, given, outputs_of(module)).function(*values)
        pairs = zip((inner, outer), own, strict=True)
        self.derived = [Part(module, constant, level, mine).function(*values) for level, mine in pairs]

    def replay(self, x: list[Tensor], v: list[Tensor], u: list[Tensor], *batches: list[Tensor]) -> Sequence[Tensor]:
        given = [each for level, make in zip(batches, self.derived, strict=True) for each in (*level, *make(*level))]
        made: Sequence[Tensor] = self.call(*x, *v, *u, *given)
        return made
