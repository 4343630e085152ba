"""``bilevel tune`` of a config without a solver, and ``bilevel predict``."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import yaml
from tabulate import tabulate

from bilevel.cli.threads import chosen_threads
from bilevel.compare import describe_environment, locked
from bilevel.compare.folder import claimed
from bilevel.config.document import ConfigError, inside
from bilevel.config.folds import FoldsPlan, TableSetup
from bilevel.core.environment import versions
from bilevel.core.files import read_json, read_mark, remove_unfinished, write_mark, write_whole
from bilevel.core.threads import short_operations
from bilevel.data.columns import listed
from bilevel.data.encodings import is_encoding
from bilevel.data.roles import target_names
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
    place = arguments.out or Path("runs") / f"{plan.name}-tune"
    folder = claimed(place, "tune", names, "this command", lambda _: ())
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
            with inside(f"{arguments.config}: "):
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
    print(f"problem {name}: {setup.rows.name}, target {listed(target_names(setup.rows.target))}")
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
        source = Path(arguments.data).expanduser()
        if output is not None and output.exists() and source.exists() and output.samefile(source):
            raise ValueError(f"--output {output} is the file of the new rows: write the predictions elsewhere.")
        model = TableModel.load(Path(arguments.model).expanduser())
        if arguments.encoding is not None and not is_encoding(arguments.encoding):
            raise ValueError(f"--encoding must name one that Python knows, such as cp1252, got {arguments.encoding!r}.")
        found = model.predict(arguments.data, arguments.encoding)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    for note in found.notes:
        print(f"{arguments.data}: {note}.", file=sys.stderr)
    if output is None:
        print(found.to_csv(), end="")
        return 0
    try:
        write_whole(output, found.to_csv())
    except OSError as error:
        where = f"--output {output}: it cannot be written ({error.strerror})"
        raise ConfigError(f"{where}; make its folder, or write the predictions elsewhere.") from None
    rows = len(next(iter(found.columns.values())))
    print(f"{rows} predictions of {listed(target_names(model.target))} written to {output}.")
    return 0


def _text(found: TunedTable, setup: TableSetup) -> str:
    """Return what is printed about a tuned model."""
    selected, options = found.selected, setup.options
    outer = {
        "nested": f"{len(selected.folds)} folds repeat all of it without their rows",
        "alo": "approximate leave-one-out of the tuning judges it",
        "none": "nothing judges it on rows that it has not seen",
    }[selected.honest]
    head = f"{found.criterion}, penalties {options.penalty}; {outer}"
    scores = [_scores(found.scores, found.loss_name)]
    for name in found.scores[0].targets:
        scores += ["", _scores([score.targets[name] for score in found.scores], f"mean squared error of {name!r}")]
    said = [textwrap.fill(each, WIDTH) for each in (selected.summary, *selected.remarks)]
    return "\n".join([head, *scores, "", *said, "", _coefficients(found)])


def _scores(scores: Sequence[Score], loss_name: str) -> str:
    """Return the scores of several models as a table."""
    kinds = {"held_out": "rows held out", "criterion": "criterion", "test": "test"}
    there = [kind for kind in kinds if any(getattr(score, kind) is not None for score in scores)]
    merits = list(scores[0].merits)
    lines = [
        [s.model, *(_figure(getattr(s, kind)) for kind in there), *(_figure(s.merits.get(m)) for m in merits)]
        for s in scores
    ]
    return tabulate(
        lines,
        headers=[loss_name, *(kinds[kind] for kind in there), *(f"{merit}, test" for merit in merits)],
        colalign=("left", *["right"] * (len(there) + len(merits))),
        disable_numparse=True,
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _coefficients(found: TunedTable) -> str:
    """Return the features of largest influence, with their penalties."""
    model, count = found.model, len(found.model.encoder.features)
    # Names and categories may hold line breaks.
    lines = [(" ".join(label.split()), *numbers) for label, *numbers in _weights(found)[:SHOWN]]
    more = (
        f"\n(the {SHOWN} largest of {model.weights.size}; tuned.json holds all)" if model.weights.size > SHOWN else ""
    )
    if not isinstance(model.target, str):
        more = f"\n(in the unit of each target; ordered by their share of the largest weight of their target){more}"
    headers = (f"feature ({count})", "weight of one deviation", "penalty")
    return tabulate(lines, headers=headers, floatfmt=".4g") + more


def _weights(found: TunedTable) -> list[tuple[str, float, float]]:
    """Return label, standardised weight and penalty of every coefficient, the largest weights of its output first."""
    model = found.model
    labels = list(model.encoder.features)
    if model.weights.ndim == 2:
        of = map("class {}".format, model.classes) if model.classes is not None else target_names(model.target)
        labels = [f"{label}, {name}" for name in of for label in labels]
    penalties = [float(value) for value in found.penalties.reshape(-1)]
    lines = list(zip(labels, model.weights.reshape(-1).tolist(), penalties, strict=True))
    size = np.abs(model.weights)
    if not isinstance(model.target, str):  # each has a unit of its own
        size = size / np.maximum(size.max(1, keepdims=True), np.finfo(float).tiny)
    return [lines[index] for index in np.argsort(-size.reshape(-1), kind="stable")]


def _record(found: TunedTable) -> dict[str, Any]:
    """Return a tuned model and what stands beside it in plain values."""
    selected = found.selected
    keys = ("tau", "value", "loss", "std_error", "gain", "gain_error", "gate", "evaluations")

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def score(each: Score) -> dict[str, Any]:
        losses = {"criterion": each.criterion, "held_out": each.held_out, "test": each.test}
        targets = {name: score(one) for name, one in each.targets.items()}
        merits = {name: plain(value) for name, value in each.merits.items()}
        return {"model": each.model} | losses | merits | ({"targets": targets} if targets else {})

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
