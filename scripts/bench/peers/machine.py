"""The machine and the versions, read without importing what is measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = (
    "bilevel", "torch", "numpy", "scipy", "scikit-learn", "jax", "jaxlib", "jaxopt", "optimistix", "lineax",
    "torchopt", "higher", "optuna",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the installed version of every package that takes part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Return the commit that is measured, with a sign where the code differs from it; empty outside a git checkout."""
    root = Path(__file__).parents[3]

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "bilevel", "scripts/bench/peers")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except OSError:
        return ""


def processor() -> str:
    """Return the processor's model name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def describe(threads: int) -> dict[str, Any]:
    """Return the machine as it is now: processor, cores, memory, load, date."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "threads": threads,
        # Load of the last minute before the contest: above about 0.5 somebody else was at work.
        "load": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
