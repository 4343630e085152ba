"""`TuningReport`: what tuning has gained, whether held-out rows confirm it, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from tabulate import tabulate

from bilevel.selection import Candidate, Node, Selected

TAU = "tau: how strongly the penalties of a line are held together; at a low tau each is free."


@dataclass(frozen=True, eq=False, repr=False)
class TuningReport:
    """What one penalty reaches, what tuned penalties gain, and whether the gain survived the outer loop.

    Attributes:
        estimator: the name of its class.
        loss_name: what losses of held-out rows are: of a scorer, minus its score.
        criterion: what was descended.
        criterion_name: what its values are.
        honest: how honest losses were taken: "nested", "alo", or "none".
        n_penalties: how many were tuned.
        one_penalty_loss: of held-out rows, with one penalty, or of the first candidate; without an outer loop NaN.
        tuned_loss: of held-out rows, with the best tuned penalties, or the best candidate besides the first, whether or
            not it is less; NaN where there are none.
        gain: one minus their ratio, below 0 where none have a smaller loss; NaN where there are none, and for a
            scorer, whose zero may mean nothing.
        gate: the gain in standard errors.
        kappa: standard errors that were asked for; NaN without an outer loop.
        survived: whether the gain was proved on rows that the tuning had not seen, so that tuned penalties were taken;
            of elastic nets see `bilevel.selection.Combined.open`.
        n_evaluations: of the criterion, those of the outer loop included.
        seconds: processor time.
        summary: all of that in one sentence.
        remarks: what is worth knowing besides, a sentence each.
        nodes: node by node, the same in numbers: `cv_results_` of the estimator.
        n_candidates: models of different kinds that were judged; 0 where there is only the path.
        n_folds: that judged them.
        n_nets: elastic nets that were solved, those of the folds included.
    """

    estimator: str
    loss_name: str
    criterion: str
    criterion_name: str
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
    n_candidates: int = 0
    n_folds: int = 0
    n_nets: int = 0

    def __str__(self) -> str:
        nodes = self.nodes
        chosen = nodes["weight"] if self.n_candidates else nodes["chosen"]
        rows = [
            [
                label,
                nodes["criterion"][index],
                nodes["loss"][index],
                nodes["gain"][index] if index else np.nan,
                nodes["gain_error"][index] if index else np.nan,
                "" if not chosen[index] else f"<- {chosen[index]:.0%}" if self.n_candidates else "<- chosen",
            ]
            for index, label in enumerate(labels_of(nodes))
        ]
        shown = [["" if isinstance(each, float) and np.isnan(each) else each for each in row] for row in rows]
        held_out = self.loss_name if self.loss_name.startswith("minus ") else "loss"
        table = tabulate(
            shown, ["", "criterion", f"held-out {held_out}", "gain", "+-", ""], floatfmt=".5g", tablefmt="simple"
        )
        by = f"by {self.criterion} ({self.criterion_name})"
        head = f"{self.estimator}: {_counted(self.n_penalties, 'penalty', 'penalties')}, tuned {by}"
        solves = [_counted(self.n_evaluations, "evaluation", "evaluations") + " of the criterion"]
        if self.n_candidates:
            judges = _counted(self.n_folds, "held-out fold", "held-out folds")
            head = f"{self.estimator}: {_counted(self.n_candidates, 'candidate', 'candidates')}, judged by {judges}"
            head += f"; ridge penalties {by}" if self.n_evaluations else ""
            solves = [*(solves if self.n_evaluations else ()), _counted(self.n_nets, "elastic net", "elastic nets")]
        cost = f"Cost: {', '.join(solves)}, {self.seconds:.2g} s of processor time."
        legend = [TAU] if any("tau" in each for each in labels_of(nodes)) else []
        notes = [f"Note: {each}" for each in self.remarks]
        return "\n".join([head, "", table, *legend, "", self.summary, *notes, cost])

    __repr__ = __str__


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def summary_of(selected: Selected, scorer: str, penalty: str = "alpha", mean_weight: float = 1.0) -> str:
    """Return whether tuning generalised, in one sentence; by a scorer without percentages.

    Args:
        selected: with scores times minus one as losses, where there is a scorer.
        scorer: its name; empty for the loss.
        penalty: how one penalty is called: "alpha", or "C" for its inverse.
        mean_weight: of the rows.
    """
    if selected.node.u.size > 1:
        return selected.summary_by(scorer)
    alpha = float(np.exp(selected.node.u[0])) * mean_weight
    shown = alpha if penalty == "alpha" else 1.0 / alpha
    return f"One penalty, {penalty} = {shown:.4g}, with criterion {selected.node.value:.5g}."


def labels_of(nodes: dict[str, Any]) -> list[str]:
    """Return what figures and tables call the nodes, or candidates, of a `cv_results_`."""
    if "candidate" in nodes:
        return list(nodes["candidate"])
    return ["one penalty" if np.isinf(tau) else f"tau {tau:g}" for tau in nodes["tau"]]


T = TypeVar("T", Node, Candidate)


def losses_of(models: tuple[T, ...], *, scored: bool = False) -> dict[str, Any]:
    """Return what a report says of the losses of held-out rows: of the first model, and of the best of the others.

    Args:
        models: the simplest first.
        scored: whether losses are minus a score, so that their ratio may mean nothing.
    """
    first = models[0]
    best = min((each for each in models[1:] if np.isfinite(each.loss)), key=lambda each: each.loss, default=None)
    if best is None:
        return {"one_penalty_loss": first.loss, "tuned_loss": np.nan, "gain": np.nan, "gate": 0.0}
    gain = np.nan if scored else best.gain / abs(first.loss) if first.loss else 0.0
    return {"one_penalty_loss": first.loss, "tuned_loss": best.loss, "gain": gain, "gate": best.gate}


def shown(models: tuple[T, ...], of_criterion: float, of_loss: float) -> tuple[T, ...]:
    """Return models with values of the criterion times a factor, and honest losses times another."""
    losses = ("loss", "std_error", "gain", "gain_error")
    factors = {"value": of_criterion} | dict.fromkeys(losses, of_loss)
    return tuple(
        replace(each, **{name: factor * getattr(each, name) for name, factor in factors.items()}) for each in models
    )
