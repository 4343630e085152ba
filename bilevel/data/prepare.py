"""What is done to raw data before they are handed out: labels become indices, splits, wrong labels, standardization."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from bilevel.core.status import BilevelWarning
from bilevel.data.sources import Array, Raw

MAX_CLASSES = 20
"""Where nobody says what they are, integer targets with at most this many distinct values are labels."""
TASKS = ("regression", "classification", "raw")


def encode(raw: Raw, task: str | None, warn: bool = True) -> tuple[Raw, Array | None, str]:
    """Return the data with X in float64 and targets as a task needs them, the sorted labels (or None), and the task.

    "regression" needs targets in float64, "classification" labels 0, 1, ... in sorted order, "raw" numbers as they are;
    None stands for whichever of the first two the targets look like, with a warning where integers may be either.

    Raises:
        ValueError: for targets that the task cannot use, for one class alone, and for a label that training lacks.
    """
    targets = np.concatenate([y for _, y in raw.parts.values()])
    labels, kind = np.unique(targets), targets.dtype.kind
    words = kind == "U"
    parts = {part: (X.astype(np.float64), y) for part, (X, y) in raw.parts.items()}
    if task is None:
        few = kind in "iu" and len(labels) <= MAX_CLASSES
        task = "classification" if few or words or kind == "b" else "regression"
        if few and len(labels) > 2 and raw.is_file and warn:
            warnings.warn(
                f"the {len(labels)} different integers of the target of {raw.source!r} are taken for class labels: say "
                "task='classification', or task='regression' where they are numbers.",
                BilevelWarning,
                stacklevel=4,
            )
    if task != "classification":
        if words:
            raise ValueError(
                f"the target of {raw.source!r} holds strings ({str(labels[0])!r}), but the task is {task!r}: encode "
                "them as numbers, or take a problem of classes."
            )
        parts = {part: (X, y.astype(np.float64) if task == "regression" else y) for part, (X, y) in parts.items()}
        return replace(raw, parts=parts), None, task
    if kind == "f" and (labels != np.round(labels)).any():
        raise ValueError(
            f"the target of {raw.source!r} holds {labels[labels != np.round(labels)][0]:g}, which is no class label: a "
            "regression target?"
        )
    if len(labels) < 2:
        raise ValueError(f"the target of {raw.source!r} holds one class only ({labels[0]}): nothing to separate.")
    if "train" in raw.parts:
        unseen = np.setdiff1d(labels, raw.parts["train"][1])
        if len(unseen):
            raise ValueError(f"y_train of {raw.source!r} lacks the label {unseen[0]} that another part holds.")
    parts = {part: (X, np.searchsorted(labels, y)) for part, (X, y) in parts.items()}
    return replace(raw, parts=parts), labels, task


def split(raw: Raw, labels: Array | None, seed: int, validation: float, test: float) -> dict[str, tuple[Array, Array]]:
    """Return the parts of a seeded split of data without parts, stratified by the labels of a classification.

    `validation` and `test` are fractions of the rows; without the latter there is no such part.

    Raises:
        ValueError: if a part would lack rows, or rows of a class.
    """
    from sklearn.model_selection import train_test_split  # slow to import, and a command may need no data

    X, y = raw.parts[""]
    count = len(y)
    sizes = {"train": count, "val": round(validation * count), "test": round(test * count)}
    sizes["train"] -= sizes["val"] + sizes["test"]
    if test == 0:
        del sizes["test"]
    shown = "/".join(map(str, sizes.values()))
    many = "" if labels is None or len(labels) <= MAX_CLASSES else " (or is it a regression target?)"
    least = 1 if labels is None else len(labels)
    if min(sizes.values()) < least:
        each = "a row" if labels is None else f"a row of every class, {least} in all"
        raise ValueError(
            f"{raw.source!r} has too few rows ({count}, split {shown} into {'/'.join(sizes)}): each part needs {each}"
            f"{many}."
        )
    thin = ""
    if labels is not None:
        members = np.bincount(y)
        thin = (
            f"the class {labels[members.argmin()]} of {raw.source!r} has too few rows ({members.min()}) for a "
            f"stratified split of {count} rows {shown} into {'/'.join(sizes)}: each part needs one of them"
            f"{many}."
        )
        if members.min() < len(sizes):
            raise ValueError(thin)
    parts = {}
    rest = np.arange(count)
    for part in list(sizes)[:0:-1]:
        strata = None if labels is None else y[rest]
        try:
            rest, parts[part] = train_test_split(rest, test_size=sizes[part], random_state=seed, stratify=strata)
        except ValueError as error:
            raise ValueError(thin) from error
    if labels is not None and len(np.unique(y[rest])) < len(labels):
        raise ValueError(thin)
    rows = {"train": rest} | dict(reversed(parts.items()))
    return {part: (X[index], y[index]) for part, index in rows.items()}


def standardized(raw: Raw, centre: bool) -> Raw:
    """Return the data with X standardized and, on demand, y centred, by statistics of the training part."""
    from sklearn.preprocessing import StandardScaler  # slow to import, and a command may need no data

    X_train, y_train = raw.parts["train"]
    scaler = StandardScaler().fit(X_train)
    middle = y_train.mean() if centre else 0
    parts = {part: (scaler.transform(X), y - middle) for part, (X, y) in raw.parts.items()}
    return replace(raw, parts=parts, truth=None if raw.truth is None else raw.truth * scaler.scale_)


def corrupt(raw: Raw, labels: Array | None, share: float, seed: int) -> tuple[Raw, Array]:
    """Return the data with a share of the training labels replaced, and a bool array that is true for those rows.

    Of the n training rows ``round(share n)``, drawn without replacement, get one of the other classes with equal
    probability.

    Raises:
        ValueError: for a regression target, which has no other class, and for a share of less than half a row.

    >>> X, y = np.zeros((4, 1)), np.array([0, 1, 2, 0])
    >>> wrong, where = corrupt(Raw("demo", {"train": (X, y)}, ("x",)), np.arange(3), share=0.5, seed=0)
    >>> int(where.sum()), bool(((wrong.parts["train"][1] != y) == where).all())
    (2, True)
    """
    if labels is None:
        raise ValueError(
            f"`corrupted` replaces labels by other classes, but {raw.source!r} has a regression target: leave it out."
        )
    X, y = raw.parts["train"]
    # A stream of its own: the split is drawn from the seed as well.
    random = np.random.default_rng((seed, 1))
    rows = random.permutation(len(y))[: round(share * len(y))]
    if not len(rows):
        raise ValueError(f"`corrupted` of {share:g} replaces none of the {len(y)} training labels of {raw.source!r}.")
    wrong = y.copy()
    wrong[rows] = (y[rows] + random.integers(1, len(labels), len(rows))) % len(labels)
    return replace(raw, parts=raw.parts | {"train": (X, wrong)}), wrong != y
