"""Figures: no legend is cut, no labels overlap, bands say what they are, bars start at zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bilevel.compare.cells import CellRun
from bilevel.compare.figures import FIGURES
from bilevel.compare.plan import Cell
from bilevel.core.figures import STYLE, looks, overlapping
from bilevel.curse import figures as of_curse
from bilevel.curse.outcome import Line, Outcome, Panel

matplotlib = pytest.importorskip("matplotlib")


def runs(estimators: int, problems: int, decades: float, seeds: int = 2) -> list[CellRun]:
    """Runs whose losses, errors, costs and memory span so many decades."""
    found = []
    for problem in range(problems):
        for estimator in range(estimators):
            for seed in range(seeds):
                steps = np.linspace(0.0, 1.0, 8)
                fall = 37.0 * 10.0 ** (-decades * steps) * (1 + 0.02 * seed + 0.01 * estimator)
                rows = [
                    {
                        "outer_loss": float(loss),
                        "hypergradient_error": float(loss),
                        "step": index + 1,
                        "gradient_equivalents_total": 180.0 * 10 ** (decades * steps[index]),
                        "seconds_total": 0.013 * 10 ** (decades * steps[index]),
                        "memory_peak_bytes": 9_000.0 * 10 ** (decades * estimator / 6),
                        "status": "OK",
                    }
                    for index, loss in enumerate(fall)
                ]
                name = f"estimator {estimator} of long name".ljust(25, "x")
                found.append(CellRun(Cell(len(found), f"problem {problem}", name, seed), rows, True, "took 8 steps"))
    return found


def drawn(name: str, of: list[CellRun]) -> Any:
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[name](of)
        figure.draw_without_rendering()
    return figure


def check_nothing_is_cut(figure: Any) -> None:
    renderer = figure.canvas.get_renderer()
    canvas = figure.bbox
    for box in [legend.get_window_extent(renderer) for legend in figure.legends]:
        assert canvas.x0 <= box.x0
        assert box.x1 <= canvas.x1
        assert canvas.y0 <= box.y0
        assert box.y1 <= min(place.get_window_extent(renderer).y0 for place in figure.axes)
    for place in figure.axes:
        assert place.get_window_extent(renderer).height > 60
        for axis in (place.xaxis, place.yaxis):
            assert not overlapping(figure, axis)
            assert sum(bool(label.get_text()) for label in axis.get_majorticklabels()) >= 1


@pytest.mark.parametrize(
    ("estimators", "problems", "decades"),
    [(7, 1, 0.3), (7, 1, 1.1), (4, 2, 2.0), (2, 1, 3.0), (1, 1, 0.6)],
)
@pytest.mark.parametrize("name", ["outer_loss_by_cost", "memory"])
def test_nothing_is_cut_and_no_labels_overlap(name: str, estimators: int, problems: int, decades: float) -> None:
    check_nothing_is_cut(drawn(name, runs(estimators, problems, decades)))


def test_bands_say_what_they_are() -> None:
    (legend,) = drawn("outer_loss_by_cost", runs(2, 1, 1.0, seeds=3)).legends
    assert legend.get_title().get_text() == "lines: medians of 3 seeds; bands: from the smallest to the largest"
    (legend,) = drawn("outer_loss_by_cost", runs(2, 1, 1.0, seeds=1)).legends
    assert legend.get_title().get_text() == ""


def test_an_estimator_has_one_colour_in_all_figures() -> None:
    some = runs(4, 2, 1.0)
    # The first problem lacks an estimator.
    some = [run for run in some if (run.cell.problem, run.cell.estimator[:11]) != ("problem 0", "estimator 1")]
    colours: dict[str, set[Any]] = {}
    for name in FIGURES:
        for place in drawn(name, some).axes:
            if name == "memory":
                pairs = [
                    (label.get_text(), matplotlib.colors.to_hex(bar.get_facecolor()))
                    for label, bar in zip(place.get_yticklabels(), place.patches, strict=True)
                ]
            else:
                pairs = [(line.get_label(), matplotlib.colors.to_hex(line.get_color())) for line in place.lines]
            for estimator, colour in pairs:
                colours.setdefault(estimator, set()).add(colour.lower())
    assert len(colours) == 4
    assert all(len(each) == 1 for each in colours.values())
    assert len(set.union(*colours.values())) == 4


def test_no_two_of_many_names_look_alike() -> None:
    found = looks([str(index) for index in range(40)])
    assert len({(colour, str(style)) for colour, style in found.values()}) == 40


def test_bars_of_memory_start_at_zero_on_a_linear_axis() -> None:
    for place in drawn("memory", runs(3, 2, 3.0)).axes:
        assert place.get_xscale() == "linear"
        assert place.get_xlim()[0] == 0
        assert all(bar.get_x() == 0 for bar in place.patches)


@pytest.mark.parametrize("decades", [0.3, 3.0])
def test_figures_of_the_curse_are_not_cut_either(tmp_path: Any, monkeypatch: Any, decades: float) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(of_curse, "write_figure", lambda target, figure, dpi: kept.append(figure))
    x = torch.logspace(0, decades, 20)
    lines = [Line(f"method {index} of long name".ljust(25, "x"), x, 40.0 / x) for index in range(7)]
    panels = [[Panel("panel", "steps", "error", lines, scales=("log", "log"))]]
    assert of_curse.draw(Outcome("title", panels), tmp_path / "figure.png")
    kept[0].draw_without_rendering()
    check_nothing_is_cut(kept[0])
