"""`suggest`: what a misspelt word may have meant; loads nothing, so that refusing a command takes no time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

SYNONYMS = {"gpu": "cuda"}
"""Words of other libraries for what is meant here."""


def suggest(word: str, allowed: Iterable[Any]) -> str:
    """Return the end of a sentence: a question where a word is close to an allowed one, else a full stop.

    >>> suggest("stesp", ["steps", "tol"]), suggest("Adma", ["Adamax", "Adam"])
    (': did you mean `steps`?', ': did you mean `Adam`?')
    """
    names = [str(each) for each in allowed]
    close = difflib.get_close_matches(word, names, n=5, cutoff=0.6)
    close += [name for name in names if name == SYNONYMS.get(word) or sorted(name) == sorted(word)]
    best = min(close, key=lambda name: 0 if name == SYNONYMS.get(word) else edits(word, name), default=None)
    return "." if best is None else f": did you mean `{best}`?"


def edits(one: str, two: str) -> int:
    """Return how many letters are put in, left out, replaced or exchanged with the next one between two words.

    >>> edits("Adma", "Adam"), edits("Adma", "Adamax")
    (1, 2)
    """
    before: list[int] = []
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        last, before, row = before, row, [i]
        for j, b in enumerate(two, 1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            exchanged = i > 1 and j > 1 and a == two[j - 2] and b == one[i - 2]
            row.append(min(least, last[j - 2] + 1) if exchanged else least)
    return row[-1]
