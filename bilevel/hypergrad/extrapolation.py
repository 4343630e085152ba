"""What the adaptive estimators share: reduced rank extrapolation, a budget, the record of a run, the crossing rule.

Reduced rank extrapolation (RRE; Eddy 1979, Sidi 2017) of vectors ``z_0, ..., z_{m+1}`` with ``D_i = z_{i+1} - z_i``:

    minimise |sum_i g_i D_i|  subject to  sum_i g_i = 1:   G g = 1,  G = D D' / tr(D D') + r I,  g <- g / sum g
    z* ~ sum_i g_i z_{i+1}

It is exact where the differences span at most m + 1 eigenvectors of a linear iteration that has no eigenvalue one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState
from bilevel.core import tree
from bilevel.core.cost import WEIGHTS
from bilevel.core.device import to_floats
from bilevel.core.status import Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.judge import InnerRun
from bilevel.oracles.inner_problem import InnerProblem

OMEGA = WEIGHTS["vjp"] / WEIGHTS["gradient"]
"""Cost of one derivative step in plain steps."""
ITERATE_ORDERS = (4, 8, 12)
ADJOINT_ORDERS = (5, 10, 20)
SWEEP_ORDERS = (2, 5, 8, 12, 20)
CHECKS = 50
"""The crossing rule looks once in ``K / CHECKS`` plain steps."""
WINDOW = 5
RATE_LIMITS = (1e-3, 1.0 - 1e-6)
CROSSING = 0.5
"""Multiple of the truncation term at which the path term is small enough. The minimax choice, where their ratio is
known up to a factor 10 either way, is ``10^((1 - omega) / (1 + omega))`` = 0.32 for omega = 3; measured, the run then
stops a little late."""


@dataclass(frozen=True)
class Extrapolation:
    """One extrapolated vector."""

    vector: Tensor  # sum_i g_i z_{i+1}
    residual: float  # |sum_i g_i D_i|, which is zero at the fixed point
    order: int  # m


def reduced_rank(vectors: Sequence[Tensor], orders: Sequence[int]) -> list[Extrapolation]:
    """Extrapolate the end of a sequence with several orders.

    Args:
        vectors: the sequence, each of shape (size,), at least two; the last ``max(orders) + 2`` are used.
        orders: the m to try; one that the sequence is too short for becomes the largest that fits.

    Returns:
        One `Extrapolation` for each different order; a sequence that stands still gives its last vector.

    >>> matrix = torch.tensor([[0.9, 0.2], [0.0, -0.5]], dtype=torch.float64)
    >>> z = [torch.zeros(2, dtype=torch.float64)]
    >>> for _ in range(4):
    ...     z.append(matrix @ z[-1] + 1.0)
    >>> reduced_rank(z, (2,))[0].vector  # (I - matrix)^-1 (1, 1) = (11.33.., 0.66..)
    tensor([11.3333,  0.6667], dtype=torch.float64)
    """
    stacked = torch.stack(list(vectors[-(max(orders) + 2) :]))
    differences = stacked[1:] - stacked[:-1]
    tried = sorted({min(order, len(differences) - 1) for order in orders})
    vectors, scalars = [], [torch.dot(stacked[-1], stacked[-1])]
    for order in tried:
        D = differences[-(order + 1) :]
        weights, trace = _weights(D)
        vectors.append(weights @ stacked[-(order + 1) :])
        scalars += [trace, torch.linalg.vector_norm(weights @ D)]
    size, *pairs = to_floats(scalars)
    if any(not trace > 1e-30 * size for trace in pairs[::2]):
        return [Extrapolation(stacked[-1], 0.0, 0)]
    return [Extrapolation(*result) for result in zip(vectors, pairs[1::2], tried, strict=True)]


def _weights(D: Tensor) -> tuple[Tensor, Tensor]:
    """Return (g, tr(D D')) for differences of shape (m + 1, size); g is NaN where they vanish."""
    gram = D @ D.t()
    trace = torch.trace(gram)
    # Rounding in the Gram matrix needs a ridge: 1e-12 in float64, 5e-6 in float32.
    ridge = torch.finfo(D.dtype).eps ** 0.767
    ones = torch.ones(len(D), dtype=D.dtype, device=D.device)
    weights, _ = torch.linalg.solve_ex(gram / trace + torch.diag(ridge * ones), ones)
    return weights / weights.sum(), trace


def best(candidates: Sequence[Extrapolation]) -> Extrapolation:
    """Return the extrapolation with the smallest residual."""
    return min(candidates, key=lambda candidate: candidate.residual)


@dataclass(frozen=True)
class Budget:
    """What may be spent, `total` in gradient-equivalents, against what the inner problem has counted since `before`.

    Inner steps, derivative products, measured step sizes and the looks of an adaptive method are paid from it. What
    every estimator pays besides, one residual and one outer loss, comes on top and is less than one derivative step.
    """

    total: float
    inner: InnerProblem
    before: float

    @classmethod
    def of(cls, total: float, inner: InnerProblem) -> Budget:
        """Start a budget now."""
        return cls(total, inner, counted(inner))

    def left(self, steps: int = 0) -> float:
        """Return what is left after `steps` inner steps, which cost at least one each, counted or not."""
        return self.total - max(counted(self.inner) - self.before, float(steps))


def counted(inner: InnerProblem) -> float:
    """Return the counts of a problem in gradient-equivalents."""
    return sum(WEIGHTS[kind] * count for kind, count in inner.counts.items())


def with_steps(solver: InnerSolver, steps: int, dtype: torch.dtype) -> InnerSolver:
    """Return the solver with another number of steps; a tolerance stays in force, the default one included."""
    return replace(solver, steps=max(1, steps), tol=solver.limits(dtype)[1])


def discount_doubt(run: InnerRun, solver: InnerSolver) -> InnerRun:
    """Return the run without a doubt about a tolerance that the user did not ask for: a budget ends before it."""
    if run.verdict.status is Status.INNER_NOT_CONVERGED and solver.tol is None:
        return replace(run, verdict=Verdict())
    return run


class Record:
    """The states of a forward run, of params shaped as `like`, as far as something may still ask for them."""

    def __init__(self, solver: InnerSolver, like: Tree) -> None:
        self._solver = solver
        self._raveler = tree.Raveler(like)
        self._states: list[InnerState | None] = []
        self._previous: Tensor | None = None
        self.lengths: list[Tensor] = []
        """``|x_{i+1} - x_i|``."""

    @property
    def last(self) -> int:
        """Index of the last state."""
        return len(self._states) - 1

    def add(self, state: InnerState) -> Tensor:
        """Store the next state and return its iterate as one vector."""
        vector = self._flat(state)
        if self._previous is not None:
            self.lengths.append(torch.linalg.vector_norm(vector - self._previous))
        self._previous = vector
        self._states.append(state)
        return vector

    def close(self, state: InnerState) -> None:
        """Store the last state of a run, unless it has been shown already."""
        if not self._states or self._states[-1] is not state:
            self.add(state)

    def drop(self, start: int, stop: int) -> None:
        """Forget the states from `start` to `stop` (excluded)."""
        for index in range(max(start, 0), stop):
            self._states[index] = None

    def _flat(self, state: InnerState) -> Tensor:
        return self._raveler.ravel(self._solver.params(state)).detach()

    def vector(self, index: int) -> Tensor:
        """Return an iterate as one vector."""
        state = self._states[index]
        if state is None:
            raise IndexError(f"state {index} of the run has been dropped.")
        return self._flat(state)

    def end(self, count: int) -> list[Tensor]:
        """Return the last iterates, at most `count`, as vectors; what was dropped ends the list."""
        vectors: list[Tensor] = []
        for state in reversed(self._states[-count:]):
            if state is None:
                break
            vectors.append(self._flat(state))
        return vectors[::-1]

    def tail(self, count: int) -> list[InnerState]:
        """Return the states that the last `count` steps start from."""
        stop = self.last
        return [state for state in self._states[max(0, stop - count) : stop] if state is not None]

    def unravel(self, vector: Tensor) -> Tree:
        """Return a vector as a tree shaped as params."""
        return self._raveler.unravel(vector)

    def rate(self) -> float:
        """Return the contraction per step, from the steps' lengths.

        The largest of `WINDOW` lengths now against the largest of `WINDOW` an even number of steps ago: windows see
        through the alternation of modes +-rho and through the ripples of momentum.
        """
        low, high = RATE_LIMITS
        apart = min(20, len(self.lengths) // 3) // 2 * 2
        if apart < 2 or len(self.lengths) < apart + WINDOW:
            return high
        lengths = torch.stack(self.lengths[-(apart + WINDOW) :]).double().cpu()
        now, then = float(lengths[-WINDOW:].max()), float(lengths[:WINDOW].max())
        return min(max((now / then) ** (1.0 / apart), low), high) if then > 0 else low


class Crossing:
    """When to stop the forward run if the rest of the budget goes into a sweep over the last n steps.

    After k plain steps of cost one the budget T leaves ``n = floor((T - k) / omega)`` derivative steps. With xh the
    extrapolated iterate and th the contraction, two terms of the derivative's error are known up to a common factor:

        truncation   |S_n| / |S_0|,   S_j = sum_{i=j}^{k-1} (x_i - xh)     decay of the part that the sweep leaves out
        path         n (1 - th) |x_k - xh| / |xh|                          derivatives taken away from the solution

    The path term falls and the truncation term rises with k; the run stops where they cross. If both are monotone and
    exact, their sum is then at most twice the best one (up to one step's jump). The sweep leaves `reserve`.
    """

    def __init__(self, record: Record, budget: Budget, reserve: float = 0.0) -> None:
        self.record = record
        self._budget = budget
        self._reserve = reserve
        self.full_unroll = max(1, int((budget.left() - reserve) / (1.0 + OMEGA)))
        """K: the steps of a full unroll, where the rule begins to look."""
        self._whole: Tensor | None = None
        self._late: Tensor | None = None
        self._span = (0, 0)

    @property
    def n(self) -> int:
        """Derivative steps that the budget leaves now."""
        k = self.record.last
        return max(0, min(k, int((self._budget.left(k) - self._reserve) / OMEGA)))

    def visit(self, state: InnerState) -> bool:
        """Take the next state; True stops the run at it."""
        record = self.record
        before = record.last
        if before >= 0:
            x = record.vector(before)
            self._whole = x.clone() if self._whole is None else self._whole + x
        record.add(state)
        k, n = record.last, self.n
        if k < self.full_unroll:
            return False
        if n <= 1:
            return True
        if (k - self.full_unroll) % max(1, self.full_unroll // CHECKS) != 0:
            return False
        return self._crossed(k, n)

    def _crossed(self, k: int, n: int) -> bool:
        late = self._sum(n, k)
        # States between the two ends are asked for by nobody: the sweep takes the last n, the sum the first n.
        self.record.drop(n, k - max(n, SWEEP_ORDERS[-1] + 2))
        if k < 8 or self._whole is None:
            # Nothing can be estimated from so few steps: drop an eighth of the derivative steps.
            return n <= 0.875 * self.full_unroll
        xh = best(reduced_rank(self.record.end(ITERATE_ORDERS[-1] + 2), ITERATE_ORDERS)).vector
        truncation = torch.linalg.vector_norm(late - (k - n) * xh)
        start = torch.linalg.vector_norm(self._whole - k * xh)
        away = torch.linalg.vector_norm(self.record.vector(k) - xh)
        path = n * (1.0 - self.record.rate()) * away
        return bool(path * start <= CROSSING * truncation * torch.linalg.vector_norm(xh))

    def _sum(self, n: int, k: int) -> Tensor:
        """Return ``sum_{i=n}^{k-1} x_i``; n never grows, so only what is new is added."""
        start, stop = self._span if self._late is not None else (n, n)
        total = torch.zeros_like(self.record.vector(k)) if self._late is None else self._late
        for index in (*range(stop, k), *range(n, start)):
            total = total + self.record.vector(index)
        self._late, self._span = total, (n, k)
        return total
