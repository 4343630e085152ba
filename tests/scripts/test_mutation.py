"""The table of breaks fits the code, and the script that tries them tells a break that is noticed from one that is not.

The breaks themselves take half an hour: ``python scripts/mutation.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT, SCRIPTS

CODE = "def double(x):\n    return 2 * x\n"
TEST = "from small import double\n\n\ndef test_it_doubles():\n    assert double(3) == 6\n"


@pytest.fixture(scope="module")
def mutation() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import mutation

        return mutation


def test_the_text_of_every_row_occurs_exactly_once_and_its_tests_exist(mutation: Any) -> None:
    assert [f"{row.name}: {why}" for row in mutation.BREAKS if (why := mutation.misfit(row, ROOT))] == []
    assert all(row.old != row.new for row in mutation.BREAKS)
    assert max(Counter(row.name for row in mutation.BREAKS).values()) == 1
    for row in mutation.BREAKS:
        for test in row.tests.split():
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / mutation.place_of(file, ROOT)).read_text(), f"{row.name} names {test}"


def test_breaks_are_killed_survive_or_no_longer_fit(mutation: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "small.py").write_text(CODE)
    (tmp_path / "tests" / "test_small.py").write_text(TEST)
    rows = [
        mutation.Break("wrong", "small.py", "2 * x", "3 * x", "test_small.py"),
        mutation.Break("equal", "small.py", "2 * x", "x + x", "test_small.py"),
        mutation.Break("gone", "small.py", "4 * x", "5 * x", "test_small.py"),
    ]
    endless = mutation.Break("endless", "small.py", "return 2 * x", "__import__('time').sleep(60)", "test_small.py")
    tried = [*mutation.attempts(rows, [tmp_path]), *mutation.attempts([endless], [tmp_path], limit=1.0)]
    found = {each.row.name: each for each in tried}
    outcomes = {name: each.outcome for name, each in found.items()}
    assert outcomes == {"wrong": "killed", "equal": "survived", "gone": "error", "endless": "killed"}
    assert "test_it_doubles" in found["wrong"].reason
    assert found["gone"].reason == "its text occurs 0 times in small.py"
    assert re.fullmatch(r"no end after \d+ s", found["endless"].reason)
    assert (tmp_path / "small.py").read_text() == CODE
    assert list(mutation.failing_without_a_break([*found.values()], tmp_path)) == []
    assert mutation.report([found["wrong"]]) == 0
    assert mutation.report([found["wrong"], found["equal"]]) == 1
    assert mutation.report([*found.values()]) == 2
    assert "2 of 3 breaks killed (66.7%), 1 errors" in capsys.readouterr().out


def test_a_killer_that_fails_without_its_break_says_nothing(mutation: Any, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "small.py").write_text(CODE)
    (tmp_path / "tests" / "test_small.py").write_text(TEST.replace("6", "7"))
    row = mutation.Break("wrong", "small.py", "2 * x", "3 * x", "test_small.py")
    found = list(mutation.attempts([row], [tmp_path]))
    assert [each.outcome for each in found] == ["killed"]
    (error,) = mutation.failing_without_a_break(found, tmp_path)
    assert (error.outcome, error.reason) == (
        "error",
        "fails without the break as well: test_small.py::test_it_doubles",
    )
