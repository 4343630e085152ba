"""Put what the library promises to the test: numbers, configs, files, kills, and what others do meanwhile.

    python scripts/stress.py                      all of it, about half an hour
    python scripts/stress.py --kills 5 --configs 50 --only kills configs

One table: how often each was tried, caught, and lost. Exit code 1 where anything was lost. Failures are printed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from stress import folders, numbers
from stress.configs import mutated_configs
from stress.files import file_faults
from stress.kills import kill_points
from stress.workers import killed_workers
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    *("kills", "faults", "configs", "files", "peers"),
    *("units", "derivatives", "effects", "chance", "threads"),
    *("foreign", "passing", "yaml", "checkpoints", "data", "workers"),
)
Result = tuple[str, bool, str]
"""The name of what was tried, whether it was caught, and else what happened."""


def planted_faults() -> Iterator[Result]:
    """Give every problem with a planted fault to the checker."""
    sys.path.insert(0, str(ROOT / "tests"))
    from planted_faults import FAULTS

    from bilevel import check_problem

    for name, plant, words in FAULTS:
        problem, hparams, solver = plant()
        report = check_problem(problem, hparams, solver)
        missing = [word for word in words if word not in " ".join(str(report).split())]
        yield name, not report.ok and not missing, f"the report lacks {missing}:\n{report}"


def peers_failures() -> Iterator[Result]:
    """Run the tests of how other libraries fail; parametrized ones count once."""
    command = [sys.executable, "-m", "pytest", "tests/test_peers.py", "-rA", "-q", "-p", "no:cacheprovider"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    outcomes: dict[str, bool] = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) tests/test_peers\.py::(\w+)", printed, re.MULTILINE):
        outcomes[name] = outcomes.get(name, True) and outcome == "PASSED"
    for name, passed in outcomes.items():
        yield name.removeprefix("test_").replace("_", " "), passed, printed


def tried(name: str, results: Iterable[Result], total: int | None) -> tuple[str, int, int, int]:
    """Count results under a progress bar, and print those that were lost."""
    caught = lost = 0
    for what, ok, reason in tqdm(results, total=total, desc=name, disable=not sys.stderr.isatty()):
        caught, lost = caught + ok, lost + (not ok)
        if not ok:
            tqdm.write(f"LOST {name}: {what}: {reason}")
    return name, caught + lost, caught, lost


def main() -> int:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kill points (default 50)")
    parser.add_argument("--configs", type=int, default=1000, help="mutated configs (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and mutations (default 0)")
    parser.add_argument("--units", type=int, default=200, help="combinations of units and solvers (default 200)")
    parser.add_argument("--workers", type=int, default=12, help="workers and parents killed (default 12)")
    parser.add_argument("--threads", type=int, default=24, help="numbers of each problem in threads (default 24)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run these parts alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        right = sorted(ROOT.glob("configs/**/*.yaml"))
        parts: dict[str, tuple[str, Callable[[Path], Iterable[Result]], int | None]] = {
            "kills": ("kill points", partial(kill_points, arguments.kills, arguments.seed), arguments.kills),
            "faults": ("planted math faults", lambda _: planted_faults(), None),
            "configs": (
                "mutated configs",
                partial(mutated_configs, arguments.configs, arguments.seed, right),
                arguments.configs,
            ),
            "files": ("file-system faults", file_faults, None),
            "peers": ("peers' failures", lambda _: peers_failures(), None),
            "units": ("units", lambda _: numbers.units(arguments.units, arguments.seed), arguments.units),
            "derivatives": ("wrong derivatives", lambda _: numbers.derivatives(), None),
            "effects": ("side effects of losses", lambda _: numbers.effects(), None),
            "chance": ("random numbers in losses", lambda _: numbers.chance(), None),
            "threads": ("problems in 8 threads", lambda _: numbers.in_threads(arguments.threads), None),
            "foreign": ("files of others in a run's folder", folders.foreign_files, None),
            "passing": ("errors that pass", folders.passing_errors, None),
            "yaml": ("YAML that cannot be built", folders.yaml_bombs, None),
            "checkpoints": ("copied checkpoints", folders.copied_checkpoints, None),
            "data": ("changed data", folders.changed_data, None),
            "workers": (
                "killed workers and parents",
                partial(killed_workers, arguments.workers, arguments.seed),
                arguments.workers,
            ),
        }
        rows = []
        for name in arguments.only:
            title, run, total = parts[name]
            inside = place / name
            inside.mkdir()
            # What a command writes without --out lands here as well.
            os.chdir(inside)
            rows.append(tried(title, run(inside), total))
        os.chdir(ROOT)
    print(tabulate(rows, headers=("what", "tried", "caught", "lost")))
    return int(any(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
