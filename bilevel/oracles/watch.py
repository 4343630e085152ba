"""Watching the operations of a loss one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.oracles import random_layers as draws
from bilevel.oracles.contents import pointer


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first write into known storages and whether random numbers are drawn."""

    def __init__(self, storages: dict[int, str], before_communication: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages, self._before_communication = storages, before_communication
        self.written: tuple[str, str] | None = None
        self.draws = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation would import torch.compile, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            self._before_communication()
        if torch.Tag.nondeterministic_seeded in func.tags and not draws.are_seeded():
            self.draws = True
        for index, key in _written(func) if self.written is None else ():
            value = args[index] if index < len(args) else kwargs.get(key)
            for each in value if isinstance(value, list | tuple) else (value,):
                name = self._storages.get(pointer(each)) if isinstance(each, Tensor) else None
                if name is not None:
                    self.written = name, func._schema.name.rpartition("::")[2]
        return func(*args, **kwargs)


@cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Return which arguments an operation writes into: asking its schema takes longer than the operation."""
    arguments = enumerate(func._schema.arguments)
    return [(index, each.name) for index, each in arguments if each.alias_info is not None and each.alias_info.is_write]


changes: ContextVar[list[str] | None] = ContextVar("moved", default=None)
"""Where changes of a module by its forward pass are noted at present; each entry continues "the module"."""
