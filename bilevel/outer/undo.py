"""What undoes a move of a torch optimizer, bit for bit and cheaply: copies of the few things that a step changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from bilevel.core import rows
from bilevel.outer.adam import Adam
from bilevel.outer.state import restore_optimizer

PLAIN = frozenset({int, float, bool, complex, str, type(None)})
"""Types of values that nothing changes in place."""


class Undo:
    """Copies of free tensors, of an optimizer's state and options, and of a scheduler, as `take` found them.

    Tensors are put back in place; other values that may change in place are copied deeply. An optimizer with a
    ``state_dict`` of its own is asked for it.
    """

    def __init__(self, free: Sequence[Tensor], optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self._leaves, self._optimizer, self._scheduler = free, optimizer, scheduler
        self._live = [leaf.detach() for leaf in free]
        self._free = [leaf.clone() for leaf in self._live]
        self._look()

    def take(self) -> None:
        """Copy everything; what was taken before is lost."""
        self._schedule = None if self._scheduler is None else copied(self._scheduler.state_dict())
        if not self._is_known():
            self._look()
        copies, values = [*self._free, *self._copies], [*self._live, *self._tensors]
        if self._on_one_device:
            torch._foreach_copy_(copies, values)
            return
        for kept, value in zip(copies, values, strict=True):  # torch counts steps on the host
            kept.copy_(value)

    def _look(self) -> None:
        """Find what may change: all values of dicts, and the insides of those that are no plain ones."""
        optimizer = self._optimizer
        usual = _is_usual(optimizer)
        # Until all is found there are none: an interrupted look is taken again.
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._whole = None if usual else copy.deepcopy(optimizer.state_dict())
        self._state = dict(optimizer.state) if usual else {}
        dicts = [(entry, dict(entry)) for entry in (*self._state.values(), *optimizer.param_groups) if usual]
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._others: list[tuple[dict[str, Any], str, Any]] = []
        for index, (entry, values) in enumerate(dicts):
            for name, value in values.items():
                if _is_fixed(value) or (index >= len(self._state) and name == "params"):
                    continue
                if type(value) is Tensor and not value.requires_grad:
                    self._tensors.append(value)
                    self._copies.append(value.clone())
                else:
                    self._others.append((entry, name, copied(value)))
        self._on_one_device = len({tensor.device for tensor in (*self._live, *self._tensors)}) == 1
        self._dicts = dicts

    def _is_known(self) -> bool:
        """Whether the dicts hold the same objects as at the last look, of which nothing but tensors may change."""
        present = [*self._optimizer.state.values(), *self._optimizer.param_groups]
        if self._others or len(present) != len(self._dicts) or not _is_usual(self._optimizer):
            return False
        for now, (entry, values) in zip(present, self._dicts, strict=True):
            if now is not entry or list(now) != list(values) or not all(map(is_, now.values(), values.values())):
                return False
        return True

    def all(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for leaf, value in zip(self._leaves, self._free, strict=True):
                leaf.copy_(value)
            if self._whole is not None:
                restore_optimizer(self._optimizer, self._whole)
            else:
                self._put_back()
        if self._scheduler is not None:
            self._scheduler.load_state_dict(copied(self._schedule))

    def _put_back(self) -> None:
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for entry, values in self._dicts:
            entry.clear()
            entry.update(values)
        for tensor, value in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(value)
        for entry, name, value in self._others:
            if isinstance(entry[name], Tensor):
                entry[name].copy_(value)
            else:
                entry[name] = copied(value)

    def rows(self, moved: Tensor) -> None:
        """Put back the rows that are False in `moved`, moments included."""
        with torch.no_grad():
            for leaf, old in zip(self._leaves, self._free, strict=True):
                leaf.copy_(rows.where(moved, leaf, old))
            for new, old in self._moments():
                if isinstance(new, Tensor) and new.dim() > 0 and len(new) == len(moved):
                    new.copy_(rows.where(moved, new, old))

    def _moments(self) -> Iterator[tuple[Any, Any]]:
        """Yield what the optimizer keeps of each tensor now, beside what it kept before."""
        if self._whole is None:
            present: Any = self._optimizer.state
            copies = {id(tensor): value for tensor, value in zip(self._tensors, self._copies, strict=True)}
            before: Any = {
                key: {name: copies[id(value)] for name, value in values.items() if id(value) in copies}
                for key, (_, values) in zip(self._state, self._dicts, strict=False)
            }
        else:
            present, before = self._optimizer.state_dict()["state"], self._whole["state"]
        for key, olds in before.items():
            if isinstance(olds, dict):
                yield from ((present[key].get(name), old) for name, old in olds.items())


def _is_usual(optimizer: Any) -> bool:
    """Whether all that an optimizer saves is its options and a dict for each tensor."""
    usual, cls = torch.optim.Optimizer, type(optimizer)
    return (
        (cls is Adam or (cls.state_dict is usual.state_dict and cls.load_state_dict is usual.load_state_dict))
        and not optimizer._optimizer_state_dict_pre_hooks
        and not optimizer._optimizer_state_dict_post_hooks
        and not optimizer._optimizer_load_state_dict_pre_hooks
        and not optimizer._optimizer_load_state_dict_post_hooks
        and all(isinstance(entry, dict) for entry in optimizer.state.values())
    )


def _is_fixed(value: Any) -> bool:
    """Whether nothing changes a value in place."""
    return type(value) in PLAIN or (type(value) is tuple and all(map(_is_fixed, value)))


def copied(value: Any) -> Any:
    """Return a deep copy; of plain containers of tensors and numbers in a fraction of the time."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is Tensor and not value.requires_grad:
        return value.clone()
    if kind is tuple:
        return tuple(map(copied, value))
    if kind is list:
        return list(map(copied, value))
    if kind is dict:
        return {key: copied(each) for key, each in value.items()}
    return copy.deepcopy(value)
