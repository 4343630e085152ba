"""The benchmark scripts: the quick one runs whole, the others at least load."""

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


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("*.py")))
def test_every_script_loads(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    assert runpy.run_path(str(BENCH / f"{name}.py"), run_name="loaded")
