"""What tensors, arrays and generators hold, to be compared later and put back."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

EXACT = 2**22
"""Bytes up to which a tensor is kept as it is; of a larger one a sum of its bits and a sample."""
SAMPLE = 2**16
ROUNDING = 1e3
"""Relative differences of equal calls, in units of the dtype's rounding: kernels may sum in another order."""
Access: TypeAlias = tuple[Callable[[], Any], Callable[[Any], Any]]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Contents:
    """What some tensors and arrays of numpy, given by name, hold at present."""

    def __init__(self, tensors: Mapping[str, Tensor], arrays: Mapping[str, Any]) -> None:
        self._tensors = {name: (t, pointer(t), _version(t), _held(t)) for name, t in tensors.items()}
        self._arrays = {name: (a, _array_held(a)) for name, a in arrays.items()}

    def storages(self) -> dict[int, str]:
        """Return the names of the tensors by where their numbers are."""
        result: dict[int, str] = {}
        for name, (_, where, _, _) in self._tensors.items():
            result.setdefault(where, name)
        return result

    def changed(self) -> str | None:
        """Return the name of the first that holds something else or lies elsewhere, or None."""
        for name, (tensor, where, version, held) in self._tensors.items():
            if pointer(tensor) != where:
                return name
            # A version that stands says nothing (.data and numpy leave it), one that moved may be a write of the same.
            if _version(tensor) != version or not _equal(_held(tensor), held):
                return name
        for name, (array, kept) in self._arrays.items():
            now = _array_held(array)
            if now is not None and not np.array_equal(now, kept, equal_nan=array.dtype.kind in "fc"):
                return name
        return None

    def put_back(self) -> None:
        """Write back what was there, where all of it was kept."""
        for tensor, where, _, held in self._tensors.values():
            if len(held) == 1 and pointer(tensor) == where and not _equal(_held(tensor), held):
                with torch.no_grad(), suppress(RuntimeError):
                    tensor.detach().copy_(held[0])
        for array, kept in self._arrays.values():
            if isinstance(kept, np.ndarray) and array.flags.writeable and not np.array_equal(array, kept):
                array[...] = kept


def pointer(tensor: Tensor) -> int:
    """Return where the numbers of a tensor are; -1 for one without such a place."""
    try:
        return tensor.untyped_storage().data_ptr() or -1
    except (RuntimeError, NotImplementedError):
        return -1


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _held(tensor: Tensor) -> list[Tensor]:
    """Return a copy, or of a large tensor a sum of its bits and a sample; nothing of one without plain numbers."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [part.clone() for part in (tensor._indices(), tensor._values())]
    if tensor.layout != torch.strided:
        with suppress(RuntimeError):
            return [tensor.values().clone(), tensor.values().clone()]
        return []
    if tensor.is_meta or pointer(tensor) == -1:
        return []
    if tensor.numel() * tensor.element_size() <= EXACT:
        return [tensor.clone()]
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    return [bits.sum(dtype=torch.int64), bits[:: max(len(bits) // SAMPLE, 1)].clone()]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (
        one.is_floating_point()
        and torch.equal(one.isnan(), other.isnan())
        and torch.equal(*map(torch.nan_to_num, (one, other)))
    )


def apart(first: Sequence[Tensor | None], second: Sequence[Tensor | None], rounding: float = ROUNDING) -> float:
    """Return the largest relative difference above so many roundings of the dtype; NaN is equal to NaN."""
    if len(first) != len(second):
        return float("inf")
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        if one is None or other is None or one.shape != other.shape:
            if one is not other:
                return float("inf")
        elif not same(one, other):
            if not torch.equal(one.isnan(), other.isnan()):
                return float("inf")
            size, gap = (float(torch.linalg.vector_norm(each.double().nan_to_num())) for each in (one, one - other))
            if not gap <= rounding * torch.finfo(one.dtype).eps * size:
                largest = max(largest, gap / size if size > 0 else float("inf"))
    return largest


def _array_held(array: Any) -> Any:
    if array.dtype.hasobject:
        return None
    return array.copy() if array.nbytes <= EXACT else zlib.crc32(np.ascontiguousarray(array).data)


# Generators -----------------------------------------------------------------------------------------------------------


class Generators:
    """The random generators that a loss may draw from: the global ones and those that it refers to, by name."""

    def __init__(self, captured: Mapping[str, Any]) -> None:
        self._captured = dict(captured)

    def _access(self) -> dict[str, Access]:
        result: dict[str, Access] = {"torch's global generator": (torch.get_rng_state, torch.set_rng_state)}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            result["CUDA's generator"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
        result["numpy's global generator"] = (np.random.get_state, np.random.set_state)
        result["Python's `random`"] = (random.getstate, random.setstate)
        return result | {f"the generator `{name}`": _access(each) for name, each in self._captured.items()}

    def states(self) -> dict[str, Any]:
        """Return the state of each by name."""
        return {name: get() for name, (get, _) in self._access().items()}

    def put_back(self, states: Mapping[str, Any]) -> None:
        """Put those back whose state has moved."""
        for name, (get, put) in self._access().items():
            if name in states and not same_state(get(), states[name]):
                put(states[name])


def _access(generator: Any) -> Access:
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    return generator.get_state, generator.set_state


def same_state(one: Any, other: Any) -> bool:
    """Whether two states of a generator are the same."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple) and any(isinstance(each, np.ndarray) for each in one):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(np.all(one == other))
