"""An ``nn.Module`` as a pure function of its trainable parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bilevel.tree import Tree

Model: TypeAlias = Callable[..., Any]


def functional_model(module: nn.Module) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Model]]:
    """Return the trainable parameters of a module, and the function from parameters to a model.

    Args:
        module: the module; it is not modified. Buffers and frozen parameters are constants at their present values.

    Returns:
        (params, at): ``at(params)(*inputs)`` runs the module at `params`.

    Raises:
        ValueError: for a module without trainable parameters, or with active dropout.

    >>> params, at = functional_model(nn.Linear(2, 1, bias=False))
    >>> at({"weight": torch.tensor([[1.0, 2.0]])})(torch.ones(2))
    tensor([3.])
    """
    # A tied parameter appears once in named_parameters and is passed once: functional_call ties it again.
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("the module has no parameters that require gradients.")
    random = [
        name
        for name, part in module.named_modules()
        if part.training and isinstance(part, nn.modules.dropout._DropoutNd)
    ]
    if random:
        raise ValueError(
            f"the module's dropout layer {random[0]!r} is active, so the inner loss is random and has no "
            "hypergradient: call module.eval() first."
        )
    constants = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    constants |= {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def at(params: dict[str, Tensor]) -> Model:
        def model(*inputs: Any, **options: Any) -> Any:
            # Buffers are cloned, so that a layer that updates them in place does not change the problem.
            fixed = {name: value.clone() for name, value in constants.items()}
            return torch.func.functional_call(module, fixed | params, inputs, options)

        return model

    return params, at


@dataclass(frozen=True)
class ModuleLoss:
    """A loss of (model, params, hparams, ...) as a function of (params, hparams, ...).

    It is the composition of its two halves, ``z = outputs(params, ...)`` and ``at_outputs(z, params, ...)``, which
    Gauss-Newton products need.

    Attributes:
        loss: the user's function.
        model_at: params -> model.
    """

    loss: Callable[..., Tensor]
    model_at: Callable[[dict[str, Tensor]], Model]

    def __call__(self, params: dict[str, Tensor], hparams: Any, *batch: Any) -> Tensor:
        """Return the loss."""
        return self.loss(self.model_at(params), params, hparams, *batch)

    def outputs(self, params: dict[str, Tensor], hparams: Any, *batch: Any) -> list[Tree]:
        """Return what the model gives at each of the loss's calls of it, in their order."""
        model, found = self.model_at(params), []

        def recorded(*inputs: Any, **options: Any) -> Any:
            found.append(model(*inputs, **options))
            return found[-1]

        self.loss(recorded, params, hparams, *batch)
        return found

    def at_outputs(self, outputs: list[Tree], params: dict[str, Tensor], hparams: Any, *batch: Any) -> Tensor:
        """Return the loss where each call of the model gives the next of `outputs`; the model is not run."""
        feed = iter(outputs)
        return self.loss(lambda *inputs, **options: next(feed), params, hparams, *batch)
