"""The running statistics of BatchNorm layers as values that autograd can follow.

In train mode such a layer normalises by the mean and variance of its batch, and moves its running statistics

    b <- (1 - m) b + m s,      s the mean and the unbiased variance of the batch, m the momentum

in place. Here s is recorded by hooks, with its graph, while the module runs; the layer's own buffers are left alone.
``momentum=None`` is the average over all batches: m is one over the number of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bilevel.core.threads import set_within

Statistics: TypeAlias = dict[str, Tensor]
Tape: TypeAlias = list[tuple[str, Tensor, Tensor]]
"""(layer, mean, variance) of each time that a layer was called, in order."""
_recording: ContextVar[tuple[object, Tape]] = ContextVar("recording", default=(None, []))
"""Whose layers record at present, and where."""


class BatchNormLayers:
    """The layers of a module that normalise by the batch, and those among them whose running statistics move.

    The module is in the mode that it is meant to be trained in.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers: dict[str, nn.modules.batchnorm._BatchNorm] = {
            name: part
            for name, part in module.named_modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None)
        }
        self._moving = [
            name
            for name, part in self._layers.items()
            if part.training and part.track_running_stats and part.running_mean is not None
        ]

    def start(self) -> Statistics:
        """Return the present running statistics by name; counts as numbers of the statistics' dtype, like params."""
        statistics: Statistics = {}
        for name in self._moving:
            layer = self._layers[name]
            assert layer.running_mean is not None
            for key in _keys(name):
                buffer: Tensor = getattr(layer, key.rpartition(".")[2])
                statistics[key] = buffer.detach().to(layer.running_mean.dtype, copy=True)
        return statistics

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Record what the batches' statistics are wherever the module runs in train mode inside the block."""
        with set_within(_recording, (self, [])) as (_, tape):
            yield tape

    @contextmanager
    def hooked(self, layer_of: Callable[[str], nn.Module], statistics: Statistics | None) -> Iterator[None]:
        """Let the layers record inside the block, or normalise by given statistics; `layer_of` finds those that run."""
        handles = []
        for name in self._layers:
            layer = layer_of(name)
            if statistics is not None and name in self._moving:
                handles.append(layer.register_forward_hook(_normaliser(name, statistics), with_kwargs=True))
            else:
                handles.append(layer.register_forward_pre_hook(self._recorder(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _recorder(self, name: str) -> Any:
        owner, tape = _recording.get()
        records = owner is self and name in self._moving

        def record(layer: Any, inputs: Sequence[Tensor], options: Mapping[str, Tensor]) -> None:
            x = inputs[0] if inputs else options["input"]
            if x.numel() == x.shape[1]:
                raise ValueError(
                    f"the BatchNorm layer {name!r} is in train mode and got one value per channel, an input of shape "
                    f"{tuple(x.shape)}, which has no variance: use batches of at least two rows, or put the layer in "
                    "evaluation mode before `ModuleProblem` (in the outer loss: call model.eval())."
                )
            if records:
                variance, mean = torch.var_mean(x.to(layer.running_mean.dtype), [0, *range(2, x.dim())])
                tape.append((name, mean, variance))

        return record

    def moved(self, statistics: Statistics, tape: Tape) -> Statistics:
        """Return the running statistics after the recorded batches."""
        result = dict(statistics)
        for name, *batch in tape:
            *keys, count = _keys(name)
            result[count] = result[count] + 1
            momentum = self._layers[name].momentum
            weight = 1 / result[count].detach() if momentum is None else momentum
            for key, value in zip(keys, batch, strict=True):
                result[key] = torch.lerp(result[key], value, weight)
        return result

    def equilibrium(self, statistics: Statistics, tape: Tape) -> Statistics:
        """Return the running statistics that the recorded batches, again and again, would end at.

        Of a layer called n times they are the mean of its records, weighted by ``(1 - m)^(n-1), ..., 1 - m, 1``; counts
        and what never moves stay.
        """
        result = dict(statistics)
        for name in self._moving:
            records = [batch for layer, *batch in tape if layer == name]
            momentum = self._layers[name].momentum
            if not records or momentum == 0:
                continue
            keep = 1.0 if momentum is None else 1.0 - momentum
            weights = [keep**age for age in reversed(range(len(records)))]
            for key, values in zip(_keys(name), zip(*records, strict=True), strict=False):
                terms = [w / sum(weights) * value for w, value in zip(weights, values, strict=True)]
                result[key] = torch.stack(terms).sum(0)
        return result


def _keys(name: str) -> tuple[str, str, str]:
    """Return the names of a layer's mean, variance and count among the module's buffers."""
    prefix = f"{name}." if name else ""
    return f"{prefix}running_mean", f"{prefix}running_var", f"{prefix}num_batches_tracked"


def _normaliser(name: str, statistics: Statistics) -> Any:
    """Return a hook that does what the layer does in evaluation mode: torch has no derivative by the statistics."""
    mean, variance, _ = (statistics[key] for key in _keys(name))

    def normalise(layer: Any, inputs: Sequence[Tensor], options: Mapping[str, Tensor], output: Tensor) -> Tensor:
        x = inputs[0] if inputs else options["input"]
        shape = (1, -1, *[1] * (x.dim() - 2))
        scaled = (x - mean.view(shape)) * (variance + layer.eps).rsqrt().view(shape)
        if layer.weight is not None:
            scaled = scaled * layer.weight.view(shape)
        if layer.bias is not None:
            scaled = scaled + layer.bias.view(shape)
        return scaled.to(output.dtype)

    return normalise
