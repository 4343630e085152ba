"""What functions hold without being given it: tensors, arrays, generators, and the places of plain values.

The look is bounded: functions are followed through closures, defaults, partial arguments, methods and the globals that
their code names; objects and modules through their attributes; code of libraries is not followed.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEPTH = 8
"""How far functions, containers and modules are followed."""
MOST = 20_000
"""Objects that are looked at; more are left out."""
LIBRARIES = {"torch", "numpy", "scipy", "sklearn", "pandas", "bilevel", "builtins", *sys.stdlib_module_names} - {
    "__main__"
}
_INSTALLED = tuple(str(Path(sysconfig.get_path(name))) for name in ("purelib", "platlib"))
_WRAPPED = {"loss", "functional", "inner_loss", "outer_loss"}


@dataclass(frozen=True)
class Place:
    """A container of plain values that a loss can change, as a dict: a closure's cell, attributes, a dict, a list."""

    name: str
    read: Callable[[], dict[Any, Any]]
    write: Callable[[dict[Any, Any]], None]


@dataclass
class Found:
    """What functions refer to, by name; `places` are containers of other values, `names` those that their code uses."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    generators: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    seen: dict[int, Any] = field(default_factory=dict)
    """Everything that was looked at; held, so that no other object takes its id."""


def references(roots: Iterable[tuple[str, Any]]) -> Found:
    """Return what some objects, such as loss functions, refer to, each object once; roots are (name, object)."""
    result = Found()
    # Breadth first: what is near has the shorter name.
    queue = deque((name, value, 0) for name, value in roots)
    while queue and len(result.seen) < MOST:
        name, value, depth = queue.popleft()
        if id(value) in result.seen or isinstance(value, str | bytes | int | float | complex | None):
            continue
        result.seen[id(value)] = value
        kept = next((kind for kind, classes in _KEPT.items() if isinstance(value, classes)), None)
        if kept is not None:
            known = getattr(result, kept)
            known[name if name and name not in known else f"{name} ({len(known)})"] = value
        elif depth < DEPTH:
            queue.extend(
                (f"{name}{key}" if name else key.lstrip("."), part, depth + 1)
                for key, part in _parts(name, value, result)
            )
    return result


_KEPT: dict[str, Any] = {
    "tensors": Tensor,
    "arrays": np.ndarray,
    "generators": (torch.Generator, np.random.Generator, np.random.RandomState, random.Random),
}


def is_library(value: Any) -> bool:
    """Whether a function, class or module is of an installed library, of Python or of this package."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    if str(name).partition(".")[0] in LIBRARIES:
        return True
    file = getattr(getattr(value, "__code__", value), "co_filename", None) or getattr(value, "__file__", None)
    return str(file or "").startswith(_INSTALLED)


def _parts(name: str, value: Any, result: Found) -> Iterator[tuple[str, Any]]:
    """Yield (how its name goes on, part) of what an object refers to; places of plain values go to `result`."""
    if isinstance(value, FunctionType):
        yield from _of_function(name, value, result)
    elif isinstance(value, MethodType):
        yield from (("", value.__func__), (".self", value.__self__))
    elif isinstance(value, partial):
        yield "", value.func
        yield from ((f"[{index}]", each) for index, each in enumerate(value.args))
        yield from ((f".{key}", each) for key, each in value.keywords.items())
    elif isinstance(value, nn.Module):
        yield from _of_module(name, value, result)
    elif isinstance(value, ModuleType | BuiltinFunctionType):
        return
    elif isinstance(value, type):
        if not is_library(value):
            result.places.append(_of_class(name, value))
            yield from ((f".{key}", part) for key, part in vars(value).items() if not key.startswith("__"))
    elif isinstance(value, dict):
        result.places.append(of_dict(name, value))
        yield from ((f"[{key!r}]", part) for key, part in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        if isinstance(value, list | deque):
            result.places.append(_of_list(name, value))
        yield from ((f"[{index}]", part) for index, part in enumerate(list(value)[:MOST]))
    else:
        yield from _of_object(name, value, result)


def _of_function(name: str, function: FunctionType, result: Found) -> Iterator[tuple[str, Any]]:
    names = set(code_names(function.__code__))
    result.names |= names
    library = is_library(function)
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if not library:
            result.places.append(of_cell(variable, cell))
        for part in of_cell(variable, cell).read().values():
            yield "" if library else f".{variable}", part
    yield from ((f"[{index}]", each) for index, each in enumerate(function.__defaults__ or ()))
    yield from ((f".{key}", each) for key, each in (function.__kwdefaults__ or {}).items())
    if (wrapped := getattr(function, "__wrapped__", None)) is not None:
        yield "", wrapped
    if library:
        return
    result.places.append(of_dict(name, vars(function)))
    spaces = [("", function.__globals__)]
    # Of a module of the user's the loss may change an attribute.
    for key in sorted(names & function.__globals__.keys()):
        part = function.__globals__[key]
        if isinstance(part, ModuleType) and not is_library(part):
            spaces.append((f".{key}", vars(part)))
    for prefix, space in spaces:
        result.places.append(of_dict(prefix.lstrip("."), space, names))
        yield from ((f"{prefix}.{key}", space[key]) for key in sorted(names & space.keys()))


def code_names(code: CodeType) -> Iterator[str]:
    """Yield the names that code uses of what it is not given, that of functions inside included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_names(constant)


def _of_module(name: str, module: nn.Module, result: Found) -> Iterator[tuple[str, Any]]:
    result.modules[name] = module
    for key, part in (*module._parameters.items(), *module._buffers.items(), *module._modules.items()):
        yield f".{key}", part
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        yield from ((".hook", hook) for hook in hooks.values())
    if not is_library(type(module)):
        own = {key for key in vars(module) if key not in vars(_PLAIN)}
        result.places.append(of_dict(name, vars(module), own))
        yield from ((f".{key}", vars(module)[key]) for key in sorted(own))
        yield "", type(module).forward
        result.places.append(_of_class(name, type(module)))


_PLAIN = nn.Module()


def _of_object(name: str, value: Any, result: Found) -> Iterator[tuple[str, Any]]:
    library = is_library(type(value))
    if library and not type(value).__module__.startswith("bilevel"):
        if (wrapped := getattr(value, "__wrapped__", None)) is not None:
            yield "", wrapped
        return
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        if not library:
            result.places.append(of_dict(name, attributes))
        # Parts of this package stand for what they were given.
        prefixes = {key: "" if library and key in _WRAPPED else f".{key.lstrip('_')}" for key in attributes}
        yield from ((prefixes[key], part) for key, part in list(attributes.items()))
    if not library:
        yield "", type(value)
        yield "", vars(type(value)).get("__call__")


def of_cell(name: str, cell: CellType) -> Place:
    """Return a variable of a closure as a place; it may have no value yet."""

    def read() -> dict[Any, Any]:
        try:
            return {name: cell.cell_contents}
        except ValueError:
            return {}

    def write(entries: dict[Any, Any]) -> None:
        for value in entries.values():
            cell.cell_contents = value

    return Place("", read, write)


def of_dict(name: str, values: dict[Any, Any], names: Iterable[str] | None = None) -> Place:
    """Return a dict, or some keys of it, as a place of plain values."""
    keys = None if names is None else list(names)

    def read() -> dict[Any, Any]:
        return dict(values) if keys is None else {key: values[key] for key in keys if key in values}

    def write(entries: dict[Any, Any]) -> None:
        for key in read():
            if key not in entries:
                del values[key]
        values.update(entries)

    return Place(name, read, write)


def _of_list(name: str, values: list[Any] | deque[Any]) -> Place:
    def write(entries: dict[Any, Any]) -> None:
        values.clear()
        values.extend(entries.values())

    return Place(name, lambda: dict(enumerate(values)), write)


def _of_class(name: str, cls: type) -> Place:
    def read() -> dict[Any, Any]:
        plain = {key: value for key, value in vars(cls).items() if not key.startswith("__")}
        return {key: value for key, value in plain.items() if not callable(value) and not hasattr(value, "__get__")}

    def write(entries: dict[Any, Any]) -> None:
        for key, value in entries.items():
            setattr(cls, key, value)

    return Place(name, read, write)
