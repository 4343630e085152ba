"""``bilevel doctor``: what this machine has, and whether hypergradients are right on it."""

from __future__ import annotations

import time
from argparse import Namespace
from typing import Any

import torch

from bilevel import data
from bilevel.base import InnerSolver
from bilevel.check import check_hypergradient
from bilevel.cli.threads import chosen_threads, measured_threads
from bilevel.compare import describe_environment
from bilevel.config import choose_device
from bilevel.core.threads import short_operations
from bilevel.engine.estimator import HypergradEstimator
from bilevel.hypergrad import FullUnroll, Implicit, TruncatedUnroll
from bilevel.inner import GradientDescent, Newton
from bilevel.problems import LogisticProblem, RidgeProblem

# A full unroll is exact at any number of steps; the others are where the inner solver has converged.
CHECKS: tuple[tuple[InnerSolver, HypergradEstimator], ...] = (
    (GradientDescent(steps=50), FullUnroll()),
    (GradientDescent(steps=1000), TruncatedUnroll(tail=500)),
    (Newton(), Implicit()),
)


def run_doctor(arguments: Namespace) -> int:
    """Run ``bilevel doctor``; 1 where a check fails."""
    device = choose_device(arguments.device or "auto")
    chosen = chosen_threads(arguments)
    environment = describe_environment(device, chosen)
    for name, result in environment["versions"].items():
        missing = "not installed: no figures (pip install 'bilevel[plot]')" if name == "matplotlib" else "not installed"
        print(f"{name:<14}{result or missing}")
    print(f"{'system':<14}{environment['platform']}")
    print(f"{'processor':<14}{environment['processor']}, {environment['processors']} cores")
    for title, line in zip(("threads", "", ""), measured_threads(chosen), strict=True):
        print(f"{title:<14}{line}")
    print(f"{'CUDA':<14}{', '.join(environment['cuda']) or 'none'}")
    for kind in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        print(f"{'float64':<14}{kind}: {_float64(kind)}")
    with short_operations(chosen):
        good = all([_check_data(), _check_hypergradients(device)])
    print("all is well" if good else "something is wrong: see FAILED above")
    return 0 if good else 1


def _float64(device: str) -> str:
    try:
        third = torch.full((2,), 1.0, dtype=torch.float64, device=device) / 3
        return "supported" if abs(float(third.sum()) - 2 / 3) < 1e-15 else "FAILED: inexact"
    except RuntimeError as error:
        return f"FAILED: {error}"


def _check_data() -> bool:
    """Load every data set that needs no file."""
    good = True
    for name, description in data.available().items():
        try:
            data.load(name)
            print(f"{'data':<14}{name}: {description}")
        except ModuleNotFoundError:
            print(f"{'data':<14}{name}: not installed: {description}")
        except (ValueError, OSError) as error:
            good = False
            print(f"{'data':<14}{name}: FAILED: {error}")
    return good


def _check_hypergradients(device: str) -> bool:
    """Compare hypergradients on real data with finite differences."""
    good, start = True, time.perf_counter()
    for kind, name in ((RidgeProblem, "diabetes"), (LogisticProblem, "breast_cancer")):
        parts: dict[str, Any] = data.load(name, device=device).splits()
        problem = kind(**parts, penalty="scalar")
        for solver, estimator in CHECKS:
            report = check_hypergradient(problem, solver, estimator, problem.initial_hparams())
            words = ", ".join(f"{error:.0e} from {referee}" for referee, error in report.errors.items())
            title = f"{type(solver).__name__} with {type(estimator).__name__} on {name}"
            print(f"{'self-check':<14}{title}: {'agrees' if report.ok else 'FAILED'}, {words}")
            if not report.ok:
                good = False
                print(report)
    print(f"{'':<14}took {time.perf_counter() - start:.1f} s")
    return good
