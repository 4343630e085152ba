"""The summary of a comparison: medians over seeds, and the tables that are printed.

Names that begin with "seconds" or "memory" hold measurements of the machine; all others are the same in every
repetition.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

from tabulate import tabulate

from bilevel.compare.cells import CellRun, Row, best_row, end_row
from bilevel.compare.plan import Plan

JUDGING = ("val_", "test_", "corrupted_")
"""How the names of the figures of merit begin that the summary keeps; those of the training rows judge nothing."""
SCORES = ("test_accuracy", "test_r2", "test_loss", "val_accuracy", "val_r2", "val_loss")
"""How the figure of merit begins that the tables show: the first that a problem has."""
BIASED = 0.1
"""From this relative error on the status of a run says that its hypergradient is off."""
NOTHING = 1e-6
"""Errors this small beside the run's largest hypergradient are those of a run that has converged."""
FURTHER = ("corrupted_in_lower_half",)
"""Figures that the tables show besides where a problem has them."""


def summarize(plan: Plan, runs: Sequence[CellRun]) -> dict[str, Any]:
    """Return medians over the seeds for every problem and estimator; failed runs count as failures and nothing else."""
    return {
        "name": plan.name,
        "seeds": list(plan.seeds),
        "budget": plan.budget,
        "problems": {
            problem: {
                estimator: _group([r for r in runs if (r.cell.problem, r.cell.estimator) == (problem, estimator)])
                for estimator in plan.estimators
            }
            for problem in plan.problems
        },
    }


def _group(runs: Sequence[CellRun]) -> dict[str, Any]:
    good = [run for run in runs if not run.failed]
    firsts, lasts, spent = ([pick(run.rows) for run in good] for pick in (itemgetter(0), end_row, itemgetter(-1)))
    bests = [row for run in good if (row := best_row(run.rows)) is not None]
    errors = [row["hypergradient_error"] for run in good for row in run.rows]
    ends = [_last_error(run.rows) for run in good]
    scores = [key for key in (lasts[0] if lasts else {}) if key.startswith(JUDGING)]
    figures = {
        "runs": len(runs),
        "failures": len(runs) - len(good),
        "failure": next((run.rows[-1]["message"] for run in runs if run.failed), ""),
        "choice": list(dict.fromkeys(run.choice for run in runs if run.choice)),
        "stopped": list(dict.fromkeys(run.stopped for run in good)),
        "doubts": dict(Counter(row["status"] for run in good for row in run.rows if row["status"] != "OK")),
        "steps": _median(len(run.rows) for run in good),
        "outer_loss_start": _median(row["outer_loss"] for row in firsts),
        "outer_loss_final": _median(row["outer_loss"] for row in lasts),
        "outer_loss_best": _median(row["outer_loss"] for row in bests),
    }
    for score in scores:
        figures[f"{score}_start"] = _median(row.get(score) for row in firsts)
        figures[f"{score}_final"] = _median(row[score] for row in lasts)
    return figures | {
        "hypergradient_error_median": _median(errors),
        "hypergradient_error_max": max((error for error in errors if error is not None), default=None),
        "hypergradient_error_final": _median(ends),
        "hypergradient_error_final_max": max((error for error in ends if error is not None), default=None),
        "referee": sorted({row["referee"] for run in good for row in run.rows}),
        "gradient_equivalents": _median(row["gradient_equivalents_total"] for row in spent),
        "seconds": _median(row["seconds_total"] for row in spent),
        "seconds_shared_by": max((row["seconds_shared_by"] for row in spent), default=1),
        "memory_peak_bytes": _median(
            max((row["memory_peak_bytes"] for row in run.rows if row["memory_peak_bytes"] is not None), default=None)
            for run in good
        ),
        "memory_kind": next(
            (row["memory_kind"] for run in good for row in run.rows if row["memory_peak_bytes"] is not None), None
        ),
    }


def _last_error(rows: Sequence[Row]) -> float | None:
    """Return the relative error of a run's last hypergradient: by the referee, else by its own certificate.

    None where nobody knows, and where error and hypergradient are nothing beside the run's largest hypergradient.
    """
    last = end_row(rows)
    norm, error = last["hypergradient_norm"], last["hypergradient_error"]
    if error is None and last["error_estimate"] is not None and norm:
        error = last["error_estimate"] / norm
    if error is None or norm is None:
        return None
    largest = max(row["hypergradient_norm"] or 0.0 for row in rows)
    # |p - g| = e |g| <= e |p| / (1 - e).
    vanishes = BIASED <= error < 1 and error * norm / (1 - error) <= NOTHING * largest
    return None if vanishes else error


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def tables(summary: dict[str, Any]) -> str:
    """Return one readable table for each problem of a summary."""
    parts = []
    for problem, by_estimator in summary["problems"].items():
        finals = [key for group in by_estimator.values() for key in group if key.endswith("_final")]
        present = [key.removesuffix("_final") for key in finals]
        scores = [name for start in SCORES for name in present if name.startswith(start)][:1] or ["score"]
        scores += [score for score in FURTHER if score in present]
        rows = [_line(estimator, group, scores) for estimator, group in by_estimator.items()]
        judged, spent = [score.replace("_", " ") for score in scores], ("grad.-equiv.", "seconds", "memory")
        headers = ("estimator", "outer loss", *judged, "hypergradient off by", *spent, "status")
        align = ("left", *["right"] * (len(headers) - 2), "left")
        seeds = f"{len(summary['seeds'])} seeds" if len(summary["seeds"]) > 1 else f"seed {summary['seeds'][0]}"
        body = tabulate(rows, headers=headers, colalign=align, disable_numparse=True)
        parts.append(f"{problem} (medians over {seeds}; the hypergradient at the end)\n{body}{_ends(by_estimator)}")
    return "\n\n".join(parts)


def _ends(by_estimator: dict[str, Any]) -> str:
    """Return a line for each estimator about how its runs ended: that of the first seed, and how many there are."""
    lines = [""]
    for estimator, group in by_estimator.items():
        lines += [f"  {estimator}: {choice}" for choice in group.get("choice", ())]
        if group["stopped"]:
            more = len(group["stopped"]) - 1
            others = f" (other seeds, {more}: see summary.json)" if more else ""
            lines.append(f"  {estimator}: {group['stopped'][0]}{others}")
    return "\n" + "\n".join(lines)


def _line(estimator: str, group: dict[str, Any], scores: Sequence[str]) -> tuple[str, ...]:
    return (
        estimator,
        _change(group["outer_loss_start"], group["outer_loss_final"]),
        *(_change(group.get(f"{score}_start"), group.get(f"{score}_final")) for score in scores),
        percent(group["hypergradient_error_final"]),
        _show(group["gradient_equivalents"], ",.0f"),
        _show(group["seconds"], ".2f") + (" (share)" if group["seconds_shared_by"] > 1 else ""),
        readable_bytes(group["memory_peak_bytes"]),
        _status(group),
    )


def _status(group: dict[str, Any]) -> str:
    """Return "ok" only where no run failed, no step was doubtful, and the last hypergradients are right."""
    if group["failures"]:
        status = f"{group['failures']} of {group['runs']} failed: {group['failure']}"
        return status if len(status) <= 60 else f"{status[:57]}..."
    off = group["hypergradient_error_final_max"]
    words = [f"biased: off by {percent(off)}"] if off is not None and off >= BIASED else []
    words += [f"{name.lower().replace('_', ' ')} in {count} steps" for name, count in group["doubts"].items()]
    return ", ".join(words) or "ok"


def percent(share: float | None) -> str:
    """Return a share in per cent, with a digit where it is small.

    >>> percent(0.854), percent(3e-4)
    ('85 %', '0.03 %')
    """
    if share is None:
        return "-"
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %" if share >= 1e-6 else "< 0.0001 %"


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.4g} -> {after:.4g}"


def readable_bytes(count: float | None) -> str:
    """Return a number of bytes in a fitting unit.

    >>> readable_bytes(48_000)
    '48 kB'
    """
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
