"""``bilevel compare`` and ``bilevel tune``."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bilevel.base import describe
from bilevel.cli.fold import run_folds
from bilevel.cli.threads import chosen_threads
from bilevel.compare import (
    JUDGING,
    Comparison,
    Plan,
    RunFolder,
    compare,
    draw_figures,
    tables,
    tune_beside,
    tuning_table,
)
from bilevel.compare.cells import best_row
from bilevel.compare.ownership import FILES
from bilevel.config import choose_device, load_plan
from bilevel.config.folds import load_folds
from bilevel.core import tree
from bilevel.core.threads import short_operations

SHOWN = 12
"""Of more hyperparameters than this, only the largest and the smallest are printed."""


def run_compare(arguments: Namespace) -> int:
    """Run ``bilevel compare``."""
    return _run_command(arguments, tune=False)


def run_tune(arguments: Namespace) -> int:
    """Run ``bilevel tune``: by folds where the config names no solver, else by hypergradients of a hold-out."""
    plan = load_folds(arguments.config, arguments.set, jobs=arguments.jobs, **_shared(arguments))
    return _run_command(arguments, tune=True) if plan is None else run_folds(plan, arguments)


def _run_command(arguments: Namespace, tune: bool) -> int:
    plan, folder = _prepare(arguments, tune)
    with short_operations(chosen_threads(arguments)), folder.lock():
        result = _run(plan, folder, arguments)
        if result.interrupted:
            return _interrupted(result)
        if tune:
            tuned = {run.cell.problem: _tuned(plan, run) for run in result.runs if run.best is not None}
            folder.write_json("tuned.json", tuned)
            print("".join(f"\n{_tuned_text(problem, run)}\n" for problem, run in tuned.items()))
        else:
            print(f"\n{tables(result.summary)}\n")
            if beside := tune_beside(plan):
                folder.write_json("tuning.json", beside)
                print(f"{tuning_table(plan, beside)}\n")
        _finish(result, folder)
        return _report_failures(result, folder)


def _shared(arguments: Namespace) -> dict[str, Any]:
    """Return the options that all configs are loaded with; a device that is not there is refused first."""
    if arguments.device:
        choose_device(arguments.device)
    return {name: getattr(arguments, name) for name in ("device", "seed", "allow_import")}


def _prepare(arguments: Namespace, tune: bool) -> tuple[Plan, RunFolder]:
    """Return the checked plan and its folder, to which nothing has been written yet."""
    only = arguments.estimator if tune else None
    plan = load_plan(arguments.config, arguments.set, only=only, tune=tune, **_shared(arguments))
    default = Path("runs") / (f"{plan.name}-tune" if tune else plan.name)
    folder = RunFolder(arguments.out or default, plan.config).of(plan)
    folder.check(arguments.fresh)
    return replace(plan, debug=arguments.debug), folder


def _run(plan: Plan, folder: RunFolder, arguments: Namespace) -> Comparison:
    for name, build in plan.problems.items():
        note = build(plan.seeds[0]).note
        print(f"problem {name}: {note}" if note else f"problem {name}")
    names = ", ".join(f"{name}: {describe(estimator)}" for name, estimator in plan.estimators.items())
    print(f"inner solver {describe(plan.solver)}; {names}; on {plan.config['device']}", flush=True)
    result = compare(plan, folder, fresh=arguments.fresh, jobs=arguments.jobs, device=plan.config["device"])
    if result.found_complete:
        print("this run was complete already; --fresh runs it again.")
    return result


def _interrupted(result: Comparison) -> int:
    """Say why a run is not complete; 130 after Ctrl-C, else 1."""
    for sentence in result.kept_from:
        print(f"bilevel: {sentence}", file=sys.stderr)
    print("interrupted: run the same command to continue", file=sys.stderr)
    return 1 if result.kept_from else 130


def _finish(result: Comparison, folder: RunFolder) -> None:
    """Draw the figures and say where everything is."""
    if not draw_figures(result.runs, folder.path / "figures"):
        succeeded = any(not run.failed for run in result.runs)
        why = "they need matplotlib (pip install 'bilevel[plot]')" if succeeded else "no run succeeded"
        print(f"no figures: {why}.")
    written = sorted(path.name for path in folder.path.iterdir() if path.name in (*FILES, "figures"))
    print(f"written to {folder.path}: {', '.join(written)}")


def _report_failures(result: Comparison, folder: RunFolder) -> int:
    """Name the failed runs on stderr; the command has failed where no run succeeded."""
    failed = [run for run in result.runs if run.failed]
    for run in failed:
        print(f"failed: {run.cell}: {run.rows[-1]['message']}", file=sys.stderr)
        whole = folder.traceback_of(run.cell)
        if whole.is_file():
            print(f"the whole traceback is in {whole}; --debug raises it where it happens", file=sys.stderr)
    return 1 if len(failed) == len(result.runs) else 0


def _tuned(plan: Plan, run: Any) -> dict[str, Any]:
    """Return the tuned hyperparameters of one run with their scores, in plain containers."""
    setup = plan.problems[run.cell.problem](run.cell.seed)
    best = best_row(run.rows, not setup.problem.structure.resampled)
    assert best is not None
    scores = [key for key in best if key.startswith(JUDGING)] or ["outer_loss"]
    start = tree.Raveler(setup.hparams).ravel(setup.hparams).tolist()
    return {
        "estimator": run.cell.estimator,
        "seed": run.cell.seed,
        "choice": run.choice,
        "stopped": run.stopped,
        "first_point": "first point of the scan" if run.rows[0].get("phase") == "scan" else "untuned start",
        "best_step": best["step"],
        "unit": setup.unit,
        "labels": list(setup.labels) or [f"hyperparameter {index}" for index in range(len(start))],
        "start": start,
        "tuned": run.best,
        "scores_start": {key: run.rows[0].get(key) for key in scores},
        "scores_tuned": {key: best[key] for key in scores},
    }


def _tuned_text(problem: str, run: dict[str, Any]) -> str:
    """Return what `tune` prints about one problem."""
    before, after = run["scores_start"], run["scores_tuned"]
    scores = tabulate(
        [(key.replace("_", " "), before[key], after[key]) for key in before],
        headers=("score", run["first_point"], "tuned"),
        floatfmt=".5g",
    )
    unit, note = run["unit"], ""
    log = unit.startswith("log ")
    lines = [
        (label, start, tuned, *([math.exp(tuned)] if log else []))
        for label, start, tuned in zip(run["labels"], run["start"], run["tuned"], strict=True)
    ]
    lines.sort(key=lambda line: -line[2])
    if len(lines) > SHOWN:
        half = SHOWN // 2
        note = f"\n(the {half} largest and the {half} smallest of {len(lines)}; tuned.json holds all)"
        lines = lines[:half] + lines[-half:]
    headers = ("hyperparameter", f"{unit}, start", "tuned", *([unit.removeprefix("log ")] if log else []))
    table = tabulate(lines, headers=headers, floatfmt=".4g")
    title = f"{problem}, {run['estimator']}, seed {run['seed']}: best at step {run['best_step']}"
    choice = f"{run['choice']}\n" if run["choice"] else ""
    return f"{title}\n{choice}ended: {run['stopped']}\n\n{scores}\n\n{table}{note}"
