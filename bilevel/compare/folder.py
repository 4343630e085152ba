"""The folder of a run: what is written where, how it survives an interruption, and when it is refused.

    config.yaml  environment.json  results.jsonl  summary.json  figures/*.png  checkpoints/CELL.pt  .bilevel.json

Every file is written in one piece, so that a run killed at any moment leaves whole files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from bilevel.compare.ownership import (
    CHANGED,
    EARLY,
    brief,
    cell_name,
    earlier_names,
    first_difference,
    held_config,
    names,
    of_numbers,
)
from bilevel.compare.plan import Cell, Plan
from bilevel.core.environment import versions
from bilevel.core.files import misplaced, read_json, read_mark, remove_files, remove_unfinished, write_mark, write_whole

ELSEWHERE = "give another place with --out DIR"


class RunFolderError(ValueError):
    """A folder that this run cannot write to, in one sentence."""


class RunStopped(Exception):
    """What stopped a run from outside, in one sentence: no result, so that the same command tries again."""


LOCK = ".lock"
"""The file in an output folder that the process which writes there has locked."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make a folder and refuse it to other processes, until this one ends; the same process may lock it again."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = path / LOCK
        # Locking empties the file.
        if held.is_symlink() or (held.is_file() and held.stat().st_size):
            raise RunFolderError(f"{held} is a file of another program: {ELSEWHERE}.")
        lock = FileLock(path / LOCK, is_singleton=True)
        lock.acquire(blocking=False)
    except Timeout:
        busy = f"another process is writing to {path}"
        raise RunFolderError(f"{busy}: wait until it has ended, or {ELSEWHERE}.") from None
    except OSError as error:
        raise RunFolderError(_unusable(path, error)) from error
    try:
        yield
    finally:
        lock.release()


def _unusable(path: Path, error: OSError) -> str:
    return f"cannot write to the output folder {path} ({error.strerror}): {ELSEWHERE}."


def claimed(
    path: str | Path, kind: str, names: Sequence[str], writer: str, owned: Callable[[Path], Sequence[str]]
) -> Path:
    """Return an output folder where nothing is in the way of these names, and without a mark nothing but `owned`."""
    folder = expanded(path)
    mark = held_mark(folder, kind)
    ours = owned(folder) if mark is None else mark["writes"]
    if foreign := [name for name in names if name not in ours and os.path.lexists(folder / name)]:
        raise RunFolderError(f"{folder} holds {foreign[0]}, but nothing says that {writer} wrote it: {ELSEWHERE}.")
    if hindrance := misplaced(folder, names):
        raise RunFolderError(f"{hindrance}, where this command writes: move it away, or {ELSEWHERE}.")
    return folder


def held_mark(folder: Path, kind: str) -> dict[str, Any] | None:
    """Return the mark of an output folder, None where it has none; refuse what is no folder, and other results."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise RunFolderError(f"{folder} is {'a file' if folder.exists() else 'a link to nothing'}: {ELSEWHERE}.")
    mark = read_mark(folder)
    held = mark["kind"] if mark is not None else "run" if earlier_names(folder) else kind
    if held != kind:
        whose = "`bilevel compare`, or of `bilevel tune` with a solver" if held == "run" else f"`bilevel {held}`"
        raise RunFolderError(f"{folder} holds the results of {whose}: {ELSEWHERE}.")
    return mark


def unwritten(error: OSError) -> str:
    """Return the sentence about a file that could not be written during a run."""
    what = f"cannot write {error.filename} ({error.strerror}); what was computed before is kept"
    return f"{what}: mend that and run the same command to continue, or {ELSEWHERE}."


def expanded(path: str | Path) -> Path:
    """Return the path of an output folder without a ``~``; refuse a user that is not there, and a path that is none."""
    reason = "it holds a NUL" if "\0" in str(path) else ""
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:
        reason = str(error)
    if reason:
        raise RunFolderError(f"cannot write to the output folder {str(path)!r} ({reason}): {ELSEWHERE}.")
    return folder


class RunFolder:
    """The output of one run: a folder, made by `prepare`, and the config that identifies it, in plain containers."""

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = expanded(path), config
        self.cells: Sequence[Cell] = ()
        self.identity: Mapping[str, Mapping[str, str]] = {}
        self.owner = ""

    def of(self, plan: Plan) -> RunFolder:
        """Say which plan the folder is for, and return the folder."""
        self.cells, self.identity = plan.cells, plan.identity
        return self

    @property
    def stop_file(self) -> Path:
        """A file whose existence asks every process of the run to stop after its outer step."""
        return self.path / "checkpoints" / "stop"

    @property
    def lost(self) -> bool:
        """Whether another command has taken the folder over: this process is the worker of one that was killed."""
        if not self.owner:
            return False
        try:
            return self._owner_file.read_text() != self.owner
        except FileNotFoundError:
            return True

    @property
    def stopping(self) -> bool:
        """Whether every process of the run should stop after its outer step."""
        return self.stop_file.exists() or self.lost

    @property
    def _owner_file(self) -> Path:
        return self.path / "checkpoints" / "owner"

    def lock(self) -> AbstractContextManager[None]:
        """Return a context in which no other process writes to the folder (see `locked`)."""
        return locked(self.path)

    def prepare(self, fresh: bool = False) -> None:
        """Make the folder, or accept one that holds an earlier part of this run; `fresh`: remove what that wrote."""
        try:
            self.check(fresh)
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            earlier, mark = earlier_names(self.path), read_mark(self.path) or {}
            identity = self.identity if fresh else mark.get("identity", self.identity)
            # First of all: without it nothing here proves to be ours.
            write_mark(self.path, "run", {*names(self.cells), *earlier}, {"identity": identity})
            if fresh:
                remove_files(self.path, earlier)
                (self.path / "checkpoints").mkdir(exist_ok=True)
            remove_unfinished(self.path, self.path / "checkpoints", self.path / "figures")
            self.write("config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True))
            self.owner = uuid.uuid4().hex
            write_whole(self._owner_file, self.owner)
            self.stop_file.unlink(missing_ok=True)
        except OSError as error:
            raise RunFolderError(_unusable(self.path, error)) from error

    def check(self, fresh: bool = False) -> None:
        """Refuse a folder that is not new and holds no earlier part of this run; writes nothing.

        `fresh` accepts another configuration of the same name, too.

        Raises:
            RunFolderError: for files that no run of this program wrote, and results of another config, data or classes.
        """
        mark, earlier = held_mark(self.path, "run"), earlier_names(self.path)
        theirs = [name for name in names(self.cells) if os.path.lexists(self.path / name)]
        if theirs and not earlier:
            unproven = f"holds {theirs[0]}, but nothing says that a run of this program wrote it"
            raise RunFolderError(f"{self.path} {unproven}: {ELSEWHERE}.")
        if hindrance := misplaced(self.path, {*names(self.cells), *earlier}):
            raise RunFolderError(f"{hindrance}, where this run writes: move it away, or {ELSEWHERE}.")
        if earlier:
            self._check_earlier(fresh, mark or {})

    def _check_earlier(self, fresh: bool, mark: Mapping[str, Any]) -> None:
        """Refuse to continue a run of another configuration, other data or other classes."""
        remedy = "--fresh starts anew there, --out DIR writes elsewhere."
        held = held_config(self.path)
        if fresh:
            theirs, ours = (c.get("name") if isinstance(c, Mapping) else None for c in (held, self.config))
            if theirs is not None and theirs != ours:
                raise RunFolderError(f"{self.path} holds the run {brief(theirs)}, this is {ours!r}: {ELSEWHERE}.")
            return
        if held is None:
            # A run killed before it wrote its configuration leaves nothing else.
            if result := [name for name in names(self.cells) if (self.path / name).exists() and name not in EARLY]:
                raise RunFolderError(f"{self.path} holds {result[0]} without a config.yaml: {remedy}")
            return
        if not isinstance(held, dict):
            raise RunFolderError(f"{self.path}/config.yaml cannot be read: {remedy}")
        if difference := first_difference(held, dict(self.config)):
            raise RunFolderError(f"{self.path} holds the results of another configuration, {difference}: {remedy}")
        identity = mark.get("identity")
        for kind, words in CHANGED.items():
            before = identity.get(kind) if isinstance(identity, dict) else None
            for name, now in self.identity.get(kind, {}).items():
                if isinstance(before, dict) and before.get(name, now) != now:
                    raise RunFolderError(f"{self.path} holds a run with {words.format(name=name)}: {remedy}")

    def check_versions(self) -> None:
        """Refuse to go on with a run that other versions of what computes the numbers have begun."""
        environment = read_json(self.path / "environment.json")
        before = environment.get("versions") if isinstance(environment, dict) else None
        for name, now in versions().items():
            held = before.get(name, now) if isinstance(before, dict) else now
            if held != now and of_numbers(name, held) != of_numbers(name, now):
                raise RunFolderError(
                    f"{self.path} holds a run that was begun with {name} {brief(held)}, this is {name} {now}: install "
                    "that version, start anew with --fresh, or write elsewhere with --out DIR."
                )

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file in one piece; where that fails, as on a full disk, what the folder held is still there."""
        try:
            write_whole(self.path / name, content)
        except OSError as error:
            raise RunFolderError(unwritten(error)) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file; NaN is refused, as JSON has none."""
        self.write(name, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write results.jsonl."""
        lines = (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        self.write("results.jsonl", "".join(lines))

    def checkpoint(self, cell: Cell) -> Path:
        """Return the checkpoint file of a cell."""
        return self.path / "checkpoints" / f"{cell_name(cell)}.pt"

    def identity_of(self, cell: Cell) -> dict[str, Any]:
        """Return what a checkpoint says it is of."""
        config = json.dumps(dict(self.config), sort_keys=True, default=str)
        digest = hashlib.sha256(config.encode()).hexdigest()
        return {"problem": cell.problem, "estimator": cell.estimator, "seed": cell.seed, "config": digest}

    def traceback_of(self, cell: Cell) -> Path:
        """Return the file with the traceback of the exception that ended a cell."""
        return self.checkpoint(cell).with_suffix(".txt")

    def save_traceback(self, cell: Cell, text: str) -> None:
        """Keep the traceback of the exception that ended a cell, beside its checkpoint; an empty one removes it."""
        file = self.traceback_of(cell)
        if text:
            self.write(f"checkpoints/{file.name}", text)
        elif file.is_file():
            file.unlink(missing_ok=True)

    def save(self, cell: Cell, state: Mapping[str, Any]) -> None:
        """Save a checkpoint in one piece; a folder that another command has taken over is left to that."""
        if self.lost:
            return
        content = io.BytesIO()
        torch.save(dict(state) | {"cell": self.identity_of(cell)}, content)
        self.write(f"checkpoints/{self.checkpoint(cell).name}", content.getvalue())

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """Return the checkpoint of a cell, or None where there is none; refuse a file that is not one."""
        path = self.checkpoint(cell)
        if not path.exists():
            return None
        remedy = "delete it to run that part again, or start anew with --fresh."
        try:
            state = torch.load(path, weights_only=True)
        except OSError as error:
            what = f"the checkpoint {path} cannot be read now ({error.strerror})"
            raise RunFolderError(f"{what}: mend that and run the same command to continue.") from error
        except Exception as error:  # torch.load raises half a dozen kinds, by the way in which the file is broken
            raise RunFolderError(f"the checkpoint {path} cannot be read: {remedy}") from error
        if not isinstance(state, dict) or "format" not in state:
            raise RunFolderError(f"the file {path} is no checkpoint of this program: {remedy}")
        wanted = self.identity_of(cell)
        # Versions that did not save it.
        held = state.get("cell", wanted)
        if held != wanted:
            what = next(key for key in wanted if not isinstance(held, dict) or held.get(key) != wanted[key])
            whose = "another configuration" if what == "config" else f"another {what}"
            raise RunFolderError(f"the checkpoint {path} is of {whose}: {remedy}")
        return state
