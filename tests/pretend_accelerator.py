"""A pretend accelerator: tensors that report another device, while every operation runs on the CPU.

It shows on any machine what a GPU would have to do: how many kernels are launched, where the host waits for the device,
which tensors are moved, and which were made on the wrong device.

    with accelerator() as log:
        x = torch.ones(3, device=DEVICE)
        float(x.sum())
    log.launches, log.syncs     # 2, 1

The device type is `lazy`, which every torch build knows and no installation gives a meaning to: nothing is registered,
so other tests of the process are left alone. (A backend under a name of its own would have to be registered before the
first backward pass of the process.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE, CPU = torch.device("lazy", 0), torch.device("cpu")
aten = torch.ops.aten

READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}
"""Operations that hand a value to the host."""
SIZED_BY_VALUES = {
    *(aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive),
    *(aten.repeat_interleave, aten.bincount),
}
"""Operations whose result's shape depends on values: the host waits to learn it."""
CHECKED = {aten._linalg_check_errors, aten._linalg_eigh, aten._linalg_svd, aten.linalg_eig, aten.linalg_cholesky}
"""Factorisations that look at their own success, unlike the `_ex` forms."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Operations that wait if an index is a mask."""
COPIES = {aten._to_copy, aten.copy_, aten.copy}
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
NO_KERNEL = ALLOCATIONS | {aten.detach, aten.alias, aten._unsafe_view}


@dataclass
class Log:
    """What happened on the pretend accelerator, by the name of the operation.

    Attributes:
        kernels: operations that compute on the device.
        waits: operations for which the host waits for the device.
        uploads: copies from the host to the device.
        host_scalars: 0-d CPU tensors among the arguments of a kernel, which CUDA takes along without waiting.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    host_scalars: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        """Kernels launched."""
        return self.kernels.total()

    @property
    def syncs(self) -> int:
        """Times that the host waited."""
        return self.waits.total()


class PretendTensor(Tensor):
    """A CPU tensor that says it is elsewhere.

    Args:
        values: the CPU tensor.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> PretendTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=DEVICE,
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"PretendTensor({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, Log())


class _Mode(TorchDispatchMode):
    """Sees every operation, those without a tensor argument included."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and guarding every operation against it takes half of the time."""
        return False

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.log)


@contextmanager
def accelerator() -> Iterator[Log]:
    """Switch the pretend accelerator on; inside, ``tensor.to(DEVICE)`` and ``device=DEVICE`` work."""
    log = Log()
    with _Mode(log):
        yield log


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], log: Log) -> Any:
    """Run one operation on the CPU and write down what it would have been on an accelerator."""
    there: list[PretendTensor] = []
    here: list[Tensor] = []

    def to_values(leaf: Any) -> Any:
        if isinstance(leaf, PretendTensor):
            there.append(leaf)
            return leaf.values
        if isinstance(leaf, Tensor):
            here.append(leaf)
        return leaf

    values = [_each(to_values, arg) for arg in args]
    options = {name: _each(to_values, arg) for name, arg in kwargs.items() if name != "pin_memory"}
    traits = _traits(func)
    target = _target(traits, args, kwargs, bool(there))
    if there and here and not traits.copies:
        _refuse_mixtures(func, here)
        log.host_scalars[traits.name] += len(here)
    _write_down(traits, args, log, bool(there), target)
    if options.get("device") is not None:
        options["device"] = CPU
    result = func(*values, **options)
    if not target:
        return result
    # An operation in place hands back its argument, which must stay the same object.
    owners = {id(tensor.values): tensor for tensor in there}
    return _each(lambda leaf: _moved(leaf, owners), result)


@dataclass(frozen=True)
class _Traits:
    """What kind of operation it is: `waits` for the host, `kernel` where the device computes."""

    name: str
    waits: bool
    kernel: bool
    copies: bool
    in_place_copy: bool
    indexing: bool


@cache
def _traits(func: Any) -> _Traits:
    kind = func.overloadpacket
    return _Traits(
        name=str(func),
        waits=kind in READS | SIZED_BY_VALUES | CHECKED,
        kernel=kind not in READS | NO_KERNEL and not func.is_view,
        copies=kind in COPIES,
        in_place_copy=kind is aten.copy_,
        indexing=kind in INDEXING,
    )


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the members of lists and tuples, which is as deep as operators nest."""
    if isinstance(value, list | tuple):
        return type(value)([function(member) for member in value])
    return function(value)


def _target(traits: _Traits, args: Sequence[Any], kwargs: Mapping[str, Any], there: bool) -> bool:
    """Whether the result lies on the accelerator."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == DEVICE.type
    return isinstance(args[0], PretendTensor) if traits.in_place_copy else there


def _refuse_mixtures(func: Any, here: Sequence[Tensor]) -> None:
    stray = [tuple(tensor.shape) for tensor in here if tensor.dim() > 0]
    if stray:
        raise RuntimeError(f"{func}: tensors on two devices, {DEVICE} and a CPU tensor of shape {stray[0]}")


def _write_down(traits: _Traits, args: Sequence[Any], log: Log, there: bool, target: bool) -> None:
    fetches = traits.copies and there and not target
    uploads = (
        traits.copies and target and (not there or (traits.in_place_copy and not isinstance(args[1], PretendTensor)))
    )
    if not there and not target:
        return
    masks = traits.indexing and any(index is not None and index.dtype == torch.bool for index in args[1])
    if traits.waits or masks or fetches:
        log.waits[traits.name] += 1
    if uploads:
        log.uploads[traits.name] += 1
    elif traits.kernel and not fetches:
        log.kernels[traits.name] += 1


def _moved(leaf: Any, owners: Mapping[int, PretendTensor]) -> Any:
    """Return a result as a tensor of the accelerator: a new one, or the argument that was worked on in place."""
    if not isinstance(leaf, Tensor):
        return leaf
    owner = owners.get(id(leaf))
    if owner is None:
        return PretendTensor(leaf)
    if owner.shape != leaf.shape or owner.stride() != leaf.stride():
        # squeeze_ and its like change the shape of the tensor itself.
        with torch._C._DisableTorchDispatch():
            owner.data = PretendTensor(leaf)
    return owner
