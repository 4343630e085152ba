"""The folder of a run: what is written where, how it survives an interruption, and when it is refused.

    config.yaml  environment.json  results.jsonl  summary.json  figures/*.png  checkpoints/CELL.pt

Every file is written in one piece, so that a run killed at any moment leaves whole files.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from bilevel.compare.plan import Cell
from bilevel.files import remove_unfinished, write_whole

OWN = (
    "config.yaml",
    "environment.json",
    "results.jsonl",
    "summary.json",
    "tuned.json",
    "figures",
    "checkpoints",
)
"""The names that a run writes; `fresh` removes these and nothing else."""


class RunFolderError(ValueError):
    """A folder that this run cannot write to, in one sentence."""


LOCK = ".lock"
"""The file in an output folder that the process which writes there has locked."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make a folder and keep other processes from writing to it; the system ends the lock of a process that dies.

    Args:
        path: the folder; the same process may lock it again.

    Yields:
        Nothing.

    Raises:
        RunFolderError: where another process holds the lock, or the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, is_singleton=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise RunFolderError(
            f"another process is writing to {path}: wait until it has ended, or give another place with --out DIR."
        ) from None
    except OSError as error:
        raise RunFolderError(_unusable(path, error)) from error
    try:
        yield
    finally:
        lock.release()


def _unusable(path: Path, error: OSError) -> str:
    return f"cannot write to the output folder {path} ({error.strerror}): give another place with --out DIR."


def unwritten(error: OSError) -> str:
    """Return the sentence about a file that could not be written during a run."""
    return (
        f"cannot write {error.filename} ({error.strerror}); what was computed before is kept: mend that and run the "
        "same command to continue, or give another place with --out DIR."
    )


class RunFolder:
    """The output of one run.

    Args:
        path: the folder; it is made by `prepare`.
        config: what identifies the run, in plain containers.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.config = config
        self.owner = ""

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
        """Make the folder, or accept the one that holds an earlier part of this run.

        Args:
            fresh: remove what an earlier run wrote.

        Raises:
            RunFolderError: for the results of another configuration, or a place that cannot be written to.
        """
        try:
            if fresh:
                self._clear()
            else:
                self.check()
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.path)
            # First of all: `check`, which another process may call meanwhile, takes files without it for a stranger's.
            self.write("config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True))
            self.owner = uuid.uuid4().hex
            write_whole(self._owner_file, self.owner)
            self.stop_file.unlink(missing_ok=True)
        except OSError as error:
            raise RunFolderError(_unusable(self.path, error)) from error

    def _clear(self) -> None:
        for name in OWN:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def check(self) -> None:
        """Accept a folder that is new or holds an earlier part of this run; writes nothing.

        Raises:
            RunFolderError: for a file in its place, or for the results of another configuration.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file: give another place with --out DIR.")
        remedy = "--fresh starts anew there, --out DIR writes elsewhere."
        try:
            held = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            # A run killed before it wrote its configuration leaves an empty folder of checkpoints.
            found = [name for name in OWN if (self.path / name).is_file() or any((self.path / name).glob("*"))]
            if found:
                raise RunFolderError(f"{self.path} holds {found[0]} without a config.yaml: {remedy}") from None
            return
        except yaml.YAMLError:
            raise RunFolderError(f"{self.path}/config.yaml cannot be read: {remedy}") from None
        difference = _first_difference(held, dict(self.config))
        if difference:
            raise RunFolderError(f"{self.path} holds the results of another configuration, {difference}: {remedy}")

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file in one piece.

        Args:
            name: its path in the folder.
            content: text or bytes.

        Raises:
            RunFolderError: where it cannot be written, as on a full disk; what the folder held is still there.
        """
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
        words = re.sub(r"[^A-Za-z0-9]+", "-", f"{cell.problem}-{cell.estimator}").strip("-")[:80]
        return self.path / "checkpoints" / f"{cell.index:03d}-{words}-{cell.seed}.pt"

    def save(self, cell: Cell, state: Mapping[str, Any]) -> None:
        """Save a checkpoint in one piece; a folder that another command has taken over is left to that."""
        if self.lost:
            return
        content = io.BytesIO()
        torch.save(dict(state), content)
        self.write(f"checkpoints/{self.checkpoint(cell).name}", content.getvalue())

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """Return the checkpoint of a cell, or None where there is none.

        Args:
            cell: the cell.

        Raises:
            RunFolderError: for a file that is not a checkpoint.
        """
        path = self.checkpoint(cell)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # torch.load raises half a dozen kinds, by the way in which the file is broken
            raise RunFolderError(
                f"the checkpoint {path} cannot be read: delete it to run that part again, or start anew with --fresh."
            ) from error
        return state


def _first_difference(held: Any, wanted: Any, path: str = "") -> str:
    """Return the first place where two configurations differ, in words; empty where they are equal."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in held if key not in wanted)]:
            inside = f"{path}.{key}" if path else str(key)
            if key not in held or key not in wanted:
                where = ("only in this one", "only there")[key in held]
                return f"where `{inside}` is {where}"
            found = _first_difference(held[key], wanted[key], inside)
            if found:
                return found
        # The order of problems and estimators is the order of the results.
        return f"where `{path}` has another order" if list(held) != list(wanted) and path in _ORDERED else ""
    return "" if held == wanted else f"where `{path}` is {held!r} there and {wanted!r} here"


_ORDERED = ("problems", "estimators")
