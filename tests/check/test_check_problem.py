"""`check_problem` and `bilevel check`: every planted fault is caught with its words, and nothing shipped is accused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import F64, normal, tree_case
from planted_faults import FAULTS, fit, made
from problem_cases import PROBLEMS, draw
from torch import Tensor

import bilevel as bl
from bilevel.check.differences import derivative, largest_jump
from bilevel.cli import main
from bilevel.oracles.precision import DoublePrecision


def words_of(findings: Any) -> str:
    return " ".join(f"{finding.check} {finding.sentence}" for finding in findings)


@pytest.mark.parametrize(("make", "words"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_planted_fault_is_caught_with_its_words(make: Any, words: tuple[str, ...]) -> None:
    problem, hparams, solver = make()
    report = bl.check_problem(problem, hparams, solver)
    assert not report.ok
    said = words_of(report.faults)
    assert [word for word in words if word not in said] == [], report


@pytest.mark.parametrize(
    ("make", "words"), [fault[1:] for fault in FAULTS[:8:2]], ids=[fault[0] for fault in FAULTS[:8:2]]
)
def test_the_check_of_an_estimator_sees_a_planted_fault_of_its_problem(make: Any, words: tuple[str, ...]) -> None:
    problem, hparams, solver = make()
    report = bl.check_hypergradient(problem, solver or bl.GradientDescent(), bl.Implicit(), hparams)
    assert not report.ok
    assert words[-1] in words_of(report.findings)
    assert "FAULT" in str(report)


SHIPPED = [name for name in PROBLEMS if "mean-log" in name or name.startswith(("weighted", "quadratic"))]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_problem_is_not_accused(name: str) -> None:
    problem = PROBLEMS[name]()
    u = draw(problem).u
    solver = bl.GradientDescent(0.1, steps=2000) if "poisson" in name else None
    report = bl.check_problem(problem, u - 2.0 if name.endswith("log") else u, solver, seed=1)
    assert report.ok, report
    assert {"Implicit", "FullUnroll", "TruncatedUnroll"} <= {finding.check for finding in report.findings}
    assert report["Implicit"].verdict == "ok"
    assert "no fault found" in str(report)


@pytest.mark.parametrize("solver", [bl.Newton(), bl.Adam(0.05, steps=25), bl.HeavyBall(), bl.QuasiNewton()], ids=repr)
def test_no_solver_is_accused_on_a_smooth_convex_problem_of_trees(solver: Any) -> None:
    case = tree_case("tensor", "dict")
    report = bl.check_problem(case.problem, case.hparams, solver)
    assert report.ok, report


def test_float32_is_examined_in_float64_and_not_accused() -> None:
    X, y = normal(1, 20, 3).float(), normal(2, 20).float()
    problem = bl.BilevelProblem(
        lambda w, u: (X @ w - y).square().mean() + u.exp() * w.square().sum(),
        lambda w, u: (X @ w - 1.1 * y).square().mean(),
        torch.zeros(3),
    )
    report = bl.check_problem(problem, torch.tensor(-1.0))
    assert report.ok, report
    assert report["precision"].verdict == "ok"


def test_a_network_of_relus_is_not_accused() -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    X, y = normal(1, 20, 3), normal(2, 20, 1)
    problem = bl.ModuleProblem(
        model,
        lambda net, p, u: (net(X) - y).square().mean() + u.exp() * sum(v.square().sum() for v in p.values()),
        lambda net, p, u: (net(X) - 1.1 * y).square().mean(),
    )
    report = bl.check_problem(problem, torch.tensor(0.0, dtype=F64))
    assert report["jumps"].verdict == report["inner gradient"].verdict == "ok", report


# Numbers against independent arithmetic -------------------------------------------------------------------------------


def test_curvature_condition_step_sizes_and_tail_are_those_of_the_dense_hessian() -> None:
    problem = bl.QuadraticProblem.random(6, 2, condition=20.0, seed=3)
    u = torch.zeros(2, dtype=F64)
    values = torch.linalg.eigvalsh(problem.hessian)
    low, high = float(values[0]), float(values[-1])
    report = bl.check_problem(problem, u, bl.GradientDescent(1.0 / high, steps=400))
    assert report["curvature"].measured == pytest.approx(low, rel=1e-8)
    assert report["contraction"].measured == pytest.approx(1.0 - low / high, rel=1e-3)
    assert f"2/(l+L) = {2 / (low + high):.3g}" in report["contraction"].sentence
    assert f"1/L = {1 / high:.3g}" in report["contraction"].sentence
    tail = int(report["contraction"].sentence.split("tail=")[1].split()[0])
    assert (1.0 - low / high) ** tail <= 1.1e-3 < 1.1 * (1.0 - low / high) ** (tail - 1)
    found = bl.hypergradient(problem, bl.GradientDescent(1.0 / high, steps=2 * tail), bl.TruncatedUnroll(tail), u)
    exact = problem.exact_hypergradient(u)
    assert float((found.hypergradient - exact).norm() / exact.norm()) < 5e-3


def test_a_slope_that_the_losses_hide_is_measured() -> None:
    problem, hparams, _ = made(lambda w, u: fit(w) + u.detach().exp() * 0.5 * w.square().sum() + u * 1e-3 * w.sum())
    report = bl.check_problem(problem, hparams)
    assert not report.ok
    assert "by `hparams`" in report["second derivatives"].sentence


def test_extrapolated_differences_know_their_own_error() -> None:
    for function, exact in ((torch.exp, 1.0), (torch.sin, 1.0), (lambda t: (50 * t).tanh(), 50.0)):
        value, uncertainty = derivative(lambda t, f=function: float(f(torch.tensor(t, dtype=F64))))  # type: ignore[misc]
        assert abs(value - exact) <= 10 * uncertainty + 1e-12
        assert abs(value - exact) < 1e-6 * exact
    assert derivative(lambda t: float("nan"))[1] == float("inf")


def test_a_jump_is_measured_and_a_kink_is_none() -> None:
    assert largest_jump(lambda t: (abs(t - 0.3), -1.0 if t < 0.3 else 1.0))[0] < 1e-8
    assert largest_jump(lambda t: (t + 0.25 * (t > 0.61), 1.0))[0] == pytest.approx(0.25)


def test_single_precision_data_are_widened_where_they_lie() -> None:
    data = normal(1, 5).float()
    w = torch.tensor(0.1, dtype=F64, requires_grad=True)
    with DoublePrecision():
        loss = (data * w - 1.0).square().sum()
        (slope,) = torch.autograd.grad(loss, w)
    exact = 2 * (data.double() * (data.double() * 0.1 - 1.0)).sum()
    assert float(slope) == pytest.approx(float(exact), rel=1e-14)


def test_a_batch_and_wrong_places_are_refused() -> None:
    problem = bl.QuadraticProblem.random(3, 2, seed=0)
    with pytest.raises(
        ValueError, match=r"`check_problem` takes one problem, got a batch of 4: check batch.member\(i\)"
    ):
        bl.check_problem(problem.batched(4), torch.zeros(4, 2, dtype=F64))
    with pytest.raises(ValueError, match="got Tensor in the place of BilevelProblem"):
        bl.check_problem(torch.zeros(2), problem)  # type: ignore[arg-type]


def test_inputs_that_are_refused_are_a_finding() -> None:
    problem = bl.QuadraticProblem.random(3, 2, seed=0)
    report = bl.check_problem(problem, torch.zeros(2))
    assert "must share dtype and device" in report["inputs"].sentence
    assert not bl.check_hypergradient(problem, bl.Newton(), bl.Implicit(), torch.zeros(2)).ok


def test_captured_data_of_another_dtype_are_a_note() -> None:
    scale = torch.ones(4)
    problem, hparams, _ = made(lambda w, u: fit(w * scale) + u.exp() * w.square().sum())
    report = bl.check_problem(problem, hparams)
    assert report.ok
    assert "`scale` is torch.float32 on cpu, but params are torch.float64" in report["inputs"].sentence


# The command ----------------------------------------------------------------------------------------------------------

FILE = """\
import torch
import bilevel as bl

X = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None] ** torch.arange(1, 4)
y = X.sum(1)
{noise}
problem = bl.BilevelProblem(
    lambda w, u: ((X @ w - y) ** 2).mean() * (1 + noise()) + u.exp() * (w**2).sum(),
    lambda w, u: ((X @ w - y - 0.1) ** 2).mean(),
    torch.zeros(3, dtype=torch.float64),
)
hparams = torch.tensor(-1.0, dtype=torch.float64)
other = torch.tensor(-2.0, dtype=torch.float64)


def make():
    return problem, hparams, bl.GradientDescent(5.0, steps=9)


def as_dict():
    return {{"problem": problem, "hparams": hparams}}


def fails():
    return problem.nothing


def empty():
    return None
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(noise="noise = lambda: 0"))
    return str(path)


def test_check_prints_a_table_and_leaves_with_zero(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", file, "--hparams", "other", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("inner gradient", "determinism", "curvature", "TruncatedUnroll", "no fault"))
    assert main(["check", f"{file}:as_dict"]) == 0


def test_check_leaves_with_one_on_a_fault(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:make"]) == 1
    assert "contraction         FAULT" in capsys.readouterr().out
    noisy = tmp_path / "noisy.py"
    noisy.write_text(FILE.format(noise="noise = lambda: 0.01 * torch.rand(())"))
    assert main(["check", str(noisy)]) == 1
    assert "1 fault: inputs" in capsys.readouterr().out


def test_check_takes_the_problems_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "name: tiny\n"
        "problems: {ridge: {class: RidgeProblem, data: {name: synthetic_regression, rows: 60, features: 4}}}\n"
        "solver: {class: Newton}\nestimators: {implicit: {class: Implicit}}\nouter: {optimizer: Adam, steps: 1}\n"
    )
    assert main(["check", str(path)]) == 0
    assert f"{path}:ridge with Newton()" in capsys.readouterr().out
    assert main(["check", f"{path}:lasso"]) == 2
    assert "has no problem 'lasso', only ridge." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        (
            "nowhere.py",
            [],
            "there is no file nowhere.py: name a Python file, as in `bilevel check my_problem.py:problem`.",
        ),
        ("{file}:lost", [], "defines no 'lost'; it has problem: bilevel check {file}:problem."),
        (
            "{file}:fails",
            [],
            "AttributeError: 'BilevelProblem' object has no attribute 'nothing' (mine.py, line",
        ),
        ("{file}:empty", [], "its problem is NoneType."),
        ("{file}:hparams", [], "must be a BilevelProblem, a tuple (problem, hparams, solver)"),
        ("{file}", ["--hparams", "lost"], "defines no 'lost', which --hparams names."),
    ],
)
def test_check_refuses_in_one_sentence(
    target: str, options: list[str], sentence: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", target.format(file=file), *options]) == 2
    assert sentence.format(file=file) in capsys.readouterr().err


def test_check_says_which_line_of_the_file_fails_and_where_hyperparameters_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, sentence in (
        ("x = 1\nx.y\n", "cannot be run: AttributeError: 'int' object has no attribute 'y' (broken.py, line 2)."),
        ("x = = 1\n", "cannot be run: SyntaxError: invalid syntax (line 1)."),
        (
            "import torch, bilevel as bl\n"
            "problem = bl.BilevelProblem(lambda w, u: w, lambda w, u: w, torch.zeros(()))\n",
            "Define `hparams` in the file, name them by --hparams NAME",
        ),
    ):
        path = tmp_path / "broken.py"
        path.write_text(text)
        assert main(["check", str(path)]) == 2
        assert sentence in capsys.readouterr().err


def test_hyperparameters_that_are_no_tensors_are_a_fault_of_the_inputs(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path(file).open("a") as text:
        text.write('\nhparams = "rate"\n')
    assert main(["check", file]) == 1
    assert "`hparams` must be a Tensor, got str." in capsys.readouterr().out


# Networks -------------------------------------------------------------------------------------------------------------


DATA, TARGETS = normal(1, 20, 3), normal(2, 20, 1)
STEP = bl.GradientDescent(step_size=0.2, steps=15)
NETWORKS: dict[str, tuple[list[torch.nn.Module], Any, dict[str, Any]]] = {
    "running statistics": ([torch.nn.BatchNorm1d(3, affine=False)], STEP, {}),
    "random layers": ([torch.nn.Dropout(0.2)], STEP, {"seed": 0}),
    "mini-batches": ([], STEP, {"sampler": bl.MiniBatches((DATA, TARGETS), batch_size=5, seed=0)}),
    "a batch each outer step": (
        [],
        STEP,
        {"sampler": bl.MiniBatches((DATA, TARGETS), batch_size=10, seed=0), "fresh_batch": "outer step"},
    ),
    "a tuned optimizer": ([], bl.SGD(lambda u: u["log_rate"].exp(), momentum=0.5, steps=10), {}),
    "all of it": (
        [torch.nn.BatchNorm1d(3, affine=False), torch.nn.Dropout(0.2)],
        bl.SGD(lambda u: u["log_rate"].exp(), steps=10),
        {"seed": 0, "sampler": bl.MiniBatches((DATA, TARGETS), batch_size=10, seed=0)},
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_right_network_raises_no_alarm_and_its_unrolls_are_compared_with_its_own_runs(kind: str) -> None:
    layers, solver, options = NETWORKS[kind]

    def train(model: Any, params: Any, hparams: Any, batch: Any = (DATA, TARGETS)) -> Tensor:
        penalty = hparams["log_decay"].exp() * sum(p.square().sum() for p in params.values())
        return (model(batch[0]) - batch[1]).square().mean() + penalty

    def validate(model: Any, params: Any, hparams: Any) -> Tensor:
        return (model.eval()(DATA + 0.3) - TARGETS).square().mean()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torch.nn.Sequential(*layers, torch.nn.Linear(3, 1)).double()
    problem = bl.ModuleProblem(module, train, validate, **options)
    hparams = {"log_decay": torch.tensor(-2.0, dtype=F64)}
    if isinstance(solver, bl.SGD):
        hparams["log_rate"] = torch.tensor(-2.0, dtype=F64)
    report = bl.check_problem(problem, hparams, solver)
    assert report.ok, str(report)
    judged = {finding.check: finding for finding in report.findings}
    assert {"Implicit", "FullUnroll"} <= set(judged), str(report)
    assert "agrees with differences" in judged["FullUnroll"].sentence, str(report)


@dataclass(frozen=True)
class Plain(bl.InnerSolver):
    """Gradient descent of a user's own, which says nothing of its stability."""

    rate: float = 0.1

    def step(self, inner: Any, state: bl.InnerState) -> bl.InnerState:
        return state.moved(state.params - self.rate * inner.grad(state.params))


@pytest.mark.parametrize(("rate", "verdict"), [(0.9, "ok"), (1.1, "fault")])
def test_steps_that_expand_are_a_fault_also_where_the_run_stands_at_the_solution(rate: float, verdict: str) -> None:
    # Curvature 2 in every direction: steps contract below a rate of 1.
    problem = bl.BilevelProblem(
        lambda x, u: (x - u).square().sum(), lambda x, u: (x - 1.0).square().sum(), torch.full((3,), 0.5, dtype=F64)
    )
    finding = bl.check_problem(problem, torch.tensor(0.5, dtype=F64), Plain(rate=rate, steps=4))["contraction"]
    assert finding.verdict == verdict
    assert finding.measured == pytest.approx(abs(1.0 - 2.0 * rate), rel=0.01)
    assert ("move away" in finding.sentence) == (verdict == "fault")


def test_a_hyperparameter_that_hardly_matters_is_a_note_with_its_name() -> None:
    problem = bl.BilevelProblem(
        lambda x, u: (x - u[0]).square().sum() + 1e-10 * u[1] * x.square().sum(),
        lambda x, u: (x - 1.0).square().sum(),
        torch.zeros(3, dtype=F64),
    )
    finding = bl.check_problem(problem, torch.ones(2, dtype=F64), bl.Newton())["influence"]
    assert finding.verdict == "note"
    assert "hparams[1]" in finding.sentence
    assert "rescale" in finding.sentence
