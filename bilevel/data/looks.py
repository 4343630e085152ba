"""What the cells of a column look like: numbers of rows, days, too many digits, with signs or marks of thousands."""

from __future__ import annotations

import re

import numpy as np

from bilevel.data.table import COMMA, Array, Table, is_number

INDEX = re.compile(r"(Unnamed: \d+(\.\d+)*)?")
"""The name of the index of a table that pandas has written, or has written, read and written again."""
NUMBERED = re.compile(r"(?i:index|id|rownames|row[ _]?(id|number|names)?|.+[ _](id|number))|.*[a-z](Id|ID|Number)")
"""Names of columns that number the rows."""
SIGNED = re.compile(r"[-+]?([$€£¥] ?[-+]?\d[\d.,]*|\d[\d.,]* ?[$€£¥%])")
"""A number with the sign of a currency, or a percentage."""
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}([,.' \u2019\u00a0\u202f])\d{3}(\1\d{3})*([.,]\d+)?")
"""A number with marks between its thousands, which may also be one with decimals."""
NUMBERLIKE = re.compile(r"[-+]?\d[\d.,]*")
PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*[.,]?\d+)"
SPELLED = re.compile(
    rf"[(<>=~≈±+\-\u2212 ]*{PLAIN}(?:[dD][-+]?\d+)?(?: ?(?P<unit>[^\W\d_]{{1,6}}\.?[²³]?|°[CF]?))?\)?"
    rf"|[-+]?{PLAIN}(?: ?[,;/:x] ?[-+]?{PLAIN})+|0x[0-9a-fA-F]+"
)
"""A number that is not written as one: with a unit, in brackets, with another minus or exponent, or beside another."""
MOST_EXACT = 2**53
"""Integers above this may be equal as numbers of double precision."""
FEW_ROWS, FEW_VALUES = 20, 20
"""With more rows than this, different words in each row say who it is; more different numbers are no categories."""


def spelled_number(cells: Array) -> str:
    """Return the first of many different cells that are numbers, but not written as such; empty for other cells.

    >>> spelled_number(np.array([f"{size / 8} kg" for size in range(30)]))
    '0.0 kg'
    """
    if len(cells) <= FEW_VALUES:
        return ""
    found = [None if is_number(cell) else SPELLED.fullmatch(cell) or cell for cell in map(str, cells)]
    odd = [each for each in found if each is not None]
    if not odd or any(isinstance(each, str) for each in odd):
        return ""
    units = {each["unit"] for each in odd if not isinstance(each, str)}
    return "" if len(units) > 1 else str(cells[[each is not None for each in found].index(True)])


def with_thousands(cells: Array) -> str:
    """Return the first of some cells that is a number with marks of thousands, where all are numbers; else nothing.

    >>> with_thousands(np.array(["500", "1,000", "2,000"]))
    '1,000'
    """
    words = [str(cell) for cell in cells if not is_number(cell)]
    marked = [found for found in map(THOUSANDS.fullmatch, words) if found]
    # Where "1,000" stands beside "0,05", commas stand before decimals.
    points = list(filter(COMMA.fullmatch, words)) if marked and marked[0][1] != "," else []
    return marked[0][0] if marked and all(THOUSANDS.fullmatch(word) or word in points for word in words) else ""


def looks_like_days(numbers: Array) -> bool:
    """Whether numbers are days such as 20240131, of more than two dates."""
    there = numbers[np.isfinite(numbers)]
    if len(np.unique(there)) < 3 or not ((there >= 19000101) & (there <= 20991231) & (there % 1 == 0)).all():
        return False
    month, day = there // 100 % 100, there % 100
    return bool(((month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)).all())


def lose_digits(column: Array, numbers: Array) -> bool:
    """Whether different integers of a column are equal as numbers."""
    if column.dtype.kind == "f":
        return False
    cells = map(str, column[np.isfinite(numbers) & (np.abs(numbers) >= MOST_EXACT)].tolist())
    integers = {int(cell) for cell in cells if re.fullmatch(r"[-+]?\d+", cell)}
    return len(set(map(float, integers))) < len(integers)


def numbers_rows(table: Table, name: str) -> bool:
    """Whether a column says which row it is: all values differ, and its name or its words say so."""
    column = table.columns[name]
    if len(np.unique(column)) < len(column):
        return False
    if (numbers := table.numbers(name)) is None:
        numbers_like = any(map(NUMBERLIKE.fullmatch, column)) or any(map(SIGNED.fullmatch, column))
        numbers_like = numbers_like or bool(with_thousands(np.unique(column[column != ""])))
        numbers_like = numbers_like or table.date(name) is not None or bool(spelled_number(column))
        long = len(column) > FEW_ROWS and not numbers_like
        return bool(NUMBERED.fullmatch(name) or INDEX.fullmatch(name)) or long
    whole = bool((numbers == np.round(numbers)).all())
    return INDEX.fullmatch(name) is not None or (whole and NUMBERED.fullmatch(name) is not None)


def is_called_index(table: Table, name: str) -> bool:
    """Whether a column numbers the rows, and its name says so."""
    return bool(NUMBERED.fullmatch(name) or INDEX.fullmatch(name)) and numbers_rows(table, name)


def counts_rows(table: Table, name: str) -> bool:
    """Whether a column holds the numbers of the rows in their order, from 0 or 1 on, whatever its name."""
    numbers = table.numbers(name)
    if numbers is None or len(numbers) <= FEW_ROWS:
        return False
    return bool(numbers[0] in (0, 1) and (numbers == numbers[0] + np.arange(len(numbers))).all())
