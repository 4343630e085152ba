"""Whether the losses are functions: the same arguments give the same bits, whatever was called in between."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import tree
from bilevel.captured import versions
from bilevel.check.report import Finding
from bilevel.check.subject import Subject


def evaluation(subject: Subject) -> list[Tensor]:
    """Return both losses and the inner gradient at the start, as bits to compare."""
    values = subject.values(subject.start, subject.hparams)
    return [*values, *tree.leaves(subject.gradient(subject.start, subject.hparams))]


def determinism(subject: Subject) -> Finding:
    """Call both losses twice, with calls elsewhere in between: the bits must be the same, and no state may move."""
    generators, states = _generators(), versions(subject.given)
    first = evaluation(subject)
    subject.values(subject.away[0], subject.hparams)
    difference = _apart(first, evaluation(subject))
    moved = [name for name, state in _generators().items() if not _same(state, generators[name])]
    changed = [name for name, version in versions(subject.given).items() if version != states.get(name, version)]
    if difference > 0:
        return Finding("determinism", "fault", _cause(difference, moved, changed), difference)
    if moved or changed:
        what = f"draw from {moved[0]}" if moved else f"write into `{changed[0]}`"
        return Finding(
            "determinism", "note", f"the losses {what}, although two calls give the same bits: is that meant?"
        )
    if subject.given.sampler is not None and (finding := _sampler(subject)):
        return finding
    return Finding("determinism", "ok", "two calls with the same arguments give the same bits.", 0.0)


def still_the_same(first: list[Tensor], subject: Subject) -> Finding | None:
    """Return a fault if the losses no longer give the bits that they gave before all other checks."""
    difference = _apart(first, evaluation(subject))
    if difference == 0:
        return None
    return Finding("determinism", "fault", _cause(difference, [], []), difference)


def _sampler(subject: Subject) -> Finding | None:
    sampler: Any = subject.given.sampler
    first = [leaf.clone() for leaf in tree.leaves(sampler(0))]
    sampler(1)
    difference = _apart(first, tree.leaves(sampler(0)))
    if difference == 0:
        return None
    return Finding(
        "determinism",
        "fault",
        "the sampler returns another batch when a step is asked for again, so the way back differentiates other steps "
        "than were taken: make it a function of the step index alone, such as MiniBatches.",
        difference,
    )


def _cause(difference: float, moved: list[str], changed: list[str]) -> str:
    same = f"the same call gives other numbers (relative difference {difference:.1e})"
    if moved:
        return (
            f"{same} and draws from {moved[0]}: dropout, shuffling or noise at each call has no hypergradient; call "
            "module.eval(), draw once outside of the loss, or hand batches over by MiniBatches."
        )
    if changed:
        return f"{same}: a loss writes into `{changed[0]}`; keep what changes in params, or work on a copy."
    return (
        f"{same} without drawing random numbers: a loss depends on a state that moves from call to call (a counter, a "
        "running statistic, a cache); make it a function of params and hparams alone."
    )


def _generators() -> dict[str, Any]:
    """Return the states of the generators that a loss may draw from without being given one."""
    found: dict[str, Any] = {"torch's global generator": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["CUDA's generator"] = torch.cuda.get_rng_state()
    found["numpy's global generator"] = np.random.get_state()[1]  # type: ignore[index]  # noqa: NPY002 (the global one is meant)
    found["Python's `random`"] = random.getstate()
    return found


def _same(a: Any, b: Any) -> bool:
    return bool(torch.equal(a, b)) if isinstance(a, Tensor) else bool(np.all(a == b))


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
