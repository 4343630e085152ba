"""The benchmark against the peers: all problems, JSON and table.

``python scripts/bench/peers/run.py``          everything, about a quarter of an hour on two cores
``python scripts/bench/peers/run.py --quick``  smaller problems, two minutes
``python scripts/bench/peers/run.py --only p2 p3``  some problems; the results of the others are kept
``python scripts/bench/peers/run.py --only p1 --task unroll --who 'jax*' '*Gram*'``  some rows of one problem

or, by its makefile, ``make bench ARGS="--only p1 --task unroll"``.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import report
from conduct import Limits, conduct
from contest import Problem
from machine import describe, versions

MODULES = {
    "p1": "p1_ridge",
    "p1i": "p1_implicit",
    "p1b": "p1_batch",
    "p2": "p2_logistic",
    "p3": "p3_softmax",
    "p3c": "p3_cleaning",
    "p4": "p4_mlp",
    "p5": "p5_forward",
    "p6": "p6_unrolled",
    "p7": "p7_outer",
    "p8": "p8_tasks",
    "p9": "p9_stochastic",
    "p10": "p10_around",
    "growth": "growth",
}
ROOT = Path(__file__).parents[3]


def problems() -> dict[tuple[str, str], Problem]:
    """Return all problems, by the key of their module and their own."""
    loaded = {key: importlib.import_module(name).PROBLEMS for key, name in MODULES.items()}
    return {(key, problem.key): problem for key, of_module in loaded.items() for problem in of_module}


def chosen_from(keys: Sequence[str]) -> str:
    """Return what `--only` says of itself."""
    return f"the problems to run: {', '.join(dict.fromkeys(keys))}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller problems and fewer rounds: two minutes")
    keys = [*MODULES, *(problem.key for problem in problems().values())]
    parser.add_argument("--only", nargs="+", metavar="KEY", choices=keys, default=list(MODULES), help=chosen_from(keys))
    parser.add_argument("--task", nargs="+", default=["*"], help="their tasks to run; * as in file names")
    parser.add_argument("--who", nargs="+", default=["*"], help="the contestants to run; the rows of others are kept")
    parser.add_argument("--seed", type=int, default=0, help="of data and splits")
    parser.add_argument("--threads", type=int, default=1, help="cores and threads of each contestant")
    parser.add_argument("--rounds", type=int, default=None, help="most rounds (7; quick 3)")
    parser.add_argument("--seconds", type=float, default=None, help="of timing for each task (5; quick 0.5)")
    parser.add_argument("--timeout", type=float, default=None, help="seconds for one call (600; quick 60)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file, with its page beside it")
    parser.add_argument("--table", action="store_true", help="only write the table and the figures again")
    return parser.parse_args()


def main() -> int:
    """Run what was asked for; write the results after each problem, so that an interrupt loses one at most."""
    options = arguments()
    work = ROOT / "runs" / "bench"
    kept = ROOT / "scripts" / "bench" / "results" / "benchmarks.json"
    out = options.out or (work / "quick.json" if options.quick else kept)
    page = ROOT / "docs" / "benchmarks.md" if out == kept else out.with_suffix(".md")
    results = report.load(out)
    if not options.table:
        quick = options.quick
        limits = Limits(
            size="quick" if quick else "full",
            seed=options.seed,
            threads=min(options.threads, len(os.sched_getaffinity(0))),
            rounds=options.rounds or (3 if quick else 7),
            seconds=options.seconds or (0.5 if quick else 5.0),
            once=8.0,
            timeout=options.timeout or (60.0 if quick else 600.0),
            logs=work / "logs",
            tasks=options.task,
            who=options.who,
        )
        known = versions()
        for (key, own), problem in problems().items():
            if key not in options.only and own not in options.only:
                continue
            print(f"\n{problem.title}", flush=True)
            before, say = describe(limits.threads), partial(print, flush=True)
            rows = conduct(MODULES[key], problem, limits, work / "references", say=say)
            report.store(results, problem, rows, limits, before, known)
            report.save(out, results)
    order = [own for _, own in problems()]
    results["contests"] = dict(sorted(results["contests"].items(), key=lambda item: order.index(item[1]["key"])))
    report.write(out, page, results)
    print(f"\nwrote {out} and {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
