"""Looks at numbers that a device computes: on an accelerator each look waits for everything that was asked of it.

Hot loops launch their work without waiting, and decide from numbers that they look at now and then. On the CPU a number
is there at once, so a loop looks in every step, and its scalars are Python floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ON_ACCELERATOR = 8
"""Steps between two looks on an accelerator: the wait is then small beside the steps, and so are steps in vain."""


def check_interval(device: torch.device) -> int:
    """Return how many steps a loop takes between two looks: 1 on the CPU, `ON_ACCELERATOR` elsewhere.

    >>> check_interval(torch.device("cpu")), check_interval(torch.device("cuda"))
    (1, 8)
    """
    return 1 if device.type == "cpu" else ON_ACCELERATOR


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """Return 0-d tensors of one device as Python floats, by one look.

    >>> to_floats([torch.tensor(1.5), torch.tensor(2.0)])
    [1.5, 2.0]
    """
    if scalars[0].device.type == "cpu":
        return [float(scalar) for scalar in scalars]
    return torch.stack(list(scalars)).cpu().tolist()
