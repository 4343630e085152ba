"""`WeightReport`: what weights of the training rows have gained, and whether trusted rows confirm it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import is_classifier
from tabulate import tabulate

from bilevel.selection import RowWeights
from bilevel.selection.gate import in_errors, verdict


@dataclass(frozen=True, eq=False, repr=False)
class WeightReport:
    """What equal weights reach, what learned ones gain, and whether the gain survived the outer loop.

    Attributes:
        loss_name: what losses are.
        n_rows: rows with a learned weight.
        n_trusted: trusted rows.
        equal_loss: of trusted rows whose losses chose only the node, with equal weights: of the estimator, where the
            model of the nodes gains by weights, else of that model; NaN without an outer loop.
        weighted_loss: the same with the chosen or best learned weights.
        gain: one minus their ratio.
        gate: the gain in standard errors.
        kappa: standard errors that were asked for; NaN without an outer loop.
        survived: whether the gain was proved, so that learned weights were kept.
        seconds: processor time of the weights, without that of the model.
        summary: all of that in one sentence.
        remark: what is worth knowing besides; may be empty.
        nodes: of a linear model with one penalty, by node: `name`, `fitted` (loss of the trusted rows with weights
            that were learned on them), `loss` (of trusted rows that they were not), `gain`, `gain_error` and
            `chosen`.
    """

    loss_name: str
    n_rows: int
    n_trusted: int
    equal_loss: float
    weighted_loss: float
    gain: float
    gate: float
    kappa: float
    survived: bool
    seconds: float
    summary: str
    remark: str
    nodes: dict[str, Any]

    def __str__(self) -> str:
        head = f"SampleWeights: {self.n_rows} weights, learned on {self.n_trusted} trusted rows ({self.loss_name})"
        nodes = self.nodes
        rows = [
            [name, *(nodes[key][index] for key in ("fitted", "loss", "gain", "gain_error")), mark]
            for index, (name, mark) in enumerate(
                zip(nodes["name"], np.where(nodes["chosen"], "<- chosen", ""), strict=True)
            )
            if np.isfinite(nodes["fitted"][index])
        ]
        shown = [["" if isinstance(each, float) and not np.isfinite(each) else each for each in row] for row in rows]
        heads = ["", "fitted", "held-out loss", "gain", "+-", ""]
        table = [tabulate(shown, heads, floatfmt=".5g", tablefmt="simple"), ""] if rows else []
        notes = [f"Note: {self.remark}"] if self.remark else []
        return "\n".join([head, "", *table, self.summary, *notes, f"Cost: {self.seconds:.2g} s of processor time."])

    __repr__ = __str__


def row_losses(model: Any, X: Any, y: Any) -> NDArray[np.float64]:
    """Return the loss of every row: log loss, half the squared error, or one for a class that is wrong.

    Args:
        model: fitted.
        X: rows.
        y: their targets.
    """
    if not is_classifier(model):
        return 0.5 * (y - np.asarray(model.predict(X), dtype=np.float64).reshape(y.shape)) ** 2
    if not hasattr(model, "predict_proba"):
        return (np.asarray(model.predict(X)) != y).astype(np.float64)
    chances = model.predict_proba(X)[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    return -np.log(np.maximum(chances, np.finfo(np.float64).tiny))


def report_of(found: RowWeights | None, estimator: Any, rows: int, trusted: int, remark: str) -> WeightReport:
    """Return the report of weights; without any of rows that are too few, whose reason is the remark.

    Args:
        found: the weights.
        estimator: that they are for.
        rows: how many were weighted.
        trusted: how many were trusted.
        remark: of the report.
    """
    classifies = is_classifier(estimator)
    factor, name = (1.0, "log loss") if classifies else (2.0, "mean squared error")
    nan = float("nan")
    if found is None:
        nodes = {key: np.empty(0) for key in ("name", "fitted", "loss", "gain", "gain_error", "chosen")}
        summary = "Equal weights are kept."
        return WeightReport(name, rows, trusted, nan, nan, nan, 0.0, nan, False, 0.0, summary, remark, nodes)
    choice, unknown = found.choice, np.full(len(found.names), nan)
    losses, gains, errors = (unknown,) * 3 if choice is None else (choice.losses, choice.gains, choice.gain_errors)
    nodes = {
        "name": np.array(found.names),
        "fitted": factor * found.fitted,
        "loss": factor * losses,
        "gain": factor * gains,
        "gain_error": factor * errors,
        "chosen": np.arange(len(losses)) == found.chosen,
    }
    if choice is None:
        summary = "Learned weights are taken without an outer loop: whether they generalise is not known."
        return WeightReport(name, rows, trusted, nan, nan, nan, 0.0, nan, False, found.seconds, summary, remark, nodes)
    at, best, whose = choice, int(np.argmin(choice.losses[1:])) + 1, "learned ones"
    if found.judged is not None:
        at, best, whose = found.judged, 1, "the estimator by learned ones"
    equal, weighted, gate = factor * float(at.losses[0]), factor * float(at.losses[best]), float(at.gates[best])
    gain = 1.0 - weighted / equal if equal else 0.0
    proof = f"{weighted:.5g} against {equal:.5g} on trusted rows whose losses chose only the node: "
    proof += in_errors(gate, at.kappa)
    summary = f"Equal weights are kept: no gain of {whose} is proved ({proof})."
    if found.chosen:
        summary = f"{verdict('Learned weights', gain, loss=name, several=True)} that of equal ones ({proof})."
    figures = (equal, weighted, gain, gate, at.kappa, bool(found.chosen), found.seconds)
    return WeightReport(name, rows, trusted, *figures, summary, remark, nodes)
