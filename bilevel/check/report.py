"""What a check says: one `Finding` for each thing that was looked at, and the table of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tabulate import tabulate

from bilevel.core.status import Status

Judgement: TypeAlias = Literal["ok", "note", "fault", "not applicable"]
WIDTH = 92
"""Characters of a sentence in one line of the table."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name.
        verdict: "ok", "note" (worth knowing), "fault" (hypergradients are or may be wrong), or "not applicable".
        sentence: what was found, with the remedy where one is needed.
        measured: the number behind it, where there is one.
        status: for a solve that failed, its status.
    """

    check: str
    verdict: Judgement
    sentence: str
    measured: float | None = None
    status: Status = Status.OK


@dataclass(frozen=True)
class ProblemReport:
    """The outcome of `check_problem`: its findings, in the order in which they were made; printing shows a table."""

    findings: Sequence[Finding] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether there is no fault; notes do not count."""
        return not self.faults

    @property
    def faults(self) -> list[Finding]:
        """The faults, in order."""
        return [finding for finding in self.findings if finding.verdict == "fault"]

    def __getitem__(self, check: str) -> Finding:
        """Return the finding of one check by its name."""
        return next(finding for finding in self.findings if finding.check == check)

    def __str__(self) -> str:
        rows = [
            (
                finding.check,
                finding.verdict.upper() if finding.verdict == "fault" else finding.verdict,
                "-" if finding.measured is None else f"{finding.measured:.2g}",
                textwrap.fill(finding.sentence, WIDTH, break_long_words=False),
            )
            for finding in self.findings
        ]
        table = tabulate(rows, headers=("check", "verdict", "measured", "what it means"), disable_numparse=True)
        faults, notes = self.faults, sum(finding.verdict == "note" for finding in self.findings)
        said = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}: {', '.join(each.check for each in faults)}"
        also = f", {notes} note{'s' if notes > 1 else ''}" if notes else ""
        return f"{table}\n\n{said if faults else 'no fault found'}{also}"
