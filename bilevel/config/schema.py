"""The form of a config file, for pydantic; what the named classes take is checked in `build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bilevel.config.document import ConfigError, listed, shown
from bilevel.core.options import meant, suggest
from bilevel.outer import OuterOptions

Spec = dict[str, Any] | str
"""``{class: Name, **options}``, or the bare name."""

Named = Annotated[dict[Annotated[str, Field(min_length=1)], Spec], Field(min_length=1)]


SPECS = ("solver", "outer.scheduler", "outer.constraints", "tuning.solver", "tuning.estimator")
UNROLLED = frozenset({"solver", "estimators", "outer", "tuning", "budget", "batch", "experiment"})
"""Keys of which each one makes a config one of hypergradients."""
PLAIN = {
    "int_type": "an int",
    "int_from_float": "an int",
    "float_type": "a number",
    "bool_type": "true or false",
    "model_type": "a mapping (`key: value` lines)",
    "too_short": "a list of at least one value",
    "too_long": "a list of one value",
    "list_type": "a list",
    "string_type": "a string",
}
"""Types of pydantic's errors, in the words of a config."""


Form = TypeVar("Form", bound=BaseModel)


def _unique(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("must not repeat a seed")
    return seeds


class WarmStartForm(BaseModel):
    """The form of ``outer.warm_start`` when its parts are switched one by one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    state: bool = True
    adjoint: bool = True


class OuterForm(BaseModel):
    """The form of ``outer``: the fields of `OuterOptions`; further keys are options of the torch optimizer."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    optimizer: str = "Adam"
    steps: Annotated[int, Field(ge=1)] = OuterOptions.steps
    scheduler: Spec | None = None
    constraints: Spec | None = None
    warm_start: bool | WarmStartForm = True
    certify: bool = False
    target_error: Annotated[float, Field(gt=0, lt=1)] | None = None
    schedule: dict[str, Any] | str | None = None
    tol: Annotated[float, Field(gt=0)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    min_progress: Annotated[float, Field(ge=0)] = 0.0


class TuningForm(BaseModel):
    """The form of ``tuning``: what tunes the problems of a comparison after it, beside its own outer method."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    solver: Spec
    estimator: Spec
    outer: OuterForm


class NamedForm(BaseModel):
    """What the forms of all configs have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    problems: Named


class ConfigForm(NamedForm):
    """The form of a config file."""

    solver: Spec
    estimators: Named
    outer: OuterForm = Field(default_factory=OuterForm)
    tuning: TuningForm | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_unique)] = [0]
    budget: Annotated[float, Field(gt=0)] | None = None
    batch: Literal["auto", False] = False
    device: str = "auto"


def tunes_by_folds(document: Mapping[str, Any]) -> bool:
    """Whether a config is tuned by folds: it names problems, and nothing of solvers, estimators and outer loops."""
    return "problems" in document and not UNROLLED & set(document)


def check_form(document: dict[str, Any], form: type[Form]) -> Form:
    """Return the config in its form; the first thing that does not fit is refused, without the file's name."""
    try:
        return form.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_sentence(error, document, form)) from None


def _sentence(error: ValidationError, document: dict[str, Any], whole: type[BaseModel]) -> str:
    """Return the first error of pydantic about a document as one sentence; `whole`: the form of the document."""
    # An unknown key says more than a missing one: it is usually the missing one, misspelt. No estimators say more yet:
    # without the key the others may be known.
    kinds = ("too_short", "extra_forbidden")
    errors = sorted(error.errors(), key=lambda each: kinds.index(each["type"]) if each["type"] in kinds else len(kinds))
    first = errors[0]
    keys = _path_in(document, first["loc"])
    path, given = ".".join(map(str, keys)), shown(first["input"])
    if first["type"] == "extra_forbidden":
        form = whole
        if keys[:-1]:
            form = TuningForm if keys == ["tuning", keys[-1]] else WarmStartForm
        owner = f"`{'.'.join(map(str, keys[:-1]))}`" if keys[:-1] else "the config"
        allowed = form.model_fields
        return f"`{path}` is not a key of {owner} ({listed(allowed)}){suggest(str(keys[-1]), allowed)}"
    if first["type"] == "missing":
        if keys[:-1]:
            return f"`{'.'.join(map(str, keys[:-1]))}` lacks the key `{keys[-1]}`."
        return f"the config lacks the key `{path}` (it has {listed(document)})."
    if path.startswith(("problems.", "estimators.")) or path in SPECS:
        return f"`{path}` must be of the form {{class: Name, option: value, ...}}, got {given}."
    if path.endswith("outer.warm_start"):
        return f"`{path}` must be true, false or {{state: true or false, adjoint: true or false}}, got {given}."
    if path == "name":
        return f"`name` must be a string of letters, digits and . _ -, as it names a folder, got {given}."
    if path in ("problems", "estimators"):
        end = ", or be left out to tune by folds" if path == "estimators" else ""
        return f"`{path}` must hold at least one `name: {{class: Name, ...}}`{end}, got {given}."
    if first["type"] in PLAIN:
        return f"`{path}` must be {PLAIN[first['type']]}, got {given}."
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("List should", "must")
    for theirs, ours in (("valid ", ""), ("greater than or equal to", "at least"), ("dictionary", "mapping")):
        reason = reason.replace(theirs, ours)
    return f"`{path}` {reason[0].lower()}{reason[1:]}, got {given}{meant(first['input'], reason)}"


def _path_in(document: Any, location: Sequence[Any]) -> list[Any]:
    """Return the part of pydantic's location that exists in the document: it also names the members of unions."""
    keys: list[Any] = []
    for depth, key in enumerate(location):
        inside = isinstance(document, dict) and key in document
        if inside or (isinstance(document, list) and isinstance(key, int)):
            document = document[key]
            keys.append(key)
        elif depth == len(location) - 1 and isinstance(document, dict):
            keys.append(key)
    return keys
