"""What a function of tensors does, as a graph of operations of torch; and functions that do parts of it.

`bilevel.oracles.recording` says when a graph is trusted; nothing else makes one.

Nothing is compiled: a part is written as Python that calls torch's operations one after the other, each by its shortest
way. An operation of torch takes about a microsecond by its own name, and three by its overload.
"""

from __future__ import annotations

import builtins
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WRITES = {torch.add, torch.sub, torch.mul, torch.div, torch.mv, torch.mm, torch.cat, torch.neg}
WRITES |= {torch.addcmul, torch.addmv, torch.addmm}
"""What can write its result into a tensor that is there."""
aten = torch.ops.aten
_SAME = (aten.detach.default, aten.alias.default)
_SHAPES = (aten.view.default, aten._unsafe_view.default, aten.expand.default)
_MOVES = (aten.expand.default, aten.view.default, aten.t.default)
_NEUTRAL = {aten.mul.Tensor: 1, aten.mul.Scalar: 1, aten.pow.Tensor_Scalar: 1, aten.add.Tensor: 0}


class NotRecordedError(ValueError):
    """Operations that depend on more than shapes; the message says on what."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes operations into a graph; tensors that are no inputs and come from no operation are constants of it."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.constants = fx.Graph(), torch.nn.Module()
        self._nodes: dict[int, fx.Node] = {}
        self._sharing: Counter[int] = Counter()
        self._held: list[Tensor] = []  # an id is that of one tensor for as long as it lives
        self._moving: set[fx.Node] = set()
        for index, tensor in enumerate(inputs):
            node = self.graph.placeholder(f"input_{index}")
            self._moving.add(node)
            self._know(tensor, node)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation would import torch.compile, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, torch.Generator) for each in (*args, *(kwargs or {}).values())):
            raise NotRecordedError("it draws random numbers from a torch.Generator")
        result = func(*args, **(kwargs or {}))
        target = self._without_writing(func, args[0]) if func._schema.is_mutable and args else func
        node = self.graph.call_function(target, *fx.node.map_aggregate((args, kwargs or {}), self.node))
        moving = bool(self._moving.intersection(node.all_input_nodes))
        if moving and isinstance(result, bool | int | float):
            raise NotRecordedError(f"{func} reads the values of tensors")
        self._moving.update({node} if moving else ())
        if isinstance(result, Tensor):
            self._know(result, node)
        elif isinstance(result, list | tuple):
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    only = self.graph.call_function(operator.getitem, (node, index))
                    self._moving.update({only} if moving else ())
                    self._know(part, only)
        return result

    def moves(self, value: Any) -> bool:
        """Return whether a value is a tensor that depends on the inputs."""
        return isinstance(value, Tensor) and self._nodes.get(id(value)) in self._moving

    def node(self, value: Any) -> Any:
        """Return the node of a tensor; what is no tensor is returned as it is."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            setattr(self.constants, name := f"constant_{len(self._held)}", value.detach())
            self._know(value, self.graph.get_attr(name))
        return self._nodes[id(value)]

    def _without_writing(self, func: Any, into: Any) -> Any:
        """Return what gives the result of writing into a result whose numbers no other tensor shares."""
        node = self._nodes.get(id(into))
        if node is None or node.op != "call_function" or self._sharing[into.untyped_storage()._cdata] > 1:
            return func
        packet = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None)
        return getattr(packet, func._overloadname, func)

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        if id(tensor) not in self._nodes:
            self._held.append(tensor)
            self._sharing[tensor.untyped_storage()._cdata] += 1
        node.meta["val"] = tensor
        self._nodes[id(tensor)] = node


class NoArrays(TorchFunctionMode):
    """Refuses arrays and lists of the numbers of tensors that depend on the inputs: no operation of torch makes them.

    Args:
        recorder: knows which tensors these are.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("numpy", "tolist", "__array__", "__dlpack__") and self._recorder.moves(args[0]):
            raise NotRecordedError(f"{name}() reads the values of tensors")
        return func(*args, **(kwargs or {}))


def record(function: Callable[..., Sequence[Tensor]], arguments: Sequence[Any]) -> fx.GraphModule:
    """Return the graph of a function, without operations that do nothing; arguments that are no tensors are constants.

    Raises:
        NotRecordedError: where the operations depend on the values of tensors, write in place, or draw random numbers.
    """
    recorder = Recorder([each for each in arguments if isinstance(each, Tensor)])
    try:
        with recorder, NoArrays(recorder):
            results = function(*arguments)
            recorder.graph.output(tuple(recorder.node(each) for each in results))
    except Exception as error:
        function(*arguments)  # an error of the function itself is raised as it is
        raise NotRecordedError(str(error).splitlines()[0]) from error
    module = fx.GraphModule(recorder.constants, recorder.graph)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.is_impure():
            raise NotRecordedError(f"{node.target} writes in place or draws random numbers")
    _check_shapes(module)
    clean(module)
    return module


def shortest(target: Any) -> Any:
    """Return what does the same as an overload of an operation in less time."""
    if not isinstance(target, torch._ops.OpOverload) or "dtype" in target._overloadname:
        return target
    name = target._schema.name.removeprefix("aten::")
    return getattr(torch._C._VariableFunctions, name, None) or getattr(torch._C.TensorBase, name, None) or target._op


class Part:
    """The operations of a graph between some of its nodes, as a function.

    Args:
        module: the graph with its constants.
        bound: nodes whose values are known when the function is made.
        inputs: nodes whose values are its arguments.
        outputs: nodes whose values it returns, as a tuple.
        into: whether its last argument is a tensor that the first output is written into; it returns the others.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        bound: Sequence[fx.Node],
        inputs: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        into: bool = False,
    ) -> None:
        self.nodes = between(module, {*bound, *inputs}, outputs)
        self._constants: dict[str, Any] = {}
        self._names = {node: f"a{index}" for index, node in enumerate(inputs)}
        self._names |= {node: f"b{index}" for index, node in enumerate(bound)}
        last = {each: node for node in self.nodes for each in node.all_input_nodes}
        lines = []
        for node in self.nodes:
            if node.op == "get_attr":
                self._names[node] = self._constant(getattr(module, str(node.target)))
                continue
            self._names[node] = f"v{len(self._names)}"
            # What others read must not change with the tensor that it is written into.
            apart = node not in last and node not in outputs[1:]
            lines.append(self._call(node, into and node is outputs[0] and apart))
            gone = [self._names[each] for each in last if last[each] is node and each not in outputs]
            lines += [f"{name} = None" for name in gone if name[0] == "v"]  # memory must not wait for the end
        given, first = [f"a{index}" for index in range(len(inputs))], outputs[0] if into else None
        if first is not None:
            given, outputs = [*given, "out"], outputs[1:]
            written = any(line.endswith(", out=out)") for line in lines)
            lines.append("" if written else f"out.copy_({self._names[first]})")
        lines.append(f"return ({''.join(f'{self._names[node]}, ' for node in outputs)})")
        made: dict[str, Any] = {}
        exec("\n    ".join([f"def replay({', '.join(given)}):", *lines]), made)
        self._code: CodeType = made["replay"].__code__

    def function(self, *values: Any) -> Callable[..., Any]:
        """Return the function at values of the bound nodes."""
        # Some operations of torch import a module when they are first called, which takes the builtins.
        names = {
            "__builtins__": builtins,
            **self._constants,
            **{f"b{index}": each for index, each in enumerate(values)},
        }
        return FunctionType(self._code, names)

    def _call(self, node: fx.Node, into: bool) -> str:
        target = shortest(node.target)
        arguments = [*map(self._shown, node.args), *(f"{key}={self._shown(each)}" for key, each in node.kwargs.items())]
        arguments += ["out=out"] if into and target in WRITES else []
        return f"{self._names[node]} = {self._constant(target)}({', '.join(arguments)})"

    def _constant(self, value: Any) -> str:
        self._constants[name := f"c{len(self._constants)}"] = value
        return name

    def _shown(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(self._shown, value)) + "]"
        return repr(value) if value is None or isinstance(value, bool | int) else self._constant(value)


def between(module: fx.GraphModule, given: Set[fx.Node], outputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes that outputs need besides given ones, in their order."""
    need: set[fx.Node] = set()
    stack = [*outputs]
    while stack:
        node = stack.pop()
        if node not in need and node not in given:
            need.add(node)
            stack += node.all_input_nodes
    return [node for node in module.graph.nodes if node in need]


def dependence(module: fx.GraphModule, known: dict[fx.Node, int], free: Set[Any] = frozenset()) -> dict[fx.Node, int]:
    """Return for each node which inputs its values depend on; what a `free` operation makes depends on none."""
    known = dict(known)
    for node in module.graph.nodes:
        if node not in known:
            known[node] = 0
            for each in node.all_input_nodes if node.target not in free else ():
                known[node] |= known[each]
    return known


def outputs_of(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes whose values a graph returns."""
    made: Any = module.graph.output_node().args[0]
    return list(made)


def _check_shapes(module: fx.GraphModule) -> None:
    """Refuse a recording in which the number of entries of a result depends on the values of the arguments."""
    follow: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or follow.intersection(node.all_input_nodes):
            follow.add(node)
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        sources = node.all_input_nodes
        if node.target is aten.index.Tensor:
            # The entries that a mask selects; positions are as many as there are.
            sources = [each for each in node.args[1] if each is not None and each.meta["val"].dtype is torch.bool]
        if follow.intersection(sources):
            raise NotRecordedError(f"the number of entries that {node.target} gives depends on the values of tensors")


def clean(module: fx.GraphModule) -> None:
    """Remove operations without effect: references to references, ``x * 1``, ``x + 0``, repetitions, unused results.

    Only identities that change no digit are used, so results stay those of autograd.
    """
    graph = module.graph
    filled: dict[fx.Node, float] = {}
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        same = _operand(node, filled) or seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            continue
        value = _fill(node, filled)
        if value is not None:
            filled[node] = value
        if node.target is aten.ones_like.default and node.meta["val"].dim() == 0:
            # The seed of a backward pass needs no value of the loss, which is then not computed.
            seed = node.meta["val"]
            node.target, node.args = aten.ones.default, ([],)
            node.kwargs = {"dtype": seed.dtype, "device": seed.device}
    graph.eliminate_dead_code()
    module.recompile()


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _fill(node: fx.Node, filled: dict[fx.Node, float]) -> float | None:
    """Return the number that all entries of a result are known to have, if there is one."""
    if node.target is aten.ones_like.default:
        return 1.0
    if node.target is aten.zeros_like.default:
        return 0.0
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 0:
        return 1.0
    if node.target in _MOVES:
        moved: Any = node.args[0]
        return filled.get(moved)
    return None


def _operand(node: fx.Node, filled: dict[fx.Node, float]) -> fx.Node | None:
    """Return the operand that a result is equal to, if there is one."""
    first: Any = node.args[0] if node.args else None
    if node.target in _SAME or (node.target in _SHAPES and _alike(first, node)):
        return first
    if node.target is aten.t.default and first.target is aten.t.default:
        return first.args[0]
    if node.target is aten.view.default and _alike(first, node):
        return first
    if node.target not in _NEUTRAL or node.kwargs:
        return None
    second: Any = node.args[1]
    for keep, drop in ((first, second), (second, first)):
        value: Any = filled.get(drop) if isinstance(drop, fx.Node) else drop
        if value == _NEUTRAL[node.target] and isinstance(keep, fx.Node) and _alike(keep, node):
            return keep
    return None
