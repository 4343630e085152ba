"""What is compared: `Plan`, plain typed objects that know nothing of files or command lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bilevel.base import InnerSolver
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer import OuterOptions, StochasticMethod


@dataclass(frozen=True)
class Setup:
    """A problem that is ready to be tuned, where the outer loop starts, and a sentence about the data.

    There is a label for every scalar hyperparameter, in the order of its flattened leaves, or none; `unit` is what a
    hyperparameter is, such as "log penalty".
    """

    problem: BilevelProblem
    hparams: Tree
    labels: Sequence[str] = ()
    unit: str = "hyperparameter"
    note: str = ""


MakeSetup: TypeAlias = Callable[[int], Setup]
"""Makes the problem of a seed (of the data split); must be picklable for runs in several processes."""


@dataclass(frozen=True)
class Cell:
    """One run of the comparison: its place in the plan, names of problem and estimator, and seed of the data split."""

    index: int
    problem: str
    estimator: str
    seed: int

    def __str__(self) -> str:
        return f"{self.problem}, {self.estimator}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison: every problem with every estimator and every seed of the data splits, from the same start.

    Args:
        name, problems, solver, outer, seeds: its parts; problems are makers of them.
        estimators: by name; a stochastic method is a run of its own, without the solver.
        budget: gradient-equivalents that each run may use, in place of a number of outer steps.
        config: plain containers that say all of the above; two plans are the same run where these are equal.
        batch: run the cells that differ in the seed alone as one batch, where their shapes agree and solver and
            estimator run batches: the same results up to rounding. The seconds of a cell are then its share.
        identity: what the numbers depend on besides `config`: under "data" and "classes", names and digests.
        debug: raise what ends a cell, instead of keeping it as the cell's result.
        tuning: the same problems with one solver, one estimator and another outer method, for the tuning table.
    """

    name: str
    problems: Mapping[str, MakeSetup]
    solver: InnerSolver
    estimators: Mapping[str, HypergradEstimator | StochasticMethod]
    outer: OuterOptions
    seeds: Sequence[int]
    budget: float | None
    config: Mapping[str, Any]
    batch: bool = False
    identity: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    debug: bool = False
    tuning: Plan | None = None

    @property
    def cells(self) -> list[Cell]:
        """All runs, in the order of the results."""
        keys = [(p, e, s) for p in self.problems for e in self.estimators for s in self.seeds]
        return [Cell(index, *key) for index, key in enumerate(keys)]
