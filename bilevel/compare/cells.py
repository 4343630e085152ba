"""One cell of the comparison: an outer run that writes a row for every step and can be continued bit for bit."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bilevel.base import Estimate, InnerSolver
from bilevel.compare.folder import RunFolder, RunFolderError
from bilevel.compare.plan import Cell, Plan, Setup
from bilevel.compare.referee import error_against_referee
from bilevel.core import tree
from bilevel.core.rows import row as member
from bilevel.core.status import Status
from bilevel.core.tracebacks import memory_ran_out, outside, told
from bilevel.core.tree import Tree
from bilevel.outer import OuterOptimizer, Record, separated, with_remark
from bilevel.outer.searcher import Searcher

FORMAT = 1
SAVE_EVERY = 1.0
"""Seconds between two checkpoints of a running cell."""

Row = dict[str, Any]
OnRow = Callable[[Row], None]


@dataclass
class CellRun:
    """How far a cell has come: a row of plain values for each outer step, whether and why it ended, well or not.

    `best` are the hyperparameters of `best_row`, flat, before the step that followed; `choice` says what "auto" chose
    to move them, and why. `kept_from` is what kept it from ending, such as a full memory: no result, and never saved.
    """

    cell: Cell
    rows: list[Row]
    done: bool = False
    stopped: str = ""
    best: list[float] | None = None
    choice: str = ""
    kept_from: str = ""

    @property
    def failed(self) -> bool:
        """Whether the run ends with a failure; a search that has accepted a point rejects what fails."""
        return bool(self.rows) and end_row(self.rows)["status"] not in USABLE

    def state(self, outer: dict[str, Any] | None) -> dict[str, Any]:
        """Return the checkpoint, in plain containers and tensors; `outer` is the state of the outer loop."""
        kept = {name: getattr(self, name) for name in ("rows", "done", "stopped", "best", "choice")}
        return {"format": FORMAT} | kept | {"outer": None if self.done else outer}


LoadedCell = tuple[CellRun, dict[str, Any] | None]
"""How far a cell has come, and the state of its outer loop, None at the start."""


def load_cell(folder: RunFolder, cell: Cell) -> LoadedCell:
    """Return how far a cell has come."""
    saved = folder.load(cell)
    if saved is None or saved.get("format") != FORMAT:
        return CellRun(cell, []), None
    try:
        rows, done, stopped, best = (saved[key] for key in ("rows", "done", "stopped", "best"))
        for row in rows:
            if any(row[key] != getattr(cell, key) for key in ("problem", "estimator", "seed")):
                raise KeyError(cell)
    except (KeyError, TypeError):
        what = f"the checkpoint {folder.checkpoint(cell)} is not that of {cell}"
        raise RunFolderError(f"{what}: delete it to run that part again, or start anew with --fresh.") from None
    return CellRun(cell, rows, done, stopped, best, saved.get("choice", "")), saved.get("outer")


def run_cell(plan: Plan, cell: Cell, folder: RunFolder, on_row: OnRow | None = None) -> CellRun:
    """Run or continue one cell until it ends, its last row a failure or not, or the stop file appears."""
    run, state = load_cell(folder, cell)
    if run.done:
        return run
    try:
        setup = plan.problems[cell.problem](cell.seed)
        outer = plan.outer.start(setup, plan.solver, plan.estimators[cell.estimator])
        if state is not None:
            outer.load_state_dict(state)
        run.choice = outer.choice
        take_steps(plan, [run], outer, [setup], folder, on_row)
    except RunFolderError:
        # No fault of the cell: it continues from its checkpoint once the folder can be written to.
        raise
    except Exception as error:
        if plan.debug:
            raise
        if why := outside(error):
            # No result: the cell is where its checkpoint is, and the others still run.
            return replace(load_cell(folder, cell)[0], kept_from=why)
        message = told(error)
        run.rows.append(_empty_row(run) | {"status": type(error).__name__, "message": message})
        run.done, run.stopped = True, f"failed: {message}"
        folder.save_traceback(cell, "".join(traceback.format_exception(error)))
        if on_row is not None:
            on_row(run.rows[-1])
        folder.save(cell, run.state(None))
    else:
        folder.save_traceback(cell, "")
    return run


def take_steps(
    plan: Plan,
    runs: Sequence[CellRun],
    outer: OuterOptimizer,
    setups: Sequence[Setup],
    folder: RunFolder,
    on_row: OnRow | None,
) -> None:
    """Take steps of an outer loop, whose rows the cells are, until all have ended or the stop file appears."""
    saved = time.monotonic()
    while not folder.stopping and not all(run.done for run in runs):
        estimate = outer.step()
        hparams = outer.evaluated
        searcher = None if outer.search is None else outer.search.each[0]
        for index, (run, setup) in enumerate(zip(runs, setups, strict=True)):
            if run.done:
                continue
            alone = outer.size is None
            here, one = (hparams, estimate) if alone else (member(hparams, index), estimate[index])
            row = make_row(run, outer.histories[index][-1], one, setup, plan.solver, here)
            row["seconds_shared_by"] = len(runs)
            if take_row(plan, run, row, setup, here, one, searcher) and on_row is not None:
                on_row(row)
            if run.done:
                outer.hold(index)
        if time.monotonic() - saved >= SAVE_EVERY:
            _save(runs, outer, folder)
            saved = time.monotonic()
    _save(runs, outer, folder)


def _save(runs: Sequence[CellRun], outer: OuterOptimizer, folder: RunFolder) -> None:
    state = None if all(run.done for run in runs) else outer.state_dict()
    for index, run in enumerate(runs):
        going = None if run.done or state is None else state if outer.size is None else separated(state, index)
        folder.save(run.cell, run.state(going))


def take_row(
    plan: Plan,
    run: CellRun,
    row: Row,
    setup: Setup,
    hparams: Tree,
    estimate: Estimate,
    searcher: Searcher | None = None,
) -> bool:
    """Add a row to a run, and end the run where the row says so; return whether the row is part of the run."""
    # An outer search says how it has ended: its failed evaluations are rejected trials.
    comparable = not setup.problem.structure.resampled
    if plan.budget is not None and row["gradient_equivalents_total"] > plan.budget:
        # The step that does not fit is not part of the run, so that no run uses more than the budget.
        _end_of_budget(run, row, plan, comparable, searcher)
        return False
    run.rows.append(row)
    if best_row(run.rows, comparable) is row:
        run.best = tree.Raveler(hparams).ravel(hparams).tolist()
    if searcher is None:
        run.stopped = stop_reason(plan, run.rows, comparable)
    else:
        run.stopped = searcher.end(plan.outer.steps if plan.budget is None else None)
    run.done = bool(run.stopped)
    if run.done and not run.failed:
        statuses = [] if searcher is not None else [row["status"] for row in run.rows]
        run.stopped = with_remark(run.stopped, setup.problem, estimate.params, hparams, statuses)
    return True


USABLE = {status.name for status in Status if status.usable}


def best_row(rows: Sequence[Row], comparable: bool = True) -> Row | None:
    """Return the row of the best point, or None; the last usable one where outer losses do not compare.

    That is the last one that a search has accepted; else the one with the smallest outer loss among those without a
    doubt, and where there are none among the doubtful.
    """
    if accepted := [row for row in rows if row.get("accepted")]:
        return accepted[-1]
    usable = [row for row in rows if row["status"] in USABLE]
    if not usable or not comparable:
        return usable[-1] if usable else None
    sure = [row for row in usable if row["status"] == Status.OK.name]
    return min(sure or usable, key=lambda row: row["outer_loss"])


def end_row(rows: Sequence[Row]) -> Row:
    """Return the row of the point where a run has ended: the one that a search has accepted last, else the last one."""
    return next((row for row in reversed(rows) if row.get("accepted")), rows[-1])


def _end_of_budget(run: CellRun, row: Row, plan: Plan, comparable: bool, searcher: Searcher | None) -> None:
    budget = plan.budget
    run.done, run.stopped = True, f"used the budget of {budget:g} gradient-equivalents"
    if run.rows and searcher is not None:
        run.stopped = searcher.stopped or f"{run.stopped}, not converged: {searcher.foreseen()}"
    elif run.rows:
        run.stopped = plan.outer.rules().end(run.stopped, *_columns(run.rows), comparable)
    else:
        cost = row["gradient_equivalents"]
        run.stopped = f"failed: the first step costs {cost:g} gradient-equivalents, above the budget of {budget:g}"
        run.rows.append(_empty_row(run) | {"status": "OVER_BUDGET", "message": run.stopped.removeprefix("failed: ")})


def stop_reason(plan: Plan, rows: list[Row], comparable: bool = True) -> str:
    """Return why a run with these rows ends, or an empty string; a function of the rows alone, so that it resumes."""
    last, rules, (norms, losses) = rows[-1], plan.outer.rules(), _columns(rows)
    if last["message"]:
        return f"failed: {last['message']}"
    met = rules.met(last["status"], last["error_estimate"], norms, losses)
    if not met and plan.budget is None and len(rows) >= plan.outer.steps:
        return rules.end(f"took {plan.outer.steps} steps", norms, losses, comparable)
    return met


def _columns(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Return the norm of the hypergradient and the outer loss of every row: NaN for what JSON cannot hold."""
    keys = ("hypergradient_norm", "outer_loss")
    norms, losses = ([math.nan if row[key] is None else row[key] for row in rows] for key in keys)
    return norms, losses


RECORDED = (
    *("outer_loss", "hypergradient_norm", "inner_residual", "adjoint_residual", "inner_steps", "adjoint_steps"),
    *("error_kind", "gradient_equivalents", "seconds"),
)
"""What a row takes from the record of its step as it is."""
SEARCHED = ("phase", "accepted", "predicted")
"""What a row takes besides where a search proposed the point."""


def make_row(run: CellRun, record: Record, estimate: Estimate, setup: Setup, solver: InnerSolver, hparams: Tree) -> Row:
    """Return what one outer step shows, as plain values."""
    cost, usable = estimate.cost, estimate.status.usable
    if not usable and memory_ran_out(str(estimate.verdict)):
        # No result, as where it is raised.
        raise MemoryError(str(estimate.verdict))
    error, referee = error_against_referee(setup.problem, hparams, estimate)
    empty = _empty_row(run)
    row = empty | {name: getattr(record, name) for name in RECORDED + (SEARCHED if record.phase else ())}
    row |= setup.problem.metrics(estimate.params, hparams, solver) if usable else {}
    row |= {
        "hypergradient_error": error,
        "referee": referee,
        "error_estimate": record.error,
        "counts": dict(cost.counts),
        "gradient_equivalents_total": cost.gradient_equivalents + empty["gradient_equivalents_total"],
        "seconds_total": cost.seconds + empty["seconds_total"],
        "memory_peak_bytes": cost.peak_memory,
        "memory_kind": cost.memory_kind,
        "status": estimate.status.name,
        "message": "" if usable else str(estimate.verdict),
    }
    return {key: _plain(value) for key, value in row.items()}


def _empty_row(run: CellRun) -> Row:
    """Return a row that names its cell and step and knows nothing else."""
    before = run.rows[-1] if run.rows else {"gradient_equivalents_total": 0.0, "seconds_total": 0.0}
    unknown = (
        "outer_loss hypergradient_norm hypergradient_error referee inner_residual adjoint_residual inner_steps "
        "adjoint_steps error_estimate error_kind counts gradient_equivalents"
    )
    return {
        "problem": run.cell.problem,
        "estimator": run.cell.estimator,
        "seed": run.cell.seed,
        "step": len(run.rows) + 1,
        **dict.fromkeys(unknown.split()),
        "gradient_equivalents_total": before["gradient_equivalents_total"],
        "seconds": None,
        "seconds_total": before["seconds_total"],
        "seconds_shared_by": 1,
        "memory_peak_bytes": None,
        "memory_kind": None,
        "status": "",
        "message": "",
    }


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: None in place of NaN and infinity."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
