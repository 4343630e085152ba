"""The commands as a newcomer types them: what they print, what they write, and their exit codes."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import joblib
import pytest
import torch
import yaml

from bilevel.cli import main
from bilevel.core import threads

CONFIG = """\
name: tiny
problems:
  iris: {class: SoftmaxProblem, data: iris, penalty: per_class, start: -2.0}
  ridge: {class: RidgeProblem, data: {name: synthetic_regression, rows: 60, features: 15}, penalty: per_feature}
solver: {class: Newton}
estimators:
  implicit: {class: Implicit}
  one term: {class: Implicit, linear_solver: {class: Neumann, steps: 1}}
outer: {optimizer: Adam, lr: 0.3, steps: 3}
seeds: [0, 1]
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return "tiny.yaml"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than such short runs."""
    monkeypatch.setattr("bilevel.cli.commands.draw_figures", lambda *_: True)


def test_compare_prints_a_table_and_writes_everything(
    config: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    assert main(["compare", config]) == 0
    out, err = capsys.readouterr()
    assert "iris (medians over 2 seeds; the hypergradient at the end)" in out
    assert "hypergradient off by" in out
    assert "written to runs/tiny" in out
    assert "12/24" in err or "24/24" in err
    written = {path.name for path in Path("runs/tiny").iterdir()}
    assert written >= {"config.yaml", "results.jsonl", "summary.json", "environment.json", "figures", "checkpoints"}
    environment = json.loads(Path("runs/tiny/environment.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["versions"]["torch"] == torch.__version__
    assert not list(Path("runs").rglob("*.tmp"))
    assert not list(Path("runs").rglob("stop"))
    assert sorted(path.stem for path in Path("runs/tiny/figures").iterdir()) == [
        *("hypergradient_error", "memory", "outer_loss_by_cost", "outer_loss_by_seconds")
    ]
    request.getfixturevalue("no_figures")

    assert main(["compare", config]) == 0
    again = capsys.readouterr().out
    assert "this run was complete already; --fresh runs it again." in again
    assert "iris (medians over 2 seeds; the hypergradient at the end)" in again

    # What was written is a config of the same run.
    assert main(["compare", "runs/tiny/config.yaml"]) == 0
    assert "this run was complete already" in capsys.readouterr().out

    assert main(["compare", config, "--set", "outer.steps=4"]) == 2
    assert "where `outer.steps` is 3 there and 4 here: --fresh starts anew there" in capsys.readouterr().err
    assert len(Path("runs/tiny/results.jsonl").read_text().splitlines()) == 24

    assert main(["compare", config, "--set", "outer.steps=1", "--seed", "7", "--fresh"]) == 0
    rows = [json.loads(line) for line in Path("runs/tiny/results.jsonl").read_text().splitlines()]
    assert {row["seed"] for row in rows} == {7, 8}


def test_tune_prints_hyperparameters_and_scores(
    config: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    assert main(["tune", config, "--estimator", "implicit", "--set", "outer.steps=8", "--out", "tuned"]) == 0
    out = capsys.readouterr().out
    assert "iris, implicit, seed 0: best at step" in out
    assert "ended: took 8 steps, not converged: |hypergradient| = " in out
    assert "untuned start" in out
    assert "class 2" in out
    assert "the 6 largest and the 6 smallest of 15; tuned.json holds all" in out
    tuned = json.loads(Path("tuned/tuned.json").read_text())
    for found in tuned.values():
        assert found["scores_tuned"]["val_loss"] < found["scores_start"]["val_loss"]
        assert len(found["tuned"]) == len(found["labels"]) == len(found["start"])
        assert found["unit"] == "log penalty"
    # The penalty in the last column is the exponential of the tuned value.
    line = next(line.split() for line in out.splitlines() if line.startswith("class 2"))
    assert float(line[-1]) == pytest.approx(math.exp(float(line[-2])), rel=1e-3)
    assert Path("tuned/figures/outer_loss_by_cost.png").stat().st_size > 10_000
    request.getfixturevalue("no_figures")
    assert main(["tune", config, "--set", "outer.steps=1"]) == 0
    assert Path("runs/tiny-tune/tuned.json").exists()


@pytest.mark.usefixtures("no_figures")
def test_compare_shows_another_outer_method_beside_its_own(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    tuning = "tuning={solver: {class: QuasiNewton}, estimator: {class: Implicit}, outer: {optimizer: auto, steps: 40}}"
    assert main(["compare", config, "--set", f"{tuning}"]) == 0
    out = capsys.readouterr().out
    assert "tuning by QuasiNewton() and Implicit(linear_solver=CG()), seed 0\n" in out
    runs = json.loads(Path("runs/tiny/tuning.json").read_text())
    assert [(run["problem"], run["outer_method"]) for run in runs] == [
        (problem, method) for problem in ("iris", "ridge") for method in ("Adam(lr=0.3)", "HyperNewton() (auto)")
    ]
    for adam, search in zip(runs[::2], runs[1::2], strict=True):
        assert search["outer_loss_best"] < adam["outer_loss_best"]
        assert (adam["evaluations"], adam["choice"]) == (3, "")
        assert adam["stopped"].startswith("took 3 steps, not converged: ")
        assert search["stopped"].startswith("converged to a local minimum")
        assert search["choice"].startswith("auto chose HyperNewton(): ")
    assert " ".join(runs[1]["stopped"].split()) in " ".join(out.split())


@pytest.mark.usefixtures("no_figures")
def test_tune_by_a_search_says_which_why_and_how_it_ended(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "outer={steps: 40}", "--set", "solver={class: QuasiNewton}"]
    assert main(["tune", config, *options]) == 0
    out = capsys.readouterr().out
    tuned = json.loads(Path("runs/tiny-tune/tuned.json").read_text())
    summary = json.loads(Path("runs/tiny-tune/summary.json").read_text())
    for name, found in tuned.items():
        assert found["choice"].startswith("auto chose HyperNewton(): ")
        assert found["stopped"].startswith("converged to a local minimum")
        assert f"{found['choice']}\nended: {found['stopped']}\n" in out
        group = summary["problems"][name]["implicit"]
        assert (group["choice"], group["stopped"]) == ([found["choice"]], [found["stopped"]])
        assert group["outer_loss_final"] == pytest.approx(found["scores_tuned"]["val_loss"], rel=1e-9)
    assert re.search(r"score +first point of the scan +tuned", out)
    assert main(["tune", config, *options, "--set", "outer.steps=6", "--out", "cut"]) == 0
    assert "ended: took 6 steps, not converged: " in capsys.readouterr().out


def test_doctor_finds_all_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for word in (
        "torch",
        "threads",
        "float64       cpu: supported",
        "breast_cancer",
        "Newton with Implicit",
        "all is well",
    ):
        assert word in out


def test_doctor_fails_where_a_hypergradient_is_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bilevel import GradientDescent, TruncatedUnroll

    monkeypatch.setattr("bilevel.cli.doctor.CHECKS", ((GradientDescent(steps=50), TruncatedUnroll(tail=1)),))
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "GradientDescent with TruncatedUnroll on breast_cancer: FAILED" in out
    assert "something is wrong" in out


BAD = {
    "unknown key": (["--set", "solver.stesp=5"], "`solver.stesp` is not an option of Newton"),
    "wrong class": (["--set", "solver.class=CG"], "got 'CG', which is a linear solver."),
    "misfit": (["--set", "problems.iris.class=LogisticProblem"], "y_train holds 3 classes"),
    "device": (["--device", "cuda"], "the device cuda was asked for, but torch sees no CUDA device: use --device cpu."),
    "assignment": (["--set", "solver"], "--set must look like `a.b=value`, got 'solver'."),
}


@pytest.mark.parametrize("command", ["compare", "tune"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, case: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options, sentence = BAD[case]
    assert main([command, config, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    assert os.listdir() == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("words", "end"),
    [(["compaer"], "`compare`?\n"), (["tune", "tiny.yaml", "--device", "gpu"], "`cuda`?\n"), (["xyz"], "'curse')\n")],
)
def test_a_misspelt_command_or_choice_is_told_what_was_meant(
    words: list[str], end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.endswith(end)


def test_the_example_of_predict_names_a_model_that_the_example_before_writes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    tuned, predicted = re.findall(r"^  bilevel (?:tune|predict) (\S+)", capsys.readouterr().out, re.MULTILINE)
    config = yaml.safe_load((Path(__file__).parents[2] / tuned).read_text())
    assert predicted in [f"runs/{config['name']}-tune/{problem}" for problem in config["problems"]]


def test_a_missing_config_is_one_sentence(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "tinny.yaml"]) == 2
    assert capsys.readouterr().err == "bilevel: tinny.yaml: there is no such file: did you mean `tiny.yaml`?\n"


@pytest.mark.parametrize("out", ["tiny.yaml", "tiny.yaml/deeper"])
def test_an_output_folder_that_cannot_be_written_to_is_named(
    config: str, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert main(["compare", config, "--out", out]) == 2
    err = capsys.readouterr().err
    assert f"bilevel: {'tiny.yaml is a file' if out == 'tiny.yaml' else 'cannot write to the output folder'}" in err
    assert "--out DIR" in err
    assert "Traceback" not in err


def test_a_run_of_which_nothing_succeeds_fails(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "solver={class: GradientDescent, step_size: 1.0e+6, steps: 50}", "--set", "seeds=[0]"]
    assert main(["compare", config, *options]) == 1
    out, err = capsys.readouterr()
    assert "1 of 1 failed: GradientDescent diverges" in out
    assert "no figures: no run succeeded." in out
    assert "failed: ridge, one term, seed 0: GradientDescent diverges" in err
    assert main(["tune", config, *options]) == 1


@pytest.mark.parametrize("command", [[], ["compare"], ["tune"], ["predict"], ["doctor"]])
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "bilevel compare configs/quickstart.yaml" in out or f"bilevel {command[0]}" in out


@pytest.mark.parametrize("options", [["--jobs", "0"], ["--seed", "x"], ["--device", "gpu"]])
def test_options_out_of_range_exit_with_two(
    config: str, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", config, *options])
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("bilevel 0.")


def test_doctor_measures_a_short_operation_and_says_what_runs_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (threads.WORKERS, *threads.TORCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("bilevel.cli.doctor.CHECKS", ())
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["doctor", "--device", "cpu"]) == 0
        assert torch.get_num_threads() == 2
        assert main(["doctor", "--device", "cpu", "--threads", "3"]) == 0
    finally:
        torch.set_num_threads(before)
    out = capsys.readouterr().out
    use = r"threads       commands use {} of torch, and {}, which share sweeps over the rows of large data\n"
    times = r" {14}a short operation of torch, a 64 x 64 Cholesky solve, takes \S+ ms with 1 thread, \S+ ms with 2\n"
    assert re.search(use.format("1 thread", "2 workers") + times, out)
    assert re.search(use.format("3 threads", "3 workers") + times, out)


@pytest.mark.parametrize(
    ("jobs", "share"), [("1", {"threads": 6, "workers": 3}), ("2", {"threads": 3, "workers": 1})], ids=["1 job", "2"]
)
def test_the_numbers_of_threads_are_recorded_for_each_process_and_given_back(
    config: str, monkeypatch: pytest.MonkeyPatch, jobs: str, share: dict[str, int]
) -> None:
    monkeypatch.delenv(threads.WORKERS, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 3)
    monkeypatch.setattr("bilevel.cli.commands.draw_figures", lambda *_: True)
    before = torch.get_num_threads()
    options = ["--threads", "6", "--jobs", jobs, "--set", "outer.steps=1", "--set", "seeds=[0]"]
    # Threads in the place of processes: starting those takes longer than all that they do.
    with joblib.parallel_config("threading"):
        assert main(["compare", config, *options]) == 0
    assert torch.get_num_threads() == before
    environment = json.loads(Path("runs/tiny/environment.json").read_text())
    assert {key: environment[key] for key in share} == share


def test_a_bad_number_of_workers_in_the_environment_is_one_sentence(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BILEVEL_WORKERS", "many")
    assert main(["compare", config]) == 2
    assert capsys.readouterr().err == "bilevel: `BILEVEL_WORKERS` must be a positive int, got 'many'.\n"
    assert os.listdir() == ["tiny.yaml"]


REFUSED = {
    "curse x.yaml --device cpu": "--device is not an option of bilevel curse: its experiments are small and run on the",
    "curse x.yaml --seed 3": "--seed is not an option of bilevel curse: the seeds of its experiments are fixed",
    "curse --jobs=2 x.yaml": "--jobs is not an option of bilevel curse: it runs in one process.",
    "doctor --seed 3": "--seed is not an option of bilevel doctor: nothing that it checks is random.",
    "compare x.yaml --threads 0": "argument --threads: must be an int of at least 1, got '0'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_an_option_of_another_command_is_answered_with_a_reason(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert REFUSED[line] in capsys.readouterr().err


def test_a_config_of_another_command_names_that_command(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curse", config]) == 2
    assert capsys.readouterr().err == (
        "bilevel: tiny.yaml: it has `problems` and `estimators`, but no `experiment`, so it is a config of "
        "`bilevel compare` and `bilevel tune`: run `bilevel compare tiny.yaml`.\n"
    )
    Path("curse.yaml").write_text("experiment: Truncation\n")
    for command in ("compare", "tune"):
        assert main([command, "curse.yaml"]) == 2
        assert capsys.readouterr().err == (
            "bilevel: curse.yaml: it names an `experiment`, so it is a config of `bilevel curse`: "
            "run `bilevel curse curse.yaml`.\n"
        )


HOLDER = """\
import os, time
from filelock import FileLock
os.mkdir("out")
with FileLock("out/.lock"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("command", ["compare", "tune", "curse"])
def test_a_folder_that_another_process_writes_to_is_refused_until_that_process_is_killed(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("bilevel.cli.commands.draw_figures", lambda *_: True)
    Path("curse.yaml").write_text(CURSE)
    arguments = [command, "curse.yaml" if command == "curse" else config, "--out", "out"]
    if command != "curse":
        arguments += ["--set", "outer.steps=1", "--set", "seeds=[0]"]
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            assert main(arguments) == 2
            assert capsys.readouterr().err == (
                "bilevel: another process is writing to out: wait until it has ended, or give another place with "
                "--out DIR.\n"
            )
            assert os.listdir("out") == [".lock"]
        finally:
            holder.kill()
    assert main(arguments) == 0
    assert ".lock" not in capsys.readouterr().out


CURSE = "experiment: Truncation\ncolumns: [20]\ndraws: 2\nsteps: 20\nindices: [0, 5]\n"


def test_curse_and_compare_leave_each_others_folders_and_foreign_files_alone(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel.cli.commands.draw_figures", lambda *_: True)
    monkeypatch.setattr("bilevel.curse.folder.draw", lambda *_: False)
    Path("small.yaml").write_text(CURSE)
    Path("taken").mkdir()
    Path("taken/small.csv").write_text("mine")
    assert main(["curse", "small.yaml", "--out", "taken"]) == 2
    assert os.listdir("taken") == ["small.csv"]
    assert "taken holds small.csv, but nothing says that `bilevel curse` wrote it" in capsys.readouterr().err
    (Path("cursed") / "mine").mkdir(parents=True)
    for name in ("notes.json", ".small.csv.tmp", "mine/.a.9.tmp"):
        (Path("cursed") / name).write_text("{")
    # Once, again, and again as the version without marks left it.
    for _ in range(2):
        assert main(["curse", "small.yaml", "--out", "cursed"]) == 0
    (Path("cursed") / ".bilevel.json").unlink()
    assert main(["curse", "small.yaml", "--out", "cursed"]) == 0
    assert all((Path("cursed") / name).read_text() == "{" for name in ("notes.json", ".small.csv.tmp", "mine/.a.9.tmp"))
    one = ["compare", config, "--set", "outer.steps=1", "--set", "seeds=[0]", "--out"]
    capsys.readouterr()
    for fresh in ([], ["--fresh"]):
        assert main([*one, "cursed", *fresh]) == 2
        assert "cursed holds the results of `bilevel curse`: give another place" in capsys.readouterr().err
    assert main([*one, "compared"]) == 0
    capsys.readouterr()
    assert main(["curse", "small.yaml", "--out", "compared"]) == 2
    assert "compared holds the results of `bilevel compare`, or of `bilevel tune`" in capsys.readouterr().err
    Path("small.yaml").write_text(CURSE + "name: environment\n")
    assert main(["curse", "small.yaml", "--out", "cursed"]) == 2
    assert "`name` must not be environment, claims" in capsys.readouterr().err
    assert main([*one, "~nobody-of-this-name/x"]) == 2
    assert "cannot write to the output folder '~nobody-of-this-name/x'" in capsys.readouterr().err


OWN_SOLVER = """\
import bilevel as bl

class Faulty(bl.GradientDescent):
    def step(self, inner, state):
        return {}["lost"]
"""


def test_an_exception_of_the_users_own_class_is_told_kept_and_raised_on_demand(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    Path("faulty_solver.py").write_text(OWN_SOLVER)
    changes = ("solver={class: faulty_solver:Faulty, steps: 3}", "seeds=[0]", "estimators={one: {class: Implicit}}")
    line = [
        "compare",
        config,
        "--allow-import",
        *(word for each in changes for word in ("--set", each)),
        "--out",
        "out",
    ]
    assert main(line) == 1
    err = capsys.readouterr().err
    assert "failed: ridge, one, seed 0: KeyError: 'lost' (faulty_solver.py, line 5)." in err
    (ridge,) = Path("out/checkpoints").glob("*ridge*.txt")
    assert f"the whole traceback is in {ridge}; --debug raises it where it happens" in err
    assert 'return {}["lost"]' in ridge.read_text()
    with pytest.raises(KeyError, match="lost"):
        main([*line[:-1], "debugged", "--debug"])
    Path("faulty_solver.py").write_text(OWN_SOLVER + "# mended\n")
    assert main(line) == 2
    assert "out holds a run with another source of faulty_solver.py, which has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "start"),
    [
        ("torch", "runpy.run_module('bilevel', run_name='__main__')"),  # python -m bilevel
        ("pydantic", "from bilevel.__main__ import main; sys.exit(main())"),  # the installed command
    ],
)
def test_ctrl_c_while_the_command_starts_is_one_line(module: str, start: str) -> None:
    # The first import of the module, far inside the start-up, is the moment at which the signal comes.
    code = (
        "import importlib.abc, os, runpy, signal, sys\n"
        # A suite that runs in the background has been told to ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv = ['bilevel', 'doctor']\n"
        f"{start}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == "\nbilevel: interrupted while it was starting; nothing has been written.\n"


def test_the_package_runs_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bilevel", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bilevel", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("bilevel 0.")


def test_the_command_shows_what_a_config_should_say_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        for _ in range(2):
            warnings.warn_explicit("x is now y", DeprecationWarning, "bilevel", 1, module="__main__")
        return 0

    monkeypatch.setattr("bilevel.cli.main", run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        assert runpy.run_module("bilevel")["main"]() == 0
    assert [str(each.message) for each in caught] == ["x is now y"]
