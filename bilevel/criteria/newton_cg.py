"""Newton's method by conjugate gradients for several weightings of the same rows at once; sparse inputs, any loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bilevel.criteria.system import System, dots, spread
from bilevel.numerics.small import block_grams, factor, weighted_gram

STEPS = 60
"""Newton steps at most."""
CG_STEPS = 500
"""Steps of conjugate gradients at most."""
SHORTEST = 1e-8
"""The shortest part of a Newton step that is tried."""
DENSE = 1500
"""Unknowns up to which the preconditioner is a dense inverse, in float32."""
LOW = 1e-3
"""The accuracy of directions that are searched in float32."""
REFINEMENTS = 8
"""Refinements of a solution in full precision at most."""
FALLS = 0.1
"""The part that a refinement leaves of a squared residual; where more is left, the next are in full precision."""
NEAR = 0.2
"""The relative change of all penalties up to which a preconditioner stays as it is."""
ROUNDED = 1e-6
"""What is added to the diagonal of a matrix in float32, as a part of its mean: less than that is rounding."""
STALLED = 1e-9
"""What the tolerance of `solve` is at least where rounding ends it; larger, the models count as not found."""
STALE = 24
"""Steps of conjugate gradients in one Newton step after which the preconditioner is made anew."""


class Preconditioner:
    """The inverse of ``H0 + A`` with the Hessian H0 of the data at some predictions, of which K weightings share one.

    Up to `DENSE` unknowns H0 is a dense matrix; above, its diagonal. All in float32.

    Args:
        system: the models.
        z: their predictions; H0 is at the mean.
    """

    def __init__(self, system: System, z: Tensor) -> None:
        z, loss, data = z.mean(0), system.loss, system.data
        curvature = loss.curvature(z, data.y)
        unit = torch.eye(z.shape[0]).to(z)[..., None].expand(-1, -1, z.shape[-1]) if z.dim() == 2 else None
        blocks = curvature[None, None] if unit is None else loss.hessian_product(curvature, unit)
        blocks = (blocks * system.weights.mean(0)).float()  # (outputs, outputs, rows)
        # Of softmax, intercepts that all change alike change nothing.
        self.shift = data.intercept and len(blocks) > 1 and bool((blocks.sum(1).abs() <= 1e-5).all())
        X1 = system.low.X1
        self.dense = X1 is not None and len(blocks) * X1.shape[1] <= DENSE
        self.hessian = self._matrix(system.low, blocks) if self.dense else self._diagonal(system.low, blocks)
        self.inverse = self.hessian
        self.bound: Tensor | None = None
        self.lost = False  # whether penalties are lost in rounding

    def bind(self, a: Tensor) -> None:
        """Take the penalties of the models, (K, [outputs,] p1): their mean."""
        mean = a.mean(0).float()
        if self.bound is not None and bool(((mean - self.bound).abs() <= NEAR * self.bound).all()):
            return
        self.bound = mean
        if not self.dense:
            self.inverse = 1.0 / (self.hessian.reshape(mean.shape) + mean)
            return
        hessian = self.hessian.clone()
        diagonal = hessian.diagonal()
        if self.shift:
            width = mean.shape[-1]
            last = slice(width - 1, None, width)
            hessian[last, last] += diagonal[last].mean()
        more = ROUNDED * diagonal.mean()
        penalised = mean.reshape(-1)[mean.reshape(-1) > 0]
        self.lost = not bool(more < penalised.min()) if len(penalised) else False
        self.inverse = torch.cholesky_inverse(factor(hessian, mean.reshape(-1) + more))

    def at(self, hessian: Tensor) -> Self:
        """Return one with another H0, of one weighting, as a matrix."""
        other = copy.copy(self)
        other.hessian, other.dense, other.bound = hessian, True, None
        return other

    def __call__(self, r: Tensor) -> Tensor:
        """Return the product with K vectors."""
        if self.dense:
            return (r.flatten(1).float() @ self.inverse).to(r.dtype).reshape(r.shape)
        return self.inverse * r

    def settle(self, w: Tensor) -> Tensor:
        """Take out of coefficients what all intercepts have in common, where that changes nothing."""
        if self.shift:
            w[..., -1] -= w[..., -1].mean(1, keepdim=True)
        return w

    def _matrix(self, system: System, blocks: Tensor) -> Tensor:
        X1, outputs = system.X1, len(blocks)
        assert X1 is not None
        if outputs == 1:
            return weighted_gram(X1, blocks[0, 0])
        rows, width = X1.shape
        if system.pairs is not None:
            return block_grams(system.pairs, blocks, width)
        hessian = X1.new_zeros(outputs, width, outputs, width)
        for c in range(outputs):
            rest = (X1.T * blocks[c, c:, None]).reshape(-1, rows) @ X1
            hessian[c:, :, c] = rest.reshape(outputs - c, width, width)
            hessian[c, :, c:] = hessian[c:, :, c].transpose(0, 1).clone()
        return hessian.reshape(outputs * width, outputs * width)

    def _diagonal(self, system: System, blocks: Tensor) -> Tensor:
        own = blocks.diagonal().T
        squares = system.data.squares(own)
        return torch.cat([squares, own.sum(-1, keepdim=True)], -1) if system.data.intercept else squares


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    r: Tensor,
    tol: Tensor,
    most: int = CG_STEPS,
) -> tuple[Tensor, int]:
    """Return ``H^-1 r`` of K systems, and the steps.

    A direction without curvature, or numbers that are not finite, end it where it is: these steps count as all.

    Args:
        product: with the matrices.
        inverse: the preconditioner.
        r: right-hand sides.
        tol: (K,) or (), by how much the preconditioned norm of each residual has to fall.
        most: steps at most.
    """
    x = torch.zeros_like(r)
    z = inverse(r)
    p, rz = z, dots(r, z)
    enough = tol.square() * rz
    for step in range(most):
        done = rz <= enough
        if bool(done.all()):
            return x, step
        q = product(p)
        curved = dots(p, q)
        # Written so that NaN counts as no curvature.
        if not bool(((curved > 0) | done).all()):
            return x, most
        # Those that are done wait for the others.
        alpha = spread((rz / curved).masked_fill(done, 0.0), r)
        x, r = x + alpha * p, r - alpha * q
        z = inverse(r)
        new = dots(r, z)
        p = z + spread((new / rz).masked_fill(done, 0.0), r) * p
        rz = new
    return x, most


def inverse_product(
    system: System, z: Tensor, a: Tensor, inverse: Preconditioner, r: Tensor, tol: float, guess: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return ``H^-1 r`` with the Hessians at predictions z, and the largest of what tol is of.

    Conjugate gradients in float32 are refined in full precision, and where that gains little, are in it themselves.

    Args:
        system: the models.
        z: predictions.
        a: penalties.
        inverse: the preconditioner.
        r: right-hand sides.
        tol: by how much the preconditioned norm of each residual has to fall.
        guess: where to start; None for zero.
    """
    product, quick = system.hessian(z, a), system.low.hessian(z.float(), a.float())
    first = dots(r, inverse(r))
    x, left = (torch.zeros_like(r), r) if guess is None else (guess, r - product(guess))
    rest = dots(left, inverse(left))
    multiply, dtype = quick, torch.float32
    for _ in range(REFINEMENTS):
        if bool((rest <= tol**2 * first).all()):
            break
        size = spread(left.flatten(1).norm(dim=1).clamp_min(torch.finfo(r.dtype).tiny), r)
        needed = (tol**2 * first / rest.clamp_min(torch.finfo(r.dtype).tiny)).sqrt().clamp(LOW, 1.0)
        step = conjugate_gradients(multiply, inverse, (left / size).to(dtype), needed.to(dtype))[0].to(r.dtype) * size
        x, before = x + step, rest
        left = r - product(x)
        rest = dots(left, inverse(left))
        if not bool((rest <= torch.maximum(FALLS * before, tol**2 * first)).all()):
            multiply, dtype = product, r.dtype  # float32 has no digit left for the weakest penalties
    return inverse.settle(x), float((rest / first.clamp_min(torch.finfo(r.dtype).tiny)).max()) ** 0.5


@dataclass
class Solved:
    """Solved models.

    Attributes:
        w: coefficients.
        z: predictions.
        preconditioner: bound to the penalties.
        slope: the gradient of the losses at w, without that of the penalties.
        work: products with the Hessians that were made.
        left: the largest of what the tolerance is of; infinite where penalties are lost in rounding.
    """

    w: Tensor
    z: Tensor
    preconditioner: Preconditioner
    slope: Tensor
    work: int
    left: float


def solve(
    system: System,
    a: Tensor,
    start: Tensor,
    kept: Preconditioner | None,
    tol: float,
    known: tuple[Tensor, Tensor] | None = None,
) -> Solved:
    """Return the models at penalties a, by Newton's method.

    Args:
        system: the models.
        a: penalties, shaped as the coefficients.
        start: coefficients.
        kept: a preconditioner of a solve near by.
        tol: the squared preconditioned gradient is then below this part of the objective.
        known: `Solved.z` and `Solved.slope` of the start, where it is the end of another solve.
    """
    w, low = start, a.float()
    z, slope = (system.product(start), None) if known is None else known
    fresh = kept is None  # whether the preconditioner is of these predictions
    inverse = Preconditioner(system, z) if kept is None else copy.copy(kept)
    inverse.bind(a)
    value, work = system.objective(w, z, a), 0
    before = last = torch.full_like(value, torch.inf)
    more = torch.ones_like(value)  # by how much the preconditioned norm was too small, by the last step's decrease
    for _ in range(STEPS):
        slope = system.slope(z) if slope is None else slope
        gradient = slope + a * w
        squared = dots(gradient, inverse(gradient))
        relative = more * squared / (value + 1e-12 * z.shape[-1])
        # Near rounding errors the objective says nothing any more, and at last neither does the gradient.
        stalled = (value >= before) & (relative > 0.5 * last)
        if inverse.lost or bool(((relative <= tol) | stalled).all()):
            break
        # As far as a Newton step is worth it, but not beyond what is asked for.
        eta = torch.maximum(relative, 0.1 * tol / relative).sqrt().clamp(LOW, 0.3)
        size = spread(gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(a.dtype).tiny), gradient)
        most, product = CG_STEPS if fresh else STALE, system.low.hessian(z.float(), low)
        step, steps = conjugate_gradients(product, inverse, (gradient / size).float(), eta.float(), most)
        step = inverse.settle(step.to(w.dtype) * size)
        work, before, last = work + steps, value, relative
        decrease = dots(gradient, step)
        more = (decrease / squared).clamp_min(1.0)
        w, z, new = searched(system, a, w, z, value.tolist(), step, decrease.tolist())
        value = value.new_tensor(new)
        slope = None
        fresh = steps >= STALE and not fresh
        if fresh:
            inverse = Preconditioner(system, z)
            inverse.bind(a)
    left = math.inf if inverse.lost else float(relative.max())
    return Solved(w, z, inverse, system.slope(z) if slope is None else slope, work, left)


def searched(
    system: System, a: Tensor, w: Tensor, z: Tensor, value: list[float], step: Tensor, decrease: list[float]
) -> tuple[Tensor, Tensor, list[float]]:
    """Return the ends of Newton steps, halved until the objective falls, and their objectives, by few calls."""
    dz = system.product(step)
    there, predicted = w - step, z - dz
    lengths = [1.0] * len(value)
    while True:
        new = system.objective(there, predicted, a).tolist()
        # Written so that NaN counts as a rise.
        fell = [
            now <= old - 1e-4 * length * by + 1e-12 * abs(old)
            for now, old, length, by in zip(new, value, lengths, decrease, strict=True)
        ]
        if all(ok or length <= SHORTEST for ok, length in zip(fell, lengths, strict=True)):
            break
        lengths = [length if ok else 0.5 * length for ok, length in zip(fell, lengths, strict=True)]
        length = torch.tensor(lengths).to(w)
        there, predicted = w - spread(length, w) * step, z - spread(length, z) * dz
    if not all(map(math.isfinite, new)):  # these stay where they are
        fine = spread(torch.tensor([math.isfinite(now) for now in new], device=w.device), w)
        there, predicted = torch.where(fine, there, w), torch.where(fine, predicted, z)
        new = [now if math.isfinite(now) else old for now, old in zip(new, value, strict=True)]
    return there, predicted, new
