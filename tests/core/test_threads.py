"""How many threads are used, that they are given back, and that the pools survive errors, forks and the end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from bilevel.core import threads
from bilevel.core.threads import Threads


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four cores, two torch threads, and nothing in the environment."""
    for name in (threads.WORKERS, *threads.TORCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_workers_are_at_most_the_cores_and_the_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.workers() == 2
    torch.set_num_threads(3)
    assert threads.workers() == 3
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    assert threads.workers() == 1


def test_the_environment_sets_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILEVEL_WORKERS", "7")
    assert threads.workers() == 7
    assert threads.choose() == Threads(1, 7)
    assert threads.choose(3) == Threads(3, 7)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_bad_environment_is_one_sentence(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BILEVEL_WORKERS", text)
    with pytest.raises(ValueError, match=rf"^`BILEVEL_WORKERS` must be a positive int, got '{text}'\.$"):
        threads.workers()


@pytest.mark.parametrize("bad", [0, -2, 1.0, True, "2"])
def test_bad_numbers_are_one_sentence(bad: object) -> None:
    with pytest.raises(ValueError, match=rf"^`Threads.torch` must be a positive int, got {bad!r}\.$"):
        threads.choose(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^`Threads.workers` must be a positive int, got {bad!r}\.$"):
        Threads(1, bad)  # type: ignore[arg-type]


def test_the_choice_is_one_thread_and_a_worker_for_each_that_torch_would_have_used() -> None:
    assert threads.choose() == Threads(1, 2)
    torch.set_num_threads(9)
    assert threads.choose() == Threads(1, 4)


def test_an_explicit_number_bounds_both() -> None:
    assert threads.choose(1) == Threads(1, 1)
    assert threads.choose(8) == Threads(8, 4)


@pytest.mark.parametrize("name", threads.TORCH)
def test_a_number_from_the_environment_of_torch_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Torch has read the variable at its import; here the two threads of the fixture stand for it.
    monkeypatch.setenv(name, "2")
    assert threads.choose() == Threads(2, 2)
    assert threads.choose(1) == Threads(1, 1)


def test_processes_share_what_there_is() -> None:
    assert Threads(4, 5).shared_by(2) == Threads(2, 2)
    assert Threads(1, 2).shared_by(3) == Threads(1, 1)
    assert str(Threads(1, 2)) == "1 thread and 2 workers"
    assert str(Threads(2, 1)) == "2 threads and 1 worker"


def test_short_operations_put_a_choice_in_force_and_take_it_back() -> None:
    with threads.short_operations() as outer:
        assert outer == threads.current() == Threads(1, 2)
        with threads.short_operations(Threads(3, 5)):
            assert threads.current() == Threads(3, 5)
        assert threads.current() == outer
    assert threads.current() == Threads(2, 2)


def test_an_exception_gives_the_threads_back() -> None:
    with pytest.raises(ZeroDivisionError), threads.short_operations(Threads(3, 1)):
        _ = 1 / 0
    assert threads.current() == Threads(2, 2)


def test_a_worker_has_one_thread_of_torch_and_no_workers_of_its_own_and_the_caller_keeps_its_number() -> None:
    barrier = threading.Barrier(3)

    def look(_: int) -> tuple[int, int, str]:
        barrier.wait(10)
        return torch.get_num_threads(), threads.workers(), threading.current_thread().name

    found = list(threads.pool(3).map(look, range(3)))
    assert sorted(found) == [(1, 1, f"bilevel-3_{index}") for index in range(3)]
    assert threads.current() == Threads(2, 2)
    inherited: list[int] = []
    new = threading.Thread(target=lambda: inherited.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert inherited == [2]


def test_a_pool_is_made_once_and_goes_on_after_an_exception() -> None:
    pool = threads.pool(2)
    assert threads.pool(2) is pool
    assert threads.pool(3) is not pool
    with pytest.raises(ZeroDivisionError):
        list(pool.map(lambda x: 1 / x, [1, 0]))
    assert list(threads.pool(2).map(abs, [-1, -2])) == [1, 2]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What one interpreter prints that uses the pools in two processes, and counts the cores of a smaller affinity."""
    code = (
        "import os\nfrom bilevel.core.threads import pool, usable_cores\n"
        "assert list(pool(2).map(abs, [-1, -2])) == [1, 2]\n"
        "child = os.fork()\n"
        "assert list(pool(2).map(abs, [-3, -4])) == [3, 4]\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
        "print('parent' if child else 'child', flush=True)\n"  # the parent speaks last
        "if child and hasattr(os, 'sched_setaffinity'):\n"
        "    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(usable_cores())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_makes_its_own_pool_and_the_interpreter_ends_in_both(printed: list[str]) -> None:
    assert printed[:2] == ["child", "parent"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs os.sched_setaffinity")
def test_the_cores_of_the_process_are_counted_by_its_affinity(printed: list[str]) -> None:
    assert printed[2:] == ["1"]


def test_a_hypergradient_leaves_the_threads_alone() -> None:
    import bilevel as bl

    problem = bl.QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    bl.hypergradient(problem, bl.GradientDescent(), bl.Implicit(), torch.zeros(2, dtype=torch.float64))
    assert threads.current() == Threads(2, 2)


def test_blocks_of_several_threads_that_overlap_leave_nothing_in_force() -> None:
    entered, left = threading.Barrier(2), threading.Event()

    def first() -> None:
        with threads.short_operations(Threads(1, 3)):
            entered.wait()
        left.set()

    def second() -> None:
        with threads.short_operations(Threads(1, 1)):
            entered.wait()
            left.wait()

    both = [threading.Thread(target=each) for each in (second, first)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert threads.current() == Threads(2, 2)
