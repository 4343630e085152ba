"""Which node of a path to take: only gains that the honest losses of single rows prove."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bilevel.criteria.criterion import Array
from bilevel.criteria.data import LinearData
from bilevel.problems.losses import GLMLoss, Huber, Squared

FEW_NATS = 50.0
"""Below this sum of a loss that vanishes on separated rows, few rows carry it, and its standard error is too small."""

HALF = 0.5
"""A row with more than this part of the loss keeps the gate closed: the error of a gain is not known from one row."""

PRINTED = 5e-4
"""Gains below this part of a loss are printed as 0.0%."""

ROUNDING = 100.0
"""Predictions that are off by so many units of rounding of y are exact."""

Rule = Literal["best", "one_se"]


@dataclass(frozen=True, eq=False)
class Choice:
    """A node, and what speaks for it.

    Attributes:
        node: the chosen one; 0 is one penalty.
        best: the one with the least honest loss.
        open: whether the gain of the best node over one penalty is more than ``kappa`` standard errors.
        kappa: standard errors that were asked for.
        losses: mean honest loss of every node.
        gains: mean of ``L_0 - L_k`` for every node k, (nodes,).
        gain_errors: their standard errors; infinite for a node that failed.
        lone_row: names a row with more than half of the loss of node 0, which keeps the gate closed; empty without one.
    """

    node: int
    best: int
    open: bool
    kappa: float
    losses: Array
    gains: Array
    gain_errors: Array
    lone_row: str = ""

    @property
    def proof(self) -> str:
        """What speaks for the gain of the best node, or against it, in words."""
        return self.lone_row or in_errors(float(self.gates[self.best]), self.kappa)

    @property
    def gates(self) -> Array:
        """The gains in standard errors, (nodes,); 0 for node 0 and for nodes that failed."""
        known = (self.gain_errors > 0) & np.isfinite(self.gain_errors)
        return np.where(known, self.gains, 0.0) / np.where(known, self.gain_errors, 1.0)


def paired(losses: Array, other: Array) -> tuple[Array, Array]:
    """Return the mean and the standard error ``sd / sqrt(n)`` of differences of losses of the same rows.

    Args:
        losses: of shape (..., rows).
        other: of shape (rows,).

    >>> paired(np.array([3.0, 1.0, 2.0]), np.array([0.0, 0.0, 0.0]))
    (array(2.), array(0.57735027))
    """
    difference: Array = losses - other
    rows = difference.shape[-1]
    deviation = difference.std(-1, ddof=1) if rows > 1 else np.full(difference.shape[:-1], np.inf)
    return np.asarray(difference.mean(-1)), np.asarray(deviation / np.sqrt(rows))


def one_se(losses: Array) -> int:
    """Return the first node whose loss is above the least by at most one standard error of their difference.

    Args:
        losses: honest losses of rows, (nodes, rows), from the simplest node to the richest.
    """
    best = int(np.argmin(losses.mean(1)))
    excess, error = paired(losses, losses[best])
    return int(np.flatnonzero(excess <= error)[0])


def kappa_of(loss: GLMLoss, losses: Array, penalties: int) -> float:
    """Return the standard errors that a gain must have: 1; more where it is easily a mistake, and a costly one.

    That is 3 where rows are nearly separated, so that ten or so carry the loss and its standard error is too small, and
    2 with more than half as many penalties as rows, where true gains are many standard errors and a false one fits the
    rows.

    Args:
        loss: of a row.
        losses: honest losses of rows under one penalty, (rows,).
        penalties: how many there are.
    """
    if loss.separable and float(losses.sum()) < FEW_NATS:
        return 3.0
    return 2.0 if 2 * penalties > len(losses) else 1.0


def rounding_of(loss: GLMLoss, data: LinearData) -> float:
    """Return the mean loss below which all is rounding: predictions that are off by a hundred units of rounding.

    Args:
        loss: of a row.
        data: with y.
    """
    size = ROUNDING * torch.finfo(data.offset.dtype).eps * float(data.y.abs().max())
    return size**2 if isinstance(loss, Squared | Huber) else size


def in_errors(gate: float, kappa: float) -> str:
    """Return a gain in standard errors beside those that were needed, with the digits that tell them apart.

    >>> in_errors(3.66, 1.0), in_errors(1.04, 1.0)
    ('3.7 standard errors, with 1 needed', '1.04 standard errors, with 1 needed')
    """
    digits = next((each for each in range(1, 4) if float(f"{gate:.{each}f}") != kappa), 4)
    return f"{gate:.{digits}f} standard errors, with {kappa:g} needed"


def verdict(who: str, gain: float, gate: float = np.inf, *, loss: str = "loss", several: bool = False) -> str:
    """Return whether a model generalises, in words up to what its loss is smaller than.

    Args:
        who: the model.
        gain: of its loss, as a part of the other one.
        gate: the gain in standard errors.
        loss: how it is called.
        several: whether `who` is a plural.

    >>> verdict("The lasso", 0.031)
    'The lasso generalises: its loss is 3.1% smaller than'
    >>> verdict("10 tuned penalties", 1e-5, several=True)
    '10 tuned penalties gain next to nothing: their loss is less than 0.1% smaller than'
    """
    its, s = ("their", "") if several else ("its", "s")
    if gate <= 1:
        return f"{who} gain{s} no more than a standard error: {its} {loss} is {gain:.1%} smaller than"
    if gain < PRINTED:
        return f"{who} gain{s} next to nothing: {its} {loss} is less than 0.1% smaller than"
    return f"{who} generalise{s}: {its} {loss} is {gain:.1%} smaller than"


def lone_row(losses: Array, rows: NDArray[np.intp]) -> str:
    """Return the name of a row with more than half of the losses of three rows or more; empty where none has.

    Args:
        losses: of shape (rows,).
        rows: their indices.

    >>> lone_row(np.array([0.1, 0.8, 0.1]), np.array([4, 7, 9]))
    'row 7 (counted from 0) alone makes 80% of the loss'
    """
    worst = int(np.argmax(losses))
    if len(losses) < 3 or not losses[worst] > HALF * losses.sum():
        return ""
    return f"row {rows[worst]} (counted from 0) alone makes {losses[worst] / losses.sum():.0%} of the loss"


def choose(
    losses: Array,
    kappa: float,
    rule: Rule = "best",
    rounding: float = 0.0,
    rows: NDArray[np.intp] | None = None,
) -> Choice:
    """Return the best node, or the first within a standard error of it, where its gain over one penalty is proved.

    Node 0 is kept unless ``mean(L_0 - L_b) > max(kappa se, rounding)``, with b the node of the least honest loss, and
    no row makes more than half of L_0. By "one_se" kappa is at least 1: with less, node 0 could be the first.

    Args:
        losses: honest losses of rows, (nodes, rows), one penalty first; nodes with losses that are not finite are out.
        kappa: standard errors of the gain that are asked for.
        rule: "best", or "one_se" where honest losses still flatter the nodes with weak hyperpriors.
        rounding: gains up to this are none: see `rounding_of`.
        rows: indices of the rows, (rows,); None where one of them may make more than half, as scores of folds do.
    """
    kappa = max(kappa, 1.0) if rule == "one_se" else kappa
    fine = np.isfinite(losses.sum(1))
    usable: NDArray[np.intp] = np.flatnonzero(fine | (np.arange(len(losses)) == 0))
    means = np.where(fine, np.where(fine[:, None], losses, 0.0).mean(1), np.inf)
    gains, errors = np.full(len(losses), -np.inf), np.full(len(losses), np.inf)
    mean, error = paired(losses[usable], losses[0])
    gains[usable], errors[usable] = -mean, error
    best = int(usable[np.argmin(means[usable])])
    lone = "" if rows is None else lone_row(losses[0], rows)
    proved = not lone and bool(gains[best] > max(kappa * errors[best], rounding))
    node = 0 if not proved else best if rule == "best" else int(usable[one_se(losses[usable])])
    return Choice(node, best, proved, kappa, means, gains, errors, lone)
