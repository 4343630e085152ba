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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bilevel.core import tree
from bilevel.core.autograd import vector_jacobian
from bilevel.core.tree import Tree
from bilevel.oracles.graph import NotRecordedError, Part, between, dependence, outputs_of
from bilevel.oracles.graph_folding import fold
from bilevel.oracles.kernels import Kernels
from bilevel.oracles.recording import Recording, derivatives, flat, same_numbers, tensors, why

SHORTEST = 50
"""Steps of a run from which its gain is larger than the time of a look at whether a recording still holds."""
WORTH = 200
"""Steps of all runs from which the gain is larger than the time of the recording."""
HELD = 2**24
"""Bytes that gradients may leave behind for products that are still to come; beyond that products make them again."""
STACK = 2**17
"""Numbers in the largest stack that sums of ``C' v`` make."""
FEW = 16
"""Points of a stack below which one after the other is quicker."""
MOST = 2**18
"""Numbers that derivatives by all hyperparameters may have; beyond that forward mode takes them one by one."""
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


class Cut(Recording):
    """The parts of the recording of ``g, H' v, C' v`` for x and v that are vectors."""

    def given(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree]:
        return self.ravelers[0].ravel(params), hparams

    def oracle(self, problem: Any, x: Tree, v: Tree, u: Tree, *batches: Tree) -> list[Tensor]:
        unravel = self.ravelers[0].unravel
        gradient, product, cross = derivatives(problem.on_batch(*batches), unravel(x), unravel(v), u)
        return [flat(gradient), flat(product), *cross]

    def split(self, module: fx.GraphModule, inputs: list[list[fx.Node]], outputs: list[fx.Node]) -> None:
        (x,), (v,), u, batch = inputs
        known = {x: X, v: V} | dict.fromkeys(u, U) | dict.fromkeys(batch, BATCH)
        depends = dependence(module, known, SHAPES)
        affine = _affine(between(module, {*u, *batch, x}, outputs[:1]), depends, x)
        fold(module.graph, {node: (2 if which & V else 1 if which & ~U else 0) for node, which in depends.items()})
        depends, takes = dependence(module, known, SHAPES), dependence(module, known)
        gradient, product, *cross = outputs_of(module)

        def moves(node: fx.Node) -> bool:
            return bool(depends[node] & (X | BATCH))

        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        once = [node for node in calls if not takes[node] & ~U and any(takes[user] & ~U for user in node.users)]
        self.once = Part(module, [], u, once)
        bound, given = [*once, *u], [x, *batch]
        after = [node for node in between(module, {*bound, v, *given}, [product]) if takes[node] & V]
        needed = dict.fromkeys(each for node in after for each in node.all_input_nodes)
        left = [each for each in needed if moves(each) and not takes[each] & V and each.op == "call_function"]
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
        self.stack = max(1, STACK // max([self.ravelers[0].size, *(value.numel() for value in values)]))

    def bound(self, hparams: Sequence[Tensor]) -> list[Tensor]:
        """Return the values of what depends on hyperparameters alone."""
        return [*self.once.function()(*hparams), *hparams]

    def replay(self, x: list[Tensor], v: list[Tensor], u: list[Tensor], *batches: list[Tensor]) -> Sequence[Tensor]:
        bound, given = self.bound(u), (*x, *batches[0])
        gradient, product, *again = (torch.empty_like(x[0]) for _ in range(4))
        left = self.leaving.function(*bound)(*given, gradient)
        self.after.function(*bound)(*v, *given, *left, product)
        self.gradient.function(*bound)(*given, again[0])
        self.product.function(*bound)(*v, *given, again[1])
        # Runs take either pair: a mean shows what is wrong in one of them.
        both = (gradient.add_(again[0]).mul_(0.5), product.add_(again[1]).mul_(0.5))
        cross = self.cross.function(*bound)
        alone = cross(*x, *v, *batches[0])
        if self.stack < FEW:
            return *both, *alone
        rows = torch.stack([*x, *v] * 2).view(2, 2, -1)  # apart in memory, as those of runs are
        try:
            stacked = stacks(cross, batches[0])(rows[:, 0], rows[:, 1])
        except RuntimeError:  # operations that have no rule for stacks
            self.stack = 1
            return *both, *alone
        return *both, *((a + b.mean(0)) / 2 for a, b in zip(alone, stacked, strict=True))


def stacks(cross: Callable[..., Any], batch: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Return (points, vectors) -> ``C' v`` of each pair."""

    def one(x: Tensor, v: Tensor) -> Any:
        return cross(x, v, *batch)

    return torch.func.vmap(one)


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


class Tangents(Recording):
    """The recording of g and, with a row t of v for each hyperparameter and its unit e, ``H t + C e``, H symmetric."""

    def given(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree]:
        return self.ravelers[0].ravel(params), hparams

    def along(self, x: Tree) -> Tree:
        return x.expand(self.ravelers[1].size, -1)

    def oracle(self, problem: Any, x: Tree, v: Tree, u: Tree, *batches: Tree) -> list[Tensor]:
        at, hparams = tree.attach(self.ravelers[0].unravel(x)), tree.attach(u)
        stacked = tree.Raveler(tree.tree_map(lambda leaf: leaf.expand(len(v), *leaf.shape), at), batched=True)
        with torch.enable_grad():
            gradient = tree.leaves(problem.on_batch(*batches).gradient_graph(at, hparams))
            # C' y is linear in y: its derivative by y is C.
            y = [torch.zeros_like(each).requires_grad_() for each in gradient]
            cross = flat(vector_jacobian(gradient, tree.leaves(hparams), y, create_graph=True))
            moves = _by_rows([cross], y, [torch.eye(len(cross)).to(cross)])
            products = _by_rows(gradient, tree.leaves(at), tree.leaves(stacked.unravel(v)))
        rows = [(a + b).reshape(len(cross), -1) for a, b in zip(products, moves, strict=True)]
        return [flat(gradient).detach(), torch.cat(rows, 1)]

    def split(self, module: fx.GraphModule, inputs: list[list[fx.Node]], outputs: list[fx.Node]) -> None:
        x, v, u, batch = inputs
        takes = dependence(module, dict.fromkeys(u, U) | dict.fromkeys([*x, *v, *batch], X))
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        once = [node for node in calls if not takes[node] & ~U and any(takes[user] & ~U for user in node.users)]
        self._once = Part(module, [], u, once)
        self._push = Part(module, [*once, *u], [*x, *v, *batch], outputs)

    def function(self, hparams: list[Tensor]) -> Callable[..., Any]:
        """Return (x, v, *batch) -> what is recorded."""
        return self._push.function(*self._once.function()(*hparams), *hparams)

    def replay(self, x: list[Tensor], v: list[Tensor], u: list[Tensor], *batches: list[Tensor]) -> Sequence[Tensor]:
        made: Sequence[Tensor] = self.function(u)(*x, *v, *batches[0])
        return made


def _by_rows(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(
        outputs, inputs, cotangents, is_grads_batched=True, retain_graph=True, materialize_grads=True
    )


class CutKernels(Kernels):
    """The kernels of a bound problem by the parts of its recording.

    Args:
        cut: the recording.
        inner: the bound problem.
        steps: of the run.
        first: the index of its first step, whose batch it sees where steps have batches of their own.
        held: of how many steps at once products are still to come.
        tangents: the recording for forward mode.
    """

    form = "recorded"

    def __init__(
        self, cut: Cut, inner: Any, steps: int, first: int, held: int, tangents: Tangents | None = None
    ) -> None:
        self._tangents = tangents
        self._moved = None if tangents is None else tangents.function(tensors(inner.hparams))
        self.cut, self.inner, self._first, self._next, self._last = cut, inner, first, first, first + steps - 1
        problem, leaves = inner.problem, tensors(inner.hparams)
        bound = cut.bound(leaves)
        view = problem.on_step(first)
        self._kept: dict[int, list[Tensor]] = {}
        """The first batch that stays for products, and of which step."""
        self._batch, self._sampled = cut.tensors(view.minibatch), view is not problem
        left = cut.left + (sum(each.nbytes for each in self._batch) if self._sampled else 0)
        self._leaves = 0 < held * left <= HELD
        self._gradient = (cut.leaving if self._leaves else cut.gradient).function(*bound)
        self._product = (cut.after if self._leaves else cut.product).function(*bound)
        self._cross = cut.cross.function(*bound)
        size, like = cut.ravelers[0].size, leaves[0]
        if cut.constant is not None and problem.symmetric and not self._sampled and size <= min(steps, DENSE):
            hessian = torch.func.vmap(cut.constant.function(*bound))(torch.eye(size).to(like))[0]
            linear = like.new_zeros(size)
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
            if self._leaves and not self._kept:
                self._kept[index] = batch
        left = self._gradient(x, *batch, out)
        place[:] = (x, *batch, *left) if self._leaves else (x, index)

    def product(self, at: Any, v: Tensor, out: Tensor) -> None:
        if self._leaves:
            self._product(v, *at, out)
        else:
            self._product(v, at[0], *(self._drawn(at[1]) if self._sampled else self._batch), out)

    def push(self, x: Tensor, out: Tensor) -> None:
        assert self._moved is not None
        out[0], out[1:] = self._moved(x[0], x[1:], *self._batch)

    def _drawn(self, index: int) -> list[Tensor]:
        return self.cut.tensors(self.inner.problem.on_step(index).minibatch)

    def cross(self, points: Tensor, vectors: Tensor) -> Tree:
        own = self._sampled and not self.cut.shared
        if own or self.cut.stack < FEW:
            pairs = enumerate(zip(points.unbind(0), vectors.unbind(0), strict=True))
            parts = [self._cross(x, v, *(self._drawn(self._first + k) if own else self._batch)) for k, (x, v) in pairs]
        else:
            batched = stacks(self._cross, self._batch)
            chunks = [torch.split(each, self.cut.stack) for each in (points, vectors)]
            parts = [[part.sum(0) for part in batched(*chunk)] for chunk in zip(*chunks, strict=True)]
        return tree.rebuild(self.inner.hparams, [sum(each[1:], each[0]) for each in zip(*parts, strict=True)])

    def confirm(self, x: Tensor, gradient: Tensor) -> None:
        """Refuse a gradient at the end of a run that is not that of autograd; of batches, on that of the last step."""
        for index, batch in self._kept.items():
            before = [each.clone() for each in batch]
            if not all(map(torch.equal, before, self._drawn(index))):
                raise NotRecordedError("its batches are written over by later ones")
        if self._sampled:
            self._next, view = self._last, self.inner.problem.on_step(self._last)
            gradient = self.cut.oracle(view, x, torch.zeros_like(x), self.inner.hparams, view.minibatch)[0]
        self.gradient(x, [], again := torch.empty_like(x))
        self.cut.confirm(x, again, gradient)
        if self._tangents is not None and self._moved is not None:
            again, _ = self._moved(x, torch.zeros_like(self._tangents.along(x)), *self._batch)
            self._tangents.confirm(x, again, gradient)


def recorded(inner: Any, params: Tree, first: int, steps: int, held: int, forward: bool = False) -> CutKernels | None:
    """Return the kernels of a loss as it is written; None for losses with kernels of their own, and where none pay.

    Where the loss cannot be recorded, ``inner.refused`` says why.

    Args:
        inner: the bound problem.
        params: where the run begins.
        first: the index of its first step.
        steps: how many it takes.
        held: of how many steps at once products are still to come.
        forward: whether derivatives by all hyperparameters are carried along.
    """
    problem, traces, leaves = inner.problem, inner.problem.traces, tree.leaves(params)
    alike = len({(leaf.dtype, leaf.device) for leaf in leaves}) == 1 and leaves[0].is_floating_point()
    special = problem.batch is not None or problem.nonsmooth is not None or inner.augmented
    if special or not alike or traces is None:
        return None
    if traces.with_run_of(steps) < WORTH or steps < SHORTEST:
        return None
    view = problem.on_step(first)
    try:
        if problem.traced_inner is None:
            return None
        arguments, tangents = (view, params, inner.hparams, view.minibatch), None
        if forward:
            if view is not problem or not problem.symmetric or tree.size(params) * tree.size(inner.hparams) > MOST:
                return None
            tangents = traces.begin(Tangents, *arguments)
        return CutKernels(traces.begin(Cut, *arguments), inner, steps, first, held, tangents)
    except Exception as error:
        inner.refused = why(error)
        return None
