"""The kernels of any loss: its recorded double backward, cut in four by what an operation depends on.

    hyperparameters alone        once for a run
    x, but not v                 with each gradient; what products need of it stays, or is made again for each product
    on the way from v to H' v    one product after the other
    the rest, to C' v            for many points and vectors at once

The recording is that of ``(x, v, u) -> g(x, u), H' v, C' v``; x and v are the leaves of params, one after the other.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx

from bilevel.core import tree
from bilevel.core.autograd import vector_jacobian
from bilevel.core.tree import Tree
from bilevel.oracles.folding import fold
from bilevel.oracles.kernels import Kernels
from bilevel.oracles.recording import NotRecordedError, Part, between, record
from bilevel.oracles.tracing import signature

HELD = 2**24
"""Bytes that gradients may leave behind for products that are still to come; beyond that products make them again."""
STACK = 2**17
"""Numbers in the largest stack that sums of ``C' v`` make."""
FEW = 16
"""Points of a stack below which one after the other is quicker."""
DENSE = 300
"""Numbers in params up to which the Hessian of a quadratic loss is made."""
aten = torch.ops.aten
SHAPES = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default}
SHAPES |= {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
"""What takes the shape of a tensor, and not its values."""
LINEAR = {
    *("add", "sub", "rsub", "neg", "sum", "mean", "cumsum", "cat", "stack", "clone", "detach", "alias", "_to_copy"),
    *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "flip"),
    *("select", "slice", "narrow", "split", "split_with_sizes", "unbind", "diagonal", "index_select"),
    *("select_backward", "slice_backward", "diagonal_backward"),
}
"""Operations that are linear in all their tensors together."""
PRODUCTS = {"mul", "div", "mv", "mm", "bmm", "dot", "addmv", "addmm", "baddbmm", "mse_loss_backward"}
"""Operations that are linear in each of their tensors alone; "div" in the first."""
X, V, U, BATCH = 1, 2, 4, 8


class Cut:
    """The parts of the recording of one loss, for trees of some shapes.

    Raises:
        ValueError: for a loss whose operations are not the same at every call, or write in place.
    """

    def __init__(self, problem: Any, params: Tree, hparams: Tree) -> None:
        self.raveler, self.leaves = tree.Raveler(params), len(tree.leaves(hparams))
        minibatch = problem.minibatch

        def all_three(x: Tensor, v: Tensor, *rest: Tensor) -> list[Tensor]:
            feed = iter(rest[self.leaves :])
            given = tree.tree_map(lambda leaf: next(feed) if isinstance(leaf, Tensor) else leaf, minibatch)
            return derivatives(problem.on_batch(given), self.raveler, tree.rebuild(hparams, rest[: self.leaves]), x, v)

        # At other numbers than those of a run, and no two arguments one tensor.
        generator = torch.Generator().manual_seed(0)

        def near(leaf: Tensor, scale: float) -> Tensor:
            return leaf + scale * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)

        x = self.raveler.ravel(tree.copied(params))
        arguments = [near(x, 1.0), near(torch.zeros_like(x), 1.0), *(near(leaf, 0.1) for leaf in tree.leaves(hparams))]
        self.module = record(all_three, [*arguments, *(leaf.clone() for leaf in tensors(minibatch))])
        for node in self.module.graph.nodes:
            if node.op == "call_function" and node.is_impure():
                raise NotRecordedError(f"{node.target} writes in place or draws random numbers")
        self._split()

    def _split(self) -> None:
        module = self.module
        x, v, *rest = (node for node in module.graph.nodes if node.op == "placeholder")
        u, batch = rest[: self.leaves], rest[self.leaves :]
        known = {x: X, v: V} | dict.fromkeys(u, U) | dict.fromkeys(batch, BATCH)
        depends = dependence(module, known, SHAPES)
        ((gradient, *_),) = next(node for node in module.graph.nodes if node.op == "output").args
        affine = _affine(between(module, {*rest, x}, [gradient]), depends, x)
        fold(module.graph, {node: (2 if which & V else 1 if which & ~U else 0) for node, which in depends.items()})
        depends, takes = dependence(module, known, SHAPES), dependence(module, known)
        (outputs,) = next(node for node in module.graph.nodes if node.op == "output").args
        gradient, product, *cross = outputs

        def moves(node: fx.Node) -> bool:
            return bool(depends[node] & (X | BATCH))

        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        once = [node for node in calls if not takes[node] & ~U and any(takes[user] & ~U for user in node.users)]
        self.once = Part(module, [], u, once)
        bound, given = [*once, *u], [x, *batch]
        after = [node for node in between(module, {*bound, v, *given}, [product]) if takes[node] & V]
        inputs = dict.fromkeys(each for node in after for each in node.all_input_nodes)
        left = [each for each in inputs if moves(each) and not takes[each] & V and each.op == "call_function"]
        held = {node.meta["val"].untyped_storage()._cdata: node.meta["val"].untyped_storage() for node in left}
        self.left = sum(each.nbytes() for each in held.values())
        self.gradient = Part(module, bound, given, [gradient], into=True)
        self.leaving = Part(module, bound, given, [gradient, *left], into=True)
        self.product = Part(module, bound, [v, *given], [product], into=True)
        self.after = Part(module, bound, [v, *given, *left], [product], into=True)
        self.cross = Part(module, bound, [x, v, *batch], cross)
        alone = all(node.op != "placeholder" for node in between(module, {*bound, v}, [product]))
        self.constant = Part(module, bound, [v], [product]) if alone and affine and not moves(product) else None
        """H alone, where it is the same at every point, and the gradient is affine: of a quadratic loss."""
        self.shared = not any(depends[node] & BATCH for node in cross)
        """Whether products with C' are the same whatever the batch."""
        values = [node.meta["val"] for node in self.cross.nodes if depends[node] & (X | V) and "val" in node.meta]
        self.stack = max(1, STACK // max([self.raveler.size, *(value.numel() for value in values)]))
        for node in module.graph.nodes:
            node.meta.clear()  # or they would hold the numbers of the recording


def tensors(minibatch: Tree) -> list[Tensor]:
    """Return what is a tensor of the leaves of a batch."""
    return [leaf for leaf in tree.leaves(minibatch) if isinstance(leaf, Tensor)]


def derivatives(problem: Any, raveler: tree.Raveler, hparams: Tree, x: Tensor, v: Tensor) -> list[Tensor]:
    """Return ``g(x, u), H' v``, two vectors, and the leaves of ``C' v``, by autograd."""
    at, u = (tree.attach(each) for each in (raveler.unravel(x), hparams))
    with torch.enable_grad():
        gradient = tree.leaves(problem.gradient_graph(at, u))
        both = vector_jacobian(gradient, tree.leaves(at) + tree.leaves(u), tree.leaves(raveler.unravel(v)))
    return [_flat(gradient).detach(), _flat(both[: len(gradient)]), *both[len(gradient) :]]


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    flat = [leaf.reshape(-1) for leaf in leaves]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def dependence(module: fx.GraphModule, known: dict[fx.Node, int], free: Set[Any] = frozenset()) -> dict[fx.Node, int]:
    """Return for each node which inputs its values depend on; what a `free` operation makes depends on none."""
    known = dict(known)
    for node in module.graph.nodes:
        if node not in known:
            known[node] = 0
            for each in node.all_input_nodes if node.target not in free else ():
                known[node] |= known[each]
    return known


def _affine(nodes: Sequence[fx.Node], depends: dict[fx.Node, int], x: fx.Node) -> bool:
    """Return whether what these nodes make is affine in x, as their operations say.

    That products are the same at every point does not say so: neither do those of ``|x|`` or ``relu(x)`` move.
    """
    given = x.meta["val"]

    def fits(node: fx.Node) -> bool:
        if node.op != "call_function" or not depends[node] & X or node.target is operator.getitem:
            return True
        if "mode" in node.target._overloadname or node.meta.get("val", given).dtype != given.dtype:  # type: ignore[union-attr]
            return False  # it rounds
        name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
        moving = [isinstance(each, fx.Node) and bool(depends[each] & X) for each in (*node.args, *node.kwargs.values())]
        if name in PRODUCTS:
            return sum(moving) == 1 and (name != "div" or moving[0])
        return name in LINEAR

    return all(map(fits, nodes))


class CutKernels(Kernels):
    """The kernels of a bound problem by the parts of its recording.

    Args:
        cut: the recording.
        inner: the bound problem.
        steps: of the run.
        first: the index of its first step, whose batch it sees where steps have batches of their own.
        held: of how many steps at once products are still to come.
    """

    form = "recorded"

    def __init__(self, cut: Cut, inner: Any, steps: int, first: int, held: int) -> None:
        self.cut, self.inner, self._first, self._next, self._last = cut, inner, first, first, first + steps - 1
        problem, leaves = inner.problem, tree.leaves(inner.hparams)
        bound = [*cut.once.function()(*leaves), *leaves]
        view = problem.on_step(first)
        self._batch, self._sampled = tensors(view.minibatch), view is not problem
        self._kind = signature(view.minibatch)
        left = cut.left + (sum(each.nbytes for each in self._batch) if self._sampled else 0)
        self._leaves = held * left <= HELD
        self._gradient = (cut.leaving if self._leaves else cut.gradient).function(*bound)
        self._product = (cut.after if self._leaves else cut.product).function(*bound)
        self._cross = cut.cross.function(*bound)
        if (
            cut.constant is not None
            and problem.symmetric
            and not self._sampled
            and cut.raveler.size <= min(steps, DENSE)
        ):
            like = leaves[0]
            hessian = torch.func.vmap(cut.constant.function(*bound))(torch.eye(cut.raveler.size).to(like))[0]
            linear = like.new_zeros(cut.raveler.size)
            self.gradient(torch.zeros_like(linear), [], linear)
            # The products are those of autograd, which leaves out what is detached.
            at = torch.randn(linear.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(like)
            self.gradient(at, [], moved := torch.empty_like(at))
            if same_numbers(torch.addmv(linear, hessian, at), moved):
                self.affine = hessian, linear

    def from_step(self, index: int) -> CutKernels:
        view = copy.copy(self)
        view._first = self._first + index
        return view

    def places(self, count: int) -> Any:
        self._next = self._first
        return [[] for _ in range(count)]

    def gradient(self, x: Tensor, place: Any, out: Tensor) -> None:
        index, batch = self._next, self._batch
        if self._sampled:
            batch, self._next = self._drawn(index), index + 1
        left = self._gradient(x, *batch, out)
        place[:] = (x, *batch, *left) if self._leaves else (x, index)

    def product(self, at: Any, v: Tensor, out: Tensor) -> None:
        if self._leaves:
            self._product(v, *at, out)
        else:
            self._product(v, at[0], *(self._drawn(at[1]) if self._sampled else self._batch), out)

    def _drawn(self, index: int) -> list[Tensor]:
        batch = self.inner.problem.on_step(index).minibatch
        if signature(batch) != self._kind:
            raise NotRecordedError("its batches differ in their shapes, or in what is no tensor")
        return tensors(batch)

    def cross(self, points: Tensor, vectors: Tensor) -> Tree:
        own = self._sampled and not self.cut.shared
        if own or self.cut.stack < FEW:
            pairs = enumerate(zip(points.unbind(0), vectors.unbind(0), strict=True))
            parts = [self._cross(x, v, *(self._drawn(self._first + k) if own else self._batch)) for k, (x, v) in pairs]
        else:
            batched = torch.func.vmap(lambda x, v: self._cross(x, v, *self._batch))
            chunks = [torch.split(each, self.cut.stack) for each in (points, vectors)]
            parts = [[part.sum(0) for part in batched(*chunk)] for chunk in zip(*chunks, strict=True)]
        return tree.rebuild(self.inner.hparams, [sum(each[1:], each[0]) for each in zip(*parts, strict=True)])

    def agrees(self, x: Tensor) -> bool:
        """Return whether gradient and products at the first point of a run are those of autograd."""
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
        view = self.inner.problem.on_step(self._first)
        expected = derivatives(view, self.cut.raveler, self.inner.hparams, x, v)
        (place,), gradient, product = self.places(1), torch.empty_like(x), torch.empty_like(x)
        self.gradient(x, place, gradient)
        self.product(place, v, product)
        self.steepness = _largest(expected[1])
        got = [product, *tree.leaves(self.cross(x[None], v[None]))]
        return self._is_gradient(x, gradient, expected[0]) and all(map(same_numbers, got, expected[1:]))

    def confirms(self, x: Tensor, gradient: Tensor) -> bool:
        """Return whether the gradient at the end of a run is that of autograd; of batches, on that of the last step."""
        if self._sampled:
            self._next, view = self._last, self.inner.problem.on_step(self._last)
            gradient = derivatives(view, self.cut.raveler, self.inner.hparams, x, torch.zeros_like(x))[0]
        self.gradient(x, [], again := torch.empty_like(x))
        return self._is_gradient(x, again, gradient)

    def _is_gradient(self, x: Tensor, got: Tensor, expected: Tensor) -> bool:
        """Return whether a gradient is what is expected, up to rounding of what cancels in it near a solution."""
        return same_numbers(got, expected, self.steepness * _largest(x))


def same_numbers(got: Tensor, expected: Tensor, scale: float = 0.0) -> bool:
    """Return whether a recording gives what autograd gives, but for rounding of numbers up to `scale`."""
    rtol = torch.finfo(expected.dtype).eps ** 0.6
    return torch.allclose(got, expected, rtol=rtol, atol=rtol * max(scale, _largest(expected)), equal_nan=True)


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(0.0, 0.0, 0.0).abs().max()) if values.numel() else 0.0


def recorded(inner: Any, params: Tree, first: int, steps: int, held: int) -> CutKernels | None:
    """Return the kernels of a loss as it is written; None for losses with kernels of their own, and where none pay.

    Where the loss cannot be recorded, ``inner.refused`` says why.

    Args:
        inner: the bound problem.
        params: where the run begins.
        first: the index of its first step.
        steps: how many it takes.
        held: of how many steps at once products are still to come.
    """
    problem, traces, leaves = inner.problem, inner.problem.traces, tree.leaves(params)
    alike = len({(leaf.dtype, leaf.device) for leaf in leaves}) == 1 and leaves[0].is_floating_point()
    special = problem.batch is not None or problem.nonsmooth is not None or inner.augmented
    if special or not alike or traces is None or not traces.worth(steps):
        return None
    view = problem.on_step(first)
    try:
        key = signature((params, inner.hparams, view.minibatch))
    except TypeError as error:
        inner.refused = str(error)
        return None
    if key not in traces.refused:
        try:
            if problem.traced_inner is None:
                return None
            kernels = _agreeing(key, inner, view, params, first, steps, held)
        except Exception as error:
            traces.refused[key] = str(error).splitlines()[0]
        else:
            return kernels
    inner.refused = traces.refused[key]
    return None


def _agreeing(key: Any, inner: Any, view: Any, params: Tree, first: int, steps: int, held: int) -> CutKernels:
    cuts, x = inner.problem.traces.cuts, tree.Raveler(params).ravel(params)
    for known in dict.fromkeys((cuts.get(key), None)):  # what the loss holds may have been replaced since
        cuts[key] = cut = known or Cut(view, params, inner.hparams)
        kernels = CutKernels(cut, inner, steps, first, held)
        if kernels.agrees(x):
            return kernels
    raise NotRecordedError("its numbers depend on more than its arguments")
