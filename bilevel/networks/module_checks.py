"""What in an ``nn.Module`` a function of its parameters cannot have, found by looking: each is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from bilevel.oracles.ranks import parallel_class


def check_module(module: nn.Module) -> None:
    """Refuse, with the remedy, a module whose training in torch does what losses of its parameters would leave out."""
    for name, part in module.named_modules():
        for sentence in (*_parallel(name, part), *_normalised(name, part), *_hooked(name, part)):
            raise ValueError(sentence)
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            wrong = f"the module's parameter {name!r} has no shape yet"
            raise ValueError(f"{wrong}: run the module on one batch before `ModuleProblem`.")
        # Torch calls both kinds when gradients arrive at a parameter; here gradients are those of copies.
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"the module's parameter {name!r} has a hook on its gradient, which derivatives of a loss by copies of "
                "the parameters do not call: remove it (handle.remove()) and write what it does into the forward pass: "
                "mask * w + (1 - mask) * w0 with a constant w0 for entries that stay (torch.nn.utils.parametrize)."
            )


def _parallel(name: str, part: nn.Module) -> Iterator[str]:
    if (result := parallel_class(part)) is not None:
        where = f"the module's part {name!r}" if name else "the module"
        yield (
            f"{where} is a {result}, which averages gradients over ranks in .backward() alone: hand over the module "
            "inside it (wrapper.module), with the same data on every rank."
        )


def _normalised(name: str, part: nn.Module) -> Iterator[str]:
    """Yield what is wrong with a normalised weight of a layer, new style (parametrization) or old (hook)."""
    layer = f"of the layer {name!r}" if name else "of the layer"
    for hook in part._forward_pre_hooks.values():
        if type(hook).__name__ == "WeightNorm":
            yield _weight_norm(layer, "torch.nn.utils.remove_weight_norm(layer)")
        if type(hook).__name__ == "SpectralNorm":
            yield (
                f"the old spectral norm {layer} writes into the layer in every forward pass: remove it "
                "(torch.nn.utils.remove_spectral_norm(layer)); torch.nn.utils.parametrizations.spectral_norm takes its "
                "place, with the layer in evaluation mode (layer.eval())."
            )
    parametrizations = getattr(part, "parametrizations", None)
    chains: Any = parametrizations if isinstance(parametrizations, nn.ModuleDict) else {}
    for weight, chain in chains.items():
        removal = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {weight!r})"
        for each in chain:
            if type(each).__name__ == "_WeightNorm":
                yield _weight_norm(layer, removal)
            if type(each).__name__ == "_SpectralNorm" and each.training:
                yield (
                    f"the spectral norm {layer} moves its vectors in every forward pass in train mode, which inner "
                    "steps would leave out: put the layer in evaluation mode (layer.eval()) before `ModuleProblem`, "
                    f"which holds them, or remove it ({removal})."
                )


def _weight_norm(layer: str, removal: str) -> str:
    """Return why: the second derivative of torch's kernel takes the norms for constants (torch 2.13)."""
    return (
        f"torch's weight norm {layer} has wrong second derivatives: remove it ({removal}), or register a "
        "parametrization of your own that returns g * v / v.norm(dim=1, keepdim=True)."
    )


def _hooked(name: str, part: nn.Module) -> Iterator[str]:
    if part._backward_hooks or part._backward_pre_hooks:
        yield (
            f"the module's part {name!r} ({type(part).__name__}) has a backward hook, whose gradients are not those of "
            "a loss: remove it (handle.remove()), and write what it does to gradients into the forward pass."
        )
