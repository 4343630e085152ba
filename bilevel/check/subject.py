"""`Subject`: the problem under examination, with the points, directions and evaluations that all checks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.base import InnerSolver
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.engine.checks import read_by_steps
from bilevel.oracles.precision import DoublePrecision, widened
from bilevel.oracles.problem import BilevelProblem

DIRECTIONS = 3
"""Random directions of each derivative."""
HALVINGS = 12


@dataclass(frozen=True, eq=False)
class Subject:
    """A problem, where it is examined, and the inner solver that is used on it; the seed is that of random points."""

    given: BilevelProblem
    solver: InnerSolver
    hparams: Tree
    given_start: Tree
    seed: int = 0

    @cached_property
    def problem(self) -> BilevelProblem:
        """The problem with the same inner loss at every step; all but the runs of `solver` is examined on it."""
        return self.given.deterministic()

    @cached_property
    def start(self) -> Tree:
        """Its start."""
        return self.given.trainable(self.given_start)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of params and hparams."""
        return tree.leaves(self.start)[0].dtype

    @property
    def eps(self) -> float:
        """The rounding unit of that dtype."""
        return torch.finfo(self.dtype).eps

    @cached_property
    def read_by_steps(self) -> Tensor:
        """Of every component of the hyperparameters, whether the inner solver reads it by itself."""
        result = read_by_steps(self.solver, self.problem, self.start, self.hparams)
        pairs = zip(tree.leaves(self.hparams), result, strict=True)
        return torch.cat([torch.full((leaf.numel(),), read, device=leaf.device) for leaf, read in pairs])

    def normal(self, like: Tree, index: int) -> Tree:
        """Return standard normal numbers shaped as a tree: the same ones for the same index."""
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        return tree.tree_map(
            lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf), like
        )

    def direction(self, like: Tree, index: int) -> Tree:
        """Return a random direction of length one."""
        drawn = self.normal(like, index)
        return tree.scale(1.0 / float(tree.norm(drawn)), drawn)

    @cached_property
    def away(self) -> tuple[Tree, Tree]:
        """A random (params, hparams) beside the start at which both losses are finite."""
        return self._moved(0), self._moved(1)

    def _moved(self, which: int) -> Tree:
        """Move one of the two by normal numbers, halved until the losses are finite."""
        here = [self.start, self.hparams]
        step = self.normal(here[which], 100 + which)
        for halving in range(HALVINGS):
            there = [*here]
            there[which] = tree.add(here[which], step, 0.5**halving)
            if all(bool(torch.isfinite(value).all()) for value in self.values(*there)):
                return there[which]
        return here[which]

    def points(self) -> Iterator[tuple[str, Tree]]:
        """The params at which derivatives are looked at."""
        yield "at the start", self.start
        yield "beside the start", self.away[0]

    def values(self, params: Tree, hparams: Tree) -> list[Tensor]:
        """Return the inner loss (or the leaves of the optimality map) and the outer loss."""
        with torch.no_grad():
            if self.problem.optimality is None:
                inner = [self.problem.inner_loss(params, hparams)]
            else:
                inner = tree.leaves(self.problem.optimality(params, hparams))
            return [*inner, self.problem.outer_loss(params, hparams)]

    def gradient(self, params: Tree, hparams: Tree) -> Tree:
        """Return the inner gradient, or the optimality map, by the problem's own oracle."""
        return self.problem.bind(hparams).grad(params)

    def smooth_gradient(self, params: Tree, hparams: Tree) -> Tree:
        """Return the gradient of the smooth part, where there is a nonsmooth term."""
        return self.problem.smooth.bind(hparams).grad(params)

    def loss(self, which: str) -> Callable[[Tree, Tree], Tensor]:
        """Return the inner or the outer loss."""
        return self.problem.inner_loss if which == "inner" else self.problem.outer_loss

    @cached_property
    def widens(self) -> bool:
        """Whether both losses can be evaluated in float64 although the problem is not."""
        if self.dtype == torch.float64:
            return False
        try:
            with DoublePrecision():
                wide = self.values(tree.tree_map(widened, self.start), tree.tree_map(widened, self.hparams))
        except (RuntimeError, ValueError, TypeError):
            return False
        pairs = zip(wide, self.values(self.start, self.hparams), strict=True)
        return all(torch.allclose(a.double(), b.double(), rtol=0.1, equal_nan=True) for a, b in pairs)

    def wide(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which values are computed in float64, where the problem allows it."""
        return DoublePrecision() if self.widens else contextlib.nullcontext()

    def widened(self, value: Tree) -> Tree:
        """Return a tree in the precision of `wide`."""
        return tree.tree_map(widened, value) if self.widens else value

    def tolerance(self) -> float:
        """Return the relative error that a derivative may have."""
        return max(1e-6, 2e4 * self.eps)
