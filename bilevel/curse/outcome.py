"""What an experiment gives: lines in panels, and claims with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


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
    """One curve.

    Attributes:
        label: in the legend; lines of one label share colour and style.
        x: values of shape (n,).
        y: values of shape (n,).
        band: lower and upper values of shape (n,), drawn as a band.
        bound: a bound, drawn thin and dotted in the colour of its label.
        marks: with points, for few values.
        bars: points alone, the band as a bar through each.
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
    """Rows of numbers or words by column.

    Attributes:
        name: what it is called; a table that is shown has it as its caption.
        rows: mappings from column to value; a column may be missing in a row.
        shown: stands in claims.md; otherwise it becomes a CSV file of its own, at full precision.
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
    """What an experiment gives.

    Attributes:
        title: of the figure.
        rows: rows of panels.
        claims: what the figure shows.
        notes: sentences such as which data set was skipped.
        numbers: single figures by name, for tests and tables.
        tables: what is better read than drawn.
        panel_width: inches.
    """

    title: str
    rows: Sequence[Sequence[Panel]]
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    panel_width: float = 3.7


class Experiment(Protocol):
    """A typed plan: a frozen dataclass of options that can be run."""

    def run(self) -> Outcome:
        """Run it."""


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
