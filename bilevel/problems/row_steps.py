"""Steps of linear models on tensors that stay where they are, as a CUDA graph of them asks; see `RowDirections`.

    [0 w v] lies in one piece: [0 w] and [w v] times batches j and i are one product, and so is what comes back.

A step of SOBA launches 17 kernels for a logistic loss: a gather, two products, three for the loss; two for the penalty
and D_u; three for z, of which the first is the move by all directions; six for u, of which two are for its cap. Sums
over weights that share a penalty and bounds are one each, targets three. SABA gathers rows of its table, moves its
means, and writes the rows: three more, and one where batches i and j are of other shares of their rows. Nothing waits:
the numbers of a block of steps are uploaded before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.oracles.directions import Rule
from bilevel.problems.row_directions import RowDirections

ON_HOST = 10_000
"""Numbers in a batch up to which arrays on the host are quicker than tensors."""
BLOCK = 64
"""Steps whose numbers are uploaded at once."""
Kept = tuple[Tensor, Tensor]


class RowSteps(RowDirections):
    """The directions of a linear model, and whole blocks of steps, on static tensors.

    Args:
        problem: the problem.
        size: rows in a batch.
        seed: of the order of the rows.
    """

    host, static, form = False, True, "closed form"

    def _lay_out(self, size: int) -> None:
        inner, outer, d, group = self.inner, self.outer, self._features, self._group
        self._first, count = outer.count, self.size // d
        self._X = torch.stack([*outer.X, *inner.X])
        outer.X, inner.X = (list(each) for each in self._X.tensor_split([outer.count]))
        targets = [*outer.targets, *inner.targets]
        self._targets = None if targets[0] is None else torch.stack(targets)
        new = self._X.new_zeros
        # [0 w v pen], what windows of it make of both batches, (2 count, 2, rows), and the slopes and H v among it.
        self._places, P = new(4 * count, d), new(2 * count, 2, size)
        self._windows, self._batch = self._places.as_strided((2, 2 * count, d), (count * d, d, 1)), new(2, size, d)
        self._P, self._columns, shape = P.transpose(0, 1), self._batch.transpose(1, 2), (*self._shape[:-1], size)
        across = (2 * size,) * (len(shape) - 1)
        self._slopes = P.as_strided((2, *shape), ((2 * count - 1) * size, *across, 1), size)
        self._others = (self._slopes[1], self._slopes[0], P.as_strided(shape, (*across, 1), (2 * count + 1) * size))
        self._held = None if self._targets is None else self._targets[:2].clone()
        self._pair = (None, None) if self._held is None else self._held.unbind(0)
        self._faster = self.outer.scale / self.inner.scale
        self._z, self._weights = self._places[count : 3 * count].view(-1), self._places[count:].view(3, *self._shape)
        self._pen = self._weights[2]
        # Directions on both batches, as they were when last seen, and their means.
        self._six = new(6, 2 * self.size)
        self._new = self._six[:2].view(2, 2 * count, d)
        self._u, self._root, self._of_u, self._ratio = (new(group) for _ in range(4))
        self._spread, self._moved = self._u.expand(self._shape), new(self._shape) if self._shared else self._of_u
        self._least, self._ends, self._one, self._den = new(()), new(2), new(1).fill_(1.0), new(self._shape)
        self._between, self._shares = self._ends.unbind(0), new(2, 4)
        for level, each in enumerate((outer, inner)):
            self._shares[level, level], self._shares[level, level + 2] = each.share, -each.share
        self._table = new(0)
        self._numbers, self._index = new(BLOCK, 12), torch.zeros(BLOCK, 3, dtype=torch.long, device=self._X.device)
        split = [self._numbers.split_with_sizes([6, 1, 2, 2, 1], 1), (self._index[:, :2], self._index[:, 1:])]
        self._steps = list(zip(*(each.unbind(0) for part in split for each in part), strict=True))

    def array(self, flat: Tensor) -> Tensor:
        return flat.detach().clone()

    def tensor(self, array: Tensor) -> Tensor:
        return array

    def sampled(self, i: int, j: int, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        self._z.copy_(z)
        self._index[0].copy_(torch.tensor((j, self._first + i, j)))
        batches, others = self._steps[0][5:]
        self._sampled(batches, others, True)
        return self._six[1].clone(), self._six[0, self.size :].clone()

    def _sampled(self, batches: Tensor, others: Tensor, scaled: bool) -> None:
        """Write (0, f_w) on batch j and (g, H v) on batch i; `others` are the batches the other way round.

        Where they are not `scaled`, f_w lacks a factor.
        """
        torch.index_select(self._X, 0, batches, out=self._batch)
        torch.bmm(self._windows, self._columns, out=self._P)
        if self._targets is not None:
            torch.index_select(self._targets, 0, others, out=self._held)
        self._respond(self._slopes, self._others, self._pair)
        if scaled and self._faster != 1.0:
            self._others[0].mul_(self._faster)
        torch.baddbmm(self._new, self._P, self._batch, beta=0.0, alpha=self.inner.scale, out=self._new)

    def block(
        self, state: Any, tables: Sequence[Any], draws: Sequence[Any], factors: Sequence[float], rule: Rule
    ) -> tuple[list[Tensor], list[Kept]]:
        """Take up to 64 steps from a state, which stays as it is.

        Args:
            state: with z, u, and the roots of the sums of the squares of directions of u.
            tables: of inner and outer directions, and their means; none of a method without a memory.
            draws: for every step, batches i and j.
            factors: for every step, what multiplies its rates.
            rule: the rates.

        Returns:
            z, u and the roots, and the tables, afterwards.
        """
        self.hold(state, tables, draws, factors, rule)
        self.take(len(draws), bool(tables), rule)
        kept = self._kept(self._table.clone()) if tables else []
        ends = [self._z.clone(), self._u.reshape(-1).clone(), self._root.reshape(-1).clone()]
        return ends, [(rows, mean.clone()) for rows, mean in kept]

    def hold(
        self, state: Any, tables: Sequence[Any], draws: Sequence[Any], factors: Sequence[float], rule: Rule
    ) -> None:
        """Copy what steps start from, and their numbers, to where they find it."""
        for place, values in zip((self._z, self._u, self._root), (state.z, state.u, state.root), strict=True):
            place.view(-1).copy_(values)
        if tables and not len(self._table):
            self._table = self._X.new_zeros(len(self._X), 2 * self.size)
        self._six.zero_()  # a run that failed has left more than what is copied
        for places, given in zip(self._kept(self._table) if tables else (), tables, strict=True):
            for place, values in zip(places, given, strict=True):
                place.copy_(values if isinstance(values, Tensor) else torch.stack(values))
        outer, rows = 1.0 if tables else self._faster, []
        for factor in factors:
            at, length = rule.rate * factor, rule.length * (factor if rule.cap is None else 1.0)
            far = (rule.cap or 0.0) * at / length
            ends = -far, far, -far * self._smallest, far * self._smallest
            rows.append((-at * outer, -at, at, at, -at, -at, at, *ends, length))
        index = [(j, self._first + i, j) for i, j in draws]
        self._numbers[: len(rows)].copy_(torch.tensor(rows, dtype=self._X.dtype), non_blocking=True)
        self._index[: len(rows)].copy_(torch.tensor(index), non_blocking=True)

    def take(self, count: int, remembers: bool, rule: Rule) -> None:
        """Take steps from what `hold` has copied: nothing but kernels on the same tensors at every call."""
        bounds = None if rule.bounds is None else [each.view(self._group) for each in rule.bounds]
        for k, step in enumerate(self._steps[:count]):
            self._step(step, self._table if remembers else None, k >= rule.free, rule, bounds)

    def _step(self, step: Any, table: Tensor | None, moves: bool, rule: Rule, bounds: Any) -> None:
        weights, at, far, shift, rate, batches, others = step
        six, pen, u = self._six, self._pen, self._u
        self._sampled(batches, others, table is not None)
        if self._logarithm:
            torch.exp(self._spread, out=pen)
        else:
            pen.copy_(self._spread)
        if moves:
            torch.prod(self._weights if self._logarithm else self._weights[:2], 0, out=self._moved)
            if self._shared:
                torch.sum(self._moved, self._shared, keepdim=True, out=self._of_u)
        if table is None:
            self._z.addmv_(six[:2].t(), weights[:2])
        else:
            torch.index_select(table, 0, batches, out=six[2:4])
            self._z.addmv_(six.t(), weights)
            six[4:].addmm_(self._shares, six[:4])
            table.index_copy_(0, batches, six[:2])
        torch.addcmul(self._one, pen, at, out=self._den)
        self._weights[:2].div_(self._den)
        if not moves:
            return
        if rule.cap is None:
            u.addcmul_(self._of_u, rate, value=-1.0)
        else:
            torch.amin(pen, (), out=self._least)
            torch.addcmul(shift, far, self._least, out=self._ends)
            self._root.hypot_(self._of_u)
            torch.div(self._of_u, self._root, out=self._ratio)
            torch.clamp(self._ratio, *self._between, out=self._ratio)
            u.sub_(self._ratio, alpha=rule.length)
        if bounds is not None:
            torch.clamp(u, *bounds, out=u)

    def _kept(self, table: Tensor) -> list[Kept]:
        means = self._six[4:]
        return [(table[self._first :], means[1]), (table[: self._first, self.size :], means[0, self.size :])]


def row_directions(problem: Any, size: int, seed: int) -> RowDirections | None:
    """Return the directions of a linear model; None for one whose oracles are not those of this package."""
    if not (problem.solved_on_host and problem.predicts_linearly and problem.parametrization in ("log", "direct")):
        return None
    few = min(size, max(problem.train.rows, problem.val.rows)) * problem.params.numel() <= ON_HOST
    return (RowDirections if few and problem.train.X.is_cpu else RowSteps)(problem, size, seed)
