"""Cells that differ in the seed alone, run as one batch: the same rows, in a fraction of the time.

Each cell keeps a checkpoint of its own, which a run without batches reads as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel.base import InnerState
from bilevel.compare.cells import SAVE_EVERY, CellRun, Row, load_cell, make_row, run_cell, take_row
from bilevel.compare.folder import RunFolder, RunFolderError
from bilevel.compare.plan import Cell, Plan, Setup
from bilevel.core import rows as members
from bilevel.core.options import first_line
from bilevel.oracles.stacking import stack

OnRow = Callable[[Row], None]


def groups(plan: Plan, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells in groups that run as one batch; groups of one where the plan asks for no batches."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        key = (cell.problem, cell.estimator) if plan.batch else (cell.index,)
        found.setdefault(key, []).append(cell)
    return list(found.values())


def run_group(plan: Plan, cells: Sequence[Cell], folder: RunFolder, on_row: OnRow | None = None) -> list[CellRun]:
    """Run or continue the cells of a group, as a batch where that is possible, else one after the other.

    Args:
        plan: the comparison.
        cells: cells of one problem and one estimator.
        folder: holds their checkpoints.
        on_row: is shown every new row.

    Returns:
        The cells, ended or not.

    Raises:
        RunFolderError: where a checkpoint cannot be written; no fault of the run, which continues from the one before.
    """
    loaded = [load_cell(folder, cell) for cell in cells]
    going = [(run, state) for run, state in loaded if not run.done]
    if len(going) > 1 and len({len(run.rows) for run, _ in going}) == 1:
        try:
            _Batch(plan, going).run(folder, on_row)
            return [run for run, _ in loaded]
        except RunFolderError:
            raise
        # Other shapes, a part that runs no batches, too little memory: what cannot be run together is run alone, from
        # its last checkpoint, and says there what is wrong with it.
        except Exception as error:
            if plan.debug:
                raise
            first = going[0][0].cell
            tqdm.write(
                f"{first.problem}, {first.estimator}: not one batch but {len(going)} runs, as {first_line(error)}"
            )
    return [load_cell(folder, cell)[0] if folder.stopping else run_cell(plan, cell, folder, on_row) for cell in cells]


class _Batch:
    """Some cells that run as one batch.

    Args:
        plan: the comparison.
        cells: how far each has come, and the state of its outer loop; None at the start.
    """

    def __init__(self, plan: Plan, cells: Sequence[tuple[CellRun, dict[str, Any] | None]]) -> None:
        self.plan, self.runs = plan, [run for run, _ in cells]
        first = self.runs[0].cell
        # Members that run one after the other gain nothing here, and leave no warm start that a cell could go on from.
        if why := plan.estimators[first.estimator].one_by_one(plan.solver):
            raise ValueError(why)
        self.setups = [plan.problems[first.problem](run.cell.seed) for run in self.runs]
        hparams = members.stack([setup.hparams for setup in self.setups])
        setup = Setup(stack([setup.problem for setup in self.setups]), hparams)
        outer = plan.outer.start(setup, plan.solver, plan.estimators[first.estimator])
        assert outer.size is not None
        self.outer = outer
        states = [state for _, state in cells if state is not None]
        if states:
            outer.load_state_dict(joined(states))
        # The first step shows what only the estimator and the solver can refuse; it changes nothing yet.
        self.begun = None if states else outer.step()

    def run(self, folder: RunFolder, on_row: OnRow | None) -> None:
        """Take outer steps until every cell has ended, or until the stop file appears."""
        saved = time.monotonic()
        hparams = members.stack([setup.hparams for setup in self.setups])
        while not all(run.done for run in self.runs) and (self.begun or not folder.stopping):
            if self.begun is None:
                hparams = self.outer.hparams
            estimate, self.begun = self.begun or self.outer.step(), None
            for index, run in enumerate(self.runs):
                if run.done:
                    continue
                here, one = members.row(hparams, index), estimate[index]
                record = self.outer.history[index][-1]
                setup = self.setups[index]
                row = make_row(run, record, one, setup, self.plan.solver, here)
                row["seconds_shared_by"] = len(self.runs)
                if take_row(self.plan, run, row, setup, here, one) and on_row is not None:
                    on_row(row)
                if run.done:
                    self.outer.hold(index)
            if time.monotonic() - saved >= SAVE_EVERY:
                self._save(folder)
                saved = time.monotonic()
        self._save(folder)

    def _save(self, folder: RunFolder) -> None:
        state = self.outer.state_dict()
        for index, run in enumerate(self.runs):
            folder.save(run.cell, run.state(None) | {"outer": None if run.done else separated(state, index)})


def separated(state: dict[str, Any], index: int) -> dict[str, Any]:
    """Return one member's part of a batch's `state_dict`, as its own outer loop would have written it.

    Args:
        state: from `BatchOuterOptimizer.state_dict`.
        index: the member.
    """
    size = len(state["history"])

    def part(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size else value

    inner = state["inner_state"]
    optimizer = state["optimizer"]
    moments = {key: {name: part(value) for name, value in each.items()} for key, each in optimizer["state"].items()}
    return state | {
        "free": [leaf[index].clone() for leaf in state["free"]],
        "hparams": [leaf[index].clone() for leaf in state["hparams"]],
        "best_hparams": [leaf[index].clone() for leaf in state["best_hparams"]],
        "optimizer": optimizer | {"state": moments},
        "inner_state": None if inner is None else InnerState.from_dict(inner).row(index).to_dict(),
        "adjoint": None if state["adjoint"] is None else members.row(state["adjoint"], index),
        "history": state["history"][index],
        "best_loss": float(state["best_loss"][index]),
    }


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the batch's `state_dict` of some outer loops that have taken the same number of steps.

    Args:
        states: from `OuterOptimizer.state_dict` or `separated`.
    """
    first = states[0]
    leaves = {name: [torch.stack(rows) for rows in zip(*(s[name] for s in states), strict=True)] for name in LEAVES}
    moments = {
        key: {
            name: torch.stack([state["optimizer"]["state"][key][name] for state in states])
            if isinstance(value, Tensor) and value.shape == first["free"][key].shape and name not in COUNTERS
            else value
            for name, value in each.items()
        }
        for key, each in first["optimizer"]["state"].items()
    }
    inner = [state["inner_state"] for state in states]
    (like, *_) = first["hparams"]
    return (
        first
        | leaves
        | {
            "optimizer": first["optimizer"] | {"state": moments},
            "inner_state": None if inner[0] is None else _joined_inner(inner),
            "adjoint": None if first["adjoint"] is None else members.stack([state["adjoint"] for state in states]),
            "history": [state["history"] for state in states],
            "best_loss": torch.tensor([state["best_loss"] for state in states], dtype=like.dtype, device=like.device),
        }
    )


LEAVES = ("free", "hparams", "best_hparams")
COUNTERS = ("step", "eta", "mu", "mu_product")
"""Numbers of torch's optimizers that follow from the number of steps alone; scalar hyperparameters have their shape."""


def _joined_inner(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return InnerState.stack([InnerState.from_dict(state) for state in states]).to_dict()
