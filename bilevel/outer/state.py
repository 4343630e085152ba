"""What a saved outer run holds besides its own tensors: the inner state and the random generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerState

FORMAT = 1
"""The format of a state that this version writes and reads."""


def saved_inner_state(state: InnerState | None) -> dict[str, Any] | None:
    """Return an inner state in plain containers, from which ``InnerState(**saved)`` makes it again; None stays None."""
    if state is None:
        return None
    return {
        "params": state.params,
        "memory": state.memory,
        "steps": state.steps,
        "measured": dict(state.measured),
        "kept": state.kept,
        "earlier": state.earlier,
    }


def generators() -> dict[str, Any]:
    """Return the states of the CPU's generator and of all CUDA devices; none where CUDA was not used."""
    # Asking a device for its state would start CUDA.
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda: list[Tensor] = torch.cuda.get_rng_state_all() if used else []
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def restore_generators(state: Mapping[str, Any]) -> None:
    """Set the generators to what `generators` returned; devices that this machine lacks are passed over."""
    # Back on the CPU, where `torch.load(map_location="cuda")` may have taken them from.
    torch.set_rng_state(state["rng"].cpu())
    known = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, value in enumerate(state.get("cuda_rng", ())[:known]):
        torch.cuda.set_rng_state(value.cpu(), index)
