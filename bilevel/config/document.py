"""A config file as plain containers: reading YAML, overriding parts of it, and the sentence that all errors share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A config that cannot be used: one sentence with the file, the path in it, what is allowed and what was given."""


class _Loader(yaml.SafeLoader):
    """The safe loader, with ``1e-6`` as a number and without silently overwritten keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping whose keys are unique."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-6 for a string, because it has no decimal point; YAML 1.2 and everybody else take it for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Return the plain containers that a YAML text stands for."""
    return yaml.load(text, Loader=_Loader)


def read_document(path: Path) -> dict[str, Any]:
    """Return the mapping in a file.

    Args:
        path: of a YAML file.

    Raises:
        ConfigError: for a file that cannot be read, is not YAML, or holds no mapping.
    """
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(str(file) for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"{path}: there is no such file{suggest(str(path), near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"{path}: the file cannot be read: {reason}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML{_yaml_reason(error)}.") from None
    if document is None:
        raise ConfigError(f"{path}: the file is empty: the folder configs/ has examples.")
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: the file must hold a mapping (`key: value` lines), got {shown(document)}.")
    return document


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f", line {mark.line + 1}"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{where}: {problem}"


def override(document: dict[str, Any], assignment: str) -> None:
    """Change one value of a document in place.

    Args:
        document: the config.
        assignment: "a.b=value"; the value is YAML, numbers index lists, keys may hold spaces.

    Raises:
        ConfigError: for a text of another form, or a path whose inner parts do not exist.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set must look like `a.b=value`, got {assignment!r}.")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: the value {text!r} is not valid YAML{_yaml_reason(error)}.") from None
    place: Any = document
    for depth in range(1, len(keys)):
        place = place[_index(place, keys[:depth], missing_ok=False)]
    place[_index(place, keys, missing_ok=True)] = value


def _index(place: Any, keys: Sequence[str], *, missing_ok: bool) -> Any:
    """Return the key or index that the last of `keys` stands for in a container."""
    key, parent, path = keys[-1], ".".join(keys[:-1]), ".".join(keys)
    if isinstance(place, list):
        if re.fullmatch(r"\d+", key) and int(key) < len(place):
            return int(key)
        raise ConfigError(f"--set {path}: `{parent}` is a list with the indices 0 to {len(place) - 1}, got {key!r}.")
    if not isinstance(place, dict):
        raise ConfigError(
            f"--set {path}: `{parent}` is {shown(place)}, which has no parts: give the whole value, "
            f"such as --set '{parent}={{name: value}}'."
        )
    if key in place or missing_ok:
        return key
    owner = f"`{parent}`" if parent else "the config"
    raise ConfigError(f"--set {path}: {owner} has no key {key!r} ({listed(place)}){suggest(key, place)}")


def suggest(word: str, allowed: Iterable[Any]) -> str:
    """Return the end of a sentence: a question where a word is close to an allowed one, else a full stop.

    >>> suggest("stesp", ["steps", "tol"])
    ': did you mean `steps`?'
    """
    close = difflib.get_close_matches(word, [str(each) for each in allowed], n=1, cutoff=0.6)
    return f": did you mean `{close[0]}`?" if close else "."


def listed(names: Iterable[Any]) -> str:
    """Return names separated by commas."""
    return ", ".join(str(name) for name in names)


def shown(value: Any) -> str:
    """Return a value as YAML would write it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
