"""A small sample of ``scripts/stress.py``, in a process of its own: it forks, and it interrupts itself.

Kills are in test_compare.py.
"""

from __future__ import annotations

import re
import subprocess
import sys

from paths import SCRIPTS


def test_nothing_is_lost() -> None:
    rows = {"mutated configs": 4, "YAML that cannot be built": 26}
    parts = ["--only", "configs", "yaml", "--configs", "4", "--seed", "5"]
    # One process: it loads torch once for all parts.
    command = [sys.executable, str(SCRIPTS / "stress.py"), *parts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(.*?)\s{2,}(\d+)\s+(\d+)\s+0$", done.stdout, re.MULTILINE)
    assert {name: int(tried) for name, tried, _ in found} == rows
    assert all(tried == caught for _, tried, caught in found)
