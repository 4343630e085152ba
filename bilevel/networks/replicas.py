"""Replicas of an ``nn.Module``: new modules over the same tensors, so that each call can have parameters of its own.

Modules, their containers (parameters, buffers, submodules, hooks, lists, dicts) and bound methods are new; tensors and
all other objects are shared. Threads that run one module at a time, calls inside calls, and backward passes that run a
part of forward again (``torch.utils.checkpoint``) then each find the parameters of their own call.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.oracles.references import code_names, of_cell

DEPTH = 5
"""References that are followed from an attribute or a function to find a module."""


_PLAIN = frozenset({bool, int, float, str, type(None), Tensor, nn.Parameter})
_EMPTY = frozenset({dict, OrderedDict, list, set})


class Replicas:
    """What replicas of a module for which `replicable` holds are made from; they are those of the module as it is now.

    >>> layer = nn.Linear(2, 1)
    >>> (replica,) = Replicas(layer).make()
    >>> replica is layer, replica.weight is layer.weight
    (False, True)
    """

    def __init__(self, module: nn.Module) -> None:
        # Built from their attributes: their `__init__` would make, and draw, parameters of their own.
        parts = list(module.modules())
        made: dict[int, Any] = {id(part): object.__new__(type(part)) for part in parts}
        for part in parts:
            vars(made[id(part)]).update({name: _replicated(value, made) for name, value in vars(part).items()})
        # Nobody runs these; a part is (itself, attributes that replicas share, empty containers, all others).
        self._parts: list[tuple[nn.Module, dict[str, Any], dict[str, type], dict[str, Any]]] = []
        for part in parts:
            own = made[id(part)]
            shared = {name: value for name, value in vars(own).items() if type(value) in _PLAIN}
            empty = {name: type(each) for name, each in vars(own).items() if type(each) in _EMPTY and not each}
            rest = {name: each for name, each in vars(own).items() if name not in shared and name not in empty}
            self._parts.append((own, shared, empty, rest))

    def make(self) -> list[nn.Module]:
        """Return a replica: its modules, in the order of ``module.modules()``, itself first."""
        made: dict[int, Any] = {id(part): object.__new__(type(part)) for part, *_ in self._parts}
        result = list(made.values())
        for each, (_, shared, empty, rest) in zip(result, self._parts, strict=True):
            attributes = vars(each)
            attributes.update(shared)
            for name, kind in empty.items():
                attributes[name] = kind()
            for name, value in rest.items():
                attributes[name] = _replicated(value, made)
        return result

    def changed(self, parts: list[nn.Module]) -> bool:
        """Return whether running a replica has given one of its modules another attribute, or filled a container."""
        return any(
            not _alike(value, vars(own).get(name, parts))
            for part, (own, *_) in zip(parts, self._parts, strict=True)
            for name, value in vars(part).items()
            if name not in _BY_CALL
        )


_BY_CALL = frozenset({"training", "_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs"})
"""Attributes that are those of a call; recurrent layers keep lists of their parameters."""


def _alike(value: Any, before: Any) -> bool:
    if type(value) is not type(before):
        return False
    if isinstance(value, nn.Module | types.MethodType | functools.partial):
        return True
    if isinstance(value, dict):
        return value.keys() == before.keys() and all(_alike(each, before[key]) for key, each in value.items())
    if isinstance(value, list | tuple):
        return len(value) == len(before) and all(map(_alike, value, before))
    return len(value) == len(before) if isinstance(value, set) else value is before


def _replicated(value: Any, made: dict[int, Any]) -> Any:
    """Return a value with the replicas in the place of modules; `made` also holds the containers that are done."""
    if (key := id(value)) in made:
        return made[key]
    kind = type(value)
    copied: Any
    if kind is dict or kind is OrderedDict:
        made[key] = copied = kind()
        for name, each in value.items():
            copied[name] = each if type(each) in _PLAIN else _replicated(each, made)
    elif kind is list:
        made[key] = copied = []
        copied += [_replicated(each, made) for each in value]
    elif kind is tuple or kind is set:
        copied = kind(_replicated(each, made) for each in value)
    elif kind is types.MethodType:
        copied = types.MethodType(value.__func__, _replicated(value.__self__, made))
    elif kind is functools.partial:
        function, arguments, options = (_replicated(each, made) for each in (value.func, value.args, value.keywords))
        copied = functools.partial(function, *arguments, **options)
    else:
        copied = value
    return copied


def replicable(module: nn.Module) -> bool:
    """Return whether a replica computes what the module does.

    It does not where a function reaches the module on another way than by its ``self``: a hook whose closure holds the
    module, a forward that was replaced by one, a global name, a compiled or scripted module.
    """
    parts = {id(part) for part in module.modules()}
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule) or not hasattr(part, "__dict__"):
            return False
        own = [kind for kind in type(part).__mro__ if not kind.__module__.startswith(("torch.", "builtins"))]
        functions = [each for kind in own for each in vars(kind).values() if isinstance(each, types.FunctionType)]
        if any(_reaches(each, parts, DEPTH) for each in [*functions, *_not_replicated(vars(part).values(), parts)]):
            return False
    return True


def _not_replicated(values: Any, parts: set[int]) -> Iterator[Any]:
    """Yield the objects that replicas share, below the containers that they do not."""
    for value in values:
        kind = type(value)
        if kind in _PLAIN or id(value) in parts:
            continue
        if kind in (dict, OrderedDict):
            yield from _not_replicated(value.values(), parts)
        elif kind in (list, tuple, set):
            yield from _not_replicated(value, parts)
        elif kind is types.MethodType:
            yield from _not_replicated([value.__self__, value.__func__], parts)
        elif kind is functools.partial:
            yield from _not_replicated([value.func, *value.args, *value.keywords.values()], parts)
        else:
            yield value


def _reaches(value: Any, parts: set[int], depth: int) -> bool:
    """Whether an object refers to one of the modules, by at most so many references."""
    if id(value) in parts:
        return True
    if depth == 0 or type(value) in _PLAIN or isinstance(value, type | types.ModuleType):
        return False
    return any(_reaches(each, parts, depth - 1) for each in _references(value))


def _references(value: Any) -> list[Any]:
    if isinstance(value, types.FunctionType):
        cells = [part for cell in value.__closure__ or () for part in of_cell("", cell).read().values()]
        names = set(code_names(value.__code__))
        used = [value.__globals__[name] for name in names if name in value.__globals__]
        return [*cells, *used, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, dict | defaultdict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())
