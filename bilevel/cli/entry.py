"""Parse, call, print; errors of the user's input are one sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from bilevel.core.interrupt import INTERRUPTED, quiet_interrupt
from bilevel.core.spelling import suggest

COMPARE = """\
Run every estimator of a config on every problem and seed, from the same start, and compare them.

example:
  bilevel compare configs/quickstart.yaml
  bilevel compare configs/quickstart.yaml --set outer.steps=50 --set solver.steps=500 --out runs/longer

What is printed is written too: runs/NAME/{results.jsonl, summary.json, figures/*.png, config.yaml, environment.json}.
Ctrl-C stops; the same command continues.
"""
TUNE = """\
Tune the hyperparameters of a config's problems.

A config without `solver` and `estimators`: penalties of linear models of data, by folds, kept only where held-out rows
speak for them, beside one penalty and a constant; the model is of all rows.
Other configs: with one estimator (the first, or --estimator NAME), on one data split (the first seed), with the
validation and test scores before and after.

example:
  bilevel tune configs/tune.yaml
  bilevel tune configs/ridge_diabetes.yaml
  bilevel tune configs/quickstart.yaml --estimator implicit --set outer.lr=0.1

Written to runs/NAME-tune/{tuned.json, config.yaml, environment.json}; by folds {model.npz, model.json}, for `bilevel
predict`, else {results.jsonl, summary.json, figures/*.png}. Ctrl-C stops; the same command continues, by folds with the
first problem that was not finished.
"""
PREDICT = """\
Predict new rows by a model that `bilevel tune` has written: a column of predictions, and of classes their
probabilities, as CSV. Columns may stand in any order; missing cells and words are treated as in training.

example:
  bilevel tune configs/tune.yaml                                       # of several problems, with a model for each
  bilevel predict runs/tune-tune/diabetes new_rows.csv --output predictions.csv

model.json holds the formula by which model.npz gives the same numbers.
"""
CHECK = """\
Examine a problem of your own before its hypergradients are used: both gradients against differences of the losses,
determinism, jumps, double backward, the Hessian's symmetry and curvature, the influence of every hyperparameter, the
contraction of the inner steps (with a step size and a tail to take), and the estimators against differences and each
other. Each finding comes with its number and the remedy; the exit code is 1 where one is a fault.

example:
  bilevel check my_problem.py                  # the problem is called `problem`, its hyperparameters `hparams`
  bilevel check my_problem.py:make             # a function that returns (problem, hparams[, solver])
  bilevel check configs/quickstart.yaml        # the problems of a config

The file is run, as `python my_problem.py` would run it. A `solver` in it is used; the default is gradient descent.
"""
CURSE = """\
Run experiments on the curse of unrolling: the figures of Scieur et al. 2022 and Mehmood et al. 2026, with their claims.

example:
  bilevel curse configs/curse/s2.yaml
  bilevel curse configs/curse/*.yaml --out runs/curse

Written to runs/curse/{NAME.png, NAME.csv, NAME.json, claims.md, environment.json}: every claim with its number, and
whether it holds.
"""
DOCTOR = """\
Print versions, devices, threads and what they cost, float64 support and data sets, and check hypergradients against
finite differences.

example:
  bilevel doctor
"""

REFUSED_BY_CURSE = {
    "--device": "its experiments are small and run on the CPU in float64",
    "--seed": "the seeds of its experiments are fixed, so that their claims repeat",
    "--fresh": "it writes every file anew",
    "--jobs": "it runs in one process",
    "--estimator": "an experiment names what it compares in its config",
}
REFUSED_BY_CHECK = {
    "--device": "it runs where the tensors of the problem are",
    "--out": "it writes nothing",
    "--fresh": "it keeps nothing",
    "--jobs": "it runs in one process",
    "--set": "it takes a problem as it is",
    "--estimator": "it looks at all of them",
}
REFUSED_BY_PREDICT = {
    "--out": "give a file by --output OUT.csv",
    "--set": "it takes a model as it is",
    "--device": "a linear model needs none",
    "--seed": "nothing that it does is random",
}
REFUSED_BY_DOCTOR = {
    "--seed": "nothing that it checks is random",
    "--set": "it takes no config",
    "--out": "it writes nothing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 for success, 1 for a run that failed, 2 for input of no use, 130 after Ctrl-C."""
    debug = False
    try:
        arguments = _parser().parse_args(argv)
        debug = getattr(arguments, "debug", False)
        return _loaded(*arguments.command)(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            # What the user's own code raised stands behind the sentence about it.
            raise (error.__cause__ or error) from None
        sentence, code = _said(error)
        print(f"bilevel: {sentence}", file=sys.stderr)
        return code


def _loaded(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """Return what runs a command; it is loaded here, so that --help and refused options need no torch."""
    with quiet_interrupt():
        command: Callable[[argparse.Namespace], int] = getattr(import_module(f"bilevel.cli.{module}"), function)
    return command


def _said(error: Exception) -> tuple[str, int]:
    """Return the sentence about an exception that ended a command, and the exit code."""
    from bilevel.compare.folder import RunFolderError, unwritten
    from bilevel.config.document import ConfigError, shortened
    from bilevel.core.options import first_line
    from bilevel.core.tracebacks import outside, told

    if isinstance(error, ConfigError | RunFolderError):
        cause = error.__cause__ if isinstance(error, ConfigError) else None
        raw = cause is not None and told(cause) != first_line(cause)
        short = shortened(str(error)) if isinstance(error, ConfigError) else str(error)
        return f"{error} --debug raises it." if raw else short, 2
    if isinstance(error, OSError) and error.filename is not None:
        return unwritten(error), 2
    if why := outside(error):
        return f"{why} What was computed before is kept: run the same command again.", 1
    return f"{told(error)} --debug shows the whole traceback.", 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bilevel",
        description="Tune hyperparameters by gradient descent on the validation loss, and compare ways to do so.",
        epilog="start with: bilevel compare configs/quickstart.yaml     (`bilevel COMMAND --help` says more)",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = _add(commands, "compare", "compare hypergradient estimators as a config says", COMPARE, "commands")
    tune = _add(commands, "tune", "tune hyperparameters and print them with their scores", TUNE, "commands")
    doctor = _add(
        commands, "doctor", "print what this machine has, and check that hypergradients are right", DOCTOR, "doctor"
    )
    for command in (compare, tune):
        command.add_argument("config", metavar="CONFIG", help="a YAML file; see configs/ for examples")
        _give(command, *OPTIONS)
    tune.add_argument(
        "--estimator", metavar="NAME", help="a name under `estimators` in the config (default: the first)"
    )
    predict = _add(commands, "predict", "predict new rows by a tuned model", PREDICT, "fold")
    predict.add_argument("model", metavar="MODEL", help="a folder with model.npz and model.json, or one of both")
    predict.add_argument(
        "data", metavar="NEW.csv", help="a table with the columns of training (.csv, .tsv, .parquet, ...)"
    )
    predict.add_argument("--output", metavar="OUT.csv", help="where to write (default: the standard output)")
    predict.add_argument("--encoding", metavar="NAME", help="of the new file (default: UTF-8, else that of training)")
    _give(predict, "--debug")
    _refuse(predict, REFUSED_BY_PREDICT)
    shown = "show what a run would use with N threads in torch and at most as many workers"
    _give(doctor, "--device", "--threads", threads=shown)
    summary = "examine a problem of your own: derivatives, curvature, determinism, steps, estimators"
    check = _add(commands, "check", summary, CHECK, "check")
    check.add_argument("target", metavar="FILE.py[:PROBLEM]", help="a Python file and a name in it, or a YAML config")
    check.add_argument("--hparams", metavar="NAME", help="the hyperparameters in the file (default: hparams)")
    seed = "of the random points and directions (default: 0)"
    _give(check, "--seed", "--threads", "--allow-import", "--debug", seed=seed)
    _refuse(check, REFUSED_BY_CHECK)
    summary = "measure the curse of unrolling: the figures and claims of both papers"
    curse = _add(commands, "curse", summary, CURSE, "curse")
    curse.add_argument("configs", metavar="CONFIG", nargs="+", help="YAML files; see configs/curse/")
    own = {"set": "change a value in all configs", "out": "where to write (default: runs/curse)"}
    _give(curse, "--set", "--out", "--threads", "--debug", **own)
    _refuse(curse, REFUSED_BY_CURSE)
    _refuse(doctor, REFUSED_BY_DOCTOR)
    return parser


def _add(
    commands: argparse._SubParsersAction[Any],
    name: str,
    summary: str,
    description: str,
    module: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command=(module, f"run_{name}"))
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that says what a misspelt command or choice may have meant."""

    def error(self, message: str) -> NoReturn:
        """Leave with the message."""
        found = re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message)
        if found:
            message += suggest(found[1], re.findall(r"[\w-]+", found[2])).rstrip(".")
        super().error(message)


class _Version(argparse.Action):
    """Print the version and leave; what reads it from the installed package takes its time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Leave with the version."""
        from importlib.metadata import version

        print(f"bilevel {version('bilevel')}")
        parser.exit()


class _Refused(argparse.Action):
    """An option of other commands, which this one answers with the reason why it has none."""

    def __init__(self, option_strings: Sequence[str], dest: str, reason: str) -> None:
        super().__init__(option_strings, dest, nargs="?", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
        self.reason = reason

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Leave with the reason."""
        parser.error(f"{option} is not an option of {parser.prog}: {self.reason}.")


def _refuse(parser: argparse.ArgumentParser, reasons: Mapping[str, str]) -> None:
    for option, reason in reasons.items():
        parser.add_argument(option, action=_Refused, reason=reason)


def _give(parser: argparse.ArgumentParser, *names: str, **own: str) -> None:
    """Give a command some of `OPTIONS`, some with a help of its own."""
    for name in names:
        settings = OPTIONS[name]
        parser.add_argument(name, **(settings | {"help": own.get(name.strip("-"), settings["help"])}))


def _count(least: int) -> Callable[[str], int]:
    """Return a parser of ints that are at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an int of at least {least}, got {text!r}")
        return int(text)

    return parse


OPTIONS: dict[str, dict[str, Any]] = {
    "--device": {
        "choices": ("auto", "cpu", "cuda"),
        "help": "where to compute; auto (the default) takes CUDA where it is",
    },
    "--set": {
        "metavar": "a.b=value",
        "action": "append",
        "default": [],
        "help": "change one value of the config, as in solver.steps=500 or seeds.0=7; may be repeated",
    },
    "--out": {"metavar": "DIR", "help": "where to write (default: a folder in runs/ named after the config)"},
    "--seed": {
        "metavar": "N",
        "type": _count(0),
        "help": "replace the seeds of the data splits by N, N+1, ..., as many as the config has",
    },
    "--threads": {
        "metavar": "N",
        "type": _count(1),
        "help": "threads in torch, and at most as many workers (default: 1 thread, which suits short operations, and "
        "all cores)",
    },
    "--allow-import": {
        "action": "store_true",
        "help": "let the config name classes of your own, as in `class: my_module:MySolver`; their code is run",
    },
    "--fresh": {"action": "store_true", "help": "start anew, removing what an earlier run wrote there"},
    "--jobs": {
        "metavar": "N",
        "type": _count(1),
        "default": 1,
        "help": "processes (default 1: more are faster, but disturb each other's timings)",
    },
    "--debug": {
        "action": "store_true",
        "help": "raise what goes wrong, with its traceback, in place of one sentence",
    },
}
"""What commands share."""
