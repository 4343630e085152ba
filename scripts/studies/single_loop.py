"""Does a stochastic single loop come to the minimum without tuning? The exact outer loss beside the least one.

Random logistic problems with a penalty for each feature: 5 to 40 features, 2,000 to 9,500 rows with heavy tails, scales
of features up to 30 apart, correlated or not, penalties that start anywhere from e^-4 to e^2. What is left of the way
from the start to the minimum, ``(h - h*) / (h_0 - h*)``, is looked at by exact inner solves every 500 steps; the
minimum is the least value that a search or any run has found. A run fails that leaves more than 1e-2.

    python scripts/studies/single_loop.py
    python scripts/studies/single_loop.py --seeds 100 120
    python scripts/studies/single_loop.py --methods SABA --caps 0.3 1 3
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import bilevel as bl

LEVELS = (1e-1, 1e-2, 3e-3)
EVERY = 500
METHODS: dict[str, Any] = {
    "SABA": bl.SABA(every=EVERY),
    "SABA, no preconditioner": bl.SABA(every=EVERY, preconditioner="none"),
    "SOBA": bl.SOBA(every=EVERY),
}


def draw(seed: int) -> tuple[bl.problems.LogisticProblem, torch.Tensor]:
    """Return a problem and where it starts; everything is drawn from one seed."""
    rng = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    d, n = int(between(5, 41)), int(10 ** between(3.3, 3.98))
    mixed = torch.eye(d).double() + between(0, 1) * normal(d, d) / d**0.5
    freedom = between(3, 12)
    tails = (normal(2 * n, 8).square().sum(1) / 8 + 0.3).rsqrt() ** (6 / freedom)
    X = (normal(2 * n, d) @ mixed) * tails[:, None] * torch.logspace(0, between(-1.5, 0), d, dtype=torch.float64)
    w = normal(d) * (torch.rand(d, generator=rng) < between(0.2, 1))
    z = X @ w
    y = (torch.rand(2 * n, generator=rng, dtype=torch.float64) < torch.sigmoid(between(0.5, 3) * z / z.std())).double()
    problem = bl.problems.LogisticProblem(X[:n], y[:n], X[n:], y[n:], penalty="per_feature")
    return problem, between(-4, 2) + normal(d)


@dataclass
class Run:
    """The exact outer losses of a run, by steps, the time of its steps, and what was said at its end."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    said: str = ""


def exact_loss(problem: Any, hparams: Any) -> float:
    """Return the outer loss at the inner solution."""
    return bl.hypergradient(problem, bl.Newton(), bl.Implicit(), hparams, check=False).outer_loss


def run(problem: Any, start: torch.Tensor, method: Any, steps: int) -> Run:
    """Take the steps of a method."""
    found, begun = Run(), time.process_time()
    loop = bl.SingleLoop(problem, method, start, certify=False, on_failure="return")
    for _ in range(steps // EVERY):
        estimate = loop.step()
        found.seconds += time.process_time() - begun
        found.losses.append(exact_loss(problem, loop.hparams))
        begun = time.process_time()
        if not estimate.status.usable:
            break
    found.said = estimate.status.name
    return found


def report(name: str, all_left: list[list[float]], runs: list[Run], steps: int) -> None:
    """Print a row of the table."""
    reached = [
        [next((EVERY * (k + 1) for k, each in enumerate(left) if each <= level), 0) for left in all_left]
        for level in LEVELS
    ]
    counts = "  ".join(f"{sum(map(bool, each)):3} {statistics.median(each or [0]):6.0f}" for each in reached)
    ends = sorted(left[-1] for left in all_left)
    micro = 1e6 * statistics.median(each.seconds / (EVERY * len(each.losses)) for each in runs)
    failed = sum(each.said not in ("OK",) for each in runs)
    print(f"{name:28} {counts}  {statistics.median(ends):8.1e} {ends[-1]:8.1e}  {failed:3}  {micro:5.0f}", flush=True)


def main() -> int:
    """Run the seeds and print a row for each method and cap; the exit status counts failures of the default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 20), help="first seed, and the one after it all")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--caps", type=float, nargs="+", default=[1.0], help="factors of the largest move in a step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: dict[str, list[Run]] = {}
    firsts, leasts = [], []
    for seed in range(*options.seeds):
        problem, start = draw(seed)
        firsts.append(exact_loss(problem, start))
        least = bl.tune(problem, start, accuracy=1e-8).outer_loss
        for method in options.methods:
            for cap in options.caps:
                with mock.patch("bilevel.outer.single_loop.CAP", cap):
                    found = run(problem, start, METHODS[method], options.steps)
                rows.setdefault(method + f", cap {cap:g}" * (len(options.caps) > 1), []).append(found)
                least = min(least, *found.losses)
        leasts.append(least)
    heads = "  ".join(f"{f'to {level:g}':>10}" for level in LEVELS)
    print(f"{f'of {len(leasts)}, and median steps':28} {heads}  left: median, worst; failed; us of a step")
    failed = 0
    for name, runs in rows.items():
        ends = zip(runs, firsts, leasts, strict=True)
        left = [[(loss - least) / (first - least) for loss in each.losses] for each, first, least in ends]
        report(name, left, runs, options.steps)
        bad = [options.seeds[0] + index for index, each in enumerate(left) if not each[-1] <= LEVELS[1]]
        print(f"{'':28} seeds that fail: {bad}" if bad else "", flush=True)
        failed += len(bad) * (name == next(iter(rows)))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
