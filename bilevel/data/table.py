"""Tables: named columns of numbers or words, from text files, parquet files and data frames."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bilevel.core.options import require_value
from bilevel.data.encodings import decoded, is_encoding

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

SEPARATORS = (",", ";", "\t", "|")
SHOWN = 40
"""Characters of a header in a message."""
MISSING = np.array([
    *("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "NULL", "null", "None", "<NA>", "NaT", "?", "n.a."),
    *("#DIV/0!", "#VALUE!", "#REF!", "#NUM!", "#NAME?")
])  # fmt: skip
"""What stands for a missing value in a text file."""
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
SVMLIGHT = (".svm", ".svmlight", ".libsvm", ".svm.gz", ".svmlight.gz", ".libsvm.gz")
COMMA = re.compile(r"[-+]?\d+(,\d+)?([eE][-+]?\d+)?")
TIME = r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?"
MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
DATE = re.compile(
    rf"((?:19|20)\d\d[-/](?:0[1-9]|1[0-2])|\d{{4}}([-/.])\d{{1,2}}\2\d{{1,2}}|\d{{1,2}}([-/.])\d{{1,2}}\3(\d{{4}}|\d{{2}})"
    rf"|\d{{1,2}}[ -]{MONTH}[ ,-]+\d{{2,4}}"
    rf"|{MONTH} \d{{1,2}},? \d{{4}})([T ]+{TIME} ?([ap]m)?(Z|[-+]\d{{2}}:?\d{{2}})?)?"
    rf"|(-?\d+ days?,? \+?)?{TIME}|-?\d+ days?|(19|20)\d\d-?(Q[1-4]|W\d\d)|Q[1-4][- ]?(19|20)\d\d",
    re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns, of shape (rows,) each: numbers, or words with "" for a missing one.

    The `source` is for messages. Of a text file there is the separator of its cells and, where it was said, what stands
    before decimals. Notes say what was done.
    """

    source: str
    columns: Mapping[str, Array]
    separator: str = ""
    decimal: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def numbers(self, name: str) -> Array | None:
        """Return a column as numbers, with NaN for what is missing; None where some cell is a word.

        True and False are 1 and 0. Decimal commas are read where `decimal` is a comma, or where it is not said, another
        separator parts the cells, and all of the column can be read so.
        """
        column = self.columns[name]
        if column.dtype.kind != "U":
            return column.astype(np.float64)
        there = column != ""
        result = np.full(len(column), np.nan)
        lowered = np.char.lower(column[there])
        if len(lowered) and np.isin(lowered, ("true", "false")).all():
            result[there] = lowered == "true"
            return result
        if self.has_decimal_commas(name):
            result[there] = np.char.replace(column[there], ",", ".").astype(np.float64)
            return result
        try:
            result[there] = column[there].astype(np.float64)
        except ValueError:
            return None
        return result

    def has_decimal_commas(self, name: str) -> bool:
        """Whether a column holds numbers with decimal commas."""
        column = self.columns[name]
        if column.dtype.kind != "U" or self.decimal == "." or (self.decimal is None and self.separator in ("", ",")):
            return False
        cells = column[column != ""]
        return bool((np.char.find(cells, ",") >= 0).any()) and all(map(COMMA.fullmatch, cells))

    def words(self, name: str) -> Array:
        """Return a column as words, with "" for what is missing; whole numbers have no decimal point."""
        column = self.columns[name]
        if column.dtype.kind == "U":
            return column
        return np.array([_word(value) for value in column.tolist()], dtype=str)

    def date(self, name: str) -> tuple[int, str] | None:
        """Return the row and the text of the first date in a column of dates; None for other columns."""
        column = self.columns[name]
        there = np.flatnonzero(column != "") if column.dtype.kind == "U" else np.array([], dtype=int)
        if not len(there) or not all(map(DATE.fullmatch, column[there])):
            return None
        return int(there[0]) + 1, str(column[there[0]])

    def error(self, name: str, what: str) -> ValueError:
        """Return the error about a column."""
        return ValueError(f"the column {name!r} of {self.source!r} {what}.")


def _word(value: Any) -> str:
    if value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def ending(name: str) -> str:
    """Return the ending of a path in lower case, that of what is compressed included.

    >>> ending("Data.CSV.gz")
    '.csv.gz'
    """
    path = Path(name.lower())
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def is_frame(data: Any) -> bool:
    """Whether an object is a table of named columns, as those of pandas and polars are."""
    return not isinstance(data, str | Path) and hasattr(data, "columns") and hasattr(data, "__getitem__")


CHOICES = {
    "index": ("leave_out", "keep"),
    "strings": ("one_hot", "refuse"),
    "missing": ("fill", "refuse"),
    "rare": ("leave_out", "refuse"),
    "separator": (*SEPARATORS, None),
    "decimal": (".", ",", None),
}


@dataclass(frozen=True)
class TableOptions:
    """What is done with the columns of a table: the options of `load` of the same names."""

    target: str | Sequence[str] | None = None
    drop: Sequence[str] = ()
    strings: str = "one_hot"
    missing: str = "fill"
    index: str = "leave_out"
    rare: str = "leave_out"
    separator: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    split: str | Mapping[str, str] = "random"
    groups: str | None = None
    weights: str | None = None

    @property
    def by_groups(self) -> str | None:
        """The column whose equal values stay in one part."""
        return self.groups if isinstance(self.split, str) else self.split.get("groups", self.groups)

    @property
    def time(self) -> str | None:
        """The column that orders the rows."""
        return None if isinstance(self.split, str) else self.split.get("time")

    @property
    def ordered(self) -> bool:
        """Whether parts are blocks of rows in their order."""
        return self.split == "time" or self.time is not None

    def check(self, name: Any) -> None:
        """Refuse values out of range, and options that would have no effect on this data set, in one sentence."""
        for option, allowed in CHOICES.items():
            value = getattr(self, option)
            words = " or ".join("None" if each is None else repr(each) for each in allowed)
            require_value(option, value, words, value in allowed)
        fine = self.encoding is None or (isinstance(self.encoding, str) and is_encoding(self.encoding))
        require_value("encoding", self.encoding, "an encoding that Python knows, such as 'cp1252' or 'utf-16'", fine)
        words = "'random', 'time', {'time': COLUMN} or {'groups': COLUMN}"
        split = self.split
        mapped = isinstance(split, Mapping) and len(split) == 1 and set(split) <= {"time", "groups"}
        require_value("split", split, words, mapped or split in ("random", "time"))
        require_value("drop", self.drop, "a list of columns", not isinstance(self.drop, str))
        aimed = isinstance(self.target, Sequence) and all(isinstance(each, str) for each in self.target)
        require_value("target", self.target, "the name of a column, or a list of names", aimed or self.target is None)
        if self.by_groups is not None and self.ordered:
            raise ValueError("rows are split by groups or in the order of time, not both: leave one of them out.")
        if is_frame(name) or ending(str(name)) in TABLES:
            return
        for each in fields(self):
            value = getattr(self, each.name)
            if value != each.default and (each.name, value) != ("split", "time") and each.name != "rare":
                owner = "tables (.csv, .tsv, .parquet and data frames)" if each.name != "target" else "tables"
                raise ValueError(f"`{each.name}` is an option of {owner} alone, got {value!r} for {name!r}.")


def read_table(
    source: str,
    path: Path,
    separator: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
    sure: bool = True,
) -> Table:
    """Return the table in a text file with a header row, or in a parquet file; options are those of `load`.

    Raises:
        ValueError: in one sentence, for a file that is no such table.
    """
    if ending(source) == ".parquet":
        return _read_parquet(source, path)
    opened = gzip.open if ending(source).endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
        text, notes = decoded(source, content, encoding, sure)
        if marked := re.match(r"sep=(.)\r?\n", text):  # the first line of Excel's files
            separator, text = separator or marked[1], text[marked.end() :]
        separator = separator or _separator(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        lines = [[cell.strip() for cell in line] for line in reader if line]
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source!r} cannot be read as a .csv file: {error}.") from error
    header, body = _rectangle(source, lines, separator, notes)
    columns = {}
    for name, cells in zip(header, zip(*body, strict=True), strict=True):
        column = np.array(cells)
        columns[name] = np.where(np.isin(column, MISSING), "", column)
    if shown := {";": "semicolons", "\t": "tabs", "|": "bars"}.get(separator):
        notes.append(f"{shown} part the cells")
    return Table(source, columns, separator, decimal, tuple(notes))


def _rectangle(
    source: str, lines: list[list[str]], separator: str, notes: list[str]
) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows below it, all of one length; what is left out for that goes to the notes."""
    header, body = (lines[0], lines[1:]) if lines else ([], [])
    if not body:
        raise ValueError(f"{source!r} holds no data: it needs a header row and rows below it.")
    if len(header) > 1 and all(map(is_number, header)):
        raise ValueError(f"{source!r} has no header row: its first row is {', '.join(header[:3])}, ...")
    hollow = [at for at, name in enumerate(header) if not name and not any(line[at] for line in body if at < len(line))]
    if hollow and all(len(line) == len(header) for line in body):
        header, *body = ([cell for at, cell in enumerate(line) if at not in hollow] for line in (header, *body))
        notes.append("columns with neither a name nor cells are left out")
    if all(len(line) > len(header) and not any(line[len(header) :]) for line in body):
        body = [line[: len(header)] for line in body]
        notes.append("empty cells behind the last column are left out")
    above = f"delete what stands above the header if {separator.join(header)[:SHOWN]!r} is none"
    if len(set(header)) < len(header):
        if not (twice := next(column for column in header if header.count(column) > 1)):
            raise ValueError(f"{source!r} has {header.count('')} columns without a name: name them, or {above}.")
        raise ValueError(f"{source!r} has two columns of the name {twice!r}: rename one of them.")
    for number, line in enumerate(body, 1):
        if len(line) != len(header):
            fits = any(len(each) == len(header) for each in body)
            found = f"row {number} of {source!r} has {len(line)} cells, but the header has {len(header)}"
            raise ValueError(f"{found}: correct or delete {'it' if fits else f'the row, or {above}'}.")
    return header, body


def _separator(text: str) -> str:
    """Return what parts a header into most columns, a comma where several do."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    return max(SEPARATORS, key=lambda each: len(next(csv.reader([header], delimiter=each), [])))


def is_number(cell: str) -> bool:
    """Whether a cell reads as a number; an empty one is a missing number."""
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True


def _read_parquet(source: str, path: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        what = f"{source!r} is a parquet file, which the package pyarrow reads"
        raise ModuleNotFoundError(f"{what}: pip install pyarrow, or write a .csv file.") from error
    try:
        return from_frame(parquet.read_table(path).to_pydict(), source)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{source!r} cannot be read as a parquet file: {' '.join(str(error).split())}.") from error


def from_frame(frame: Any, source: str = "the table") -> Table:
    """Return the table of a data frame, or of a mapping from names to columns."""
    names = list(frame if isinstance(frame, Mapping) else getattr(frame, "column_names", frame.columns))
    words = list(map(str, names))
    if len(set(words)) < len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise ValueError(f"{source} has two columns of the name {twice!r}: rename one of them.")
    return Table(source, {str(name): _column(source, str(name), frame[name]) for name in names})


def _column(source: str, name: str, values: Any) -> Array:
    """Return a column of a frame as an array of numbers or of words."""
    array = np.asarray(values, dtype=object) if isinstance(values, list) else np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"the column {name!r} of {source} holds arrays: give numbers, words, True and False.")
    if array.dtype.kind in "fiu":
        return array
    if array.dtype.kind == "M":
        return np.where(np.isnat(array), "", array.astype(str))
    array = array.astype("m8[us]") if array.dtype.kind == "m" else array  # as timedelta, whose text is read as a time
    cells = ["" if _is_missing(value) else value for value in array.tolist()]
    there = [value for value in cells if not isinstance(value, str)]
    logical = bool(there) and all(isinstance(value, bool) for value in there)  # words, as in a text file
    if len(there) == len(cells) and not logical and all(isinstance(value, bool | int) for value in there):
        return np.array(cells, dtype=np.int64)
    if not logical and all(value == "" if isinstance(value, str) else _is_numeric(value) for value in cells):
        return np.array([np.nan if value == "" else float(value) for value in cells])
    words = (value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in cells)
    return np.array([word.strip() for word in words], dtype=str)


def _is_missing(value: Any) -> bool:
    return value is None or type(value).__name__ in ("NAType", "NaTType") or bool(np.all(value != value))


def _is_numeric(value: Any) -> bool:
    return isinstance(value, bool | int | float) or type(value).__name__ == "Decimal"
