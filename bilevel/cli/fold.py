"""``bilevel tune`` of a config without a solver, and ``bilevel predict``."""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import yaml
from tabulate import tabulate

from bilevel.cli.threads import chosen_threads
from bilevel.compare import RunFolderError, describe_environment, locked
from bilevel.compare.environment import versions
from bilevel.compare.folder import ELSEWHERE, expanded
from bilevel.config.document import ConfigError
from bilevel.config.folds import FoldsPlan, TableSetup
from bilevel.core.files import misplaced, read_json, read_mark, remove_unfinished, write_mark, write_whole
from bilevel.core.threads import short_operations
from bilevel.tables import Score, TableModel, TunedTable, tune_rows

WIDTH = 118
SHOWN = 12
"""Of more coefficients than this, only those with the largest influence are printed."""
FILES = ("config.yaml", "environment.json", "tuned.json")
MODEL = ("model.json", "model.npz")


def run_folds(plan: FoldsPlan, arguments: Namespace) -> int:
    """Tune the problems of a config without a solver, print what was found, and write a model for each."""
    if arguments.estimator:
        raise ConfigError(f"--estimator {arguments.estimator}: the config has no `estimators`, as folds need none.")
    several = len(plan.problems) > 1
    places = {name: Path(name) if several else Path() for name in plan.problems}
    names = [*FILES, *(str(place / file) for place in places.values() for file in MODEL)]
    folder = _checked(Path(arguments.out or Path("runs") / f"{plan.name}-tune"), names)
    with short_operations(chosen_threads(arguments)), locked(folder):
        remove_unfinished(folder)
        owned = {*(read_mark(folder) or {"writes": []})["writes"], *names}
        keys = {name: _key(setup) for name, setup in plan.problems.items()}
        tuned = {} if arguments.fresh else _finished(folder, places, keys)
        done = {name: keys[name] for name in tuned}
        write_mark(folder, "tune", owned, {"finished": done})
        write_whole(folder / "config.yaml", yaml.safe_dump(dict(plan.config), sort_keys=False, allow_unicode=True))
        environment = describe_environment(str(plan.config["device"]))
        write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        for name, setup in plan.problems.items():
            if name in tuned:
                print(f"problem {name} was finished before the interruption: {folder / places[name]} holds its model.")
                continue
            tuned[name] = _tuned(name, setup, folder / places[name])
            done[name] = keys[name]
            rows = {each: tuned[each] for each in plan.problems if each in tuned}
            write_whole(folder / "tuned.json", json.dumps(rows, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
            # Of a complete run nothing is left to continue: the same command tunes all of it again.
            write_mark(folder, "tune", owned, {"finished": done} if len(done) < len(keys) else None)
    where = folder if not several else folder / next(iter(places.values()))
    print(f"written to {folder}: {', '.join(sorted(names))}")
    print(f"predict new rows: bilevel predict {where} NEW.csv")
    return 0


def _tuned(name: str, setup: TableSetup, place: Path) -> dict[str, Any]:
    """Tune a problem, print what was found, write its model, and return its record."""
    print(f"problem {name}: {setup.rows.name}, target {setup.rows.target!r}")
    print("".join(f"  {note}\n" for note in setup.rows.notes), end="", flush=True)
    try:
        found = tune_rows(name, setup.rows, setup.options, setup.loss)
    except ValueError as error:
        raise ConfigError(f"`problems.{name}`: {error}") from error
    print(f"\n{_text(found, setup)}\n", flush=True)
    found.model.save(place)
    return _record(found)


def _key(setup: TableSetup) -> str:
    """Return what a model depends on, in short: data, options, and versions of what computes."""
    return str(joblib.hash((vars(setup.rows), replace(setup.options, jobs=1), setup.loss, versions())))


def _finished(folder: Path, places: dict[str, Path], keys: dict[str, str]) -> dict[str, Any]:
    """Return the records of the problems that an interrupted command has finished: they are not tuned again."""
    done, records = (read_mark(folder) or {}).get("finished"), read_json(folder / "tuned.json")
    if not isinstance(done, dict) or not isinstance(records, dict):
        return {}
    there = [name for name in keys if all((folder / places[name] / file).is_file() for file in MODEL)]
    return {name: records[name] for name in there if done.get(name) == keys[name] and name in records}


def run_predict(arguments: Namespace) -> int:
    """Run ``bilevel predict``."""
    output = None if arguments.output is None else Path(arguments.output).expanduser()
    try:
        if output is not None and output.exists() and output.samefile(Path(arguments.data).expanduser()):
            raise ValueError(f"--output {output} is the file of the new rows: write the predictions elsewhere.")
        model = TableModel.load(Path(arguments.model).expanduser())
        found = model.predict(arguments.data)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    for note in found.notes:
        print(f"{arguments.data}: {note}.", file=sys.stderr)
    if output is None:
        print(found.to_csv(), end="")
        return 0
    write_whole(output, found.to_csv())
    rows = len(found.columns["prediction"])
    print(f"{rows} predictions of {model.target!r} written to {output}.")
    return 0


def _checked(folder: Path, names: list[str]) -> Path:
    """Return a folder that is new, or holds what an earlier run of this command wrote."""
    folder = expanded(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: {ELSEWHERE}.")
    mark = read_mark(folder)
    if mark is not None and mark["kind"] != "tune":
        what = {"run": "of a config with a solver"}.get(mark["kind"], f"of `bilevel {mark['kind']}`")
        raise RunFolderError(f"{folder} holds the results {what}: {ELSEWHERE}.")
    owned = [] if mark is None else mark["writes"]
    foreign = [name for name in names if name not in owned and os.path.lexists(folder / name)]
    if foreign:
        raise RunFolderError(f"{folder} holds {foreign[0]}, but nothing says that this command wrote it: {ELSEWHERE}.")
    if hindrance := misplaced(folder, names):
        raise RunFolderError(f"{hindrance}, where this command writes: move it away, or {ELSEWHERE}.")
    return folder


def _text(found: TunedTable, setup: TableSetup) -> str:
    """Return what is printed about a tuned model."""
    selected, options = found.selected, setup.options
    outer = {
        "nested": f"{len(selected.folds)} folds repeat all of it without their rows",
        "alo": "approximate leave-one-out of the tuning judges it",
        "none": "nothing judges it on rows that it has not seen",
    }[selected.honest]
    head = f"{found.criterion}, penalties {options.penalty}; {outer}"
    kinds = [
        name for name in ("held_out", "criterion", "test") if any(getattr(s, name) is not None for s in found.scores)
    ]
    merits = list(found.scores[0].merits)
    titles = {
        "held_out": f"{found.loss_name}, rows held out",
        "criterion": f"{found.loss_name}, criterion",
        "test": f"{found.loss_name}, test",
    }
    lines = [
        [s.model, *(_figure(getattr(s, n)) for n in kinds), *(_figure(s.merits.get(m)) for m in merits)]
        for s in found.scores
    ]
    scores = tabulate(
        lines,
        headers=["", *(titles[name] for name in kinds), *(f"{merit}, test" for merit in merits)],
        colalign=("left", *["right"] * (len(kinds) + len(merits))),
        disable_numparse=True,
    )
    said = [textwrap.fill(each, WIDTH) for each in (selected.summary, *selected.remarks)]
    return "\n".join([head, scores, "", *said, "", _coefficients(found)])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _coefficients(found: TunedTable) -> str:
    """Return the features of largest influence, with their penalties."""
    model, count = found.model, len(found.model.encoder.features)
    lines = _weights(found)[:SHOWN]
    more = (
        f"\n(the {SHOWN} largest of {model.weights.size}; tuned.json holds all)" if model.weights.size > SHOWN else ""
    )
    headers = (f"feature ({count})", "weight of one deviation", "penalty")
    return tabulate(lines, headers=headers, floatfmt=".4g") + more


def _weights(found: TunedTable) -> list[tuple[str, float, float]]:
    """Return label, standardised weight and penalty of every coefficient, the largest weights first."""
    model = found.model
    labels = list(model.encoder.features)
    if model.weights.ndim == 2 and model.classes is not None:
        labels = [f"{label}, class {name}" for name in model.classes for label in labels]
    penalties = [float(value) for value in found.penalties.reshape(-1)]
    lines = list(zip(labels, model.weights.reshape(-1).tolist(), penalties, strict=True))
    return sorted(lines, key=lambda line: -abs(line[1]))


def _record(found: TunedTable) -> dict[str, Any]:
    """Return a tuned model and what stands beside it in plain values."""
    selected = found.selected
    keys = ("tau", "value", "loss", "std_error", "gain", "gain_error", "gate", "evaluations")

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def score(each: Score) -> dict[str, Any]:
        return {"model": each.model, "criterion": each.criterion, "held_out": each.held_out, "test": each.test} | {
            name: plain(value) for name, value in each.merits.items()
        }

    return {
        "summary": selected.summary,
        "generalises": selected.open,
        "remarks": list(selected.remarks),
        "loss": found.loss_name,
        "criterion": found.criterion,
        "honest": selected.honest,
        "scores": [score(each) for each in found.scores],
        "chosen": selected.chosen,
        "nodes": [{key: plain(getattr(node, key)) for key in keys} for node in selected.nodes],
        "coefficients": [{"feature": f, "weight": w, "penalty": plain(p)} for f, w, p in _weights(found)],
        "evaluations": selected.evaluations,
        "seconds": selected.seconds,
    }
