"""The benchmark scripts: the quick one runs whole, a sample of the outer bars too, the others at least load."""

import json
import runpy
import subprocess
import sys

import pytest
from paths import BENCH


def test_the_accuracy_bars_hold():
    run = subprocess.run([sys.executable, BENCH / "accuracy.py"], capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(rows) == 16
    assert all(row["ok"] for row in rows)


def test_a_small_sample_of_the_bars_of_the_outer_step_holds():
    sample = ["--only", "2", "5", "--starts", "2", "--peers", "0", "--most", "40"]
    command = [sys.executable, BENCH / "outer.py", *sample, "--problems", "ridge diabetes, 5 groups"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, run.stdout + run.stderr
    assert [row["name"].split(":")[0] for row in rows] == ["bar 2", "bar 5", "bar 5", "outer bars, all hold"]
    assert rows[0]["reached"] == "2/2"
    assert rows[1]["converged"] == rows[1]["ends"] == 3


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("*.py")))
def test_every_script_loads(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    assert runpy.run_path(str(BENCH / f"{name}.py"), run_name="loaded")
