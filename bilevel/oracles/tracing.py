"""Recorded oracles of a general loss: gradients, and products of second derivatives, replayed leaf by leaf.

A reverse sweep over stored iterates pays for building and freeing an autograd graph at each step, although every step
does the same. The recording of

    (params, v, hparams, batch) -> g, H' v, C' v

is cut in two by what depends on v: a step makes the first half, and its derivative the second, of what the first has
left behind or makes again.

Repeated products at one point (`hvp`, `cross`: linear solves) and `jvp` stay with autograd, whose graph they share.
`bilevel.oracles.recorded_kernels` makes long runs on flat vectors of the same recording.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx

from bilevel.core import tree
from bilevel.core.status import warn
from bilevel.core.tree import Tree
from bilevel.oracles.graph import NotRecordedError, Part, between, dependence
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.losses import Losses
from bilevel.oracles.recording import Recording, Recordings, derivatives, signature, tensors, why

HELD = 2**25
"""Bytes that the gradients of a run may leave behind; beyond that products make them again."""
Problem = TypeVar("Problem", bound=Losses)


def trace(problem: Problem, mode: str = "fx") -> Problem:
    """Return a problem of the same losses whose `grad` and `vjp` are traced.

    The losses must be the same operations at every call: Python that looks at the values of tensors (``if``,
    ``float()``, ``.numpy()``, ``.tolist()``) is refused, as are random numbers and writes into parts of tensors. Every
    solve compares with autograd where it begins and where it ends: what the losses hold may change in between.

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
        warn("trace(problem, 'inductor') is now trace(problem).", DeprecationWarning)
    elif mode != "fx":
        raise ValueError(f"`trace` takes the mode 'fx', got {mode!r}.")
    if (kind := problem.traced_inner) is None:
        raise ValueError(
            f"{type(problem).__name__} has closed-form oracles, which are faster than traced ones: use it as it is."
        )
    view = copy.copy(problem)
    view.inner_problem, view.traces, view.derivatives_seen = kind, Recordings(), {}
    return view


def replaying(problem: Any, hparams: Tree) -> tuple[Any, str]:
    """Return the problem with recorded oracles for short runs, and an empty string; or else as it is, and why."""
    try:
        if problem.traced_inner is None:
            return problem, ""
        halves = problem.traces.begin(Halves, problem, problem.params, hparams, problem.minibatch, again=False)
    except Exception as error:
        return problem, why(error)
    view = problem.on_batch(problem.minibatch)
    view.inner_problem = partial(TracedInner, halves=halves)
    return view, ""


class Halves(Recording):
    """The two halves of the recording."""

    def oracle(self, problem: Any, x: Tree, v: Tree, u: Tree, *batches: Tree) -> list[Tensor]:
        return [leaf for part in derivatives(problem.on_batch(*batches), x, v, u) for leaf in part]

    def split(self, module: fx.GraphModule, inputs: list[list[fx.Node]], outputs: list[fx.Node]) -> None:
        x, v, u, batch = inputs
        cut = self._cut = len(x)
        on_the_way = dependence(module, dict.fromkeys([*x, *u, *batch], 0) | dict.fromkeys(v, 1))
        after = [node for node in between(module, {*x, *v, *u, *batch}, outputs[cut:]) if on_the_way[node]]
        needed = dict.fromkeys([*(each for node in after for each in node.all_input_nodes), *outputs[cut:]])
        left = [each for each in needed if not on_the_way[each] and each.op != "get_attr"]
        self._first = Part(module, [], [*x, *u, *batch], [*outputs[:cut], *left]).function()
        self._second = Part(module, [], [*v, *left], outputs[cut:]).function()

    def replay(self, x: list[Tensor], v: list[Tensor], u: list[Tensor], *batches: list[Tensor]) -> Sequence[Tensor]:
        made = self._first(*x, *u, *batches[0])
        return *made[: self._cut], *self._second(*v, *made[self._cut :])

    def gradient(self, x: Tree, hparams: Tree, batch: Tree) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the leaves of the gradient, and what it leaves behind."""
        made = self._first(*tensors(x), *tensors(hparams), *self.tensors(batch))
        return made[: self._cut], made[self._cut :]

    def products(self, v: Tree, left: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the leaves of ``H' v`` and ``C' v``."""
        made: Sequence[Tensor] = self._second(*tensors(v), *left)
        return made


class TracedLinearization(Linearization):
    """A linearization whose `vjp` is replayed."""

    def _vjp(self, v: Tree) -> tuple[Tree, Tree]:
        inner: Any = self.inner
        both, cut = inner.products(self.params, v), len(tree.leaves(self.params))
        return tree.rebuild(self.params, both[:cut]), tree.rebuild(inner.hparams, both[cut:])


class TracedInner(InnerProblem):
    """A bound problem whose `grad` is replayed.

    Args:
        problem: the problem.
        hparams: hyperparameters.
        counts: where calls are counted.
        halves: the recording, where it is known.
    """

    linearization = TracedLinearization

    def __init__(
        self, problem: Losses, hparams: Tree, counts: Counter[str] | None = None, halves: Halves | None = None
    ) -> None:
        super().__init__(problem, hparams, counts)
        self.halves = halves
        self._begun: dict[Any, tuple[Halves, Any]] = {}
        self._of_steps: dict[Any, tuple[Halves, Any]] = {}
        """Begun at the batches of steps, by what they depend on, each with the problem on the first of its batches."""
        self._left: dict[Any, _Left] = {}
        self._room = HELD
        if halves is not None:
            self.form = "recorded"

    def products(self, params: Tree, v: Tree) -> Sequence[Tensor]:
        """Return the leaves of ``H' v`` and ``C' v`` at params."""
        with torch.no_grad():
            made = self._left.pop(_place(params), None) or self._first(params)
            return made.halves.products(v, made.left)

    def confirm(self, params: Tree) -> None:
        """Look at whether the recording still holds, where a run ends."""
        x = self.trainable(params)
        with _refusing(), torch.no_grad():
            for key, (halves, problem) in chain(self._begun.items(), self._of_steps.items()):
                if key[0] == signature(x):
                    got, _ = halves.gradient(x, self.hparams, problem.minibatch)
                    halves.confirm(x, got, InnerProblem(problem, self.hparams)._grad(x))

    def on_step(self, index: int) -> InnerProblem:
        view = super().on_step(index)
        if view is not self:  # a sampler may have changed what the losses hold
            view._begun = self._of_steps  # type: ignore[attr-defined]
        return view

    def _grad(self, params: Tree) -> Tree:
        # Sweeps come back to the iterates of the run.
        made = self._left.get(place := _place(params))
        if made is None:
            with torch.no_grad():
                made = self._first(params)
            if self._room > 0:
                self._room -= sum(each.nbytes for each in (*made.gradient, *made.left))
                self._left[place] = made
        return tree.rebuild(params, made.gradient)

    def _first(self, params: Tree) -> _Left:
        halves = self._recording(params) if self.halves is None else self.halves
        return _Left(params, halves, *halves.gradient(params, self.hparams, self.problem.minibatch))

    def _recording(self, params: Tree) -> Halves:
        batch = self.problem.minibatch
        with _refusing():
            key = signature(params), signature(batch)
            if key not in self._begun:
                begun = self.problem.traces.begin(Halves, self.problem, params, self.hparams, batch)
                self._begun[key] = begun, self.problem
        return self._begun[key][0]

    def _forget(self) -> None:
        super()._forget()
        self._left, self._room = {}, 0  # params of one object may be met with two batches


class _Left(NamedTuple):
    """What a gradient leaves behind for products, and where: params are held, so that their place stays their own."""

    params: Tree
    halves: Halves
    gradient: Sequence[Tensor]
    left: Sequence[Tensor]


def _place(params: Tree) -> Any:
    """Return where params lie, and how often they were written to: views of the same numbers are in one place."""
    return tuple((leaf.data_ptr(), leaf._version, leaf.shape, leaf.stride()) for leaf in tree.leaves(params))


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except NotRecordedError as reason:
        raise ValueError(
            f"the inner loss cannot be traced: {reason} (its Python must not depend on the values of tensors, and "
            "must not compute numbers that change from call to call, such as random ones: use torch.where in place of "
            "`if` and of a boolean mask, tensors in place of float(); or leave out `trace`)."
        ) from reason
