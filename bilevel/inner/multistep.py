"""Linear multistep first-order methods: combine stored vectors, evaluate one gradient, combine again.

With stored vectors ``s_1, ..., s_p`` (``s_1`` is the iterate), one step is

    y = sum_i read_i s_i,      g = grad(y),      s_j <- sum_i mix_ji s_i + write_j g

so its VJP needs one `vjp` oracle call at y and vector arithmetic, written once here for every such method:

    g' = sum_j write_j s_j',   (y', u') = vjp(g'),   s_i' <- sum_j mix_ji s_j' + read_i y'
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from bilevel.base import InnerSolver, InnerState, Traits
from bilevel.base.traits import STEPS
from bilevel.core import rows, tree
from bilevel.core.options import is_number, is_positive, option, or_auto, require
from bilevel.core.tree import Tree
from bilevel.inner.coefficients import Coefficients, CoefficientStep, RowwiseMultistep
from bilevel.numerics.lanczos import CURVATURE_MARGIN, Spectrum
from bilevel.oracles.inner_problem import InnerProblem

Measured = TypeVar("Measured")


def of_each_row(
    inner: InnerProblem, params: Tree, measure: Callable[[InnerProblem, Tree], Measured]
) -> list[Measured | None]:
    """Measure each member of a batch alone; None for one that gives no numbers, which fails without the others."""
    results: list[Measured | None] = []
    failures: list[Exception] = []
    for index in range(inner.problem.batch):
        try:
            results.append(measure(inner.member(index), rows.row(params, index)))
        except (ValueError, RuntimeError) as error:
            results.append(None)
            failures.append(error)
    if len(failures) == len(results):
        raise failures[0]
    return results


@dataclass(frozen=True)
class LinearMultistep(CoefficientStep):
    """Base of the methods above; a subclass gives `coefficients` and, with more than one vector, `vectors`."""

    traits = Traits(rowwise=True, multistep=True)

    @abstractmethod
    def coefficients(self, state: InnerState) -> Coefficients:
        """Return the numbers of the step that starts from `state` (``state.steps`` is its index)."""

    def vectors(self, params: Tree) -> tuple[Tree, ...]:
        """Return the stored vectors besides the iterate at a cold start; none by default."""
        return ()

    @property
    def follows_coefficients(self) -> bool:
        """Whether no subclass takes a step, or differentiates it, in another way."""
        return self._as_here(STEPS)

    @property
    def begins_as_given(self) -> bool:
        """Whether no subclass begins elsewhere than at the params that it is given."""
        return self._as_here(("init", "cold_state", "warm_start"))

    def _as_here(self, names: tuple[str, ...]) -> bool:
        return all(getattr(type(self), name) is getattr(LinearMultistep, name) for name in names)

    @property
    def automatic(self) -> bool:
        """Whether an option is "auto"."""
        return False

    def tune(self, spectrum: Spectrum) -> dict[str, float]:
        """Return what "auto" options become for a measured spectrum; ValueError where nothing follows from it."""
        return {}

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        return replace(self.cold_state(inner, params), measured=self._measure(inner, params))

    def cold_state(self, inner: InnerProblem, params: Tree) -> InnerState:
        return InnerState(params, self.vectors(params))

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Keep all stored vectors; measure "auto" options anew, as the curvature moves with the hyperparameters."""
        return InnerState(state.params, state.memory, 0, self._measure(inner, state.params))

    def _measure(self, inner: InnerProblem, params: Tree) -> dict[str, Any]:
        if not self.automatic:
            return {}
        if inner.problem.batch is not None:
            each = of_each_row(inner, params, self._measure)
            names = next(one for one in each if one is not None)
            return {name: tuple(math.nan if one is None else one[name] for one in each) for name in names}
        spectrum = inner.curvature(params)
        self._check_curvature(spectrum.largest, torch.finfo(tree.leaves(params)[0].dtype).max)
        return {"largest_curvature": spectrum.largest} | self.tune(spectrum)

    def _check_curvature(self, largest: float, most: float) -> None:
        """Refuse a curvature that gives no step size, or one that the dtype cannot hold."""
        if not math.isfinite(largest) or 0 < abs(largest) < 4.0 / most:
            raise ValueError(
                f"{type(self).__name__} takes its 'auto' options from the largest curvature, which is {largest:g} "
                "here: give numbers, or use QuasiNewton() or Newton(), which need no bound, or scale the inner loss."
            )

    def for_rows(self, state: InnerState) -> InnerSolver:
        if not state.measured:
            return self
        return RowwiseMultistep(of=self.coefficients, settled=self.traits.stationary_from is not None, state=state)

    def option(self, name: str, state: InnerState) -> float:
        """Return the value of an option that may be "auto"."""
        value = getattr(self, name)
        return state.measured[name] if value == "auto" else value


@dataclass(frozen=True)
class StepSizeMethod(LinearMultistep):
    """Base of the methods with a constant step size.

    Args:
        step_size: a positive number, or "auto": from the largest curvature, measured at the start of each solve with a
            margin of 2 % and shown in ``certificate.measured``.
    """

    step_size: float | str = option("auto", "a positive number or 'auto'", or_auto(is_positive))

    @property
    def automatic(self) -> bool:
        return self.step_size == "auto"

    def tune(self, spectrum: Spectrum) -> dict[str, float]:
        """Return 1/L; ValueError if no curvature is positive."""
        if not spectrum.largest > 0:
            raise ValueError(
                f"{type(self).__name__}(step_size='auto') measured a largest curvature of {spectrum.largest:.3g} "
                "at the start, so no step size follows: add a penalty to the inner loss, give `step_size` a number, "
                "or start elsewhere."
            )
        return {"step_size": 1.0 / (CURVATURE_MARGIN * spectrum.largest)}


@dataclass(frozen=True)
class MomentumMethod(StepSizeMethod):
    """Base of the methods that keep the previous iterate: one step size, one momentum.

    Args:
        momentum: a number in [0, 1), or "auto": from the measured ends of the spectrum.
    """

    momentum: float | str = option(0.9, "a number in [0, 1) or 'auto'", or_auto(lambda m: is_number(m) and 0 <= m < 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum == "auto":
            require(self, "step_size", "'auto' where `momentum` is", self.step_size == "auto")

    def vectors(self, params: Tree) -> tuple[Tree, ...]:
        """The previous iterate, equal to the first: the first step has no momentum."""
        return (params,)

    def inverse_condition(self, spectrum: Spectrum) -> float:
        """Return l / L as measured, kept inside (0, 1): Lanczos finds the lower end late and from above."""
        return min(max(spectrum.smallest / (CURVATURE_MARGIN * spectrum.largest), 1e-8), 1.0)
