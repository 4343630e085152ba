"""Tables as people have them: words, missing cells, other separators, columns that number rows, groups and time."""

from __future__ import annotations

import gzip
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Frame

from bilevel.data import Dataset, load
from bilevel.data.columns import Encoder
from bilevel.data.load import load_rows
from bilevel.data.table import Table, TableOptions

ROWS = 40
SIZE = [None if row == 3 else row * 0.5 for row in range(ROWS)]
COLOUR = ["" if row == 5 else ("red", "blue", "green")[row % 3] for row in range(ROWS)]
COLUMNS = {
    "user_id": list(range(100, 100 + ROWS)),
    "size": SIZE,
    "colour": COLOUR,
    "old": [row % 2 == 0 for row in range(ROWS)],
    "same": [7] * ROWS,
    "y": [row * 0.25 for row in range(ROWS)],
}


def write(path: Path, columns: dict[str, Any] = COLUMNS, separator: str = ",", comma: bool = False) -> str:
    """Write columns to a text file, and return its path."""

    def cell(value: Any) -> str:
        return "" if value is None else str(value).replace(".", "," if comma and isinstance(value, float) else ".")

    lines = [separator.join(columns), *(separator.join(map(cell, row)) for row in zip(*columns.values(), strict=True))]
    text = "\ufeff" + "\n".join(lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def parts(data: Dataset) -> torch.Tensor:
    assert data.X_test is not None
    return torch.cat([data.X_train, data.X_val, data.X_test])


def test_words_and_missing_cells_become_numbers_by_the_training_rows_and_each_thing_is_said(tmp_path: Path) -> None:
    data = load(write(tmp_path / "t.csv"), standardize=False)
    assert data.feature_names == ("size", "colour=blue", "colour=green", "colour=red", "old", "same")
    X, y = parts(data), torch.cat([data.y_train, data.y_val, data.y_test]) if data.y_test is not None else data.y_train
    row = (4 * y).round().long()
    seen = data.X_train[data.y_train != 0.75]
    size = torch.where(row == 3, seen[:, 0].quantile(0.5), row.double() * 0.5)
    torch.testing.assert_close(X[:, 0], size)
    train = [("red", "blue", "green")[r % 3] for r in (4 * data.y_train).round().long().tolist() if r != 5]
    fill = max(sorted(set(train)), key=train.count)
    words = [fill if r == 5 else ("red", "blue", "green")[r % 3] for r in row.tolist()]
    assert [("blue", "green", "red")[int(i)] for i in X[:, 1:4].argmax(1)] == words
    assert torch.equal(X[:, 1:4].sum(1), torch.ones(ROWS).double())
    assert torch.equal(X[:, 4], (row % 2 == 0).double())
    for said in (
        "the column 'user_id' is left out, as it numbers the rows",
        "the words of 'colour' become 3 features of 0 and 1, one for each category",
        "missing values of 'size' (1), 'colour' (1) are filled by the median or the most frequent word of the training",
        "'same' is constant: no influence",
    ):
        assert sum(said in line for line in data.note.splitlines()) == 1, data.note


def test_the_same_table_in_other_forms_is_the_same_data(tmp_path: Path) -> None:
    first = load(write(tmp_path / "t.csv"))
    forms = {
        "semicolons part": write(tmp_path / "s.csv", separator=";"),
        "decimal commas are read in 'size', 'y'": write(tmp_path / "c.csv", separator=";", comma=True),
        "tabs part": write(tmp_path / "t.tsv", separator="\t"),
        "size": write(tmp_path / "z.csv.gz"),
        "colour": Frame(COLUMNS),
        "same": Frame(COLUMNS | {"old": np.array(COLUMNS["old"]), "y": np.array(COLUMNS["y"])}),
    }
    for said, form in forms.items():
        data = load(form)
        assert said in data.note
        assert all(torch.equal(data.splits()[key], value) for key, value in first.splits().items()), said
    both = load(write(tmp_path / "q.csv", {n: [f'"{v}"' for v in c] for n, c in COLUMNS.items()}), decimal=".")
    assert torch.equal(both.y_val, first.y_val)


def test_each_thing_can_be_switched_off(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv")
    assert load(path, index="keep").feature_names[0] == "user_id"
    assert load(path, drop=["size", "colour"]).feature_names == ("old", "same")
    with pytest.raises(ValueError, match=r"'colour' of .* is not numeric: row 1 holds 'red' .*`strings: one_hot`"):
        load(path, strings="refuse")
    with pytest.raises(
        ValueError, match="the first in row 4, column 'size': drop or fill them first, or take `missing"
    ):
        load(path, missing="refuse", drop=["colour"])
    with pytest.raises(ValueError, match=r"`drop` names 'weight', but the columns of .* are user_id, size"):
        load(path, drop=["weight"])


DAYS = ("2024-01-{:02d}", "{}/3/2024", "{:02d}.01.24 10:30", "{} March 2024", "Jan {}, 2024")
LASTING = ("{} days 04:30:00", "-1 days +{:02d}:00:00", "2024-W{:02d}", "2024Q2")


@pytest.mark.parametrize("day", [*DAYS, *LASTING])
def test_dates_are_refused_by_name_with_the_remedy(tmp_path: Path, day: str) -> None:
    columns = COLUMNS | {"signed": [f'"{day.format(row % 28 + 1)}"' for row in range(ROWS)], "y": COLUMNS["y"]}
    columns = {name: columns[name] for name in ("size", "signed", "y")}
    with pytest.raises(
        ValueError, match=r"the column 'signed' of .* holds dates \('.*' in row 1\): .* `drop: \[signed\]`"
    ):
        load(write(tmp_path / "t.csv", columns))
    assert load(write(tmp_path / "t.csv", columns), drop=["signed"]).feature_names == ("size",)


def test_dates_of_a_data_frame_are_dates() -> None:
    days = np.datetime64("2024-01-31") + np.arange(ROWS)
    for unit in ("D", "ns"):
        frame = Frame(COLUMNS | {"colour": days.astype(f"M8[{unit}]")})
        with pytest.raises(
            ValueError, match=r"'colour' of 'the table' holds dates \('2024-01-31.* in row 1\): .*drop: \["
        ):
            load(frame)
    lasting = Frame(COLUMNS | {"colour": np.timedelta64(90, "m") * np.arange(ROWS)})
    with pytest.raises(ValueError, match=r"'colour' of 'the table' holds dates \('0:00:00' in row 1\)"):
        load(lasting)
    with pytest.raises(ValueError, match="or name another column as the `target`"):
        load_rows(lasting, TableOptions(target="colour"))


def test_true_and_false_of_a_data_frame_are_those_of_a_text_file(tmp_path: Path) -> None:
    where = [None if row % 9 == 0 else row % 3 == 0 for row in range(ROWS)]
    columns = {"size": SIZE, "old": where[::-1], "bytes": [b"red", b"blue"] * (ROWS // 2)}
    for target in (where, [row % 3 == 0 for row in range(ROWS)], np.arange(ROWS) % 3 == 0):
        of_frame = load_rows(Frame(columns | {"y": target}), TableOptions())
        words = {"bytes": [word.decode() for word in columns["bytes"]], "y": list(target)}
        of_file = load_rows(write(tmp_path / "t.csv", columns | words), TableOptions())
        assert of_frame.classes == of_file.classes == ("False", "True")
        assert of_frame.encoder == of_file.encoder
        np.testing.assert_array_equal(of_frame.X, of_file.X)


@pytest.mark.parametrize(
    ("data", "target", "message"),
    [
        (np.zeros((3, 2)), None, "`name` must be a name, a path or a data frame, got ndarray"),
        ({"a": [1.0]}, None, "got dict"),
        (Frame({}), None, "'the table' has no columns"),
        (Frame(COLUMNS), 3, "`target` must be the name of a column, or a list of names, got 3"),
    ],
)
def test_what_is_no_table_is_refused(data: Any, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(data, TableOptions(target=target))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            [*range(1, ROWS), "abc"],
            "the column 'a' of .* holds numbers, but 'abc' in row 40: correct it, leave the cell",
        ),
        ([f'"{row},{row}5"' for row in range(ROWS)], r"holds numbers with commas, such as '0,05': say `decimal: ','`"),
    ],
)
def test_a_column_that_is_neither_numbers_nor_categories_is_refused(
    tmp_path: Path, cells: list[Any], message: str
) -> None:
    path = write(tmp_path / "t.csv", {"b": COLUMNS["y"], "a": cells, "y": COLUMNS["y"]})
    with pytest.raises(ValueError, match=message):
        load(path)
    assert "decimal commas" in load(path, decimal=",").note if '"' in str(cells[0]) else True


def test_groups_stay_together_and_time_goes_forward(tmp_path: Path) -> None:
    shuffled = np.random.default_rng(0).permutation(ROWS)
    columns = {
        "when": [f"2024-{1 + r // 28:02d}-{1 + r % 28:02d}" for r in shuffled],
        "site": [f"s{r % 8}" for r in shuffled],
    }
    columns |= {"a": shuffled.astype(float).tolist(), "y": (shuffled * 0.5).tolist()}
    path = write(tmp_path / "t.csv", columns)
    for options in ({"groups": "site"}, {"split": {"groups": "site"}}):
        data = load(path, drop=["when"], standardize=False, validation=0.3, **options)
        assert data.feature_names == ("a",)
        sites = [set((X[:, 0] % 8).tolist()) for X in (data.X_train, data.X_val, data.X_test) if X is not None]
        assert sum(map(len, sites)) == 8
        assert "whole groups, split with seed 0" in data.note
    data = load(path, drop=["site"], standardize=False, split={"time": "when"})
    assert parts(data)[:, 0].tolist() == list(range(ROWS))
    assert "split in the order of the rows" in data.note
    rows = load(path, drop=["site", "when"], standardize=False, split="time")
    assert parts(rows)[:, 0].tolist() == shuffled.tolist()
    with pytest.raises(ValueError, match=r"the column 'site' of .* cannot order the rows: it needs numbers"):
        load(path, drop=["when"], split={"time": "site"})
    with pytest.raises(ValueError, match=r"has no groups column 'shop': its columns are when, site"):
        load(path, groups="shop")


DAYS = {
    "2024-02-03": True,
    "2024-02-03T04:05": True,
    "2024/02/03 04:05:06.5+01:00": True,
    "2024-02-03 4:05": False,
    "2024-2-03": False,
    "2024/02-03": False,
    "2024-02-03 and later": False,
}


@pytest.mark.parametrize("first", DAYS)
def test_dates_order_rows_only_where_all_are_written_alike(first: str) -> None:
    later = first.replace("03", "04").replace(".5", ".25")
    columns = {"when": [later, first], "a": [2.0, 1.0], "y": [2.5, 1.5]}

    def ordered(**cells: Any) -> list[float]:
        return load_rows(Frame(columns | cells), TableOptions(split={"time": "when"})).y.tolist()

    refused = pytest.raises(ValueError, match=r"the column 'when' of .* cannot order the rows: .* all written alike")
    if not DAYS[first]:
        with refused:
            ordered()
        return
    assert ordered() == [1.5, 2.5]
    others = {first.replace("/", "-") + ":00", first.replace("+01", "+02"), first.replace("T", " "), "2024"} - {first}
    for other in others:
        with refused:
            ordered(when=[later, other])


def test_a_column_of_true_and_false_blames_the_odd_cell() -> None:
    encoder = Encoder.of_numbers(["old"])
    table = Table("t", {"old": np.array(["True", "", "yes"])})
    with pytest.raises(ValueError, match=r"the column 'old' of 't' holds 'yes' in row 3, but numbers where"):
        encoder.transform(table)


def test_integers_that_become_equal_are_said_and_a_constant_target_is_refused(tmp_path: Path) -> None:
    big = [2**60 + row % 2 for row in range(ROWS)]
    a, y = COLUMNS["y"], [2**53 + row for row in range(ROWS)]
    for source in (Frame({"big": big, "a": a, "y": y}), write(tmp_path / "t.csv", {"big": big, "a": a, "y": y})):
        notes = "; ".join(load_rows(source, TableOptions()).notes)
        assert "different integers of 'big' become equal, as they need more than 53 bits: take differences" in notes
        assert "different integers of the target become equal" in notes
    spaced = load_rows(Frame({"big": [2**60 + 256 * row for row in range(ROWS)], "a": a, "y": a}), TableOptions())
    assert "become equal" not in "; ".join(spaced.notes)
    with pytest.raises(ValueError, match=r"the target of .* is 3 in every row: nothing to learn, name another column"):
        load(Frame({"a": a, "y": [3.0] * ROWS}))


@pytest.mark.parametrize("start", [0, 1])
def test_a_column_that_counts_the_rows_under_another_name_is_named(start: int) -> None:
    count = list(range(start, start + ROWS))
    said = "the column 'nr' counts the rows, and is kept as a feature: leave it out with `drop` if it is none"
    table = {"nr": count, "x": [0.5 * (row % 7) for row in count], "y": [row * 0.25 for row in count]}
    assert said in load_rows(Frame(table), TableOptions()).notes
    other = {"far": [row + 5 for row in count], "back": count[::-1], "gap": [*count[:-1], 99], "y": table["y"]}
    for frame, options in ((table, TableOptions(index="keep")), (other, TableOptions())):
        assert not any("counts the rows" in note for note in load_rows(Frame(frame), options).notes)


def test_integers_that_may_be_labels_have_a_note_for_folds(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", {"a": COLUMNS["y"], "y": [row % 5 for row in range(ROWS)]})
    notes = "; ".join(load_rows(path, TableOptions()).notes)
    assert "the 5 different integers of the target of" in notes
    assert "say `task: regression` in `data` where they are numbers" in notes
    assert "different integers" not in "; ".join(load_rows(path, TableOptions(), task="classification").notes)


def test_rows_without_a_target_are_left_out_and_counted(tmp_path: Path) -> None:
    targets = ["" if row in (1, 8) else row * 0.25 for row in range(ROWS)]
    path = write(tmp_path / "t.csv", {"a": [float(row) for row in range(ROWS)], "y": targets})
    data = load(path, standardize=False)
    assert "2 rows without a target are left out" in data.note
    assert sorted(parts(data)[:, 0].tolist()) == [row for row in range(ROWS) if row not in (1, 8)]
    torch.testing.assert_close(data.y_train, data.X_train[:, 0] * 0.25)
    with pytest.raises(ValueError, match=r"y of .* holds NaN or infinite values \(2 of 40\)"):
        load(path, missing="refuse")
    with pytest.raises(ValueError, match=r"the target 'y' of .* is empty: name another column as the `target`"):
        load(write(tmp_path / "t.csv", {"a": [1.0] * ROWS, "y": [""] * ROWS}))


def test_weights_belong_to_their_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", {"a": COLUMNS["y"], "w": [1 + row for row in range(ROWS)], "y": COLUMNS["y"]})
    data = load(path, weights="w", standardize=False)
    assert data.feature_names == ("a",)
    assert data.weights is not None
    torch.testing.assert_close(data.weights, 4 * data.X_train[:, 0] + 1)
    odd = {"x": "holds 'x'", "": "is empty", "-1": "holds '-1'", "inf": "holds 'inf'"}
    for cell, said in odd.items():
        path = write(tmp_path / "t.csv", {"a": COLUMNS["y"], "w": [1, 2, cell, *[3] * (ROWS - 3)], "y": COLUMNS["y"]})
        with pytest.raises(
            ValueError, match=rf"weights in the column 'w' of .* must be numbers .* all 0: row 3 {said}"
        ):
            load(path, weights="w")


def test_classes_of_one_row_are_left_out_or_refused(tmp_path: Path) -> None:
    kinds = ["rare" if row == 0 else ("cat", "dog")[row % 2] for row in range(ROWS)]
    path = write(tmp_path / "t.csv", {"a": COLUMNS["y"], "y": kinds})
    assert "the rows of classes with fewer than 3 rows are left out: rare (1)" in load(path).note
    assert load_rows(path, TableOptions()).classes == ("cat", "dog")
    with pytest.raises(ValueError, match=r"the class rare of .* has too few rows \(1\)"):
        load(path, rare="refuse")


def test_svmlight_is_read_and_stays_sparse_for_folds(tmp_path: Path) -> None:
    path = tmp_path / "t.svmlight"
    path.write_text("".join(f"{row * 0.25} 1:{row} 3:{row % 3}\n" for row in range(ROWS)))
    data = load(str(path), standardize=False)
    assert "sparse inputs are made dense" in data.note
    torch.testing.assert_close(parts(data)[:, 0].sort().values, torch.arange(ROWS).double())
    rows = load_rows(str(path), TableOptions())
    assert hasattr(rows.X, "tocsr")
    assert rows.X.shape == (ROWS, 3)
    assert data.feature_names == rows.encoder.features == ("x1", "x2", "x3")  # by the file's own numbers
    path.write_text("this is no such file\n")
    with pytest.raises(ValueError, match="cannot be read as a file in the svmlight format"):
        load(str(path))


def test_parquet_is_read_or_its_package_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 no parquet")
    if find_spec("pyarrow") is None:
        with pytest.raises(
            ModuleNotFoundError, match="which the package pyarrow reads: pip install pyarrow, or write a"
        ):
            load(str(path))
        return
    with pytest.raises(ValueError, match="cannot be read as a parquet file"):
        load(str(path))
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(COLUMNS), path)
    assert torch.equal(load(str(path)).X_val, load(write(tmp_path / "t.csv")).X_val)


def test_rows_to_fold_keep_their_order_and_their_test_part(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", COLUMNS | {"site": [f"s{row % 5}" for row in range(ROWS)]})
    rows = load_rows(path, TableOptions(target="y", groups="site"), test=0.2)
    assert (len(rows.y), rows.target, rows.options.ordered) == (32, "y", False)
    assert rows.groups is not None
    assert set(rows.groups) == {f"s{int(4 * y) % 5}" for y in rows.y}
    assert len(set(rows.groups)) == 4
    last = load_rows(path, TableOptions(target="y", split="time", drop=["site"]), test=0.25)
    assert last.y_test is not None
    assert last.y_test.tolist() == [row * 0.25 for row in range(30, ROWS)]
    assert last.encoder.rules[0].fill == np.median([row * 0.5 for row in range(30) if row != 3])


TOWNS = ["Köln", "Gijón", "Faro"]
TEXT = "town,a,y\n" + "".join(f"{TOWNS[row % 3]},{row},{0.5 * row}\n" for row in range(ROWS))


@pytest.mark.parametrize(
    ("encoding", "given"),
    [
        ("cp1252", True),
        ("latin-1", True),
        ("utf-16-le", True),
        ("utf-8-sig", False),
        ("utf-16", False),
        ("utf-32", False),
    ],
)
def test_text_is_read_in_the_encoding_that_is_said_or_that_its_mark_says(
    tmp_path: Path, encoding: str, given: bool
) -> None:
    for name, content in (("t.csv", TEXT.encode(encoding)), ("t.csv.gz", gzip.compress(TEXT.encode(encoding)))):
        (tmp_path / name).write_bytes(content)
        data = load(str(tmp_path / name), encoding=encoding if given else None)
        assert data.feature_names == ("town=Faro", "town=Gijón", "town=Köln", "a")
        assert ("it is read in" in data.note) == (encoding != "utf-8-sig")


def test_another_encoding_is_refused_by_the_option_and_doubted_where_the_text_is_utf_8(tmp_path: Path) -> None:
    path, known = tmp_path / "t.csv", "`encoding` must be an encoding that Python knows, such as 'cp1252' or 'utf-16'"
    for content, encoding, sentence in (
        (
            TEXT.encode("cp1252"),
            None,
            r"is not in UTF-8 \(line 2\): name its `encoding`, such as cp1252, latin-1 or utf-16",
        ),
        (
            TEXT.encode("utf-16-le"),
            None,
            "holds NUL characters, as UTF-16 does: name its `encoding`, such as utf-16-le",
        ),
        (b"a,y\n1,\x81\n", "cp1252", r"in the `encoding` 'cp1252' \(line 2\): name another, or leave it out"),
        (TEXT.encode(), "utf8mb4", known),
        (TEXT.encode(), "base64", known),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            load(str(path), encoding=encoding)
    path.write_bytes(TEXT.encode())
    assert "but its bytes are UTF-8, too: see `encoding`" in load(str(path), encoding="cp1252").note
    with pytest.raises(ValueError, match="`encoding` is an option of tables"):
        load("iris", encoding="cp1252")


def test_dates_in_months_are_refused_and_those_in_digits_are_named(tmp_path: Path) -> None:
    rows = range(ROWS)
    for form in ("2024-{:02d}", "2024/{:02d}"):
        path = write(tmp_path / "t.csv", {"month": [form.format(1 + row % 12) for row in rows], "y": [*rows]})
        with pytest.raises(ValueError, match=r"the column 'month' of .* holds dates \('2024.01' in row 1\)"):
            load(path)
    digits = [20240101 + row % 28 for row in rows]
    values = {"day": digits, "code": [row + 20249900 for row in rows], "y": [0.5 * row for row in rows]}
    note = load(write(tmp_path / "t.csv", values)).note
    assert "the numbers of 'day' look like dates (20240101): leave them out with `drop`, or count days" in note


def test_labels_with_a_decimal_point_are_doubted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", {"a": [*range(ROWS)], "y": [1.0 + row % 3 for row in range(ROWS)]})
    rows = load_rows(path, TableOptions())
    assert rows.task == "regression"
    said = "the 3 different numbers of the target are whole: say `task: classification` in `data` if they are classes"
    assert said in rows.notes[-1]
    assert said not in "".join(load_rows(path, TableOptions(), task="regression").notes)


@pytest.mark.parametrize("form", ["{}%", "{} %", "${}", "€ {}.50", "-{},00 €"])
def test_numbers_with_signs_are_refused_wherever_they_stand(tmp_path: Path, form: str) -> None:
    signed, numbers = [form.format(row) for row in range(ROWS)], [0.5 * row**2 for row in range(ROWS)]
    for columns in (
        {"fee": signed, "y": numbers},
        {"a": numbers, "fee": signed},
        {"fee": signed[:4] * 10, "y": numbers},
    ):
        with pytest.raises(
            ValueError, match=r"the column 'fee' of .* holds numbers with signs, such as .*: write plain numb"
        ):
            load_rows(write(tmp_path / "t.csv", columns, ";"), TableOptions())


FORMS = ["({}.5)", "\u2212{}", "{}.5 kg", "{}m²", "{} °C", "{}/80", "1.5; {}", "{}.5D+01", "0x{}", "1{:02d},000.5 mg"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 2])
def test_numbers_that_are_written_otherwise_are_refused(tmp_path: Path, form: str, rows: int) -> None:
    fee, y = [form.format(row // rows) for row in range(2 * ROWS)], [0.5 * row**2 for row in range(2 * ROWS)]
    for target, remedy in (("y", r"leave it out with `drop: \[fee\]`"), ("fee", "name another column")):
        with pytest.raises(ValueError, match=f"the column 'fee' of .* not written as such, as .*, or {remedy}"):
            load_rows(write(tmp_path / "t.tsv", {"fee": fee, "y": y}, "\t"), TableOptions(target=target))


def test_words_with_numbers_in_them_stay_categories(tmp_path: Path) -> None:
    many = range(30)
    for words in (["12 kg", "15 kg"], ["1/2", "1/3"], [f"c{n}" for n in many], [f"{n}-{n + 9}" for n in many]):
        columns = {"fee": (words * ROWS)[:ROWS], "y": [0.5 * row**2 for row in range(ROWS)]}
        rows = load_rows(write(tmp_path / "t.tsv", columns, "\t"), TableOptions())
        assert len(rows.encoder.features) == len(words)


def test_a_line_of_excel_bars_and_cells_behind_the_last_column(tmp_path: Path) -> None:
    plain = load_rows(write(tmp_path / "t.csv"), TableOptions())
    path = tmp_path / "t.csv"
    for text in (
        "sep=;\n" + Path(write(path, separator=";")).read_text().lstrip("\ufeff"),
        Path(write(path, separator="|")).read_text(),
        Path(write(path)).read_text().replace("\n", ",,\n").replace(",,\n", "\n", 1) + ",,",
    ):
        path.write_text(text)
        np.testing.assert_array_equal(load_rows(str(path), TableOptions()).X, plain.X)
    path.write_text(Path(write(path)).read_text().replace("red", "#DIV/0!").replace("blue", "n.a."))
    assert load_rows(str(path), TableOptions()).encoder.features == ("size", "colour=green", "old", "same")


@pytest.mark.parametrize("mark", ["1,000", "1.000,5", "1,000,000", "1'000", "1 000", "1\u00a0000.5", "1\u202f000"])
@pytest.mark.parametrize("several", [3, ROWS])
@pytest.mark.parametrize("target", ["y", "a"])
def test_marks_of_thousands_are_named(tmp_path: Path, mark: str, several: int, target: str) -> None:
    cells = [str(1 + row % several) + mark[1:] for row in range(ROWS)]
    path = write(tmp_path / "t.csv", {"a": [f'"{cell}"' for cell in cells], "y": [500, *range(ROWS - 1)]})
    first = re.escape(repr(min(cells)))
    said = f"the column 'a' of .* holds numbers with marks of thousands, such as {first}: write them without"
    with pytest.raises(ValueError, match=said) as error:
        load(path, target=target)
    assert ("say `decimal: ','` if the comma" in str(error.value)) == (mark == "1,000")
    if mark == "1,000":
        assert load(path, decimal=",", target=target).X_train.shape[1] == 1
    if mark == "1.000,5":
        with pytest.raises(ValueError, match=r"such as '.*\.000,5': write them without\."):
            load(path, decimal=",", target=target)


def test_words_of_three_digits_are_no_thousands(tmp_path: Path) -> None:
    for cells in (["030 555", "040 555"], ["1,2", "1,3"], ["1 000 x", "2 000 x"]):
        path = write(tmp_path / "t.csv", {"a": [f'"{cells[row % 2]}"' for row in range(ROWS)], "y": COLUMNS["y"]})
        assert load(path).X_train.shape[1] == 2


@pytest.mark.parametrize("size", [1e300, -1e80, 1e-200])
@pytest.mark.filterwarnings("error")
def test_numbers_whose_squares_are_none_are_refused_by_their_column(tmp_path: Path, size: float) -> None:
    numbers = [size * (1 + row % 7) for row in range(ROWS)]
    plain = {"a": [*range(ROWS)], "h": COLUMNS["y"], "y": COLUMNS["y"]}
    said = (
        r"the column '{}' of .* holds numbers up to \d.*, whose squares leave the range of .*: write it in another unit"
    )
    for name in ("h", "y"):
        for table in (write(tmp_path / "t.csv", plain | {name: numbers}), Frame(plain | {name: np.array(numbers)})):
            with pytest.raises(ValueError, match=said.format(name)):
                load_rows(table, TableOptions(index="keep"))
    np.savez(tmp_path / "t.npz", X=np.stack([COLUMNS["y"], numbers], axis=1), y=COLUMNS["y"])
    (tmp_path / "t.svmlight").write_text("".join(f"{row}.5 0:1 1:{cell!r}\n" for row, cell in enumerate(numbers)))
    for name in ("t.npz", "t.svmlight"):
        with pytest.raises(ValueError, match=said.format("x1")):
            load_rows(str(tmp_path / name), TableOptions())
    (tmp_path / "t.svmlight").write_text("".join(f"{cell!r} 0:1 1:{row}\n" for row, cell in enumerate(numbers)))
    with pytest.raises(ValueError, match=said.format("y")):
        load_rows(str(tmp_path / "t.svmlight"), TableOptions())


@pytest.mark.filterwarnings("error")
def test_infinite_cells_are_refused_without_a_warning(tmp_path: Path) -> None:
    for cells in (
        ["inf", *range(1, ROWS)],
        [0, "inf", "inf", *range(3, ROWS)],
        ["-inf", *[20240101 + r % 9 for r in range(1, ROWS)]],
    ):
        path = write(tmp_path / "t.csv", {"h": cells, "y": COLUMNS["y"]})
        with pytest.raises(
            ValueError, match=f"the column 'h' of .* is infinite in row {1 + (cells[0] == 0)}: correct it"
        ):
            load(path)


def test_several_columns_are_named_as_several(tmp_path: Path) -> None:
    columns = {"id": range(7, 7 + ROWS), "index": range(9, 9 + ROWS), "a": range(ROWS), "b": range(1, 1 + ROWS)}
    notes = load_rows(write(tmp_path / "t.csv", columns | {"y": COLUMNS["y"]}), TableOptions(index="leave_out")).notes
    assert "the columns 'id', 'index' are left out, as they number the rows" in notes


def test_an_index_is_no_target_and_columns_without_name_and_cells_are_left_out(tmp_path: Path) -> None:
    columns = {
        "a": [0.5 * row**2 for row in range(ROWS)],
        "y": [0.25 * row for row in range(ROWS)],
        "id": [*range(ROWS)],
    }
    path = write(tmp_path / "t.csv", columns)
    rows = load_rows(path, TableOptions())
    assert (rows.target, rows.encoder.features) == ("y", ("a",))
    assert "the column 'id' is left out, as it numbers the rows" in rows.notes
    assert load_rows(path, TableOptions(target="id")).target == "id"
    assert load_rows(path, TableOptions(index="keep")).target == "id"
    Path(path).write_text(Path(path).read_text().replace("\n", ",,\n") + ",,")
    rows = load_rows(path, TableOptions())
    assert (rows.target, rows.encoder.features) == ("y", ("a",))
    assert "columns with neither a name nor cells are left out" in rows.notes
