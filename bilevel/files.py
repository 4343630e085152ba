"""Files that are whole at any moment: written beside their place, then renamed."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

TEMPORARY = ".{name}.{process}.tmp"


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file in one piece: whoever kills the process, it holds the old content or the new.

    Args:
        target: the file; its folder exists.
        content: text, written as UTF-8, or bytes.

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
    """Write a matplotlib figure in one piece, in the format of the file's ending.

    Args:
        target: the file.
        figure: a ``matplotlib.figure.Figure``.
        options: those of its ``savefig``.
    """
    content = io.BytesIO()
    figure.savefig(content, format=target.suffix.removeprefix("."), **options)
    write_whole(target, content.getvalue())


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left in a folder and the folders inside."""
    for left in folder.rglob(TEMPORARY.format(name="*", process="*")):
        left.unlink(missing_ok=True)
