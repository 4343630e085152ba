"""Full unroll of 1,000 gradient steps on ridge / breast_cancer (569 x 30): against plain autograd, time and memory."""

from __future__ import annotations

import gc

import torch
from common import emit, interleave, medians, ratio, relative_error
from sklearn.datasets import load_breast_cancer

import bilevel as bl
from bilevel.core.cost import allocated_bytes

STEP_SIZE = 0.05


def main() -> bool:
    """Measure the ratio of times and the growth of memory with the number of steps."""
    X, y = load_breast_cancer(return_X_y=True)
    X = torch.as_tensor((X - X.mean(0)) / X.std(0))
    y = torch.as_tensor(y, dtype=torch.float64)
    problem = bl.problems.RidgeProblem(X, y, X, y)
    u = problem.initial_hparams(-3.0)

    def plain(steps: int = 1000) -> torch.Tensor:
        h = u.clone().requires_grad_()
        w = torch.zeros(X.shape[1], dtype=X.dtype, requires_grad=True)
        for _ in range(steps):
            loss = 0.5 * (X @ w - y).square().mean() + 0.5 * h.exp() * w.square().sum()
            (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - STEP_SIZE * gradient
        plain.bytes = allocated_bytes()
        return torch.autograd.grad(0.5 * (X @ w - y).square().mean(), h)[0]

    def ours(steps: int = 1000) -> bl.Estimate:
        solver = bl.GradientDescent(step_size=STEP_SIZE, steps=steps)
        return bl.hypergradient(problem, solver, bl.FullUnroll(), u)

    error = relative_error(ours().hypergradient, plain())
    seconds = interleave({"bilevel": ours, "autograd": plain}, rounds=9)
    share = ratio(seconds, "bilevel", "autograd")
    ok = emit(
        "unroll: time of 1,000 GD steps / plain autograd",
        share,
        "at most 1/3 at equal values",
        share <= 1 / 3 and error < 1e-9,
        relative_difference=error,
        seconds=medians(seconds),
    )
    gc.collect()
    short, long = ours(1000).cost.peak_memory, ours(11_000).cost.peak_memory
    base = allocated_bytes()
    if short is None or long is None or base is None:
        return emit("unroll: bytes for each further step", float("nan"), "no glibc: not measured", False)
    plain()
    growth = (long - short) / 10_000
    params = X.shape[1] * 8
    # A tensor costs its numbers and about 1.2 kB of bookkeeping in Python and C++.
    ok &= emit(
        "unroll: bytes for each further step",
        growth,
        f"one params ({params} bytes) and a tensor's bookkeeping, no graph",
        growth <= params + 2048,
        plain_autograd=(plain.bytes - base) / 1000,
    )
    # With many parameters the bookkeeping vanishes beside the numbers.
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(20, 20_000, dtype=torch.float64, generator=generator)
    wide = bl.problems.RidgeProblem(tall, tall[:, 0], tall, tall[:, 0])
    solver = {steps: bl.GradientDescent(step_size=1e-3, steps=steps) for steps in (10, 110)}
    peaks = {
        steps: bl.hypergradient(wide, solver[steps], bl.FullUnroll(), wide.initial_hparams()).cost.peak_memory
        for steps in solver
    }
    share = (peaks[110] - peaks[10]) / 100 / (20_000 * 8)
    ok &= emit(
        "unroll: memory for each further step / one params, 20,000 parameters",
        share,
        "one (within 5 %)",
        abs(share - 1) < 0.05,
    )
    return ok


if __name__ == "__main__":
    raise SystemExit(not main())
