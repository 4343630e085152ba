"""Proved bounds of the distance from ``p(x, w)`` to the exact hypergradient, without any further solve.

For a pair (x, w) with residuals ``s = g_x(x)`` and ``r = H w - f_x(x)``, two theorems bound ``e = x - x*`` by E, the
error of the adjoint by W, and then

    |p_k - dF/du_k| <= chi_k(w) E + chi_k(x) W + chi2_k E W,      chi_k(v) = |c_k v_k| in the inverse metric,

with ``c = d pen/du`` and chi2 the largest ``c_j / pen_j``. Theorem "local" uses that the loss is self-concordant and
the norm of the Hessian at x (a metric M below it); theorem "global" uses the norm of the penalties alone, holds
arbitrarily far from the solution, and has no exponentials. The smaller one counts, for every component.

Identities behind both: ``dw = H*^-1 (r + [f_x - f_x*] - [H - H*] w)`` and
``p - dF/du = -[C - C*]' w - C*' dw``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.certify.evaluation import Evaluation
from bilevel.certify.metrics import Metric

FAR = 100.0
"""Range of the predictions' change from which on the local theorem's exponentials say nothing."""
SUMS = 1.0 + 1e-9
"""Covers the rounding of the bound's own sums, whose terms are not negative: below gamma(4 million)."""


@dataclass(frozen=True)
class Bound:
    """A proved bound of ``|p(x, w) - dF/du|`` in the Euclidean norm, and one for every component, flattened.

    `solution` is E, a bound of ``x - x*`` in the norm of the theorem ("local" or "global") that gave it, and `adjoint`
    W, one of ``w - w*``. `rounding` is what rounding alone would give, residuals being zero; 0 where not asked for.
    `adjoint_part` is the part of `value` that is proportional to the adjoint residual.
    """

    value: float
    components: Tensor
    solution: float
    adjoint: float
    theorem: str
    rounding: float = 0.0
    adjoint_part: float = 0.0


@dataclass(frozen=True)
class Residuals:
    """Norms that both theorems start from: of a residual with its rounding, or of the rounding alone.

    They are those of the inner gradient s and the adjoint residual r in the inverse metric, and in the inverse
    penalties (infinite where a weight is unpenalised).
    """

    s: float
    s_penalty: float
    r: float
    r_penalty: float


def bound_pair(at: Evaluation, metric: Metric, floor: bool = True) -> Bound:
    """Return a bound of the distance from ``p(x, w)`` to the exact hypergradient: the smaller of both theorems.

    The metric is one below the Hessian at x. With `floor` the bound also says what rounding alone would give. It is
    infinite where neither theorem holds.
    """
    s_penalty, r_penalty, ds_penalty, dr_penalty, _ = at.sizes
    s, r = min(metric.own_norm(at.s), s_penalty), min(metric.own_norm(at.r), r_penalty)
    ds = min(metric.own_rounding_norm(at.s_rounding), ds_penalty)
    dr = min(metric.own_rounding_norm(at.r_rounding), dr_penalty)
    full = Residuals(s + ds, s_penalty + ds_penalty, r + dr, r_penalty + dr_penalty)
    # Of a quadratic loss "local" says no more than "global" does, unless the metric does.
    plain = metric.plain and not at.instance.constants.concordance
    bounds = [_global(at, full)] if plain else [_local(at, metric, full), _global(at, full)]
    best = min(bounds, key=lambda bound: bound.value)
    components = torch.minimum(bounds[0].components, bounds[-1].components)
    value = min(best.value, float(torch.linalg.vector_norm(components)) * SUMS)
    rounding = _local(at, metric, Residuals(ds, ds_penalty, dr, dr_penalty)).value if floor else 0.0
    return replace(best, value=value, components=components, rounding=rounding)


def _local(at: Evaluation, metric: Metric, norms: Residuals) -> Bound:
    """Theorem "local": self-concordance, in the norm of the Hessian at x."""
    instance, M = at.instance, at.instance.constants.concordance
    classes, width = (len(at.z), 2.0) if instance.several else (1, 1.0)
    t, blur = 0.0, 1.0
    if M:
        far = M * float(instance.row_lengths.max()) * norms.s_penalty
        near = M * float(metric.row_lengths.max()) * norms.s
        t = min(far, -math.log1p(-near) if near < 1 else math.inf)
        # Predictions are known up to their rounding, and so are the curvatures at x.
        blur = math.exp(M * width * float(at.blur.max()))
    if not t <= FAR or not math.isfinite(norms.s + norms.r):
        return _none(at)
    E = norms.s * (t / -math.expm1(-t) if t > 0 else 1.0)
    moves, change = at.blur, 0.0
    if at.by_row:
        moves = metric.row_lengths * E
        if math.isfinite(norms.s_penalty):
            moves = torch.minimum(moves, instance.row_lengths * norms.s_penalty)
    if M:
        spread = instance.extent(at.v) + width * at.blur_adjoint
        curved = (at.v * instance.hessian_product(at.z, at.v)).reshape(-1, len(moves)).sum(0).clamp_min(0.0).sqrt()
        curved = curved + (instance.constants.curvature * classes) ** 0.5 * at.blur_adjoint
        growth = torch.expm1((M * moves).clamp_max(t))
        change = float((instance.tuned.weights * (growth * curved).square()).sum().sqrt())
        change = min(change, (math.expm1(t) / t if t > 0 else 1.0) * M * float(spread.max()) * E) * blur
    grown = math.exp(t) * blur
    W = grown * (norms.r + metric.outer_curvature * E + change)
    errors = (E, min(E, norms.s_penalty))
    adjoint_moves = metric.row_lengths * W if at.by_row else moves
    return _combine(at, "local", errors, (W, grown * norms.r), (moves, adjoint_moves), metric)


def _global(at: Evaluation, norms: Residuals) -> Bound:
    """Theorem "global": strong convexity by the penalties alone, valid arbitrarily far away."""
    instance, constants = at.instance, at.instance.constants
    E = norms.s_penalty
    if not math.isfinite(E + norms.r_penalty) or instance.least_penalty == 0:
        return _none(at)
    classes, width = (len(at.z), 2.0) if instance.several else (1, 1.0)
    moves, change = instance.row_lengths * E if at.by_row else at.blur, 0.0
    if constants.third:
        size = torch.linalg.vector_norm(at.v - at.v.mean(0), dim=0) if instance.several else at.v.abs()
        most = constants.curvature * (size + classes**0.5 * at.blur_adjoint)
        changes = torch.minimum(most, constants.third * (instance.extent(at.v) + width * at.blur_adjoint) * moves)
        change = float((instance.tuned.weights * instance.row_squares.amax(0).sqrt() * changes).sum())
    weights = float((instance.penalty * at.w.square()).sum().sqrt())
    *_, r_rounding, outer = at.sizes
    turned = instance.outer_curvature * E
    W = turned + min(norms.r_penalty + change, weights + outer + r_rounding)
    own = min(norms.r_penalty, W)
    adjoint_moves = instance.row_lengths * W if at.by_row else moves
    return _combine(at, "global", (E, E), (W, own), (moves, adjoint_moves), None)


def _combine(
    at: Evaluation,
    theorem: str,
    errors: tuple[float, float],
    adjoint_errors: tuple[float, float],
    moves: tuple[Tensor, Tensor],
    metric: Metric | None,
) -> Bound:
    """Turn bounds of x - x* (in the Hessian and the penalties) and w - w* into one of the hypergradient."""
    # `adjoint_errors`: W, and its part from the residual r alone.
    # `moves`: how far each row's predictions of x and w may be from those of x* and w*.
    instance, tuned = at.instance, at.instance.tuned
    (E, E_penalty), (W, by_residual) = errors, adjoint_errors
    components, value = at.p_rounding, float(torch.linalg.vector_norm(at.p_rounding))
    for vector, groups, own, by_penalty in zip(at.slopes_at, at.groups, (E, W), (E_penalty, W), strict=True):
        parts = _scaled(groups, by_penalty)
        # The parts that hyperparameters own are disjoint: in the diagonal norm their errors add up in squares.
        size = float(parts.max())
        sharp = None if metric is None else metric.groups(vector)
        if sharp is not None:
            sharper = _scaled(sharp, own)
            parts, size = torch.minimum(parts, sharper), min(size, float(torch.linalg.vector_norm(sharper)))
        components, value = components + parts, value + size
    of_adjoint = size
    products = _scaled(instance.largest_ratios, E_penalty * W)
    if metric is not None:
        products = products.clamp_max(instance.steepest * metric.inverse_size * E * W)
    components, value = components + products, value + float(products.max())
    if tuned.weight_slope is not None:
        by_solution, by_adjoint = (
            instance.per_row(tuned.weight_slope.abs() * errors) for errors in _weight_errors(at, *moves)
        )
        by_row = by_solution + by_adjoint
        components, value = components + by_row, value + float(torch.linalg.vector_norm(by_row))
        of_adjoint += float(torch.linalg.vector_norm(by_adjoint))
    adjoint_part = of_adjoint * (by_residual / W) if W > 0 else 0.0
    if not math.isfinite(value):
        return _none(at)
    return Bound(value * SUMS, components * SUMS, E, W, theorem, adjoint_part=adjoint_part)


def _weight_errors(at: Evaluation, moves: Tensor, adjoint_moves: Tensor) -> tuple[Tensor, Tensor]:
    """Bound the error of every row's ``loss'(z_i)' (W' a_i)``, whose factor is ``d omega_i / du``: by x, and by w."""
    instance, constants = at.instance, at.instance.constants
    width = 2.0 if instance.several else 1.0
    M = constants.concordance
    change = constants.slope * moves
    # The curvature grows by at most exp(M moves) on the way; far away that says nothing.
    growth = torch.expm1((M * moves).clamp_max(FAR)) / M if M else moves
    norm = instance.model.loss.curvature_norm(at.z, instance.model.train.y)
    change = torch.where(M * moves < FAR, torch.minimum(change, norm * growth), change)
    slopes = instance.dual(at.slopes) + width * constants.curvature * at.blur
    return change * (instance.extent(at.v) + width * at.blur_adjoint), (slopes + change) * adjoint_moves


def _scaled(values: Tensor, factor: float) -> Tensor:
    """Return ``values factor``; what is infinite stays so when the factor is zero."""
    return values * factor if factor > 0 else torch.where(values.isinf(), values, 0.0)


def _none(at: Evaluation) -> Bound:
    return Bound(math.inf, torch.full_like(at.p, math.inf), math.inf, math.inf, "none")
