"""Scripts, run in the process of the tests: loading torch anew takes longer than most of what they do."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Returns what runs a script as `python SCRIPT OPTIONS` does: (path, *options) -> exit status."""

    def run(path: Path, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(path), run_name="__main__")
        return int(stopped.value.code or 0)

    monkeypatch.chdir(tmp_path)
    return run
