"""Error curves of random least squares: all draws in one batch against the same runs one at a time.

The experiment: 6 sizes x 8 truncation indices x 50 draws x 2 step sizes, forward and reverse, K = 100 steps. One at
a time is one draw and one truncation index in each run, through the same closed form; of its draws a sample is timed in
every cell, and the time is scaled to all.
"""

from __future__ import annotations

import time

import torch
from common import emit

from bilevel.curse import Truncation
from bilevel.curse.problems import least_squares
from bilevel.theory import QuadraticBatch, error_curves

SIZES, INDICES, DRAWS, STEPS = (20, 60, 100, 140, 170, 185), (0, 5, 10, 20, 30, 40, 60, 80), 50, 100
SAMPLE = 2


def fresh(batch: QuadraticBatch, draws: slice) -> QuadraticBatch:
    """Some draws as problems of their own, with nothing computed before."""
    parts = (batch.hessian, batch.linear, batch.hessian_derivatives, batch.linear_derivatives, batch.start)
    return QuadraticBatch(*(part[draws] for part in parts))


def main() -> bool:
    """Measure the ratio of times and the largest difference of the results."""
    tails = [STEPS - index for index in INDICES]
    batched = single = grouped = difference = 0.0
    for step in ("2/(L+l)", "1/L"):
        for size in SIZES:
            draws = least_squares(size, DRAWS)
            solvers, _ = Truncation((size,), step).solvers(draws)
            start = time.perf_counter()
            curves = error_curves(fresh(draws, slice(None)), solvers, None, STEPS, tails)
            batched += time.perf_counter() - start
            for draw in range(SAMPLE):
                problem, one = fresh(draws, slice(draw, draw + 1)), [solvers[draw]]
                start = time.perf_counter()
                found = [error_curves(fresh(problem, slice(None)), one, None, STEPS, [tail]) for tail in tails]
                single += (time.perf_counter() - start) * DRAWS / SAMPLE
                start = time.perf_counter()
                error_curves(fresh(problem, slice(None)), one, None, STEPS, tails)
                grouped += (time.perf_counter() - start) * DRAWS / SAMPLE
                for j, alone in enumerate(found):
                    norm = curves.jacobian_norm[draw]
                    for a, b in ((alone.late[0, 0], curves.late[draw, j]), (alone.reverse[0], curves.reverse[draw])):
                        difference = max(difference, float((a - b).abs().max() / norm))
    ratio = single / batched
    return emit(
        "curves: time of 4,800 runs one at a time / batched",
        ratio,
        "at least 10 at results equal to 1e-12",
        ratio >= 10 and difference < 1e-12,
        relative_difference=difference,
        seconds={"batched": batched, "one at a time": single, "one draw at a time": grouped},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(not main())
