"""A config without a solver: linear models of data, tuned by folds with a guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Field

from bilevel import data
from bilevel.config.build import PROBLEM, check_data, data_source, located, split_spec
from bilevel.config.document import ConfigError, inside, listed, read_document, shown
from bilevel.config.imports import importing
from bilevel.config.load import choose_device
from bilevel.config.schema import NamedForm, check_form, tunes_by_folds
from bilevel.core.options import is_number, require_value, suggest
from bilevel.data.load import Rows, load_rows
from bilevel.data.table import TableOptions
from bilevel.problems import (
    HuberProblem,
    LogisticProblem,
    PoissonProblem,
    RidgeProblem,
    SoftmaxProblem,
    SquaredHingeProblem,
)
from bilevel.problems.losses import GLMLoss, Huber
from bilevel.tables import ALIASES, PENALTIES, FoldOptions

TUNED = (RidgeProblem, LogisticProblem, SoftmaxProblem, PoissonProblem, HuberProblem, SquaredHingeProblem)
"""Problems that are nothing but a loss and quadratic penalties."""
KEYS = ("class", "data", "penalty", "groups", "class_weight")
"""Of a problem."""
SYNTHETIC = ("rows", "features", "noise")
OPTIONS = frozenset({"name", "test", *SYNTHETIC, *TableOptions.__dataclass_fields__})


class FoldsForm(NamedForm):
    """The form of a config without a solver."""

    criterion: Literal["auto", "loo", "alo", "kfold", "holdout"] = "auto"
    # YAML reads a bare off as false.
    guard: Annotated[
        Literal["auto", "best", "one_se", "off"], BeforeValidator(lambda word: "off" if word is False else word)
    ] = "auto"
    honest: Literal["auto", "nested", "alo"] = "auto"
    folds: Annotated[int, Field(ge=2)] = 5
    kappa: Annotated[float, Field(gt=0)] | None = None
    beside: Literal["scikit-learn"] | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1)] = Field([0])
    device: str = "cpu"


@dataclass(frozen=True)
class TableSetup:
    """One problem of such a config: its data, the loss of a row (None: by the targets), and how it is tuned."""

    rows: Rows
    loss: GLMLoss | None
    options: FoldOptions


@dataclass(frozen=True)
class FoldsPlan:
    """A checked config without a solver: its name, its problems by name, and the checked document."""

    name: str
    problems: Mapping[str, TableSetup]
    config: Mapping[str, Any]


def load_folds(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    seed: int | None = None,
    jobs: int = 1,
    allow_import: bool = False,
) -> FoldsPlan | None:
    """Return the plan of a config without a solver, with its data read; None for another config."""
    path = Path(path)
    document = {"name": path.stem} | read_document(path, overrides)
    if not tunes_by_folds(document):
        return None
    with inside(f"{path}: "), importing(allow_import, path.parent):
        form = check_form(document, FoldsForm)
        form.device = choose_device(device or form.device)
        form.seeds = form.seeds if seed is None else [seed]
        problems = {name: _problem(spec, f"problems.{name}", form, jobs) for name, spec in form.problems.items()}
        return FoldsPlan(form.name, problems, form.model_dump())


def _problem(spec: Any, path: str, form: FoldsForm, jobs: int) -> TableSetup:
    """Read the data of a problem, and look at its options."""
    given = dict(spec) if isinstance(spec, dict) else {"class": spec}
    owner: Any = None
    if "class" in given:
        owner, given = split_spec(given, PROBLEM, path)
    source, penalty = data_source(given.pop("data", None), f"{path}.data"), given.pop("penalty", FoldOptions.penalty)
    groups, class_weight = given.pop("groups", None), given.pop("class_weight", None)
    penalty = ALIASES.get(penalty, penalty) if isinstance(penalty, str) else penalty
    if owner is not None and "task" in source:
        raise ConfigError(f"`{path}.data.task` is not given here, but by the problem class: leave one of both out.")
    loss = _loss(owner, given, path)
    if penalty not in PENALTIES:
        hint = suggest(str(penalty), (*PENALTIES, *ALIASES))
        raise ConfigError(f"`{path}.penalty` must be {' or '.join(map(repr, PENALTIES))}, got {shown(penalty)}{hint}")
    try:
        _check_mappings(path, groups, class_weight)
        hints = get_type_hints(data.load)
        skip = frozenset(hints) - OPTIONS - {"task"}
        source, targets, scaled = _without_others(source, f"{path}.data")
        options = check_data(source, f"{path}.data", skip, others=("standardize",))
        name, test, task = (options.pop(key, value) for key, value in (("name", ""), ("test", 0.0), ("task", None)))
        synthetic = {key: options.pop(key, None) for key in SYNTHETIC}
        table = TableOptions(**options | targets)
        task = task if owner is None else owner.task
        rows = load_rows(name, table, task=task, test=test, seed=form.seeds[0], **synthetic)
        if rows.y.ndim == 2 and owner not in (None, RidgeProblem):
            raise ValueError(f"{rows.name!r} has {rows.y.shape[1]} targets, which `class: RidgeProblem` alone takes.")
    except ConfigError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(located(error, path)) from error
    how = FoldOptions(
        penalty=penalty,
        groups=groups,
        class_weight=class_weight,
        standardize=scaled,
        **{key: getattr(form, key) for key in ("criterion", "guard", "honest", "folds", "kappa", "beside", "device")},
        seed=form.seeds[0],
        jobs=jobs,
    )
    return TableSetup(rows, loss, how)


def _without_others(source: dict[str, Any], path: str) -> tuple[dict[str, Any], dict[str, list[str]], bool | str]:
    """Return options of data without those that `data.load` takes otherwise, and these: targets, and `standardize`."""
    source = dict(source)
    scaled, target = source.pop("standardize", FoldOptions.standardize), source.get("target")
    require_value(f"{path}.standardize", scaled, "'auto', true or false", scaled in ("auto", True, False))
    if not isinstance(target, list):
        return source, {}, scaled
    fine = bool(target) and all(isinstance(column, str) for column in target)
    require_value(f"{path}.target", target, "a column, or a list of columns", fine)
    return source, {"target": source.pop("target")}, scaled


def _check_mappings(path: str, groups: Any, class_weight: Any) -> None:
    """Refuse groups that are not lists of columns by name, and weights that are no positive numbers by class."""
    lists = isinstance(groups, dict) and all(
        isinstance(each, list) and each and all(isinstance(column, str) for column in each) for each in groups.values()
    )
    require_value(f"{path}.groups", groups, "lists of columns by the names of groups", groups is None or bool(lists))
    numbers = isinstance(class_weight, dict) and all(is_number(w) and w > 0 for w in class_weight.values())
    fine = class_weight is None or class_weight == "balanced" or numbers
    require_value(f"{path}.class_weight", class_weight, "'balanced' or positive numbers by class", fine)


def _loss(owner: type[Any] | None, given: dict[str, Any], path: str) -> GLMLoss | None:
    """Return the loss of a problem class; None where none is named."""
    if owner is None:
        if given:
            key = next(iter(given))
            raise ConfigError(
                f"`{path}.{key}` is not an option of a problem without a class ({listed(KEYS)}){suggest(key, KEYS)}"
            )
        return None
    if owner not in TUNED:
        what = f"`{path}.class` is {owner.__name__}, which no folds tune ({listed(each.__name__ for each in TUNED)})"
        raise ConfigError(f"{what}: name a `solver` and `estimators`, which do it by hypergradients.")
    width = given.pop("width", None)
    if given:
        key = next(iter(given))
        hint = suggest(key, KEYS)
        if hint == ".":
            hint = ": the search needs no start; other options need a `solver` and `estimators`."
        raise ConfigError(f"`{path}.{key}` is not an option where folds are tuned ({listed(KEYS)}){hint}")
    try:
        loss = Huber(**({} if width is None else {"width": width})) if owner is HuberProblem else owner.glm
    except (ValueError, TypeError) as error:
        raise ConfigError(located(error, path)) from error
    if width is not None and owner is not HuberProblem:
        raise ConfigError(f"`{path}.width` is not an option of {owner.__name__}: leave it out.")
    return loss
