"""A config file as plain containers: reading YAML, overriding parts of it, and the sentence that all errors share."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bilevel.core.files import DEEP, MOST_LEVELS, GuardedLoader
from bilevel.core.options import first_line, suggest
from bilevel.data.table import SVMLIGHT, TABLES, ending


class ConfigError(ValueError):
    """A config that cannot be used: one sentence with the file, the path in it, what is allowed and what was given."""


MOST_BYTES, MOST_NODES, MOST_OF_A_KEY = 100_000, 50_000, 100
"""No config is longer, holds more values (each as often as aliases name it) or has longer keys."""
KINDS = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}
PLAIN = ("map", "seq", "str", "int", "float", "bool", "null", "merge")


class _Loader(GuardedLoader):
    """The safe loader, with ``1e-6`` as a number, for plain values alone and without silently overwritten keys."""

    def get_single_node(self) -> Any:
        """Return the document, whose size is known before anything is made of it."""
        if (node := super().get_single_node()) is not None:
            _check_size(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping whose keys are unique strings."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or not key.isprintable() or len(key) > MOST_OF_A_KEY:
                wanted = f"no string of at most {MOST_OF_A_KEY} printable characters"
                raise _refused(f"the key {shown(key)} is {wanted}", key_node)
            if key in seen:
                raise _refused(f"the key {shown(key)} stands twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return what a node stands for, if that is a plain value."""
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
            kind = node.tag.rpartition(":")[2]
            raise _refused(f"the value {shown(node.value)} cannot be read as {kind}", node) from None
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _refused("a whole number has more than 64 bits", node)
        if isinstance(value, float) and not math.isfinite(value):
            raise _refused(f"the value {shown(node.value)} is not finite", node)
        if isinstance(value, str) and not _is_text(value):
            raise _refused(f"the text {shown(value)} holds what is no character", node)
        return value


def _check_size(node: yaml.Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values a node stands for, aliases followed, and its levels; refuse what is too large."""
    if id(node) in sizes:
        return sizes[id(node)]
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if not isinstance(node, KINDS.get(kind, yaml.ScalarNode)) or kind not in PLAIN:
        raise _refused(f"{shown(node.tag)} is no tag of a plain value", node)
    sizes[id(node)] = (MOST_NODES, 0)  # Until it is known: a node inside itself is too large.
    children = node.value if isinstance(node.value, list) else []
    flat = [each for child in children for each in (child if isinstance(child, tuple) else (child,))]
    parts = [_check_size(each, sizes) for each in flat]
    size, levels = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
    if levels > MOST_LEVELS:
        raise _refused(DEEP, node)
    if size > MOST_NODES:
        raise _refused(f"there are more than {MOST_NODES:,} values, those that aliases repeat included", node)
    sizes[id(node)] = (size, levels)
    return size, levels


def _is_text(value: str) -> bool:
    """Whether a string can be written to a file and holds no control characters but white space."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return all(ord(each) >= 32 or each in "\t\n\r" for each in value)


def _refused(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


# YAML 1.1 takes 1e-6 for a string, because it has no decimal point; YAML 1.2 and everybody else take it for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


# A date is a word here, as no option takes one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Return the plain containers that a YAML text stands for; refuse a large one, and anything but plain values."""
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"it is longer than {MOST_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError(DEEP) from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML's scanner lets some of Python's own exceptions through.
        raise yaml.YAMLError(str(error)) from None


def _text_of(path: Path) -> str:
    """Return the text of a file, and no more of a longer one than shows that it is too long."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise yaml.YAMLError(f"it is longer than {MOST_BYTES:,} bytes")
    return content.decode("utf-8-sig")


@contextmanager
def inside(where: str) -> Iterator[None]:
    """Let an error about a config begin with where it is; the cause, the user's own code, is raised by --debug."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error.__cause__


def read_document(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, overridden in parts; refuse one that cannot be read or is something else."""
    if ending(path.name) in (*TABLES, *SVMLIGHT, ".npz"):
        what = f"{path} holds data, and the command takes a config that names them"
        example = f"problems: {{NAME: {{data: {{name: {path.name}, target: COLUMN}}}}}}"
        raise ConfigError(f"{what}: write a .yaml file with the line `{example}`; see docs/data.md.")
    try:
        document = parse_yaml(_text_of(path))
    except FileNotFoundError:
        near = sorted(str(file) for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"{path}: there is no such file{suggest(str(path), near)}") from None
    except (OSError, ValueError) as error:
        undecoded = isinstance(error, UnicodeDecodeError)
        reason = "it is not text in UTF-8" if undecoded else first_line(error).rstrip(".")
        reason = (error.strerror or reason) if isinstance(error, OSError) else reason
        raise ConfigError(f"{path}: the file cannot be read: {reason}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML{_yaml_reason(error)}.") from None
    if document is None:
        raise ConfigError(f"{path}: the file is empty: the folder configs/ has examples.")
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: the file must hold a mapping (`key: value` lines), got {shown(document)}.")
    with inside(f"{path}: "):
        for assignment in overrides:
            override(document, assignment)
    return document


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f", line {mark.line + 1}"
    problem = " ".join((getattr(error, "problem", None) or str(error) or "it cannot be read").split())
    return f"{where}: {problem if len(problem) <= 170 else f'{problem[:167]}...'}".rstrip(".")


def override(document: dict[str, Any], assignment: str) -> None:
    """Change a document in place by "a.b=value": the value is YAML, numbers index lists, keys may hold spaces."""
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set must look like `a.b=value`, got {shown(assignment)}.")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: the value {shown(text)} is not valid YAML{_yaml_reason(error)}.") from None
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
        what = f"--set {path}: `{parent}` is {shown(place)}, which has no parts"
        raise ConfigError(f"{what}: give the whole value, such as --set '{parent}={{name: value}}'.")
    if key in place or missing_ok:
        return key
    owner = f"`{parent}`" if parent else "the config"
    raise ConfigError(f"--set {path}: {owner} has no key {key!r} ({listed(place)}){suggest(key, place)}")


def shortened(sentence: str) -> str:
    """Return a sentence of at most 290 characters: its longest list in parentheses is cut, then its end.

    >>> long = shortened(f"`x` must be one of those ({'name, ' * 100}name), got 3.")
    >>> len(long) <= 290, long[-13:]
    (True, ' ...), got 3.')
    """
    lists = sorted(re.findall(r"\([^()]+\)", sentence), key=len)
    over = len(sentence) - MOST_OF_A_SENTENCE
    if over > 0 and lists and len(lists[-1]) > over + 40:
        sentence = sentence.replace(lists[-1], f"{lists[-1][: -over - 6]} ...)")
    return sentence if len(sentence) <= MOST_OF_A_SENTENCE else f"{sentence[: MOST_OF_A_SENTENCE - 4]} ..."


MOST_OF_A_SENTENCE = 290


def listed(names: Iterable[Any]) -> str:
    """Return names separated by commas."""
    return ", ".join(str(name) for name in names)


def shown(value: Any) -> str:
    """Return a value as YAML would write it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
