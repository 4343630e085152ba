"""Where the curse of unrolling peaks, and how high; arguments as in `bilevel.theory.rates`."""

# ruff: noqa: E741 (l and L are the field's names of the ends of the spectrum)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bilevel.core.options import is_positive
from bilevel.theory.checks import demand, numbers
from bilevel.theory.rates import chebyshev_rate, check_interval, gd_rate


@dataclass(frozen=True)
class Peak:
    """The largest value of an error curve, its step, and its ratio to the one at step 0; 1 where there is no curse."""

    index: int
    value: float
    ratio: float


def curse_peak(curve: Any) -> Peak:
    """Return index and height of the largest error of a curve, by argmax (the first, where several are equal).

    The errors at steps 0, 1, ... are one row of finite numbers, 0 or more. For the worst cases in closed form see
    `gd_peak` and `chebyshev_peak`; for any other method take `bilevel.theory.worst_case_curve`.

    >>> curse_peak([1.0, 3.0, 2.0])
    Peak(index=1, value=3.0, ratio=3.0)
    """
    values = curve.detach().cpu().numpy() if isinstance(curve, Tensor) else np.asarray(curve)
    ok = values.ndim == 1 and values.size > 0 and numbers(values) and bool((values >= 0).all())
    demand("curse_peak", "curve", "one row of finite numbers, 0 or more", curve, ok)
    index = int(np.argmax(values))
    value, start = float(values[index]), float(values[0])
    return Peak(index, value, value / start if start > 0 else math.inf if value > 0 else 1.0)


def gd_peak(l: float, L: float, step_size: float | None = None) -> Peak:
    """Return the exact peak of `gd_rate` with G = 0 and D_0 = 1 (Scieur et al. 2022, Corollary 1, with its constants).

    The mode at lam = L grows while ``t < 2 (u - 1) / (u (2 - u))``, ``u = h L``. For h = 2/(L+l) that is
    ``(1 - kappa^2) / (2 kappa)``, the default, and the height is about ``1 / (e kappa)``. The index is 0 where the
    curve never exceeds its start.

    >>> gd_peak(1e-3, 1.0).index
    500
    """
    check_interval("gd_peak", l, L)
    u = (2.0 / (1.0 + l / L)) if step_size is None else step_size * L
    demand("gd_peak", "step_size", f"a number in (0, 2/L) = (0, {2 / L:.6g})", step_size, is_positive(u) and u < 2)
    # 2 - u = 2 kappa / (1 + kappa) for the default, without cancellation.
    gap = 2.0 * l / (L + l) if step_size is None else 2.0 - u
    index = max(math.ceil(2.0 * (u - 1.0) / (u * gap) - 1e-9), 0)
    value = float(gd_rate(index, l, L, step_size=u / L)) if index else 1.0
    return Peak(index, value, value) if value > 1.0 else Peak(0, 1.0, 1.0)


def chebyshev_peak(l: float, L: float) -> Peak:
    """Return the exact peak of `chebyshev_rate` with G = 0 and D_0 = 1 (Scieur et al. 2022, Theorem 3).

    For small kappa it lies at ``1.0327 / sqrt(kappa)`` (``tanh z = 2/z``, ``z = 2 sqrt(kappa) t``) and is
    ``0.532 / kappa`` high. The index is 0 where the curve never exceeds its start.

    >>> peak = chebyshev_peak(1e-3, 1.0)
    >>> peak.index, round(peak.value, 2)
    (33, 532.08)
    """
    check_interval("chebyshev_peak", l, L)
    demand("chebyshev_peak", "l", f"below L={L:g}", l, l < L)
    near = 1.0327 * math.sqrt(L / l)
    steps = np.unique(np.rint(np.linspace(max(0.7 * near - 5, 0.0), 1.3 * near + 5, 2000)))
    for _ in range(4):  # the curve has one maximum: look closer around the best step so far
        best = steps[int(np.argmax(chebyshev_rate(steps, l, L)))]
        width = max(3.0, float(np.diff(steps).max()))
        steps = np.unique(np.rint(np.linspace(max(best - 2 * width, 0.0), best + 2 * width, 2000)))
    curve = chebyshev_rate(steps, l, L)
    index = int(np.argmax(curve))
    value = float(curve[index])
    return Peak(int(steps[index]), value, value) if value > 1.0 else Peak(0, 1.0, 1.0)
