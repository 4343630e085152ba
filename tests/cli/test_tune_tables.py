"""`bilevel tune` of tables as people have them, by folds and with a guard, and `bilevel predict`."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import Frame
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.cli import main
from bilevel.data.load import load_rows
from bilevel.data.table import TableOptions
from bilevel.selection import make_folds
from bilevel.tables import TableModel, tune_rows

rng = np.random.default_rng(0)
ROWS = 48
X = rng.standard_normal((ROWS, 4)).round(3)
SIGNAL = X @ [1.0, -1.0, 0.5, 0.0]
NUMBERS = {f"x{index}": X[:, index].tolist() for index in range(4)}
PRICE = {"price": (SIGNAL + 0.3 * rng.standard_normal(ROWS)).round(3).tolist()}
SIGN = np.where(SIGNAL + 0.3 * rng.standard_normal(ROWS) > 0, "yes", "no").tolist()
COLOUR = [("red", "blue", "green")[row % 3] for row in range(ROWS)]
Columns = dict[str, Sequence[Any]]


def text(columns: Columns, separator: str = ",") -> str:
    """The table as a text file holds it."""
    rows = zip(*columns.values(), strict=True)
    return "\n".join([separator.join(columns), *(separator.join(map(str, row)) for row in rows)]) + "\n"


def hollow(values: Sequence[Any], step: int) -> list[Any]:
    """Values of which every so many is missing."""
    return ["" if row % step == 0 else value for row, value in enumerate(values)]


def wide() -> Columns:
    return {f"g{index}": rng.standard_normal(ROWS).round(3).tolist() for index in range(2 * ROWS)}


JOBS: dict[str, tuple[str, str | bytes, dict[str, Any]]] = {
    "strings": ("t.csv", text({"colour": COLOUR} | NUMBERS | PRICE), {}),
    "missing cells": ("t.csv", text(NUMBERS | {"colour": hollow(COLOUR, 7), "x0": hollow(X[:, 0], 5)} | PRICE), {}),
    "True and False": ("t.csv", text({"old": [row % 3 == 0 for row in range(ROWS)]} | NUMBERS | PRICE), {}),
    "a byte-order mark": ("t.csv", "\ufeff" + text(NUMBERS | PRICE), {}),
    "semicolons and decimal commas": ("t.csv", text(NUMBERS | PRICE, ";").replace(".", ","), {}),
    "tabs": ("t.tsv", text(NUMBERS | PRICE, "\t"), {}),
    "compressed": ("t.csv.gz", gzip.compress(text(NUMBERS | PRICE).encode()), {}),
    "an index": ("t.csv", text({"": range(ROWS)} | NUMBERS | PRICE), {}),
    "identifiers": ("t.csv", text({"CustomerId": range(900, 900 + ROWS)} | NUMBERS | {"churn": SIGN}), {}),
    "a constant column": ("t.csv", text({"site": ["a"] * ROWS, "one": [1] * ROWS} | NUMBERS | PRICE), {}),
    "a class of one row": ("t.csv", text(NUMBERS | {"kind": ["odd", *SIGN[1:]]}), {}),
    "24 levels": ("t.csv", text(NUMBERS | {"level": [row % 24 for row in range(ROWS)]}), {}),
    "more columns than rows": ("t.csv", text(wide() | PRICE), {}),
    "few of one class": ("t.csv", text(NUMBERS | {"fraud": [int(row in (4, 9, 23, 31)) for row in range(ROWS)]}), {}),
    "groups": ("t.csv", text({"site": [row % 6 for row in range(ROWS)]} | NUMBERS | PRICE), {"groups": "site"}),
    "time, weights": ("t.csv", text({"w": [1, 2, 3] * 16} | NUMBERS | PRICE), {"split": "time", "weights": "w"}),
    "a hold-out": ("t.csv", text(NUMBERS | PRICE), {}),
    "svmlight": ("t.svmlight", "".join(f"{a + b:.3f} 1:{a} 3:{b}\n" for a, b in X[:, :2]), {}),
}  # fmt: skip
"""The file's name, what it holds, and options of the data."""
SAID = {
    "strings": "the words of 'colour' become 3 features of 0 and 1",
    "missing cells": "missing values of 'x0' (10), 'colour' (7) are filled by the median or the most frequent word",
    "semicolons and decimal commas": "decimal commas are read in 'x0', 'x1', 'x2', 'x3' and 1 more",
    "an index": "the column without a name is left out, as it numbers the rows",
    "identifiers": "the column 'CustomerId' is left out, as it numbers the rows",
    "a constant column": "'site=a', 'one' are constant: no influence",
    "a class of one row": "the rows of classes with fewer than 3 rows are left out: odd (1)",
    "24 levels": "4 features, regression",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


PROBLEM = ("class", "penalty", "groups", "class_weight")


def config(source: str | dict[str, Any], **keys: Any) -> str:
    """A config of the problem `t`, and its path."""
    problem = {"data": source} | {key: keys.pop(key) for key in PROBLEM if key in keys}
    Path("job.yaml").write_text(yaml.safe_dump({"problems": {"t": problem}} | keys))
    return "job.yaml"


def write(name: str, content: str | bytes) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("job", JOBS)
def test_tables_as_people_have_them_are_tuned_and_predicted(
    here: Path, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    name, content, options = JOBS[job]
    write(name, content)
    criterion = "holdout" if job == "a hold-out" else "auto"
    assert main(["tune", config({"name": name} | options, folds=3, criterion=criterion)]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert SAID.get(job, "rows to tune on") in out
    assert "one penalty" in out
    assert "a constant" in out
    assert any(words in out for words in ("generalise", "is kept")), out
    assert main(["predict", "runs/job-tune", name]) == 0
    predicted = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(predicted) == ROWS


def test_new_rows_are_read_as_the_notes_say_and_a_place_that_is_not_there_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {'"b\nlong"' if name == "x0" else name: column for name, column in NUMBERS.items()}
    write("t.csv", text({"colour": [f'"{word}\nish"' for word in COLOUR]} | long | PRICE))
    assert main(["tune", config("t.csv", folds=3), "--out", "model"]) == 0
    out = capsys.readouterr().out
    assert "\nb long  " in out
    assert "\ncolour=red ish  " in out
    write("new.csv", text({"colour": ["red"] * ROWS, "left": COLOUR, "more": COLOUR} | long, ";").replace(".", ","))
    assert main(["predict", "model", "new.csv"]) == 0
    err = capsys.readouterr().err
    assert "new.csv: the model does not know the columns 'left', 'more': left out." in err
    assert "new.csv: decimal commas are read in 'b\\nlong', 'x1', 'x2', 'x3'." in err
    Path("folder").mkdir()
    for place, why in (("none/p.csv", "No such file or directory"), ("folder", "Is a directory")):
        assert main(["predict", "model", "t.csv", "--output", place]) == 2
        said = f"--output {place}: it cannot be written ({why}); make its folder, or write the predictions elsewhere."
        assert capsys.readouterr().err == f"bilevel: {said}\n"
    assert main(["predict", "model", "absent.csv", "--output", "t.csv"]) == 2
    assert capsys.readouterr().err == "bilevel: the data file 'absent.csv' does not exist.\n"


def test_dates_alone_are_refused_by_name_and_remedy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("t.csv", text({"signed": [f"2024-01-{1 + row % 28:02d}" for row in range(ROWS)]} | NUMBERS | PRICE))
    assert main(["tune", config("t.csv")]) == 2
    err = capsys.readouterr().err
    assert "`problems.t`: the column 'signed' of 't.csv' holds dates ('2024-01-01' in row 1)" in err
    assert "leave it out with `drop: [signed]`" in err
    assert len(err.splitlines()) == 1
    assert not Path("runs").exists()


def of_files(folder: str, features: np.ndarray) -> np.ndarray:
    """What the formula in model.json says of features, by numpy alone."""
    with np.load(f"{folder}/model.npz") as arrays:
        weights, intercept, mean, scale = (arrays[name] for name in ("weights", "intercept", "mean", "scale"))
    return ((features - mean) / scale) @ weights.T + intercept


def encoded(folder: str, rows: list[dict[str, str]]) -> np.ndarray:
    """Features of the cells of a table, by what model.json says of its columns."""
    columns = json.loads(Path(folder, "model.json").read_text())["columns"]
    features = []
    for column in columns:
        cells = [row[column["name"]] or column["fill"] for row in rows]
        if column["categories"] is None:
            features.append([float(cell) for cell in cells])
        else:
            features += [[float(cell == category) for cell in cells] for category in column["categories"]]
    return np.array(features).T


def softmax(z: np.ndarray) -> np.ndarray:
    shares = np.exp(z - z.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("target", "link"),
    [
        (PRICE, None),
        (PRICE | {"net weight": X[:, 2] + 1e3}, None),
        ({"answer": SIGN}, lambda z: np.stack([1 / (1 + np.exp(z)), 1 / (1 + np.exp(-z))], 1)),
        ({"kind": [("a", "b", "c")[int(np.digitize(s, [-0.6, 0.6]))] for s in SIGNAL]}, softmax),
    ],
    ids=["numbers", "two targets", "two classes", "three classes"],
)
def test_predictions_are_those_of_numpy_from_the_two_files(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    target: Columns,
    link: Callable[[np.ndarray], np.ndarray] | None,
) -> None:
    columns = {"colour": hollow(COLOUR, 9), "x0": hollow(X[:, 0], 8)} | {"x1": X[:, 1], "x2": X[:, 2]}
    write("t.csv", text(columns | target))
    path = config({"name": "t.csv", "test": 0.25, "target": [*target]}, folds=3, criterion="kfold", guard="off")
    assert main(["tune", path, "--out", "model"]) == 0
    # Another order of columns, one more, a new category.
    new = {"more": range(ROWS)} | dict(reversed(columns.items())) | {"colour": ["pink", *COLOUR[1:]]}
    write("new.csv", text(new, ";"))
    capsys.readouterr()
    assert main(["predict", "model/model.npz", "new.csv", "--output", "out.csv"]) == 0
    err = capsys.readouterr().err
    assert "'colour' holds 'pink', which training has not seen: zeros for all its categories" in err
    assert "the model does not know the column 'more': left out" in err
    rows = list(csv.DictReader(text(new).splitlines()))
    z = of_files("model", encoded("model", rows))
    found = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    frame = Frame({name: [None if cell == "" else cell for cell in column] for name, column in new.items()})
    names = ["prediction"] if len(target) == 1 else [f"prediction={name}" for name in target]
    said = TableModel.load("model").predict(frame).columns
    assert [[row[name] for name in names] for row in found] == [
        [str(each) for each in row] for row in zip(*(said[name] for name in names), strict=True)
    ]
    if link is None:
        numbers = np.array([[float(row[name]) for name in names] for row in found])
        np.testing.assert_allclose(numbers, z.reshape(numbers.shape), rtol=0, atol=1e-12)
        return
    record = json.loads(Path("model/model.json").read_text())
    shares = link(z)
    for index, label in enumerate(record["classes"]):
        np.testing.assert_allclose([float(row[f"probability={label}"]) for row in found], shares[:, index], atol=1e-12)
    assert [row["prediction"] for row in found] == [record["classes"][index] for index in shares.argmax(1)]


def test_the_test_loss_is_weighted_and_the_model_knows_its_separator(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("size, m2, net", "x1, m", "x2", "x3")
    table = {"w": [1 + row % 7 for row in range(ROWS)]} | dict(zip(names, NUMBERS.values(), strict=True)) | PRICE
    write("t.csv", text(table, ";"))
    data = {"name": "t.csv", "separator": ";", "weights": "w", "split": "time", "test": 0.25}
    # YAML reads a bare off as false.
    assert main(["tune", config(data, folds=2, criterion="kfold", guard=False, penalty="scalar")]) == 0
    capsys.readouterr()
    assert main(["predict", "runs/job-tune", "t.csv"]) == 0
    found = [float(row["prediction"]) for row in csv.DictReader(capsys.readouterr().out.splitlines())]
    np.testing.assert_allclose(found, of_files("runs/job-tune", X), rtol=0, atol=1e-12)
    scores = json.loads(Path("runs/job-tune/tuned.json").read_text())["t"]["scores"]
    errors, weights = (np.array(found) - PRICE["price"])[36:] ** 2, table["w"][36:]
    assert scores[0]["test"] == pytest.approx(np.average(errors, weights=weights), rel=1e-9)
    assert abs(scores[0]["test"] / errors.mean() - 1) > 1e-3
    price = np.array(PRICE["price"])[36:]
    spread = np.average((price - np.average(price, weights=weights)) ** 2, weights=weights)
    assert scores[0]["r2"] == pytest.approx(1 - np.average(errors, weights=weights) / spread, rel=1e-9)


def several(path: str) -> tuple[dict[str, Any], np.ndarray]:
    """The record of a tuned model of several targets, and the penalties of its coefficients in their order."""
    assert main(["tune", path, "--fresh"]) == 0
    record = json.loads(Path("runs/job-tune/tuned.json").read_text())["t"]
    penalties = {each["feature"]: each["penalty"] for each in record["coefficients"]}
    return record, np.array([[penalties[f"x{index}, {name}"] for index in range(4)] for name in ("a", "b")])


def test_of_several_targets_each_is_shown_and_all_count_alike(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = np.array(PRICE["price"]), 5.0 + X @ [0.0, 0.3, 0.0, 1.0] + 0.5 * X[::-1, 0]
    keys: dict[str, Any] = {"folds": 3, "penalty": "per_target", "beside": "scikit-learn"}
    data = {"name": "t.csv", "target": ["a", "b"], "split": "time", "test": 0.25}
    write("t.csv", text({"a": a} | NUMBERS | {"b": ["", *b[1:]]}))
    record, penalties = several(config(data, **keys))
    out = capsys.readouterr().out
    assert "target 'a', 'b'" in out
    assert "1 row without a target is left out" in out
    assert "each is divided by its deviation" in out
    assert "ordered by their share of the largest weight of their target" in out
    assert "mean squared error of 'b'" in out
    train, test = slice(1, 36), slice(36, None)
    standard = (X[train] - X[train].mean(0)) / X[train].std(0)
    model = TableModel.load("runs/job-tune")
    z = of_files("runs/job-tune", X)
    scores = {score["model"]: score for score in record["scores"]}
    assert len(scores) == 4
    tuned, _, constant, sklearn = scores.values()
    ratios, errors = [], np.zeros(2)
    whole = np.stack([a, b], 1)[train]
    for fit, held in make_folds(35, 3, ordered=True):
        pipeline = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 5, 100)))
        predicted = pipeline.fit(X[train][fit], whole[fit] / whole.std(0)).predict(X[train][held]) * whole.std(0)
        errors += ((predicted - whole[held]) ** 2).sum(0) / 35
    for index, (name, y) in enumerate({"a": a, "b": b}.items()):
        # Ridge regression does not know the unit of a target, nor that there are others.
        fitted = Ridge(penalties[index, 0]).fit(standard, y[train])
        np.testing.assert_allclose(model.weights[index], fitted.coef_, rtol=1e-6)
        error = np.mean((z[test, index] - y[test]) ** 2)
        assert tuned["targets"][name]["test"] == pytest.approx(error, rel=1e-9)
        ratios.append(error / y[train].var())
        assert constant["targets"][name]["test"] == pytest.approx(np.mean((y[train].mean() - y[test]) ** 2), rel=1e-9)
        assert tuned["targets"][name]["r2"] == pytest.approx(1 - error / y[test].var(), rel=1e-9)
        assert sklearn["targets"][name]["held_out"] == pytest.approx(errors[index], rel=1e-9)
        assert f"{tuned['targets'][name]['held_out']:.5g}" in out
    assert tuned["test"] == pytest.approx(np.mean(ratios), rel=1e-9)
    for kind in ("held_out", "criterion"):
        parts = [tuned["targets"][name][kind] / y[train].var() for name, y in (("a", a), ("b", b))]
        assert tuned[kind] == pytest.approx(np.mean(parts), rel=1e-9)
    # Another unit of one target changes no decision, and a file of arrays holds the same.
    write("t.csv", text({"a": a} | NUMBERS | {"b": ["", *1e4 * b[1:]]}))
    other, scaled = several(config(data, **keys))
    np.testing.assert_allclose(scaled, penalties, rtol=1e-6)
    assert other["scores"][0]["held_out"] == pytest.approx(tuned["held_out"], rel=1e-9)
    np.savez("t.npz", X=X[train], y=np.stack([a, b], 1)[train])
    assert main(["tune", config({"name": "t.npz", "split": "time"}, **keys), "--out", "runs/arrays"]) == 0
    np.testing.assert_allclose(TableModel.load("runs/arrays").weights, model.weights, rtol=1e-6)
    assert TableModel.load("runs/arrays").target == ("y0", "y1")


def test_columns_of_sparse_files_are_left_as_they_are_unless_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = svmlight(X * [1.0, 10.0, 100.0, 1.0], 1).splitlines()
    write("t.svm", "".join(f"{target:.3f}{line[1:]}\n" for target, line in zip(SIGNAL, lines, strict=True)))
    scales = []
    for given, said in (({}, True), ({"standardize": True}, False), ({"standardize": False}, False)):
        assert main(["tune", config({"name": "t.svm"} | given, penalty="scalar", folds=3)]) == 0
        assert ("columns of sparse inputs are left as they are" in capsys.readouterr().out) == said
        scales.append(TableModel.load("runs/job-tune").scale)
    np.testing.assert_array_equal(scales[0], np.ones(4))
    np.testing.assert_array_equal(scales[2], np.ones(4))
    np.testing.assert_allclose(scales[1], (X * [1.0, 10.0, 100.0, 1.0]).std(0))


def svmlight(features: np.ndarray, first: int) -> str:
    """Rows with the target 0 and without zeros."""
    rows = ([f"{at}:{cell}" for at, cell in enumerate(row, first) if cell] for row in features)
    return "".join(f"{' '.join(['0', *row])}\n" for row in rows)


@pytest.mark.parametrize("first", [0, 1])
def test_sparse_columns_are_those_of_training_whichever_the_new_rows_use(
    here: Path, capsys: pytest.CaptureFixture[str], first: int
) -> None:
    lines = svmlight(X, first).splitlines()
    write("t.svm", "".join(f"{target:.3f}{line[1:]}\n" for target, line in zip(SIGNAL, lines, strict=True)))
    assert main(["tune", config("t.svm", penalty="scalar", folds=3)]) == 0
    model = TableModel.load("runs/job-tune")
    assert model.zero_based is (first == 0)
    for used in ([0, 1, 2, 3], [1, 2], [3], []):
        new = np.where(np.isin(np.arange(4), used), X[:5], 0.0)
        write("new.svm", svmlight(new, first))
        dense = model.predict(Frame({name: new[:, index] for index, name in enumerate(model.encoder.features)}))
        found = model.predict("new.svm")
        np.testing.assert_allclose(found.columns["prediction"], of_files("runs/job-tune", new), atol=1e-12)
        np.testing.assert_allclose(found.columns["prediction"], dense.columns["prediction"], atol=1e-12)
        assert not found.notes
    capsys.readouterr()
    write("new.svm", f"0 {first + 4}:1\n")
    assert main(["predict", "runs/job-tune", "new.svm"]) == 2
    assert f"the 4 features of the model: it has 5, the first of which is column {first}" in capsys.readouterr().err
    if first:
        write("new.svm", "0 0:1\n")
        assert main(["predict", "runs/job-tune", "new.svm"]) == 2
        assert "'new.svm' has a column 0, but 1 is the first of the model" in capsys.readouterr().err


def test_where_training_was_no_sparse_file_the_first_column_of_new_rows_is_named(here: Path) -> None:
    write("t.csv", text(NUMBERS | PRICE))
    assert main(["tune", config("t.csv", penalty="scalar", folds=3)]) == 0
    model = TableModel.load("runs/job-tune")
    write("new.svm", "0 1:1\n")
    found = model.predict("new.svm")
    np.testing.assert_allclose(found.columns["prediction"], of_files("runs/job-tune", np.eye(4)[:1]))
    assert "no row has a column 0: 1 is taken for the first" in found.notes[0]
    for content in ("0 0:1\n", "0 1:1 4:0.5\n"):
        write("new.svm", content)
        assert not model.predict("new.svm").notes


def test_new_rows_that_do_not_fit_are_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("t.csv", text({"colour": COLOUR} | NUMBERS | PRICE))
    assert main(["tune", config("t.csv", penalty="scalar", folds=3)]) == 0
    capsys.readouterr()
    bad = {
        "": "holds no data: it needs a header row and rows below it",
        "colour,x0,x1,x2,x3\n": "holds no data: it needs a header row and rows below it",
        "colour,x0,x1,x2\nred,1,2,3\n": "'new.csv' lacks the column 'x3' that the model was made with: add it",
        "colour,x0,x1,x2,x3\nred,1,2,3,four\n": "the column 'x3' of 'new.csv' holds 'four' in row 1, but numbers where",
        "colour,x0,x1,x2,x3\nred,1,2,3\n": "row 1 of 'new.csv' has 4 cells, but the header has 5",
    }
    for content, sentence in bad.items():
        write("new.csv", content)
        assert main(["predict", "runs/job-tune", "new.csv", "--output", "out.csv"]) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert len(err.splitlines()) == 1
    assert main(["predict", "runs/job-tune", "no.csv"]) == 2
    assert "the data file 'no.csv' does not exist" in capsys.readouterr().err
    assert main(["predict", "runs/job-tun", "t.csv"]) == 2
    assert capsys.readouterr().err.endswith(
        "is no model: name the folder with model.npz and model.json, or one of both: did you mean `runs/job-tune`?\n"
    )
    assert main(["predict", ".", "t.csv"]) == 2
    assert "holds no model.json that bilevel wrote" in capsys.readouterr().err
    assert main(["predict", "runs/job-tune", "t.csv", "--output", "t.csv"]) == 2
    assert "write the predictions elsewhere" in capsys.readouterr().err
    assert not Path("out.csv").exists()
    Path("runs/job-tune/model.npz").write_bytes(b"no archive")
    assert main(["predict", "runs/job-tune", "t.csv"]) == 2
    assert "the model in runs/job-tune cannot be read" in capsys.readouterr().err


def test_tuning_says_what_it_gains_over_one_penalty_and_a_constant(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config({"name": "diabetes", "test": 0.25}, beside="scikit-learn", penalty="per_feature")
    assert main(["tune", path]) == 0
    out = capsys.readouterr().out
    assert "exact leave-one-out, penalties per_feature; 5 folds repeat all of it without their rows" in out
    record = json.loads(Path("runs/job-tune/tuned.json").read_text())["t"]
    assert record["summary"] in " ".join(out.split())
    scores = {score["model"]: score for score in record["scores"]}
    assert list(scores) == [
        *("one penalty (the model)", "10 tuned penalties, not kept", "a constant", "scikit-learn's RidgeCV"),
    ]
    model, tuned, constant, sklearn = scores.values()
    # All three find about the same here, and so does scikit-learn; a constant has the variance of the target.
    assert max(abs(each["held_out"] / model["held_out"] - 1) for each in (tuned, sklearn)) < 0.02
    assert constant["r2"] <= 0 < 0.3 < min(model["r2"], tuned["r2"], sklearn["r2"])
    assert f"{model['held_out']:.5g}" in out
    # The test loss is that of the files, on rows that they have not seen.
    rows = load_rows("diabetes", TableOptions(), task="regression", test=0.25)
    z = of_files("runs/job-tune", rows.X_test)
    assert np.mean((z - rows.y_test) ** 2) == pytest.approx(model["test"], rel=1e-9)
    fitted = Ridge(record["coefficients"][0]["penalty"]).fit((rows.X - rows.X.mean(0)) / rows.X.std(0), rows.y)
    np.testing.assert_allclose(TableModel.load("runs/job-tune").weights, fitted.coef_, rtol=1e-6)

    # Again, and by another command, in the same folder.
    assert main(["tune", path]) == 0
    assert main(["compare", path]) == 2
    assert "is a config of `bilevel tune`" in capsys.readouterr().err
    Path("runs/other").mkdir()
    Path("runs/other/model.npz").write_text("mine")
    assert main(["tune", path, "--out", "runs/other"]) == 2
    assert "holds model.npz, but nothing says that this command wrote it" in capsys.readouterr().err


def weights_of(path: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """The weights of a tuned model, and what stood on the screen."""
    assert main(["tune", path, "--out", "runs/here"]) == 0
    return TableModel.load("runs/here").weights, capsys.readouterr().out


def test_weights_of_classes_are_weights_of_their_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = NUMBERS | {"y": SIGN}
    write("t.csv", text(rows))
    write("w.csv", text(rows | {"w": [3 if sign == "yes" else 1 for sign in SIGN]}))
    keys: dict[str, Any] = {"penalty": "scalar"}
    named, out = weights_of(config("t.csv", class_weight={"yes": 3}, **keys), capsys)
    by_row, other = weights_of(config({"name": "w.csv", "weights": "w"}, **keys), capsys)
    np.testing.assert_allclose(named, by_row, rtol=1e-9)
    assert out[out.index("one penalty") :] == other[other.index("one penalty") :]
    count = {sign: SIGN.count(sign) for sign in ("yes", "no")}
    balanced, out = weights_of(config({"name": "t.csv", "test": 0.25}, class_weight="balanced", **keys), capsys)
    assert "accuracy, test" in out
    alike, _ = weights_of(config("t.csv", class_weight={key: 1 / each for key, each in count.items()}, **keys), capsys)
    assert np.sign(balanced).tolist() == np.sign(alike).tolist()


def test_columns_of_a_group_share_a_penalty_and_the_line_of_the_outer_loop_ends(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("t.csv", text({"colour": COLOUR} | NUMBERS | PRICE))
    path = config("t.csv", penalty="group", groups={"paint": ["colour", "x3"], "rest": ["x0", "x1", "x2"]}, guard="off")
    assert main(["tune", path]) == 0
    found = [each["penalty"] for each in json.loads(Path("runs/job-tune/tuned.json").read_text())["t"]["coefficients"]]
    assert len(set(found)) == 2
    capsys.readouterr()
    assert main(["tune", config("t.csv", penalty="feature")]) == 0
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("outer loop: 100%"), last


@pytest.mark.parametrize(
    ("problem", "keys", "sentence"),
    [
        ({"data": "diabetes", "class_weight": "balanced"}, {}, "`class_weight` is for classes, and 'y' holds numbers"),
        ({"data": "iris", "class_weight": {"x": 2}}, {}, "`class_weight` names 'x', but the classes are '0', '1', '2'"),
        ({"data": "iris", "class_weight": 2}, {}, "`problems.t.class_weight` must be 'balanced' or positive numbers"),
        ({"data": "iris", "groups": ["a"]}, {}, "`problems.t.groups` must be lists of columns by the names of groups"),
        ({"data": "iris", "penalty": "group"}, {}, "job.yaml: `problems.t`: `penalty` 'group' needs `groups`"),
        ({"data": "diabetes"}, {"folds": 500}, "`folds` must be from 2 to 442, the number of rows, got 500."),
        ({"data": "iris"}, {"seeds": [0, 1]}, "job.yaml: `seeds` must be a list of one value, got [0, 1]."),
        ({"data": "t.csv", "groups": {"a": ["x0"]}}, {}, "`penalty` 'per_feature' takes no `groups`: say 'group'"),
        (
            {"data": "t.csv", "penalty": "group", "groups": {"a": ["x0", "size"]}},
            {},
            "`groups.a` names the column 'size', which is none that becomes a feature",
        ),
        (
            {"data": "t.csv", "penalty": "group", "groups": {"a": ["x0"], "b": ["x0"]}},
            {},
            "`groups.b` names the column 'x0', which is in 'a', too",
        ),
        (
            {"data": "t.csv", "penalty": "group", "groups": {"a": ["x0"]}},
            {},
            "`groups` must name every column once, but no group has 'x1', 'x2', 'x3', 'one' and 1 more",
        ),
        (
            {"class": "MLPProblem", "data": "iris"},
            {},
            ": name a `solver` and `estimators`, which do it",
        ),
        ({"class": "LassoProblem", "data": "diabetes"}, {}, "is LassoProblem, which no folds tune (RidgeProblem, "),
        ({"class": "SampleWeightProblem", "data": "iris"}, {}, "is SampleWeightProblem, which no folds tune ("),
        ({"class": "RidgeProblem", "data": "iris", "width": 1.0}, {}, "`problems.t.width` is not an option of Ridge"),
        ({"data": "iris", "penalty": "each"}, {}, "job.yaml: `problems.t.penalty` must be 'scalar' or 'per_feature'"),
        ({"data": "iris"}, {"criterion": "kfld"}, "or 'holdout', got 'kfld': did you mean `kfold`?"),
        ({"data": {"name": "t.csv", "target": "onee"}}, {}, "one, late, y: did you mean `one`?"),
        ({"data": "iris", "penalty": "per_featur"}, {}, "got 'per_featur': did you mean `per_feature`?"),
        (
            {"data": {"name": "iris", "standardize": 2}},
            {},
            "job.yaml: `problems.t.data.standardize` must be 'auto', true or false, got 2.",
        ),
        ({"class": "RidgeProblem", "data": "diabetes", "start": 0.0}, {}, "`problems.t.start` is not an option where"),
        ({"class": "RidgeProblem", "data": "diabetes", "penalty": "per_class"}, {}, "is for more than two classes"),
        ({"class": "LogisticProblem", "data": "iris"}, {}, "LogisticProblem takes two, SoftmaxProblem any number"),
        (
            {"data": {"name": "iris", "corrupted": 0.1}},
            {},
            "`problems.t.data.corrupted` is not an option of a data set",
        ),
        ({"data": "iris"}, {"gaurd": "off"}, "`gaurd` is not a key of the config (name, problems, criterion, guard,"),
        ({"data": "iris"}, {"guard": "on"}, "`guard` must be 'auto', 'best', 'one_se' or 'off', got 'on'"),
        (
            {"data": {"name": "t.csv", "split": "time"}},
            {"folds": 2},
            "no row of the class 'no', as folds are blocks of",
        ),
        (
            {"data": {"name": "t.csv", "groups": "late"}},
            {},
            "no row of the class 'no', as folds are whole groups: name",
        ),
        (
            {"data": {"name": "t.csv", "target": ["x0", "y"]}},
            {},
            "the target 'y' of 't.csv' holds words",
        ),
        (
            {"data": {"name": "t.csv", "target": ["x0", "x0"]}},
            {},
            "`target` must name one column, or several",
        ),
        (
            {"data": {"name": "t.csv", "target": ["x0", "z"]}},
            {},
            "'t.csv' has no target column 'z': its columns",
        ),
        (
            {"data": {"name": "t.csv", "target": []}},
            {},
            "`problems.t.data.target` must be a column, or a",
        ),
        ({"data": {"name": "t.csv", "target": ["x0", 1]}}, {}, "must be a column, or a list of columns, got ['x0', 1]"),
        ({"data": {"name": "t.csv", "target": ["x0", "one"]}}, {}, "the target 'one' of 't.csv' is 1 in every row"),
        (
            {"data": "two.npz", "class": "SoftmaxProblem"},
            {},
            "'two.npz' has 2 targets, which are a regression",
        ),
        ({"data": "two.npz", "class": "HuberProblem"}, {}, "has 2 targets, which `class: RidgeProblem` alone takes"),
        ({"data": "two.npz", "class_weight": "balanced"}, {}, "is for classes, and 'y0', 'y1' holds numbers"),
        ({"data": "diabetes", "penalty": "per_target"}, {}, "'per_target' is for several targets: use 'scalar'"),
        ({"data": "two.npz", "penalty": "class"}, {}, "'per_class' is for more than two classes: use 'scalar'"),
        ({"data": {"name": "iris", "standardize": "no"}}, {}, "`problems.t.data.standardize` must be 'auto', true or"),
        ({"data": "one.csv"}, {}, "tuning by folds needs at least 2 rows, got 1"),
        *(
            ({"data": "t.csv", "penatly": "scalar"} | kind, {}, "class_weight): did you mean `penalty`?")
            for kind in ({}, {"class": "RidgeProblem"})
        ),
        ({"data": "t.csv", "start": 1}, {}, "`problems.t.start` is not an option of a problem without a class"),
        ({"data": "iris"}, {"criterion": "loo"}, "'loo' is "),
    ],
)
def test_a_wrong_config_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], problem: dict[str, Any], keys: dict[str, Any], sentence: str
) -> None:
    late = [int(row >= ROWS // 2) for row in range(ROWS)]
    write("t.csv", text(NUMBERS | {"one": [1] * ROWS, "late": late, "y": [("no", "yes")[each] for each in late]}))
    write("one.csv", text({"x0": [1.5], "y": [2.5]}))
    np.savez("two.npz", X=X, y=X[:, :2])
    Path("job.yaml").write_text(yaml.safe_dump({"problems": {"t": problem}} | keys))
    assert main(["tune", "job.yaml"]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_new_rows_are_read_in_the_encoding_of_training_or_as_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = text({"town": [("Köln", "Łódź", "Bonn")[row % 3] for row in range(ROWS)]} | NUMBERS | PRICE)
    write("t.csv", table.encode("cp1250"))
    assert main(["tune", config({"name": "t.csv", "encoding": "cp1250"}, penalty="scalar", guard="off")]) == 0
    assert "it is read in CP1250" in capsys.readouterr().out
    write("new.csv", table)
    found = []
    for options in (["t.csv"], ["new.csv"], ["t.csv", "--encoding", "cp1250"]):
        assert main(["predict", "runs/job-tune", *options]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] == found[2]
    assert main(["predict", "runs/job-tune", "new.csv", "--encoding", "utf9"]) == 2
    assert "--encoding must name one that Python knows, such as cp1252, got 'utf9'" in capsys.readouterr().err


def test_an_interrupted_command_goes_on_with_the_first_problem_that_is_not_finished(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("t.csv", text(NUMBERS | PRICE))
    problems = {name: {"data": "t.csv", "penalty": "scalar"} for name in ("a", "b", "c")}
    Path("job.yaml").write_text(yaml.safe_dump({"problems": problems, "folds": 2}))
    tuned: list[str] = []
    stop = {"b"}

    def tune(name: str, *options: Any) -> Any:
        if name in stop:
            raise KeyboardInterrupt
        tuned.append(name)
        return tune_rows(name, *options)

    monkeypatch.setattr("bilevel.cli.fold.tune_rows", tune)
    assert main(["tune", "job.yaml"]) == 130
    assert "interrupted: run the same command again" in capsys.readouterr().err
    stop.clear()
    assert main(["tune", "job.yaml", "--jobs", "2"]) == 0
    assert tuned == ["a", "b", "c"]
    assert "problem a was finished before the interruption: runs/job-tune/a holds its model" in capsys.readouterr().out
    assert list(json.loads(Path("runs/job-tune/tuned.json").read_text())) == ["a", "b", "c"]
    # A complete run is run again; and so is a problem whose data have changed, and every one by --fresh.
    stop.add("c")
    assert main(["tune", "job.yaml"]) == 130
    assert tuned[3:] == ["a", "b"]
    write("t.csv", text(NUMBERS | PRICE | {"more": SIGNAL.tolist()}))
    assert main(["tune", "job.yaml"]) == 130
    assert tuned[5:] == ["a", "b"]
    assert main(["tune", "job.yaml", "--fresh"]) == 130
    assert tuned[7:] == ["a", "b"]
