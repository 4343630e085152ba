"""Data files: what is read how, and one sentence for every file that cannot work."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import numbered, write_npz

from bilevel import BilevelWarning
from bilevel.data import load


def write_csv(folder: Path, text: str) -> str:
    path = folder / "table.csv"
    path.write_text(text)
    return str(path)


def test_csv_with_string_labels(tmp_path):
    lines = [f'{row},{row % 7},"{"yes" if row % 3 else "no, never"}"' for row in range(30)]
    data = load(write_csv(tmp_path, "\n".join(["size,week,answer", *lines])), standardize=False)
    assert data.task == "classification"
    assert data.feature_names == ("size", "week")
    assert "2 classes (no, never, yes)" in data.note
    assert torch.equal(data.y_train, (data.X_train[:, 0] % 3 != 0).long())
    assert len(data.X_test) == 8


def test_csv_target_is_chosen_by_name(tmp_path):
    lines = [f"{row},{row * 0.5},{row % 5}" for row in range(30)]
    path = write_csv(tmp_path, "\n".join(["number, half ,class", *lines]) + "\n\n")
    assert load(path, task="classification").task == "classification"
    data = load(path, target="half", standardize=False)
    assert (data.task, data.feature_names) == ("regression", ("number", "class"))
    assert torch.equal(data.y_val, data.X_val[:, 0] * 0.5)


@pytest.mark.parametrize(
    ("y", "task"),
    [
        (np.arange(120) % 3, "classification"),
        (np.arange(120) % 2 == 0, "classification"),
        (np.array(["a", "b"])[np.arange(120) % 2], "classification"),
        (np.arange(120) % 20, "classification"),
        (np.arange(120) % 21, "regression"),
        ((np.arange(120) % 3).astype(float), "regression"),
    ],
    ids=["integers", "booleans", "strings", "20 integers", "21 integers", "floats"],
)
def test_the_rule_for_the_task(tmp_path, y, task):
    X, _ = numbered(120)
    either = y.dtype.kind == "i" and task == "classification"
    text = r"the \d+ different integers of the target of .* are taken for class labels: say task='classification', or"
    seen = pytest.warns(BilevelWarning, match=text) if either else nullcontext()
    with seen:
        data = load(write_npz(tmp_path, X=X, y=y))
    assert data.task == task
    assert data.y_train.dtype == (torch.int64 if task == "classification" else torch.float64)
    csv = "\n".join(["a,y", *(f"{row},{str(value).lower()}" for row, value in enumerate(y.tolist()))])
    with seen:
        assert load(write_csv(tmp_path, csv)).task == task


COUNTS = np.array([1, 2, 3, 4, 5, 24])


@pytest.mark.parametrize("form", ["csv", "npz"])
@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint8])
def test_a_regression_target_of_few_integers_stays_what_it_is_and_is_centred(tmp_path, form, dtype):
    X, _ = numbered(60)
    y = COUNTS[np.arange(60) % 6].astype(dtype)
    table = "\n".join(["a,y", *(f"{row},{value}" for row, value in enumerate(y))])
    path = write_csv(tmp_path, table) if form == "csv" else write_npz(tmp_path, X=X, y=y[:, None])
    data = load(path, task="regression")
    raw = load(path, task="regression", standardize=False)
    assert data.task == "regression"
    assert set(raw.y_train.tolist()) <= set(COUNTS.astype(float))
    torch.testing.assert_close(data.y_val, raw.y_val - raw.y_train.mean())


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_a_raw_target_is_left_alone(tmp_path, dtype):
    X, _ = numbered(60)
    path = write_npz(tmp_path, X=X, y=COUNTS[np.arange(60) % 6].astype(dtype))
    data = load(path, task="raw")
    assert data.y_train.dtype == (torch.int64 if dtype is np.int64 else torch.float64)
    assert set(data.y_train.tolist()) == set(COUNTS.tolist())
    assert "3 features, y as it came; X standardized with training statistics" in data.note
    with pytest.raises(
        ValueError, match=r"holds strings \('a'\), but the task is 'raw': encode them as numbers, or take"
    ):
        load(write_npz(tmp_path, X=X, y=np.array(["a", "b"])[np.arange(60) % 2]), task="raw")


def test_labels_may_be_whole_numbers_of_any_type_and_number(tmp_path):
    X, _ = numbered(240)
    for y in (np.arange(240) % 24, (np.arange(240) % 24).astype(float), np.array([b"x", b"y"])[np.arange(240) % 2]):
        data = load(write_npz(tmp_path, X=X, y=y), task="classification")
        assert data.y_train.unique().tolist() == list(range(len(np.unique(y))))
    with pytest.raises(ValueError, match=r"holds 0\.5, which is no class label: a regression target\?"):
        load(write_npz(tmp_path, X=X, y=np.arange(240) / 2), task="classification")
    with pytest.raises(ValueError, match=r"needs a row of every class, 240 in all \(or is it a regression target\?\)"):
        load(write_npz(tmp_path, X=X, y=np.arange(240)), task="classification")


def test_the_index_that_pandas_writes_is_left_out(tmp_path):
    rows = [(41 * row % 50, row % 7, row * 0.5) for row in range(50)]
    for name in ("", "Unnamed: 0", "Unnamed: 0.1"):
        table = "\n".join([f"{name},a,y", *(",".join(map(str, row)) for row in rows)])
        data = load(write_csv(tmp_path, table), task="regression")
        assert data.feature_names == ("a",)
        assert f"the column {repr(name) if name else 'without a name'} is left out, as it numbers the rows" in data.note
    table = "\n".join([",a,y", *(f"{row % 5},{row % 7},{row * 0.5}" for row in range(50))])
    assert load(write_csv(tmp_path, table), task="regression").feature_names == ("", "a")
    with pytest.raises(ValueError, match="holds no features besides the target 'y' and the index of its rows"):
        load(write_csv(tmp_path, "\n".join([",y", *(f"{row},{row * 0.5}" for row in range(50))])))


def test_labels_become_sorted_indices(tmp_path):
    X, _ = numbered()
    data = load(write_npz(tmp_path, X=X, y=np.array([7, -2])[np.arange(40) % 2]), standardize=False)
    assert torch.equal(data.y_train, 1 - data.X_train[:, 0].long() % 2)


@pytest.mark.parametrize("tested", [True, False])
def test_given_splits_are_kept(tmp_path, tested):
    X, y = numbered(30)
    pieces = {"train": slice(0, 12), "val": slice(12, 20)} | ({"test": slice(20, 30)} if tested else {})
    arrays = {f"{key}_{part}": a[at] for part, at in pieces.items() for key, a in (("X", X), ("y", y))}
    data = load(write_npz(tmp_path, **arrays), standardize=False)
    assert set(data.splits()) == set(arrays)
    assert all(np.array_equal(data.splits()[key].numpy(), value) for key, value in arrays.items())
    assert "split as in the file" in data.note
    scaled = load(write_npz(tmp_path, **arrays))
    np.testing.assert_allclose(scaled.X_val[:, 0], (X[12:20, 0] - 5.5) / X[:12, 0].std())


def test_arrays_of_any_number_type_are_read(tmp_path):
    X, y = numbered()
    for kind in (">f8", "f4", "i2"):
        data = load(write_npz(tmp_path, X=X.astype(kind), y=y.astype(">f8")), standardize=False)
        assert data.X_train.dtype == torch.float64
        assert data.X_train[:, 0].sum() == X[:, 0][data.X_train[:, 0].long()].sum()


# One sentence for what cannot work -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.npz", "missing.csv", "~/nowhere/missing.CSV"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"the data file '{name}' does not exist"):
        load(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no data: it needs a header row and rows below it"),
        ("a,y\n", "holds no data: it needs a header row and rows below it"),
        (
            "a y\n1 2\n",
            "has the one column 'a y': it needs features and a target, with commas, semicolons",
        ),
        ("1.5,2\n3,4\n5,6\n", "has no header row: its first row is 1.5, 2"),
        ("a,a,y\n1,2,3\n", "has two columns of the name 'a': rename one of them"),
        ("a,b,y\n1,2,3\n1,2\n", "row 2 of .* has 2 cells, but the header has 3"),
        ("# by me\na,b,y\n1,2,3\n", "the header has 1: correct or delete the row, or delete what stands above the"),
        ("Sales,,\n,,\na,b,y\n1,2,3\n", "has 2 columns without a name: name them, or delete what stands above the"),
        ("a,b,y\n1,2,3\nSource: us\n", "row 2 of .* has 1 cells, but the header has 3: correct or delete it"),
        (
            "a,colour,y\n1,2,3\n1,red,3\n",
            "the feature column 'colour' of .* is not numeric: row 2 holds 'red' .encode it as numbers, take `strin",
        ),
        (
            "a,b,y\n1,2,1.5\n1,,2.5\n1,nan,3\n",
            r"X of .* holds NaN or missing values, the first in row 2, column 'b': drop or fill them first, or",
        ),
        (
            "a,y\n1,2\n1,\n2,3\n",
            r"y of .* holds NaN or infinite values \(1 of 3\), the first in row 2: drop or fill them",
        ),
        ("a,y\n1,cat\n1,\n2,dog\n", "the target of .* misses labels .1., the first in row 2"),
        ("a,y\n1,cat\n2,cat\n", r"the target of .* holds one class only \(cat\): nothing to separate"),
        (
            "a,y\n" + "1,cat\n" * 20 + "2,dog\n",
            r"the class dog of .* has too few rows \(1\) for a stratified split of 21 rows 11/5/5 into train/val/test",
        ),
    ],
)
def test_a_csv_that_cannot_work_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load(write_csv(tmp_path, text), strings="refuse", missing="refuse")


def test_a_missing_target_column_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no target column 'price': its columns are a, b"):
        load(write_csv(tmp_path, "a,b\n1,2\n"), target="price")


@pytest.mark.parametrize("content", [b"a,y\n\xff\xfe,1\n", "pr\u00e8s,y\n1,2\n".encode("latin-1")])
def test_a_csv_that_is_not_text_is_refused(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not in UTF-8 \(line [12]\): name its `encoding`, such as cp1252"):
        load(str(path))


ONES = np.ones((8, 2))
SPLITS = {"X_train": ONES, "y_train": np.arange(8) % 2, "X_val": ONES}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": ONES}, "must hold the arrays X and y, or X_train, .* but lacks y: it holds X"),
        ({"inputs": ONES}, "but lacks X, y: it holds inputs"),
        (SPLITS, "but lacks y_val: it holds X_train, y_train, X_val"),
        (SPLITS | {"y_val": np.ones(8), "X_test": ONES}, "but lacks y_test"),
        ({"X": ONES, "y": np.ones(7)}, "X of .* has 8 rows, but y has 7"),
        ({"X": np.ones(8), "y": np.ones(8)}, r"X of .* must have shape \(rows, features\) .* got \(8,\) and \(8,\)"),
        (
            {"X": ONES, "y": np.ones((8, 2))},
            "y of .* has 2 columns, but a problem has one target: write a file for each, or leave `solver` and",
        ),
        ({"X": np.ones((0, 2)), "y": np.ones(0)}, r"X of .* is empty, of shape \(0, 2\)"),
        ({"X": np.ones((8, 0)), "y": np.ones(8)}, r"X of .* is empty, of shape \(8, 0\)"),
        ({"X": ONES.astype(str), "y": np.ones(8)}, "X of .* must hold numbers and y numbers or strings, got <U32"),
        ({"X": ONES, "y": np.ones(8) * 1j}, "must hold numbers and y numbers or strings, got float64 and complex128"),
        ({"X": ONES * [1, np.inf], "y": np.ones(8)}, r"X of .* \(8 of 16\), the first in row 1, column 'x1'"),
        ({"X": ONES, "y": np.where(np.arange(8) == 4, np.nan, 1)}, r"y of .* \(1 of 8\), the first in row 5"),
        ({"X": ONES, "y": np.ones(8, dtype=int)}, r"holds one class only \(1\)"),
        (
            SPLITS | {"y_val": np.array([*"abcabcab"]), "y_train": np.array([*"abababab"])},
            "y_train of .* lacks the label c that another part holds",
        ),
        (
            SPLITS | {"X_val": np.ones((8, 3)), "y_val": np.arange(8) % 2},
            "X_val of .* has 3 features, but X_train has 2",
        ),
        ({"X": np.full((2, 2), None), "y": np.ones(2)}, "cannot be read as an .npz file of plain arrays, and pickled"),
    ],
)
def test_an_npz_that_cannot_work_is_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load(write_npz(tmp_path, **arrays))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not an archive"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "arrays.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz file"):
        load(str(path))


def test_a_single_array_in_place_of_an_archive_is_refused(tmp_path):
    path = tmp_path / "arrays.npz"
    with path.open("wb") as file:
        np.save(file, ONES)
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz file"):
        load(str(path))


@pytest.mark.parametrize(("validation", "test"), [(0.45, 0.45), (0.1, 0.8)])
def test_a_class_that_the_split_would_lose_is_named(tmp_path, validation, test):
    X, _ = numbered(30)
    path = write_npz(tmp_path, X=X, y=np.where(np.arange(30) < 3, "rare", "usual"))
    with pytest.raises(ValueError, match=r"the class rare of .* has too few rows \(3\) for a stratified split of 30"):
        load(path, validation=validation, test=test)
