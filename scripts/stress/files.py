"""Faults of the file system: one sentence each, and nothing that was computed is lost or mixed."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .runs import Child, Outcome, results, run, without_figures, write_config


class Fault(Exception):
    """What went wrong under a fault."""


def file_faults(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """Meet every fault.

    Args:
        folder: an empty folder to work in.

    Yields:
        For each: its name, whether it was caught with nothing lost, and else why not.
    """
    whole = folder / "whole"
    whole.mkdir()
    _expect(run(_line(whole), without_figures), 0)
    for fault in FAULTS:
        place = folder / fault.__name__
        place.mkdir()
        try:
            fault(place, whole / "out")
        except Fault as reason:
            yield fault.__name__.replace("_", " "), False, str(reason)
        else:
            yield fault.__name__.replace("_", " "), True, ""


def a_full_disk(place: Path, whole: Path) -> None:
    """No file may grow beyond 4 kB: a checkpoint does."""

    def fill() -> None:
        without_figures()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    _expect(run(_line(place), fill), 2, "cannot write", "what was computed before is kept")
    _finish(place, whole)


def a_disk_that_fills_in_the_middle(place: Path, whole: Path) -> None:
    """After some checkpoints every write fails as on a full disk."""

    def fill() -> None:
        without_figures()
        from bilevel.core import files

        sync, count = os.fsync, 0

        def failing(descriptor: int) -> None:
            nonlocal count
            count += 1
            if count > 8:
                raise OSError(28, "No space left on device")
            sync(descriptor)

        files.os.fsync = failing  # type: ignore[attr-defined]

    _expect(run(_line(place), fill), 2, "No space left on device", "run the same command to continue")
    if not list((place / "out" / "checkpoints").glob("*.pt")):
        raise Fault("the checkpoints written before are gone")
    _finish(place, whole)


def an_unwritable_directory(place: Path, whole: Path) -> None:
    """A place where nobody can make a folder."""
    _expect(run(_line(place, "/proc/bilevel"), without_figures), 2, "cannot write to the output folder /proc/bilevel")


def a_file_in_the_place_of_the_folder(place: Path, whole: Path) -> None:
    """The output is a file that someone needs."""
    (place / "out").write_text("precious")
    _expect(run(_line(place), without_figures), 2, "is a file: give another place with --out DIR")
    if (place / "out").read_text() != "precious":
        raise Fault("the file was overwritten")


def a_truncated_results_file(place: Path, whole: Path) -> None:
    """Results that end in the middle of a line are written again."""
    shutil.copytree(whole, place / "out")
    target = place / "out" / "results.jsonl"
    target.write_text(target.read_text()[:-100])
    _finish(place, whole)


def a_truncated_checkpoint(place: Path, whole: Path) -> None:
    """The sentence names the file; without it that part alone runs again."""
    shutil.copytree(whole, place / "out")
    target = sorted((place / "out" / "checkpoints").glob("*.pt"))[1]
    target.write_bytes(target.read_bytes()[:300])
    _expect(run(_line(place), without_figures), 2, target.name, "delete it to run that part again")
    target.unlink()
    _finish(place, whole)


def a_checkpoint_that_would_run_code(place: Path, whole: Path) -> None:
    """A file made by someone else is data, whatever it holds."""
    shutil.copytree(whole, place / "out")
    target = sorted((place / "out" / "checkpoints").glob("*.pt"))[0]
    torch.save({"format": 1, "rows": _Touch(str(place / "ran"))}, target, pickle_module=pickle)
    _expect(run(_line(place), without_figures), 2, "cannot be read")
    if (place / "ran").exists():
        raise Fault("the checkpoint ran code")


def a_config_changed_between_runs(place: Path, whole: Path) -> None:
    """Results of two configurations are never mixed."""
    shutil.copytree(whole, place / "out")
    line = _line(place)
    write_config(place, SMALL | {"seeds": [2]})
    _expect(run(line, without_figures), 2, "holds the results of another configuration", "`seeds`")
    if results(place / "out") != results(whole):
        raise Fault("the results were touched")


def two_processes_in_one_directory(place: Path, whole: Path) -> None:
    """The second is refused while the first runs, and finds it complete afterwards."""
    with Child(_line(place), without_figures) as first:
        while not (place / "out" / "checkpoints" / "owner").exists():
            time.sleep(0.002)
        os.kill(first.pid, signal.SIGSTOP)
        second = run(_line(place), without_figures)
        os.kill(first.pid, signal.SIGCONT)
        _expect(second, 2, "another process is writing to")
        _expect(first.wait(), 0)
    _finish(place, whole)


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.path, "w")


FAULTS = (
    a_full_disk,
    a_disk_that_fills_in_the_middle,
    an_unwritable_directory,
    a_file_in_the_place_of_the_folder,
    a_truncated_results_file,
    a_truncated_checkpoint,
    a_checkpoint_that_would_run_code,
    a_config_changed_between_runs,
    two_processes_in_one_directory,
)


SMALL = {"seeds": [0], "solver": {"class": "Nesterov", "steps": 40}, "outer": {"lr": 0.2, "steps": 3}}
"""The faults meet many commands; the least that has several checkpoints will do."""


def _line(place: Path, out: str | None = None) -> list[str]:
    """Return the command that every fault meets."""
    return ["compare", str(write_config(place, SMALL)), "--device", "cpu", "--out", out or str(place / "out")]


def _finish(place: Path, whole: Path) -> None:
    """The same command again comes to the numbers of a run that met no fault."""
    _expect(run(_line(place), without_figures), 0)
    if results(place / "out") != results(whole):
        raise Fault("other numbers than a run that met no fault")


def _expect(outcome: Outcome, code: int, *words: str) -> None:
    """Compare how a command ended, and what it said in how many lines, with what it should."""
    said = outcome.said.strip()
    if outcome.code != code or "Traceback" in said:
        raise Fault(f"exit code {outcome.code} in place of {code}: {said[-300:]}")
    errors = [line for line in said.splitlines() if line.startswith("bilevel: ")]
    if words and (len(errors) != 1 or not all(word in errors[0] for word in words)):
        raise Fault(f"said {said[-300:]!r}")
