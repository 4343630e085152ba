"""``{class: Name, **options}`` -> an object of an exported class, with every option checked against its type.

There is no table of names: a class can be named because it is exported by the package of its kind.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from bilevel import data, hypergrad, inner, linear, meta, outer, problems
from bilevel.base import InnerSolver, LinearSolver
from bilevel.config.document import ConfigError, listed, shown
from bilevel.config.imports import imported
from bilevel.core.options import first_line, meant, suggest
from bilevel.core.tracebacks import told
from bilevel.engine.estimator import HypergradEstimator
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer import StochasticMethod
from bilevel.outer.search import OuterSearch

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Kind:
    """What a class in a config may be: exported by `modules`, of a base class, in words `name` with its article.

    `words` stand for a choice among the classes.
    """

    name: str
    base: type | tuple[type, ...]
    modules: tuple[types.ModuleType, ...]
    exclude: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def classes(self) -> dict[str, type]:
        """Return the exported classes of this kind that can be made."""
        return {
            name: value
            for module in self.modules
            for name, value in sorted(vars(module).items())
            if isinstance(value, type) and issubclass(value, self.base) and not _abstract(value, self.base)
            if not name.startswith("_") and name not in self.exclude
        }


SOLVER = Kind("an inner solver", InnerSolver, (inner,))
# Stochastic methods have a loop of their own, and stand beside estimators in a comparison.
ESTIMATOR = Kind(
    "a hypergradient estimator", (HypergradEstimator, StochasticMethod), (hypergrad, outer), words=("auto",)
)
LINEAR_SOLVER = Kind("a linear solver", LinearSolver, (linear,))
# Left out: what takes a module and functions, and the base of linear models, which has no loss.
PROBLEM = Kind("a problem", BilevelProblem, (problems, meta), ("MetaProblem", "LinearModelProblem"))
# Left out: those that need a closure, sparse gradients or matrices; and those that need functions, metrics or others.
OPTIMIZER = Kind(
    "a torch optimizer or an outer search",
    (torch.optim.Optimizer, OuterSearch),
    (torch.optim, outer),
    ("LBFGS", "SparseAdam", "Muon"),
    ("auto",),
)
SCHEDULER = Kind(
    "a torch learning-rate scheduler",
    torch.optim.lr_scheduler.LRScheduler,
    (torch.optim.lr_scheduler,),
    ("ChainedScheduler", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau", "SequentialLR"),
)
KINDS = (SOLVER, ESTIMATOR, LINEAR_SOLVER, PROBLEM, OPTIMIZER, SCHEDULER)


def _abstract(value: type, base: type | tuple[type, ...]) -> bool:
    # Not every base is an ABC, so abstract methods are looked for by hand.
    return (
        value is base
        or (isinstance(base, tuple) and value in base)
        or any(getattr(getattr(value, n, None), "__isabstractmethod__", False) for n in dir(value))
    )


def find_class(name: Any, kind: Kind, path: str) -> type:
    """Return the exported class of a name, or where it is allowed the class that ``module:Class`` names."""
    if isinstance(name, str) and ":" in name:
        return imported(name, kind.base, kind.name, path)
    classes = kind.classes()
    if isinstance(name, str) and name in classes:
        return classes[name]
    # One name may stand for two classes (`Adam` is an inner solver and an optimizer): only the wanted kind counts.
    other = next((k.name for k in KINDS if isinstance(name, str) and name in k.classes()), None)
    allowed = [*kind.words, *classes]
    hint = f", which is {other}." if other else suggest(str(name), allowed)
    raise ConfigError(f"`{path}` must be {kind.name} ({listed(allowed)}), got {shown(name)}{hint}")


def options_of(owner: Callable[..., Any], exclude: frozenset[str] = frozenset()) -> dict[str, tuple[Any, Any]]:
    """Return the type and the default of every option of a class or function; `REQUIRED` for no default."""
    function = owner.__init__ if isinstance(owner, type) else owner  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(owner if dataclasses.is_dataclass(owner) else function)
    except NameError:
        # Some of torch's annotations name what is imported for type checkers alone; such options are not checked here.
        hints = {}
    return {
        name: (hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(owner).parameters.items()
        if name not in exclude and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def check_options(
    owner: Callable[..., Any],
    given: Mapping[str, Any],
    path: str,
    exclude: frozenset[str] = frozenset(),
    others: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the options of a class or function at a path of a config, checked and converted; nested classes are made.

    A config cannot give those in `exclude`; what it can give besides, `others`, is named where an option is unknown.

    Raises:
        ConfigError: for an unknown, missing or ill-typed option.
    """
    name = owner.__name__ if isinstance(owner, type) else "a data set"
    allowed = options_of(owner, exclude)
    for option, (hint, default) in allowed.items():
        if default is REQUIRED and _is_function(hint):
            wrong = f"`{path}.class` is {name}, whose `{option}` is a Python function, which a config cannot hold"
            raise ConfigError(f"{wrong}: use it from Python.")
    for option in given:
        if option not in allowed:
            known = [*others, *allowed]
            hint = suggest(str(option), known)
            raise ConfigError(f"`{path}.{option}` is not an option of {name} ({listed(known) or 'it has none'}){hint}")
    for option, (hint, default) in allowed.items():
        if default is REQUIRED and option not in given:
            raise ConfigError(f"`{path}` lacks `{option}`, which {name} needs: {allowed_words(hint)}.")
    return {option: check_value(value, allowed[option][0], f"{path}.{option}") for option, value in given.items()}


def data_source(source: Any, path: str) -> dict[str, Any]:
    """Return the options of data that a name alone, or a mapping with it, stands for."""
    source = {"name": source} if isinstance(source, str) else source
    if not isinstance(source, dict) or not isinstance(source.get("name"), str):
        allowed = f"a data set ({listed(data.available())}), a path ending in .npz, .csv, .tsv, .parquet or .svmlight"
        raise ConfigError(f"`{path}` must be {allowed}, or {{name: ..., option: value}}, got {shown(source)}.")
    return source


def check_data(
    given: Mapping[str, Any], path: str, exclude: frozenset[str] = frozenset(), others: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the options of `bilevel.data.load`, checked as by `check_options`; several targets are refused."""
    if isinstance(given.get("target"), (list, tuple)):
        raise ConfigError(
            f"`{path}.target` must be one column, got {shown(given['target'])}: leave `solver` and `estimators` out "
            "of the config to tune by folds, which take several, or give each target a problem of its own, with the "
            "other targets in `drop`."
        )
    return check_options(data.load, given, path, exclude, others)


def check_value(value: Any, hint: Any, path: str) -> Any:
    """Return one option, of the type that is asked for."""
    members = [hint, *typing.get_args(hint)]
    for kind in KINDS:
        if kind.base in members:
            return None if value is None and type(None) in members else make(value, kind, path)
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
    try:
        # As JSON, because strict validation of JSON takes a list for a tuple, as YAML users must, but no "5" for a 5.
        return adapter.validate_json(json.dumps(value, default=str))
    except ValidationError:
        allowed = allowed_words(hint)
        raise ConfigError(f"`{path}` must be {allowed}, got {shown(value)}{meant(value, allowed)}") from None


def make(spec: Any, kind: Kind, path: str) -> Any:
    """Return the object that ``{class: Name, **options}``, or a bare name, describes at a path of the config."""
    return construct(*split_spec(spec, kind, path), path)


def construct(owner: type, given: Mapping[str, Any], path: str) -> Any:
    """Return an object of a class with the options at a path of the config."""
    options = check_options(owner, given, path)
    try:
        return owner(**options)
    except Exception as error:  # whatever a class of the user's own raises
        raise ConfigError(located(error, path, owner)) from error


def split_spec(spec: Any, kind: Kind, path: str) -> tuple[type, dict[str, Any]]:
    """Return the class and the options of ``{class: Name, **options}``."""
    if isinstance(spec, str):
        # "auto" stands for the class in Python, too.
        spec = {"class": "Auto" if spec == "auto" and kind is ESTIMATOR else spec}
    if not isinstance(spec, dict) or "class" not in spec:
        example = next(iter(kind.classes()))
        raise ConfigError(f"`{path}` must be {kind.name}, such as {{class: {example}}}, got {shown(spec)}.")
    owner = find_class(spec["class"], kind, f"{path}.class")
    return owner, {key: value for key, value in spec.items() if key != "class"}


def located(error: Exception, path: str, owner: Any = None) -> str:
    """Return the library's own sentence behind the path of the option that it is about, where it has none itself."""
    own = told(error)
    sentence = isinstance(error, ValueError | ImportError | NotImplementedError) and own == first_line(error)
    text = " ".join(str(error).split()) if sentence else own
    if text.startswith(f"`{path}."):
        return text
    named = re.match(r"`(\w+)\.(\w+)`", text)
    if named and owner is not None and named[1] == owner.__name__:
        path = f"{path}.{named[2]}"
    return f"`{path}`: {text}" if text.endswith((".", "?")) else f"`{path}`: {text}."


def _is_function(hint: Any) -> bool:
    return typing.get_origin(hint) in (Callable, typing.get_origin(Callable[..., Any]))


def allowed_words(hint: Any) -> str:
    """Return a type in the words of a config.

    >>> allowed_words(float | str | None)
    'a number, a string or null'
    """
    simple = {int: "an int", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    if hint in simple:
        return simple[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # Neither a tensor nor a function can be written in a config.
        words = [allowed_words(each) for each in arguments if each is not torch.Tensor and not _is_function(each)]
        # A number is what an int is, too.
        words = [word for word in words if not (word == "an int" and "a number" in words)] or ["a number"]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is typing.Literal:
        return " or ".join(repr(each) for each in arguments)
    if origin in (tuple, list, Sequence):
        count = f"{len(arguments)} " if origin is tuple and Ellipsis not in arguments else ""
        return f"a list of {count}values, each {allowed_words(arguments[0])}"
    return getattr(hint, "__name__", str(hint))
