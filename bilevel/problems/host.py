"""When arrays on the host stand for tensors, where a call of NumPy takes half as long as one of torch."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPS = float(np.finfo(np.float64).eps)
LARGEST = math.log(sys.float_info.max)
Array = NDArray[np.float64]
KNOWN = (
    *("inner_problem", "inner_loss", "outer_loss", "outer_value_and_grads", "gram", "moment", "penalties", "spread"),
    *("gather", "_shift", "_eigenbasis", "spectrum", "bind", "predict", "collect", "start"),
)
"""What arrays rest on."""


def on_host(values: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Whether an array stands for a tensor: float64 on the CPU, of no subclass that looks at calls, and of a shape."""
    plain = type(values) is Tensor and values.dtype is torch.float64 and values.is_cpu and not values.requires_grad
    return plain and (shape is None or values.shape == shape)


def known_on_host(cls: type[Any]) -> bool:
    """Whether a class does nothing in another way than the class of this package that it is made of."""
    ours = next(each for each in cls.__mro__ if each.__module__.startswith("bilevel.problems."))
    return all(getattr(cls, name, None) is getattr(ours, name, None) for name in KNOWN)


def penalties_on_host(problem: Any, hparams: Tensor) -> Any:
    """Return the one penalty, or that of every weight; None where one is infinite or none that a problem allows."""
    log = problem.parametrization == "log"
    if problem.penalty == "scalar":
        u = hparams.item()
        penalty = least = most = (math.exp(u) if abs(u) < LARGEST else math.inf) if log else u
    else:
        penalty = problem.spread(hparams).numpy()
        with np.errstate(over="ignore"):
            penalty = np.exp(penalty) if log else penalty
        least, most = penalty.min(), penalty.max()
    return penalty if (least > 0 if log else least >= 0) and most < math.inf else None
