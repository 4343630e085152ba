"""A small sample of ``scripts/stress.py``, in this process, which it forks.

Kills are in test_compare.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from paths import SCRIPTS


def test_nothing_is_lost(script: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"mutated configs": 4, "YAML that cannot be built": 26}
    parts = ["--only", "configs", "yaml", "--configs", "4", "--seed", "5"]
    code, printed = script(SCRIPTS / "stress.py", *parts), capsys.readouterr().out
    assert code == 0, printed
    found = re.findall(r"^(.*?)\s{2,}(\d+)\s+(\d+)\s+0$", printed, re.MULTILINE)
    assert {name: int(tried) for name, tried, _ in found} == rows
    assert all(tried == caught for _, tried, caught in found)
