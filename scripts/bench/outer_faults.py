"""Planted faults for `outer.py`: wrong hypergradients, noise in values, failures, and runs that are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from outer_problems import PROBLEMS, adam, left_after, searched, starts_of

import bilevel as bl

NAME = "ridge diabetes, 10"
"""The problem in which faults are planted."""
KILLED = {"scan": 2, "step": 7}
"""The evaluation in which a run is killed."""


@dataclass(frozen=True)
class Planted(bl.HypergradEstimator):
    """Another estimator, whose hypergradient is changed: ``change(p, count)`` at the evaluation of this number."""

    base: Any
    change: Callable[[torch.Tensor, int], torch.Tensor]
    count: list[int]

    resumes = True

    def at_tolerance(self, tol: float) -> bl.HypergradEstimator:
        return replace(self, base=self.base.at_tolerance(tol))

    def solve(self, run: bl.Run) -> bl.Solution:
        self.count[0] += 1
        solution = self.base.solve(run)

        def pullback(cotangent: Any) -> bl.Pullback:
            pulled = solution.pullback(cotangent)
            return replace(pulled, hparams=self.change(pulled.hparams, self.count[0]))

        return replace(solution, pullback=pullback)


@dataclass(frozen=True)
class PassedOff(bl.TruncatedUnroll):
    """A truncated unroll that claims to have no bias and no memory of where the inner solver starts."""

    @property
    def differentiates_steps(self) -> bool:
        return False

    def at_tolerance(self, tol: float) -> bl.HypergradEstimator:
        return self


def planted(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Planted:
    """Return implicit differentiation with a fault."""
    return Planted(bl.Implicit(), change, [0])


def first_flipped(p: torch.Tensor, count: int) -> torch.Tensor:
    """Return p with the sign of its largest component changed."""
    signs = torch.ones_like(p)
    signs[2] = -1.0
    return p * signs


def failing(*counts: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Return a fault that makes p NaN at evaluations of these numbers; of none given, at all."""
    return lambda p, count: p * float("nan") if not counts or count in counts else p


def noisy(problem: Any, size: float) -> Any:
    """Return the problem with relative noise in its outer loss."""
    generator = torch.Generator().manual_seed(0)

    class Noisy(type(problem)):  # type: ignore[misc]
        def outer_value_and_grads(self, params: Any, hparams: Any) -> Any:
            value, *gradients = super().outer_value_and_grads(params, hparams)
            return (value * (1 + size * torch.randn((), generator=generator, dtype=value.dtype)), *gradients)

    problem.__class__ = Noisy
    return problem


def renewed(problem: Any) -> bl.BilevelProblem:
    """Return a ridge regression whose inner loss sees mini-batches."""
    X, y, X_val, y_val = problem.train.X.T, problem.train.y, problem.val.X.T, problem.val.y
    return bl.BilevelProblem(
        lambda w, u, rows: ((rows[0] @ w - rows[1]) ** 2).mean() + (u.exp() * w * w).sum(),
        lambda w, u: ((X_val @ w - y_val) ** 2).mean(),
        params=torch.zeros(X.shape[1], dtype=X.dtype),
        sampler=bl.MiniBatches((X, y), batch_size=16),
    )


# Every fault by name: what to run, and the words of which one has to be in how it ends.
NOT_TRUE = r"values contradict|no function of|at the accuracy of|not converged|no further step"
FAULTS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "gradient x 1.05": (lambda p, u: searched(p, u, bl.HyperNewton(), None, planted(lambda g, n: 1.05 * g)), NOT_TRUE),
    "gradient x 0.5": (lambda p, u: searched(p, u, bl.HyperNewton(), None, planted(lambda g, n: 0.5 * g)), NOT_TRUE),
    "one sign flipped": (lambda p, u: searched(p, u, bl.HyperNewton(), None, planted(first_flipped)), NOT_TRUE),
    "one sign flipped, HyperLBFGS": (
        lambda p, u: searched(p, u, bl.HyperLBFGS(), None, planted(first_flipped)),
        NOT_TRUE,
    ),
    "constant bias": (
        lambda p, u: searched(p, u, bl.HyperNewton(), None, planted(lambda g, n: g + 1e-3)),
        NOT_TRUE,
    ),
    "truncated unroll, tail=5": (
        lambda p, u: searched(p, u, bl.HyperNewton(), bl.GradientDescent(steps=200), bl.TruncatedUnroll(tail=5)),
        r"refused: HyperNewton compares outer losses|refused: HyperNewton needs hypergradients without bias",
    ),
    "tail=5, passed off as exact": (
        lambda p, u: searched(p, u, bl.HyperLBFGS(), bl.GradientDescent(steps=200), PassedOff(tail=5)),
        NOT_TRUE,
    ),
    "warm-started unroll": (
        lambda p, u: searched(p, u, bl.HyperLBFGS(), bl.GradientDescent(steps=20), bl.FullUnroll()),
        "refused: HyperLBFGS compares outer losses",
    ),
    "value noise 1e-4": (lambda p, u: searched(noisy(p, 1e-4), u, bl.HyperNewton()), NOT_TRUE + "|WRONG_DERIVATIVE"),
    "value noise 1e-4, HyperLBFGS": (
        lambda p, u: searched(noisy(p, 1e-4), u, bl.HyperLBFGS()),
        NOT_TRUE + "|WRONG_DERIVATIVE",
    ),
    "renewed batches": (
        lambda p, u: searched(renewed(p), u, bl.HyperNewton(), bl.SGD(0.01, steps=20)),
        "refused: HyperNewton compares outer losses, but those of mini-batches",
    ),
    "NaN at evaluation 3": (lambda p, u: searched(p, u, bl.HyperNewton(), None, planted(failing(3))), "converged"),
    "NaN at evaluation 8": (lambda p, u: searched(p, u, bl.HyperNewton(), None, planted(failing(8))), "converged"),
    "NaN at a given start": (
        lambda p, u: searched(p, u, bl.HyperNewton(start="given"), None, planted(failing(1))),
        "the first hypergradient failed",
    ),
    "NaN always": (
        lambda p, u: searched(p, u, bl.HyperNewton(), None, planted(failing())),
        "every point of the scan failed",
    ),
    "30 inner steps without a tolerance": (
        lambda p, u: searched(p, u, bl.HyperNewton(), bl.GradientDescent(steps=30)),
        NOT_TRUE + "|every point of the scan failed",
    ),
    "Adam": (lambda p, u: searched(p, u, adam(0.1)), "^took"),
}


def ending(fault: str, problem: Any, u: torch.Tensor) -> tuple[str, bool]:
    """Return how a run with a fault ended, and whether that is right.

    It also is where the run says "converged" and at most three times its tolerance is left of the true outer loss.
    """
    run, words = FAULTS[fault]
    true = PROBLEMS[NAME]
    try:
        trace = run(problem, u)
    except ValueError as error:
        said = f"refused: {error}"
        return said, re.search(words, said) is not None
    said = trace.stopped
    if fault == "Adam" or not said.startswith("converged"):
        return said, re.search(words, said) is not None
    first, left = left_after(true(0) if problem is None else problem, trace.hparams)
    return f"{said}; {left / first:.1e} of it was left", left <= 3e-6 * abs(first)


def run_until_killed(folder: Path, seed: int, kill_at: int = 0) -> tuple[Any, Any]:
    """Run a search with a checkpoint after every evaluation, from the last one there is; SIGKILL within one."""
    problem, path = PROBLEMS[NAME](seed), folder / "state.pt"
    (u,) = starts_of(problem, 1, seed)

    def saved(outer: bl.OuterOptimizer, estimate: bl.Estimate) -> None:
        torch.save(outer.state_dict(), folder / "next.pt")
        (folder / "next.pt").replace(path)
        if len(outer.history) + 1 == kill_at:
            problem.outer_value_and_grads = _kill  # type: ignore[method-assign]

    outer = bl.OuterOptimizer(problem, bl.QuasiNewton(), bl.Implicit(), u, bl.HyperNewton(), callbacks=[saved])
    if path.exists():
        outer.load_state_dict(torch.load(path, weights_only=True))
    result = outer.run(100, progress=False)
    return outer, result


def _kill(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(phase: str, seed: int) -> tuple[str, bool]:
    """Return how a run ends in which a child was killed, and whether its bits are those of an undisturbed run."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole, _ = run_until_killed(Path(one), seed)
        at = KILLED[phase]
        child = subprocess.run([sys.executable, __file__, other, str(seed), str(at)], check=False)
        resumed, result = run_until_killed(Path(other), seed)
    same = [r.outer_loss for r in resumed.history] == [r.outer_loss for r in whole.history]
    same &= torch.equal(resumed.hparams, whole.hparams) and whole.history[at - 1].phase == phase
    said = f"child ended with {child.returncode} in evaluation {at}, identical bits: {same}; {result.stopped}"
    return said, same and child.returncode == -signal.SIGKILL


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_until_killed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
