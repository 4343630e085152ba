"""What makes the problems of a config, for the split of a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel import data
from bilevel.compare import RunFolderError, Setup
from bilevel.config.imports import digest
from bilevel.core import tree
from bilevel.problems import DataProblem


def digest_of(name: str) -> str:
    """Return the digest of the file that a name of a data set stands for; empty where it stands for none."""
    try:
        file = Path(name).expanduser()
        return digest(file) if file.is_file() else ""
    except (OSError, RuntimeError, ValueError):
        return ""


@dataclass(frozen=True)
class DataSetup:
    """Makes a problem from a data set, for the split of a seed.

    `data` are options of `bilevel.data.load`, `start` is the value of all hyperparameters at the start, and `digest`
    that of the data file, which must not change; empty for data that are no file.
    """

    kind: type[DataProblem]
    options: Mapping[str, Any]
    data: Mapping[str, Any]
    start: float
    device: str = field(default="cpu", kw_only=True)
    digest: str = field(default="", kw_only=True)

    def __call__(self, seed: int) -> Setup:
        """Load the data and make the problem."""
        if self.digest and self.digest != digest_of(self.data["name"]):
            what = f"the data file {self.data['name']} has changed since this command began"
            raise RunFolderError(f"{what}: run the same command again.")
        result = data.load(**self.data, task=self.kind.task, seed=seed, device=self.device)
        problem = self.kind.from_data(result, **self.options)
        labels = problem.labels(result.feature_names)
        return Setup(problem, problem.initial_hparams(self.start), labels, problem.unit, result.note)


@dataclass(frozen=True)
class ProblemSetup:
    """Makes a problem that brings its data, for a seed; the attributes are those of `DataSetup`."""

    kind: type[Any]
    options: Mapping[str, Any]
    device: str = field(default="cpu", kw_only=True)

    def __call__(self, seed: int) -> Setup:
        """Make the problem."""
        problem = self.kind(**self.options, seed=seed, device=self.device)
        hparams = problem.initial_hparams()
        named = zip(tree.names(hparams), tree.leaves(hparams), strict=True)
        labels = [f"{name}[{index}]" for name, leaf in named for index in range(leaf.numel())]
        return Setup(problem, hparams, labels, problem.unit)
