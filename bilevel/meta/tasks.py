"""Tasks, pure functions ``index -> (support, query)``, so that a run that resumes sees the same; and their network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from bilevel.core import rows, tree
from bilevel.core.options import is_int, require, require_value
from bilevel.core.threads import PROCESS_STATE
from bilevel.core.tree import Tree
from bilevel.oracles.samplers import keyed_generator

Task: TypeAlias = "tuple[Tree, Tree]"
"""(support, query), both ``(inputs, targets)``."""

SPLITS = ("train", "val", "test")


class Tasks(Protocol):
    """What `MetaProblem(tasks=...)` takes."""

    def __call__(self, index: int, /) -> Task:
        """Return a task, the same one whenever it is asked for."""


def draw(tasks: Tasks, indices: Iterable[int]) -> tuple[Tree, Tree, bool]:
    """Return some tasks: (support, query, True) for tasks of equal shapes, whose leaves then have a row for each task.

    Otherwise it is (list of supports, list of queries, False).

    Raises:
        ValueError: for what is no pair of trees of tensors.
    """
    result: list[Any] = []
    for index in indices:
        task = tasks(index)
        if not isinstance(task, tuple) or len(task) != 2 or not _all_tensors(task):
            raise ValueError(
                f"`tasks({index})` must return (support, query), each (inputs, targets) of tensors, "
                f"got {type(task).__name__}."
            )
        result.append(task)
    shapes = [[(name, leaf.shape) for name, leaf in zip(tree.names(t), tree.leaves(t), strict=True)] for t in result]
    if any(each != shapes[0] for each in shapes):
        return [support for support, _ in result], [query for _, query in result], False
    return *rows.stack(result), True


def _all_tensors(task: Any) -> bool:
    return all(tree.leaves(part) and all(isinstance(x, torch.Tensor) for x in tree.leaves(part)) for part in task)


class SplitTasks:
    """Base of the tasks here: the key of the random numbers of a task is (seed, split, index)."""

    def __init__(self, split: str, seed: int) -> None:
        self.split, self.seed = split, seed
        require(self, "split", "'train', 'val' or 'test'", split in SPLITS)
        require(self, "seed", "an int that is not negative", is_int(seed, 0))

    def generator(self, index: int) -> torch.Generator:
        """Return the generator of a task."""
        return keyed_generator(self.seed, SPLITS.index(self.split), index)


def mlp(inputs: int, hidden: Sequence[int], outputs: int, seed: int) -> nn.Sequential:
    """Return a network of linear layers with ReLU between them; its weights follow from the seed."""
    require_value("hidden", hidden, "a list of positive ints", all(is_int(units) for units in hidden))
    layers: list[nn.Module] = [nn.Flatten()]
    with PROCESS_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in pairwise((inputs, *hidden, outputs)):
            layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
