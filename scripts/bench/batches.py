"""Batches: many members as one run against a Python loop over them, interleaved, with the largest relative error.

Asked: results equal to 1e-12, and a shorter time where members are small. Time is process CPU time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import emit, relative_error

import bilevel as bl
from bilevel.problems import LogisticProblem, RidgeProblem

F64 = torch.float64
ROUNDS = 7


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def logistic(seed: int) -> LogisticProblem:
    """A logistic regression of 50 rows and 30 features."""
    X, X_val, w = normal(seed, 50, 30), normal(seed + 1000, 50, 30), normal(seed + 2000, 30)
    return LogisticProblem(X, (X @ w > 0).long(), X_val, (X_val @ w > 0).long())


def ridge() -> RidgeProblem:
    """A ridge regression of 100 rows and 30 features."""
    X, X_val, w = normal(1, 100, 30), normal(2, 50, 30), normal(3, 30)
    return RidgeProblem(X, X @ w + normal(4, 100), X_val, X_val @ w)


def network_inner(params: Any, log_decay: torch.Tensor, data: Any) -> torch.Tensor:
    """Squared error of a network with one hidden layer of 32 units, and its weight decay."""
    X, y, _, _ = data
    left = torch.tanh(X @ params["first"]) @ params["second"] - y
    decay = params["first"].square().sum() + params["second"].square().sum()
    return left.square().mean() + log_decay.exp() * decay


def network_outer(params: Any, log_decay: torch.Tensor, data: Any) -> torch.Tensor:
    """Squared error on the validation rows."""
    _, _, X, y = data
    return (torch.tanh(X @ params["first"]) @ params["second"] - y).square().mean()


def network(seed: int) -> bl.BilevelProblem:
    """A small network with data of its own: 64 rows, 20 inputs."""
    X, X_val = normal(seed, 64, 20), normal(seed + 1000, 64, 20)
    params = {"first": 0.2 * normal(seed + 2000, 20, 32), "second": 0.2 * normal(seed + 3000, 32)}
    return bl.BilevelProblem(network_inner, network_outer, params, data=(X, X[:, 0].sin(), X_val, X_val[:, 0].sin()))


def measure(name: str, single: list[Any], batch: Any, solver: Any, estimator: Any, asked: float) -> bool:
    """Time one case: all members as a batch, and one after the other."""
    hparams = torch.linspace(-4.0, -1.0, len(single), dtype=F64)

    def together() -> torch.Tensor:
        return bl.hypergradient(batch, solver, estimator, hparams, batch=len(single), check=False).hypergradient

    def loop() -> torch.Tensor:
        pairs = zip(single, hparams, strict=True)
        return torch.stack([bl.hypergradient(p, solver, estimator, u, check=False).hypergradient for p, u in pairs])

    error = relative_error(together(), loop())
    seconds: dict[str, list[float]] = {"batch": [], "loop": []}
    calls: list[tuple[str, Callable[[], Any]]] = [("batch", together), ("loop", loop)]
    for _ in range(ROUNDS):
        for key, function in calls:
            start = time.process_time()
            function()
            seconds[key].append(time.process_time() - start)
    ratio = statistics.median(a / b for a, b in zip(seconds["loop"], seconds["batch"], strict=True))
    return emit(
        f"batch: {name}: time of a loop / of the batch",
        ratio,
        f"at least {asked:g} at results equal to 1e-12",
        ratio >= asked and error <= 1e-12,
        relative_error=error,
        cpu_milliseconds={key: 1e3 * statistics.median(values) for key, values in seconds.items()},
    )


def main() -> bool:
    """Measure all cases."""
    tasks, networks, one = [logistic(s) for s in range(16)], [network(s) for s in range(16)], ridge()
    step = bl.GradientDescent(step_size=0.1, steps=50)
    return all([
        measure("16 logistic, n=50, d=30, K=50", tasks, bl.stack(tasks), step, bl.FullUnroll(), 5),
        measure("64 ridge penalties, K=1000", [one] * 64, one, bl.GradientDescent(steps=1000), bl.FullUnroll(), 5),
        measure("64 ridge penalties, implicit", [one] * 64, one, bl.GradientDescent(), bl.Implicit(), 2),
        measure("16 networks, K=20", networks, bl.stack(networks), bl.GradientDescent(step_size=0.1, steps=20),
                bl.FullUnroll(), 1),
    ])  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(not main())
