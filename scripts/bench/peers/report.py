"""Results as JSON, and the page that is made from them."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conduct import Limits, fits
from contest import MEMORY_FLOOR, Asked, Problem
from tabulate import tabulate

FORMAT = 1
ON_GRAM = "jax.lax.scan, Gram matrix"
"""The peer that has a column of its own."""


def load(path: Path) -> dict[str, Any]:
    """Return earlier results, or an empty frame."""
    if path.exists():
        results = json.loads(path.read_text())
        if results.get("format") == FORMAT:
            return results
    return {"format": FORMAT, "contests": {}}


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results; an interrupt leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def store(
    results: dict[str, Any],
    problem: Problem,
    rows: Sequence[Mapping[str, Any]],
    limits: Limits,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Put one contest into the results, in the place of an earlier one with as many threads, or of some of its rows."""
    name = f"{problem.key}, {limits.threads} thread{'s' * (limits.threads > 1)}"
    earlier = results["contests"].get(name)
    if limits.partial and earlier and earlier["size"] == limits.size and earlier["seed"] == limits.seed:
        again = {(row["task"], row["name"]): dict(row) | {"again": machine["date"]} for row in rows}
        stay = [again.pop((row["task"], row["name"]), row) for row in earlier["rows"]]
        rows, machine, versions = stay + list(again.values()), earlier["machine"], earlier["versions"]
    ran = {row["task"] for row in rows}
    results["contests"][name] = {
        "key": problem.key,
        "title": problem.title,
        "words": problem.words,
        "size": limits.size,
        "arguments": dict(problem.sizes[limits.size]),
        "seed": limits.seed,
        "machine": dict(machine),
        "versions": dict(versions),
        "tasks": {
            key: {"words": t.words, "unit": t.unit, "tolerance": t.tolerance}
            for key, t in problem.tasks.items()
            if key in ran
        },
        "rows": [dict(row) for row in rows],
        "asked": [judge(asked, rows) for asked in problem.asked],
        "absent": dict(problem.absent),
    }


def best(rows: Sequence[Mapping[str, Any]], task: str, names: Sequence[str], measure: str) -> Mapping[str, Any] | None:
    """Return the row with the smallest measure among those that are right and have one of the names."""
    of_task = [row for row in rows if row["task"] == task and row["status"] == "ok"]
    entrants = [row for row in of_task if fits(row["name"], names) and row.get(measure) is not None]
    return min(entrants, key=lambda row: row[measure], default=None)


def ratio(rival: Mapping[str, Any], ours: Mapping[str, Any], measure: str) -> float:
    """Return how many times more the rival takes: for times, the median over the rounds, in which neighbours meet."""
    if measure in ("memory", "live"):
        return max(rival[measure], MEMORY_FLOOR) / max(ours[measure], MEMORY_FLOOR)
    pairs = list(zip(rival.get(f"{measure}_all", ()), ours.get(f"{measure}_all", ()), strict=False))
    if len(pairs) < 3:
        return rival[measure] / ours[measure]
    return statistics.median(a / b for a, b in pairs)


def judge(asked: Asked, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was asked beside what was measured."""
    measure, _, other = asked.measure.partition(" of ")
    ours = best(rows, asked.task, asked.entries, measure)
    if other:
        rival = best(rows, other, [ours["name"]] if ours else [], measure)
    else:
        rival = best([row for row in rows if not row["ours"]], asked.task, asked.rivals, measure)
    line: dict[str, Any] = {
        "task": asked.task,
        "entry": ours["name"] if ours else asked.entries[0],
        "rival": rival["name"] if rival and not other else asked.words or (*asked.rivals, "")[0],
        "measure": measure,
        "at_least": asked.at_least,
        "at_most": asked.at_most,
        "aim": asked.aim,
        "measured": None,
        "verdict": "not measured",
    }
    if ours is None:
        return line | {"verdict": "our entry does not run or is wrong"}
    line |= {"error": ours["error"], "form": ours.get("form", ""), "first": ours["first_cpu"]}
    if rival is None and asked.rivals:
        return line | {"verdict": "no rival runs and is right"}
    if asked.at_most is not None:
        seconds = ours[measure] - (rival[measure] if rival else 0.0)
        return line | {"measured": seconds, "verdict": "reached" if seconds <= asked.at_most else "missed"}
    on_gram = best(rows, asked.task, [ON_GRAM], measure)
    return line | {
        "measured": ratio(rival, ours, measure),
        "on_gram": ratio(on_gram, ours, measure) if on_gram else None,
        "rival_error": rival["error"],
        "rival_first": rival["first_cpu"],
        "verdict": verdict(ratio(rival, ours, measure), asked.at_least, asked.aim),
    }


def verdict(measured: float, at_least: float | None, aim: float | None) -> str:
    """Return the judgement in words.

    >>> verdict(3.0, 4.0, None), verdict(5.0, 4.0, 10.0), verdict(0.5, None, None), verdict(0.5, 0.3, None)
    ('missed', 'reached', 'the peer wins', 'reached, the peer wins')
    """
    if measured < 1.0:
        asked = "" if at_least is None else "missed, " if measured < at_least else "reached, "
        return f"{asked}the peer wins"
    if at_least is not None and measured < at_least:
        return "missed"
    if aim is not None and measured >= aim:
        return "aim reached"
    return "reached" if at_least is not None else "ahead"


# The page -------------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Return a number with three significant digits.

    >>> number(1234.5), number(0.01234), number(None)
    ('1230', '0.0123', '')
    """
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):.{max(0, digits)}f}"


def error_text(value: float | None) -> str:
    """Return an error in the form 1e-09, "nan" where there is none."""
    return "nan" if value is None else f"{value:.0e}"


MEASURES = {
    "cpu": "CPU time",
    "wall": "wall time",
    "first_cpu": "CPU time of the first call",
    "memory": "memory",
    "live": "live tensors",
}


def asked_table(contests: Mapping[str, Any]) -> str:
    """Return asked and measured ratios of every contest."""
    lines = []
    for name, contest in contests.items():
        for line in contest["asked"]:
            both = "rival_error" in line
            errors = [error_text(line[key]) for key in ("error", "rival_error") if key in line]
            first = [number(line[key]) for key in ("first", "rival_first") if key in line]
            scale, at_most = (1.0 if both else 1e3), line.get("at_most")
            asked = number(line["at_least"]) if at_most is None else f"at most {number(1e3 * at_most)} ms"
            measured = None if line["measured"] is None else scale * line["measured"]
            lines.append([
                name.replace(", 1 thread", ""),
                contest["tasks"][line["task"]]["words"],
                line["entry"].removeprefix("bilevel "),
                line["rival"],
                MEASURES[line["measure"]],
                asked,
                number(line["aim"]),
                number(measured) + " ms" * (at_most is not None and measured is not None),
                number(line.get("on_gram")),
                line.get("form", ""),
                " / ".join(first),
                " / ".join(errors),
                line["verdict"],
            ])
    heads = ["", "task", "entry", "best rival", "ratio of", "at least", "aim", "measured", "jax on the Gram matrix"]
    heads += ["form", "first call, CPU s", "errors", ""]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def wins_of_peers(contests: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each task in which a peer that is right needs less time than all our entries."""
    sentences = []
    for name, contest in contests.items():
        for task, about in contest["tasks"].items():
            right = [row for row in contest["rows"] if row["task"] == task and row["status"] == "ok"]
            ours = min((r for r in right if r["ours"]), key=lambda r: r["cpu"], default=None)
            peers = (r for r in right if not r["ours"] and r["package"])
            peer = min(peers, key=lambda r: r["cpu"], default=None)
            if peer is None or (ours is not None and ours["cpu"] <= peer["cpu"]):
                continue
            behind = f"{number(ours['cpu'] / peer['cpu'])} times faster" if ours else "alone: no entry of ours is right"
            sentences.append(f"{name}, {about['words']}: {peer['name']} is {behind}.")
    return sentences


def contest_table(contest: Mapping[str, Any], task: str) -> str:
    """Return the table of one task, the fastest first."""
    rows = [row for row in contest["rows"] if row["task"] == task]
    ran = sorted((row for row in rows if row["status"] != "does not run"), key=lambda row: row["cpu"])
    lines = []
    for row in ran:
        remarks = [note for note in (row.get("form", ""), row["note"]) if note]
        if row["status"] == "wrong":
            remarks.insert(0, "**wrong**")
        if row["rounds"] == 1:
            remarks.append("one round")
        if row.get("live") is not None:
            remarks.append(f"live tensors {number(row['live'] / 2**20)} MB")
        if "again" in row:
            remarks.append(f"again {row['again']}")
        lines.append([
            f"**{row['name']}**" if row["ours"] else row["name"],
            number(1e3 * row["cpu"]),
            number(1e3 * row["wall"]),
            number(row["first_cpu"]),
            number(row["memory"] / 2**20) if row["memory"] >= MEMORY_FLOOR else "< 0.25",
            number(row["first_memory"] / 2**20) if row["first_memory"] >= MEMORY_FLOOR else "< 0.25",
            number(row["peak"] / 2**20),
            error_text(row["error"]),
            "; ".join(remarks),
        ])
    lines += [
        [row["name"], "", "", "", "", "", "", "", f"does not run: {row['reason'].replace('|', '/')}"]
        for row in rows
        if row["status"] == "does not run"
    ]
    heads = ["", "CPU ms", "wall ms", "first call, CPU s", "+MB", "first +MB", "peak MB", "error", ""]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


INTRODUCTION = """# Benchmarks

This page is for comparing this library with its peers, on the same problems in the same run: `make bench` writes it
from its JSON file. Each contestant lives in a process of its own; after a first call, calls go round in turn, and the
table shows the median of the rounds. All contestants have the same cores and threads and work in float64.

- **CPU ms**, **wall ms**: processor time over all threads, and elapsed time, of a warm call (divided by the number of
  results where a task says "each").
- **first call, CPU s**: processor time of the first call, with whatever compiles then; imports and conversion of the
  data are outside. **+MB**: resident memory that a warm call (**first +MB**: the first one) takes above the level
  before it. **peak MB**: of the whole process.
- **form**, and the first remark in a table: how this library says that it solved the inner problem
  (`certificate.form`): "doubled", "flat", "traced", "step by step", "closed form", ... **Live tensors**: the largest
  total size of torch's tensors in a warm call, where it is measured.
- **jax on the Gram matrix**: the same ratio against `jax.lax.scan` on the Gram matrix, as this library uses it,
  where it runs. An entry with a commit for a name is this library as it was then.
- **error**: relative, against a reference that shares no code with the library. A contestant beyond the tolerance of
  the task is *wrong* and beats nobody.
- Ratios: time (or memory) of the best rival that is right over ours, the median over rounds; above 1 we need less. With
  neighbours on the machine, differences below 20 % mean nothing. "At most" is a time, beside a rival what we need
  more than it.

`make bench ARGS="--only p1 --task unroll --who 'bilevel*' 'jax*'"` measures some rows again and keeps the others;
`make bench ARGS=--help` names the problems.
"""


def page(results: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """Return the page."""
    contests = results["contests"]
    quick = [name for name, contest in contests.items() if contest["size"] != "full"]
    warning = f"**Quick size**, for which nothing is asked: {'; '.join(quick)}.\n"
    heading = ["## Asked and measured\n", *([warning] if quick else [])]
    parts = [INTRODUCTION, *heading, asked_table(contests), ""]
    wins = wins_of_peers({n: c for n, c in contests.items() if not c["key"].startswith("growth")})
    if wins:
        parts += ["## Where a peer wins\n", *(f"- {sentence}" for sentence in wins), ""]
    for name, contest in contests.items():
        if contest["key"].startswith("growth"):
            continue
        m = contest["machine"]
        parts += [f"## {contest['title']}\n", contest["words"], ""]
        for task, about in contest["tasks"].items():
            each = f"; each {about['unit']}" if about["unit"] else ""
            parts += [f"**{about['words']}**{each} ({name}):\n", contest_table(contest, task), ""]
        parts += [f"Not here: {who}: {why}." for who, why in contest["absent"].items()]
        sizes = ", ".join(f"{name} {value}" for name, value in contest["arguments"].items())
        size = f"{contest['size']} size{f' ({sizes})' if sizes else ''}"
        when = f"{m['date']}, commit {m.get('commit') or 'unknown'}"
        parts += ["", f"{when}, {size}, seed {contest['seed']}, load before {m['load']}.", ""]
    if figures:
        parts += ["## How the cost grows\n", *figures, ""]
    parts += ["## Machine and versions\n", *machines(contests), ""]
    return "\n".join(parts)


def machines(contests: Mapping[str, Any]) -> list[str]:
    """Return one line for each machine, and one for each set of versions."""
    lines: dict[str, None] = {}
    for contest in contests.values():
        m = contest["machine"]
        lines[f"- {m['processor']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}."] = None
    for contest in contests.values():
        lines["- " + ", ".join(f"{name} {version}" for name, version in contest["versions"].items()) + "."] = None
    return list(lines)


def write(path: Path, page_path: Path, results: Mapping[str, Any]) -> None:
    """Write the JSON file, the page, and its figures beside it."""
    from growth_figures import draw

    save(path, results)
    figures = draw(results["contests"], page_path.parent / "figures")
    page_path.write_text(page(results, figures))
