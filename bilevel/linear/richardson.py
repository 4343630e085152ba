"""Neumann series and fixed-point iteration: ``x <- x + h (b - A x)``."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

import torch

from bilevel.base import BLOW_UP, LinearSolution, LinearSolver, LinearSystem
from bilevel.core.device import check_interval
from bilevel.core.options import is_int, is_positive, option, optional, or_auto, require
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.numerics.lanczos import CURVATURE_MARGIN, Spectrum, lanczos


@dataclass(frozen=True)
class _Richardson(LinearSolver):
    """What both share: the step size and the iteration."""

    step_size: float | str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "step_size", "a positive number or 'auto'", or_auto(is_positive)(self.step_size))

    @property
    def requires(self) -> Set[str]:  # type: ignore[override]
        """Symmetry where the step size is measured, by a process for symmetric matrices."""
        return frozenset({"symmetric"} if self.step_size == "auto" else ())

    def _iterate(self, system: LinearSystem, limit: int, tol: float | None) -> LinearSolution:
        """Run at most `limit` steps, fewer once the relative residual is at most `tol` (None: exactly `limit`)."""
        matvec, b, name = system.matvec, system.b, type(self).__name__
        if isinstance(self.step_size, str):
            spectrum = lanczos(matvec, b)
            refused = _judge_spectrum(spectrum, name, torch.finfo(b.dtype).eps)
            if refused is not None:
                return LinearSolution(torch.zeros_like(b), 1.0, spectrum.steps, refused)
            h = 1.0 / (CURVATURE_MARGIN * spectrum.largest)
        else:
            h = self.step_size
        scale = torch.linalg.vector_norm(b)
        every = check_interval(b.device)
        x, r = system.start()
        first = float(torch.linalg.vector_norm(r) / scale)
        steps = 0
        while steps < limit:
            if tol is not None and steps % every == 0 and bool(torch.linalg.vector_norm(r) <= tol * scale):
                break
            # In place, but for the caller's start; and the old residual has done its work.
            x = torch.add(x, r, alpha=h, out=x if steps else None)
            del r
            r = b - matvec(x)
            steps += 1
        residual = float(torch.linalg.vector_norm(r) / scale)
        at = f"{name} stopped after {steps} steps at the relative residual {residual:.2e}"
        if residual != residual:
            verdict = Verdict(Status.NOT_FINITE, f"{name} met a NaN or infinite product within {steps} steps")
        elif residual > max(first, 1.0 if tol is not None else BLOW_UP):
            verdict = Verdict(Status.LINEAR_DIVERGED, f"{at}, from {first:.2e}, with step_size={h:.3g}")
        elif tol is not None and residual > tol:
            verdict = Verdict(Status.LINEAR_NOT_CONVERGED, f"{at}, above tol={tol:.1e}")
        else:
            verdict = GOOD
        return LinearSolution(x, residual, steps, verdict)


@dataclass(frozen=True)
class FixedPointIteration(_Richardson):
    """``x <- x + h (b - A x)`` until the residual is small (Richardson's iteration).

    Converges for a symmetric positive definite A and ``0 < h < 2/L``; each step costs one product and one vector.

    Args:
        step_size: h, or "auto": 1/L with L measured by Lanczos.
        tol: relative residual to reach; default ``eps ** (2/3)`` (3.7e-11 in float64).
        max_steps: most iterations.

    >>> matrix = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    >>> x = FixedPointIteration().solve(lambda v: matrix @ v, torch.tensor([2.0, 4.0], dtype=torch.float64)).x
    >>> torch.allclose(x, torch.ones(2, dtype=torch.float64))
    True
    """

    tol: float | None = option(None, "a positive number or None", optional(is_positive))
    max_steps: int = option(10_000, "a positive int", is_int)

    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        return self._iterate(system, self.max_steps, system.tol)


@dataclass(frozen=True)
class Neumann(_Richardson):
    """The truncated Neumann series ``h sum_{j<steps} (I - h A)^j b`` (Lorraine et al. 2020).

    Exactly `steps` terms from zero: an approximation by design, whose relative residual the certificate shows; above 10
    it has diverged. It starts from zero always, so a warm start does not change it. To measure the step size takes up
    to 30 products and as many vectors: for large networks give a number. For gradient descent with the same h at its
    fixed point it equals a truncated unroll with ``tail = steps``.

    Args:
        steps: number of terms.
        step_size: h, or "auto": 1/L with L measured by Lanczos.

    >>> matrix = torch.tensor([[0.5]], dtype=torch.float64)
    >>> Neumann(steps=2, step_size=1.0).solve(lambda v: matrix @ v, torch.tensor([1.0], dtype=torch.float64)).x
    tensor([1.5000], dtype=torch.float64)
    """

    steps: int = option(20, "a positive int", is_int)

    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        return self._iterate(replace(system, x0=None), self.steps, None)


def _judge_spectrum(spectrum: Spectrum, name: str, eps: float) -> Verdict | None:
    """Refuse a measured spectrum that no automatic step size fits."""
    if spectrum.largest != spectrum.largest:
        return Verdict(Status.NOT_FINITE, f"{name} met a NaN or infinite product after {spectrum.steps} steps")
    if spectrum.smallest < -1e3 * eps * abs(spectrum.largest):
        detail = f"{name} met the curvature {spectrum.smallest:.3g} while it measured its step size"
        return Verdict(Status.NEGATIVE_CURVATURE, f"{detail}; a damping above {-spectrum.smallest:.3g} would lift it")
    if spectrum.largest <= 0:
        return Verdict(Status.SINGULAR, f"{name} met no curvature at all while it measured its step size")
    return None
