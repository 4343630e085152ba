"""`Recording`: derivatives of losses as a recorded graph of operations, and when it is trusted.

Whatever replays a loss goes through here: it says which derivatives it wants as a kind of `Recording`, and
`Recordings.begin` hands it one. What the numbers of a recording may depend on, and what is done about it:

    structure, shapes, dtypes, devices; numbers, words, None    `signature`: each has a recording of its own
    arguments that are one tensor, or lie in another order      recorded on copies, replayed on contiguous tensors
    values that Python reads, or that decide on shapes          refused, as it is recorded
    random numbers, writes into tensors                         refused, as it is recorded
    batches that differ in more than numbers of tensors         refused, as they come: `tensors`
    batches that are written over while products need them      refused, where a run ends: `CutKernels.confirm`
    all else: closures, modules that train, counters, steps     compared with autograd where a run begins, and where it
                                                                ends: `begin`, `confirm`

What refuses is a `NotRecordedError`, whose message goes on after "the loss is not recorded:".
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from bilevel.core import tree
from bilevel.core.autograd import vector_jacobian
from bilevel.core.tree import Tree
from bilevel.oracles.graph import NotRecordedError, outputs_of, record

DIGITS = 0.6
"""A recording has to give this part of the digits of autograd: operations may be in another order."""
PLAIN = bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device
"""What a batch may hold besides tensors: what never changes, so that it can be compared."""


def signature(value: Tree) -> Any:
    """Return what a recording depends on: structure, shapes, dtypes and devices, and what is no tensor.

    Raises:
        NotRecordedError: for what is no tensor and cannot be compared.
    """
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((key, signature(part)) for key, part in value.items())
    if isinstance(value, tuple | list):
        return type(value), *map(signature, value)
    if not isinstance(value, PLAIN):
        kind = type(value).__name__
        raise NotRecordedError(f"a recorded batch is of tensors, numbers and words, got a `{kind}`: take a tensor")
    return type(value), repr(value)  # by which 0.0 and -0.0 are two, and NaN is itself


def derivatives(problem: Any, x: Tree, v: Tree, u: Tree) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the leaves of the inner gradient ``g(x, u)``, of ``H' v`` and of ``C' v``, by autograd."""
    at, hparams = tree.attach(x), tree.attach(u)
    with torch.enable_grad():
        gradient = tree.leaves(problem.gradient_graph(at, hparams))
        both = vector_jacobian(gradient, tree.leaves(at) + tree.leaves(hparams), tree.leaves(v))
    return [each.detach() for each in gradient], list(both[: len(gradient)]), list(both[len(gradient) :])


def flat(leaves: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    parts = [leaf.reshape(-1) for leaf in leaves]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Recording(ABC):
    """Derivatives of the losses of a problem, recorded for trees of some shapes: a subclass says which.

    Args:
        problem: the problem.
        params: inner variable; only its form and about which numbers it holds.
        hparams: likewise.
        batches: those that the losses see.

    Raises:
        NotRecordedError: for losses whose operations are not the same at every call.
    """

    def __init__(self, problem: Any, params: Tree, hparams: Tree, *batches: Tree) -> None:
        self._batches = [signature(each) for each in batches]
        self._steepness: list[float] = []
        self._sizes: list[float] = []
        self.ravelers = tree.Raveler(tree.copied(params)), tree.Raveler(tree.copied(hparams))
        x, u = self.given(params, hparams)
        trees = x, self.along(x), u, *batches
        generator = torch.Generator().manual_seed(0)
        # At other numbers than those of a run, and no two arguments one tensor.
        arguments = [_moved(leaf, generator) for leaf in tree.leaves(trees[:3])]
        arguments += map(_apart, tree.leaves(batches))
        module = record(lambda *leaves: self.oracle(problem, *tree.rebuild(trees, leaves)), arguments)
        nodes = (node for node in module.graph.nodes if node.op == "placeholder")
        self.split(module, [[next(nodes) for _ in tensors(each)] for each in trees], outputs_of(module))
        for node in module.graph.nodes:
            node.meta.clear()  # or they would hold the numbers of the recording

    def given(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree]:
        """Return params and hyperparameters as the function takes them."""
        return params, hparams

    def along(self, x: Tree) -> Tree:
        """Return the form of v."""
        return x

    @abstractmethod
    def oracle(self, problem: Any, x: Tree, v: Tree, u: Tree, *batches: Tree) -> list[Tensor]:
        """Return by autograd what is recorded: the leaves of g, those of ``H' v``, and others."""

    @abstractmethod
    def split(self, module: fx.GraphModule, inputs: list[list[fx.Node]], outputs: list[fx.Node]) -> None:
        """Make the parts that are replayed; `inputs` are those of x, v, u and each batch."""

    @abstractmethod
    def replay(self, x: list[Tensor], v: list[Tensor], u: list[Tensor], *batches: list[Tensor]) -> Sequence[Tensor]:
        """Return what `oracle` returns, by the parts."""

    def tensors(self, batch: Tree, which: int = 0) -> list[Tensor]:
        """Return the tensors of a batch as parts take them; refuse what differs in more than their numbers."""
        if signature(batch) != self._batches[which]:
            raise NotRecordedError("its batches differ in their shapes, or in what is no tensor")
        return tensors(batch)

    def compare(self, problem: Any, params: Tree, hparams: Tree, *batches: Tree) -> None:
        """Refuse a recording that gives other numbers here than autograd."""
        x, u = self.given(params, hparams)
        generator = torch.Generator().manual_seed(1)

        def drawn(leaf: Tensor) -> Tensor:
            return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)

        v = tree.tree_map(drawn, self.along(x))
        expected, count = self.oracle(problem, x, v, u, *batches), len(tensors(x))
        try:
            got = self.replay(*map(tensors, (x, v, u, *batches)))
        except RuntimeError as error:  # what the losses hold is of other shapes by now
            raise NotRecordedError("it cannot be replayed") from error
        self._steepness = [_largest(each) for each in expected[count : 2 * count]]
        self._sizes = [_largest(each) for each in expected[count:]]
        if not self._agree(tensors(x), got, expected):
            raise NotRecordedError("its numbers depend on more than its arguments")

    def confirm(self, params: Tree, got: Tree, expected: Tree) -> None:
        """Refuse a recorded gradient, with what else may follow, at the end of a run, that is not that of autograd."""
        if not self._agree(*map(tree.leaves, (params, got, expected))):
            raise NotRecordedError("its recording gives other numbers at the end")

    def _agree(self, x: Sequence[Tensor], got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        """Return whether numbers are as expected, up to rounding of what cancels in them near a solution."""
        size = max(map(_largest, x))
        scales = [*(steep * size for steep in self._steepness), *self._sizes]
        return all(map(same_numbers, got, expected, scales))


def same_numbers(got: Tensor, expected: Tensor, scale: float = 0.0) -> bool:
    """Return whether a recording gives what autograd gives, but for rounding of numbers up to `scale`."""
    rtol = torch.finfo(expected.dtype).eps ** DIGITS
    atol = rtol * max(scale, _largest(expected))
    if expected.numel() and float((got - expected).abs().max()) <= atol:  # in few passes; else number by number
        return True
    return torch.allclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)


Kind = TypeVar("Kind", bound=Recording)


class Recordings:
    """The recordings of a problem and of its views, made when they are first needed."""

    def __init__(self) -> None:
        self.made: dict[Any, Recording] = {}
        self.refused: dict[Any, NotRecordedError] = {}
        """Why there is none."""
        self._steps = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Recordings, ()  # a copy in another process records anew

    def with_run_of(self, steps: int) -> int:
        """Return the steps of all runs with one of so many more."""
        self._steps += steps
        return self._steps

    def begin(
        self, kind: type[Kind], problem: Any, params: Tree, hparams: Tree, *batches: Tree, again: bool = True
    ) -> Kind:
        """Return a recording for one run, compared with autograd where it begins; the run ends with `confirm`.

        Without `again`, one that was compared before is not, for runs so short that it would be half of their work.

        Raises:
            NotRecordedError: where there is none.
        """
        key = kind, signature((params, hparams, *batches))
        if key in self.refused:
            raise self.refused[key]
        arguments = problem, params, hparams, *batches
        made: Any = self.made.pop(key, None)
        try:
            if made is not None and again:
                made = copy.copy(made)
                made.compare(*arguments)
        except NotRecordedError:  # what the losses hold has been replaced since
            made = None
        try:
            if made is None:
                made = kind(*arguments)
                made.compare(*arguments)
        except NotRecordedError as reason:
            self.refused[key] = reason.with_traceback(None)
            raise
        self.made[key] = made
        return copy.copy(made)


def tensors(value: Tree) -> list[Tensor]:
    """Return what is a tensor of the leaves of a tree; operations are recorded for contiguous ones."""
    return [leaf.contiguous() for leaf in tree.leaves(value) if isinstance(leaf, Tensor)]


def why(error: Exception) -> str:
    """Return the reason that an error gives, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _apart(leaf: Any) -> Any:
    return leaf.detach().contiguous().clone() if isinstance(leaf, Tensor) else leaf


def _moved(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers moved by a few per cent, away from zero: a domain such as the positive numbers is kept."""
    part = 0.02 + 0.02 * torch.rand(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
    return torch.where(leaf == 0, part, leaf.detach() * (1 + part)).contiguous()


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(0.0, 0.0, 0.0).abs().max()) if values.numel() else 0.0
