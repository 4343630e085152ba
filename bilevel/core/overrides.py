"""Whether what a class inherits still speaks of what it does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def given_after(cls: type[Any], names: Iterable[str], than: str) -> bool:
    """Return whether a class gives one of some attributes, itself or by a mix-in, later than it is given another.

    What it inherits under the name `than` then knows nothing of what it does under those names.

    Args:
        cls: the class.
        names: attributes that `than` speaks of.
        than: an attribute that is inherited, or given with them.

    Returns:
        False where `than` is given by the same class, or by one that is made of it.
    """

    def depth(name: str) -> int:
        return next((index for index, each in enumerate(cls.__mro__) if name in vars(each)), len(cls.__mro__))

    return min(map(depth, names)) < depth(than)
