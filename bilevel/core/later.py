"""Fields of results that are made when they are first read: what nobody reads costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

Kind = TypeVar("Kind")


class _Later:
    """A field whose value may be a function, which is called when the field is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        value = vars(instance)[self._name]
        if callable(value):
            vars(instance)[self._name] = value = value()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = value


def made_later(*names: str) -> Callable[[type[Kind]], type[Kind]]:
    """Return a decorator: fields of the dataclass may be functions of nothing; copies and pickles hold the values.

    >>> from dataclasses import dataclass
    >>> @made_later("size")
    ... @dataclass(frozen=True)
    ... class Result:
    ...     size: Any
    >>> Result(lambda: 3), Result(4)
    (Result(size=3), Result(size=4))
    """

    def decorated(cls: type[Kind]) -> type[Kind]:
        for name in names:
            setattr(cls, name, _Later(name))
        cls.__getstate__ = _values  # type: ignore[method-assign]
        return cls

    return decorated


def _values(self: Any) -> dict[str, Any]:
    return {each.name: getattr(self, each.name) for each in fields(self)}
