"""Classes of a user's own in a config, ``class: my_module:MySolver``: only where the user has allowed it.

A config is data: whoever runs one from a stranger runs nothing but this package, unless ``--allow-import`` is given.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from bilevel.config.document import ConfigError
from bilevel.core.threads import set_within
from bilevel.core.tracebacks import told

# A switch of a whole file: every class inside a class would otherwise have to be handed it.
_allowed: ContextVar[bool] = ContextVar("allowed", default=False)
_found: ContextVar[dict[str, str] | None] = ContextVar("found", default=None)
"""The sources of the classes that were imported, by their names, as digests."""


@contextmanager
def importing(allowed: bool, folder: Path) -> Iterator[dict[str, str]]:
    """Say whether configs read inside may import code, looked for in the config's folder first.

    Yields:
        The digests of the sources of what was imported inside and of modules beside them, by the names of the files.
    """
    if allowed and str(folder.resolve()) not in sys.path:
        # It stays there: worker processes and checkpoints look the classes up again.
        sys.path.insert(0, str(folder.resolve()))
    digests: dict[str, str] = {}
    with set_within(_allowed, allowed), set_within(_found, digests):
        yield digests


def imported(name: str, base: type | tuple[type, ...], what: str, path: str) -> type:
    """Return the class that ``module:Class`` names at a path of the config: a subclass of `base`, in words `what`."""
    if not _allowed.get():
        wrong = f"`{path}` names code outside the package, {name!r}"
        raise ConfigError(f"{wrong}: pass --allow-import if you trust this config and what it imports.")
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        kind = type(error).__name__
        reason = told(error).rstrip(".").removeprefix(f"{kind}: ")
        raise ConfigError(f"`{path}`: {module_name!r} cannot be imported ({kind}: {reason}).") from error
    result = getattr(module, class_name, None)
    if not isinstance(result, type) or not issubclass(result, base):
        raise ConfigError(f"`{path}`: {module_name!r} has no class {class_name!r} that is {what}.")
    digests = _found.get()
    if digests is not None and isinstance(getattr(module, "__file__", None), str):
        _add_sources(Path(str(module.__file__)), len(module_name.split(".")), digests)
    return result


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _add_sources(file: Path, depth: int, digests: dict[str, str]) -> None:
    """Add the digest of a module's file, and of those beside it that it imports, however indirectly."""
    # ``package.module`` has a depth of two: what it imports lies one folder further up.
    root = file.parents[depth - 1] if file.name != "__init__.py" else file.parents[depth]
    left = [file]
    while left:
        source = left.pop()
        name = source.relative_to(root).as_posix() if source.is_relative_to(root) else source.name
        if name in digests or not source.is_file():
            continue
        digests[name] = digest(source)
        if source.suffix == ".py":
            left += [each for words in _imports(source, root) for each in _files(root, words)]


def _imports(source: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """Yield the names of modules that a source may import, as parts, relative to a folder."""
    try:
        nodes = list(ast.walk(ast.parse(source.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = source.parents[node.level - 1] if 0 < node.level <= len(source.parents) else root
            base = (*above.relative_to(root).parts,) if above.is_relative_to(root) else ()
            base = (*(base if node.level else ()), *((node.module or "").split(".") if node.module else ()))
            yield base
            yield from ((*base, alias.name) for alias in node.names)


def _files(root: Path, words: tuple[str, ...]) -> list[Path]:
    """Return the files that may stand for a module: it and the packages that it is in."""
    result = []
    for end in range(1, len(words) + 1):
        place = root.joinpath(*words[:end])
        result += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return result
