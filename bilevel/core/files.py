"""Files that are whole at any moment: written beside their place, then renamed; and whose a folder is.

A folder that this program writes to holds a mark, which names every file that the program writes there. Nothing else in
the folder is ever removed or written over.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

TEMPORARY = ".{name}.bilevel-{process}.tmp"
UNFINISHED = re.compile(r"\..+\.bilevel-(\d+)\.tmp")
MARK = ".bilevel.json"
"""The file that says which command owns a folder, and what it writes there."""


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file in one piece: whoever kills the process, it holds the old content or the new.

    Raises:
        OSError: where it cannot be written, with the name of the file; the old content is still there.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "file.txt"
    >>> write_whole(file, "whole")
    >>> file.read_text()
    'whole'
    """
    temporary = target.with_name(TEMPORARY.format(name=target.name, process=os.getpid()))
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # The new name must not reach the disk before the bytes do.
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        # A full disk names no file.
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_figure(target: Path, figure: Any, **options: Any) -> None:
    """Write a matplotlib figure in one piece, in the format of the file's ending; options are those of ``savefig``."""
    content = io.BytesIO()
    figure.savefig(content, format=target.suffix.removeprefix("."), **options)
    write_whole(target, content.getvalue())


def remove_unfinished(*folders: Path) -> None:
    """Remove what processes of this program that were killed have left in some folders, not in those inside."""
    for folder in folders:
        for left in folder.glob(".*.tmp"):
            process = UNFINISHED.fullmatch(left.name)
            if process and left.is_file() and not left.is_symlink() and not _lives(int(process[1])):
                left.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether a process that is not this one lives."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Return the mark of a folder, None where it has none that this program wrote.

    It holds ``kind`` ("run" or "curse"), ``writes`` (names relative to the folder) and what else `write_mark` was
    given.
    """
    mark = read_json(folder / MARK)
    good = isinstance(mark, dict) and mark.get("program") == "bilevel" and isinstance(mark.get("kind"), str)
    if not good or not isinstance(mark.get("writes"), list):
        return None
    names = [name for name in mark["writes"] if isinstance(name, str) and _inside(name)]
    return mark | {"writes": names}


def write_mark(folder: Path, kind: str, writes: Iterable[str], more: Mapping[str, Any] | None = None) -> None:
    """Mark a folder as one that this program writes to: the kind of results, every name written, and what else."""
    content = {"program": "bilevel", "kind": kind, "writes": sorted(set(writes)), **(more or {})}
    write_whole(folder / MARK, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _inside(name: str) -> bool:
    """Whether a name stands for a file in the folder or in one folder inside it."""
    parts = Path(name).parts
    return 1 <= len(parts) <= 2 and ".." not in parts and not Path(name).is_absolute()


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


MOST_LEVELS = 40
DEEP = f"values are nested more than {MOST_LEVELS} deep"


class GuardedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses values that nest too deep: each level makes all later ones slower."""

    def fetch_flow_collection_start(self, kind: Any) -> None:
        """Scan a bracket."""
        self._check_level(self.flow_level)
        super().fetch_flow_collection_start(kind)

    def add_indent(self, column: int) -> bool:
        """Scan a deeper line."""
        self._check_level(len(self.indents))
        return bool(super().add_indent(column))

    def _check_level(self, level: int) -> None:
        if level >= MOST_LEVELS:
            raise yaml.scanner.ScannerError(None, None, DEEP, self.get_mark())


def misplaced(folder: Path, names: Iterable[str]) -> str:
    """Return what stands in the way of files that shall be written, in words; empty where nothing does."""
    for name in sorted(names):
        target = folder / name
        inside = target.parent if target.parent != folder else None
        if inside is not None and os.path.lexists(inside) and (inside.is_symlink() or not inside.is_dir()):
            return f"{inside} is {'a link' if inside.is_symlink() else 'no folder'}"
        if os.path.lexists(target) and (target.is_symlink() or not target.is_file()):
            return f"{target} is {'a link' if target.is_symlink() else 'a folder' if target.is_dir() else 'no file'}"
    return ""


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder, and the folders inside that are empty then; links and folders of their names stay."""
    names = list(names)
    for name in names:
        target = folder / name
        if target.is_file() and not target.is_symlink() and not target.parent.is_symlink():
            target.unlink(missing_ok=True)
    for inside in {Path(name).parent for name in names} - {Path()}:
        place = folder / inside
        if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()
