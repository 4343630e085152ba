"""The script for machines with a GPU: a dry run takes the same way on the CPU."""

import json
import subprocess
from types import SimpleNamespace

import torch
from paths import STUDIES

SCRIPT = STUDIES / "gpu_check.py"


def test_a_dry_run_writes_one_file_that_names_the_machine(script, tmp_path, monkeypatch, capsys):
    commands = []

    def collected(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout="one\ntwo\n")

    monkeypatch.setattr(subprocess, "run", collected)
    out = tmp_path / "check.json"
    assert script(SCRIPT, "--dry-run", "--out", str(out)) == 0
    results = json.loads(out.read_text())
    parts = ("tests", "steps", "waits", "graphs", "agreement", "random_numbers", "seconds")
    assert all(results[name]["ok"] for name in parts)
    assert results["dry_run"]
    assert results["environment"]["processor"]
    assert results["environment"]["device"] == "cpu"
    assert len(results["agreement"]["found"]) > 70
    assert [command[1:6] for command in commands if "pytest" in command] == [["-m", "pytest", "-q", "-m", "gpu"]]
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:-1]] == [[name, "ok"] for name in parts]


def test_without_cuda_it_says_so_in_one_sentence(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "check.json"
    assert script(SCRIPT, "--out", str(out)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "torch sees no CUDA device: run this on a machine with one, or try --dry-run.\n"
    assert not out.exists()


def test_a_check_that_fails_is_the_exit_status(script, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **options: SimpleNamespace(returncode=1, stdout=""))
    assert script(SCRIPT, "--dry-run", "--only", "tests", "--out", str(tmp_path / "check.json")) == 1
