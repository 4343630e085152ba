"""Batches of problems: members side by side as one problem.

Every leaf of params and hparams gets a leading dimension, one row for each member. The batched inner loss is the sum
over members, so its Hessian is block-diagonal and every oracle (gradient, HVP, VJP, JVP) is right as it stands; the
batched outer loss is a tensor of shape (members,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from bilevel.core import rows, tree
from bilevel.core.options import is_int, require_value
from bilevel.core.tree import Tree
from bilevel.oracles.losses import Losses
from bilevel.oracles.validation import Reads

Function: TypeAlias = Callable[..., Any]
Rows: TypeAlias = Literal["auto", "loop"]
"""How the members of a batch run: side by side where torch can do that, or one after the other."""


def with_last(function: Function, value: Tree) -> Function:
    """Return the function of all arguments but the last that a function is at one value of it."""
    return lambda *arguments: function(*arguments, value)


def for_rows(function: Function | None, data: Tree) -> Function | None:
    """Return a function of one member, applied to each; `data` has a row for each member, or is None."""
    if function is None:
        return None
    each = vectorised(function)
    further = () if data is None else (data,)
    return lambda params, hparams: each(params, hparams, *further)


class NotSideBySide(ValueError):
    """A function of one member that works, but not vectorised over members."""


def vectorised(function: Function) -> Function:
    """Return ``torch.func.vmap(function)``; its errors are `NotSideBySide` where the function works for one member."""
    each = torch.func.vmap(function)

    def batched(*trees: Tree) -> Any:
        try:
            return each(*trees)
        except Exception as error:
            function(*[rows.row(tree, 0) for tree in trees])
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NotSideBySide(
                f"a loss cannot be vectorised over members by torch.func.vmap: {reason} (members can run one after the "
                "other: rows='loop')."
            ) from error

    return batched


def check_rows_option(rows: Any) -> Rows:
    """Return the option, or refuse another word than "auto" and "loop" by a ValueError."""
    require_value("rows", rows, "'auto' or 'loop'", rows in ("auto", "loop"))
    return rows


def check_size(size: Any) -> None:
    """Refuse what is no number of members."""
    require_value("batch", size, "a positive int or None", is_int(size))


def check_single(problem: Losses, size: Any) -> None:
    """Refuse to make a batch of what is one, or of a size that is no positive int."""
    check_size(size)
    if problem.batch is not None:
        raise ValueError(f"this problem is a batch of {problem.batch} already.")


def check_own_data(problem: Losses, size: Any, data: Tree) -> None:
    """Refuse, besides what `check_single` refuses, data for a problem that holds its own."""
    check_single(problem, size)
    if data is not None:
        raise ValueError(f"{type(problem).__name__} holds its data itself: stack problems by `bilevel.stack`.")


SAMPLED = "a problem with a sampler does not run in batches: give its data by `data=` instead, or take rows='loop'."


def side_by_side(problem: Losses, size: int, data: Tree, make: Callable[..., Any]) -> Any:
    """Return a batch of a general problem: its functions vectorised over members, made a problem by `make`."""
    term = problem.nonsmooth
    if data is None:
        single: list[Any] = [problem] * size
        functions: tuple[Function | None, ...] = (
            getattr(problem, "inner_loss", None),
            problem.outer_loss,
            problem.optimality,
        )
    else:
        rows.check_rows("data", data, size)
        functions = problem.functions
        single = [
            make(*functions[:2], problem.params, optimality=functions[2], data=row_of(data, index), nonsmooth=term)
            for index in range(size)
        ]
    inner, outer, optimality = (for_rows(function, data) for function in functions)
    params = None if problem.params is None else rows.expand(problem.params, size)
    total = None if inner is None else lambda params, hparams: inner(params, hparams).sum()
    return make(total, outer, params, optimality=optimality, nonsmooth=term).as_batch(single)


def start(size: int, own: Tree, params: Tree) -> Tree:
    """Return a start for every member; one that lacks the leading dimension is the same for all.

    Where the problem has a start of its own, shapes tell the two cases apart; else params whose leaves all have `size`
    rows are taken for one start for each member.

    Raises:
        ValueError: for a start that fits neither case.
    """
    if own is None:
        one_each = all(leaf.dim() > 0 and len(leaf) == size for leaf in tree.leaves(params))
        return tree.detach(params) if one_each else rows.expand(params, size)
    given = [tuple(leaf.shape) for leaf in tree.leaves(params)]
    if given == [tuple(leaf.shape[1:]) for leaf in tree.leaves(own)]:
        return rows.expand(params, size)
    rows.check_rows("params", params, size)
    return tree.detach(params)


def check(problem: Losses, params: Tree, hparams: Tree, reads: Reads | None = None) -> None:
    """Look at shapes, and at members until one is found that can be solved.

    A mistake in the call breaks every member; what breaks one of them alone becomes that member's verdict.

    Raises:
        ValueError: for a wrong leading dimension, and what the first member's check says if none can be solved.
    """
    assert problem.batch is not None
    rows.check_rows("hparams", hparams, problem.batch)
    rows.check_rows("params", params, problem.batch)
    first: ValueError | None = None
    for index in range(problem.batch):
        try:
            return problem.member(index).check(rows.row(params, index), rows.row(hparams, index), reads)
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def exact_hypergradient(problem: Losses, hparams: Tree) -> Any:
    """Return the exact hypergradients of all members, stacked, or None where one has none."""
    assert problem.batch is not None
    exact = [problem.member(i).exact_hypergradient(rows.row(hparams, i)) for i in range(problem.batch)]
    return None if any(each is None for each in exact) else rows.stack(exact)


def check_shared_functions(problems: Sequence[Losses]) -> None:
    """Refuse problems without data of their own, or whose functions are not those of the first."""
    for index, problem in enumerate(problems):
        if problem.data is None:
            raise ValueError(
                f"`stack` needs the data of problem {index}: make it by BilevelProblem(..., data=tree) "
                "with losses of (params, hparams, data)."
            )
        if problem.functions != problems[0].functions:
            raise ValueError(f"`stack` takes problems that share their functions, but problem {index} has others.")


def stacked_trees(what: str, trees: Sequence[Tree]) -> Tree:
    """Return the batch of some trees; ValueError with the first whose shapes differ."""
    shapes = [[tuple(leaf.shape) for leaf in tree.leaves(each)] for each in trees]
    for index, each in enumerate(shapes):
        if each != shapes[0]:
            raise ValueError(
                f"`stack` takes problems of equal shapes, but {what} has {_shown(shapes[0])} in problem 0 and "
                f"{_shown(each).split(' ', 1)[1]} in problem {index}."
            )
    return rows.stack(trees)


def _shown(shapes: list[tuple[int, ...]]) -> str:
    return "shape " + str(shapes[0]) if len(shapes) == 1 else f"shapes {shapes}"


def row_of(data: Tree, index: int) -> Tree:
    """Return one member's data; None stays None."""
    return None if data is None else tree.tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, data)
