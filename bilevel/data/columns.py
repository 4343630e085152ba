"""How the columns of a table become features: categories one-hot, missing values filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from bilevel.core.options import check_sizes
from bilevel.data.table import Array, Table, is_number

SHOWN = 4


@dataclass(frozen=True)
class Rule:
    """How a column becomes features: `categories` are sorted words, a feature each, and None for a column of numbers.

    The median, or the most frequent word, stands for a missing value (`fill`).
    """

    name: str
    fill: float | str
    categories: tuple[str, ...] | None = None

    @property
    def features(self) -> list[str]:
        """Names of the features."""
        return [self.name] if self.categories is None else [f"{self.name}={word}" for word in self.categories]


@dataclass(frozen=True)
class Encoder:
    """The rules of the columns that become features, in their order, learnt from training rows."""

    rules: tuple[Rule, ...]

    @classmethod
    def fit(cls, table: Table, names: Sequence[str], rows: Array) -> Self:
        """Return the encoder of some columns, with fill values and categories of the training rows alone.

        >>> table = Table("demo", {"size": np.array([1.0, np.nan, 3.0]), "colour": np.array(["red", "", "red"])})
        >>> encoder = Encoder.fit(table, ["size", "colour"], np.arange(3))
        >>> encoder.features, encoder.transform(table)[0].tolist()
        (('size', 'colour=red'), [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
        """
        rules = []
        for name in names:
            if (numbers := table.numbers(name)) is not None:
                there = numbers[rows][~np.isnan(numbers[rows])]
                rules.append(Rule(name, float(np.median(there)) if len(there) else 0.0))
                continue
            words = table.words(name)[rows]
            categories, counts = np.unique(words[words != ""], return_counts=True)
            fill = str(categories[counts.argmax()]) if len(categories) else ""
            rules.append(Rule(name, fill, tuple(map(str, categories))))
        return cls(tuple(rules))

    @classmethod
    def of_numbers(cls, names: Sequence[str]) -> Self:
        """Return the rules of columns that are features as they are."""
        return cls(tuple(Rule(name, 0.0) for name in names))

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(name for rule in self.rules for name in rule.features)

    @property
    def owners(self) -> tuple[str, ...]:
        """For every feature the column that it is of."""
        return tuple(rule.name for rule in self.rules for _ in rule.features)

    def transform(self, table: Table) -> tuple[Array, list[str]]:
        """Return features of shape (rows, features), and in words what was done to values not seen in training."""
        if missing := [rule.name for rule in self.rules if rule.name not in table.columns]:
            raise ValueError(
                f"{table.source!r} lacks {columns_named(missing)} that the model was made with: add "
                f"{'it' if len(missing) == 1 else 'them'} (empty cells are filled as in training)."
            )
        blocks, notes = [np.empty((table.rows, 0))], []
        for rule in self.rules:
            block, note = _numbers(table, rule) if rule.categories is None else _one_hot(table, rule)
            blocks.append(block)
            notes += [note] if note else []
        return np.concatenate(blocks, axis=1), notes

    def to_list(self) -> list[dict[str, Any]]:
        """Return plain values that `from_list` takes."""
        return [asdict(rule) for rule in self.rules]

    @classmethod
    def from_list(cls, given: Iterable[Mapping[str, Any]]) -> Self:
        """Return the encoder that `to_list` has described."""
        rules = (Rule(**rule) for rule in given)
        return cls(tuple(r if r.categories is None else replace(r, categories=tuple(r.categories)) for r in rules))


def _numbers(table: Table, rule: Rule) -> tuple[Array, str]:
    if (column := table.numbers(rule.name)) is None:
        row, word = first_word(table, rule.name)
        made = f"holds {word!r} in row {row}, but numbers where the model was made"
        raise table.error(rule.name, f"{made}: correct it, or leave the cell empty")
    if np.isinf(column).any():
        raise table.error(rule.name, f"is infinite in row {int(np.isinf(column).argmax()) + 1}: correct it")
    # New rows of small numbers alone may be of a column that has larger ones.
    check_sizes(np.fmax(np.abs(column), 1.0), repr(table.source), [rule.name])
    return np.where(np.isnan(column), rule.fill, column)[:, None], ""


def _one_hot(table: Table, rule: Rule) -> tuple[Array, str]:
    words, categories = table.words(rule.name), np.array(rule.categories or ("",), dtype=str)
    words = np.where(words == "", rule.fill, words)
    if not rule.categories:
        return np.empty((len(words), 0)), ""
    block = (words[:, None] == categories).astype(np.float64)
    unseen = np.unique(words[block.sum(1) == 0])
    if not len(unseen):
        return block, ""
    return block, f"{rule.name!r} holds {listed(unseen)}, which training has not seen: zeros for all its categories"


def first_word(table: Table, name: str) -> tuple[int, str]:
    """Return the row and the text of the first cell that is no number, and if there is one, no True or False either."""
    cells = [(row, str(cell)) for row, cell in enumerate(table.words(name), 1) if not is_number(cell)]
    odd = [(row, cell) for row, cell in cells if cell.lower() not in ("true", "false")]
    return (odd or cells or [(1, str(table.words(name)[0]))])[0]


def columns_named(names: Sequence[str]) -> str:
    """Return some columns as the subject or object of a sentence.

    >>> columns_named(["size", "colour"])
    "the columns 'size', 'colour'"
    """
    return f"the column{'s' if len(names) > 1 else ''} {listed(names)}"


def listed(names: Iterable[Any]) -> str:
    """Return names in quotes, the first few of many."""
    names = [repr(str(name)) if name else "without a name" for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
