"""Cells that differ in the seed alone, run as one batch; a run without batches reads their checkpoints, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bilevel.compare.cells import CellRun, LoadedCell, OnRow, load_cell, run_cell, take_steps
from bilevel.compare.folder import RunFolder, RunFolderError
from bilevel.compare.plan import Cell, Plan, Setup
from bilevel.core import rows
from bilevel.core.options import first_line
from bilevel.oracles.stacking import stack
from bilevel.outer import joined
from bilevel.outer.search import OuterSearch


def groups(plan: Plan, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells in groups that run as one batch; groups of one where the plan asks for no batches."""
    result: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        # A search ends each run at a step of its own.
        batch = plan.batch and not isinstance(plan.outer.optimizer, OuterSearch | str)
        key = (cell.problem, cell.estimator) if batch else (cell.index,)
        result.setdefault(key, []).append(cell)
    return list(result.values())


def run_group(plan: Plan, cells: Sequence[Cell], folder: RunFolder, on_row: OnRow | None = None) -> list[CellRun]:
    """Run or continue cells of one problem and one estimator: as a batch where that is possible, else in turn."""
    loaded = [load_cell(folder, cell) for cell in cells]
    going = [(run, state) for run, state in loaded if not run.done]
    if len(going) > 1 and len({len(run.rows) for run, _ in going}) == 1:
        try:
            _run_together(plan, going, folder, on_row)
            return [run for run, _ in loaded]
        except RunFolderError:
            raise
        # Other shapes, a part that runs no batches, too little memory: what cannot be run together is run alone, from
        # its last checkpoint, and says there what is wrong with it.
        except Exception as error:
            if plan.debug:
                raise
            name = f"{cells[0].problem}, {cells[0].estimator}"
            tqdm.write(f"{name}: not one batch but {len(going)} runs, as {first_line(error)}")
    return [load_cell(folder, cell)[0] if folder.stopping else run_cell(plan, cell, folder, on_row) for cell in cells]


def _run_together(plan: Plan, cells: Sequence[LoadedCell], folder: RunFolder, on_row: OnRow | None) -> None:
    """Run some cells as one batch."""
    runs = [run for run, _ in cells]
    first = runs[0].cell
    # Members that run one after the other gain nothing here, and leave no warm start that a cell could go on from.
    if why := plan.estimators[first.estimator].one_by_one(plan.solver):
        raise ValueError(why)
    setups = [plan.problems[first.problem](run.cell.seed) for run in runs]
    together = Setup(stack([setup.problem for setup in setups]), rows.stack([setup.hparams for setup in setups]))
    outer = plan.outer.start(together, plan.solver, plan.estimators[first.estimator])
    if runs[0].rows:
        outer.load_state_dict(joined([state for _, state in cells if state is not None]))
    take_steps(plan, runs, outer, setups, folder, on_row)
