"""Where a run took place: versions, system, processor, threads, device."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bilevel.core.threads import Threads, current

PACKAGES = ("bilevel", "torch", "numpy", "scikit-learn", "scipy", "pydantic", "PyYAML", "matplotlib")


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


COMPARED = ("bilevel", "torch", "numpy", "scikit-learn")
"""With Python, what computes the numbers of a run."""


def versions() -> dict[str, str | None]:
    """Return the versions that a run can be continued with."""
    return {"python": platform.python_version()} | {name: package_version(name) for name in COMPARED}


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def describe_environment(device: str, used: Threads | None = None) -> dict[str, Any]:
    """Return what it takes to repeat a run; `used` are the threads of its processes, by default the caller's."""
    used = used or current()
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": used.torch,
        "workers": used.workers,
        "device": device,
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
