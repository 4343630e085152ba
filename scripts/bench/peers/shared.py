"""Data, outer loops and arithmetic that contestants share, so that all of them do the same work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OUTER_RATE = 0.1
EARLIER = "6140b17"
"""The commit of this library from before steps were doubled, flat or traced."""
BEFORE = f"bilevel {EARLIER}"


def earlier(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what makes the calls of this library as they were at the commit `EARLIER`, of which git makes a copy."""

    def prepared(d: Any) -> Any:
        root = Path(__file__).parents[3]
        folder = root / "runs" / "bench" / f"commit-{EARLIER}"
        if not folder.exists():
            part = folder.with_suffix(f".{os.getpid()}")
            part.mkdir(parents=True)
            packed = subprocess.run(["git", "archive", EARLIER, "bilevel"], cwd=root, check=True, capture_output=True)
            subprocess.run(["tar", "-x", "-C", str(part)], input=packed.stdout, check=True)
            part.rename(folder)
        sys.path.insert(0, str(folder))
        return prepare(d)

    return prepared


def adam(hypergradient: Callable[[Any], Any], start: Any, steps: int, rate: float = OUTER_RATE) -> Any:
    """Descend by Adam (Kingma & Ba 2015, Algorithm 1); return the hypergradient of the last step.

    Args:
        hypergradient: hparams -> hypergradient, NumPy arrays; it may carry a warm start from call to call.
        start: hyperparameters to start from.
        steps: hypergradients taken.
        rate: step size.
    """
    u = np.array(start, dtype=np.float64)
    first, second = np.zeros_like(u), np.zeros_like(u)
    for step in range(1, steps + 1):
        gradient = np.asarray(hypergradient(u), dtype=np.float64)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        u = u - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return gradient


def conjugate_gradients(matvec: Callable[[Any], Any], b: Any, x: Any, tol: float) -> Any:
    """Return the solution of ``A x = b`` to a relative residual (Hestenes & Stiefel 1952), on NumPy arrays."""
    r = b - matvec(x)
    p, rr, limit = r, r @ r, (tol**2) * (b @ b)
    while rr > limit:
        Ap = matvec(p)
        alpha = rr / (p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        rr, old = r @ r, rr
        p = r + (rr / old) * p
    return x


def breast_cancer(seed: int) -> tuple[Any, ...]:
    """Return 341 training and 228 validation rows of breast_cancer, standardized, with -1/+1 targets."""
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    train, val = order[:341], order[341:]
    X = (X - X[train].mean(0)) / X[train].std(0)
    y = 2.0 * y - 1.0
    return X[train], y[train], X[val], y[val]


def digits(seed: int, rows: int = 898, classes: int = 10) -> tuple[Any, ...]:
    """Return rows of digits for training and the rest (at most 899) for validation, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X, y = X[y < classes] / 16.0, y[y < classes]
    order = np.random.default_rng(seed).permutation(len(X))
    train, val = order[:rows], order[rows : rows + 899]
    return X[train], y[train], X[val], y[val]


def warm_torch() -> None:
    """Import what torch imports at the first second derivative and the first optimizer (seconds and tens of MB)."""
    import torch

    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(x**3, x, create_graph=True)
    torch.autograd.grad(g, x, torch.ones_like(g))
    # The first optimizer imports the compiler.
    torch.optim.Adam([x])


def torch_adam(tensors: Any) -> Any:
    """Return torch's Adam with the step size that every contestant uses."""
    import torch

    return torch.optim.Adam(tensors, lr=OUTER_RATE)
