"""Tables as people have them: each kind is made, tuned by `bilevel tune`, predicted by `bilevel predict`, and checked.

    python scripts/bench/csv_jobs.py

A line for each job: whether it ran, or was refused by the name of the column where it must be, and the largest
difference between the numbers of `bilevel predict` and those that numpy computes from model.npz, model.json and the
cells of the table. All runs are in this process.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from common import emit

from bilevel.cli import main as bilevel

Columns = Mapping[str, Sequence[Any]]
ROWS = 120
rng = np.random.default_rng(14)
X = rng.standard_normal((ROWS, 5)).round(4)
SIGNAL = X @ [1.0, -1.0, 0.5, 0.0, 0.0]
NOISY = SIGNAL + 0.5 * rng.standard_normal(ROWS)
NUMBERS = {f"x{index}": X[:, index].tolist() for index in range(5)}
PRICE = {"price": NOISY.round(4).tolist()}
CHURN = {"churn": np.where(NOISY > 0, "yes", "no").tolist()}
TOWN = [("Rome", "Oslo", "Łódź, centre")[row % 3] for row in range(ROWS)]
DAYS = [f"20{10 + row // 12}-{1 + row % 12:02d}-05" for row in range(ROWS)]


class Job(NamedTuple):
    """A table, the file that it becomes, options of its data, and the words that refuse it, if it must be."""

    columns: Columns
    file: str = "t.csv"
    options: Mapping[str, Any] = {}
    separator: str = ","
    mark: str = ""
    refused: str = ""


def hollow(values: Sequence[Any], step: int) -> list[Any]:
    """Return values of which every so many is missing."""
    return [None if row % step == 0 else value for row, value in enumerate(values)]


WIDE = {f"g{index}": rng.standard_normal(ROWS).round(4).tolist() for index in range(2 * ROWS)}
RARE = {"kind": ["odd", *CHURN["churn"][1:]]}
THREE = {"kind": [("a", "b", "c")[each] for each in np.digitize(NOISY, [-0.7, 0.7])]}
JOBS = {
    "words": Job({"town": TOWN} | NUMBERS | PRICE),
    "dates, refused by name": Job({"day": DAYS} | NUMBERS | PRICE, refused="the column 'day'"),
    "dates left out": Job({"day": DAYS} | NUMBERS | PRICE, options={"drop": ["day"]}),
    "missing cells": Job(NUMBERS | {"x0": hollow(NUMBERS["x0"], 5), "town": hollow(TOWN, 7)} | PRICE),
    "a class of one row": Job(NUMBERS | RARE),
    "constant columns": Job({"one": [1] * ROWS, "site": ["a"] * ROWS} | NUMBERS | PRICE),
    "more columns than rows": Job(WIDE | PRICE),
    "a target of 24 integers": Job(NUMBERS | {"level": np.clip(12 + 3 * NOISY, 0, 23).astype(int).tolist()}),
    "an index": Job({"": range(ROWS)} | NUMBERS | PRICE),
    "identifiers": Job({"customer_id": range(5000, 5000 + ROWS)} | NUMBERS | CHURN),
    "few of one class": Job(NUMBERS | {"fraud": (np.sort(NOISY)[-8] < NOISY).astype(int).tolist()}),
    "three classes": Job(NUMBERS | THREE),
    "a byte-order mark": Job(NUMBERS | PRICE, mark="\ufeff"),
    "semicolons": Job({"town": TOWN} | NUMBERS | PRICE, separator=";"),
    "tabs": Job(NUMBERS | CHURN, "t.tsv", separator="\t"),
    "compressed": Job(NUMBERS | PRICE, "t.csv.gz"),
    "parquet": Job(
        {"town": hollow(TOWN, 9), "old": [row % 4 == 0 for row in range(ROWS)]} | NUMBERS | PRICE, "t.parquet"
    ),
    "True and False": Job({"old": [row % 3 == 0 for row in range(ROWS)]} | NUMBERS | CHURN),
    "svmlight": Job(NUMBERS | PRICE, "t.svmlight"),
    "weights": Job({"w": [1 + row % 3 for row in range(ROWS)]} | NUMBERS | PRICE, options={"weights": "w"}),
    "split by time": Job({"day": DAYS} | NUMBERS | PRICE, options={"split": {"time": "day"}, "test": 0.25}),
    "a line of Excel": Job({"town": TOWN} | NUMBERS | PRICE, separator=";", mark="sep=;\n"),
    "bars": Job({"town": TOWN} | NUMBERS | PRICE, separator="|"),
    "True and False as a target, some missing": Job(NUMBERS | {"sold": hollow([each > 0 for each in NOISY], 9)}),
    "a title above the header, refused": Job(
        NUMBERS | PRICE, mark="Prices of 2024\n", refused="delete what stands above"
    ),
    "units, refused by name": Job({"mass": [f"{each} kg" for each in SIGNAL]} | NUMBERS | PRICE, refused="'mass'"),
    "brackets, refused by name": Job({"sum": [f"({row}.5)" for row in range(ROWS)]} | PRICE, refused="'sum'"),
    "two in a cell, refused by name": Job({"at": [f"{row}/80" for row in range(ROWS)]} | PRICE, refused="'at'"),
    "lengths of time, refused by name": Job({"took": [f"{row} days" for row in range(ROWS)]} | PRICE, refused="'took'"),
    "quarters, refused by name": Job({"q": [f"2024Q{1 + row % 4}" for row in range(ROWS)]} | PRICE, refused="'q'"),
    "rare integers, with their task": Job(
        NUMBERS | {"count": np.exp(NOISY).astype(int).tolist()}, options={"task": "regression"}
    ),
    "groups": Job({"shop": [row % 8 for row in range(ROWS)]} | NUMBERS | CHURN, options={"groups": "shop"}),
}


def write(job: Job) -> None:
    """Write the file of a job into the working folder."""
    path, names = Path(job.file), list(job.columns)
    if job.file.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        return parquet.write_table(pyarrow.table({name: list(column) for name, column in job.columns.items()}), path)
    rows = list(zip(*job.columns.values(), strict=True))
    if job.file.endswith(".svmlight"):
        lines = [" ".join([str(row[-1]), *(f"{at}:{cell}" for at, cell in enumerate(row[:-1], 1))]) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return None
    text = io.StringIO()
    writer = csv.writer(text, delimiter=job.separator)
    writer.writerow(names)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    content = (job.mark + text.getvalue()).encode()
    path.write_bytes(gzip.compress(content) if job.file.endswith(".gz") else content)
    return None


def by_numpy(job: Job) -> tuple[Any, list[Any] | None, str]:
    """Return scores z of the rows of a table by the files of its model alone, the classes, and the loss."""
    record = json.loads(Path("out/model.json").read_text())
    with np.load("out/model.npz") as arrays:
        weights, intercept, mean, scale = (arrays[name] for name in ("weights", "intercept", "mean", "scale"))
    features = []
    for index, column in enumerate(record["columns"]):
        name = list(job.columns)[index] if job.file.endswith(".svmlight") else column["name"]
        cells = [column["fill"] if cell is None else cell for cell in job.columns[name]]
        if column["categories"] is None:
            features.append([float(cell) for cell in cells])
        else:
            features += [[float(str(cell) == category) for cell in cells] for category in column["categories"]]
    return ((np.array(features).T - mean) / scale) @ weights.T + intercept, record["classes"], record["loss"]


def difference(job: Job) -> float:
    """Return the largest difference between predictions of the command and those of numpy."""
    z, classes, loss = by_numpy(job)
    found = list(csv.DictReader(Path("predicted.csv").read_text().splitlines()))
    if classes is None:
        return float(np.abs(np.array([float(row["prediction"]) for row in found]) - z).max())
    z = np.stack([np.zeros(len(z)), z], 1) if loss == "Logistic" else z
    shares = np.exp(z - z.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    said = np.array([[float(row[f"probability={label}"]) for label in classes] for row in found])
    labels = [str(classes[index]) for index in shares.argmax(1)]
    return float(np.abs(said - shares).max()) if labels == [row["prediction"] for row in found] else float("inf")


def run(name: str, job: Job) -> bool:
    """Run a job in an empty folder, and emit its line."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write(job)
        config = {"problems": {"t": {"data": {"name": job.file} | dict(job.options)}}}
        Path("job.yaml").write_text(yaml.safe_dump(config))
        said, start = io.StringIO(), time.process_time()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = bilevel(["tune", "job.yaml", "--out", "out"])
            if code == 0:
                code = bilevel(["predict", "out", job.file, "--output", "predicted.csv"])
        seconds = round(time.process_time() - start, 2)
        text = said.getvalue()
        if job.refused:
            ok = code == 2 and job.refused in text
            return emit(name, code, "refused", ok, seconds=seconds, says=text.strip().splitlines()[-1])
        if code:
            return emit(name, code, "runs", False, seconds=seconds, says=text.strip().splitlines()[-1])
        error = difference(job)
        summary = json.loads(Path("out/tuned.json").read_text())["t"]["summary"]
        return emit(name, error, "at most 1e-12", error <= 1e-12, seconds=seconds, says=summary)


def main() -> int:
    """Run all jobs and return 0 where each does what is asked of it."""
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    fine = [run(name, job) for name, job in JOBS.items()]
    emit("jobs", sum(fine), f"{len(fine)}", all(fine))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
