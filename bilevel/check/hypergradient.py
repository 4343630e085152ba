"""`check_hypergradient`: an estimator against central differences and, where there is one, the closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import Tensor

from bilevel.base import Estimate, InnerSolver, describe
from bilevel.check.problem import examine
from bilevel.check.report import Finding, ProblemReport
from bilevel.check.second import component_labels
from bilevel.core import tree
from bilevel.core.status import Verdict
from bilevel.core.tree import Tree
from bilevel.engine.checks import check_roles
from bilevel.engine.estimator import HypergradEstimator
from bilevel.hypergrad import FiniteDifference, hypergradient
from bilevel.hypergrad.auto import as_estimator
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class Row:
    """One component: the estimate beside its referees."""

    component: str
    estimate: float
    differences: float
    exact: float | None = None


@dataclass(frozen=True)
class CheckReport:
    """The outcome of `check_hypergradient`.

    Attributes:
        ok: whether the estimate is usable and agrees with one of its referees, and no finding is a fault.
        rows: one for each component.
        errors: ``max_j |p_j - referee_j| / max_j |referee_j|`` by referee ("differences", "exact").
        worst: the component that is furthest off.
        rtol: the relative error that was allowed.
        estimate: the estimate that was checked, None where the problem cannot be evaluated.
        text: a readable table.
        findings: what `check_problem` says of the losses, the curvature and the steps.
    """

    ok: bool
    rows: list[Row] = field(repr=False)
    errors: dict[str, float]
    worst: str
    rtol: float
    estimate: Estimate | None = field(repr=False)
    text: str = field(repr=False)
    findings: Sequence[Finding] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.text


def check_hypergradient(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator | str,
    hparams: Tree,
    params: Tree = None,
    *,
    rtol: float | None = None,
) -> CheckReport:
    """Compare an estimator with central differences of the same inner solver and, where there is one, the closed form.

    Central differences see the map that the solver computes: they check a full unroll at any number of steps, and an
    implicit or truncated estimate where the inner solver has converged. The closed form is the derivative of the exact
    solution. To agree with one of them is enough; more inner steps would remove the distance to the other. The problem
    is examined, too, as by `check_problem`: losses whose derivatives are wrong mislead estimator and referee alike.
    Cost: two inner solves for each hyperparameter.

    Args:
        problem: the problem.
        solver: the inner solver.
        estimator: the estimator to check.
        hparams: where.
        params: where the inner solver starts; default: the problem's start.
        rtol: allowed error relative to the referee's largest component; default 1e-4 in float64, 1e-2 in float32.

    Returns:
        A `CheckReport`; printing it shows which component is off.

    Raises:
        ValueError: for a batch, and arguments in the wrong places.

    >>> from bilevel import GradientDescent, Implicit, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> check_hypergradient(problem, GradientDescent(), Implicit(), torch.zeros(2, dtype=torch.float64)).ok
    True
    """
    estimator = as_estimator(estimator)
    check_roles(problem, solver, estimator)
    if problem.batch is not None:
        raise ValueError(
            f"`check_hypergradient` takes one problem, got a batch of {problem.batch}: check batch.member(i)."
        )
    findings = examine(problem, solver, hparams, params, judge_estimators=False)
    examined = ProblemReport(findings)
    if findings[-1].verdict == "not applicable" and findings[0].verdict == "fault":
        return CheckReport(False, [], {}, "", rtol or 0.0, None, str(examined), findings)
    allowed = rtol if rtol is not None else 1e-4 if tree.leaves(hparams)[0].dtype == torch.float64 else 1e-2
    estimate = hypergradient(problem, solver, estimator, hparams, params, on_failure="return")
    referee = hypergradient(problem, solver, FiniteDifference(), hparams, params, on_failure="return")
    known = {"differences": referee.hypergradient, "exact": problem.exact_hypergradient(hparams)}
    ravel, labels = tree.Raveler(hparams).ravel, component_labels(hparams)
    ours = ravel(estimate.hypergradient)
    referees = {name: ravel(value) for name, value in known.items() if value is not None}
    errors, worst = _errors(ours, referees, labels)
    agrees = estimate.status.usable and referee.status.usable and min(errors.values()) <= allowed
    rows = [Row(label, *map(float, values)) for label, *values in zip(labels, ours, *referees.values(), strict=True)]
    title = f"{describe(solver)} with {describe(estimator)}"
    text = _text(agrees, rows, errors, worst, allowed, title, estimate.verdict)
    text += f"\n\n{examined}" if examined.faults else ""
    return CheckReport(agrees and examined.ok, rows, errors, worst, allowed, estimate, text, findings)


def _errors(ours: Tensor, referees: dict[str, Tensor], labels: Sequence[str]) -> tuple[dict[str, float], str]:
    """Return the largest relative error against each referee, and the component that is furthest off."""
    errors, worst, off = {}, "", -1.0
    for name, values in referees.items():
        distance = (ours - values).abs() / values.abs().max().clamp(min=torch.finfo(ours.dtype).tiny)
        # NaN counts as the largest distance.
        distance = torch.where(distance.isnan(), torch.inf, distance)
        errors[name] = float(distance.max())
        if errors[name] > off:
            off, worst = errors[name], labels[int(distance.argmax())]
    return errors, worst


def _text(
    ok: bool, rows: list[Row], errors: dict[str, float], worst: str, rtol: float, title: str, verdict: Verdict
) -> str:
    body = sorted(rows, key=lambda row: -abs(row.estimate - row.differences))[:10]
    table = tabulate(
        [(row.component, row.estimate, row.differences, "-" if row.exact is None else row.exact) for row in body],
        headers=("component", "estimate", "central differences", "closed form"),
        floatfmt=".8g",
    )
    more = f"\n({len(rows) - len(body)} more components agree at least as well)" if len(rows) > len(body) else ""
    result = ", ".join(f"{error:.2e} from {name}" for name, error in errors.items())
    far = [name for name, error in errors.items() if error > rtol]
    outcome = f"is OFF, most at {worst}" if not ok else f"agrees, though not with {far[0]}" if far else "agrees"
    if ok and far:
        more += "\nthe solver's own map is differentiated rightly; "
        more += "more inner steps would bring it to the exact solution"
    status = "" if verdict.status.ok else f"\nstatus: {verdict}"
    return f"{title} {outcome}: relative error {result} (allowed {rtol:.0e})\n{table}{more}{status}"
