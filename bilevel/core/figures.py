"""What all figures share: colours, line styles, a legend that fits, and axes whose labels do not overlap.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; line styles tell them apart in
print. Everything here needs matplotlib (the extra `plot`), which is imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (8, 2, 1, 2)))
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "savefig.dpi": 200,
}
ROW = 0.22
"""Inches of a row of the legend."""


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure on a canvas of its own, whatever the session draws on, and its axes; `size` is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def looks(names: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Return colour and line style by name; of more than seven names no two have both in common.

    >>> looks(["a", "b"])["b"]
    ('#D55E00', '--')
    """
    count = len(COLOURS)
    return {name: (COLOURS[i % count], STYLES[(i + i // count) % count]) for i, name in enumerate(dict.fromkeys(names))}


def legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int, title: str = "") -> Any:
    """Return a legend below the axes, in as many columns as fit; the figure becomes higher for its rows."""
    for count in range(min(columns, len(handles)), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=count, frameon=False, title=title or None
        )
        legend.get_title().set_fontsize("small")
        if count == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width <= 0.97 * figure.bbox.width:
            break
        legend.remove()
    rows = math.ceil(len(handles) / count) + bool(title)
    figure.set_figheight(figure.get_figheight() + ROW * (rows - 1))
    return legend


def tidy_log_axis(axis: Any) -> None:
    """Give a logarithmic axis labels that can be read: 1, 2, 5 where it spans few decades, and none between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    elif decades < 3.5:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0), numticks=20))
    else:
        axis.set_minor_formatter(NullFormatter())
        return
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """Return a number as the label of a tick.

    >>> [number(value) for value in (0.05, 2000.0, 3e-7, 2e7)]
    ['0.05', '2,000', '3e-7', '2e7']
    """
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thin_labels(figure: Any) -> None:
    """Drop every second label of an axis as long as labels overlap; ticks between them have none."""
    from matplotlib.ticker import FixedLocator

    figure.draw_without_rendering()
    for place in figure.axes:
        for axis in (place.xaxis, place.yaxis):
            for _ in range(4):
                if not overlapping(figure, axis):
                    break
                low, high = sorted(axis.get_view_interval())
                shown = [at for at in axis.get_majorticklocs() if low <= at <= high]
                axis.set_major_locator(FixedLocator(shown[::2]))
                figure.draw_without_rendering()


def overlapping(figure: Any, axis: Any) -> bool:
    """Whether two labels of ticks of an axis overlap, as drawn last."""
    renderer = figure.canvas.get_renderer()
    low, high = sorted(axis.get_view_interval())
    margin = 1e-9 * abs(high - low)
    labels = [
        label.get_window_extent(renderer)
        for tick, where in (
            (axis.get_major_ticks(), axis.get_majorticklocs()),
            (axis.get_minor_ticks(), axis.get_minorticklocs()),
        )
        for label, at in zip((each.label1 for each in tick), where, strict=False)
        if label.get_visible() and label.get_text() and low - margin <= at <= high + margin
    ]
    vertical = axis.axis_name == "y"
    spans = sorted((box.y0, box.y1) if vertical else (box.x0, box.x1) for box in labels)
    return any(later[0] < earlier[1] for earlier, later in pairwise(spans))
