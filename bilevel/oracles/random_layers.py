"""Random numbers of layers such as dropout, as a pure function of a seed and of the index of the inner step.

Nothing is drawn from a state that moves: a reverse sweep, the recomputation between two checkpoints and a run that
resumes all see the masks of step k again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.core.options import is_int, require_value
from bilevel.core.threads import PROCESS_STATE, set_within

_active: ContextVar[DropoutRNG | None] = ContextVar("active", default=None)
"""Whose numbers are drawn at present."""


class DropoutRNG:
    """The random numbers that losses draw: on the CPU and on one device.

    >>> dropout = DropoutRNG(0, torch.device("cpu"))
    >>> loss = dropout.seeded(lambda: torch.rand(2), step=3)
    >>> torch.equal(loss(), loss())
    True
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        require_value("ModuleProblem.seed", seed, "an int that is not negative or None", is_int(seed, 0))
        self._seed, self._device = seed, device

    def seeded(self, loss: Callable[..., Tensor], step: int | None = None) -> Callable[..., Tensor]:
        """Return a loss that draws the numbers of an inner step; None: of whatever is no step, unless inside a step."""

        def at(*arguments: Any) -> Tensor:
            if _active.get() is self:
                return loss(*arguments)
            with set_within(_active, self), self._numbers(step):
                return loss(*arguments)

        return at

    @contextmanager
    def _numbers(self, step: int | None) -> Iterator[None]:
        key = (self._seed,) if step is None else (self._seed, step)
        number = int(np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1, np.uint64)[0]) >> 1
        devices = [self._device.index] if self._device.type == "cuda" else []
        # Threads share the generators: the loss of one draws while those of the others wait.
        with PROCESS_STATE, torch.random.fork_rng(devices):
            # torch.manual_seed would reach devices whose state is not restored.
            torch.default_generator.manual_seed(number)
            for index in devices:
                torch.cuda.default_generators[index].manual_seed(number)
            yield


def are_seeded() -> bool:
    """Whether numbers that are drawn at present follow from a seed of this package."""
    return _active.get() is not None


def random_layer(module: nn.Module) -> str | None:
    """Return the name of the first layer of a module that draws random numbers in its present mode, or None."""
    for name, part in module.named_modules():
        dropout = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        recurrent = isinstance(part, nn.RNNBase) and part.dropout > 0 and part.num_layers > 1
        attention = isinstance(part, nn.MultiheadAttention) and part.dropout > 0
        if part.training and (dropout or recurrent or attention or isinstance(part, nn.RReLU)):
            return name
    return None
