"""An ``nn.Module`` as a pure function of its trainable parameters and running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.core.threads import PROCESS_STATE
from bilevel.core.tree import Tree
from bilevel.networks.batch_norm import BatchNormLayers, Statistics
from bilevel.networks.module_checks import check_module
from bilevel.networks.replicas import Replicas, replicable
from bilevel.oracles.contents import same
from bilevel.oracles.random_layers import DropoutRNG
from bilevel.oracles.watch import changes


class FunctionalModule:
    """A module whose parameters and running statistics are arguments; it is not modified.

    Frozen parameters and all buffers but the moving statistics of BatchNorm are constants at their present values; the
    modes of its layers are those of now.

    Raises:
        ValueError: for a module without trainable parameters, and for what `check_module` refuses.

    >>> functional = FunctionalModule(nn.Linear(2, 1, bias=False))
    >>> functional.at({"weight": torch.tensor([[1.0, 2.0]])})(torch.ones(2))
    tensor([3.])
    """

    def __init__(self, module: nn.Module) -> None:
        check_module(module)
        self.params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("the module has no parameters that require gradients.")
        self.batch_norm = BatchNormLayers(module)
        self.statistics = self.batch_norm.start()
        self._replicas = Replicas(module) if replicable(module) else None
        self._tried = False
        self._module = module
        self._modes = [(part, part.training) for part in module.modules()]
        self._places = {name: index for index, (name, _) in enumerate(module.named_modules())}
        self._frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        self._buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        self._tied = _tied(module)

    def at(self, params: dict[str, Tensor], statistics: Statistics | None = None) -> Model:
        """Return the module at given parameters and, where evaluation mode may read them, running statistics."""
        return Model(self, params, statistics)

    def run(self, params: dict[str, Tensor], statistics: Statistics | None, *inputs: Any, **options: Any) -> Any:
        """Run the module in its own mode, or, given running statistics (maybe none), in evaluation mode."""
        # Buffers are copied, so that a layer that updates them in place does not change the problem.
        buffers = {name: value.clone() for name, value in self._buffers.items()}
        values = self._frozen | buffers | params
        values |= {name: values[first] for name, first in self._tied.items()}
        if self._replicas is None:
            parts = [part for part, _ in self._modes]
            with PROCESS_STATE, self._mode(statistics is not None), self._hooked(parts, statistics):
                # Its own tying leaves a submodule that has two names with the values of this call.
                result = torch.func.functional_call(self._module, values, inputs, options, tie_weights=False)
            self._note(buffers, values, self._module)
            return result
        parts = self._replicas.make()
        for each, (_, training) in zip(parts, self._modes, strict=True):
            # Not by `nn.Module.__setattr__`, which looks at every kind of attribute.
            vars(each)["training"] = training and statistics is None
        for name, value in values.items():
            prefix, _, own = name.rpartition(".")
            part: Any = parts[self._places[prefix]]
            (part._parameters if own in part._parameters else part._buffers)[own] = value
        with self._hooked(parts, statistics):
            result = parts[0](*inputs, **options)
        if statistics is None and not self._tried:
            self._tried = True
            if self._replicas.changed(parts):
                # The loss may read from the module what its forward has left there.
                self._replicas = None
                return self.run(params, statistics, *inputs, **options)
        self._note(buffers, dict(parts[0].named_buffers()), parts[0])
        return result

    def _hooked(self, parts: list[nn.Module], statistics: Statistics | None) -> AbstractContextManager[None]:
        return self.batch_norm.hooked(lambda name: parts[self._places[name]], statistics)

    def _note(self, copies: dict[str, Tensor], left: dict[str, Tensor], module: nn.Module) -> None:
        """Note, where somebody watches, what a forward pass has changed, which the next one does not see."""
        if (made := changes.get()) is None:
            return
        for name, buffer in self._buffers.items():
            if name not in self.statistics and (left.get(name) is not copies[name] or not _holds(copies[name], buffer)):
                part = name.rpartition(".")[0]
                where = f"its part {part!r}" if part else "it"
                made.append(
                    f"changes its buffer {name!r} in every forward pass in this mode, which inner steps would leave "
                    f"out: put {where} in evaluation mode (.eval()) before `ModuleProblem` "
                    "if that stops it, or make it without that buffer (track_running_stats=False of InstanceNorm)"
                )
        for name, _ in module.named_parameters():
            if name not in self.params and name not in self._frozen and name not in self._tied:
                made.append(f"makes its parameter {name!r} in forward: run it on one batch before `ModuleProblem`")

    @contextmanager
    def _mode(self, evaluate: bool) -> Iterator[None]:
        changed = [part for part, training in self._modes if part.training != (training and not evaluate)]
        for part in changed:
            part.training = not part.training
        try:
            yield
        finally:
            for part in changed:
                part.training = not part.training


def _holds(tensor: Tensor, value: Tensor) -> bool:
    if tensor._version > 0:
        return False
    try:
        return same(tensor, value)
    except RuntimeError:  # a tensor of a transform, which does not tell its numbers
        return True


def normalising_layer(module: nn.Module) -> str | None:
    """Return the name of the first layer whose third derivatives are wrong in torch (2.13), or None.

    The double backward of its batch, layer and instance norm takes means and variances for constants.
    """
    norms = nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.modules.instancenorm._InstanceNorm
    return next((name for name, part in module.named_modules() if isinstance(part, norms)), None)


def _tied(module: nn.Module) -> dict[str, str]:
    """Return, for each further name of a tied parameter or buffer, the name under which it is passed."""
    first: dict[int, str] = {}
    tied = {}
    for prefix, part in module.named_modules():
        for members in (part.named_parameters, part.named_buffers):
            for name, tensor in members(prefix, recurse=False, remove_duplicate=False):
                if first.setdefault(id(tensor), name) != name:
                    tied[name] = first[id(tensor)]
    return tied


class Model:
    """What the losses call: ``model(*inputs)`` runs the module in the mode that it was given in.

    `statistics` are None in the inner loss, which cannot read them.
    """

    def __init__(self, functional: FunctionalModule, params: dict[str, Tensor], statistics: Statistics | None) -> None:
        self._functional, self._params, self._statistics = functional, params, statistics
        self._evaluates = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._functional.run(self._params, self._statistics if self._evaluates else None, *inputs, **options)

    def eval(self) -> Model:
        """Return the model in evaluation mode: BatchNorm normalises by the running statistics, nothing is dropped.

        Raises:
            ValueError: in the inner loss, where the running statistics move.
        """
        statistics = self._statistics if self._functional.statistics else {}
        if statistics is None:
            raise ValueError(
                "`model.eval()` in the inner loss would read running statistics that its own steps move: use it in the "
                "outer loss, or put the BatchNorm layers in evaluation mode before `ModuleProblem`."
            )
        model = copy.copy(self)
        model._statistics, model._evaluates = statistics, True
        return model


class _Recording(Model):
    """A model that keeps what each call gives."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made: list[Tree] = []

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        self.made.append(super().__call__(*inputs, **options))
        return self.made[-1]


class _Replaying(Model):
    """A model whose calls give the next of some outputs."""

    def __init__(self, outputs: list[Tree], dropout_rng: bool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._feed, self._random = iter(outputs), dropout_rng

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if self._random:
            # The loss may draw further numbers, which follow those of the layers.
            with torch.no_grad():
                super().__call__(*inputs, **options)
        return next(self._feed)


@dataclass(frozen=True)
class ModuleLoss:
    """A loss of (model, trainable params, hparams, ...) as a function of (params, hparams, ...).

    It is the composition of its two halves, ``z = outputs(params, ...)`` and ``at_outputs(z, params, ...)``, which
    Gauss-Newton products need. `reads_statistics`: evaluation mode reads running statistics, which are then among
    params.
    """

    loss: Callable[..., Tensor]
    functional: FunctionalModule
    reads_statistics: bool = False
    dropout_rng: DropoutRNG | None = None

    def __call__(self, params: dict[str, Tensor], hparams: Any, *batch: Any) -> Tensor:
        parts = self._parts(params)
        return self._drawn(self.functional.at(*parts), parts[0], hparams, *batch)

    def outputs(self, params: dict[str, Tensor], hparams: Any, *batch: Any) -> list[Tree]:
        """Return what the model gives at each of the loss's calls of it, in their order."""
        parts = self._parts(params)
        model = _Recording(self.functional, *parts)
        self._drawn(model, parts[0], hparams, *batch)
        return model.made

    def at_outputs(self, outputs: list[Tree], params: dict[str, Tensor], hparams: Any, *batch: Any) -> Tensor:
        """Return the loss where each call of the model gives the next of `outputs`; it is run for its draws alone."""
        parts = self._parts(params)
        model = _Replaying(outputs, self.dropout_rng is not None, self.functional, *parts)
        return self._drawn(model, parts[0], hparams, *batch)

    def _parts(self, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], Statistics | None]:
        trainable = {name: params[name] for name in self.functional.params}
        return trainable, {n: params[n] for n in self.functional.statistics} if self.reads_statistics else None

    def _drawn(self, *arguments: Any) -> Tensor:
        return (self.loss if self.dropout_rng is None else self.dropout_rng.seeded(self.loss))(*arguments)
