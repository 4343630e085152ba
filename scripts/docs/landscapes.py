"""Draws docs/figures/landscapes.png: the outer loss along single log penalties, and along the same in shrinkage.

python scripts/docs/landscapes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from bilevel.core.figures import COLOURS, STYLE, panels
from bilevel.data import load

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "landscapes.png"
POINTS, LEAST, LARGEST = 161, -10.0, 10.0


def landscapes() -> tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]:
    """Return distances u - c, and along them the outer loss, from 0 to 1, of penalties that end far apart."""
    data = load("diabetes")
    problem = bl.problems.RidgeProblem(**data.splits(), penalty="per_feature")
    tuned = bl.tune(problem, accuracy=1e-8)
    centre = problem.penalty_scales(tuned.hparams).log()
    far = tuned.hparams - centre
    inside = int((far.abs() + 100 * (far < -6)).argmin())
    shifts = torch.linspace(LEAST, LARGEST, POINTS, dtype=centre.dtype)
    curves = []
    for index, name in ((int(far.argmin()), "weakly penalised"), (inside, "in between"), (int(far.argmax()), "dead")):
        u = tuned.hparams.repeat(POINTS, 1)
        u[:, index] = centre[index] + shifts
        losses = bl.hypergradient(problem, bl.QuasiNewton(), bl.ClosedForm(), u, batch=POINTS).outer_loss
        label = f"{data.feature_names[index]} ({name})"
        curves.append((label, (losses - losses.min()) / (losses.max() - losses.min())))
    return shifts, curves


def main() -> Any:
    """Draw the figure."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        shifts, curves = landscapes()
        figure, ((left, right),) = panels(1, 2, (9.0, 3.4))
        for colour, (label, values) in zip(COLOURS, curves, strict=False):
            left.plot(shifts, values, color=colour, label=label)
            right.plot(torch.sigmoid(-shifts), values, color=colour)
        left.set(xlabel="log penalty u - c", ylabel="outer loss, least 0, largest 1", title="in log penalties")
        right.set(xlabel="shrinkage t = sigmoid(c - u)", title="in shrinkage")
        left.legend(frameon=False)
        figure.savefig(FIGURE, dpi=110)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
