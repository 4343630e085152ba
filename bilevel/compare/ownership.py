"""Which files a run writes, and whether a folder proves to hold an earlier part of it."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from bilevel.compare.plan import Cell
from bilevel.core.files import GuardedLoader, read_json, read_mark

FILES = ("config.yaml", "environment.json", "results.jsonl", "summary.json", "tuned.json", "tuning.json")
FIGURES = ("outer_loss_by_cost", "outer_loss_by_seconds", "hypergradient_error", "memory")
"""With the checkpoints, these are all files that a run writes; `fresh` removes them and nothing else."""
EARLY = ("checkpoints/owner", "checkpoints/stop")
"""What stands in a folder before its configuration does."""
CHANGED = {
    "data": "other data of the problem {name!r}, whose file has changed since",
    "classes": "another source of {name}, which has changed since",
}
"""What a run knows besides its configuration, and how a difference is said."""
ORDERED = ("problems", "estimators")


def cell_name(cell: Cell) -> str:
    """Return the name of a cell's files, without an ending."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{cell.problem}-{cell.estimator}").strip("-")[:80]
    return f"{cell.index:03d}-{words}-{cell.seed}"


def names(cells: Iterable[Cell]) -> list[str]:
    """Return every name that a run with these cells writes, relative to its folder."""
    figures = [f"figures/{name}.png" for name in FIGURES]
    checkpoints = [f"checkpoints/{cell_name(cell)}{ending}" for cell in cells for ending in (".pt", ".txt")]
    return [*FILES, *figures, *checkpoints, *EARLY]


def earlier_names(folder: Path) -> list[str]:
    """Return the names of the files of an earlier run that a folder proves to hold; empty where it proves none.

    Versions without a mark have left a configuration beside the environment that they wrote.
    """
    if (mark := read_mark(folder)) is not None:
        return mark["writes"] if mark["kind"] == "run" else []
    environment, config = read_json(folder / "environment.json"), held_config(folder)
    versions = environment.get("versions") if isinstance(environment, dict) else None
    proven = isinstance(versions, dict) and "bilevel" in versions
    if not isinstance(config, dict) or not (proven or re.fullmatch("[0-9a-f]{32}", held_owner(folder))):
        return []
    try:
        keys = [(p, e, s) for p in config["problems"] for e in config["estimators"] for s in config["seeds"]]
    except (KeyError, TypeError):
        keys = []
    return names(Cell(index, *key) for index, key in enumerate(keys))


def held_owner(folder: Path) -> str:
    """Return what the last command has written into the file `owner`, empty where there is none."""
    try:
        return (folder / EARLY[0]).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def held_config(folder: Path) -> Any:
    """Return the configuration that a folder holds, None where it holds none, "" for one that cannot be read."""
    try:
        return yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), GuardedLoader) or ""
    except FileNotFoundError:
        return None
    except Exception:  # yaml raises many kinds for a file that is not what it should be
        return ""


def of_numbers(name: str, version: Any) -> Any:
    """Return the part of a version that can change numbers: of Python all but the last part."""
    return version.rpartition(".")[0] if name == "python" and isinstance(version, str) else version


def first_difference(held: Any, wanted: Any, path: str = "") -> str:
    """Return the first place where two configurations differ, in words; empty where they are equal."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in held if key not in wanted)]:
            inside = f"{path}.{key}" if path else str(key)
            if key not in held or key not in wanted:
                where = ("only in this one", "only there")[key in held]
                return f"where `{inside}` is {where}"
            if result := first_difference(held[key], wanted[key], inside):
                return result
        # The order of problems and estimators is the order of the results.
        return f"where `{path}` has another order" if list(held) != list(wanted) and path in ORDERED else ""
    return "" if held == wanted else f"where `{path}` is {brief(held)} there and {brief(wanted)} here"


def brief(value: Any) -> str:
    """Return a value that a file holds, in few characters however large it is."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
