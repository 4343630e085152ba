"""``bilevel curse``: run the experiments of configs, write figures, numbers and claims."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from bilevel.cli.threads import chosen_threads
from bilevel.compare import describe_environment, locked
from bilevel.compare.folder import claimed
from bilevel.config.curse import load_experiment
from bilevel.config.document import ConfigError
from bilevel.core.files import read_mark, remove_unfinished, write_mark, write_whole
from bilevel.core.threads import short_operations
from bilevel.curse import Experiment, write_outcome
from bilevel.curse.folder import names as written_names
from bilevel.curse.folder import owned_names


def run_curse(arguments: Namespace) -> int:
    """Run ``bilevel curse``; a config that cannot be used, or two of one name, are refused before anything runs."""
    plans = [load_experiment(config, arguments.set) for config in arguments.configs]
    names = [name for name, _ in plans]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two configs have the name {repeated[0]!r}, so one would write over the other.")
    place = arguments.out or Path("runs") / "curse"
    folder = claimed(place, "curse", written_names(names), "`bilevel curse`", owned_names)
    with short_operations(chosen_threads(arguments)), locked(folder):
        remove_unfinished(folder)
        held = read_mark(folder) or {"writes": owned_names(folder)}
        write_mark(folder, "curse", {*held["writes"], *written_names(names)})
        write_whole(folder / "environment.json", json.dumps(describe_environment("cpu"), indent=2) + "\n")
        for name, plan in plans:
            _run(name, plan, folder)
    print(f"written to {folder}; claims.md holds every claim with its number.")
    return 0


def _run(name: str, plan: Experiment, folder: Path) -> None:
    """Run one experiment, write what it found, and say so."""
    start = time.perf_counter()
    outcome = plan.run()
    options = {"experiment": type(plan).__name__} | asdict(plan)
    files = write_outcome(name, outcome, folder, options)
    for note in outcome.notes:
        print(f"{name}: {note}", file=sys.stderr)
    holding = sum(claim.holds for claim in outcome.claims)
    print(
        f"{name}: {holding} of {len(outcome.claims)} claims hold, {time.perf_counter() - start:.1f} s, "
        f"{', '.join(file.name for file in files if file.name != 'claims.md')}",
        flush=True,
    )
    if not any(file.suffix == ".png" for file in files):
        print("no figure: it needs matplotlib (pip install 'bilevel[plot]').", file=sys.stderr)
