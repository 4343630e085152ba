"""Which operation made a number that is not finite: found by running a function again and watching every operation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.core import tree
from bilevel.core.autograd import graph_nodes

FILLS = frozenset({"masked_fill", "masked_fill_", "full", "full_like", "fill_", "tensor", "where"})
"""Operations that are asked for infinite entries, such as those of an attention mask."""


class _Watch(TorchFunctionMode):
    """Notes the first operation whose result is not finite, with what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not self.first and name not in FILLS and isinstance(result, Tensor) and result.is_floating_point():
            with torch._C.DisableTorchFunction():
                if not tree.is_finite(result):
                    self.first = _sentence(name.strip("_"), [arg for arg in args if isinstance(arg, Tensor)])
        return result


def _sentence(name: str, given: list[Tensor]) -> str:
    for tensor in given:
        if tensor.is_floating_point() and tensor.numel() and not tree.is_finite(tensor):
            return f"a tensor of shape {tuple(tensor.shape)} that `{name}` is given holds NaN or infinite values"
    if not given or not given[0].numel():
        return f"`{name}` made the first value that is not finite"
    low, high = float(given[0].detach().min()), float(given[0].detach().max())
    shape = tuple(given[0].shape)
    return (
        f"`{name}` made the first value that is not finite, from a tensor of shape {shape} with entries from {low:.3g} "
        f"to {high:.3g}"
    )


def first_not_finite(function: Callable[[], Any]) -> str:
    """Return which operation made the first value of a function that is not finite, or ""; the function is run again.

    >>> first_not_finite(lambda: (torch.zeros(2).log() * 0.0).sum())
    '`log` made the first value that is not finite, from a tensor of shape (2,) with entries from 0 to 0'
    """
    watch = _Watch()
    with watch:
        function()
    return watch.first


def first_not_finite_slope(loss: Tensor, inputs: list[Tensor]) -> str:
    """Return which operation's derivative is the first that is not finite on the way back from a finite loss, or "".

    >>> x = torch.zeros(2, requires_grad=True)
    >>> first_not_finite_slope(x.sqrt().sum(), [x])
    'the derivative of `Sqrt` is not finite there'
    """
    blamed: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(by_inputs: Any, by_outputs: Any) -> None:
            # Hooks run in the order of the way back, so that the first to be blamed is the one that made it.
            if not all(tree.is_finite(part) for part in by_inputs if part is not None):
                blamed.append(name.split("Backward")[0])

        return look

    # A node of a gradient's graph that was built in anomaly mode knows the operation that it is of.
    handles = [node.register_hook(hook((node.metadata.get("parent_") or node).name())) for node in graph_nodes([loss])]
    try:
        torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return f"the derivative of `{blamed[0]}` is not finite there" if blamed else ""


def first_not_finite_curvature(gradient: Callable[[], tuple[list[Tensor], list[Tensor]]]) -> str:
    """Return which operation's second derivative is the first that is not finite on the way back from a gradient.

    `gradient` builds a finite gradient with its graph; it returns its leaves, and those by which it is differentiated.

    >>> def gradient():
    ...     x = torch.zeros(2, requires_grad=True)
    ...     return list(torch.autograd.grad(torch.linalg.vector_norm(x), [x], create_graph=True)), [x]
    >>> first_not_finite_curvature(gradient)
    'the second derivative of `linalg_vector_norm` is not finite there'
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that anomaly mode is slow
        with torch.enable_grad(), torch.autograd.set_detect_anomaly(True, check_nan=False):
            parts, inputs = gradient()
            moving = [part for part in parts if part.requires_grad]
            # Odd weights, so that no sum of infinite parts cancels.
            total = sum(
                (part * torch.linspace(1, 2, part.numel()).reshape(part.shape).to(part)).sum() for part in moving
            )
    if not isinstance(total, Tensor) or not tree.is_finite(total):
        return ""
    clause = first_not_finite_slope(total, inputs)
    name = re.search("`(.*)`", clause)
    if name is None:
        return ""
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", name[1]).lower()
    return f"the second derivative of `{snake}` is not finite there"
