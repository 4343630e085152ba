"""All strategies at equal budget: fixed tails, the papers' choice of the tail, and what chooses by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bilevel.core.options import is_int, option, require
from bilevel.curse.draws import FAMILIES, draws
from bilevel.curse.outcome import Claim, Experiment, Line, Outcome, Panel, Table, sizes, some_of
from bilevel.curse.strategies import AUTO, BALANCED, BOUND, EIGHTH, EXTRAPOLATED, FULL, OMEGA, STRATEGIES, measure

FLOOR = 1e-13
"""Relative errors below this are rounding, and count as this."""
MOVING = 10 * FLOOR
"""Where the oracle is below this, no strategy can be ten times better."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class EqualBudget(Experiment):
    """The error of every strategy over the oracle's, all at ``T = (1 + omega) K`` gradient-equivalents, omega = 3.

    The oracle is the best fixed tail: ``K + omega N`` steps, the last ``K - N`` differentiated, N chosen with the exact
    derivative at hand. Problems: M's, with 200 x columns Gaussian matrices and both steps; ridge and logistic
    regression on scikit-learn's data with gradient descent (1/L) and Nesterov's method, from cold (Gaussian) and warm
    starts; ill-conditioned quadratics. One penalty for each weight, outer loss v'w with v Gaussian. There are so many
    draws of each setting; constants of the library were chosen on seeds below 300.
    """

    families: Sequence[str] = some_of(FAMILIES, "M", "ridge", "logistic")
    columns: Sequence[int] = sizes(20, 60, 100, 140, 170, 185)
    steps: int = option(100, "an int of at least 20", lambda steps: is_int(steps, 20))
    draws: int = option(4, "an int in 1..500", lambda draws: is_int(draws) and draws <= 500)
    seed: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "seed", "an int in 0..499", is_int(self.seed, 0) and self.seed + self.draws <= 1000)

    def run(self) -> Outcome:
        result = draws(self.families, self.columns, self.steps, self.draws, self.seed)
        rows = [measure(draw, self.steps) for draw in result]
        panels = [_panel(family, list(part)) for family, part in groupby(rows, lambda row: row["family"])]
        tables = [_errors(rows), _effectivities(rows), Table("draws", rows, shown=False)]
        title = f"Hypergradient error at equal budget (K = {self.steps}, $\\omega$ = {OMEGA}): median, 10 to 90 %"
        pairs = [panels[i : i + 2] for i in range(0, len(panels), 2)]
        return Outcome(title, pairs, self._claims(rows), numbers=_numbers(rows), tables=tables, panel_width=4.6)

    def _claims(self, rows: Sequence[Row]) -> list[Claim]:
        where = f"K = {self.steps}, omega = {OMEGA}, {self.draws} draws of each setting"
        moving = [row for row in rows if row["oracle"] > MOVING]
        gaussian = [row for row in moving if row["family"].startswith("M,") and row["rho"] <= 0.98]
        settled = [row for row in moving if row["sK"] >= 2]
        above = f"oracle above {MOVING:g}"
        budget = (1 + OMEGA) * self.steps
        most = max(value for row in rows for key, value in row.items() if key.endswith(": cost"))
        spent = f"at most {most:g} of {budget} + {OMEGA} gradient-equivalents"
        text = "no strategy spends more than the budget and one derivative step"
        claims = [
            _near(rows, BOUND, "M (22)", where),
            _near(rows, AUTO, "this library", where),
            _better(gaussian, EXTRAPOLATED, 1.0, f"M's problem, rho <= 0.98, {above}; {where}"),
            _better(settled, BALANCED, 0.95, f"-K log rho >= 2, {above}; {where}"),
            Claim("this library", text, spent, most <= budget + OMEGA, f"{len(rows)} draws; {where}"),
        ]
        return [claim for claim in claims if claim]


def _near(rows: Sequence[Row], name: str, source: str, where: str) -> Claim | None:
    """Return the claim that a strategy is within a factor 3 of the oracle in 98 % of the draws."""
    values = ratios(rows, name)
    if not len(values):
        return None
    share = float((values <= 3).double().mean())
    worst = max((row for row in rows if name in row), key=lambda row: ratios([row], name).item())
    text = f"{name}: within a factor 3 of the best fixed tail in at least 98 % of the draws"
    number = (
        f"{share:.1%} of {len(values)} draws; median {float(values.median()):.3g}, worst {float(values.max()):.3g} "
        f"({worst['family']}, {worst['group']}, {worst['setting']})"
    )
    where += ", true constants, gradient descent on quadratics" if name == BOUND else ""
    return Claim(source, text, number, share >= 0.98, where)


def _better(rows: Sequence[Row], name: str, least: float, where: str) -> Claim | None:
    """Return the claim that a strategy is ten times better than the oracle in a share of the draws."""
    values = ratios(rows, name)
    if not len(values):
        return None
    share, gain = float((values <= 0.1).double().mean()), 1 / values
    part = f" in {least:.0%} of the draws" if least < 1 else ""
    text = f"{name}: at least 10 times below the best fixed tail{part}"
    number = f"{share:.1%} of {len(values)} draws; {float(gain.median()):.3g} times below (median), "
    return Claim("this library", text, number + f"{float(gain.min()):.3g} (least)", share >= least, where)


def ratios(rows: Sequence[Row], name: str) -> Tensor:
    """Return the errors of a strategy over the oracle's, both floored, for the draws that it was measured on."""
    pairs = [(max(row[name], FLOOR), max(row["oracle"], FLOOR)) for row in rows if name in row]
    # A failed run returns nan.
    return torch.tensor([math.inf if math.isnan(a) else a / b for a, b in pairs], dtype=torch.float64)


def _quantiles(values: Tensor, *at: float) -> list[Tensor]:
    return list(values.quantile(torch.tensor(at, dtype=values.dtype), interpolation="nearest"))


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row["group"], []).append(row)
    return result


def _panel(family: str, rows: Sequence[Row]) -> Panel:
    groups = _groups(rows)
    lines = [Line("", torch.tensor([-0.5, len(groups) - 0.5]), torch.ones(2), bound=True)]
    for place, name in enumerate(STRATEGIES):
        points = []
        for index, part in enumerate(groups.values()):
            values = ratios(part, name)
            if len(values):
                # Beside each other: the group's place is that of the middle strategy.
                x = torch.tensor(index + 0.12 * (place - (len(STRATEGIES) - 1) / 2))
                points.append((x, *_quantiles(values, 0.1, 0.5, 0.9)))
        if points:
            x, low, middle, high = (torch.stack(column) for column in zip(*points, strict=True))
            lines.append(Line(name, x, middle, (low, high), bars=True))
    ticks, xlabel = [group.replace(" ", "\n") for group in groups], "start and inner solver"
    title = family if family.startswith("ill") else f"{family} regression"
    if family.startswith("M,"):
        title = family.replace("M", "M's problem")
        rho = [float(torch.tensor([row["rho"] for row in part]).median()) for part in groups.values()]
        ticks = [f"{group}\n{value:.3f}" for group, value in zip(groups, rho, strict=True)]
        xlabel = "columns, and median $\\rho$"
    return Panel(title, xlabel, "error / error of the best fixed tail", lines, ylim=(1e-11, 1e3), ticks=ticks)


def _errors(rows: Sequence[Row]) -> Table:
    """Return medians, 90 % quantiles and worst ratios by group."""
    table = []
    for family, part in groupby(rows, lambda row: row["family"]):
        for group, members in _groups(list(part)).items():
            oracle = float(torch.tensor([row["oracle"] for row in members]).median())
            cells = {"problem": f"{family}, {group}", "draws": len(members), "best fixed tail": f"{oracle:.1e}"}
            table.append(cells | _summary(members))
    table.append({"problem": "all", "draws": len(rows)} | _summary(rows))
    name = "Error over that of the best fixed tail (whose median relative error is given): median / p90 / worst"
    return Table(name, table)


def _summary(rows: Sequence[Row]) -> dict[str, str]:
    result = {}
    for name in STRATEGIES:
        values = ratios(rows, name)
        if len(values):
            result[name] = " / ".join(f"{float(value):.2g}" for value in _quantiles(values, 0.5, 0.9, 1.0))
    return result


def _effectivities(rows: Sequence[Row]) -> Table:
    table = []
    for family in dict.fromkeys(row["family"] for row in rows):
        if result := [row["effectivity"] for row in rows if row["family"] == family and "effectivity" in row]:
            values = _quantiles(torch.tensor(result, dtype=torch.float64), 0.0, 0.5, 0.9, 1.0)
            names = ("min", "median", "p90", "max")
            cells = {name: f"{float(value):.3g}" for name, value in zip(names, values, strict=True)}
            table.append({"problem": family, "draws": len(result)} | cells)
    return Table(f"Effectivity of the error estimate of {BALANCED} (estimate / true error)", table)


def _numbers(rows: Sequence[Row]) -> dict[str, float]:
    numbers = {"draws": float(len(rows))}
    for name in (FULL, EIGHTH, *STRATEGIES):
        values = ratios(rows, name)
        if len(values):
            numbers[f"within 3 {name}"] = float((values <= 3).double().mean())
            numbers[f"median {name}"] = float(values.median())
    return numbers
