"""Sine regression (Finn, Abbeel & Levine 2017): each task is a sine wave that is seen at a few points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from bilevel.core.options import is_int, require
from bilevel.meta.problem import MetaProblem
from bilevel.meta.tasks import SplitTasks, Task, mlp


class SineTasks(SplitTasks):
    """``y = a sin(x - p)`` with a uniform in [0.1, 5], p in [0, pi] and x in [-5, 5], without noise.

    Args:
        shots: points of the support set.
        queries: points of the query set.
        split: "train", "val" or "test"; their tasks are drawn independently.
        seed: an int that is not negative.

    >>> (X, y), (X_query, y_query) = SineTasks(shots=10, queries=20)(0)
    >>> X.shape, y_query.shape
    (torch.Size([10, 1]), torch.Size([20, 1]))
    """

    def __init__(self, shots: int = 10, queries: int = 10, split: str = "train", seed: int = 0) -> None:
        super().__init__(split, seed)
        self.shots, self.queries = shots, queries
        require(self, "shots", "a positive int", is_int(shots))
        require(self, "queries", "a positive int", is_int(queries))

    def __call__(self, index: int) -> Task:
        uniform = torch.rand(2 + self.shots + self.queries, generator=self.generator(index), dtype=torch.float64)
        amplitude, phase = 0.1 + 4.9 * uniform[0], math.pi * uniform[1]
        X = (10.0 * uniform[2:] - 5.0)[:, None]
        y = amplitude * torch.sin(X - phase)
        return (X[: self.shots], y[: self.shots]), (X[self.shots :], y[self.shots :])


class SineProblem(MetaProblem):
    """Sine regression with a network of ReLU layers, ready for a config.

    Args:
        shots: points of a support set.
        queries: points of a query set.
        hidden: units of the hidden layers.
        batch_size: tasks in a meta-batch.
        seed: of the tasks and of the initial weights.
        adapt: as all further options see `MetaProblem`; layers are named "1", "3", "5", ...
        device: where the network and the tasks go.

    >>> problem = SineProblem(shots=5, batch_size=4)
    >>> sum(weights.numel() for weights in problem.initial_hparams()["init"].values())
    1761
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        hidden: Sequence[int] = (40, 40),
        batch_size: int = 25,
        seed: int = 0,
        *,
        adapt: Sequence[str] = ("*",),
        proximity: float = 0.0,
        evaluated_tasks: int = 100,
        evaluated_steps: Sequence[int] = (1, 5),
        device: str = "cpu",
    ) -> None:
        super().__init__(
            mlp(1, hidden, 1, seed).to(device),
            nn.functional.mse_loss,
            SineTasks(shots, queries, "train", seed),
            batch_size,
            adapt=adapt,
            proximity=proximity,
            held_out=SineTasks(shots, queries, "val", seed),
            evaluated_tasks=evaluated_tasks,
            evaluated_steps=evaluated_steps,
        )
