"""What stands in a run's folder or its configuration, and what happens around a run while it computes."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from bilevel.compare import cells

from .runs import CONFIG, Child, Outcome, results, run, without_figures, write_config

Result = tuple[str, bool, str]
SMALL = {
    "solver": {"class": "Nesterov", "steps": 40},
    "estimators": {"implicit": {"class": "Implicit"}},
    "outer": {"lr": 0.2, "steps": 4},
}
LONG = 300
"""Most characters of a sentence about a configuration."""


def command_line(place: Path, *options: str, out: str = "out", changes: dict[str, object] | None = None) -> list[str]:
    """Return the command of a small comparison, with some changes of its configuration."""
    config = write_config(place, SMALL | (changes or {}))
    return ["compare", str(config), "--device", "cpu", "--out", str(place / out), *options]


def undisturbed(place: Path, changes: dict[str, object] | None = None) -> Path:
    """Return the folder of an undisturbed run."""
    outcome = run(command_line(place, out="whole", changes=changes), without_figures)
    if outcome.code:
        raise RuntimeError(f"the undisturbed run fails: {outcome.said}")
    return place / "whole"


def unworded(outcome: Outcome, *codes: int) -> str:
    """Return what is wrong with how a command has ended; empty where it is one of the codes, without a traceback."""
    said = outcome.said.strip()
    if outcome.code in codes and "Traceback" not in said:
        return ""
    return f"exit code {outcome.code}: {said[-300:]}"


def other_numbers(one: Path, other: Path) -> str:
    """Return what is wrong where a continued run has not come to the numbers of an undisturbed one."""
    try:
        return "" if results(one) == results(other) else "other numbers than an undisturbed run"
    except (OSError, ValueError) as error:
        return f"no results: {error}"


# Files of others -----------------------------------------------------------------------------------------------------

FOREIGN = (
    "notes.txt",
    ".vim.swap.tmp",
    "deep/er/.notes.tmp",
    "figures/paper.png",
    "checkpoints/model.pt",
    "checkpoints/000-mine-0.pt",
    "results.csv",
    "summary.json.bak",
    "environment.yaml",
)


def foreign_files(folder: Path) -> Iterator[Result]:
    """Run commands in folders that hold files of others.

    Args:
        folder: an empty folder to work in.

    Yields:
        For each file and command: its name, whether the file is as it was, and else what became of it.
    """
    for command, options, own in (
        ("compare", [], False),
        ("compare", ["--fresh"], False),
        ("compare", ["--fresh"], True),
        ("tune", ["--fresh"], False),
    ):
        place = folder / f"{command}{len(options)}{own}"
        place.mkdir()
        line = [command, *command_line(place, *options)[1:]]
        if own:
            run([each for each in line if each != "--fresh"], without_figures)
        for name in FOREIGN:
            (place / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "out" / name).write_text(f"mine: {name}")
        outcome = run(line, without_figures)
        wrong = unworded(outcome, 0, 2)
        for name in FOREIGN:
            path = place / "out" / name
            kept = path.is_file() and path.read_text() == f"mine: {name}"
            title = f"{name}, {command} {' '.join(options)}{', a run of its own there' * own}"
            yield title, kept and not wrong, wrong or f"it is gone or changed; {outcome.said[-200:]}"


# Errors that pass ----------------------------------------------------------------------------------------------------

PASSING: Sequence[Callable[[], Exception]] = (
    MemoryError,
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    lambda: FileNotFoundError(errno.ENOENT, "No such file or directory", "/mnt/away/data.csv"),
    lambda: PermissionError(errno.EACCES, "Permission denied", "/mnt/away/data.csv"),
    lambda: RuntimeError("CUDA error: device-side assert triggered"),
    lambda: ImportError("libcudart.so: cannot open shared object file"),
    lambda: EOFError("Ran out of input"),
)


def passing_errors(folder: Path) -> Iterator[Result]:
    """Let what happens outside a run break it in some step: the same command then comes to the undisturbed numbers.

    Args:
        folder: an empty folder to work in.

    Yields:
        For each error: its name, whether nothing of it was kept, and else what was.
    """
    whole = undisturbed(folder)
    for index, make in enumerate(PASSING):
        place = folder / str(index)
        place.mkdir()

        def fail(make: Callable[[], Exception] = make) -> None:
            without_figures()
            make_row, count = cells.make_row, 0

            def failing(*arguments: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == 3:
                    raise make()
                return make_row(*arguments, **options)  # type: ignore[arg-type]

            cells.make_row = failing  # type: ignore[assignment]

        first = run(command_line(place), fail)
        reason = unworded(first, 1, 2)
        reason = reason or unworded(run(command_line(place), without_figures), 0) or other_numbers(place / "out", whole)
        yield f"{type(make()).__name__}: {make()}", not reason, reason


# YAML ----------------------------------------------------------------------------------------------------------------


def _laughs(levels: str = "bcdefgh") -> str:
    text = "&a [1,1,1,1,1,1,1,1,1,1]"
    for letter in levels:
        text = f"&{letter} [{text}" + f",*{chr(ord(letter) - 1)}" * 9 + "]"
    return text


def _yaml_values() -> dict[str, tuple[str, str]]:
    """Return (key of the line, value in the place of its own) by what is wrong with it."""
    return {
        "no date": ("seeds", "2020-13-45"),
        "no binary number": ("budget", "0b_"),
        "no octal number": ("budget", "0o9"),
        "a tag of an int": ("budget", "!!int x"),
        "a tag of a bool": ("name", "!!bool x"),
        "a tag of a float": ("budget", "!!float x"),
        "a tag of a time": ("name", "!!timestamp x"),
        "a tag of bytes": ("name", "!!binary '*'"),
        "a tag of Python": ("name", "!!python/object/apply:os.system [touch ran]"),
        "an unknown tag": ("name", "!own x"),
        "long digits": ("seeds", "[" + "1" * 5000 + "]"),
        "a long hexadecimal number": ("seeds", "[0x" + "f" * 9000 + "]"),
        "an endless float": ("budget", "1e" + "9" * 4000),
        "deep lists": ("seeds", "[" * 3000),
        "deep mappings": ("solver", "{a: " * 3000),
        "deep and closed": ("seeds", "[" * 800 + "]" * 800),
        "aliases that explode": ("outer", "{steps: 3, tol: " + _laughs() + "}"),
        "merges that explode": ("outer", "{<<: " + _laughs() + "}"),
        "an alias of itself": ("outer", "&x {steps: 3, tol: *x}"),
        "an alias of nothing": ("outer", "*nothing"),
        "a list as a key": ("outer", "{? [1, 2] : 3}"),
        "a home of nobody": ("problems", "{d: {class: RidgeProblem, data: ~nouser/x.csv}}"),
        "a folder as data": ("problems", "{d: {class: RidgeProblem, data: /}}"),
        "a device as data": ("problems", "{d: {class: RidgeProblem, data: /dev/zero.csv}}"),
        "a long name": ("problems", "{" + "d" * 3000 + ": {class: RidgeProblem, data: diabetes}}"),
        "control characters": ("name", '"\\0\\e[2J"'),
    }


def yaml_bombs(folder: Path, seconds: float = 10.0) -> Iterator[Result]:
    """Run configs whose values cannot be built: one sentence, exit code 2, soon.

    Args:
        folder: an empty folder to work in.
        seconds: after which a command is killed.

    Yields:
        For each: its name, whether it was answered so, and else what came.
    """
    for index, (title, (key, value)) in enumerate(_yaml_values().items()):
        lines = [f"{name}: {yaml.safe_dump(each, default_flow_style=True).strip()}" for name, each in CONFIG.items()]
        text = "\n".join([line for line in lines if not line.startswith(f"{key}:")] + [f"{key}: {value}"])
        path = folder / f"{index}.yaml"
        path.write_text(text + "\n")
        start = time.process_time() + sum(os.times()[2:4])
        with Child(["compare", str(path), "--out", str(folder / f"out{index}")]) as child:
            outcome = child.within(seconds)
        took = time.process_time() + sum(os.times()[2:4]) - start
        if outcome is None:
            yield title, False, f"no end within {seconds:g} s"
            continue
        said = [each for each in outcome.said.splitlines() if each.strip()]
        reason = unworded(outcome, 2)
        reason = reason or ("" if len(said) == 1 else f"{len(said)} lines: {outcome.said[:300]}")
        reason = reason or ("" if len(said[0]) <= LONG else f"{len(said[0])} characters: {said[0][:200]}")
        yield title, not reason and took < 2, reason or f"took {took:.1f} s"


# Checkpoints and data ------------------------------------------------------------------------------------------------


def copied_checkpoints(folder: Path) -> Iterator[Result]:
    """Put the checkpoint of one part in the place of another's.

    Args:
        folder: an empty folder to work in.

    Yields:
        For each pair: its name, whether it was refused or did no harm, and else what came.
    """
    whole = undisturbed(folder)
    names = [path.name for path in sorted((whole / "checkpoints").glob("*.pt"))]
    for index, name in enumerate(names):
        other = names[(index + 1) % len(names)]
        place = folder / str(index)
        place.mkdir()
        shutil.copytree(whole, place / "out")
        shutil.copy(whole / "checkpoints" / name, place / "out" / "checkpoints" / other)
        (place / "out" / "summary.json").unlink()
        outcome = run(command_line(place), without_figures)
        reason = unworded(outcome, 0, 2) or ("" if outcome.code else other_numbers(place / "out", whole))
        yield f"{name} as {other}", not reason, reason


def changed_data(folder: Path) -> Iterator[Result]:
    """Change the data between two parts of a run: it is refused with words about the data.

    Args:
        folder: an empty folder to work in.

    Yields:
        For each kind of file and of change: its name, whether it was refused, and else what came.
    """
    draw = np.random.default_rng(0)
    X = draw.standard_normal((60, 4))
    y = X.sum(1) + 0.1 * draw.standard_normal(60)

    def write(path: Path, X: np.ndarray, y: np.ndarray) -> None:  # type: ignore[type-arg]
        if path.suffix == ".npz":
            np.savez(path, X=X, y=y)
        else:
            header = ",".join([*(f"x{index}" for index in range(X.shape[1])), "target"])
            np.savetxt(path, np.column_stack([X, y]), delimiter=",", header=header, comments="")

    moved = X.copy()
    moved[7, 2] += 1e-3
    changes = {
        "targets": (X, 3 * y),
        "one number": (moved, y),
        "order of rows": (X[::-1], y[::-1]),
        "rows": (X[1:], y[1:]),
    }
    for ending in (".npz", ".csv"):
        for title, (other_X, other_y) in changes.items():
            place = folder / f"{title}{ending}"
            place.mkdir()
            data = place / f"data{ending}"
            write(data, X, y)
            problems = {"d": {"class": "RidgeProblem", "data": str(data), "penalty": "scalar"}}
            line = command_line(place, changes={"problems": problems})
            first = run(line, without_figures)
            checkpoints = sorted((place / "out" / "checkpoints").glob("*.pt"))
            (place / "out" / "summary.json").unlink(missing_ok=True)
            if checkpoints:
                checkpoints[0].unlink()
            write(data, other_X, other_y)
            outcome = run(line, without_figures)
            reason = unworded(first, 0) or unworded(outcome, 2)
            reason = reason or ("" if "data" in outcome.said else f"no word of the data: {outcome.said}")
            yield f"{title} of {ending}", not reason, reason
