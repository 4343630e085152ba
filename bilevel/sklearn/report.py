"""`TuningReport`: what tuning has gained, whether held-out rows confirm it, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate


@dataclass(frozen=True, eq=False, repr=False)
class TuningReport:
    """What one penalty reaches, what tuned penalties gain, and whether the gain survived the outer loop.

    Attributes:
        estimator: the name of its class.
        loss_name: what losses are.
        criterion: what was descended.
        honest: how honest losses were taken: "nested", "alo", or "none".
        n_penalties: how many were tuned.
        one_penalty_loss: of held-out rows, with one penalty; without an outer loop NaN.
        tuned_loss: of held-out rows, with the best tuned penalties; NaN where there are none.
        gain: one minus their ratio.
        gate: the gain in standard errors.
        kappa: standard errors that were asked for; NaN without an outer loop.
        survived: whether the gain was proved on rows that the tuning had not seen, so that tuned penalties were taken.
        n_evaluations: of the criterion, those of the outer loop included.
        seconds: processor time.
        summary: all of that in one sentence.
        remarks: what is worth knowing besides, a sentence each.
        nodes: `cv_results_` of the estimator.
    """

    estimator: str
    loss_name: str
    criterion: str
    honest: str
    n_penalties: int
    one_penalty_loss: float
    tuned_loss: float
    gain: float
    gate: float
    kappa: float
    survived: bool
    n_evaluations: int
    seconds: float
    summary: str
    remarks: tuple[str, ...]
    nodes: dict[str, Any]

    def __str__(self) -> str:
        nodes = self.nodes
        rows = [
            [
                "one penalty" if np.isinf(tau) else f"tau {tau:g}",
                nodes["criterion"][index],
                nodes["loss"][index],
                nodes["gain"][index] if index else np.nan,
                nodes["gain_error"][index] if index else np.nan,
                "<- chosen" if nodes["chosen"][index] else "",
            ]
            for index, tau in enumerate(nodes["tau"])
        ]
        shown = [["" if isinstance(each, float) and np.isnan(each) else each for each in row] for row in rows]
        table = tabulate(shown, ["", "criterion", "held-out loss", "gain", "+-", ""], floatfmt=".5g", tablefmt="simple")
        what = "1 penalty" if self.n_penalties == 1 else f"{self.n_penalties} penalties"
        cost = f"Cost: {self.n_evaluations} evaluations of the criterion, {self.seconds:.2g} s of processor time."
        head = f"{self.estimator}: {what}, tuned by {self.criterion} ({self.loss_name})"
        return "\n".join([head, "", table, "", self.summary, *(f"Note: {each}" for each in self.remarks), cost])

    __repr__ = __str__
