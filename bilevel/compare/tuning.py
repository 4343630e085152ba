"""The tuning table of a comparison: the same problems by another outer method, beside that of the comparison."""

from __future__ import annotations

import textwrap
from typing import Any

from tabulate import tabulate

from bilevel.base import describe
from bilevel.compare.plan import Plan
from bilevel.outer import OuterOptimizer, OuterOptions

WIDTH = 110
"""Of the lines about how a run ended."""


def tune_beside(plan: Plan) -> list[dict[str, Any]]:
    """Return the runs of each problem of a plan, on its first seed, by its own outer method and by ``plan.tuning``'s.

    Inner solver and estimator are those of ``plan.tuning`` for both. There are none where the plan has no such part.
    """
    if plan.tuning is None:
        return []
    (estimator,) = plan.tuning.estimators.values()
    result = []
    for problem, build in plan.problems.items():
        for options in (plan.outer, plan.tuning.outer):
            setup = build(plan.seeds[0])
            outer = options.start(setup, plan.tuning.solver, estimator)
            rules: Any = {name: getattr(options, name) for name in ("tol", "patience", "min_progress")}
            run = outer.run(options.steps, progress=False, **rules)
            result.append({
                "problem": problem,
                "seed": plan.seeds[0],
                "outer_method": _named(outer, options),
                "evaluations": len(run.history),
                "gradient_equivalents": outer.gradient_equivalents,
                "outer_loss_start": run.history[0].outer_loss,
                "outer_loss_best": run.best_loss,
                "choice": outer.choice,
                "stopped": run.stopped,
            })
    return result


def _named(outer: OuterOptimizer, options: OuterOptions) -> str:
    """Return an outer method in words, with the rate of a torch optimizer."""
    if outer.search is not None:
        return f"{describe(outer.optimizer)}{' (auto)' if options.optimizer == 'auto' else ''}"
    made: Any = outer.optimizer
    return f"{type(made).__name__}(lr={made.param_groups[0]['lr']:g})"


def tuning_table(plan: Plan, runs: list[dict[str, Any]]) -> str:
    """Return what `tune_beside` found as a table, with a line about each end."""
    if not runs or plan.tuning is None:
        return ""
    lines = [
        (run["problem"], run["outer_method"], run["evaluations"], f"{run['outer_loss_best']:.6g}",
         f"{run['gradient_equivalents']:,.0f}")
        for run in runs
    ]  # fmt: skip
    headers = ("problem", "outer method", "evaluations", "best outer loss", "grad.-equiv.")
    body = tabulate(lines, headers=headers, colalign=("left", "left", "right", "right", "right"), disable_numparse=True)
    ends = [f"{run['problem']}, {run['outer_method']}: {run['stopped']}" for run in runs]
    shown = "\n".join(textwrap.fill(end, WIDTH, initial_indent="  ", subsequent_indent="    ") for end in ends)
    (estimator,) = plan.tuning.estimators.values()
    title = f"tuning by {describe(plan.tuning.solver)} and {describe(estimator)}, seed {plan.seeds[0]}"
    return f"{title}\n{body}\n\n{shown}"
