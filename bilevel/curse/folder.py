"""Where outcomes are written: NAME.png, NAME.csv, NAME.TABLE.csv, NAME.json, one claims.md over all of a folder.

Every file is written in one piece, so that a run killed at any moment leaves whole files.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bilevel.core.files import read_json, write_whole
from bilevel.curse.figures import draw
from bilevel.curse.outcome import Line, Outcome, claim_table, markdown

SIDES = ("low", "high")
POINTS = 600
"""Of a longer curve about this many points are written, evenly in the logarithm of the iteration."""


def write_outcome(name: str, outcome: Outcome, folder: Path, plan: Mapping[str, Any]) -> list[Path]:
    """Write an outcome and the options of its experiment, bring claims.md up to date, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.csv", folder / f"{name}.json", folder / "claims.md"]
    write_whole(files[0], table(outcome))
    record = {
        "title": outcome.title,
        "plan": dict(plan),
        "claims": [asdict(claim) for claim in outcome.claims],
        "notes": list(outcome.notes),
        "numbers": dict(outcome.numbers),
        "tables": [
            {"name": shown.name, "columns": shown.columns, "rows": [dict(row) for row in shown.rows]}
            for shown in outcome.tables
            if shown.shown
        ],
    }
    for long in outcome.tables:
        if not long.shown:
            files.insert(1, folder / f"{name}.{long.name}.csv")
            write_whole(files[1], _csv(long.columns, long.rows))
    write_whole(files[-2], json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_whole(files[-1], claims(folder))
    picture = folder / f"{name}.png"
    return [picture, *files] if draw(outcome, picture) else files


def table(outcome: Outcome) -> str:
    """Return all curves as CSV, one line for each point."""
    rows = []
    for row, panels in enumerate(outcome.rows):
        for title, line in ((panel.title, line) for panel in panels for line in panel.lines):
            kind = "bound" if line.bound else "measured"
            named = {"row": row, "panel": title, "label": line.label, "kind": kind}
            band = {} if line.band is None else dict(zip(SIDES, line.band, strict=True))
            columns = {"x": line.x, "y": line.y, **band}
            for index in _kept(line):
                rows.append(named | {name: f"{float(values[index]):.10g}" for name, values in columns.items()})
    return _csv(("row", "panel", "label", "kind", "x", "y", *SIDES), rows)


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _kept(line: Line) -> list[int]:
    count = len(line.x)
    if count <= POINTS:
        return list(range(count))
    ratio = count ** (1.0 / POINTS)
    spread = {min(count - 1, round(ratio**i) - 1) for i in range(POINTS + 1)}
    return sorted(spread | {0, count - 1, int(line.y.nan_to_num().argmax())})


ENDINGS = ("png", "csv", "json", "draws.csv")
HEAD = "# Claims of both papers, measured"


def owned_names(folder: Path) -> list[str]:
    """Return the files of a folder without a mark that earlier versions of `bilevel curse` prove to have written."""
    try:
        if not (folder / "claims.md").read_text(encoding="utf-8").startswith(HEAD):
            return []
    except (OSError, UnicodeDecodeError):
        return []
    return names(file.stem for file in folder.glob("*.json") if _record(file) is not None)


def names(experiments: Iterable[str]) -> list[str]:
    """Return every file that some experiments write."""
    return ["environment.json", "claims.md", *(f"{name}.{end}" for name in experiments for end in ENDINGS)]


def _record(file: Path) -> dict[str, Any] | None:
    """Return the record of an outcome, None for a file that holds something else."""
    record = read_json(file)
    whole = isinstance(record, dict) and {"claims", "notes", "title"} <= set(record)
    return record if whole else None


def claims(folder: Path) -> str:
    """Return claims.md over every outcome that a folder holds."""
    parts = [f"{HEAD}\n"]
    for file in sorted(folder.glob("*.json")):
        if (record := _record(file)) is None:
            continue
        parts.append(f"## {file.stem}: {record['title']}\n")
        parts += [f"{note}\n" for note in record["notes"]]
        if record["claims"]:
            parts.append(claim_table(record["claims"]))
        for shown in record.get("tables", ()):
            parts += [f"{shown['name']}\n", markdown(shown["columns"], shown["rows"])]
    return "\n".join(parts)
