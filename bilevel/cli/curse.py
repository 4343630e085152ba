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
from bilevel.config.curse import load_experiment
from bilevel.config.document import ConfigError
from bilevel.curse import Experiment, write_outcome
from bilevel.files import remove_unfinished, write_whole
from bilevel.threads import short_operations


def run_curse(arguments: Namespace) -> int:
    """Run ``bilevel curse``.

    Args:
        arguments: `configs` (paths), `set` (overrides), `out` (a folder or None) and `threads` (a number or None).

    Returns:
        0 where every experiment ran.

    Raises:
        ConfigError: before anything runs, for a config that cannot be used or two of one name.
        RunFolderError: for a folder that another process is writing to.
    """
    plans = [load_experiment(config, arguments.set) for config in arguments.configs]
    names = [name for name, _ in plans]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"two configs have the name {repeated[0]!r}, so one would write over the other.")
    folder = Path(arguments.out or Path("runs") / "curse")
    with short_operations(chosen_threads(arguments)), locked(folder):
        remove_unfinished(folder)
        write_whole(folder / "environment.json", json.dumps(describe_environment("cpu"), indent=2) + "\n")
        for name, plan in plans:
            _run(name, plan, folder)
    print(f"written to {folder}; claims.md holds every claim with its number.")
    return 0


def _run(name: str, plan: Experiment, folder: Path) -> None:
    """Run one experiment, write what it found, and say so."""
    start = time.perf_counter()
    outcome = plan.run()
    options = {"experiment": type(plan).__name__} | asdict(plan)  # type: ignore[call-overload]
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
