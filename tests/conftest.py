"""One torch thread: the tests' operations are short, and on a busy machine two threads spend them waiting.

A table marked `crossed` combines arguments that act alone; where a pair decides what runs, a table has no mark.
``pytest --whole`` runs all rows of such a table, and otherwise a covering of them runs and the rest is reported as
deselected.
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from itertools import combinations
from typing import Any

import pytest

# A file for the child processes of the benchmark, which have its folder on their path.
collect_ignore = ["toy_contest.py"]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Set the number, but for the process of pytest-xdist that hands out tests: that needs no torch."""
    if not session.config.pluginmanager.has_plugin("dsession"):
        import torch

        torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what has been collected out of the garbage collector, which walks the rest less often: both take time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs whole tables."""
    parser.addoption("--whole", action="store_true", help="run every row of the tables that are marked `crossed`")


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a covering of the rows of each crossed table."""
    tables: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("crossed") and not config.getoption("whole"):
            tables[item.nodeid.partition("[")[0]].append(item)
    left = {id(item) for table in tables.values() for item in uncovered(table)}
    if left:
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left])
        items[:] = [item for item in items if id(item) not in left]


def uncovered(table: list[Any]) -> list[Any]:
    """Return the rows that a covering leaves out: it has each value of two arguments twice, each pair of more once."""
    rows = [tuple(values(item)) for item in table]
    size = 2 if len(rows[0]) > 2 else 1  # of the combinations that are covered
    parts = [list(combinations(enumerate(row), size)) for row in rows]
    times = Counter(part for row in parts for part in row)
    needed = Counter({part: min(3 - size, count) for part, count in times.items()})
    left = list(range(len(rows)))
    while left and needed.total():
        best = max(left, key=lambda i: sum(needed[part] > 0 for part in parts[i]))
        left.remove(best)
        needed -= Counter(parts[best])
    return [table[i] for i in left]


def values(item: Any) -> list[tuple[int, ...]]:
    """Return what each `parametrize` of a test gives it, by identity."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    names = [name.replace(",", " ").split() if isinstance(name, str) else name for name in names]
    return [tuple(id(item.callspec.params[name]) for name in each) for each in names]
