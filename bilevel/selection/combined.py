"""`Combined`: candidates of different kinds, what held-out rows say of each, and the model made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bilevel.criteria.criterion import Array, Fit
from bilevel.selection.gate import Choice, verdict
from bilevel.selection.honest import Fold, HonestLosses
from bilevel.selection.selected import Fitted, Judged


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate(Judged):
    """A model of all rows.

    Attributes:
        name: what reports call it.
        fit: the model, in the units of the X that was given.
        penalties: a, ([outputs,] features), of ``mean loss + sum_j a_j (r |w_j| + (1 - r)/2 w_j^2)``, of standardised
            columns.
        l1_ratio: r; 0 for ridge regression.
        value: of the criterion on all rows, of ridge regression; else NaN.
        weight: its share of the final model.
    """

    name: str
    fit: Fit
    penalties: Tensor
    l1_ratio: float
    value: float
    weight: float


@dataclass(frozen=True, eq=False)
class NetPath:
    """An elastic net on a grid of penalties.

    Attributes:
        l1_ratios: (ratios,).
        alphas: decreasing for each ratio, (ratios, m).
        losses: weighted mean loss of the rows that each fold holds out, (ratios, m, folds); the least mean of a grid is
            flattered by its choice, which `Candidate.loss` is not.
        alpha: where the mean loss of all held-out rows is least.
        l1_ratio: likewise.
        dual_gap: of the model of all rows there; NaN for losses other than the squared one.
        rounds: of the solver for that model.
    """

    l1_ratios: Array
    alphas: Array
    losses: Array
    alpha: float
    l1_ratio: float
    dual_gap: float
    rounds: int


@dataclass(frozen=True, eq=False)
class Combined(Fitted):
    """The model of an `elastic_cv`, and what was seen on the way to it.

    Attributes:
        fit: the model of all rows, in the units of the X that was given.
        candidates: the simplest first.
        choice: what spoke for the best of them.
        net: the elastic net's grid.
        losses: honest losses of rows.
        folds: of the outer loop.
        evaluations: of the criterion of ridge regression, those of the outer loop included.
        solved: elastic nets and adaptive lassos that were, likewise.
        converged: whether no solver and no descent has used up its steps.
        seconds: processor time.
        remarks: what is worth knowing besides, a sentence each.
    """

    candidates: tuple[Candidate, ...]
    choice: Choice
    net: NetPath
    losses: HonestLosses
    folds: tuple[Fold, ...]
    evaluations: int
    solved: int
    converged: bool
    seconds: float
    remarks: tuple[str, ...]

    @property
    def open(self) -> bool:
        """Whether the gain over the simplest candidate was proved on rows that its penalties were not chosen by.

        Ridge penalties of a fold are tuned without the rows that it holds out. The point of an elastic net's grid has
        the least loss of the other folds' rows; their models have seen these rows, which still flatters it a little.
        """
        return self.choice.open

    @property
    def best(self) -> Candidate:
        """The candidate with the least honest loss."""
        return self.candidates[self.choice.best]

    @property
    def chosen(self) -> int:
        """The index of the candidate with the largest weight."""
        return max(range(len(self.candidates)), key=lambda index: self.candidates[index].weight)

    @property
    def summary(self) -> str:
        """Which model was taken, and why, in one sentence."""
        return self.summary_by("")

    def summary_by(self, scorer: str) -> str:
        """Return the same where losses are the scores of a scorer times minus one.

        Args:
            scorer: its name; empty for losses.
        """
        first, best, choice = self.candidates[0], self.best, self.choice
        least, of, sign = (f"better {scorer}", f"{scorer} ", -1.0) if scorer else ("smaller loss", "", 1.0)
        shown, reached = f"{sign * first.loss:.5g}", f"{sign * best.loss:.5g}"
        if not np.isfinite(first.loss):
            return f"The {first.name} is kept: {scorer} is not finite on all held-out folds."
        if len(self.candidates) == 1:
            return f"The {first.name} is the only candidate: its {scorer or 'loss'} on held-out rows is {shown}."
        taken = [each for each in self.candidates if each.weight > 0]
        shares = ", ".join(f"{each.weight:.0%} {each.name}" for each in sorted(taken, key=lambda each: -each.weight))
        ungated = not choice.open and first.weight < 1
        if ungated and best is first:
            return f"The model is {shares}, without a gate: no other has a {least} than the {first.name}."
        if best is first:
            return f"The {first.name} is kept: no other has a {least} on held-out rows ({shown})."
        figures = f"{of}{reached} against {shown} on held-out rows"
        proof = choice.proof
        if ungated:
            doubt = f"the gain of the {best.name} is not proved ({figures}: {proof})"
            return f"The model is {shares}, without a gate: {doubt}."
        if not choice.open:
            return f"The {first.name} is kept: the gain of the {best.name} is not proved ({figures}: {proof})."
        if scorer:
            return f"The {best.name} generalises ({figures}: {proof})."
        gain = best.gain / abs(first.loss) if first.loss else 0.0
        model = f" The model is {shares}." if len(taken) > 1 else ""
        return f"{verdict(f'The {best.name}', gain)} that of the {first.name} ({figures}: {proof}).{model}"
