"""The comparison: complete rows, honest referees, failures as rows, and runs that continue bit for bit."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

import joblib
import pytest
import torch
import yaml

from bilevel import (
    CG,
    GMRES,
    SGD,
    Adam,
    BilevelProblem,
    FullUnroll,
    GradientDescent,
    HeavyBall,
    HypergradEstimator,
    Implicit,
    QuadraticProblem,
    QuasiNewton,
    TruncatedUnroll,
    stack,
)
from bilevel.base import describe
from bilevel.cli import main
from bilevel.compare import (
    Comparison,
    OuterOptions,
    Plan,
    RunFolder,
    RunFolderError,
    Setup,
    compare,
    draw_figures,
    ownership,
    tables,
)
from bilevel.compare import cells as cells_module
from bilevel.compare import folder as folder_module
from bilevel.compare import run as run_module
from bilevel.compare.cells import CellRun, best_row, end_row, run_cell
from bilevel.compare.run import run_group
from bilevel.compare.summary import summarize
from bilevel.config import load_plan
from bilevel.core import environment
from bilevel.outer import OuterOptimizer, joined, separated
from bilevel.problems import LogisticProblem, RidgeProblem

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "problems": {
        "logistic": {
            "class": "LogisticProblem",
            "data": {"name": "synthetic_classification", "rows": 80, "features": 5},
        },
        "ridge": {
            "class": "RidgeProblem",
            "data": {"name": "synthetic_regression", "rows": 80, "features": 5},
            "penalty": "per_feature",
        },
    },
    "solver": {"class": "GradientDescent", "tol": 1e-10},
    "estimators": {
        "implicit": {"class": "Implicit"},
        "tail": {"class": "TruncatedUnroll", "tail": 3},
    },
    "outer": {"optimizer": "Adam", "lr": 0.3, "steps": 4},
    "seeds": [0, 1],
}


def plan_of(tmp_path: Path, **changes: Any) -> Plan:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes, sort_keys=False))
    return load_plan(path, device="cpu")


def run(plan: Plan, out: Path, **options: Any) -> Comparison:
    return compare(plan, RunFolder(out, plan.config), progress=False, **options)


def quadratic(seed: int) -> Setup:
    problem = QuadraticProblem.random(size=4, hyperparameters=2, condition=10.0, seed=seed)
    return Setup(problem, torch.zeros(2, dtype=torch.float64))


def plain_plan(**estimators: HypergradEstimator) -> Plan:
    return Plan(
        "plain", {"quadratic": quadratic}, GradientDescent(), estimators, OuterOptions(steps=2), (0,), None, {"a": 1}
    )


def without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.startswith(("seconds", "memory"))}
        return {key: without_measurements(each) for key, each in kept.items()}
    return [without_measurements(each) for each in value] if isinstance(value, list) else value


def results(out: Path) -> tuple[Any, Any]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return without_measurements(json.loads((out / "summary.json").read_text())), without_measurements(rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(plan_of(folder), folder / "out")
    return folder / "out"


def test_rows_are_complete_and_valid_json(undisturbed: Path) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (undisturbed / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=no_constant) for line in lines]
    cells = [(r["problem"], r["estimator"], r["seed"], r["step"]) for r in rows]
    expected = [
        (problem, estimator, seed, step)
        for problem in CONFIG["problems"]
        for estimator in CONFIG["estimators"]
        for seed in CONFIG["seeds"]
        for step in (1, 2, 3, 4)
    ]
    assert cells == expected
    may_be_missing = {"adjoint_residual", "error_estimate"}
    for row in rows:
        assert {key for key, value in row.items() if value is None} <= may_be_missing
        assert {"counts", "gradient_equivalents_total", "seconds_total", "memory_peak_bytes", "test_loss"} <= set(row)
        assert ("test_r2" in row) == (row["problem"] == "ridge")
        assert row["referee"] == ("closed form" if row["problem"] == "ridge" else "Newton and Direct to 1e-12")


def test_costs_add_up(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "results.jsonl").read_text().splitlines()][:4]
    assert rows[3]["gradient_equivalents_total"] == sum(row["gradient_equivalents"] for row in rows)
    assert rows[3]["seconds_total"] == pytest.approx(sum(row["seconds"] for row in rows))


def test_implicit_is_exact_and_a_short_tail_is_not(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    for by_estimator in summary["problems"].values():
        assert by_estimator["implicit"]["hypergradient_error_max"] < 1e-7
        assert 1e-4 < by_estimator["tail"]["hypergradient_error_median"] < 2.0
        assert by_estimator["implicit"]["outer_loss_final"] < by_estimator["implicit"]["outer_loss_start"]
        assert by_estimator["implicit"]["failures"] == 0


def test_referee_of_a_problem_without_closed_form_is_right(tmp_path: Path) -> None:
    class NoClosedForm(QuadraticProblem):
        def exact_hypergradient(self, hparams: Any) -> Any:
            return None

    def setup(seed: int) -> Setup:
        problem = NoClosedForm.random(size=4, hyperparameters=2, condition=10.0, seed=seed)
        return Setup(problem, torch.zeros(2, dtype=torch.float64))

    plan = replace(plain_plan(implicit=Implicit(), full=FullUnroll()), problems={"closed": quadratic, "tight": setup})
    rows = run(plan, tmp_path / "out").rows
    closed, tight = ([row for row in rows if row["problem"] == name] for name in ("closed", "tight"))
    for one, other in zip(closed, tight, strict=True):
        assert other["referee"] == "Newton and Direct to 1e-12"
        assert one["hypergradient_error"] == pytest.approx(other["hypergradient_error"], abs=1e-12)


def test_all_estimators_start_at_the_same_point(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "results.jsonl").read_text().splitlines()]
    first = [r["outer_loss"] for r in rows if (r["step"], r["problem"], r["seed"]) == (1, "ridge", 0)]
    assert len(first) == 2
    assert first[0] == first[1]


class Pulled(BaseException):
    """Stands for a process that is gone at once."""


@pytest.mark.parametrize("at", [1, 6, 13])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Pulled])
def test_resuming_equals_an_undisturbed_run(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException]
) -> None:
    plan, taken, step = plan_of(tmp_path), 0, OuterOptimizer.step
    monkeypatch.setattr("bilevel.compare.cells.SAVE_EVERY", 0.0)

    def interrupted(self: OuterOptimizer) -> Any:
        nonlocal taken
        taken += 1
        estimate = step(self)
        if taken == at:
            # After the step has moved the hyperparameters, before it is recorded: the worst moment.
            raise error
        return estimate

    with monkeypatch.context() as patch:
        patch.setattr(OuterOptimizer, "step", interrupted)
        if error is KeyboardInterrupt:
            assert run(plan, tmp_path / "out").interrupted
        else:
            with pytest.raises(Pulled):
                run(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()
    outcome = run(plan, tmp_path / "out")
    assert not outcome.interrupted
    assert results(tmp_path / "out") == results(undisturbed)


def test_a_stopped_run_keeps_its_last_step(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    folder = RunFolder(tmp_path / "out", plan.config)
    folder.prepare()
    first = plan.cells[0]
    half = run_cell(plan, first, folder, lambda row: folder.stop_file.touch() if row["step"] == 2 else None)
    assert (len(half.rows), half.done) == (2, False)
    folder.stop_file.unlink()
    assert len(run_cell(plan, first, folder).rows) == 4


def test_finished_cells_are_not_run_again(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path)

    def forbidden(self: OuterOptimizer) -> None:
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(OuterOptimizer, "step", forbidden)
    before = results(undisturbed)
    assert run(plan, undisturbed).found_complete
    assert results(undisturbed) == before


def test_patience_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A learning rate of zero makes no progress, so the run ends after 1 + 3 steps.
    outer = {"optimizer": "SGD", "lr": 0.0, "steps": 20, "patience": 3}
    plan = plan_of(tmp_path, outer=outer, seeds=[0], estimators={"implicit": {"class": "Implicit"}})
    folder = RunFolder(tmp_path / "out", plan.config)
    folder.prepare()
    cell = plan.cells[0]
    run_cell(plan, cell, folder, lambda row: folder.stop_file.touch() if row["step"] == 3 else None)
    folder.stop_file.unlink()
    ended = run_cell(plan, cell, folder)
    assert ended.stopped == "no progress for 3 steps"
    assert len(ended.rows) == 4


def test_several_processes_give_the_same_numbers(undisturbed: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    plan = plan_of(tmp_path)
    run(plan, tmp_path / "out", jobs=2)
    assert torch.get_num_threads() == threads
    ours, theirs = results(tmp_path / "out"), results(undisturbed)
    losses = [[row["outer_loss"] for row in rows] for _, rows in (ours, theirs)]
    # Workers have fewer threads, so sums may be taken in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_another_configuration_is_refused_and_nothing_is_touched(undisturbed: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, outer={"optimizer": "Adam", "lr": 0.3, "steps": 5})
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    message = r"another configuration, where `outer.steps` is 4 there and 5 here: --fresh starts anew there, --out DIR"
    with pytest.raises(RunFolderError, match=message):
        run(plan, undisturbed)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_the_first_difference_of_two_configurations_is_named() -> None:
    held = {"problems": {"a": {"start": 0.0}, "b": {}}, "outer": {"lr": 0.1, "steps": 4}}
    for wanted, words in (
        (held, ""),
        ({**held, "outer": {"steps": 4, "lr": 0.1}}, ""),
        ({**held, "problems": {"b": {}, "a": {"start": 0.0}}}, "where `problems` has another order"),
        ({**held, "problems": {"a": {}, "b": {}}}, "where `problems.a.start` is only there"),
        ({**held, "seeds": [0]}, "where `seeds` is only in this one"),
        ({**held, "problems": {"a": {"start": 1.0}, "b": {}}}, "where `problems.a.start` is 0.0 there and 1.0 here"),
    ):
        assert ownership.first_difference(held, wanted) == words
    assert ownership.of_numbers("python", "3.12.1") == ownership.of_numbers("python", "3.12.7") == "3.12"
    assert ownership.of_numbers("torch", "2.9.1") == "2.9.1"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOREIGN = (
    *("notes.txt", ".vim.swap.tmp", ".config.yaml.123.tmp", "figures/paper.png", "checkpoints/model.pt", "mine/x.csv"),
    *(".git/HEAD", "figures/deep/memory.png", "errors.txt"),
)


def test_fresh_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = replace(plain_plan(implicit=Implicit(), tail=TruncatedUnroll(2)), seeds=(0, 1))
    run(plan, out)
    written = set(everything(out))
    # All that is written is on the list that the folder keeps, which is what is removed.
    assert written - {".lock", ".bilevel.json"} <= set(json.loads((out / ".bilevel.json").read_text())["writes"])
    for name in FOREIGN:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    other = replace(plain_plan(implicit=Implicit()), config={"a": 2})
    run(other, out, fresh=True)
    assert all((out / name).read_text() == "mine" for name in FOREIGN)
    assert yaml.safe_load((out / "config.yaml").read_text()) == {"a": 2}
    assert [path.name for path in (out / "checkpoints").glob("0*.pt")] == ["000-quadratic-implicit-0.pt"]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "results.jsonl",
        "figures/memory.png",
        "checkpoints/000-quadratic-implicit-0.pt",
        "checkpoints/owner",
    ],
)
def test_files_that_no_run_proves_to_have_written_are_left_alone(tmp_path: Path, name: str, fresh: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a: 1\n")
    sentence = f"{tmp_path} holds {name}, but nothing says that a run of this program wrote it: give another place with"
    with pytest.raises(RunFolderError, match=re.escape(sentence)):
        run(plain_plan(implicit=Implicit()), tmp_path, fresh=fresh)
    assert everything(tmp_path) == {name: b"a: 1\n"}


def test_links_and_folders_in_the_place_of_files_are_left_alone(tmp_path: Path) -> None:
    plan, out, far = plain_plan(implicit=Implicit()), tmp_path / "out", tmp_path / "far"
    run(plan, out)
    far.mkdir()
    (far / "memory.png").write_text("mine")
    (out / "figures").symlink_to(far)
    for fresh in (False, True):
        with pytest.raises(RunFolderError, match=r"figures is a link, where this run writes: move it away, or give"):
            run(plan, out, fresh=fresh)
    (out / "figures").unlink()
    (out / "summary.json").unlink()
    (out / "summary.json").mkdir()
    with pytest.raises(RunFolderError, match=r"summary\.json is a folder, where this run writes"):
        run(plan, out)
    assert (far / "memory.png").read_text() == "mine"
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(RunFolderError, match=r"nowhere is a link to nothing"):
        run(plan, tmp_path / "nowhere")


def test_a_folder_of_the_version_without_marks_continues_and_starts_anew(tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path, estimators={"implicit": {"class": "Implicit"}}), tmp_path / "out"
    run(plan, out)
    expected = results(out)
    for fresh in (False, True):
        (out / ".bilevel.json").unlink()
        (out / "summary.json").unlink()
        next((out / "checkpoints").glob("000*.pt")).unlink()
        (out / "checkpoints" / "model.pt").write_text("mine")
        done = run(plan, out, fresh=fresh)
        assert results(out) == expected
        assert not done.found_complete
        assert (out / "checkpoints" / "model.pt").read_text() == "mine"


def test_fresh_leaves_a_run_of_another_name(tmp_path: Path) -> None:
    one = replace(plain_plan(implicit=Implicit()), config={"name": "one"})
    run(one, tmp_path)
    before = everything(tmp_path)
    with pytest.raises(RunFolderError, match=r"holds the run 'one', this is 'two': give another place with --out DIR"):
        run(replace(one, config={"name": "two"}), tmp_path, fresh=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.yaml", text) for text in ("", "[", "null", "\0", "a: !!int x", "[" * 5000, "3")),
        *((name, text) for name in ("environment.json", ".bilevel.json") for text in ("", "3", "[" * 5000)),
        ("summary.json", "[]"),
        ("results.jsonl", ""),
    ],
)
def test_a_damaged_file_of_a_run_is_one_sentence_or_written_again(tmp_path: Path, name: str, content: str) -> None:
    plan = plain_plan(implicit=Implicit())
    whole = run(plan, tmp_path).rows
    (tmp_path / name).write_text(content)
    if name == "config.yaml":
        with pytest.raises(RunFolderError, match=r"config.yaml cannot be read: --fresh starts anew there"):
            run(plan, tmp_path)
        run(plan, tmp_path, fresh=True)
    else:
        assert run(plan, tmp_path).rows == whole
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"] == torch.__version__


def test_a_run_goes_on_with_its_own_versions_data_and_classes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plain_plan(implicit=Implicit()), seeds=(0, 1))
    plan = replace(plan, identity={"data": {"quadratic": "1" * 64}, "classes": {"own.py": "2" * 64}})
    run(plan, tmp_path)
    for kind, name, words in (
        (
            "data",
            "quadratic",
            "holds a run with other data of the problem 'quadratic', whose file has changed since:",
        ),
        (
            "classes",
            "own.py",
            "holds a run with another source of own.py, which has changed since: --fresh starts anew",
        ),
    ):
        other = replace(plan, identity={**plan.identity, kind: {name: "3" * 64}})
        with pytest.raises(RunFolderError, match=words):
            run(other, tmp_path)
    versions = dict(environment.versions())
    for name in versions:
        monkeypatch.setattr(folder_module, "versions", lambda name=name: versions | {name: "99.1.2"})
        # What is complete is shown, whatever the versions.
        assert run(plan, tmp_path).found_complete
        checkpoint = next((tmp_path / "checkpoints").glob("001*.pt"))
        content = checkpoint.read_bytes()
        checkpoint.unlink()
        with pytest.raises(RunFolderError, match=rf"begun with {name} '.*', this is {name} 99\.1\.2: install"):
            run(plan, tmp_path)
        checkpoint.write_bytes(content)


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    plan, out = plain_plan(implicit=Implicit()), tmp_path / "out"
    run(plan, out)
    (checkpoint,) = (out / "checkpoints").glob("*.pt")
    checkpoint.write_bytes(b"rubbish")
    expected = r"000-quadratic-implicit-0.pt cannot be read: delete it to run that part again"
    with pytest.raises(RunFolderError, match=expected):
        run(plan, out)


def test_a_diverging_run_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    plan = replace(
        plain_plan(implicit=Implicit(), tail=TruncatedUnroll(5)), solver=GradientDescent(step_size=50.0, steps=80)
    )
    outcome = run(replace(plan, problems={"quadratic": quadratic}), tmp_path / "out")
    assert [row["status"] for row in outcome.rows] == ["DIVERGED", "DIVERGED"]
    assert "step_size=50 is above the stability limit" in outcome.rows[0]["message"]
    assert outcome.rows[0]["outer_loss"] is None
    assert outcome.summary["problems"]["quadratic"]["tail"]["failures"] == 1
    assert "1 of 1 failed: GradientDescent diverges" in tables(outcome.summary)
    assert draw_figures(outcome.runs, tmp_path / "figures") == []


def test_a_problem_that_cannot_be_made_is_a_row(tmp_path: Path) -> None:
    def broken(seed: int) -> Setup:
        raise ValueError("the data of this seed cannot be used.")

    plan = replace(plain_plan(implicit=Implicit()), problems={"broken": broken, "quadratic": quadratic})
    rows = run(plan, tmp_path / "out").rows
    assert [(row["problem"], row["status"]) for row in rows] == [
        ("broken", "ValueError"),
        ("quadratic", "OK"),
        ("quadratic", "OK"),
    ]
    # What the user's own code raises names type, file and line; the whole traceback is kept.
    assert re.fullmatch(r"ValueError: the data .* cannot be used \(test_compare.py, line \d+\)\.", rows[0]["message"])
    (whole,) = (tmp_path / "out" / "checkpoints").glob("*.txt")
    assert 'raise ValueError("the data of this seed cannot be used.")' in whole.read_text()
    with pytest.raises(ValueError, match=r"^the data of this seed cannot be used\.$"):
        run(replace(plan, debug=True), tmp_path / "debug")


FROM_OUTSIDE: list[tuple[Exception, str]] = [
    (MemoryError(), "out of memory: MemoryError."),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "can't allocate"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: CUDA out of memory"),
    (OSError(24, "Too many open files"), "Too many open files"),
    (FileNotFoundError(2, "No such file or directory", "d.npz"), "No such file or directory: 'd.npz'"),
    (EOFError("no more bytes"), "no more bytes"),
]


@pytest.mark.parametrize(
    ("error", "words", "batch"),
    [*((*case, False) for case in FROM_OUTSIDE), (*FROM_OUTSIDE[0], True)],
    ids=lambda value: value if isinstance(value, bool) else type(value).__name__,
)
def test_what_happens_outside_is_no_result_and_the_same_call_tries_again(
    tmp_path: Path, error: Exception, words: str, batch: bool
) -> None:
    plan = replace(plain_plan(implicit=Implicit()), seeds=(0, 1), batch=batch)
    left, wrapped = [1], isinstance(error, EOFError)

    def shaky(seed: int) -> Setup:
        if seed == 1 and left:
            if wrapped:
                raise ValueError("a file cannot be read.") from error
            raise error
        return quadratic(seed)

    plan = replace(plan, problems={"quadratic": shaky})
    first = run(plan, tmp_path / "out")
    assert first.interrupted
    assert [each.done for each in first.runs] == [True, False]
    (sentence,) = first.kept_from
    assert sentence.startswith("quadratic, implicit, seed 1 did not end: ")
    assert words in sentence
    assert not (tmp_path / "out" / "summary.json").exists()
    left.clear()
    assert not run(plan, tmp_path / "out").interrupted
    expected = run(replace(plan, problems={"quadratic": quadratic}, batch=False), tmp_path / "other")
    assert results(tmp_path / "out") == results(tmp_path / "other")
    assert expected.summary["problems"]["quadratic"]["implicit"]["failures"] == 0


def test_a_worker_that_dies_is_a_sentence_and_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plain_plan(implicit=Implicit()), seeds=(0, 1))

    def killed(plan: Plan, group: Any, folder: RunFolder) -> Any:
        if group[0].seed == 1:
            raise BrokenProcessPool("A worker process managed by the executor was unexpectedly terminated.")
        return run_group(plan, group, folder)

    monkeypatch.setattr("bilevel.compare.run.run_group", killed)
    # Threads in the place of processes: starting those takes longer than all that they do.
    with joblib.parallel_config("threading"):
        first = run(plan, tmp_path, jobs=2)
        assert first.interrupted
        assert first.kept_from == ("a worker process was killed or crashed, perhaps out of memory.",)
        monkeypatch.undo()
        assert not run(plan, tmp_path, jobs=2).interrupted


def test_a_worker_ends_as_soon_as_its_parent_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, ended = [7], []
    monkeypatch.setattr(run_module, "WATCH_EVERY", 0.001)
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    for _ in range(2):
        run_module._end_with(7)
    watching = [thread for thread in threading.enumerate() if thread.name == "watch 7"]
    assert len(watching) == 1
    time.sleep(0.02)
    assert ended == []
    parent[0] = 1
    watching[0].join(5)
    assert ended == [1]


def test_ctrl_c_reaches_no_worker_that_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held() -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())

    class Recorded(joblib.Parallel):
        def __call__(self, tasks: Any) -> Any:
            starts.append(held())
            return super().__call__(tasks)

    starts: list[bool] = []
    trackers: list[bool] = []
    monkeypatch.setattr("multiprocessing.resource_tracker.ensure_running", lambda: trackers.append(held()))
    monkeypatch.setattr(run_module, "Parallel", Recorded)
    with joblib.parallel_config("threading"):
        assert not run(plain_plan(implicit=Implicit()), tmp_path, jobs=2).interrupted
    assert (trackers, starts, held()) == ([False], [True], False)


def test_an_error_in_the_middle_of_a_cell_keeps_the_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, step, count = plain_plan(implicit=Implicit()), OuterOptimizer.step, [0]

    def failing(self: OuterOptimizer) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise OSError(28, "No space left on device")
        return step(self)

    monkeypatch.setattr(OuterOptimizer, "step", failing)
    monkeypatch.setattr("bilevel.compare.cells.SAVE_EVERY", 0.0)
    first = run(plan, tmp_path / "out")
    assert [len(each.rows) for each in first.runs] == [1]
    assert "No space left on device" in first.kept_from[0]
    assert [row["step"] for row in run(plan, tmp_path / "out").rows] == [1, 2]
    assert count[0] == 3


def test_a_checkpoint_of_another_cell_or_configuration_is_refused(tmp_path: Path) -> None:
    plan = replace(plain_plan(implicit=Implicit()), seeds=(0, 1))
    run(plan, tmp_path / "out")
    run(replace(plan, config={"a": 2}), tmp_path / "other")
    one, two = sorted((tmp_path / "out" / "checkpoints").glob("*.pt"))
    whole = two.read_bytes()
    for content, words in (
        (one.read_bytes(), "is of another seed"),
        ((tmp_path / "other" / "checkpoints" / two.name).read_bytes(), "is of another configuration"),
        (saved({"weight": torch.zeros(2)}), "is no checkpoint of this program"),
        (saved([1, 2]), "is no checkpoint of this program"),
        (saved(torch.load(one, weights_only=True), without="cell"), "is not that of quadratic, implicit, seed 1"),
        (saved(torch.load(two, weights_only=True), without="rows"), "is not that of quadratic, implicit, seed 1"),
        (whole[: len(whole) // 2], "cannot be read"),
    ):
        two.write_bytes(content)
        with pytest.raises(RunFolderError, match=words) as caught:
            run(plan, tmp_path / "out")
        assert str(caught.value).endswith("delete it to run that part again, or start anew with --fresh.")
    # Those of versions that did not say what they are of.
    two.write_bytes(saved(torch.load(io.BytesIO(whole), weights_only=True), without="cell"))
    assert run(plan, tmp_path / "out").found_complete


def saved(value: Any, without: str = "") -> bytes:
    if without:
        del value[without]
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_budget_is_never_exceeded(tmp_path: Path) -> None:
    plan = replace(plain_plan(implicit=Implicit(), full=FullUnroll()), budget=3000.0)
    outcome = run(plan, tmp_path / "out")
    for each in outcome.runs:
        assert each.stopped.startswith(
            "used the budget of 3000 gradient-equivalents, not converged: |hypergradient| = "
        )
        total, last = each.rows[-1]["gradient_equivalents_total"], each.rows[-1]["gradient_equivalents"]
        assert total <= 3000 < total + 2 * last
    steps = [len(each.rows) for each in outcome.runs]
    assert steps[0] > steps[1] > 1


def test_a_budget_below_one_step_is_a_failure_that_says_so(tmp_path: Path) -> None:
    (row,) = run(replace(plain_plan(implicit=Implicit()), budget=2.0), tmp_path / "out").rows
    assert row["status"] == "OVER_BUDGET"
    assert "gradient-equivalents, above the budget of 2" in row["message"]


def test_any_problem_from_two_functions_can_be_compared(tmp_path: Path) -> None:
    def setup(seed: int) -> Setup:
        data = torch.linspace(-1, 2, 6, dtype=torch.float64)
        problem = BilevelProblem(
            lambda w, u: ((w["a"] - data) ** 2).sum() + u["log_penalty"].exp() * (w["a"] ** 2).sum(),
            lambda w, u: ((w["a"] - 0.3 * data) ** 2).sum(),
            {"a": torch.zeros(6, dtype=torch.float64)},
        )
        return Setup(problem, {"log_penalty": torch.zeros((), dtype=torch.float64)})

    plan = replace(plain_plan(implicit=Implicit(CG())), problems={"functions": setup})
    rows = run(plan, tmp_path / "out").rows
    assert [row["status"] for row in rows] == ["OK", "OK"]
    assert rows[1]["hypergradient_error"] < 1e-8


def test_figures_are_pngs_with_content(undisturbed: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = run(plan_of(tmp_path), undisturbed)
    files = draw_figures(outcome.runs, tmp_path / "figures")
    names = ["outer_loss_by_cost", "outer_loss_by_seconds", "hypergradient_error", "memory"]
    assert [path.stem for path in files] == names
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_no_figure_of_errors_without_a_referee(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bilevel.compare.figures.write_figure", lambda *_: None)
    runs = run(plan_of(tmp_path), undisturbed).runs
    unknown = [replace(each, rows=[{**row, "hypergradient_error": None} for row in each.rows]) for each in runs]
    names = [path.stem for path in draw_figures(unknown, tmp_path / "figures")]
    assert names == ["outer_loss_by_cost", "outer_loss_by_seconds", "memory"]


def test_without_matplotlib_there_are_no_figures(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_figures(run(plan_of(tmp_path), undisturbed).runs, tmp_path / "figures") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_a_real_signal_leaves_a_run_that_continues(undisturbed: Path, tmp_path: Path, number: signal.Signals) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    with (tmp_path / "printed").open("w") as printed:
        child = os.fork()  # a new interpreter would take seconds to load torch
        if not child:
            run_slowly(["compare", str(tmp_path / "tiny.yaml"), "--out", str(out), "--device", "cpu"], printed)
    deadline = time.monotonic() + 30
    while len(list(out.glob("checkpoints/*.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (tmp_path / "printed").read_text()
    if number == signal.SIGINT:
        assert code == 130, said
        assert "interrupted: run the same command to continue" in said
        assert "Traceback" not in said
    else:
        assert code == -signal.SIGKILL, said
    assert not (out / "summary.json").exists()
    run(plan, out)
    assert results(out) == results(undisturbed)


def run_slowly(line: list[str], printed: TextIO) -> NoReturn:
    """Run a command in a forked child, in a process group of its own, and leave without the parent's clean-up."""
    code, step = 99, OuterOptimizer.step

    def slow(self: OuterOptimizer) -> Any:
        time.sleep(0.05)
        return step(self)

    try:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr = printed
        signal.signal(signal.SIGINT, signal.default_int_handler)
        OuterOptimizer.step, cells_module.SAVE_EVERY = slow, 0.0  # type: ignore[method-assign]
        code = main(line)
    finally:
        printed.flush()
        os._exit(code)


# Seeds as one batch ---------------------------------------------------------------------------------------------------


def close_to(value: Any, other: Any) -> bool:
    """Equal, floats up to 1e-10 (errors and residuals, which are rounding, up to 1e-7)."""
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(close_to(value[key], other[key]) for key in value)
    if isinstance(value, list):
        return len(value) == len(other) and all(map(close_to, value, other))
    if isinstance(value, float) and isinstance(other, float):
        return value == pytest.approx(other, rel=1e-10, abs=1e-7)
    return bool(value == other)


@pytest.mark.parametrize("changes", [{"budget": 400.0}, {"outer": {"lr": 0.3, "steps": 6, "tol": 0.02}}], ids=str)
def test_seeds_of_a_batch_end_where_single_runs_end(changes: dict[str, Any], tmp_path: Path) -> None:
    for batch in ("auto", False):
        run(plan_of(tmp_path, batch=batch, **changes), tmp_path / str(batch))
    summary, rows = results(tmp_path / "auto")
    expected_summary, expected_rows = results(tmp_path / "False")
    assert len(rows) == len(expected_rows)
    assert all(map(close_to, rows, expected_rows))
    assert close_to(summary, expected_summary)


def test_seeds_run_as_one_batch_give_the_rows_of_single_runs(undisturbed: Path, tmp_path: Path) -> None:
    done = run(plan_of(tmp_path, batch="auto"), tmp_path / "out")
    summary, rows = results(tmp_path / "out")
    expected_summary, expected_rows = results(undisturbed)
    assert close_to(rows, expected_rows)
    assert close_to(summary, expected_summary)
    assert {row["seconds_shared_by"] for row in done.rows} == {2}
    assert "(share)" in tables(done.summary)
    for row, other in zip(rows, expected_rows, strict=True):
        assert row["outer_loss"] == pytest.approx(other["outer_loss"], rel=1e-10)
        assert row["hypergradient_norm"] == pytest.approx(other["hypergradient_norm"], rel=1e-9)
        assert row["counts"] == other["counts"]


def test_a_batched_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    plan = plan_of(tmp_path, batch="auto", outer={"optimizer": "Adam", "lr": 0.3, "steps": 6})
    run(plan, whole)
    folder = RunFolder(half, plan.config)
    folder.prepare()
    group = [cell for cell in plan.cells if (cell.problem, cell.estimator) == ("logistic", "implicit")]
    stopped = run_group(plan, group, folder, lambda row: folder.stop_file.touch() if row["step"] == 3 else None)
    assert [len(each.rows) for each in stopped] == [3, 3]
    assert not any(each.done for each in stopped)
    run(plan, half)
    assert results(half) == results(whole)


def scalar_setup(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    problem = LogisticProblem(X[:20], (X[:20, 0] > 0).long(), X[20:], (X[20:, 0] > 0).long())
    return Setup(problem, torch.tensor(-2.0, dtype=torch.float64))


SOLVERS_OF_A_BATCH = [
    Adam(step_size=0.05, steps=20),
    SGD(step_size=0.1, momentum=0.9, steps=20),
    HeavyBall(steps=20),
    GradientDescent(tol=1e-4),
]


@pytest.mark.crossed
@pytest.mark.parametrize("solver", SOLVERS_OF_A_BATCH, ids=describe)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.NAdam, torch.optim.ASGD], ids=lambda o: o.__name__)
def test_the_states_of_members_are_those_of_single_runs_and_make_the_batch_again(solver: Any, optimizer: Any) -> None:
    options = OuterOptions(optimizer=lambda tensors: optimizer(tensors, lr=0.3))
    setups = [scalar_setup(seed) for seed in (0, 1, 2)]

    def outer() -> OuterOptimizer:
        hparams = torch.stack([setup.hparams for setup in setups])
        return options.start(Setup(stack([setup.problem for setup in setups]), hparams), solver, FullUnroll())

    whole, again = outer(), outer()
    whole.run(3, progress=False)
    state = whole.state_dict()
    members = [separated(state, index) for index in range(3)]
    again.load_state_dict(joined(members))
    alone = options.start(setups[1], solver, FullUnroll())
    alone.load_state_dict(members[1])
    expected = whole.run(2, progress=False)
    found, single = again.run(2, progress=False), alone.run(2, progress=False)
    # Bit for bit: the numbers of a warm-started Adam depend on all that the inner state carries.
    assert torch.equal(found.hparams, expected.hparams)
    assert [each.hypergradient_norm for each in found.history[1]] == [
        each.hypergradient_norm for each in expected.history[1]
    ]
    torch.testing.assert_close(single.hparams, expected.hparams[1], rtol=1e-9, atol=0)
    assert single.history[-1].inner_steps == expected.history[1][-1].inner_steps


def test_a_cell_of_a_stopped_batch_can_go_on_alone(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, batch="auto")
    folder = RunFolder(tmp_path / "out", plan.config)
    folder.prepare()
    group = plan.cells[:2]
    run_group(plan, group, folder, lambda row: folder.stop_file.touch() if row["step"] == 2 else None)
    folder.stop_file.unlink()
    alone = run_cell(plan, group[1], folder)
    other = RunFolder(tmp_path / "other", plan.config)
    other.prepare()
    whole = run_cell(plan, group[1], other)
    assert close_to(without_measurements(alone.rows), without_measurements(whole.rows))
    assert alone.done


def test_what_runs_no_batches_runs_one_by_one_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, batch="auto", solver={"class": "Newton"})
    done = run(plan, tmp_path / "out")
    why = "logistic, implicit: not one batch but 2 runs, as Newton() takes one problem at a time"
    assert why in capsys.readouterr().out
    assert not done.interrupted
    assert {row["seconds_shared_by"] for row in done.rows} == {1}


def test_one_failing_seed_of_a_batch_is_its_own_failure(tmp_path: Path) -> None:
    def ridge(seed: int) -> Setup:
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(20, 3, generator=generator, dtype=torch.float64) * (40.0 if seed == 1 else 1.0)
        problem = RidgeProblem(X[:12], X[:12, 0], X[12:], X[12:, 0])
        return Setup(problem, problem.initial_hparams(-1.0))

    solver, outer = GradientDescent(step_size=0.2, steps=300), OuterOptions(steps=3)
    options = {"a": Implicit()}
    plan = Plan("ridge", {"ridge": ridge}, solver, options, outer, (0, 1, 2), None, {"a": 1}, batch=True)
    done = run(plan, tmp_path / "out")
    assert [each.failed for each in done.runs] == [False, True, False]
    alone = run(replace(plan, batch=False), tmp_path / "alone")
    for row, other in zip(done.rows, alone.rows, strict=True):
        assert close_to(without_measurements(row), without_measurements(other))


# Statuses of the table ----------------------------------------------------------------------------------------------


def table_of(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    """The table of one estimator whose rows differ from good ones by what is given."""
    plan = plan_of(
        tmp_path, seeds=[0], problems={"ridge": CONFIG["problems"]["ridge"]}, estimators={"tail": "Implicit"}
    )
    good = {
        **dict.fromkeys(("outer_loss", "hypergradient_norm", "gradient_equivalents_total", "seconds_total"), 1.0),
        "hypergradient_error": 1e-3,
        "error_estimate": None,
        "referee": "closed form",
        "seconds_shared_by": 1,
        "memory_peak_bytes": 1,
        "memory_kind": "",
        "status": "OK",
        "message": "",
    }
    return tables(summarize(plan, [CellRun(plan.cells[0], [good | row for row in rows], True, "took 2 steps")]))


@pytest.mark.parametrize(
    ("rows", "off", "status"),
    [
        ([{}, {}], "0.1 %", "ok"),
        ([{"hypergradient_error": 0.9}, {}], "0.1 %", "ok"),
        ([{}, {"hypergradient_error": 0.854}], "85 %", "biased: off by 85 %"),
        ([{}, {"hypergradient_error": 2.5}], "250 %", "biased: off by 250 %"),
        (
            [{}, {"hypergradient_error": None, "error_estimate": 0.4, "hypergradient_norm": 0.8}],
            "50 %",
            "biased: off by",
        ),
        ([{}, {"hypergradient_error": None}], "-", "ok"),
        ([{"status": "INNER_NOT_CONVERGED"}, {}], "0.1 %", "inner not converged in 1 steps"),
        # A run that has converged to rounding has a hypergradient of which nothing is right.
        ([{}, {"hypergradient_error": 0.8, "hypergradient_norm": 1e-9}], "-", "ok"),
    ],
)
def test_the_table_says_ok_only_where_the_last_hypergradient_is_right(
    tmp_path: Path, rows: list[dict[str, Any]], off: str, status: str
) -> None:
    cells = re.split(r"\s{2,}", table_of(tmp_path, rows).splitlines()[3])
    assert cells[3] == off
    assert cells[-1].startswith(status)


def test_a_truncated_tail_of_the_shipped_kind_is_called_biased(tmp_path: Path) -> None:
    changes = {
        "problems": {"ridge": {"class": "RidgeProblem", "data": "diabetes", "penalty": "per_feature", "start": -4.0}},
        "solver": {"class": "GradientDescent", "steps": 20},
        "estimators": {"full unroll": "FullUnroll", "closed form": "ClosedForm"},
        "outer": {"optimizer": "Adam", "lr": 0.3, "steps": 3},
        "seeds": [0],
    }
    found = run(plan_of(tmp_path, **changes), tmp_path / "out")
    lines = tables(found.summary).splitlines()
    group = found.summary["problems"]["ridge"]["full unroll"]
    off = found.runs[0].rows[-1]["hypergradient_error"]
    assert group["hypergradient_error_final"] == group["hypergradient_error_final_max"] == off > 0.1
    assert lines[3].endswith(f"biased: off by {100 * off:.0f} %")
    assert lines[4].endswith("ok")
    assert lines[6].startswith("  full unroll: took 3 steps, not converged: |hypergradient| = ")


# Searches -------------------------------------------------------------------------------------------------------------


def broken_near_the_minimum(seed: int) -> Setup:
    def outer_loss(w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        value = (torch.exp(-w) + w / math.e).sum()
        return value if bool((w > 0.95).all()) else value * math.nan

    one = torch.ones(1, dtype=torch.float64)
    return Setup(BilevelProblem(lambda w, u: ((w - u) ** 2).sum(), outer_loss, params=one), 2.9 * one)


def test_a_search_is_judged_by_the_points_that_it_accepts(tmp_path: Path) -> None:
    estimators = {"implicit": Implicit(GMRES())}
    outer = OuterOptions(steps=30, optimizer="auto")
    problems = {"broken": broken_near_the_minimum}
    plan = Plan("search", problems, QuasiNewton(), estimators, outer, (0,), None, {"a": 1})
    done = run(plan, tmp_path / "out")
    (result,) = done.runs
    trials = [row for row in result.rows if row["status"] == "NOT_FINITE"]
    assert trials, "a step goes where the outer loss is not finite"
    assert not result.failed
    assert result.stopped.startswith("converged to a local minimum")
    assert result.best == pytest.approx([1.0], abs=1e-2)
    group = done.summary["problems"]["broken"]["implicit"]
    assert group["failures"] == 0
    assert group["outer_loss_final"] == group["outer_loss_best"] == pytest.approx(2 / math.e, rel=1e-4)
    assert group["choice"] == [
        "auto chose HyperNewton(): 1 inner variables and 1 hyperparameters have dense second derivatives"
    ]
    assert group["stopped"] == [result.stopped]
    assert group["choice"][0] in tables(done.summary)
    assert result.stopped in tables(done.summary)
    phases = {row["phase"] for row in result.rows}
    assert phases == {"step", "probe"}
    # The checkpoints hold all of it.
    assert run(plan, tmp_path / "out").summary == done.summary
    # A budget cuts a search off, and the end says how much may be left.
    less = replace(plan, budget=2.5 * result.rows[0]["gradient_equivalents"], config={"a": 2})
    cut = run(less, tmp_path / "less").runs[0].stopped
    assert re.fullmatch(r"used the budget of .* gradient-equivalents, not converged: .* may be left", cut)


def test_a_doubtful_outer_loss_is_the_best_only_where_there_is_no_other() -> None:
    def row(status: str, loss: float | None, **more: Any) -> dict[str, Any]:
        return {"status": status, "outer_loss": loss, **more}

    doubtful, good, failed = row("INNER_NOT_CONVERGED", 1.0), row("OK", 2.0), row("DIVERGED", None)
    assert best_row([doubtful, good, failed]) is good
    assert best_row([doubtful, good, failed], comparable=False) is good
    assert best_row([doubtful, failed]) is doubtful
    assert best_row([failed]) is None
    taken, rejected = row("OK", 3.0, accepted=True), row("OK", 2.0, accepted=False)
    assert best_row([taken, rejected]) is taken
    assert end_row([taken, rejected, failed]) is taken
    assert end_row([good, doubtful]) is doubtful
