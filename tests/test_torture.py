"""A small sample of ``scripts/torture.py``, in a process of its own: it forks, and it interrupts itself.

Kills are in test_compare.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--only", "configs", "--configs", "20", "--seed", "5"], {"mutated configs": 20}),
        (["--only", "files"], {"file-system faults": 9}),
    ],
    ids=["configs", "files"],
)
def test_nothing_is_lost(options: list[str], rows: dict[str, int]) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "torture.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(.*?)\s{2,}(\d+)\s+(\d+)\s+0$", done.stdout, re.MULTILINE)
    assert {name: int(tried) for name, tried, _ in found} == rows
    assert all(tried == caught for _, tried, caught in found)
