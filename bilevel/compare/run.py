"""The comparison: all cells, in this process or several, with a progress bar, interruptible at any moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from joblib import Parallel, delayed
from joblib.parallel import get_active_backend
from tqdm import tqdm

from bilevel.compare.cells import CellRun, LoadedCell, OnRow, Row, load_cell, run_cell, take_steps
from bilevel.compare.folder import RunFolder, RunFolderError, RunStopped
from bilevel.compare.plan import Cell, Plan, Setup
from bilevel.compare.summary import summarize
from bilevel.core import rows, threads
from bilevel.core.environment import describe_environment
from bilevel.core.files import read_json
from bilevel.core.options import first_line
from bilevel.core.tracebacks import outside, told
from bilevel.oracles.stacking import stack
from bilevel.outer import joined
from bilevel.outer.search import OuterSearch


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`: a run for each cell, in the order of the plan, and what summary.json holds.

    Where cells are left to do, the summary is empty: the same call continues. `found_complete`: there was nothing to
    do. `kept_from` says what kept runs from ending: a full memory, a file that was away, a worker that died.
    """

    runs: list[CellRun]
    summary: dict[str, Any]
    interrupted: bool
    found_complete: bool
    kept_from: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of the plan."""
        return [row for run in self.runs for row in run.rows]


def compare(
    plan: Plan, folder: RunFolder, *, fresh: bool = False, jobs: int = 1, device: str = "cpu", progress: bool = True
) -> Comparison:
    """Return the outcome of a comparison, run or continued where it stopped; results.jsonl is written in any case.

    Ctrl-C lets the running outer steps end, saves, and returns with ``interrupted=True``; a second Ctrl-C gives up
    the running steps. A run that was killed loses at most its last second. `fresh` removes what an earlier run wrote.

    Jobs are processes, through joblib (``joblib.parallel_config`` chooses another backend, such as Dask). With more
    than one, each is given its share of the threads and workers, and timings disturb each other. The device is for
    environment.json: the problems of the plan are on it already.

    Raises:
        RunFolderError: for a folder that holds another run, or that another process is writing to.
    """
    # Before anything is written, the lock included.
    folder.of(plan).check(fresh)
    with folder.lock():
        return _compare(plan, folder, fresh, jobs, device, progress)


def _compare(plan: Plan, folder: RunFolder, fresh: bool, jobs: int, device: str, progress: bool) -> Comparison:
    """Run a comparison in a folder that nobody else writes to."""
    folder.prepare(fresh)
    runs = [load_cell(folder, cell)[0] for cell in plan.cells]
    if not (found_complete := all(run.done for run in runs)):
        folder.check_versions()
    if not isinstance(read_json(folder.path / "environment.json"), dict):
        folder.write_json("environment.json", describe_environment(device, threads.current().shared_by(jobs)))
    kept_from: list[str] = []
    if not found_complete:
        try:
            with _stop_on_interrupt(folder):
                _run_all(plan, folder, runs, jobs, progress)
        except (KeyboardInterrupt, RunStopped) as error:
            # The second Ctrl-C, or dead workers: what the disk holds is whole, though up to a second old.
            runs = [load_cell(folder, cell)[0] for cell in plan.cells]
            kept_from += [str(error)] if isinstance(error, RunStopped) else []
    folder.stop_file.unlink(missing_ok=True)
    done = all(run.done for run in runs)
    kept_from += [f"{run.cell} did not end: {run.kept_from}" for run in runs if run.kept_from]
    folder.write_rows(row for run in runs for row in run.rows)
    summary = summarize(plan, runs) if done else {}
    if done:
        folder.write_json("summary.json", summary)
    return Comparison(runs, summary, not done, found_complete, tuple(kept_from))


def _run_all(plan: Plan, folder: RunFolder, runs: list[CellRun], jobs: int, progress: bool) -> None:
    """Run the cells that are not done, replacing their entries of `runs`."""
    left = [run.cell for run in runs if not run.done]
    total = plan.outer.steps * len(runs) if plan.budget is None else None
    with tqdm(total=total, unit="step", disable=not progress, desc=plan.name, dynamic_ncols=True) as bar:
        bar.update(sum(_progress(plan, run) for run in runs))
        finished = _in_turn(plan, left, folder, bar) if jobs == 1 else _side_by_side(plan, left, folder, jobs, bar)
        for run in finished:
            runs[run.cell.index] = run
            # A cell that ended early is done all the same.
            bar.update(sum(_progress(plan, each) for each in runs) - bar.n)
            folder.write_rows(row for each in runs for row in each.rows)


def _progress(plan: Plan, run: CellRun) -> int:
    return plan.outer.steps if run.done and plan.budget is None else len(run.rows)


def _in_turn(plan: Plan, cells: list[Cell], folder: RunFolder, bar: Any) -> Iterator[CellRun]:
    def on_row(row: Row) -> None:
        loss = row["outer_loss"]
        shown = row["status"] if loss is None else f"loss {loss:.4g}"
        bar.set_postfix_str(f"{row['problem']}, {row['estimator']}, seed {row['seed']}, {shown}", refresh=False)
        bar.update()

    for group in groups(plan, cells):
        if folder.stopping:
            return
        yield from run_group(plan, group, folder, on_row)


def _side_by_side(plan: Plan, cells: list[Cell], folder: RunFolder, jobs: int, bar: Any) -> Iterator[CellRun]:
    share = threads.current().shared_by(jobs)
    # Processes on this machine end with this one; how a cluster ends its workers is its own affair.
    parent = os.getpid() if type(get_active_backend()[0]).__name__ in CHILDREN else None
    tasks = (delayed(_worker)(plan, group, folder, share, parent) for group in groups(plan, cells))
    try:
        with Parallel(n_jobs=jobs, return_as="generator_unordered") as parallel:
            with _interrupts_held():
                finished = parallel(tasks)
            for runs in finished:
                for run in runs:
                    bar.set_postfix_str(str(run.cell), refresh=False)
                    yield run
    except Exception as error:
        # Where signals cannot be held, Ctrl-C ends a worker that is still starting, and its pool with it.
        if folder.stopping:
            return
        if plan.debug or isinstance(error, RunFolderError):
            raise
        raise RunStopped(outside(error) or f"the workers failed: {told(error)}") from error


CHILDREN = ("LokyBackend", "MultiprocessingBackend")


def _worker(
    plan: Plan, group: list[Cell], folder: RunFolder, share: threads.Threads, parent: int | None
) -> list[CellRun]:
    """Run a group of cells in a process of its own, which the stop file ends, not the signal that reaches all."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent is not None:
        _end_with(parent)
    if folder.stopping:
        return [load_cell(folder, cell)[0] for cell in group]
    with threads.short_operations(share):
        return run_group(plan, group, folder)


def _end_with(parent: int) -> None:
    """End this process as soon as its parent has ended, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_EVERY)
        os._exit(1)

    if f"watch {parent}" not in {thread.name for thread in threading.enumerate()}:
        threading.Thread(target=watch, name=f"watch {parent}", daemon=True).start()


WATCH_EVERY = 0.2
"""Seconds between two looks of a worker at whether its parent lives."""


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT from this thread, and for good from processes that it starts: the stop file ends those."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing.resource_tracker import ensure_running

    # It starts with the first process, and lets SIGINT through as it does.
    ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stop_on_interrupt(folder: RunFolder) -> Iterator[None]:
    """Turn the first SIGINT into the stop file; the second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        folder.stop_file.touch()
        tqdm.write("\nstopping after the running outer step ... (Ctrl-C again stops at once)")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
