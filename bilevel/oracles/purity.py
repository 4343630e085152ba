"""Whether losses are functions: looked at once for each problem, before its first use.

Both losses are called a few times at the start and beside it, on copies. The first call is watched operation by
operation, so that a write into an argument or into captured data is seen by whichever route it comes, even where it
changes no number yet. What arguments, captured tensors, arrays and generators hold is compared before and after, values
and gradients of equal calls with each other. Where plain values of the user's moved (a counter, a cache), the losses
must not depend on them. What calls have changed is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.threads import PROCESS_STATE, set_within
from bilevel.core.tree import Tree
from bilevel.oracles import ranks
from bilevel.oracles.contents import Contents, Generators, apart, pointer, same, same_state
from bilevel.oracles.losses import Losses, Point, Values
from bilevel.oracles.references import Found, references
from bilevel.oracles.watch import Watch, changes

BESIDE, FAR = 1e-3, 1e3
"""How far from the start the losses are called, relative to ``1 + |start|``."""
AHEAD = 1_000_003
"""By how many times its own move a counter is moved on, to see whether a loss depends on it."""
VIEWS = {"numpy", "asarray", "array", "__array__", "from_numpy"}
"""Names in code that may look at a tensor's numbers as an array of numpy."""


@contextmanager
def looked_at(problem: Losses, params: Tree, hparams: Tree, together: ranks.Agreement) -> Iterator[None]:
    """Look at the losses of a problem, which is no batch, around the other checks of it, unless that was done.

    Raises:
        ValueError: in one sentence, for losses that write into what they are given or refer to, that draw random
            numbers, that depend on what moves from call to call, or that differ between the ranks of a process group.
    """
    if _is_known(problem):
        yield
        return
    with PROCESS_STATE:
        look = _Look(problem, (tree.copied(params), tree.copied(hparams)), together.before_communication)
        try:
            look.watch()
            yield
            look.compare()
        except BaseException:
            look.undo()
            raise
        finally:
            look.put_back()
        together.compare([*tree.leaves(look.start), *(value for values in look.first.values() for value in values)])
        problem.purity.known, problem.purity.first = True, (look.start, look.first)


def _is_known(problem: Losses) -> bool:
    """Whether there is nothing to look at: a problem that has been seen, or one of ours where no ranks compare."""
    return problem.purity.known or (problem.tested and not ranks.active())


def look(problem: Losses, params: Tree, hparams: Tree) -> None:
    """Look at the losses of a problem whose other checks call none; see `looked_at`."""
    if _is_known(problem):
        return
    with ranks.agreement(problem) as together, looked_at(problem, params, hparams, together):
        pass


def confirm(problem: Losses) -> None:
    """Call the losses once more after the first run: what moves slowly shows then, as a ValueError."""
    one = problem if problem.batch is None else problem.member(0)
    if one.purity.first is None:
        return
    (start, first), one.purity.first, one.purity.known = one.purity.first, None, False
    for what, values in first.items():
        _must_agree(what, values, _evaluated(one, what, start), "")
    one.purity.known = True


def referred_to(problem: Losses) -> Found:
    """Return what the functions of a problem refer to; its own attributes count where its losses are methods."""
    functions: list[Any] = [function for function in problem.functions if function is not None]
    return references([*(("", each) for each in functions or [problem]), ("data", problem.data)])


def _losses(problem: Losses) -> tuple[str, str]:
    return ("outer_loss", "inner_loss" if problem.optimality is None else "optimality")


def _evaluated(problem: Losses, what: str, roots: Point) -> Values:
    """Return a loss and its gradients by roots that require them, or else by copies."""
    if not all(leaf.requires_grad for leaf in tree.leaves(roots)):
        roots = tree.attach(tree.copied(roots))
    with torch.enable_grad():
        result = tree.leaves(getattr(problem, what)(*roots))
        moving = [each.sum() for each in result if isinstance(each, Tensor) and each.requires_grad]
    if not moving:
        return [each.detach() if isinstance(each, Tensor) else None for each in result]
    gradients = torch.autograd.grad(moving, tree.leaves(roots), allow_unused=True)
    return [None if each is None else each.detach() for each in (*result, *gradients)]


class _Look:
    """One look at the losses of a problem."""

    def __init__(self, problem: Losses, start: Point, before_communication: Callable[[], None]) -> None:
        self.problem, self.start, self._before_communication = problem, start, before_communication
        self._found = referred_to(problem)
        self._given = _named({"batch": problem.minibatch, "data": problem.data})
        self._contents = Contents({**self._given, **self._found.tensors}, self._found.arrays)
        self._generators = Generators(self._found.generators)
        self._places = [(place, place.read()) for place in self._found.places]
        self._before = self._generators.states()
        self.first: dict[str, Values] = {}
        self._drawn: dict[str, dict[str, Any]] = {}

    def watch(self) -> None:
        """Call the losses under watch; an error is left to the other checks, which put it into words."""
        for module, part in self._found.modules.items():
            if (wrapper := ranks.parallel_class(part)) is not None:
                raise ValueError(
                    f"a loss refers to `{module}`, a {wrapper}, which averages gradients over ranks in .backward(): "
                    "use the module inside it (wrapper.module), with the same data on every rank."
                )
        before = self._before
        for what in _losses(self.problem):
            roots = tree.attach(tree.copied(self.start))
            storages = self._contents.storages() | {pointer(leaf): name for name, leaf in _arguments(roots).items()}
            watch = Watch(storages, self._before_communication)
            with set_within(changes, []) as made:
                try:
                    with watch:
                        self.first[what] = _evaluated(self.problem, what, roots)
                except ranks.RanksApartError:
                    raise
                except Exception:
                    self.first.pop(what, None)
            self._no_writes(what, roots, self.start, watch.written)
            if made:
                raise ValueError(f"the module of `{what}` {made[0]}.")
            after = self._generators.states()
            self._drawn[what] = {
                name: state
                for name, state in after.items()
                if not same_state(state, before[name]) and (watch.draws or "torch" not in name)
            }
            before = after

    def compare(self) -> None:
        """Call the losses again, beside the start and at it, and compare everything."""
        beside = self._at(BESIDE)
        for what in _losses(self.problem):
            self._tried(what, beside)
        for what in _losses(self.problem):
            before = self._generators.states()
            second = self._called(what, self.start)
            for name, state in self._generators.states().items():
                earlier = self._drawn.get(what, {}).get(name)
                # A loss that seeds its generator itself leaves the same state each time.
                if earlier is not None and not same_state(state, before[name]) and not same_state(state, earlier):
                    raise ValueError(
                        f"`{what}` draws random numbers from {name}, so each call is of another function and there is "
                        "no hypergradient: give `ModuleProblem(..., seed=...)`, draw them once before, or let a "
                        "sampler hand them over."
                    )
            if what in self.first:
                _must_agree(what, self.first[what], second, next(self._moved(), ""))
            # At once, too: what alternates agrees with every other call.
            _must_agree(what, second, self._called(what, self.start), next(self._moved(), ""))
        if VIEWS & self._found.names:
            # A projection of an array that shares the argument's numbers shows where they are outside of its set.
            for what in _losses(self.problem):
                self._tried(what, self._at(FAR))
        self._samplers_repeat()
        if moved := next(self._moved(), ""):
            self._independent_of(moved, beside)

    def undo(self) -> None:
        """Undo what the calls have done to plain values, so that a second look sees what this one has seen."""
        for place, values in self._places:
            place.write(values)

    def put_back(self) -> None:
        """Undo what the calls have done to generators and contents."""
        self._generators.put_back(self._before)
        self._contents.put_back()

    def _at(self, distance: float) -> Point:
        def moved(leaf: Tensor) -> Tensor:
            signs = 2.0 * (torch.arange(leaf.numel(), device=leaf.device) % 2).reshape(leaf.shape) - 1.0
            return leaf + distance * (1.0 + leaf.abs()) * signs.to(leaf)

        params, hparams = tree.tree_map(moved, self.start)
        return params, hparams

    def _called(self, what: str, point: Point) -> Values:
        roots = tree.attach(tree.copied(point))
        result = _evaluated(self.problem, what, roots)
        self._no_writes(what, roots, point)
        return result

    def _tried(self, what: str, point: Point) -> Values | None:
        """Call a loss where it may have no values."""
        roots = tree.attach(tree.copied(point))
        try:
            result = _evaluated(self.problem, what, roots)
        except Exception:  # whatever a function says outside of its domain
            result = None
        self._no_writes(what, roots, point)
        return result

    def _no_writes(self, what: str, roots: Point, point: Point, written: tuple[str, str] | None = None) -> None:
        """Refuse a loss that wrote: as seen by an operation, or by what its arguments and captured data hold."""
        arguments = _arguments(roots)
        name, operation = written or ("", "")
        if not name:
            pairs = zip(arguments.items(), tree.leaves(point), strict=True)
            name = next((key for (key, leaf), was in pairs if not same(leaf.detach(), was)), "")
        name = name or self._contents.changed() or ""
        if not name:
            return
        by = f" ({operation})" if operation else ""
        if name in arguments or name in self._given:
            raise ValueError(
                f"`{what}` writes into its argument `{name}`{by}, so it is no function of its arguments: make a new "
                "tensor, such as w = w.clamp(min=0), or work on w.clone()."
            )
        raise ValueError(
            f"`{what}` writes into `{name}`{by}, which it refers to, so each call is of another function: keep what "
            "changes in params, or work on a copy (`ModuleProblem` does so for the buffers of a module)."
        )

    def _moved(self) -> Iterator[str]:
        """Yield the names of plain values that are no longer what they were."""
        for place, before in self._places:
            now = place.read()
            for key in [*now, *(key for key in before if key not in now)]:
                if not _unchanged(before.get(key, place), now.get(key, place)):
                    yield f"{place.name}.{key}".lstrip(".")

    def _independent_of(self, name: str, beside: Point) -> None:
        """Refuse losses that depend on plain values that move from call to call."""
        after = [(place, place.read()) for place, _ in self._places]
        ahead = [(place, _ahead(b, a)) for (place, b), (_, a) in zip(self._places, after, strict=True)]
        for what in _losses(self.problem):
            result = []
            try:
                for entries in (self._places, ahead):
                    for place, values in entries:
                        place.write(values)
                    result += [self._tried(what, beside) for _ in range(2)]
            finally:
                for place, values in after:
                    place.write(values)
            if result[0] is not None:
                for each in result[1:]:
                    _must_agree(what, result[0], [] if each is None else each, name)

    def _samplers_repeat(self) -> None:
        for what, source in self.problem.sources():
            first = tree.copied(source(0))
            source(1)
            if not all(map(_same_leaf, tree.leaves(first), tree.leaves(source(0)))):
                raise ValueError(
                    f"the {what} returns another batch when a step is asked for again, so the way back differentiates "
                    "other steps than were taken: make it a function of the step index alone, such as MiniBatches."
                )


def _named(trees: dict[str, Tree]) -> dict[str, Tensor]:
    return {
        f"{what}{name}": leaf
        for what, value in trees.items()
        for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True)
        if isinstance(leaf, Tensor)
    }


def _arguments(point: Point) -> dict[str, Tensor]:
    return _named({"params": point[0], "hparams": point[1]})


def _same_leaf(one: Any, other: Any) -> bool:
    return same(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else np.array_equal(one, other)


def _unchanged(before: Any, now: Any) -> bool:
    if before is now:
        return True
    plain = (bool, int, float, complex, str, bytes)
    return type(before) is type(now) and isinstance(now, plain) and bool(before == now)


def _ahead(before: dict[Any, Any], after: dict[Any, Any]) -> dict[Any, Any]:
    """Return plain values as they would be after many more calls."""

    def moved(key: Any, value: Any) -> Any:
        was = before.get(key)
        numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (was, value))
        return value + AHEAD * (value - was) if numbers else value

    return {key: moved(key, value) for key, value in after.items()}


def _must_agree(what: str, first: Values, second: Values, moved: str) -> None:
    gap = apart(first, second)
    if gap == 0:
        return
    because = f"`{moved}`, which moves" if moved else "what moves (a counter, the clock, a cache, a random number)"
    raise ValueError(
        f"`{what}` gives other numbers when it is called again with the same arguments (relative difference "
        f"{gap:.1e}), as it depends on {because} from call to call: make it a function of its arguments alone."
    )
