"""`OuterOptions`: the options of an outer run, as comparisons and configs hold them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from bilevel.base import InnerSolver
from bilevel.engine.estimator import HypergradEstimator
from bilevel.hypergrad.target_error import check_relative_error
from bilevel.outer.checks import check_makers, check_steps, check_switches
from bilevel.outer.constraints import check_constraints
from bilevel.outer.loop import OuterOptimizer
from bilevel.outer.moves import MakeOptimizer, MakeScheduler
from bilevel.outer.schedule import ToleranceSchedule, as_schedule
from bilevel.outer.search import OuterSearch
from bilevel.outer.single_loop import SingleLoop
from bilevel.outer.state import WarmStart
from bilevel.outer.stochastic import StochasticMethod
from bilevel.outer.stopping import StoppingRules


@dataclass(frozen=True)
class OuterOptions:
    """An outer run as a value: options of `OuterOptimizer` and of its `run`; steps count where there is no budget."""

    steps: int = 30
    optimizer: MakeOptimizer | OuterSearch[Any] | str | None = None
    scheduler: MakeScheduler | None = None
    constraints: Any = None
    warm_start: bool | WarmStart = True
    certify: bool = False
    target_error: float | None = None
    schedule: str | ToleranceSchedule | None = None
    tol: float | None = None
    patience: int | None = None
    min_progress: float = 0.0

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_makers(self.optimizer, self.scheduler)
        check_constraints(self.constraints)
        check_switches(self.certify, self.warm_start)
        if self.target_error is not None:
            check_relative_error(self.target_error)
        as_schedule(self.schedule, self.target_error)
        self.rules()

    def start(self, setup: Any, solver: InnerSolver, estimator: HypergradEstimator | StochasticMethod) -> Any:
        """Return the outer loop of ``setup.problem`` at its start; a failed hypergradient is returned, not raised.

        Of a stochastic method it is a `SingleLoop`, which has its own steps: a step of the options is a record of it.
        """
        if isinstance(estimator, StochasticMethod):
            limits = {"constraints": self.constraints, "certify": self.certify}
            return SingleLoop(setup.problem, estimator, setup.hparams, on_failure="return", **limits)
        names = [each.name for each in fields(self) if each.name not in ENDS]
        options = {name: getattr(self, name) for name in names}
        return OuterOptimizer(setup.problem, solver, estimator, setup.hparams, on_failure="return", **options)

    def rules(self, budget: float | None = None) -> StoppingRules:
        """Return the rules by which a run ends."""
        return StoppingRules(budget, self.tol, self.patience, self.min_progress)


ENDS = ("steps", "tol", "patience", "min_progress")
"""Options that `OuterOptimizer.run` takes, or a comparison in its place."""
