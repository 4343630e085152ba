"""Traced oracles: gradient and VJP of a general loss, recorded once as a list of tensor operations and replayed.

A reverse sweep over stored iterates pays for building and freeing an autograd graph at each step, although every step
does the same. `trace` records the operations of one inner gradient and of one double backward (reverse over reverse),
cleans them up, and replays them. The recording holds for one signature (structure, shapes, dtypes, device); another one
is recorded when it is met.

Repeated products at one point (`hvp`, `cross`: linear solves) and `jvp` stay with autograd, whose graph they share.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.losses import Losses
from bilevel.oracles.recording import NotRecordedError, Part, record

SHORTEST = 50
"""Steps of a run from which its gain is larger than the time of a look at whether a recording still holds."""
WORTH = 200
"""Steps of all runs from which the gain is larger than the time of the recording."""
Problem = TypeVar("Problem", bound=Losses)
Replay: TypeAlias = Callable[..., tuple[Tensor, ...]]


def trace(problem: Problem, mode: str = "fx") -> Problem:
    """Return a problem of the same losses whose `grad` and `vjp` are traced.

    The losses must be the same operations at every call: Python that looks at the values of tensors (``if``,
    ``float()``, ``.numpy()``, ``.tolist()``) is refused, as is a `torch.Generator`, and numbers that it computes are
    recorded as they are at the first call. Captured tensors may change their values in place, but must not be replaced.

    Args:
        problem: a problem without closed-form oracles.
        mode: deprecated: there is one way left, "fx"; "inductor", which was no faster, forwards to it.

    Raises:
        ValueError: for another mode, and for a problem with closed-form oracles.

    >>> from bilevel import BilevelProblem
    >>> problem = BilevelProblem(lambda w, u: (w**2).sum() * u.exp() + w.sum(), lambda w, u: (w**2).sum())
    >>> inner = trace(problem).bind(torch.zeros(()))
    >>> inner.grad(torch.ones(3))
    tensor([3., 3., 3.])
    """
    if mode == "inductor":
        warnings.warn("trace(problem, 'inductor') is now trace(problem).", DeprecationWarning, stacklevel=2)
    elif mode != "fx":
        raise ValueError(f"`trace` takes the mode 'fx', got {mode!r}.")
    if (kind := problem.traced_inner) is None:
        raise ValueError(
            f"{type(problem).__name__} has closed-form oracles, which are faster than traced ones: use it as it is."
        )
    view = copy.copy(problem)
    view.inner_problem, view.traces, view.derivatives_seen = kind, Traces(), {}
    return view


class TracedLinearization(Linearization):
    """A linearization whose `vjp` is replayed."""

    def _vjp(self, v: Tree) -> tuple[Tree, Tree]:
        inner = self.inner
        both = inner.problem.traces.replay(_products, inner.problem, self.params, inner.hparams, v)
        cut = len(tree.leaves(self.params))
        return tree.rebuild(self.params, both[:cut]), tree.rebuild(inner.hparams, both[cut:])


class TracedInner(InnerProblem):
    """A bound problem whose `grad` is replayed."""

    linearization = TracedLinearization

    def _grad(self, params: Tree) -> Tree:
        return tree.rebuild(params, self.problem.traces.replay(_gradient, self.problem, params, self.hparams))


def _gradient(problem: Losses, params: Tree, hparams: Tree) -> list[Tensor]:
    return tree.leaves(InnerProblem(problem, hparams)._grad(params))


def _products(problem: Losses, params: Tree, hparams: Tree, v: Tree) -> list[Tensor]:
    by_params, by_hparams = InnerProblem(problem, hparams).linearize(params)._vjp(v)
    return tree.leaves(by_params) + tree.leaves(by_hparams)


class Traces:
    """The recordings of a problem and of its views, made when they are first needed."""

    def __init__(self) -> None:
        self.made: dict[Any, Replay] = {}
        self.cuts: dict[Any, Any] = {}
        """Recordings that are cut into kernels (`bilevel.oracles.cut`), by what they depend on."""
        self.refused: dict[Any, str] = {}
        """Why there is none."""
        self._steps = 0

    def with_run_of(self, steps: int) -> int:
        """Return the steps of all runs with one of so many more."""
        self._steps += steps
        return self._steps

    def worth(self, steps: int) -> bool:
        """Whether kernels of a recording pay for a run of so many steps, given the runs before."""
        return self.with_run_of(steps) >= WORTH and steps >= SHORTEST

    def __reduce__(self) -> tuple[Any, ...]:
        return Traces, ()  # a copy in another process records anew

    def replay(self, oracle: Callable[..., list[Tensor]], problem: Losses, *trees: Tree) -> tuple[Tensor, ...]:
        """Return ``oracle(problem, *trees)`` from its recording; the batch of the problem is an argument of it."""
        arguments = (*trees, problem.minibatch)
        key = (oracle, signature(arguments))
        with torch.no_grad():
            if key not in self.made:
                self.made[key] = _recorded(oracle, problem, arguments)
            # Recorded operations hold for the layout that was recorded.
            return self.made[key](*map(_contiguous, tree.leaves(arguments)))


def _recorded(oracle: Callable[..., list[Tensor]], problem: Losses, arguments: Tree) -> Replay:
    def flat(*leaves: Any) -> list[Tensor]:
        *trees, batch = tree.rebuild(arguments, leaves)
        return oracle(problem.on_batch(batch), *trees)

    # One tensor may be two arguments, or one that the loss holds besides: copies keep them apart.
    apart = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in map(_contiguous, tree.leaves(arguments))]
    try:
        module = record(flat, apart)
    except NotRecordedError as reason:
        raise ValueError(
            f"the inner loss cannot be traced: {reason} (its Python must not depend on the values of tensors: use "
            "torch.where in place of `if` and of a boolean mask, tensors in place of float(); or leave out `trace`)."
        ) from reason
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    outputs: Any = module.graph.output_node().args[0]
    function = Part(module, [], inputs, outputs).function()

    def replay(*leaves: Any) -> tuple[Tensor, ...]:
        return function(*[leaf for leaf in leaves if isinstance(leaf, Tensor)])

    verify(flat, replay, apart)
    return replay


def _contiguous(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


def verify(oracle: Callable[..., list[Tensor]], replay: Replay, recorded_at: list[Any]) -> None:
    """Refuse a recording that gives other numbers than the oracle at other arguments than those it was made at."""
    generator = torch.Generator().manual_seed(0)
    others = [moved(leaf, generator) for leaf in recorded_at]
    for expected, got in zip(oracle(*others), replay(*others), strict=True):
        scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max() if expected.numel() else 0.0
        rtol = torch.finfo(expected.dtype).eps ** 0.4
        if not torch.allclose(got, expected, rtol=rtol, atol=float(rtol * scale), equal_nan=True):
            raise ValueError(
                "the inner loss cannot be traced: at other arguments the recorded operations give another gradient "
                "than the loss (its Python must not compute numbers that change from call to call, such as random "
                "ones; or leave out `trace`)."
            )


def moved(leaf: Any, generator: torch.Generator) -> Any:
    """Return an argument moved by a few per cent, away from zero: a domain such as the positive numbers is kept."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    part = 0.02 + 0.02 * torch.rand(leaf.shape, generator=generator, dtype=torch.float64)
    part = part.to(leaf)
    return torch.where(leaf == 0, part, leaf * (1 + part))


def signature(value: Tree) -> Any:
    """Return what a recording depends on: structure, shapes, dtypes and devices, and what is no tensor.

    Raises:
        TypeError: for what is no tensor and cannot be compared.
    """
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((key, signature(part)) for key, part in value.items())
    if isinstance(value, tuple | list):
        return type(value), *map(signature, value)
    try:
        hash(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"a recorded batch is of tensors, numbers and words, got a `{kind}`: take a tensor.") from None
    return type(value), value
