"""Whether the losses are functions: the same arguments give the same bits, whatever was called in between."""

from __future__ import annotations

from torch import Tensor

from bilevel.check.report import Finding
from bilevel.check.subject import Subject
from bilevel.core import tree
from bilevel.oracles.contents import apart


def evaluation(subject: Subject) -> list[Tensor]:
    """Return both losses and the inner gradient at the start, as bits to compare."""
    values = subject.values(subject.start, subject.hparams)
    return [*values, *tree.leaves(subject.gradient(subject.start, subject.hparams))]


def determinism(subject: Subject) -> Finding:
    """Call both losses twice, with calls elsewhere in between: the bits must be the same."""
    first = evaluation(subject)
    subject.values(subject.away[0], subject.hparams)
    return still_the_same(first, subject)


def still_the_same(first: list[Tensor], subject: Subject) -> Finding:
    """Judge whether the losses still give the bits that they gave first."""
    difference = apart(first, evaluation(subject), rounding=0.0)
    if not difference > 0:
        return Finding("determinism", "ok", "two calls with the same arguments give the same bits.", 0.0)
    sentence = (
        f"the same call gives other numbers (relative difference {difference:.1e}): a loss depends on a state that "
        "moves from call to call (a counter, a running statistic, a cache); make it a function of params and hparams "
        "alone."
    )
    return Finding("determinism", "fault", sentence, difference)
