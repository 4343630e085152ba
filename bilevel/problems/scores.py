"""Figures of merit of predictions."""

from __future__ import annotations

from torch import Tensor


def accuracy(z: Tensor, y: Tensor) -> float:
    """Return the share of predictions with the sign of their label."""
    return float((z * y > 0).double().mean())


def r_squared(z: Tensor, y: Tensor) -> float:
    """Return ``1 - |z - y|^2 / |y - mean(y)|^2``; NaN for constant targets."""
    spread = (y - y.mean()).square().sum()
    return float(1.0 - (z - y).square().sum() / spread) if bool(spread > 0) else float("nan")
