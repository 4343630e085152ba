"""A config of `bilevel curse` -> a named experiment: ``experiment`` names its class, the other keys are its options."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel import curse
from bilevel.config.build import check_value
from bilevel.config.document import ConfigError, inside, listed, read_document, shown
from bilevel.core.options import suggest
from bilevel.curse import Experiment

RESERVED = ("environment", "claims")
"""Names of files that hold something else."""


def experiments() -> dict[str, type]:
    """Return the plan classes by name: what `bilevel.curse` exports that can be run.

    >>> sorted(experiments())
    ['Contraction', 'EqualBudget', 'InnerSolvers', 'Methods', 'Truncation', 'WarmStarts', 'WorstCase']
    """
    return {
        name: value
        for name, value in vars(curse).items()
        if isinstance(value, type) and issubclass(value, Experiment) and value is not Experiment
    }


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> tuple[str, Experiment]:
    """Return the name of an experiment's files, by default that of its config, and the experiment."""
    path = Path(path)
    document = read_document(path, overrides)
    if "experiment" not in document and {"problems", "estimators"} & set(document):
        raise ConfigError(
            f"{path}: it has `problems` and `estimators`, but no `experiment`, so it is a config of `bilevel compare` "
            f"and `bilevel tune`: run `bilevel compare {path}`."
        )
    with inside(f"{path}: "):
        return _made(document, path.stem)


def _made(document: dict[str, Any], stem: str) -> tuple[str, Experiment]:
    name, kind = document.pop("name", stem), document.pop("experiment", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        wanted = "a string of letters, digits and . _ -, as it names the files"
        raise ConfigError(f"`name` must be {wanted}, got {shown(name)}.")
    if name in RESERVED:
        raise ConfigError(f"`name` must not be {listed(RESERVED)}, as these files hold something else, got {name!r}.")
    known = experiments()
    if not isinstance(kind, str) or kind not in known:
        names, hint = listed(sorted(known)), suggest(str(kind), known)
        raise ConfigError(f"`experiment` must be one of {names}, got {shown(kind)}{hint}")
    owner = known[kind]
    hints, allowed = typing.get_type_hints(owner), [field.name for field in dataclasses.fields(owner)]
    options = {}
    for key, value in document.items():
        if key not in allowed:
            known_keys = listed(["name", "experiment", *allowed])
            raise ConfigError(f"`{key}` is not an option of {kind} ({known_keys}){suggest(str(key), allowed)}")
        options[key] = check_value(value, hints[key], key)
    try:
        return name, owner(**options)
    except ValueError as error:
        raise ConfigError(re.sub(rf"`{kind}\.(\w+)`", r"`\1`", str(error))) from None
