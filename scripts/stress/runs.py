"""A small comparison that is run, killed, damaged and continued, and what it must come to."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bilevel.cli import main
from bilevel.compare import cells

# What commands load late, when they make an optimizer or a figure: once here, and not in every child.
for module in ("torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.figure"):
    with contextlib.suppress(ImportError):
        importlib.import_module(module)

CONFIG: dict[str, Any] = {
    "name": "stress",
    "problems": {
        "logistic": {"class": "LogisticProblem", "data": {"name": "synthetic_classification", "rows": 60}},
        "ridge": {
            "class": "RidgeProblem",
            "data": {"name": "synthetic_regression", "rows": 60},
            "penalty": "per_feature",
        },
    },
    "solver": {"class": "Nesterov", "steps": 150},
    "estimators": {
        "implicit": {"class": "Implicit"},
        "tail": {"class": "TruncatedUnroll", "tail": 20},
        "full": {"class": "FullUnroll"},
    },
    "outer": {"optimizer": "Adam", "lr": 0.2, "steps": 6},
    "seeds": [0, 1],
}
VARIANTS: Sequence[dict[str, Any]] = (
    {},
    {"solver": {"class": "Adam", "step_size": 0.05, "steps": 60}},
    {"solver": {"class": "QuasiNewton"}, "estimators": {"implicit": {"class": "Implicit"}}},
    {"batch": "auto"},
    {"estimators": {"auto tail": {"class": "AdaptiveUnroll"}}},
)
"""Changes of the comparison: stateful solvers, kept curvature, seeds as one batch, a tail that is chosen."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, and what it printed on stderr."""

    code: int
    said: str


def write_config(folder: Path, changes: dict[str, Any] | None = None, name: str = "stress.yaml") -> Path:
    """Write the configuration with some changes, and return its path."""
    path = folder / name
    path.write_text(yaml.safe_dump(CONFIG | (changes or {}), sort_keys=False))
    return path


def run(arguments: Sequence[str], prepare: Callable[[], object] = lambda: None) -> Outcome:
    """Run a command in a child process and wait for it.

    Args:
        arguments: of ``bilevel``.
        prepare: called in the child before the command.
    """
    with Child(arguments, prepare) as child:
        return child.wait()


class Child:
    """A command in a forked process of its own group: started at once, because everything is loaded already.

    Args:
        arguments: of ``bilevel``.
        prepare: called in the child before the command.
    """

    def __init__(self, arguments: Sequence[str], prepare: Callable[[], object] = lambda: None) -> None:
        # No pipe: workers that outlive the command would keep it open. `__exit__` closes the file.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            _run_and_exit(arguments, prepare, self._said.fileno())

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._said.close()

    def within(self, seconds: float, group: bool = True) -> Outcome | None:
        """Wait for the end, but kill the process with SIGKILL after some time, or all of its group.

        Returns:
            How it ended; None where it was killed.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return self._outcome(status)
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        return None if os.WIFSIGNALED(status) else self._outcome(status)

    def wait(self) -> Outcome:
        """Wait for the end."""
        return self._outcome(os.waitpid(self.pid, 0)[1])

    def _outcome(self, status: int) -> Outcome:
        self._said.seek(0)
        return Outcome(os.waitstatus_to_exitcode(status), self._said.read().decode(errors="replace"))


def _run_and_exit(arguments: Sequence[str], prepare: Callable[[], object], writes: int) -> None:
    """Run a command with stdout dropped and stderr in a pipe, and leave the process without its parent's clean-up."""
    code = 99
    try:
        os.dup2(writes, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)  # not what the parent has put in its place
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # Checkpoints far more often than once a second, so that a random moment meets many of them.
        cells.SAVE_EVERY = 0.01
        prepare()
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def without_figures() -> None:
    """Draw none in this process: they take most of the time of so small a comparison."""
    from bilevel.cli import commands

    commands.draw_figures = lambda *_: []


def results(folder: Path) -> Any:
    """Return everything that a finished run has written, but for what a clock or the memory gauge measured."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    tuned = folder / "tuned.json"
    found = [rows, json.loads((folder / "summary.json").read_text()), tuned.exists() and json.loads(tuned.read_text())]
    return _without_measurements(found)


def _without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if not key.startswith(("seconds", "memory"))}
        return {key: _without_measurements(each) for key, each in kept.items()}
    return [_without_measurements(each) for each in value] if isinstance(value, list) else value
