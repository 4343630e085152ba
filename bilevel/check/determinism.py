"""Whether the losses are functions: the same arguments give the same bits, whatever was called in between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.check.report import Finding
from bilevel.check.subject import Subject
from bilevel.core import tree


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
    difference = _apart(first, evaluation(subject))
    if not difference > 0:
        return Finding("determinism", "ok", "two calls with the same arguments give the same bits.", 0.0)
    sentence = (
        f"the same call gives other numbers (relative difference {difference:.1e}): a loss depends on a state that "
        "moves from call to call (a counter, a running statistic, a cache); make it a function of params and hparams "
        "alone."
    )
    return Finding("determinism", "fault", sentence, difference)


def _apart(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest relative difference; zero for the same bits, with NaN equal to NaN."""
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return math.inf
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            size = float(torch.linalg.vector_norm(a.detach().double()))
            apart = float(torch.linalg.vector_norm(a.detach().double() - b.detach().double()))
            largest = max(largest, apart / size if size > 0 else apart)
    return largest
