"""`folds`: problems that share their hyperparameters as one problem, such as the folds of a cross-validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.options import shown_value
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.problem import BilevelProblem


class FoldsPoint(Linearization):
    """The gradients of all folds, each linearised where its params are."""

    def __init__(self, inner: FoldsInner, params: Tree) -> None:
        super().__init__(inner, params)
        self.points = [part.linearize(w) for part, w in zip(inner.parts, params, strict=True)]

    def _hvp(self, v: Tree) -> Tree:
        return tuple(point.hvp(part) for point, part in zip(self.points, v, strict=True))

    def _cross(self, v: Tree) -> Tree:
        first, *others = [point.cross(part) for point, part in zip(self.points, v, strict=True)]
        for each in others:
            first = tree.add(first, each)
        return first


class FoldsInner(InnerProblem):
    """The sum of the inner losses; every fold keeps its closed forms."""

    linearization = FoldsPoint

    def __init__(self, problem: FoldsProblem, hparams: Tree, counts: Counter[str] | None = None) -> None:
        super().__init__(problem, hparams, counts)
        self.parts = [each.bind(self.hparams) for each in problem.problems]

    def _grad(self, params: Tree) -> Tree:
        return tuple(part.grad(w) for part, w in zip(self.parts, params, strict=True))


class FoldsProblem(BilevelProblem):
    """Several problems with one hyperparameter vector: the sum of their inner losses, the mean of their outer losses.

    Params are a tuple, with the params of each problem, which has a start.
    """

    inner_problem = FoldsInner

    def __init__(self, problems: Sequence[BilevelProblem]) -> None:
        if isinstance(problems, BilevelProblem) or not isinstance(problems, Iterable):
            raise ValueError(f"`folds` takes a list of problems, got {shown_value(problems)}.")
        problems = tuple(problems)
        if not problems:
            raise ValueError("`folds` needs at least one problem.")
        for index, problem in enumerate(problems):
            if not isinstance(problem, BilevelProblem):
                raise ValueError(f"`folds` takes problems, but problem {index} is {shown_value(problem)}.")
            if problem.nonsmooth is not None:
                raise ValueError(
                    f"`folds` takes smooth inner losses, but problem {index} has the nonsmooth term "
                    f"{type(problem.nonsmooth).__name__}: tune on one split, or smooth the term."
                )
            if problem.batch is not None or problem.sampler is not None or problem.optimality is not None:
                raise ValueError("`folds` takes single problems with an inner loss, without samplers.")
            if (shapes := _shapes(problem)) and (first := _shapes(problems[0])) and shapes != first:
                raise ValueError(
                    "`folds` takes problems that share their hyperparameters, but problem 0 has them of shape "
                    f"{_shown(first)}, and problem {index} of shape {_shown(shapes)}."
                )
        self.problems = problems
        super().__init__(params=tuple(problem.start() for problem in problems))
        self.structure = replace(
            problems[0].structure, quadratic=all(problem.structure.quadratic for problem in problems)
        )

    def inner_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the sum of the inner losses."""
        pairs = zip(self.problems, params, strict=True)
        return torch.stack([problem.inner_loss(w, hparams) for problem, w in pairs]).sum()

    def outer_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the mean of the outer losses."""
        pairs = zip(self.problems, params, strict=True)
        return torch.stack([problem.outer_loss(w, hparams) for problem, w in pairs]).mean()

    def penalty_scales(self, hparams: Tree) -> Tree | None:
        scales = [problem.penalty_scales(hparams) for problem in self.problems]
        if any(each is None for each in scales):
            return None
        return tree.tree_map(lambda *parts: torch.stack(parts).mean(0), *scales)

    def initial_hparams(self, value: float = 0.0) -> Tree:
        """Return those of the first problem; ValueError where it has none."""
        first: Any = self.problems[0]
        if not hasattr(first, "initial_hparams"):
            raise ValueError(f"{type(first).__name__} has no hyperparameters to start from: give `hparams`.")
        return first.initial_hparams(value)

    @property
    def unit(self) -> str:
        return self.problems[0].unit


def _shapes(problem: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the hyperparameters that a problem starts from; none where it says nothing of them."""
    if isinstance(problem, FoldsProblem):
        return _shapes(problem.problems[0])
    start = problem.initial_hparams() if hasattr(problem, "initial_hparams") else None
    return [] if start is None else [tuple(leaf.shape) for leaf in tree.leaves(start)]


def _shown(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(str(shape) for shape in shapes)


def folds(problems: Sequence[BilevelProblem]) -> FoldsProblem:
    """Return problems that share their hyperparameters as one, such as a problem for each fold of a cross-validation.

    The outer loss is the mean of theirs. Every estimator, solver and search takes it, `bilevel.tune` among them; the
    closed forms of the problems are kept.

    Args:
        problems: single ones, with hyperparameters of one shape, each with a start.

    Raises:
        ValueError: for none, for batches, samplers and nonsmooth terms, and for hyperparameters of different shapes.

    >>> from bilevel.problems import RidgeProblem
    >>> X, y = torch.eye(4, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    >>> pairs = [([0, 1], [2, 3]), ([2, 3], [0, 1])]
    >>> problem = folds([RidgeProblem(X[train], y[train], X[held], y[held]) for train, held in pairs])
    >>> len(problem.start()), problem.initial_hparams().shape
    (2, torch.Size([]))
    """
    return FoldsProblem(problems)
