"""Fewer operations that give the numbers of a recording, up to rounding: small ones take the time of their calls.

A node has a level: the higher, the more often what it depends on changes. Factors are multiplied with those of their
own level first, which is done less often, and a sum with a product is one operation of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

LARGEST = 2**18
"""Numbers in a matrix that is scaled in place of its products with vectors, at most: it is copied for a run."""
aten = torch.ops.aten
TIMES = {aten.mul.Tensor, aten.mul.Scalar}
SLOPES = {aten.sigmoid_backward.default, aten.tanh_backward.default}
"""What multiplies its first argument by numbers that are made of the others."""
PLUS = {aten.mv.default: aten.addmv.default, aten.mm.default: aten.addmm.default}


def fold(graph: fx.Graph, levels: dict[fx.Node, int]) -> None:
    """Fold the operations of a recording, of all nodes of which the levels are given."""
    for rule in (Folding.factored, Folding.summed):
        folding = Folding(graph, levels)
        for node in list(graph.nodes):
            value = node.meta.get("val")
            if node.op != "call_function" or not node.users or not isinstance(value, Tensor):
                continue
            with graph.inserting_before(node):
                new = rule(folding, node) if value.is_floating_point() else node
            if new is not node and _kind(new.meta["val"]) == _kind(value):
                node.replace_all_uses_with(new)
                _erase(graph, node)
    graph.eliminate_dead_code()


class Folding:
    """The rules for one graph, applied to nodes in their order; each returns what gives the value of a node."""

    def __init__(self, graph: fx.Graph, levels: dict[fx.Node, int]) -> None:
        self.graph, self.levels = graph, levels
        self._made: dict[Any, fx.Node] = {}

    def factored(self, node: fx.Node) -> Any:
        """Return a product with its factors in the order of their levels, and a sum of two of them as one."""
        target, args = node.target, node.args
        if target is aten.neg.default:
            return self._times(args[0], -1.0)
        if target in SLOPES and self._level(args[0]) > self._level(args[1]):
            (user, *others), value = node.users, node.meta["val"]
            chained = not others and user.target in TIMES and min(map(self._level, user.args)) < self._level(node)
            if chained or self._factors(args[0]):
                one = self._make(aten.ones.default, [], dtype=value.dtype, device=value.device)
                return self._times(args[0], self._make(target, one, *args[1:]))
        if node.kwargs or len(args) != 2:
            return self._total(node) if target is aten.sum.default and not node.kwargs else node
        a, b = args
        if target in TIMES:
            return self._times(a, b)
        if target is aten.mv.default and self._level(a) == 0 and (found := self._factors(b)):
            vector, scale = found
            if self._level(scale) == 0 and self._small(a):
                return self._make(target, self._times(a, scale), vector)
        if target is aten.sub.Tensor and isinstance(b, fx.Node) and self._level(a) > self._level(b):
            return self._make(aten.add.Tensor, a, self._times(b, -1.0))
        return self._sum(node, a, b) if target is aten.add.Tensor else node

    def summed(self, node: fx.Node) -> Any:
        """Return a sum with a product as one operation."""
        if node.target is not aten.add.Tensor or not all(isinstance(each, fx.Node) for each in node.args):
            return node
        args: Any = node.args
        scale = node.kwargs.get("alpha", 1)
        for other, product in (args, args[::-1]) if scale == 1 else (args,):
            first, second, whole = (_kind(each.meta["val"]) for each in (other, product, node))
            # What is made less often than the sum stays as it is.
            if len(product.users) > 1 or self._level(product) < self._level(node) or first[1:] != whole[1:]:
                continue
            if product.target in PLUS and second == whole and first[0]:
                return self._make(PLUS[product.target], other, *product.args, **_unless(1, alpha=scale))
            if product.target in TIMES:
                a, b = product.args
                if isinstance(b, fx.Node):
                    return self._make(aten.addcmul.default, other, a, b, **_unless(1, value=scale))
                return self._make(aten.add.Tensor, other, a, alpha=scale * b)
        return node

    def _times(self, a: Any, b: Any) -> Any:
        a, b = sorted((a, b), key=self._level, reverse=True)
        if not isinstance(a, fx.Node):
            return a * b
        found = self._factors(a)
        # Where others use the product, too, only factors that are constants in a run are folded: these cost nothing.
        alone = found is not None and (len(a.users) == 1 or self._level(found[1]) <= 0 >= self._level(b))
        if found and alone and self._level(b) < self._level(found[0]):
            return self._times(found[0], self._times(found[1], b))
        if a.target is aten.mv.default and len(a.users) == 1 and isinstance(b, fx.Node):
            matrix, vector = a.args
            alike = _kind(a.meta["val"]) == _kind(b.meta["val"])
            if alike and self._level(b) == self._level(matrix) == 0 and self._small(matrix):
                return self._make(a.target, self._times(matrix, self._make(aten.unsqueeze.default, b, 1)), vector)
        return self._make(aten.mul.Tensor, a, b)

    def _sum(self, node: fx.Node, a: Any, b: Any) -> Any:
        if a is b:
            return self._times(a, 2.0)
        one, other = self._factors(a), self._factors(b)
        if one and other and one[0] is other[0] and max(self._level(one[1]), self._level(other[1])) <= 0:
            scales = one[1], other[1]
            return self._times(one[0], self._make(aten.add.Tensor, *sorted(scales, key=self._level, reverse=True)))
        if isinstance(a, fx.Node) and a.target is aten.add.Tensor and len(a.users) == 1 and not a.kwargs:
            for rest, again in (a.args, a.args[::-1]):
                if again is b:  # both of its uses become one
                    return self._make(aten.add.Tensor, rest, b, alpha=2)
        return node

    def _total(self, node: fx.Node) -> fx.Node:
        """Return the sum of a product of two tensors with numbers: the numbers times their dot product."""
        whole: Any = node.args[0].meta["val"]  # type: ignore[union-attr]
        vectors, scale, parts = [], 1.0, [node.args[0]]

        def fits(part: Any) -> bool:
            value = part.meta["val"] if isinstance(part, fx.Node) else None
            return value is None or value.dim() == 0 or _kind(value) == _kind(whole)

        while parts:
            part: Any = parts.pop()
            if isinstance(part, fx.Node) and part.target in TIMES and all(map(fits, part.args)):
                parts += part.args
            elif isinstance(part, fx.Node) and part.meta["val"].dim() > 0:
                vectors.append(part)
            else:
                scale = part if scale == 1.0 else self._times(scale, part)
        if len(vectors) != 2 or not all(map(fits, vectors)) or not all(v.meta["val"].is_contiguous() for v in vectors):
            return node
        flat = [v if whole.dim() == 1 else self._make(aten.view.default, v, [-1]) for v in vectors]
        total = self._make(aten.dot.default, *flat)
        return total if scale == 1.0 else self._times(total, scale)

    def _factors(self, node: Any) -> tuple[Any, Any] | None:
        """Return the factors of a product, the one of the higher level first; None where both are of one."""
        if not isinstance(node, fx.Node) or node.target not in TIMES:
            return None
        a, b = sorted(node.args, key=self._level, reverse=True)
        return (a, b) if self._level(a) > self._level(b) else None

    def _small(self, matrix: Any) -> bool:
        return bool(matrix.meta["val"].numel() <= LARGEST)

    def _level(self, value: Any) -> int:
        return self.levels[value] if isinstance(value, fx.Node) else -1

    def _make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        key = target, repr(args), repr(kwargs)
        if key not in self._made or self._made[key]._erased:
            self._made[key] = node = self.graph.call_function(target, args, kwargs)
            self.levels[node] = max(map(self._level, node.all_input_nodes), default=0)
            node.meta["val"] = target(*fx.node.map_arg(args, lambda each: each.meta["val"]), **kwargs)
        return self._made[key]


def _unless(neutral: int, **kwargs: Any) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value != neutral}


def _kind(value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return value.shape, value.dtype, value.device


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing uses, and what only it has used."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        if not each.users and each.op == "call_function":
            _erase(graph, each)
