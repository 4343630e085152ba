"""What the meter of costs takes itself."""

import time

import pytest
import torch

from bilevel.core import cost


@pytest.fixture
def slow_looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Looks of 4 ms, as in a heap of many free pieces; the list grows by one at each."""
    taken: list[float] = []

    def look() -> int:
        taken.append(0.004)
        time.sleep(0.004)
        return 1000 * len(taken)

    monkeypatch.setattr(cost, "allocated_bytes", look)
    monkeypatch.setattr(cost, "_LOOKS", cost._Looks())
    return taken


def test_looks_at_the_memory_take_at_most_a_share_of_the_time(slow_looks: list[float]) -> None:
    start = time.perf_counter()
    costs = []
    for _ in range(200):
        meter = cost.Meter(torch.device("cpu"))
        time.sleep(0.001)
        costs.append(meter.read())
    spent = time.perf_counter() - start
    assert costs[0].peak_memory == 1000
    assert costs[0].memory_kind == "live CPU allocations, sampled"
    assert sum(slow_looks) < cost._Looks.SHARE * spent + 4 * 0.004
    assert {(each.peak_memory, each.memory_kind) for each in costs[3:6]} == {(None, "none")}


def test_a_level_at_the_start_is_looked_at_once_more(slow_looks: list[float]) -> None:
    meter = cost.Meter(torch.device("cpu"))
    for _ in range(50):
        meter.sample()
    assert len(slow_looks) <= 3
    assert meter.read().peak_memory == 1000 * (len(slow_looks) - 1)
