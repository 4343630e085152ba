"""The benchmark scripts: the quick one runs whole, a sample of the outer bars too, the others at least load."""

import json
import runpy

import pytest
from paths import BENCH


def test_the_accuracy_bars_hold(script, capsys):
    assert script(BENCH / "accuracy.py") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 16
    assert all(row["ok"] for row in rows)


def test_a_small_sample_of_the_bars_of_the_outer_step_holds(script, capsys):
    sample = ["--only", "2", "5", "--starts", "2", "--peers", "0", "--most", "40"]
    assert script(BENCH / "outer.py", *sample, "--problems", "ridge diabetes, 5 groups") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"].split(":")[0] for row in rows] == ["bar 2", "bar 5", "bar 5", "outer bars, all hold"]
    assert rows[0]["reached"] == "2/2"
    assert rows[1]["converged"] == rows[1]["ends"] == 3


def test_a_sample_of_the_tables_is_tuned_and_predicted(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    jobs = runpy.run_path(str(BENCH / "csv_jobs.py"))
    names = ("dates, refused by name", "missing cells", "semicolons", "parquet")
    assert all(jobs["run"](name, jobs["JOBS"][name]) for name in names), capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("*.py")))
def test_every_script_loads(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    assert runpy.run_path(str(BENCH / f"{name}.py"), run_name="loaded")
