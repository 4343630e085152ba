"""Classes of a user's own in a config, ``class: my_module:MySolver``: only where the user has allowed it.

A config is data: whoever runs one from a stranger runs nothing but this package, unless ``--allow-import`` is given.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from bilevel.config.document import ConfigError

# A switch of a whole file: every class inside a class would otherwise have to be handed it.
_allowed: ContextVar[bool] = ContextVar("allowed", default=False)


@contextmanager
def importing(allowed: bool, folder: Path) -> Iterator[None]:
    """Say whether configs read inside may import code.

    Args:
        allowed: whether they may.
        folder: where modules are looked for first: that of the config.
    """
    token = _allowed.set(allowed)
    if allowed and str(folder.resolve()) not in sys.path:
        # It stays there: worker processes and checkpoints look the classes up again.
        sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        _allowed.reset(token)


def imported(name: str, base: type, what: str, path: str) -> type:
    """Return the class that ``module:Class`` names.

    Args:
        name: as the config gives it.
        base: what it has to be a subclass of.
        what: that in words, with its article.
        path: of the name in the config.

    Raises:
        ConfigError: where imports are not allowed, the module cannot be imported, or it has no such class.
    """
    if not _allowed.get():
        raise ConfigError(
            f"`{path}` names code outside the package, {name!r}: pass --allow-import if you trust this config and what "
            "it imports."
        )
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(f"`{path}`: {module_name!r} cannot be imported ({type(error).__name__}: {error}).") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, base):
        raise ConfigError(f"`{path}`: {module_name!r} has no class {class_name!r} that is {what}.")
    return found
