"""The figures of a comparison, one panel for each problem; they need matplotlib (the extra `plot`).

Lines are medians over the seeds, bands run from the smallest to the largest seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bilevel.compare.cells import CellRun, Row
from bilevel.compare.summary import readable_bytes
from bilevel.core.figures import STYLE, legend_below, looks, panels, thin_labels, tidy_log_axis
from bilevel.core.files import write_figure

Curve = tuple[list[float], list[float], list[float], list[float]]


def draw_figures(runs: Sequence[CellRun], folder: Path) -> list[Path]:
    """Draw all figures of a comparison into a folder and return the files: none without matplotlib, or a good run."""
    try:
        import matplotlib
    except ImportError:
        return []
    if not (good := [run for run in runs if run.rows and not run.failed]):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    # A style of its own: whatever the caller's session has set up stays as it is.
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            if name == "hypergradient_error" and not any(_known(run.rows, name) for run in good):
                continue
            target = folder / f"{name}.png"
            write_figure(target, draw(good))
            files.append(target)
    return files


def _panels(runs: Sequence[CellRun], height: float) -> tuple[Any, dict[str, Any]]:
    """Return a figure and its axes by problem."""
    problems = list(dict.fromkeys(run.cell.problem for run in runs))
    figure, (axes, *_) = panels(1, len(problems), (4.6 * len(problems) + 0.2, height))
    for problem, panel in zip(problems, axes, strict=True):
        panel.set_title(problem.replace("_", " "))
    return figure, dict(zip(problems, axes, strict=True))


def _groups(runs: Sequence[CellRun], problem: str) -> dict[str, list[list[Row]]]:
    """Return the rows of each run by estimator."""
    groups: dict[str, list[list[Row]]] = {}
    for run in runs:
        if run.cell.problem == problem:
            groups.setdefault(run.cell.estimator, []).append(run.rows)
    return groups


def _curve(group: list[list[Row]], x: str, y: str) -> Curve:
    """Return x, median y and the band, over the steps that all runs took and where y is known."""
    points = [(x_, y_) for steps in zip(*group, strict=False) if (x_ := _known(steps, x)) and (y_ := _known(steps, y))]
    ys = [each for _, each in points]
    return [median(xs) for xs, _ in points], list(map(median, ys)), list(map(min, ys)), list(map(max, ys))


def _known(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]


def _lines(x: str, y: str, xlabel: str, ylabel: str, runs: Sequence[CellRun]) -> Any:
    """Draw one line with a band for each estimator in every panel."""
    figure, places = _panels(runs, 3.6)
    look = looks([run.cell.estimator for run in runs])
    drawn: dict[str, Any] = {}
    for problem, panel in places.items():
        seen: list[float] = []
        for estimator, group in _groups(runs, problem).items():
            xs, ys, low, high = _curve(group, x, y)
            if not xs:
                continue
            colour, style = look[estimator]
            # A single point is invisible as a line.
            marker = "o" if len(xs) == 1 else None
            (drawn[estimator],) = panel.plot(xs, ys, color=colour, linestyle=style, marker=marker, label=estimator)
            panel.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
            seen += [*low, *high]
        if x == "step":
            panel.xaxis.get_major_locator().set_params(integer=True)
        else:
            panel.set_xscale("log")
            tidy_log_axis(panel.xaxis)
        # Within a decade a linear axis reads better, and a loss may be negative.
        if seen and min(seen) > 0 and max(seen) > 10 * min(seen):
            panel.set_yscale("log")
            tidy_log_axis(panel.yaxis)
        panel.set_xlabel(xlabel)
    next(iter(places.values())).set_ylabel(ylabel)
    if drawn:
        seeds = len({run.cell.seed for run in runs})
        title = f"lines: medians of {seeds} seeds; bands: from the smallest to the largest" if seeds > 1 else ""
        legend_below(figure, list(drawn.values()), list(drawn), 4, title)
    thin_labels(figure)
    return figure


def _memory(runs: Sequence[CellRun]) -> Any:
    """Draw the peak memory as horizontal bars with their numbers."""
    look = looks([run.cell.estimator for run in runs])
    figure, places = _panels(runs, 1.3 + 0.45 * len(look))
    for problem, panel in places.items():
        peaks = {}
        for estimator, group in _groups(runs, problem).items():
            if highest := [max(known) for rows in group if (known := _known(rows, "memory_peak_bytes"))]:
                peaks[estimator] = max(median(highest), 1.0)
        # From zero: a bar shows a ratio by its length.
        panel.set_xlabel("peak memory of a hypergradient")
        panel.xaxis.set_major_formatter(lambda value, _: readable_bytes(value))
        panel.grid(axis="y", visible=False)
        bars = panel.barh(list(peaks), list(peaks.values()), color=[look[name][0] for name in peaks], height=0.6)
        panel.bar_label(bars, [readable_bytes(value) for value in peaks.values()], padding=4)
        panel.invert_yaxis()
        if peaks:
            panel.set_xlim(0, max(peaks.values()) * 1.35)
            panel.xaxis.get_major_locator().set_params(nbins=4)
    thin_labels(figure)
    return figure


FIGURES: dict[str, Callable[[Sequence[CellRun]], Any]] = {
    "outer_loss_by_cost": partial(
        _lines, "gradient_equivalents_total", "outer_loss", "inner gradient-equivalents", "outer loss"
    ),
    "outer_loss_by_seconds": partial(_lines, "seconds_total", "outer_loss", "seconds", "outer loss"),
    "hypergradient_error": partial(_lines, "step", "hypergradient_error", "outer step", "relative hypergradient error"),
    "memory": _memory,
}
