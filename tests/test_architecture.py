"""What the package promises of its own shape: floors, quick import, public names, room for a user's own classes."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ridge_case, tree_case

import bilevel as bl

ROOT = Path(bl.__file__).parent
FLOORS = (
    "core",
    "numerics data",
    "oracles",
    "base",
    "inner linear networks certify",
    "problems engine meta",
    "hypergrad theory criteria",
    "outer check selection",
    "compare curse sklearn tables",
    "config",
    "cli",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
FILES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


@functools.cache
def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it and for whatever purpose."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bilevel."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.ImportFrom) and node.module == "bilevel":
            found |= {f"bilevel.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("bilevel.")}
    return found


def room_of(name: str) -> str:
    return name.split(".")[1]


def test_imports_only_point_down_and_no_file_lies_loose() -> None:
    for name, path in FILES.items():
        if path.parent == ROOT:
            assert path.name in ("__init__.py", "__main__.py"), f"{path.name} lies loose: put it into a room"
            continue
        up = [each for each in imported(path) if room_of(each) != room_of(name)]
        assert [each for each in up if FLOOR[room_of(each)] >= FLOOR[room_of(name)]] == [], name


def test_no_file_imports_one_that_imports_it() -> None:
    graph = {name: {each for each in imported(path) if each in FILES} for name, path in FILES.items()}
    graph = {name: targets for name, targets in graph.items() if not name.endswith("__init__")}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    # Who is left imports another who is left: a circle, or what stands above one.
    assert graph == {}


@pytest.mark.parametrize("room", ["inner", "linear", "hypergrad"])
def test_hot_code_never_calls_item(room: str) -> None:
    for path in (ROOT / room).glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not [node.lineno for node in calls if node.attr in ("item", "tolist", "numpy")], path


def test_importing_the_package_changes_nothing_and_its_names_bring_no_heavy_or_retired_module() -> None:
    code = (
        "import contextlib, io, signal, sys, threading, time, warnings\n"
        "def world(): return signal.getsignal(signal.SIGINT), threading.active_count(), list(warnings.filters)\n"
        "before = world(); import bilevel; assert world() == before\n"
        "from bilevel.cli import main\n"
        "for line in ('--help', '--version', 'tune --help', 'predict --seed 1'):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        with contextlib.suppress(SystemExit): main(line.split())\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "import torch, torch.distributions, torch.utils._pytree\n"
        # Of this process: a busy machine makes no import slow.
        "start = time.process_time(); from bilevel import *; took = time.process_time() - start\n"
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'pandas', 'functorch', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "print(took, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, heavy = done.stdout.strip().split(" ", 1)
    assert heavy == "[]"
    assert float(took) < 2.0


def test_the_public_names_are_those_that_dir_shows_and_type_checkers_see() -> None:
    seen = {
        alias.name
        for node in ast.walk(ast.parse((ROOT / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("bilevel")
        for alias in node.names
        if alias.name == alias.asname
    }
    assert dir(bl) == bl.__all__ == sorted(seen)
    assert all(getattr(bl, name) is not None for name in bl.__all__)
    assert bl.__version__ == importlib.metadata.version("bilevel")
    assert bl.certify.bound_error  # rooms are there without an import of their own
    for name in ("Rige", "_NOTHING", "__wrapped__"):
        assert not hasattr(bl, name)


def test_the_public_problems_and_fields_exist() -> None:
    for name in ("RidgeProblem", "LogisticProblem", "SoftmaxProblem", "QuadraticProblem"):
        assert hasattr(bl.problems, name)
    fields = {"outer_loss", "hypergradient", "params", "certificate", "cost"}
    assert fields <= set(bl.Estimate.__dataclass_fields__)
    assert isinstance(bl.Estimate.status, property)
    assert all(len(status.remedy) > 20 for status in bl.Status)


# What a user writes: one class each ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignedDescent(bl.InnerSolver):
    """A toy: gradient descent with a smooth clip on the step; nothing but `step` is given."""

    rate: float = 0.1

    def step(self, inner: Any, state: bl.InnerState) -> bl.InnerState:
        gradient = inner.grad(state.params)
        return state.moved(bl.tree.tree_map(lambda x, g: x - self.rate * torch.tanh(g), state.params, gradient))


@dataclass(frozen=True)
class IdentityHessian(bl.HypergradEstimator):
    """A toy: the cross derivative at the last iterate, scaled; biased by design."""

    rate: float = 0.1

    def solve(self, run: bl.Run) -> bl.Solution:
        inner, end = run.inner(), run.solve()
        solved = run.solver.params(end.state)

        def pullback(cotangent: Any) -> bl.Pullback:
            return bl.Pullback(bl.tree.scale(-self.rate, inner.linearize(solved).cross(cotangent)), steps=1)

        return end.solution(solved, pullback)


@pytest.mark.crossed
@pytest.mark.parametrize("params", ["tensor", "0-d", "dict"])
@pytest.mark.parametrize(
    "estimator", [bl.FullUnroll(), bl.FullUnroll(memory="graph"), bl.FullUnroll(mode="forward")], ids=repr
)
def test_a_users_solver_of_one_class_unrolls_correctly(params: str, estimator: Any) -> None:
    case = tree_case(params, "dict")
    report = bl.check_hypergradient(case.problem, SignedDescent(steps=6), estimator, case.hparams)
    assert report.ok, report


def test_a_users_solver_works_with_every_part() -> None:
    case = tree_case("dict", "dict")
    solver = SignedDescent(tol=1e-9)
    estimate = bl.hypergradient(case.problem, solver, bl.Implicit(), case.hparams, certify=True)
    assert estimate.status.ok
    assert estimate.certificate.error_kind == "estimate"
    torch.testing.assert_close(
        torch.cat([leaf.reshape(-1) for leaf in estimate.hypergradient.values()]),
        case.hypergradient(),
        rtol=1e-6,
        atol=0,
    )
    layer = bl.solution(case.problem, solver, bl.Implicit(), case.hparams)
    assert set(layer) == {"a", "b"}
    outer = bl.OuterOptimizer(case.problem, solver, bl.TruncatedUnroll(tail=20), case.hparams)
    state = outer.run(3, progress=False)
    assert state.history[-1].outer_loss < state.history[0].outer_loss
    outer.load_state_dict(outer.state_dict())


def test_a_users_estimator_works_with_every_part() -> None:
    case = ridge_case()
    estimator = IdentityHessian(0.1)
    with pytest.warns(bl.BilevelWarning, match="the error of the hypergradient may be"):
        estimate = bl.hypergradient(case.problem, bl.GradientDescent(tol=1e-10), estimator, case.hparams, certify=True)
    x = case.solution()
    expected = -0.1 * case.cross(x, case.hparams).t() @ case.outer(x, case.hparams)[0]
    torch.testing.assert_close(estimate.hypergradient, expected, rtol=1e-7, atol=1e-9)
    # The certificate sees the bias of an estimator that it knows nothing about.
    true = float((estimate.hypergradient - case.hypergradient()).norm())
    value = estimate.certificate.error
    assert value is None or value == pytest.approx(true, rel=0.3)
    u = case.hparams.clone().requires_grad_()
    bl.solution(case.problem, bl.GradientDescent(), estimator, u).sum().backward()
    assert u.grad is not None
    outer = bl.OuterOptimizer(case.problem, bl.GradientDescent(), estimator, case.hparams)
    assert len(outer.run(3, progress=False).history) == 3
    report = bl.check_hypergradient(case.problem, bl.GradientDescent(), estimator, case.hparams)
    assert not report.ok
