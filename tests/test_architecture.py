"""What the package promises of its own shape: floors, quick import, public names, room for a user's own classes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ridge_case, tree_case

import bilevel as bl
from bilevel.hypergrad.loop import begin, run_inner

ROOT = Path(bl.__file__).parent
FLOORS = {
    1: (
        "starting",
        "tree",
        "status",
        "cost",
        "lanczos",
        "look",
        "options",
        "constraints",
        "polynomials",
        "krylov",
        "threads",
        "spectral",
        "samplers",
        "loaders",
        "sampling",
        "modules",
        "sums",
        "members",
        "inputs",
        "files",
