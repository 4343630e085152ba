"""What the package promises of its own shape: floors, quick import, public names, room for a user's own classes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ridge_case, tree_case

import bilevel as bl
from bilevel.engine.loop import begin, run_inner

ROOT = Path(bl.__file__).parent
FLOORS = {
    1: (
        "starting",
        "tree",
        "status",
        "cost",
        "decay",
        "lanczos",
        "nystrom",
        "look",
        "options",
        "constraints",
        "polynomials",
        "krylov",
        "threads",
        "spectral",
        "samplers",
        "loaders",
        "sampling",
        "modules",
        "module_checks",
        "references",
        "contents",
        "purity",
        "watch",
        "ranks",
        "batch_norm",
        "draws",
        "replicas",
        "sums",
        "members",
        "inputs",
        "blame",
        "explain",
        "files",
        "figures",
        "precision",
        "tracebacks",
    ),
    2: (
        *(
            "linearization",
            "oracles",
            "statistics",
            "certifiable",
            "captured",
            "traced",
            "batches",
            "problem",
            "rows",
            "module_problem",
        ),
        *("data", "datafiles", "dataprep"),
    ),
    3: ("base",),
    4: ("inner", "linear", "problems"),
    5: ("theory", "certify"),
    6: ("hypergrad",),
    7: ("outer", "check"),
    8: ("compare", "curse", "sklearn", "meta"),
    9: ("config",),
    10: ("cli", "__main__"),
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
DOORS = ("inner", "linear", "problems", "theory", "certify", "compare", "curse", "sklearn", "meta")
"""Rooms that do not know another room of their floor; estimators use linear solvers and certificates from below."""


def imports(path: Path) -> Iterator[str]:
    """The first names below `bilevel` that a file imports, those for type checking alone left out."""
    module = ast.parse(path.read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bilevel":
            parts = node.module.split(".")[1:]
            yield from parts[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bilevel."))


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_point_down_and_rooms_of_a_floor_do_not_know_each_other(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert room in FLOOR, f"say on which floor {room} is"
    for name in imports(path):
        assert name in FLOOR, f"{path.name} imports {name}, which is on no floor"
        assert FLOOR[name] <= FLOOR[room], f"{room} imports {name}, which is above it"
        if name != room and room in DOORS:
            assert FLOOR[name] < FLOOR[room], f"{room} imports {name}, its neighbour"


@pytest.mark.parametrize("room", ["inner", "linear", "hypergrad"])
def test_hot_code_never_calls_item(room: str) -> None:
    for path in (ROOT / room).glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not [node.lineno for node in calls if node.attr in ("item", "tolist", "numpy")], path


def test_importing_the_package_is_quick_and_brings_no_heavy_or_retired_module() -> None:
    code = (
        "import sys, time, torch, torch.distributions, torch.utils._pytree\n"
        # Of this process: a busy machine makes no import slow.
        "start = time.process_time(); import bilevel; took = time.process_time() - start\n"
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'pandas', 'functorch', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "print(took, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, heavy = done.stdout.strip().split(" ", 1)
    assert heavy == "[]"
    assert float(took) < 2.0


PUBLIC = [
    *("BilevelProblem", "GradientDescent", "HeavyBall", "Nesterov", "Newton", "Adam", "FixedPoint"),
    *("FullUnroll", "TruncatedUnroll", "Implicit", "FiniteDifference", "CG", "GMRES", "Neumann", "Direct"),
    *("OuterOptimizer", "Estimate", "Status", "hypergradient", "solution", "check_hypergradient", "problems"),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_names_exist(name: str) -> None:
    assert hasattr(bl, name)


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

    def solve(self, problem: Any, solver: Any, hparams: Any, params: Any, carry: Any, meter: Any) -> bl.Solution:
        inner = problem.bind(hparams, meter.counts)
        run = run_inner(inner, solver, begin(inner, solver, params, carry))
        solved = solver.params(run.state)

        def pullback(cotangent: Any) -> bl.Pullback:
            return bl.Pullback(bl.tree.scale(-self.rate, inner.linearize(solved).cross(cotangent)), steps=1)

        return bl.Solution(solved, run.state, pullback, run.residual, run.steps, run.verdict)


@pytest.mark.parametrize("params", ["tensor", "0-d", "dict"])
@pytest.mark.parametrize(
    "estimator", [bl.FullUnroll(), bl.FullUnroll(memory="graph"), bl.FullUnroll(mode="forward")], ids=repr
)
def test_a_users_solver_of_one_class_unrolls_correctly(params: str, estimator: Any) -> None:
    case = tree_case(params, "dict")
    report = bl.check_hypergradient(case.problem, SignedDescent(steps=15), estimator, case.hparams)
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
