"""Evaluation of a loss in float64, whatever the dtype of the data that it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class DoublePrecision(TorchFunctionMode):
    """Within it every operation on floating tensors runs in float64, whatever the dtype of the data that a loss holds.

    >>> data = torch.ones(3)
    >>> with DoublePrecision():
    ...     (data / 3).sum().dtype
    torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            given, options = pytree.tree_map(widened, (args, kwargs or {}))
            return pytree.tree_map(widened, func(*given, **options))


def widened(value: Any) -> Any:
    """Return a floating tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
