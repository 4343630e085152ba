"""Exceptions in words: where the user's own code raised them, and whether their cause lies outside of what was run."""

from __future__ import annotations

import errno
import sysconfig
import traceback
import zipfile
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from bilevel.core.options import first_line

PACKAGE = str(Path(__file__).resolve().parents[1])
STANDARD = str(Path(sysconfig.get_paths()["stdlib"]).resolve())
LIBRARIES = ("torch", "numpy", "scipy", "sklearn", "pydantic", "joblib", "matplotlib", "tqdm")
OUTSIDE = (OSError, MemoryError, ImportError, EOFError, zipfile.BadZipFile, zlib.error, BrokenProcessPool)
"""What a file, a disk, the memory or another process did: trying again may well succeed."""
WORDS = (
    *("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc"),
    *("cuda error", "cublas_status", "cudnn_status", "cusolver_status", "can't start new thread"),
    *("too many open files", "dataloader worker", "shared memory"),
)
"""torch says by a RuntimeError what others say by a MemoryError or an OSError."""


UNSAID = (ArithmeticError, LookupError, TypeError, AttributeError, NameError, AssertionError)
"""What says little without its name."""


def told(error: BaseException) -> str:
    """Return what an exception says, in one sentence.

    A ValueError of this package is a whole sentence already; of any other that the user's own code has a part in, type,
    file and line are named.
    """
    own = [(frame, _library(frame.filename)) for frame in traceback.extract_tb(error.__traceback__)]
    users = [frame for frame, library in own if library == ""]
    ours = [library for _, library in own if library in ("", "bilevel")]
    text = first_line(error)
    if isinstance(error, ValueError) and (not users or ours[-1] == "bilevel"):
        return text
    name = type(error).__name__
    text = text.removeprefix(f"{name}: ").rstrip(".")
    said = name if text == name else f"{name}: {text}"
    if not users:
        return f"{said}." if isinstance(error, UNSAID) else first_line(error)
    return f"{said} ({Path(users[-1].filename).name}, line {users[-1].lineno})."


def _library(file: str) -> str:
    """Return the library that a file belongs to; empty for the user's own."""
    if file.startswith("<"):
        return "python"
    parts = Path(file).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            name = parts[parts.index(folder) + 1 :][:1]
            return name[0] if name and name[0] in (*LIBRARIES, "bilevel") else ""
    path = str(Path(file).resolve())
    return "bilevel" if path.startswith(PACKAGE) else "python" if path.startswith(STANDARD) else ""


def outside(error: BaseException | None) -> str:
    """Return in words what happened outside of what was run; empty for an error of its own.

    >>> outside(MemoryError()), outside(ValueError("no"))
    ('out of memory: MemoryError.', '')
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if memory or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return f"out of memory: {first_line(error)}"
        if isinstance(error, BrokenProcessPool):
            return "a worker process was killed or crashed, perhaps out of memory."
        if isinstance(error, OUTSIDE):
            return first_line(error)
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS):
            return first_line(error)
        # What an exception was made of, where it says so.
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ""


def memory_ran_out(text: str) -> bool:
    """Whether a sentence is about memory that ran out, or a device that failed."""
    return any(word in text.lower() for word in WORDS)
