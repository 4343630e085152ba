"""Configs with a mistake in them: each is run, or answered by one sentence; none gives a traceback."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .runs import Child

JUNK: Sequence[Any] = (
    *(None, True, 0, -1, 3, 1e300, -0.5, float("nan"), float("inf"), 10**30, "", "x", "1e-3", "ünïcode \u2028"),
    *([], {}, [1], ["a", None], {"class": "CG"}, {"class": "Missing"}, {"class": None}, {"": 1}, [[]], {"a": {"b": 1}}),
    *("../../etc/passwd", "os.system", "Adam", "Implicit", "RidgeProblem", "digits", "nan", "~", "!!python/object"),
)
"""Values in the place of a right one."""

LETTERS = "abz019:{}[]-#&*!|>'\"%@` \t\n\x00\u00e9"


def mutated_configs(
    count: int, seed: int, configs: Sequence[Path], folder: Path, seconds: float = 1.0
) -> Iterator[tuple[str, bool, str]]:
    """Run commands on configs with random mistakes.

    Args:
        count: how many.
        seed: of the mistakes.
        configs: right ones, which the mistakes are made in.
        folder: an empty folder to work in.
        seconds: after which a config that is right after all is killed.

    Yields:
        For each: its name, whether it ran or was refused by one sentence, and else what was printed.
    """
    rng = random.Random(seed)
    texts = [(path, path.read_text()) for path in configs]
    for index in range(count):
        path, text = rng.choice(texts)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            text = rng.choice(MUTATIONS)(text, rng)
        mutant = folder / f"{index}.yaml"
        # Not every mutant is text.
        mutant.write_bytes(text.encode("utf-8", errors="surrogateescape"))
        command = "curse" if path.parent.name == "curse" else rng.choice(("compare", "tune"))
        reason = _met([command, str(mutant), "--out", str(folder / f"out{index}")], seconds)
        yield f"{command} {path.name}, mutant {index}", not reason, reason


def _met(line: list[str], seconds: float) -> str:
    """Run a command; return what is wrong with the way in which it ended, or an empty string."""
    with Child(line) as child:
        outcome = child.within(seconds)
    if outcome is None:
        return ""
    errors = [each for each in outcome.said.splitlines() if each.startswith("bilevel: ")]
    if "Traceback" in outcome.said or outcome.code not in (0, 1, 2):
        return f"exit code {outcome.code}: {outcome.said}"
    if outcome.code == 2 and (len(errors) != 1 or not errors[0].rstrip().endswith((".", "?"))):
        return f"not one sentence: {outcome.said!r}"
    return ""


# Mistakes in the document -----------------------------------------------------------------------------------------


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a document."""
    if path:
        yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from _places(value, (*path, key))


def _in_document(change: Callable[[Any, Any, random.Random], None]) -> Callable[[str, random.Random], str]:
    """Return the mutation of a text that makes a change at a random place of its document."""

    def mutate(text: str, rng: random.Random) -> str:
        try:
            document = copy.deepcopy(yaml.safe_load(text))
            *path, key = rng.choice(list(_places(document)))
        # What an earlier mistake has broken is broken further as text.
        except (yaml.YAMLError, IndexError, ValueError):
            return _delete_letters(text, rng)
        inside = document
        for step in path:
            inside = inside[step]
        change(inside, key, rng)
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)

    return mutate


def _replace(inside: Any, key: Any, rng: random.Random) -> None:
    inside[key] = copy.deepcopy(rng.choice(JUNK))


def _delete(inside: Any, key: Any, rng: random.Random) -> None:
    del inside[key]


def _misspell(inside: Any, key: Any, rng: random.Random) -> None:
    if isinstance(inside, dict) and isinstance(key, str) and key:
        cut = rng.randrange(len(key))
        inside[key[:cut] + rng.choice(LETTERS[:6]) + key[cut + 1 :]] = inside.pop(key)
    else:
        _replace(inside, key, rng)


def _add(inside: Any, key: Any, rng: random.Random) -> None:
    if isinstance(inside, dict):
        inside[rng.choice(("class", "steps", "tol", "x", "seed", 1, None, True))] = copy.deepcopy(rng.choice(JUNK))
    else:
        inside.append(copy.deepcopy(rng.choice(JUNK)))


def _wrap(inside: Any, key: Any, rng: random.Random) -> None:
    inside[key] = rng.choice(([inside[key]], {"class": inside[key]}, str(inside[key]), {str(key): inside[key]}))


def _scale(inside: Any, key: Any, rng: random.Random) -> None:
    value = inside[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        inside[key] = value * rng.choice((-1, 0, 0.5, 1e9, 1e-9))
    else:
        _replace(inside, key, rng)


# Mistakes in the text ---------------------------------------------------------------------------------------------


def _delete_letters(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text) + 1)
    return text[:start] + text[start + rng.choice((1, 1, 3, 40)) :]


def _insert_letter(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text) + 1)
    return text[:start] + rng.choice(LETTERS) + text[start:]


def _truncate(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _repeat_line(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return "".join(lines)


def _indent_line(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    index = rng.randrange(len(lines))
    lines[index] = rng.choice((" ", "  ", "\t", "- ")) + lines[index]
    return "".join(lines)


def _no_text(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text) + 1)
    return text[:start] + "\udcff\udcfe" + text[start:]


MUTATIONS = (
    *(_in_document(change) for change in (_replace, _replace, _delete, _misspell, _add, _wrap, _scale)),
    *(_delete_letters, _insert_letter, _truncate, _repeat_line, _indent_line, _no_text),
)
