"""Figures of outcomes; they need matplotlib (the extra `plot`).

A sequence of truncation indices is drawn in one perceptually uniform map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel.core.figures import COLOURS, STYLE, legend_below, looks, panels, thin_labels, tidy_log_axis
from bilevel.core.files import write_figure
from bilevel.curse.outcome import Line, Outcome, Panel

SMALL: Any = {"font.size": 9, "axes.titlesize": 10, "lines.linewidth": 1.6, "legend.fontsize": 8.5}
"""Where panels of these figures, which are many, differ from those of comparisons."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
HEIGHT = 2.75
"""Inches of a panel."""


def draw(outcome: Outcome, target: Path, dpi: int = 170) -> bool:
    """Draw an outcome into a PNG file; return False where matplotlib is not installed or no panel has lines."""
    try:
        import matplotlib
    except ImportError:
        return False
    if not (rows := [row for row in outcome.rows if any(panel.lines for panel in row)]):
        return False
    columns = max(map(len, rows))
    with matplotlib.rc_context(STYLE | SMALL):
        look = _look(rows)
        figure, axes = panels(len(rows), columns, (outcome.panel_width * columns, HEIGHT * len(rows) + 0.75))
        drawn: dict[str, Any] = {}
        for row, line_of_axes in zip(rows, axes, strict=True):
            for panel, place in zip(row, line_of_axes, strict=False):
                drawn = _panel(place, panel, look) | drawn
            for place in line_of_axes[len(row) :]:
                place.set_visible(False)
        figure.suptitle(outcome.title, fontsize=11)
        if handles := [drawn[label] for label in look if label in drawn]:
            most = max(2 + columns, int(outcome.panel_width * columns / 1.2))
            legend_below(figure, handles, [handle.get_label() for handle in handles], most)
        thin_labels(figure)
        write_figure(target, figure, dpi=dpi)
    return True


def _look(rows: Sequence[Sequence[Panel]]) -> dict[str, tuple[Any, Any]]:
    """Return colour and style by label, the same in every panel."""
    import matplotlib

    lines = [line for row in rows for panel in row for line in panel.lines]
    labels = [label for label in dict.fromkeys(line.label for line in lines) if label]
    if len(labels) > len(COLOURS):
        shades = matplotlib.colormaps["viridis"]
        return {label: (shades(0.92 * i / (len(labels) - 1)), "-") for i, label in enumerate(labels)}
    return looks(labels)


def _panel(place: Any, panel: Panel, look: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Draw one panel and return a handle for each label."""
    handles = {}
    for line in panel.lines:
        # A line without a label needs none: it is alone in its panel.
        colour, style = look.get(line.label, ("black", "-"))
        handle = _line(place, line, colour, style)
        if not line.bound:
            handles[line.label] = handle
    place.set_title(panel.title)
    place.set_xlabel(panel.xlabel)
    place.set_ylabel(panel.ylabel)
    place.set_xscale(panel.scales[0])
    place.set_yscale(panel.scales[1])
    if panel.ticks:
        place.set_xticks(range(len(panel.ticks)), panel.ticks)
        place.grid(visible=False, axis="x")
        place.set_xlim(-0.5, len(panel.ticks) - 0.5)
        for edge in range(1, len(panel.ticks)):
            place.axvline(edge - 0.5, color="0.85", linewidth=0.8, zorder=0)
    if panel.ylim is not None:
        place.set_ylim(*panel.ylim)
    for axis, scale in ((place.xaxis, panel.scales[0]), (place.yaxis, panel.scales[1])):
        if scale == "log":
            tidy_log_axis(axis)
    return handles


def _line(place: Any, line: Line, colour: Any, style: Any) -> Any:
    x, y = line.x.tolist(), line.y.tolist()
    if line.bound:
        return place.plot(x, y, color=colour, linestyle=":", linewidth=0.9, zorder=1)[0]
    if line.bars and line.band is not None:
        place.vlines(x, line.band[0].tolist(), line.band[1].tolist(), color=colour, linewidth=1.4, alpha=0.55)
        marker = MARKERS[COLOURS.index(colour) % len(MARKERS)] if colour in COLOURS else "o"
        return place.plot(x, y, color=colour, linestyle="", marker=marker, markersize=4.5, label=line.label)[0]
    mark = {"marker": "o", "markersize": 3.5} if line.marks else {}
    (handle,) = place.plot(x, y, color=colour, linestyle=style, label=line.label, **mark)
    if line.band is not None:
        low, high = line.band
        place.fill_between(x, low.tolist(), high.tolist(), color=colour, alpha=0.15, linewidth=0)
    return handle
