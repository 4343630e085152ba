"""How well a model adapts to tasks that it has not seen: means over tasks with confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.base import InnerSolver
from bilevel.core.options import is_int, require_value
from bilevel.core.tree import Tree
from bilevel.meta.tasks import Tasks

NORMAL_QUANTILE = 1.959964
"""Of 97.5 %: the mean of so many tasks is nearly normal."""
SIDE_BY_SIDE = 100
"""Tasks that adapt at a time, which bounds the memory of many tasks."""


@dataclass(frozen=True)
class Score:
    """A mean over tasks.

    Attributes:
        mean: the mean.
        half_width: half of its 95 % confidence interval: ``1.96 s / sqrt(n)``, with s the standard deviation.
    """

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half_width:.2g}"


@dataclass(frozen=True)
class Evaluation:
    """Scores after some numbers of inner steps: ``evaluation[5]["loss"].mean``.

    Attributes:
        scores: by the number of steps, then by name ("loss", "accuracy").
        tasks: the number of tasks.
    """

    scores: Mapping[int, Mapping[str, Score]]
    tasks: int

    def __getitem__(self, steps: int) -> Mapping[str, Score]:
        return self.scores[steps]

    def __str__(self) -> str:
        return "\n".join(
            f"after {count} step{'s' * (count != 1)}: " + ", ".join(f"{name} {score}" for name, score in result.items())
            for count, result in self.scores.items()
        )

    def flat(self, prefix: str) -> dict[str, float]:
        """Return all numbers by names such as ``val_loss_after_5`` and ``val_loss_after_5_interval``."""
        flat = {}
        for count, result in self.scores.items():
            for name, score in result.items():
                flat[f"{prefix}_{name}_after_{count}"] = score.mean
                flat[f"{prefix}_{name}_after_{count}_interval"] = score.half_width
        return flat


class OfTasks(Protocol):
    """What is evaluated, such as a `MetaProblem`."""

    def on_tasks(self, tasks: Tasks, indices: Iterable[int]) -> Any:
        """Return the problem of some tasks side by side, with `task_scores`."""


def evaluate(
    problem: OfTasks, solver: InnerSolver, hparams: Tree, tasks: Tasks, count: int = 100, steps: Sequence[int] = (1, 5)
) -> Evaluation:
    """Return scores of the weights that adapt to each of some tasks, on its query set: means with confidence intervals.

    Args:
        problem: the model, its loss and what is adapted.
        solver: whose steps adapt; its own number of steps is not used.
        hparams: from where tasks adapt.
        tasks: tasks that were not used to tune `hparams`; the first `count` of them are taken.
        count: number of tasks, at least 2.
        steps: after how many inner steps to score; 0 scores the initial weights.

    Raises:
        ValueError: for numbers out of range.

    >>> from bilevel import GradientDescent
    >>> from bilevel.meta import SineProblem, SineTasks
    >>> problem = SineProblem(batch_size=4)
    >>> held_out = SineTasks(split="test")
    >>> found = evaluate(problem, GradientDescent(0.01), problem.initial_hparams(), held_out, count=20, steps=(0, 5))
    >>> found[5]["loss"].mean < found[0]["loss"].mean
    True
    """
    require_value("count", count, "an int of at least 2 tasks", is_int(count, 2))
    counted = bool(steps) and all(is_int(each, 0) for each in steps)
    require_value("steps", steps, "numbers of steps, such as (1, 5)", counted)
    result: dict[int, list[dict[str, Tensor]]] = {each: [] for each in sorted(steps)}
    for first in range(0, count, SIDE_BY_SIDE):
        part = problem.on_tasks(tasks, range(first, min(first + SIDE_BY_SIDE, count)))
        inner = part.bind(hparams)
        state = solver.init(inner, part.start())
        for taken in range(max(steps) + 1):
            with torch.no_grad():
                if taken in result:
                    result[taken].append(part.task_scores(solver.params(state), inner.hparams))
                if taken < max(steps):
                    state = solver.step(inner.on_step(state.index), state)
    return Evaluation({taken: _means(parts) for taken, parts in result.items()}, count)


def _means(parts: list[dict[str, Any]]) -> dict[str, Score]:
    scores = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts]).double()
        scores[name] = Score(float(values.mean()), NORMAL_QUANTILE * float(values.std()) / len(values) ** 0.5)
    return scores
