"""A recorded gradient that leaves behind what the products at the same point need, for short runs of many numbers.

`bilevel.oracles.tracing` replays a product from its point alone, and so takes the gradient twice. Here the recording of

    (params, v, hparams, batch) -> g, H' v, C' v

is cut in two by what depends on v: a step makes the first half, and its derivative the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.autograd import vector_jacobian
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.recording import NotRecordedError, Part, between, record
from bilevel.oracles.tracing import moved, signature, verify

HELD = 2**25
"""Bytes that the gradients of a run may leave behind; beyond that products make them again."""
WORTH = 20
"""Steps of all runs from which the gain is larger than the time of the recording."""


class Pair:
    """The two halves for trees of some shapes.

    Raises:
        ValueError: for a loss whose operations are not the same at every call, or write in place.
    """

    def __init__(self, problem: Any, params: Tree, hparams: Tree) -> None:
        trees = params, params, hparams, problem.minibatch
        cut = len(tree.leaves(params))

        def both(*leaves: Any) -> list[Tensor]:
            x, v, u, batch = tree.rebuild(trees, leaves)
            roots = tree.attach(x), tree.attach(u)
            with torch.enable_grad():
                gradient = tree.leaves(problem.on_batch(batch).gradient_graph(*roots))
                products = vector_jacobian(gradient, tree.leaves(roots), tree.leaves(v))
            return [*(each.detach() for each in gradient), *products]

        # At other numbers than those of a run, and no two arguments one tensor.
        generator = torch.Generator().manual_seed(0)
        apart = [moved(leaf, generator) for leaf in tree.leaves(trees)]
        apart = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in apart]
        module = record(both, apart)
        nodes = list(module.graph.nodes)
        if any(node.op == "call_function" and node.is_impure() for node in nodes):
            raise NotRecordedError("it writes in place or draws random numbers")
        inputs = [node for node in nodes if node.op == "placeholder"]
        outputs: Any = module.graph.output_node().args[0]
        given, on_the_way = [*inputs[:cut], *inputs[2 * cut :]], set(inputs[cut : 2 * cut])
        for node in nodes:
            on_the_way |= {node} if on_the_way.intersection(node.all_input_nodes) else set()
        after = [node for node in between(module, set(inputs), outputs[cut:]) if node in on_the_way]
        needed = dict.fromkeys([*(each for node in after for each in node.all_input_nodes), *outputs[cut:]])
        left = [each for each in needed if each not in on_the_way and each.op != "get_attr"]
        self._cut = cut
        self._first = Part(module, [], given, [*outputs[:cut], *left]).function()
        self._second = Part(module, [], [*inputs[cut : 2 * cut], *left], outputs[cut:]).function()
        for node in nodes:
            node.meta.clear()  # or they would hold the numbers of the recording

        def replay(*leaves: Any) -> tuple[Tensor, ...]:
            x, v, u, batch = tree.rebuild(trees, leaves)
            gradient, left = self.gradient(tree.leaves(x), u, batch)
            return *gradient, *self.products(tree.leaves(v), left)

        verify(both, replay, apart)

    def gradient(self, x: Sequence[Tensor], hparams: Tree, batch: Tree) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the leaves of the gradient, and what it leaves behind."""
        further = [leaf for leaf in tree.leaves([hparams, batch]) if isinstance(leaf, Tensor)]
        made = self._first(*[leaf.contiguous() for leaf in (*x, *further)])
        return made[: self._cut], made[self._cut :]

    def products(self, v: Sequence[Tensor], left: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the leaves of ``H' v`` and ``C' v``."""
        made: Sequence[Tensor] = self._second(*[leaf.contiguous() for leaf in v], *left)
        return made


class PairedLinearization(Linearization):
    """A linearization whose `vjp` is the second half."""

    def _vjp(self, v: Tree) -> tuple[Tree, Tree]:
        inner: Any = self.inner
        made = inner.pair.products(tree.leaves(v), inner.left(self.params))
        cut = len(tree.leaves(self.params))
        return tree.rebuild(self.params, made[:cut]), tree.rebuild(inner.hparams, made[cut:])


class PairedInner(InnerProblem):
    """A bound problem whose gradients are the first half.

    Args:
        pair: the two halves.
        arguments: those of `InnerProblem`.
    """

    linearization = PairedLinearization
    form = "recorded"

    def __init__(self, pair: Pair, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pair = pair
        self._left: dict[int, tuple[Tree, Sequence[Tensor]]] = {}
        self._room = HELD

    @torch.no_grad()
    def _grad(self, params: Tree) -> Tree:
        gradient, left = self.pair.gradient(tree.leaves(params), self.hparams, self.problem.minibatch)
        self._room -= sum(each.nbytes for each in left)
        if self._room > 0:
            self._left[id(params)] = params, left  # held, so that its id stays its own
        return tree.rebuild(params, gradient)

    @torch.no_grad()
    def left(self, params: Tree) -> Sequence[Tensor]:
        """Return what the gradient at `params` has left, made again where it is gone; it goes."""
        known = self._left.pop(id(params), None)
        if known is not None:
            return known[1]
        return self.pair.gradient(tree.leaves(params), self.hparams, self.problem.minibatch)[1]


def paired(problem: Any, hparams: Tree) -> tuple[Any, str]:
    """Return the problem with `PairedInner`, and an empty string; or else as it is, and why, where that was tried."""
    traces, key = problem.traces, (Pair, signature((problem.params, hparams, problem.minibatch)))
    if key not in traces.cuts and key not in traces.refused and problem.traced_inner is not None:
        try:
            traces.cuts[key] = Pair(problem, problem.params, hparams)
        except Exception as error:
            traces.refused[key] = str(error).splitlines()[0]
    if key not in traces.cuts:
        return problem, traces.refused.get(key, "")
    view = problem.on_batch(problem.minibatch)
    view.inner_problem = partial(PairedInner, traces.cuts[key])
    return view, ""
