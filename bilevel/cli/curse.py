"""``bilevel curse``: run the experiments of configs, write figures, numbers and claims."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from bilevel.config.curse import load_experiment
from bilevel.config.document import ConfigError
from bilevel.curse import write_outcome


def run_curse(arguments: Namespace) -> int:
    """Run ``bilevel curse``.

    Args:
        arguments: `configs` (paths), `set` (overrides) and `out` (a folder or None).

    Returns:
        0 where every experiment ran.

    Raises:
        ConfigError: before anything runs, for a config that cannot be used or two of one name.
    """
    plans = [load_experiment(config, arguments.set) for config in arguments.configs]
    names = [name for name, _ in plans]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"two configs have the name {repeated[0]!r}, so one would write over the other.")
    folder = Path(arguments.out or Path("runs") / "curse")
    threads = torch.get_num_threads()
    # The batches are small: a second thread costs more than it brings, and much more on a busy machine.
    torch.set_num_threads(1)
    try:
        for name, plan in plans:
            start = time.perf_counter()
            outcome = plan.run()
            files = write_outcome(name, outcome, folder, {"experiment": type(plan).__name__} | asdict(plan))  # type: ignore[call-overload]
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
    finally:
        torch.set_num_threads(threads)
    print(f"written to {folder}; claims.md holds every claim with its number.")
    return 0
