"""Break the library on purpose, one line at a time, and see whether its tests notice.

    python scripts/mutation.py                             every break, about half an hour on one core
    python scripts/mutation.py --only cg-judge --jobs 2
    python scripts/mutation.py --list

The breaks are the rows of scripts/mutations/. Each is made in a copy of the tree, where only the tests run that its row
names. A break is killed where one of them fails or takes too long. Exit code 1 where fewer than 95 % are killed, and 2
where a row no longer fits the code or its tests fail without any break.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib
import os
import py_compile
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from mutations import BREAKS, Break
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BAR = 0.95
"""Share of the breaks that the tests must notice."""
SECONDS = 600.0
"""After which tests count as hanging, which is noticed as well."""
KILLER = re.compile(r"^FAILED (?:\w+/)*(\S.*?)(?: - |$)")
"""The first test that failed, in pytest's summary, without the folders."""
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "build", "runs")
HEAVY = ("torch", "torch._dynamo", "sklearn.model_selection", "sklearn.preprocessing", "scipy.optimize")
"""Loaded once, and not by every child; the library and the plugins of pytest are left to them."""


@dataclass(frozen=True)
class Tried:
    """What the tests said of a break: "killed", "survived", or "error" where nothing can be said, and why."""

    row: Break
    outcome: str
    reason: str
    seconds: float = 0.0


def misfit(row: Break, root: Path) -> str:
    """Return why a row does not fit the code any more; empty where it does."""
    path = root / row.file
    if not path.is_file():
        return f"there is no {row.file}"
    count = path.read_text().count(row.old)
    if count != 1:
        return f"its text occurs {count} times in {row.file}"
    missing = [test for test in row.tests.split() if place_of(test, root) is None]
    return f"there is no {missing[0]} below tests/" if missing else ""


def place_of(test: str, root: Path) -> str | None:
    """Return a node id from the root of the tree, given one by the bare name of its file; None without such a file."""
    file, *parts = test.split("::")
    path = next((root / "tests").rglob(file), None)
    return None if path is None else "::".join((str(path.relative_to(root)), *parts))


class Tests:
    """Tests that run in a copy of the tree, in a forked process with a session of its own.

    Args:
        root: the copy.
        names: node ids, by the bare names of the files below its folder tests.
        stop: at the first that fails.
    """

    def __init__(self, root: Path, names: Sequence[str], *, stop: bool = True) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `ended`)
        self._start = time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(self._said.fileno(), descriptor)
            _run_and_exit(root, names, stop)

    @property
    def seconds(self) -> float:
        """How long they have run."""
        return time.monotonic() - self._start

    def ended(self, limit: float) -> tuple[int | None, str] | None:
        """Return (exit code of pytest, what it printed), without the code after the time limit; None before the end."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if not pid and self.seconds < limit:
            return None
        with contextlib.suppress(ProcessLookupError):
            # With the tests go the processes that they have started.
            os.killpg(self._pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self._pid, 0)
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")
        self._said.close()
        return (os.waitstatus_to_exitcode(status) if pid else None), said


def _run_and_exit(root: Path, names: Sequence[str], stop: bool) -> None:
    """Run pytest and leave the process without its parent's clean-up."""
    code = 99
    try:
        # Not what the parent has put in their place.
        sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        sys.path.insert(0, str(root))
        sys.dont_write_bytecode = True
        options = [*["-x"] * stop, "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        code = int(pytest.main([*options, *(place_of(name, root) or name for name in names)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def verdict(row: Break, ended: tuple[int | None, str], seconds: float) -> Tried:
    """Return what the end of the tests of a row says of it."""
    code, said = ended
    if code == 0:
        return Tried(row, "survived", "all its tests pass", seconds)
    if code is None:
        return Tried(row, "killed", f"no end after {seconds:.0f} s", seconds)
    lines = said.strip().splitlines() or [""]
    reason = next((line for line in lines if line.startswith(("FAILED ", "ERROR "))), lines[-1])
    # 1: a test has failed; 2 and 3: nothing could be collected, or pytest itself broke; below zero: a signal.
    return Tried(row, "killed" if code in (1, 2, 3) or code < 0 else "error", reason, seconds)


def copied(root: Path, place: Path) -> Path:
    """Return a copy of a tree with compiled code that is known by its text: a break may come within a second."""
    shutil.copytree(root, place, ignore=LEFT_OUT)
    by_text = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(place / "bilevel", quiet=1, invalidation_mode=by_text)
    return place


def attempts(rows: Sequence[Break], places: Sequence[Path], limit: float = SECONDS) -> Iterator[Tried]:
    """Break one line in each copy of the tree, run the tests of the row there, and mend the line again.

    Args:
        rows: the breaks.
        places: copies of the tree, each for one break at a time.
        limit: seconds for the tests of a row.

    Yields:
        What became of each row, in the order in which they end.
    """
    left, free = list(rows), list(places)
    running: list[tuple[Break, Path, str, Tests]] = []
    while left or running:
        while left and free:
            row, place = left.pop(0), free.pop()
            if reason := misfit(row, place):
                free.append(place)
                yield Tried(row, "error", reason)
                continue
            path = place / row.file
            text = path.read_text()
            path.write_text(text.replace(row.old, row.new))
            running.append((row, place, text, Tests(place, row.tests.split())))
        time.sleep(0.05)
        for each in list(running):
            row, place, text, tests = each
            if (ended := tests.ended(limit)) is not None:
                (place / row.file).write_text(text)
                running.remove(each)
                free.append(place)
                yield verdict(row, ended, tests.seconds)


def failing_without_a_break(found: Sequence[Tried], place: Path) -> Iterator[Tried]:
    """Run the tests that killed on the tree as it is: one that fails there says nothing of a break."""
    named = {each: match[1] for each in found if (match := KILLER.search(each.reason)) is not None}
    if not named:
        return
    tests = Tests(place, sorted(set(named.values())), stop=False)
    while (ended := tests.ended(float("inf"))) is None:
        time.sleep(0.05)
    _, said = ended
    for each, name in named.items():
        file = name.partition("::")[0]
        if re.search(rf"^(FAILED (\w+/)*{re.escape(name)}|ERROR (\w+/)*{re.escape(file)})", said, re.MULTILINE):
            yield replace(each, outcome="error", reason=f"fails without the break as well: {name}")


def line(each: Tried) -> str:
    """Return a row of the table."""
    return f"{each.outcome:<9} {each.row.name:<36} {each.seconds:5.0f} s  {each.reason[:140]}"


def report(found: Sequence[Tried]) -> int:
    """Print what was not killed, and the share; return the exit code."""
    counts = {kind: sum(each.outcome == kind for each in found) for kind in ("killed", "survived", "error")}
    print("", *(line(each) for each in found if each.outcome != "killed"), sep="\n")
    judged = counts["killed"] + counts["survived"]
    share = counts["killed"] / judged if judged else 1.0
    print(f"\n{counts['killed']} of {judged} breaks killed ({share:.1%}), {counts['error']} errors")
    return 2 if counts["error"] else int(share < BAR)


def main() -> int:
    """Try what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these breaks alone")
    parser.add_argument("--list", action="store_true", help="print the rows and try nothing")
    parser.add_argument("--jobs", type=int, default=1, help="breaks at a time (default 1)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.only or ()) - {row.name for row in BREAKS})
    if unknown:
        parser.error(f"there is no break {unknown[0]!r}: see --list")
    named = {row.name: row for row in BREAKS}
    rows = [named[name] for name in arguments.only or named]
    if arguments.list:
        print(tabulate([(row.name, row.file, row.old.strip(), row.new.strip(), row.tests) for row in rows]))
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for module in HEAVY:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        places = [copied(ROOT, Path(folder) / str(job)) for job in range(arguments.jobs)]
        found: dict[str, Tried] = {}
        for each in tqdm(attempts(rows, places), total=len(rows), disable=not sys.stderr.isatty()):
            tqdm.write(line(each))
            sys.stdout.flush()
            found[each.row.name] = each
        found |= {each.row.name: each for each in failing_without_a_break([*found.values()], places[0])}
        return report([*found.values()])


if __name__ == "__main__":
    sys.exit(main())
