"""`TableModel`: a linear model of a table in two files, from which anybody can compute its predictions."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.special import expit, softmax

from bilevel.core.environment import versions
from bilevel.core.files import read_json, write_whole
from bilevel.core.spelling import suggest
from bilevel.data.columns import Encoder, columns_named, listed
from bilevel.data.roles import target_names
from bilevel.data.sources import load_svmlight
from bilevel.data.table import SVMLIGHT, TABLES, Array, Table, ending, from_frame, is_frame, read_table

FORMAT = 1
ARRAYS = ("weights", "intercept", "mean", "scale")
RECORDED = (
    *("name", "task", "loss", "target", "classes", "features", "columns", "ignored", "separator", "decimal"),
    *("zero_based", "encoding", "formula", "link", "summary", "versions"),
)
"""What model.json holds, in its order; MADE is no attribute, and LATER is missing in older files."""
MADE, LATER = ("features", "columns", "formula", "link"), ("separator", "zero_based", "encoding")
FORMULA = "z = ((X - mean) / scale) @ weights.T + intercept"
LINKS = {
    "Squared": "prediction = z",
    "Huber": "prediction = z",
    "Poisson": "prediction = exp(z)",
    "Logistic": "probability of classes[1] = 1 / (1 + exp(-z)); prediction = the likelier class",
    "SquaredHinge": "prediction = classes[1] where z > 0, else classes[0]",
    "Softmax": "probabilities = exp(z) / sum(exp(z)); prediction = the likeliest class",
}


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of new rows, and what was done to their table, in words.

    There is a column "prediction", of several targets "prediction=TARGET" for each, and of classes with probabilities
    "probability=CLASS" for each.
    """

    columns: Mapping[str, Array]
    notes: tuple[str, ...]

    def to_csv(self) -> str:
        """Return the columns as the text of a .csv file, numbers in all their digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*(column.tolist() for column in self.columns.values()), strict=True))
        return text.getvalue()


@dataclass(frozen=True, eq=False)
class TableModel:
    """A linear model with the way from the columns of a table to its features.

        z = ((X - mean) / scale) @ weights.T + intercept

    Attributes:
        loss: the class name of its loss, which says what z stands for.
        weights: of standardised features, (features,), or (classes, features) or (targets, features).
        encoder: from columns to features.
        classes: what labels stand for, sorted; None for a regression.
        target: the name of the column that is predicted, or those of several.
        ignored: other columns of the training table that are no features.
        summary: how the penalties were chosen, in a sentence.
        decimal, separator, encoding: of the training file, where they were said.
        zero_based: whether the first column of svmlight files is number 0, not 1; None for another training file.
    """

    name: str
    loss: str
    task: str
    weights: Array
    intercept: Array
    mean: Array
    scale: Array
    encoder: Encoder
    classes: tuple[Any, ...] | None
    target: str | tuple[str, ...]
    ignored: tuple[str, ...] = ()
    decimal: str | None = None
    summary: str = ""
    versions: Mapping[str, str | None] = field(default_factory=versions)
    separator: str | None = None
    zero_based: bool | None = None
    encoding: str | None = None

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``model.npz`` and ``model.json`` into a folder, and return both paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = io.BytesIO()
        np.savez(arrays, weights=self.weights, intercept=self.intercept, mean=self.mean, scale=self.scale)
        made: dict[str, Any] = {"features": self.encoder.features, "columns": self.encoder.to_list()}
        made |= {"formula": FORMULA, "link": LINKS[self.loss], "versions": dict(self.versions)}
        record = {key: made[key] if key in made else getattr(self, key) for key in RECORDED}
        files = [folder / "model.npz", folder / "model.json"]
        write_whole(files[0], arrays.getvalue())
        text = json.dumps({"format": FORMAT} | record, indent=2, allow_nan=False, ensure_ascii=False)
        write_whole(files[1], f"{text}\n")
        return files

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the model in a folder, or beside the one of its two files that is named; ValueError for none."""
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        if not path.is_dir() and path.name not in ("model.npz", "model.json"):
            near = sorted(str(file.parent) for file in path.parent.glob("*/model.json"))
            what = f"{path} is no model: name the folder with model.npz and model.json, or one of both"
            raise ValueError(f"{what}{suggest(str(path), near)}")
        record = read_json(folder / "model.json")
        if not isinstance(record, dict) or record.get("loss") not in LINKS:
            inside = sorted(str(file.parent) for file in folder.glob("*/model.json"))
            hint = f": it has {', '.join(inside)}" if inside else ": `bilevel tune` writes one"
            raise ValueError(f"{folder} holds no model.json that bilevel wrote{hint}.")
        if record.get("format") != FORMAT:
            raise ValueError(f"{folder}/model.json is of another version of bilevel: tune again, or install that one.")
        try:
            with np.load(folder / "model.npz", allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in ARRAYS}
            encoder = Encoder.from_list(record["columns"])
            held: dict[str, Any] = {
                key: record.get(key) if key in LATER else record[key] for key in RECORDED if key not in MADE
            }
            held = {key: tuple(value) if isinstance(value, list) else value for key, value in held.items()}
            model = cls(**held, **arrays, encoder=encoder)
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"the model in {folder} cannot be read ({type(error).__name__}): tune again.") from error
        outputs = () if isinstance(model.target, str) else (len(model.target),)
        shape = model.weights.shape
        if shape[-1] != len(encoder.features) or (model.classes is None and shape[:-1] != outputs):
            raise ValueError(f"{folder}/model.npz is not the one that {folder}/model.json describes: tune again.")
        return model

    def predict(self, data: Any, encoding: str | None = None) -> Predictions:
        """Return what the model says of the rows of a file or a data frame, in their order.

        Columns may stand in any order, and others beside them. Missing cells and words are treated as in training. The
        encoding of a text file is that of its byte-order mark, else UTF-8, else that of training, unless it is given.

        Raises:
            ValueError: in one sentence, for a file that is no table, and for a column that is missing.
        """
        if is_frame(data):
            return self._predict_table(from_frame(data))
        source = str(data)
        path, kind = Path(source).expanduser(), ending(source)
        if kind not in (*TABLES, *SVMLIGHT):
            raise ValueError(f"{source!r} is no table: give a .csv, .tsv, .parquet or .svmlight file.")
        if not path.is_file():
            raise ValueError(f"the data file {source!r} does not exist.")
        if kind in TABLES:
            how = (encoding or self.encoding, encoding is not None)
            return self._predict_table(read_table(source, path, self.separator, self.decimal, *how))
        return self._predict_svmlight(source, path)

    def _predict_svmlight(self, source: str, path: Path) -> Predictions:
        features = len(self.mean)
        notes: tuple[str, ...] = ()
        X, _, zero_based = load_svmlight(source, path, self.zero_based)
        if X.shape[1] > features:
            has = f"it has {X.shape[1]}, the first of which is column {0 if zero_based else 1}"
            raise ValueError(f"{source!r} does not fit the {features} features of the model: {has}.")
        if self.zero_based is None and not zero_based and X.shape[1] < features:
            notes = ("no row has a column 0: 1 is taken for the first, as the model was not made of such a file",)
        X.resize(X.shape[0], features)
        coef = self.weights / self.scale
        return Predictions(self.of_scores(X @ coef.T + (self.intercept - coef @ self.mean)), notes)

    def _predict_table(self, table: Table) -> Predictions:
        X, notes = self.encoder.transform(table)
        known = {*(rule.name for rule in self.encoder.rules), *target_names(self.target), *self.ignored}
        if extra := [name for name in table.columns if name not in known]:
            notes.append(f"the model does not know {columns_named(extra)}: left out")
        of_numbers = [rule.name for rule in self.encoder.rules if rule.categories is None]
        if commas := [name for name in of_numbers if table.has_decimal_commas(name)]:
            notes.append(f"decimal commas are read in {listed(commas)}")
        z = ((X - self.mean) / self.scale) @ self.weights.T + self.intercept
        return Predictions(self.of_scores(z), (*table.notes, *notes))

    def of_scores(self, z: Array) -> dict[str, Array]:
        """Return the columns of predictions of scores z, (rows,), or (rows, classes) or (rows, targets)."""
        if not isinstance(self.target, str):
            return {f"prediction={name}": z[:, index] for index, name in enumerate(self.target)}
        if self.classes is None:
            return {"prediction": np.exp(z) if self.loss == "Poisson" else z}
        classes = np.array(self.classes, dtype=object)
        if self.loss == "Softmax":
            shares = softmax(z, axis=1)
            columns = {"prediction": classes[z.argmax(1)]}
        else:
            columns = {"prediction": classes[(z > 0).astype(int)]}
            if self.loss == "SquaredHinge":
                return columns
            shares = np.stack([expit(-z), expit(z)], axis=1)
        return columns | {f"probability={name}": shares[:, index] for index, name in enumerate(self.classes)}
