"""One torch thread: the tests' operations are short, and on a busy machine two threads spend them waiting."""

from __future__ import annotations

import gc

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
