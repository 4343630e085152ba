"""The network of the ready-made problems."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from bilevel.core.options import is_int, require_value
from bilevel.core.threads import PROCESS_STATE


def mlp(inputs: int, hidden: Sequence[int], outputs: int, seed: int) -> nn.Sequential:
    """Return a network of linear layers with ReLU between them; its weights follow from the seed."""
    require_value("hidden", hidden, "a list of positive ints", all(is_int(units) for units in hidden))
    layers: list[nn.Module] = [nn.Flatten()]
    with PROCESS_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in pairwise((inputs, *hidden, outputs)):
            layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
