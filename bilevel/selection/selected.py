"""`Selected`: a tuned model, the nodes it was chosen from, and what spoke for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bilevel.criteria.criterion import Array, Criterion, Evaluation, Fit
from bilevel.selection.gate import Choice, paired, verdict
from bilevel.selection.honest import Fold, HonestLosses
from bilevel.selection.path import PathPoint

STRONG, WEAK = 6.0, 10.0
"""Log penalties this far above `LinearData.level` all but drop a feature, and this far below it do not matter."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """What held-out rows say of a model.

    Attributes:
        loss: honest mean loss; NaN without an outer loop.
        std_error: of the difference between `loss` and the least of all models.
        gain: the honest loss of the first, simplest model minus this one's.
        gain_error: the standard error of the gain.
    """

    loss: float
    std_error: float
    gain: float
    gain_error: float

    @property
    def gate(self) -> float:
        """The gain in standard errors; 0 where there is none."""
        return self.gain / self.gain_error if 0 < self.gain_error < math.inf else 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Node(Judged):
    """Tuned penalties under one weight of the hyperprior; the first node of a path has one penalty.

    Attributes:
        tau: that weight, as a part of the criterion's unit; infinite for one penalty.
        u: log penalties, (k,), as `Criterion.evaluate` takes them.
        penalties: of every coefficient, shaped as they are; of standardised columns and sums of losses.
        value: of the criterion on all rows: a training loss of the penalties.
        evaluations: of the criterion on all rows, from the node before.
        converged: whether the descent to it ended before its steps were used up.
    """

    tau: float
    u: Array
    penalties: Tensor
    value: float
    evaluations: int
    converged: bool


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model of all rows.

    Attributes:
        fit: the model, in the units of the X that was given.
    """

    fit: Fit

    @property
    def coef(self) -> Tensor:
        """Coefficients, (features,) or (outputs, features), in the units of the X that was given."""
        return self.fit.coef

    @property
    def intercept(self) -> Tensor:
        """The intercept, of shape () or (outputs,)."""
        return self.fit.intercept


@dataclass(frozen=True, eq=False)
class Selected(Fitted):
    """A tuned model, and what was seen on the way to it.

    Attributes:
        fit: the model of all rows, in the units of the X that was given.
        nodes: of the path, one penalty first.
        chosen: the index of the node whose model `fit` is.
        choice: what spoke for it; None without an outer loop.
        honest: how honest losses were taken: "nested", "alo", or "none".
        rule: what an open gate lets through: "best" or "one_se"; "last" without an outer loop.
        losses: honest losses of rows; None without an outer loop.
        folds: of the outer loop; empty without folds.
        evaluations: of the criterion, those of the outer loop included.
        seconds: processor time.
        remarks: what is worth knowing besides, a sentence each.
        scanned: the criterion at every candidate for the one penalty, the strongest first, where there were candidates.
    """

    nodes: tuple[Node, ...]
    chosen: int
    choice: Choice | None
    honest: str
    rule: str
    losses: HonestLosses | None
    folds: tuple[Fold, ...]
    evaluations: int
    seconds: float
    remarks: tuple[str, ...]
    scanned: tuple[Evaluation, ...] = ()

    @property
    def node(self) -> Node:
        """The chosen node."""
        return self.nodes[self.chosen]

    @property
    def scalar(self) -> Node:
        """The node with one penalty."""
        return self.nodes[0]

    @property
    def open(self) -> bool:
        """Whether the gain of tuning was proved on rows that the tuning had not seen."""
        return self.choice is not None and self.choice.open

    @property
    def summary(self) -> str:
        """Whether tuning generalised, in one sentence."""
        return self.summary_by("")

    def summary_by(self, scorer: str) -> str:
        """Return the same where losses are the scores of a scorer times minus one, without percentages.

        Args:
            scorer: its name; empty for losses.
        """
        count, scalar = self.node.u.size, self.scalar
        if count == 1:
            return f"One penalty, {float(self.node.penalties.flatten()[0]):.4g}, with criterion {self.node.value:.5g}."
        if self.choice is None:
            return f"{count} penalties were tuned without an outer loop: whether that generalises is not known."
        best, proof = self.nodes[self.choice.best], self.choice.proof
        name, better, least = (
            (f"{scorer} ", f"better {scorer}", "best") if scorer else ("", "smaller loss", "least loss")
        )
        node, reached, one = (f"{-each.loss if scorer else each.loss:.5g}" for each in (self.node, best, scalar))
        if scorer and not np.isfinite(scalar.loss):
            return f"One penalty is kept: {scorer} is not finite on all held-out folds."
        if self.choice.best == 0:
            return f"One penalty is kept: no tuned ones have a {better} on held-out rows ({one})."
        figures = f"{name}{reached} against {one} on held-out rows: {proof}"
        if self.open and self.node is not best:
            figures = f"{name}{node} against {one} on held-out rows; the {least}, {reached}, is {proof}"
        if not self.open:
            return f"One penalty is kept: the gain of {count} tuned ones is not proved ({figures})."
        if scorer:
            return f"{count} tuned penalties generalise ({figures})."
        gain = self.node.gain / abs(scalar.loss) if scalar.loss else 0.0
        said = verdict(f"{count} tuned penalties", gain, self.node.gate or math.inf, several=True)
        return f"{said} one penalty's ({figures})."


def nodes_of(
    criterion: Criterion, points: list[PathPoint], losses: HonestLosses | None, choice: Choice | None
) -> tuple[Node, ...]:
    """Return the nodes of a path with their honest losses."""
    judged = judge(len(points), losses, choice)
    return tuple(
        Node(
            tau=point.tau,
            u=point.u,
            penalties=criterion.penalties.spread(point.u).exp(),
            value=point.evaluation.value,
            evaluations=point.evaluations,
            converged=point.converged,
            **each,
        )
        for point, each in zip(points, judged, strict=True)
    )


def judge(count: int, losses: HonestLosses | None, choice: Choice | None) -> list[dict[str, float]]:
    """Return the attributes of `Judged` for so many models, NaN without honest losses."""
    if losses is None or choice is None:
        return [dict.fromkeys(("loss", "std_error", "gain", "gain_error"), math.nan)] * count
    with np.errstate(invalid="ignore"):
        errors = paired(losses.losses, losses.losses[choice.best])[1]
    columns = {"loss": choice.losses, "std_error": errors, "gain": choice.gains, "gain_error": choice.gain_errors}
    return [{name: float(column[index]) for name, column in columns.items()} for index in range(count)]


def remarks_of(criterion: Criterion, point: PathPoint) -> list[str]:
    """Return what is worth knowing of the penalties of a point."""
    off, size = point.u - criterion.data.level, point.u.size
    strong, weak = int((off >= STRONG).sum()), int((off <= -WEAK).sum())
    found = [criterion.remark(point.evaluation), criterion.accuracy(point.evaluation)]
    if point.prior is None and strong:
        found.append("no feature helps: with the one penalty that is best, the model is all but constant.")
    elif point.prior is None and weak:
        found.append("the one penalty that is best is so small that the model is all but unpenalised.")
    elif strong or weak:
        found.append(
            f"of {size} penalties, {strong} all but drop what they penalise, and {weak} are too small to matter."
        )
    return [each for each in found if each]
