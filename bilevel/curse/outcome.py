"""What an experiment gives: lines in panels, and claims with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Claim:
    """A qualitative claim of a paper, looked at.

    Attributes:
        source: paper and place.
        claim: what it says.
        number: what was measured, in words with the number.
        holds: whether it holds as said.
        conditions: under which conditions.
    """

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
        marks: points alone, for few values.
    """

    label: str
    x: Tensor
    y: Tensor
    band: tuple[Tensor, Tensor] | None = None
    bound: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        xlabel: below it.
        ylabel: beside it.
        lines: its curves.
        scales: of x and y, each "linear", "log" or "symlog".
        ylim: limits of y; from the data by default.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    scales: tuple[str, str] = ("linear", "log")
    ylim: tuple[float, float] | None = None


@dataclass(frozen=True)
class Outcome:
    """What an experiment gives.

    Attributes:
        title: of the figure.
        rows: rows of panels.
        claims: what the figure shows.
        notes: sentences such as which data set was skipped.
        numbers: single figures by name, for tests and tables.
    """

    title: str
    rows: Sequence[Sequence[Panel]]
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


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
    lines = ["| source | claim | measured | verdict | conditions |", "|---|---|---|---|---|"]
    for claim in claims:
        verdict = "holds" if claim["holds"] else "**does not hold**"
        cells = (claim["source"], claim["claim"], claim["number"], verdict, claim["conditions"])
        # A bar would end the cell.
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
