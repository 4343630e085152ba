"""What is done to raw data before they are handed out: labels become indices, splits, wrong labels, standardization."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bilevel.core.options import check_sizes
from bilevel.core.status import warn
from bilevel.data.columns import Encoder, listed
from bilevel.data.roles import target_names
from bilevel.data.sources import Array, Raw

MAX_CLASSES = 20
"""Where nobody says what they are, integer targets with at most this many distinct values are labels."""
TASKS = ("regression", "classification", "raw")


def encode(raw: Raw, task: str | None, doubt: str = "warn") -> tuple[Raw, Array | None, str]:
    """Return the data with X in float64 and targets as a task needs them, the sorted labels (or None), and the task.

    "regression" needs targets in float64, "classification" labels 0, 1, ... in sorted order, "raw" numbers as they are;
    None stands for whichever of the first two the targets look like. `doubt` says what becomes of integers that may be
    either: "warn", "note" or "ignore".

    Raises:
        ValueError: for targets that the task cannot use, for one class or one number alone, and for a label that
            training lacks.
    """
    targets = np.concatenate([y for _, y in raw.parts.values()])
    if targets.ndim == 2 and task == "classification":
        several = f"{raw.source!r} has {targets.shape[1]} targets, which are a regression of numbers"
        raise ValueError(f"{several}: name one target of classes.")
    labels, kind = np.unique(targets), targets.dtype.kind
    words = kind == "U"
    parts = raw.parts
    if raw.columns is None:
        parts = {part: (X.astype(np.float64), y) for part, (X, y) in parts.items()}
    if task is None:
        few = kind in "iu" and len(labels) <= MAX_CLASSES and targets.ndim == 1
        either = few or words or (kind == "b" and targets.ndim == 1)
        task = "classification" if either else "regression"
        if few and len(labels) > 2 and raw.is_file:
            raw = _doubted(raw, len(labels), doubt)
        elif raw.is_file and doubt == "note" and targets.ndim == 1 and _are_whole(labels):
            whole = f"the {len(labels)} different numbers of the target are whole"
            note = f"{whole}: say `task: classification` in `data` if they are classes, else `task: regression`"
            raw = replace(raw, notes=(*raw.notes, note))
    if task != "classification":
        if words:
            wrong = f"the target of {raw.source!r} holds strings ({str(labels[0])!r}), but the task is {task!r}"
            raise ValueError(f"{wrong}: encode them as numbers, or take a problem of classes.")
        if task == "raw":
            return replace(raw, parts=parts), None, task
        parts = {part: (X, y.astype(np.float64)) for part, (X, y) in parts.items()}
        return replace(raw, parts=parts, notes=(*raw.notes, *_of_numbers(raw, targets))), None, task
    if kind == "f" and (labels != np.round(labels)).any():
        wrong = f"the target of {raw.source!r} holds {labels[labels != np.round(labels)][0]:g}, which is no class label"
        raise ValueError(f"{wrong}: a regression target?")
    if len(labels) < 2:
        raise ValueError(f"the target of {raw.source!r} holds one class only ({labels[0]}): nothing to separate.")
    if "train" in raw.parts:
        unseen = np.setdiff1d(labels, raw.parts["train"][1])
        if len(unseen):
            raise ValueError(f"y_train of {raw.source!r} lacks the label {unseen[0]} that another part holds.")
    parts = {part: (X, np.searchsorted(labels, y)) for part, (X, y) in parts.items()}
    return replace(raw, parts=parts), labels, task


def _are_whole(values: Array) -> bool:
    """Whether numbers with decimals are whole and few, as labels are where a column has had missing ones."""
    return values.dtype.kind == "f" and len(values) <= MAX_CLASSES and bool((values == np.round(values)).all())


def _doubted(raw: Raw, count: int, doubt: str) -> Raw:
    """Return the data, with a warning or a note that some integers are taken for labels."""
    taken = f"the {count} different integers of the target of {raw.source!r} are taken for class labels"
    if doubt == "warn":
        text = f"{taken}: say task='classification', or task='regression' where they are numbers."
        warn(text)
    if doubt != "note":
        return raw
    note = f"{taken}: say `task: regression` in `data` where they are numbers, else `task: classification`"
    return replace(raw, notes=(*raw.notes, note))


def _of_numbers(raw: Raw, targets: Array) -> list[str]:
    """Return a note on different integers of a regression target that become equal numbers; refuse a constant one."""
    notes = []
    for name, column in zip(target_names(raw.target), targets.reshape(len(targets), -1).T, strict=True):
        values = np.unique(column)
        called = "the target" if targets.ndim == 1 else f"the target {name!r}"
        if len(values) == 1 and len(targets) > 1:
            constant = f"{called} of {raw.source!r} is {float(values[0]):g} in every row"
            raise ValueError(f"{constant}: nothing to learn, name another column.")
        if len(np.unique(values.astype(np.float64))) < len(values):
            equal = f"different integers of {called} become equal, as they need more than 53 bits"
            notes.append(f"{equal}: take differences")
    return notes


def without_rare(raw: Raw, labels: Array, least: int) -> tuple[Raw, Array]:
    """Return the data and their labels without the rows of classes that have fewer rows than `least`.

    A class stays where fewer than two would be left, where a file brings its own parts, and where more than a tenth of
    the rows would go: such targets are hardly labels.
    """
    if "" not in raw.parts:
        return raw, labels
    X, y = raw.parts[""]
    members = np.bincount(y, minlength=len(labels))
    few = np.flatnonzero(members < least)
    if not len(few) or len(labels) - len(few) < 2 or 10 * members[few].sum() > len(y):
        return raw, labels
    keep = ~np.isin(y, few)
    named = ", ".join(f"{labels[each]!s} ({members[each]})" for each in few[:4])
    named += f" and {len(few) - 4} more" if len(few) > 4 else ""
    stay = np.delete(np.arange(len(labels)), few)
    note = f"the rows of classes with fewer than {least} rows are left out: {named}"
    parts = {"": (X[keep], np.searchsorted(stay, y[keep]))}
    return replace(raw, parts=parts, notes=(*raw.notes, note)), labels[stay]


def filled(raw: Raw) -> Raw:
    """Return the data of a table with its features, fitted on the training part, in place of the rows' numbers."""
    if (columns := raw.columns) is None:
        return raw
    rows = {part: X[:, 0] for part, (X, _) in raw.parts.items()}
    encoder = Encoder.fit(columns.table, columns.features, rows["train"])
    X, notes = encoder.transform(columns.table)
    check_sizes(X, repr(raw.source), encoder.owners)
    constant = [name for name, column in zip(encoder.features, X[rows["train"]].T, strict=True) if np.ptp(column) == 0]
    if constant:
        notes.append(f"{listed(constant)} {'is' if len(constant) == 1 else 'are'} constant: no influence")
    return replace(
        raw,
        parts={part: (X[index], raw.parts[part][1]) for part, index in rows.items()},
        feature_names=encoder.features,
        notes=(*raw.notes, *notes),
        weights=None if columns.weights is None else columns.weights[rows["train"]],
        encoder=encoder,
    )


def how_split(raw: Raw, labels: Array | None, ordered: bool, seed: int) -> str:
    """Return how rows are split, in words."""
    if ordered:
        return "split in the order of the rows"
    if raw.groups is not None:
        return f"whole groups, split with seed {seed}"
    return f"{'split' if labels is None else 'stratified'} with seed {seed}"


def in_words(task: str, labels: Array | None) -> str:
    """Return the targets in words: classes with the strings that they stand for."""
    if labels is None:
        return "y as it came" if task == "raw" else task
    named = labels.dtype.kind == "U" and len(labels) <= 5
    return f"{len(labels)} classes" + (f" ({', '.join(' '.join(label.split()) for label in labels)})" if named else "")


def split(
    raw: Raw, labels: Array | None, seed: int, validation: float, test: float, ordered: bool = False
) -> dict[str, tuple[Array, Array]]:
    """Return the parts of a seeded split of data without parts, stratified by the labels of a classification.

    `validation` and `test` are fractions of the rows; without the latter there is no such part. Where the data have
    groups, whole groups go to the parts; with `ordered` the parts are blocks of rows, the last of them the test part.

    Raises:
        ValueError: if a part would lack rows, or rows of a class.
    """
    from sklearn.model_selection import train_test_split  # slow to import, and a command may need no data

    X, y = raw.parts[""]
    count = len(y)
    sizes = {"train": count, "val": round(validation * count), "test": round(test * count)}
    sizes["train"] -= sizes["val"] + sizes["test"]
    sizes = {part: size for part, size in sizes.items() if part == "train" or (validation, test)[part == "test"]}
    if ordered or raw.groups is not None:
        return _blocks(raw, labels, sizes, None if ordered else np.random.default_rng(seed))
    shown = "/".join(map(str, sizes.values()))
    many = "" if labels is None or len(labels) <= MAX_CLASSES else " (or is it a regression target?)"
    least = 1 if labels is None else len(labels)
    if min(sizes.values()) < least:
        each = "a row" if labels is None else f"a row of every class, {least} in all"
        what = f"{raw.source!r} has too few rows ({count}, split {shown} into {'/'.join(sizes)})"
        raise ValueError(f"{what}: each part needs {each}{many}.")
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


def _blocks(
    raw: Raw, labels: Array | None, sizes: dict[str, int], rng: np.random.Generator | None
) -> dict[str, tuple[Array, Array]]:
    """Return parts of whole groups in a random order, or without a generator of rows as they stand."""
    X, y = raw.parts[""]
    groups = raw.groups
    names, owner = np.unique(np.arange(len(y)) if rng is None or groups is None else groups, return_inverse=True)
    place = np.arange(len(names)) if rng is None else rng.permutation(len(names))
    order = np.argsort(place[owner], kind="stable")
    # A group belongs to the part in which its first row stands.
    first = np.searchsorted(place[owner][order], np.arange(len(names)))
    ends = np.cumsum(list(sizes.values()))
    part_of = np.searchsorted(ends, first, side="right")[place[owner]]
    parts = {part: (X[part_of == index], y[part_of == index]) for index, part in enumerate(sizes)}
    what = "groups" if rng is not None else "rows"
    for part, (_, targets) in parts.items():
        if not len(targets):
            raise ValueError(f"{raw.source!r} has too few {what} ({len(names)}): none is left for the part {part!r}.")
    if labels is not None:
        lacking = np.setdiff1d(np.arange(len(labels)), parts["train"][1])
        if len(lacking):
            raise ValueError(
                f"the training part of {raw.source!r} has no row of the class {labels[lacking[0]]}, as it is made of "
                f"{'whole groups' if rng is not None else 'the first rows'}: take `split: random`, or fewer parts."
            )
    return parts


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
        numbers = f"{raw.source!r} has a regression target"
        raise ValueError(f"`corrupted` replaces labels by other classes, but {numbers}: leave it out.")
    X, y = raw.parts["train"]
    # A stream of its own: the split is drawn from the seed as well.
    random = np.random.default_rng((seed, 1))
    rows = random.permutation(len(y))[: round(share * len(y))]
    if not len(rows):
        raise ValueError(f"`corrupted` of {share:g} replaces none of the {len(y)} training labels of {raw.source!r}.")
    wrong = y.copy()
    wrong[rows] = (y[rows] + random.integers(1, len(labels), len(rows))) % len(labels)
    return replace(raw, parts=raw.parts | {"train": (X, wrong)}), wrong != y
