"""What undoes a move of a torch optimizer, bit for bit and cheaply: copies of the few things that a step changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.core import rows
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
        self._free = [leaf.detach().clone() for leaf in free]
        # The copy of each tensor, by its id, which is written anew at the next take.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._whole: dict[str, Any] | None = None

    def take(self) -> None:
        """Copy everything; what was taken before is lost."""
        for leaf, value in zip(self._leaves, self._free, strict=True):
            value.copy_(leaf.detach())
        optimizer, old = self._optimizer, self._copies
        self._schedule = None if self._scheduler is None else copied(self._scheduler.state_dict())
        self._whole = None if _is_usual(optimizer) else copy.deepcopy(optimizer.state_dict())
        if self._whole is None:
            self._copies = {}
            self._state = {key: (entry, dict(entry), self._of(entry, old)) for key, entry in optimizer.state.items()}
            self._groups = [(group, dict(group), self._of(group, old, "params")) for group in optimizer.param_groups]

    def _of(self, entry: dict[str, Any], old: dict[int, tuple[Tensor, Tensor]], but: str = "") -> dict[str, Any]:
        """Return copies of those values that may change in place."""
        found: dict[str, Any] = {}
        for name, value in entry.items():
            kind = type(value)
            if kind in PLAIN or name == but:
                continue
            if kind is not Tensor or value.requires_grad:
                found[name] = copied(value)
                continue
            known = old.get(id(value))
            found[name] = value.clone() if known is None else known[1].copy_(value)
            self._copies[id(value)] = value, found[name]
        return found

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
        state = self._optimizer.state
        state.clear()
        state.update({key: entry for key, (entry, _, _) in self._state.items()})
        for entry, values, copies in (*self._state.values(), *self._groups):
            entry.clear()
            entry.update(values)
            for name, value in copies.items():
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
            before = {key: copies for key, (_, _, copies) in self._state.items()}
        else:
            present, before = self._optimizer.state_dict()["state"], self._whole["state"]
        for key, olds in before.items():
            if isinstance(olds, dict):
                yield from ((present[key].get(name), old) for name, old in olds.items())


def _is_usual(optimizer: Any) -> bool:
    """Whether all that an optimizer saves is its options and a dict for each tensor."""
    usual, cls = torch.optim.Optimizer, type(optimizer)
    return (
        cls.state_dict is usual.state_dict
        and cls.load_state_dict is usual.load_state_dict
        and not optimizer._optimizer_state_dict_pre_hooks
        and not optimizer._optimizer_state_dict_post_hooks
        and not optimizer._optimizer_load_state_dict_pre_hooks
        and not optimizer._optimizer_load_state_dict_post_hooks
        and all(isinstance(entry, dict) for entry in optimizer.state.values())
    )


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
