"""What an experiment gives: lines in panels, and claims with their numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bilevel.core.options import check_fields, is_int, is_list, option


@dataclass(frozen=True)
class Claim:
    """A qualitative claim of a paper (`source`), and what was measured: a number in words, under conditions."""

    source: str
    claim: str
    number: str
    holds: bool
    conditions: str


@dataclass(frozen=True)
class Line:
    """One curve, x and y of shape (n,); lines of one label share colour and style.

    A band has a lower and an upper side. A bound is drawn thin and dotted, `marks` are points on a curve of few values,
    and of `bars` there are points alone, the band as a bar through each.
    """

    label: str
    x: Tensor
    y: Tensor
    band: tuple[Tensor, Tensor] | None = None
    bound: bool = False
    marks: bool = False
    bars: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes, scaled "linear", "log" or "symlog"; `ticks` name x = 0, 1, ..., where x counts groups."""

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    scales: tuple[str, str] = ("linear", "log")
    ylim: tuple[float, float] | None = None
    ticks: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Rows of numbers or words by column, which may be missing in a row; the name is the caption in claims.md.

    A table that is not shown there becomes a CSV file of its own, at full precision.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    shown: bool = True

    @property
    def columns(self) -> list[str]:
        """All columns, in the order of their first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))


@dataclass(frozen=True)
class Outcome:
    """What an experiment gives: rows of panels with their claims, notes, single figures by name, and tables."""

    title: str
    rows: Sequence[Sequence[Panel]]
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    panel_width: float = 3.7


@dataclass(frozen=True)
class Experiment(ABC):
    """A typed plan: options that can be run."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def run(self) -> Outcome:
        """Run it."""


def count(default: int) -> Any:
    """Return an option that is a positive int."""
    return option(default, "a positive int", is_int)


def some_of(known: Collection[str], *default: str) -> Any:
    """Return an option that lists some of the known names."""
    allowed = f"a list of some of {', '.join(map(repr, known))}"
    return option(default, allowed, lambda names: is_list(names) and all(name in known for name in names))


def sizes(*default: int) -> Any:
    """Return an option that lists numbers of columns of matrices with 200 rows."""
    fits = lambda sizes: is_list(sizes) and all(is_int(size) and size <= 200 for size in sizes)  # noqa: E731
    return option(default, "ints in 1..200", fits)


def seed_of_draws() -> Any:
    """Return an option that is the seed of some draws."""
    return option(0, "an int in 0..999999", lambda seed: is_int(seed, 0) and seed < 1_000_000)


def claim_table(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return claims as a Markdown table, the failing ones marked.

    >>> row = {"source": "S", "claim": "c", "number": "1", "holds": False, "conditions": "x"}
    >>> print(claim_table([row]).splitlines()[-1])
    | S | c | 1 | **does not hold** | x |
    """
    verdicts = {True: "holds", False: "**does not hold**"}
    rows = [{**claim, "measured": claim["number"], "verdict": verdicts[claim["holds"]]} for claim in claims]
    return markdown(["source", "claim", "measured", "verdict", "conditions"], rows)


def markdown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table; a cell that is missing is a dash.

    >>> print(markdown(["a", "b"], [{"a": 1}]).splitlines()[-1])
    | 1 | - |
    """
    lines = [_row(columns), "|" + "---|" * len(columns)]
    lines += [_row([row.get(column, "-") for column in columns]) for row in rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[Any]) -> str:
    # A bar would end the cell.
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
