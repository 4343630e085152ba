"""What a class declares, whether what it inherits still speaks of it, and names that were used before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from bilevel.core.status import warn


def with_old_names(cls: type[Any], attribute: str, value: Any, renamed: Mapping[str, str]) -> Any:
    """Return a declared value with what the body of a class says by old names, which are taken away from it.

    The class is at its making (``__init_subclass__``); `attribute` holds the value, a frozen dataclass, now, and
    `renamed` has its fields by their old names.
    """
    if not (old := [name for name in renamed if name in vars(cls)]):
        return value
    said = {renamed[name]: vars(cls)[name] for name in old}
    shown = f"{type(value).__name__}({', '.join(f'{name}={each!r}' for name, each in said.items())})"
    warn(f"{cls.__name__}.{old[0]} is now `{attribute} = {shown}`.", DeprecationWarning)
    for name in old:
        delattr(cls, name)
    return replace(value, **said)


def deprecated_options(old: Any, new: Any) -> None:
    """Warn that options of a dataclass, at its making, stand for an object of another class, with its own options."""
    given = [f"{each.name}={value!r}" for each in fields(new) if (value := getattr(new, each.name)) != each.default]
    what = f"{type(new).__name__}({', '.join(given)})"
    warn(f"{type(old).__name__} with these options is now {what}.", DeprecationWarning)


def given_after(cls: type[Any], names: Iterable[str], than: str) -> bool:
    """Return whether a class gives one of some attributes, itself or by a mix-in, later than it is given another.

    What it inherits under the name `than` then knows nothing of what it does under those names. False where `than` is
    given by the same class, or by one that is made of it.
    """

    def depth(name: str) -> int:
        return next((index for index, each in enumerate(cls.__mro__) if name in vars(each)), len(cls.__mro__))

    return min(map(depth, names)) < depth(than)
