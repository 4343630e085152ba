"""A general loss: an MLP 64-128-10 on digits, a weight decay for each tensor, SGD on batches of 64, unrolled.

Times are process CPU times, alternatives in turn; memory is the growth of the resident set over a warm process, each
alternative in a process of its own. The plain graph is what every library does that differentiates torch's own graph.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import emit, interleave, medians, ratio, relative_error
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.core import tree

STEPS, STEP_SIZE, BATCH = 100, 0.1, 64
ROWS, WIDTHS = 1000, (64, 128, 10)
DECAY = {name: torch.tensor(-5.0, dtype=torch.float64) for name in ("W1", "b1", "W2", "b2")}
FORWARD, CHECKPOINT = bl.FullUnroll(mode="forward"), bl.FullUnroll(memory="checkpoint")


def model(params: Any, X: Tensor) -> Tensor:
    """Return the logits of the network."""
    return torch.relu(X @ params["W1"] + params["b1"]) @ params["W2"] + params["b2"]


def inner_loss(params: Any, decay: Any, batch: Any) -> Tensor:
    """Return the cross-entropy on a batch with exp(decay) times the squared norm of each tensor."""
    X, y = batch
    return cross_entropy(model(params, X), y) + sum(decay[k].exp() * params[k].square().sum() for k in params)


class Digits:
    """The problem and its alternatives; each is a function of the number of steps that returns the hypergradient."""

    def __init__(self) -> None:
        X, y = load_digits(return_X_y=True)
        X, y = torch.as_tensor(X / 16.0), torch.as_tensor(y)
        self.val = X[ROWS:], y[ROWS:]
        self.sampler = bl.MiniBatches((X[:ROWS], y[:ROWS]), BATCH, seed=0)
        generator = torch.Generator().manual_seed(0)
        features, hidden, classes = WIDTHS

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5

        zeros = torch.zeros(hidden + classes, dtype=torch.float64)
        self.params = {
            "W1": normal(features, hidden),
            "b1": zeros[:hidden],
            "W2": normal(hidden, classes),
            "b2": zeros[hidden:],
        }
        self.problem = problem = bl.BilevelProblem(inner_loss, self.outer_loss, self.params, sampler=self.sampler)
        # Traced once: a user keeps the problem too.
        fx = bl.trace(problem)
        self.alternatives: dict[str, Callable[[int], Tensor]] = {
            "plain graph": self.plain,
            "graph": self.ours(problem, bl.FullUnroll(memory="graph")),
            "iterates": self.ours(problem, bl.FullUnroll()),
            "checkpoint": self.ours(problem, CHECKPOINT),
            "forward": self.ours(problem, FORWARD),
            "fx": self.ours(fx, bl.FullUnroll()),
            "fx, checkpoint": self.ours(fx, CHECKPOINT),
        }

    def outer_loss(self, params: Any, decay: Any) -> Tensor:
        """Return the cross-entropy on the validation rows."""
        return cross_entropy(model(params, self.val[0]), self.val[1])

    def plain(self, steps: int) -> Tensor:
        """Record the whole run by torch alone."""
        u = tree.attach(DECAY)
        x = tree.attach(self.params)
        for k in range(steps):
            loss = inner_loss(x, u, self.sampler(k))
            gradient = torch.autograd.grad(loss, list(x.values()), create_graph=True)
            x = {key: value - STEP_SIZE * g for (key, value), g in zip(x.items(), gradient, strict=True)}
        return torch.stack(torch.autograd.grad(self.outer_loss(x, u), list(u.values())))

    @staticmethod
    def ours(problem: bl.BilevelProblem, estimator: bl.HypergradEstimator) -> Callable[[int], Tensor]:
        """Return an estimator of the package as an alternative."""

        def run(steps: int) -> Tensor:
            solver = bl.GradientDescent(STEP_SIZE, steps=steps)
            estimate = bl.hypergradient(problem, solver, estimator, DECAY, check=False)
            return torch.stack(list(estimate.hypergradient.values()))

        return run


def status(field: str) -> float:
    """Return a memory figure of this process in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(name: str, steps: int) -> None:
    """Print by how many MB a run lifts the resident set of a process that has made a short one before."""
    run = Digits().alternatives[name]
    run(3)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    base = status("VmRSS")
    run(steps)
    print(json.dumps(status("VmHWM") - base))


def megabytes(name: str, steps: int = STEPS) -> float:
    """Return what `measure` prints in a process of its own."""
    command = [sys.executable, __file__, name, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def live_growth(steps: int) -> float:
    """Return the bytes that forward mode holds at the end of a run (NaN where the system does not tell)."""
    problem = Digits().problem
    solver = bl.GradientDescent(STEP_SIZE, steps=steps)
    gc.collect()
    peak = bl.hypergradient(problem, solver, FORWARD, DECAY, check=False).cost.peak_memory
    return float("nan") if peak is None else float(peak)


def main() -> bool:
    """Compare times and memory with the plain graph, and memory with the number of steps."""
    alternatives = Digits().alternatives
    forward = alternatives.pop("forward")
    truth = alternatives["plain graph"](200)
    errors = {name: relative_error(run(200), truth) for name, run in alternatives.items()}
    errors["forward"] = relative_error(forward(200), truth)
    worst = max(errors.values())
    ok = emit("general: relative difference to the plain graph, 200 steps", worst, "at most 1e-10", worst <= 1e-10)
    calls = {name: (lambda run=run: run(STEPS)) for name, run in alternatives.items()}
    seconds = interleave(calls, rounds=11, clock=time.process_time)
    memory = {name: megabytes(name) for name in alternatives}
    asked = {"fx": (1.0, 1 / 3), "graph": (1.1, 1.1)}
    for name in alternatives:
        time_share, memory_share = ratio(seconds, name, "plain graph"), memory[name] / memory["plain graph"]
        most = asked.get(name, (float("inf"), float("inf")))
        ok &= emit(
            f"general: time / plain graph, {STEPS} steps: {name}",
            time_share,
            f"time at most {most[0]:.2f}, memory at most {most[1]:.2f} of the plain graph",
            time_share <= most[0] and memory_share <= most[1],
            seconds=medians(seconds)[name],
            fastest=min(seconds[name]),
            memory_share=memory_share,
            megabytes=memory[name],
            relative_difference=errors[name],
        )
    long = megabytes("checkpoint", 10_000)
    ok &= emit("general: MB of 10,000 checkpointed steps, 9,610 parameters", long, "less than 200", long < 200)
    # Live allocations are exact; the resident set of one and the same run moves by a few MB from process to process.
    short, long = live_growth(1000), live_growth(10_000)
    ok &= emit(
        "general: bytes for each further forward-mode step, 4 hyperparameters, 1,000 to 10,000 steps",
        (long - short) / 9000,
        "at most 16 (an iterate has 76,880)",
        (long - short) / 9000 <= 16,
        resident_megabytes=megabytes("forward", 10_000),
    )
    return ok


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]))
        raise SystemExit(0)
    raise SystemExit(not main())
