"""Look at everything that needs a GPU, on a machine that has one, and write one JSON file about it.

    python scripts/studies/gpu_check.py [--out gpu_check.json]      on a machine with CUDA
    python scripts/studies/gpu_check.py --dry-run                   the same code on the CPU, small: only a test of it

It runs the tests marked `gpu`; runs inner steps with torch's synchronisation check set to "error" and counts with it
how often whole runs wait; captures runs on flat vectors as CUDA graphs of 64 steps; compares every estimator and solver
(the rows of tests/device_cases.py) with the CPU; saves and restores CUDA's random generators; and times logistic
regression, an unrolled net and runs on flat vectors on both devices. No machine with CUDA was at hand when the graphs
were written: that part has run on the CPU alone, where nothing is captured.
Exit status: 0 where all is well, 1 where something fails, 2 without CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from bilevel.compare import describe_environment
from bilevel.core.device import ON_ACCELERATOR
from bilevel.engine.affine import Stretch
from bilevel.engine.lean import steps
from bilevel.oracles.directions import Rule
from bilevel.problems.row_steps import RowSteps

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import device_cases as cases  # noqa: E402

STEPS = {"cuda": 64, "cpu": 8}
"""Steps of the runs in which waits are counted; none are on the CPU, where only this script is tried."""
CHUNK = 64
"""Steps that are captured as one graph."""


def run_tests(device: str) -> dict[str, Any]:
    """Run the tests marked `gpu` in a process of their own; a dry run only collects them."""
    command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    command += ["--collect-only"] if device == "cpu" else []
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return {"ok": done.returncode == 0, "command": ["python", *command], "end": done.stdout.splitlines()[-5:]}


# Waiting -------------------------------------------------------------------------------------------------------------


@contextmanager
def sync_check(device: str, mode: str) -> Iterator[None]:
    """Inside, an operation for which the host waits for the device raises ("error") or warns; never without CUDA."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_steps(device: str) -> dict[str, Any]:
    """Run inner steps and their derivatives where waiting is an error."""
    placed = cases.quadratic(device)
    inner, params = placed.problem.bind(placed.hparams), placed.problem.params

    def steps(solver: bl.InnerSolver) -> None:
        state = solver.init(inner, params)
        cotangent = (params, bl.tree.zeros_like(state.memory))
        for _ in range(STEPS[device]):
            before, state = state, solver.step(inner, state)
            cotangent, _ = solver.step_vjp(inner, before, cotangent)

    found = {}
    for name, row in cases.SOLVERS.items():
        if row.waits:
            continue
        steps(row.solver)  # the first call loads kernels, which may wait
        try:
            with sync_check(device, "error"):
                steps(row.solver)
            found[name] = "never waits"
        except RuntimeError as error:
            found[name] = str(error)
    return {"ok": set(found.values()) == {"never waits"}, "found": found}


def waits(device: str, work: Callable[[], object]) -> int:
    """Return how often a piece of work waits for the device; 0 without CUDA, where nobody counts."""
    work()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sync_check(device, "warn"):
            work()
    return sum("synchronizing" in str(warning.message) for warning in caught)


def check_waits(device: str) -> dict[str, Any]:
    """Count the waits of a step of every linear solver and estimator: what 2K steps take more than K."""
    matvec, b, matrix = cases.system(300, device)
    placed = cases.quadratic(device)

    def solve(make: Callable[[int], bl.LinearSolver], steps: int) -> int:
        return waits(device, lambda: make(steps).solve(matvec, b, dense=lambda: matrix, damping=1e-3))

    def differentiate(estimator: bl.HypergradEstimator, steps: int) -> int:
        solver = bl.GradientDescent(0.01, steps=steps)
        return waits(device, lambda: bl.hypergradient(placed.problem, solver, estimator, placed.hparams))

    found, few = {}, STEPS[device]
    for name, row in cases.LINEAR_SOLVERS.items():
        measured = (solve(row.fixed, 2 * few) - solve(row.fixed, few)) / few
        found[name] = {"waits_of_a_step": measured, "asked": 1 / ON_ACCELERATOR if row.tolerance else 0.0}
    for name, row in cases.ESTIMATORS.items():
        measured = (differentiate(row.estimator, 2 * few) - differentiate(row.estimator, few)) / few
        found[name] = {"waits_of_a_step": measured, "asked": row.runs / few}
    return {"ok": all(row["waits_of_a_step"] <= row["asked"] for row in found.values()), "found": found}


def check_graphs(device: str) -> dict[str, Any]:
    """Make chunks of steps there and back, as they are and as one CUDA graph: the same numbers, and the times of both.

    Without CUDA nothing is captured.
    """
    found = {}
    for problem, method in (("logistic", bl.GradientDescent(0.1)), ("ridge", bl.Sobolev(l=0.05, L=50.0))):
        placed = cases.PROBLEMS[problem].make(device)
        kernels, start = placed.problem.bind(placed.hparams).kernels(), placed.problem.params
        numbers = [method.coefficients(bl.InnerState(start, (), k)) for k in range(CHUNK)]
        stretch = steps(kernels, numbers)
        s = torch.stack([start.reshape(-1) for _ in (start, *method.vectors(start))])
        a = torch.ones_like(s)
        stretch.hold(s)

        def chunk(stretch: Stretch = stretch, s: torch.Tensor = s, a: torch.Tensor = a) -> list[torch.Tensor]:
            return [stretch.forward(s, True), *stretch.backward(a)]

        found[f"{type(method).__name__}, {problem}"] = beside(device, chunk)
    for method in (bl.SOBA(freeze=0, batch_size=512), bl.SABA(freeze=0, batch_size=512)):
        found[f"{type(method).__name__}, logistic"] = beside(device, stochastic(device, method))
    return {"ok": all(row["distance"] <= row["asked"] for row in found.values()), "found": found}


def stochastic(device: str, method: bl.StochasticMethod) -> Callable[[], list[torch.Tensor]]:
    """Return a chunk of the steps of a single loop for a linear model, from the same start at every call."""
    X = torch.randn(2048, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    data = (X, (X.sum(1) > 0).double())
    loop = bl.SingleLoop(bl.problems.LogisticProblem(*data, *data, "per_feature"), method, certify=False)
    made: Any = loop.directions
    assert isinstance(made, RowSteps)
    loop._block(loop.state, CHUNK)  # draws and uploads what the steps read
    moving = [made._z, made._u, made._root, made._table, made._six]
    start, rule = [each.clone() for each in moving], Rule(loop.state.rate, loop.length, 1.0, 0, None)

    def chunk() -> list[torch.Tensor]:
        for each, value in zip(moving, start, strict=True):
            each.copy_(value)
        made.take(CHUNK, isinstance(method, bl.SABA), rule)
        return moving

    return chunk


def beside(device: str, chunk: Callable[[], list[torch.Tensor]]) -> dict[str, Any]:
    """Return how far a chunk of steps as a CUDA graph is from the same as it is, and the times of both."""
    expected = [part.cpu().clone() for part in chunk()]
    again = chunk if device == "cpu" else captured(chunk)
    return {
        "distance": distance(again(), expected),
        "asked": 1e-12,
        "microseconds_of_a_step": {"eager": clock(device, chunk), "graph": clock(device, again)},
    }


def captured(work: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    """Return what replays a piece of work whose tensors stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(), work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return result

    return replay


def clock(device: str, work: Callable[[], object]) -> float:
    """Return the microseconds that one of the steps of a chunk takes, the median of five."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds) / CHUNK


# Numbers -------------------------------------------------------------------------------------------------------------


def distance(there: Any, here: Any) -> float:
    """Return the distance of two trees on two devices, relative to the second."""
    pairs = zip(bl.tree.leaves(there), bl.tree.leaves(here), strict=True)
    return float(bl.tree.norm([a.cpu() - b for a, b in pairs]) / bl.tree.norm(bl.tree.leaves(here)))


def check_agreement(device: str) -> dict[str, Any]:
    """Compare hypergradients with the CPU, float64: every estimator on every problem, every solver on one."""
    found = {}

    # A problem is made once on each device: its first call looks at its derivatives.
    places = {problem: (made.make(device), made.make("cpu")) for problem, made in cases.PROBLEMS.items()}

    def compare(name: str, problem: str, solver: Any, estimator: Any, asked: float) -> None:
        both = places[problem]
        results = [bl.hypergradient(p.problem, solver, estimator, p.hparams).hypergradient for p in both]
        found[name] = {"distance": distance(*results), "asked": asked}

    for problem in places:
        for name, row in cases.ESTIMATORS.items():
            compare(f"{name}, {problem}", problem, bl.GradientDescent(steps=12), row.estimator, row.agreement)
    for name, solver_row in cases.SOLVERS.items():
        solver = replace(solver_row.solver, steps=4)
        compare(name, "logistic", solver, solver_row.estimator, 1e-10)
    return {"ok": all(row["distance"] <= row["asked"] for row in found.values()), "found": found}


def check_random_numbers(device: str) -> dict[str, Any]:
    """Save an outer run's state, draw, load it, and draw the same again."""
    torch.zeros(1, device=device)
    placed = cases.quadratic(device)
    outer = bl.OuterOptimizer(placed.problem, bl.GradientDescent(steps=5), bl.Implicit(), placed.hparams)
    state = outer.state_dict()
    first = torch.rand(4, device=device)
    outer.load_state_dict(state)
    return {"ok": torch.equal(torch.rand(4, device=device), first), "cuda_generators": len(state["cuda_rng"])}


# Time ----------------------------------------------------------------------------------------------------------------


def logistic(device: str, rows: int, features: int) -> Callable[[], object]:
    """Return a cold hypergradient of logistic regression with one penalty for each feature."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * rows, features, generator=generator, dtype=torch.float64)
    weights = torch.randn(features, generator=generator, dtype=torch.float64) / features**0.5
    y = (X @ weights + torch.randn(2 * rows, generator=generator, dtype=torch.float64) > 0).double()
    X, y = X.to(device), y.to(device)
    problem = bl.problems.LogisticProblem(X[:rows], y[:rows], X[rows:], y[rows:], "per_feature")
    solver = bl.Newton(linear_solver=bl.CG(), tol=1e-8)
    return lambda: bl.hypergradient(problem, solver, bl.Implicit(bl.CG(tol=1e-8)), problem.initial_hparams(-6.0))


def unrolled(device: str, kind: str, steps: int) -> Callable[[], object]:
    """Return a full unroll on flat vectors: of logistic regression, of ridge regression, or of 64 ridge problems."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(341, 30, generator=generator, dtype=torch.float64).to(device)
    y = X.sum(1)
    data = (X, (y > 0).double() if kind == "logistic" else y)
    make = bl.problems.LogisticProblem if kind == "logistic" else bl.problems.RidgeProblem
    problem, size = make(*data, *data), 64 if kind == "rows" else None
    u = torch.linspace(-4.0, -1.0, 64, dtype=torch.float64, device=device)
    u, solver = u if size else u[0], bl.GradientDescent(steps=steps)
    return lambda: bl.hypergradient(problem, solver, bl.FullUnroll(), u, batch=size)


def net(device: str, rows: int, hidden: int, steps: int) -> Callable[[], object]:
    """Return a full unroll of a net with one hidden layer and two weight decays, in float32."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, 64, generator=generator).to(device)
    labels = torch.randint(10, (rows,), generator=generator).to(device)
    start = {
        "first": (torch.randn(64, hidden, generator=generator) / 8).to(device),
        "last": (torch.randn(hidden, 10, generator=generator) / hidden**0.5).to(device),
    }

    def loss(p: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(torch.tanh(X @ p["first"]) @ p["last"], labels)

    def inner(p: Any, u: torch.Tensor) -> torch.Tensor:
        decay = u.exp()
        return loss(p) + decay[0] * p["first"].square().sum() + decay[1] * p["last"].square().sum()

    problem = bl.BilevelProblem(inner, lambda p, u: loss(p), start)
    u = torch.full((2,), -5.0, device=device)
    return lambda: bl.hypergradient(problem, bl.GradientDescent(0.1, steps=steps), bl.FullUnroll(), u)


def measure(device: str) -> dict[str, Any]:
    """Time both jobs on the CPU and on the device, in turns; medians of five after one warm-up."""
    small = device == "cpu"
    jobs = {
        "logistic": (logistic, (200, 10) if small else (20_000, 500)),
        "net": (net, (20, 8, 5) if small else (2_000, 512, 100)),
        **{f"{kind}, unrolled": (unrolled, (kind, 40 if small else 1_000)) for kind in ("ridge", "logistic", "rows")},
    }
    found = {}
    for name, (make, sizes) in jobs.items():
        works = {kind: make(kind, *sizes) for kind in dict.fromkeys(("cpu", device))}
        seconds: dict[str, list[float]] = {kind: [] for kind in works}
        for turn in range(6):
            for kind, work in works.items():
                start = time.perf_counter()
                work()  # ends with looks at its result, hence after the device
                if turn:
                    seconds[kind].append(time.perf_counter() - start)
        found[name] = {"sizes": sizes} | {f"seconds_{kind}": statistics.median(s) for kind, s in seconds.items()}
    return {"ok": True, "found": found}


CHECKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "tests": run_tests,
    "steps": check_steps,
    "waits": check_waits,
    "graphs": check_graphs,
    "agreement": check_agreement,
    "random_numbers": check_random_numbers,
    "seconds": measure,
}


def main() -> int:
    """Run the checks, print one line for each, and write the file."""
    parser = argparse.ArgumentParser(description="Check the library on a CUDA device.")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the JSON file to write")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="which checks to run")
    parser.add_argument("--dry-run", action="store_true", help="run the same code on the CPU, to test this script")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("torch sees no CUDA device: run this on a machine with one, or try --dry-run.", file=sys.stderr)
        return 2
    device = "cpu" if arguments.dry_run else "cuda"
    results: dict[str, Any] = {"dry_run": arguments.dry_run, "environment": describe_environment(device)}
    for name in arguments.only:
        results[name] = CHECKS[name](device)
        print(f"{name:<16}{'ok' if results[name]['ok'] else 'FAILED'}", flush=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}")
    return 0 if all(results[name]["ok"] for name in arguments.only) else 1


if __name__ == "__main__":
    raise SystemExit(main())
