"""The two-sided certificate: a proved interval for the error of any hypergradient, whoever made it.

Let (x', w') be any pair, ``p' = p(x', w')`` and ``rem`` the bound of ``|p' - dF/du|`` from `bilevel.certify.bounds`.
Then for every vector p, by the triangle inequality,

    |p - p'| - rem  <=  |p - dF/du|  <=  |p - p'| + rem.

Newton corrections of (x, w) make rem as small as it has to be: once ``rem <= q |p - p'|``, ``q = (k - 1) / (k + 1)``,
the upper end is at most k times the true error, and that is proved as well. Newton corrections square the error, so
that p' is usually hundreds of times more accurate than p.

All of it runs in float64, also for float32 problems, whose data and hyperparameters are taken as exact numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from bilevel.certify.bounds import SUMS, Bound, bound_pair
from bilevel.certify.evaluation import Evaluation, evaluate
from bilevel.certify.instance import Instance
from bilevel.certify.metrics import Cholesky, Diagonal, Metric, transport
from bilevel.certify.nystrom import Nystrom, Sketch, sketch
from bilevel.certify.refine import ErrorEstimate, refine
from bilevel.core import tree
from bilevel.core.options import require_value
from bilevel.core.tree import Tree
from bilevel.numerics.dense import METRIC
from bilevel.oracles.error_model import UNIT, gamma
from bilevel.oracles.problem import BilevelProblem

EFFECTIVITY = 3.0
"""Proved bound / error at which the corrections stop."""
REDUCTION = 0.01
"""Of the residual by the linear solve of one correction."""
ROUNDS = 30
MAX_STEPS = 500
"""Products of one linear solve at most."""
MOST_PRODUCTS = 3_000
"""Products after which no further correction is tried; what is proved by then stands."""
LEAST_STEP = 1e-6
RANK = 20
METRICS = ("auto", "cheap", "diagonal", "nystrom", "cholesky")


class Metrics:
    """Makes the metric for each point of a run, by transport where the last one still serves.

    The kind "auto" stands for "cholesky" up to 300 weights, else "diagonal"; "cheap" for "cholesky" where the Hessian
    is there already (ridge regression on its Gram matrix), else "diagonal". "nystrom" may begin with an earlier sketch.
    """

    def __init__(self, instance: Instance, kind: str = "auto", sketch: Sketch | None = None) -> None:
        require_value("metric", kind, f"one of {', '.join(map(repr, METRICS))}", kind in METRICS)
        small = instance.penalty.numel() <= METRIC
        small = small and (kind != "cheap" or instance.gram_scale is not None)
        self.kind = kind if kind not in ("auto", "cheap") else "cholesky" if small else "diagonal"
        if self.kind == "nystrom" and instance.least_penalty == 0:
            raise ValueError("the metric 'nystrom' needs penalties above zero: use 'cholesky' for unpenalised weights.")
        self.instance, self.sketch = instance, sketch
        self._made: Cholesky | None = None
        self.factored = 0
        """Dense Hessians made so far from the rows."""

    def at(self, z: Tensor) -> Metric:
        """Return a metric below the Hessian at predictions z."""
        if self.kind == "nystrom":
            if self.sketch is None or transport(self.instance, self.sketch.z, z) > 1:
                self.sketch = sketch(self.instance, z, RANK)
            return Nystrom(self.instance, self.sketch, z)
        if self.kind == "cholesky":
            made = self._made
            if made is None or transport(self.instance, made.z, z) > 1:
                made = self._made = Cholesky(self.instance, z)
                self.factored += self.instance.gram_scale is None
            moved = made.at(z)
            if math.isfinite(moved.stretch) or self.instance.least_penalty == 0:
                return moved
        return Diagonal(self.instance)


def bound_error(
    problem: BilevelProblem, hparams: Tree, params: Tree, hypergradient: Tree, adjoint: Tree, metric: str = "diagonal"
) -> ErrorEstimate:
    """Bound ``|p - dF/du|`` without any solve, from the residuals of params and adjoint.

    Cost: two gradients and two outer gradients with the metric "diagonal".

    Args:
        problem: a problem that is certifiable: ridge, logistic or softmax regression.
        hparams: where p was taken.
        params: the inner iterate.
        hypergradient: p; it need not be ``p(params, adjoint)``, the difference is added.
        adjoint: an approximate ``H^-1 f_x`` at `params`.
        metric: "diagonal", "cheap", "nystrom", "cholesky" or "auto"; the later ones are sharper and more expensive.

    Returns:
        Kind "bound" with value and components; kind "none" where the problem is not certifiable or unpenalised weights
        leave nothing to bound with.

    >>> from bilevel.problems import RidgeProblem
    >>> X = torch.eye(2, dtype=torch.float64)
    >>> problem = RidgeProblem(X, torch.ones(2).double(), X, torch.zeros(2).double(), loss="sum")
    >>> u = torch.zeros((), dtype=torch.float64)
    >>> x = torch.full((2,), 0.5 + 1e-6, dtype=torch.float64)
    >>> w = torch.full((2,), 0.125, dtype=torch.float64)
    >>> found = bound_error(problem, u, x, -(x * w).sum(), w)
    >>> true = float(abs(problem.exact_hypergradient(u) + (x * w).sum()))
    >>> found.kind, true <= found.value <= 10 * true
    ('bound', True)
    """
    return ErrorBound(problem, hparams, metric)(params, hypergradient, adjoint)


class ErrorBound:
    """`bound_error` for several pairs at the same hyperparameters: what does not depend on the pair is made once.

    `counts` receives the oracle calls that the work is worth.
    """

    def __init__(
        self, problem: BilevelProblem, hparams: Tree, metric: str = "diagonal", counts: Counter[str] | None = None
    ) -> None:
        model = problem.certifiable()
        self.hparams, self.counts = hparams, Counter() if counts is None else counts
        self._instance = None if model is None else Instance(model, hparams)
        self._metrics = None if self._instance is None else Metrics(self._instance, metric)

    @property
    def sharp(self) -> bool:
        """Whether the metric is better than that of the penalties alone."""
        return self._metrics is not None and self._metrics.kind != "diagonal"

    def __call__(self, params: Tree, hypergradient: Tree, adjoint: Tree) -> ErrorEstimate:
        """Return the bound for one pair; see `bound_error`."""
        if self._instance is None or self._metrics is None:
            return ErrorEstimate(None, "none", "no bound is known for this problem: use certify=True for an estimate")
        at = evaluate(self._instance, _double(params), _double(adjoint))
        self.counts.update(gradient=1, hvp=1, outer=1)
        made = self._metrics.factored
        metric = self._metrics.at(at.z)
        self.counts["curvature"] += self._metrics.factored - made
        result = _interval(self.hparams, _given(hypergradient), at, bound_pair(at, metric, floor=False))
        return result or ErrorEstimate(None, "none", _UNBOUNDED)


_UNBOUNDED = "an unpenalised weight or a singular Hessian leaves nothing to bound the error with"


def certify_error(
    problem: BilevelProblem,
    hparams: Tree,
    params: Tree,
    hypergradient: Tree,
    adjoint: Tree = None,
    *,
    metric: str = "auto",
    effectivity: float = EFFECTIVITY,
    goal: float | None = None,
    counts: Counter[str] | None = None,
) -> ErrorEstimate:
    """Return bounds of ``|p - dF/du|`` from both sides for any p, and correct p; an estimate where no bound is known.

    Cost: per round two short CG runs (about 10 Hessian-vector products in all); one or two rounds are usual.

    Ridge, logistic and softmax regression get a bound, with the interval ``[lower, value]``, bounds of single
    components, the corrected hypergradient with its own error bound, and the certain signs; others the estimate of
    `refine`. `params` is the inner iterate that p was computed at, however rough; an approximate ``H^-1 f_x`` as the
    adjoint saves CG steps. `effectivity`, above 1, is the quotient of bound and true error that is to be proved; a goal
    ends it as soon as it is proved that the error is at most this, or that it is not. `counts` receives the oracle
    calls that the work is worth.

    Raises:
        ValueError: for an effectivity that is not above 1, or an unknown metric.
    """
    require_value("effectivity", effectivity, "above 1", effectivity > 1)
    model = problem.certifiable()
    counts = Counter() if counts is None else counts
    if model is None:
        return refine(problem, hparams, params, hypergradient, adjoint, counts)
    instance = Instance(model, hparams)
    metrics, given = Metrics(instance, metric), _given(hypergradient)
    x, w = _double(params), torch.zeros_like(instance.penalty) if adjoint is None else _double(adjoint)
    share = (effectivity - 1.0) / (effectivity + 1.0)
    best, turn = _narrowed(metrics, given, x, w, share, goal)
    counts.update(gradient=2 * turn, outer=2 * turn, hvp=instance.products + turn, curvature=metrics.factored)
    work = f"{turn} correction{'s' if turn > 1 else ''}, {instance.products} HVPs, metric {metrics.kind}"
    if (result := _interval(hparams, given, *best, work=work)) is not None:
        return result
    estimate = refine(problem, hparams, params, hypergradient, adjoint, counts)
    return replace(estimate, note=f"{_UNBOUNDED}; {estimate.note}")


def _narrowed(
    metrics: Metrics, given: Tensor, x: Tensor, w: Tensor, share: float, goal: float | None
) -> tuple[tuple[Evaluation, Bound], int]:
    """Return the corrected pair with the smallest bound, evaluated, its bound, and the number of corrections.

    They end where the bound is at most `share` of the distance to what is given, or `goal` is decided.
    """
    instance = metrics.instance
    best: tuple[Evaluation, Bound] | None = None
    last, turn, ending = math.inf, 0, ""
    while turn < ROUNDS and not ending:
        turn += 1
        x, w = _correct(instance, metrics, x, w)
        at = evaluate(instance, x, w)
        bound = bound_pair(at, metrics.at(at.z))
        if best is None or bound.value < best[1].value:
            best = (at, bound)
        # No correction takes off what is rounding.
        stuck = 2 * bound.rounding > bound.value
        stuck = stuck or (turn >= 3 and bound.value > 0.9 * last and 10 * bound.rounding > bound.value)
        distance = float(torch.linalg.vector_norm(given - at.p))
        if bound.value <= share * distance or (goal is not None and bound.value <= 0.99 * abs(goal - distance)):
            ending = "sharp"
        elif stuck or instance.products > MOST_PRODUCTS:
            ending = "floor"
        last = min(last, bound.value)
    assert best is not None
    return best, turn


def _correct(instance: Instance, metrics: Metrics, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Correct x by a damped Newton step, and w at the new x."""
    z = instance.training_predictions(x)
    s = instance.gradient(x, z)
    step = metrics.at(z).solve(z, s, REDUCTION, MAX_STEPS)
    moved = instance.training_predictions(step)
    slope, t = float((s * step).sum()), 1.0
    # The loss is convex: half the step as long as it leads beyond the minimum of its line by too much.
    while t > LEAST_STEP and -float((instance.gradient(x - t * step, z - t * moved) * step).sum()) > 0.5 * abs(slope):
        t /= 2
    x = x - t * step
    z = instance.training_predictions(x)
    r = -instance.outer_gradient(x)
    if bool(w.any()):
        r = r + instance.product(z, w)
    return x, w - metrics.at(z).solve(z, r, REDUCTION, MAX_STEPS)


def _interval(hparams: Tree, given: Tensor, at: Evaluation, bound: Bound, work: str = "") -> ErrorEstimate | None:
    """Return what is proved of p from a pair, its hypergradient p' and the bound of its error; None for nothing."""
    if not math.isfinite(bound.value):
        return None
    ravel = tree.Raveler(hparams)
    apart = (given - at.p).abs() * (1 + 2 * UNIT)
    distance = float(torch.linalg.vector_norm(apart))
    value = (distance + bound.value) * SUMS
    lower = max(0.0, distance * (1 - 2 * gamma(len(given) + 4)) - bound.value)
    signs = torch.where(at.p.abs() > bound.components, at.p.sign(), 0.0)
    dtype = tree.leaves(hparams)[0].dtype
    corrected = at.p.to(dtype)
    cast = float(torch.linalg.vector_norm(corrected.double() - at.p))
    what = f"proved: bound at most {value / lower:.3g} times the error" if lower > 0 else "proved"
    if lower == 0 and 2 * bound.rounding > bound.value:
        what += f", at the rounding floor of float64 for these penalties; estimated at |p - p'| = {distance:.1e}"
    return ErrorEstimate(
        value,
        "bound",
        f"{what} ({work or 'no solve'}, theorem {bound.theorem})",
        lower=lower,
        components=ravel.unravel((apart + bound.components) * SUMS),
        corrected=ravel.unravel(corrected),
        corrected_error=(bound.value + cast) * SUMS,
        signs=ravel.unravel(signs.to(dtype)),
        adjoint_part=bound.adjoint_part,
    )


def _given(hypergradient: Tree) -> Tensor:
    return tree.Raveler(hypergradient).ravel(tree.detach(hypergradient)).double()


def _double(params: Tensor) -> Tensor:
    return params.detach().double()
