"""``bilevel check``: examine the problem of a user's file, or the problems of a config."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel.base import InnerSolver, describe
from bilevel.check import check_problem
from bilevel.cli.threads import chosen_threads
from bilevel.config import ConfigError, load_plan
from bilevel.core.options import first_line, suggest
from bilevel.core.threads import short_operations
from bilevel.core.tracebacks import told
from bilevel.core.tree import Tree
from bilevel.oracles.problem import BilevelProblem

PARTS = ("problem", "hparams", "solver")


@dataclass(frozen=True)
class Named:
    """What is examined, and how it is called."""

    name: str
    problem: BilevelProblem
    hparams: Tree
    solver: InnerSolver | None


def run_check(arguments: Namespace) -> int:
    """Run ``bilevel check``; 1 where a fault was found, else 0."""
    path, _, name = arguments.target.partition(":")
    with short_operations(chosen_threads(arguments)):
        if Path(path).suffix in (".yaml", ".yml"):
            subjects = _of_config(path, name, arguments.allow_import)
        else:
            subjects = [_of_file(path, name or "problem", arguments.hparams)]
        codes = [_examined(subject, arguments.seed or 0) for subject in subjects]
        return max(codes)


def _examined(subject: Named, seed: int) -> int:
    solver = "" if subject.solver is None else f" with {describe(subject.solver)}"
    print(f"{subject.name}{solver}\n", flush=True)
    try:
        report = check_problem(subject.problem, subject.hparams, subject.solver, seed=seed)
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(str(error) if told(error) == first_line(error) else told(error)) from error
    print(f"{report}\n")
    return 0 if report.ok else 1


def _of_config(path: str, name: str, allow_import: bool) -> list[Named]:
    """Return the problems of a config, on the split of its first seed, or the one that is named."""
    plan = load_plan(path, allow_import=allow_import)
    if name and name not in plan.problems:
        hint = suggest(name, plan.problems)
        raise ConfigError(f"{path} has no problem {name!r}, only {', '.join(plan.problems)}{hint}")
    made = {each: plan.problems[each](plan.seeds[0]) for each in plan.problems if not name or each == name}
    return [Named(f"{path}:{each}", setup.problem, setup.hparams, plan.solver) for each, setup in made.items()]


def _of_file(path: str, name: str, hparams_name: str | None) -> Named:
    """Run a user's file and return the problem that it defines under a name."""
    module = _imported(Path(path))
    if (result := getattr(module, name, None)) is None:
        problems = [key for key, value in vars(module).items() if isinstance(value, BilevelProblem)]
        hint = f"it has {', '.join(problems)}: bilevel check {path}:{problems[0]}" if problems else "define one there"
        raise ConfigError(f"{path} defines no {name!r}; {hint}.")
    what = f"{path}:{name}"
    if isinstance(result, Callable) and not isinstance(result, BilevelProblem):  # type: ignore[arg-type]
        result = _called(what, result)
    parts = _parts(what, result)
    for part in PARTS[1:]:
        if parts.get(part) is None:
            parts[part] = getattr(module, (hparams_name if part == "hparams" else None) or part, None)
    if hparams_name and not hasattr(module, hparams_name):
        raise ConfigError(f"{path} defines no {hparams_name!r}, which --hparams names.")
    if parts["hparams"] is None and hasattr(parts["problem"], "initial_hparams"):
        parts["hparams"] = parts["problem"].initial_hparams()
    if parts["hparams"] is None:
        raise ConfigError(
            f"where should {what} be checked? Define `hparams` in the file, name them by --hparams NAME, or let "
            f"{name} be a function that returns (problem, hparams)."
        )
    return Named(what, parts["problem"], parts["hparams"], parts["solver"])


def _imported(path: Path) -> ModuleType:
    """Run a file as a module of its own name, with its folder on the path, as ``python FILE.py`` has it."""
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"there is no file {path}: name a Python file, as in `bilevel check my_problem.py:problem`.")
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except Exception as error:
        raise ConfigError(f"{path} cannot be run: {_where(error)}") from error
    return module


def _called(what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise ConfigError(f"{what}() fails: {_where(error)}") from error


def _where(error: Exception) -> str:
    """Return an exception in words, with the line of the user's file."""
    return f"SyntaxError: {error.msg} (line {error.lineno})." if isinstance(error, SyntaxError) else told(error)


def _parts(what: str, result: Any) -> dict[str, Any]:
    """Return problem, hparams and solver of a problem, a tuple or a dict of them."""
    parts: dict[str, Any] = {"problem": result}
    if isinstance(result, Mapping):
        parts = dict(result)
    elif isinstance(result, tuple):
        parts = dict(zip(PARTS, result, strict=False))
    for part, kind in (("problem", BilevelProblem), ("solver", InnerSolver)):
        if not isinstance(parts.get(part), kind) and (part == "problem" or parts.get(part) is not None):
            raise ConfigError(
                f"{what} must be a BilevelProblem, a tuple (problem, hparams, solver), a dict of these, or a function "
                f"without arguments that returns one of them; its {part} is {type(parts.get(part)).__name__}."
            )
    return parts
