"""A million hyperparameters: one weight decay for each weight of an MLP 784-1000-200-10, differentiated implicitly.

One hypergradient, the inner solve aside: the outer loss with its gradients, the linear solve and the cross product, on
batches of 32 in float32, by 10 CG steps with Gauss-Newton products, 10 CG steps with the Hessian, and 10 Neumann terms.
Time is process CPU time in turn with one inner gradient by torch alone. Memory is the high-water mark of the resident
set above that after the inner solve, in a process of its own that has taken one hypergradient before, and whose
allocator gives freed blocks back (MALLOC_MMAP_THRESHOLD_), so that the figure is that of live tensors.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import emit, interleave, medians, ratio
from general import status
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.core import tree

WIDTHS, BATCH = (784, 1000, 200, 10), 32
ESTIMATORS = {
    "10 CG steps, Gauss-Newton": bl.Implicit(bl.CG(steps=10), damping=0.1, curvature="gauss-newton"),
    "10 CG steps, Hessian": bl.Implicit(bl.CG(steps=10), damping=2.0),
    "10 Neumann terms, Hessian": bl.Implicit(bl.Neumann(steps=10, step_size=0.1), damping=2.0),
}


class Network:
    """The problem after one inner step, and its alternatives."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)]
        module = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.inputs = torch.randn(2, BATCH, WIDTHS[0], generator=generator)
        self.labels = torch.randint(WIDTHS[-1], (2, BATCH), generator=generator)
        self.problem = bl.ModuleProblem(module, self.inner_loss, self.outer_loss)
        self.log_decay = tree.tree_map(lambda leaf: torch.full_like(leaf, -6.0), self.problem.params)
        self.megabytes = tree.nbytes(self.log_decay) / 2**20

    def inner_loss(self, model: Any, params: Any, log_decay: Any) -> Tensor:
        """Return the cross-entropy on the training batch with the weight decay."""
        return cross_entropy(model(self.inputs[0]), self.labels[0]) + bl.weight_decay(params, log_decay)

    def outer_loss(self, model: Any, params: Any, log_decay: Any) -> Tensor:
        """Return the cross-entropy on the validation batch."""
        return cross_entropy(model(self.inputs[1]), self.labels[1])

    def solve(self, name: str) -> bl.Solution:
        """Return the inner solution, which the measurements leave aside."""
        run = bl.Run(self.problem, bl.GradientDescent(0.1, steps=1), self.log_decay, self.problem.start())
        return ESTIMATORS[name].solve(run)

    def differentiate(self, solved: bl.Solution) -> bl.Pullback:
        """Return the hypergradient at an inner solution, as `bilevel.hypergradient` takes it."""
        _, by_params, by_hparams = self.problem.outer_value_and_grads(solved.params, self.log_decay)
        pulled = solved.pullback(by_params)
        if not pulled.verdict.status.ok:
            raise RuntimeError(str(pulled.verdict))
        tree.add(by_hparams, pulled.hparams)
        return pulled

    def gradient(self) -> None:
        """Take one inner gradient by torch alone."""
        params = tree.attach(self.problem.params)
        torch.autograd.grad(self.problem.inner_loss(params, self.log_decay), list(params.values()))


def measure(name: str) -> None:
    """Print by how many times the parameters' memory a hypergradient lifts the resident set of this process."""
    network = Network()
    network.differentiate(network.solve(name))
    solved = network.solve(name)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    base = status("VmRSS")
    network.differentiate(solved)
    print(json.dumps((status("VmHWM") - base) / network.megabytes))


def memory(name: str) -> float:
    """Return what `measure` prints in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> bool:
    """Compare time and memory with what is asked."""
    network, ok = Network(), True
    calls: dict[str, Callable[[], Any]] = {"gradient": network.gradient}
    residuals = {}
    for name in ESTIMATORS:
        solved = network.solve(name)
        residuals[name] = network.differentiate(solved).residual
        calls[name] = lambda solved=solved: network.differentiate(solved)  # type: ignore[misc]
    seconds = interleave(calls, rounds=11, clock=time.process_time)
    for name in ESTIMATORS:
        times, copies = ratio(seconds, name, "gradient"), memory(name)
        ok &= emit(
            f"networks: gradient-equivalents' time of one hypergradient, {tree.size(network.log_decay):,} "
            f"hyperparameters: {name}",
            times,
            "time at most 30 gradients, memory at most 8 times the parameters",
            times <= 30 and copies <= 8,
            memory_in_parameters=copies,
            seconds=medians(seconds)[name],
            gradient_seconds=medians(seconds)["gradient"],
            adjoint_residual=residuals[name],
            batch=BATCH,
        )
    return ok


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        raise SystemExit(0)
    raise SystemExit(not main())
