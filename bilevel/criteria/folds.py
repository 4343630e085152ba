"""K-fold and hold-out of any generalised linear model, with exact gradients by one adjoint system for each fold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria import newton_cg, newton_dense
from bilevel.criteria.criterion import Array, Criterion, Evaluation, Fit, shared, warn_unsolved
from bilevel.criteria.data import DENSE, LinearData, Rows
from bilevel.criteria.penalties import Penalties
from bilevel.criteria.splits import checked_folds, restricted
from bilevel.criteria.system import System
from bilevel.problems.losses import GLMLoss

DIRECT = 400
"""Coefficients, or rows, up to which Hessians of one output are factored."""
FINE = 1e-3
"""The part of the tolerance that conjugate gradients go to: gradients are then right to a part in 200,000. Newton
steps with factored Hessians leave its square anyway."""
FEW = 8
"""Penalties up to which the Jacobian is exact where systems are solved by conjugate gradients."""
ROUGH = 1e-4
"""The tolerance of a first look: held-out losses are off by a part in a thousand, at the weakest penalties in 200."""


@dataclass(eq=False)
class _Solved:
    """Fold models at some penalties, and what the next ones start from."""

    u: Array
    w: Tensor  # (K, p1) or (K, outputs, p1)
    z: Tensor  # predictions of all rows
    a: Tensor
    kept: newton_cg.Preconditioner | None = None
    columns: list[Tensor] | None = None  # dw/du_j, of few penalties
    adjoint: Tensor | None = None
    right: bool = True  # whether all systems were solved


class KFold(Criterion):
    """The mean loss of held-out folds under the models of the other rows; a hold-out is one fold.

    With ``w_k`` the model of fold k's training rows, ``H_k`` its Hessian and ``g_k`` the derivatives of the validation
    losses by its coefficients,

        dvalue/du_j = -sum_k a_kj w_kj (H_k^-1 g_k)_j

    where a_kj is the penalty in the units of the data: every fold standardises columns by its own training rows.
    Hessians of one output with few columns are factored, those of all folds at once; else Newton steps are solved by
    conjugate gradients, which only multiply by X.

    The Gauss-Newton matrix is that of the exact Jacobian, but for more than 8 penalties of several outputs, of many
    columns or of sparse inputs, where the Hessian is that of the preconditioner.

    Args:
        data: the rows.
        loss: of any number of outputs.
        penalties: which coefficients share a penalty.
        folds: pairs (training rows, validation rows), such as ``StratifiedKFold(5).split(X, y)`` of scikit-learn.
        tol: relative decrease of the training objective that a model may be away from its minimum.

    >>> import numpy as np
    >>> from bilevel.problems import Logistic
    >>> data = LinearData.of([[0.0], [1.0], [2.0], [3.0]], [0, 1, 0, 1], loss=Logistic())
    >>> criterion = KFold(data, Logistic(), Penalties.scalar(1), [([0, 3], [1, 2]), ([1, 2], [0, 3])])
    >>> round(criterion.evaluate(np.array([0.0])).value, 4)
    1.4802
    """

    name = "held-out folds"

    def __init__(
        self, data: LinearData, loss: GLMLoss, penalties: Penalties, folds: Iterable[Any], *, tol: float = 1e-10
    ) -> None:
        super().__init__(data, loss, penalties)
        self.folds, self.tol = checked_folds(folds, data, loss), tol

    @shared
    def _weights(self) -> Tensor:
        """Those of the training rows of every fold, (K, rows); zeros for all others."""
        masks = torch.zeros(len(self.folds), self.data.rows).to(self.data.weights)
        for mask, (train, _) in zip(masks, self.folds, strict=True):
            mask[train] = 1.0
        return masks * self.data.weights

    @shared
    def _variance(self) -> Tensor:
        """Of the training columns of every fold, (K, features); one where a column is constant."""
        _, scale = self.data.moments(self._weights)
        return scale.masked_fill(scale == 0, 1.0).square() if self.data.standardize else torch.ones_like(scale)

    @shared
    def _system(self) -> System:
        system = System(self.data, self.loss, self._weights)
        if self._direct or self._few:
            vars(system)["X1"] = self.data.with_ones()  # of few entries, sparse ones, too
        return system

    @property
    def _direct(self) -> bool:
        data, small = self.data, self.data.rows * self.data.features <= newton_dense.ENTRIES
        dense = small or not data.sparse
        return self.penalties.outputs is None and dense and min(data.features, data.rows) <= DIRECT

    @property
    def _few(self) -> bool:
        """Whether Hessians of several outputs are factored."""
        data, outputs = self.data, self.penalties.outputs or 0
        few = 0 < outputs * (data.features + 1) <= newton_dense.MOST
        return few and data.rows * data.features <= newton_dense.ENTRIES

    def compute(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        solved, data = self._solve(u, warm), self.data
        z, y = self._held(solved.z), data.y[self.held_out]
        count, weight = len(self.held_out), self.share if z.dim() == 1 else self.share[None]
        slopes, curvatures = weight * self.loss.slope(z, y), self.loss.curvature(z, y)
        losses = (self.share * self.loss.value(z, y)).double().cpu().numpy()
        invert = self._inverses(solved)
        moved = solved.a * solved.w
        gauss_newton, jacobian = None, z[..., None]
        few = self.penalties.size == 1 or (second and self.penalties.size <= FEW)
        if second or few:
            jacobian = self._jacobian(solved, moved, invert, None if few else solved.kept, warm)
            flat = jacobian.reshape(-1, self.penalties.size)
        if few:
            gradient = flat.T @ slopes.reshape(-1) / count
        else:
            start = None if warm is None else warm.adjoint
            solved.adjoint = invert(self._system.collect(self._scattered(slopes / count, solved.z)), start)
            gradient = self.penalties.gather(-(moved * solved.adjoint)[..., : data.features].sum(0))
        if second:
            turned = self.share[:, None] * self._turned(curvatures, jacobian)
            gauss_newton = (flat.T @ turned.reshape(flat.shape) / count).double().cpu().numpy()
        curvatures = weight * curvatures if self.penalties.outputs is None else curvatures
        value = float(losses.mean()) if solved.right else np.inf
        shaped = (z, slopes, curvatures, jacobian if second else None)
        return Evaluation(value, gradient.double().cpu().numpy(), gauss_newton, losses, *shaped, solved)

    def refit(self, u: Array, warm: Any = None) -> Fit:
        # One fold that trains on all rows and validates on none.
        whole = copy.copy(self)
        whole.known = {}
        every = torch.arange(self.data.rows)
        whole.folds = [(every, every[:0])]
        start = None if warm is None else replace(warm, w=warm.w.mean(0, keepdim=True), columns=None)
        solved = whole._solve(u, start)
        if not solved.right:
            warn_unsolved(u)
        return self._fit(solved.w[0])

    def fits(self, evaluation: Evaluation) -> list[tuple[Fit, Tensor]]:
        return [(self._fit(w), held) for w, (_, held) in zip(evaluation.warm.w, self.folds, strict=True)]

    def rough(self) -> Self:
        if self._direct or self._few or self.tol >= ROUGH:
            return self
        other = copy.copy(self)
        other.tol = ROUGH
        return other

    def scan(self, u: Array) -> list[Evaluation]:
        if self.tol < ROUGH:
            return super().scan(u)
        found: list[Evaluation] = []
        for each in u:
            found.append(self.evaluate(each, found[-1].warm if found else None, second=False))
            # Of a first look, the models of the best alone are started from; those of large data take room.
            best = min(found, key=lambda one: one.value)
            found[:-1] = [one if one is best else replace(one, warm=None) for one in found[:-1]]
        return found

    def take(self, rows: Rows) -> Self:
        folds = restricted(self.folds, rows, self.data.rows)
        return type(self)(self.data.take(rows), self.loss, self.penalties, folds, tol=self.tol)

    def _fit(self, w: Tensor) -> Fit:
        if not self.data.intercept:
            return self.given(w, w.new_zeros(w.shape[:-1]))
        return self.given(w[..., :-1], w[..., -1])

    def _penalties(self, u: Array) -> Tensor:
        """Return those of every fold in the units of the data, zero for the intercept, (K, [outputs,] p1)."""
        a = self.penalties.spread(u).exp().to(self._variance)
        a = a * (self._variance if a.dim() == 1 else self._variance[:, None])
        return torch.nn.functional.pad(a, (0, 1)) if self.data.intercept else a

    def _solve(self, u: Array, warm: _Solved | None) -> _Solved:
        a = self._penalties(u)
        start = torch.zeros_like(a) if warm is None else warm.w.expand(a.shape)
        if warm is not None and warm.columns is not None and warm.u.shape == u.shape:
            for column, by in zip(warm.columns, np.clip(u - warm.u, -1.0, 1.0), strict=True):
                start = start + float(by) * column
        if self._direct or self._few:
            w, z, right = newton_dense.solve(self._system, a, start, self.tol)
            return _Solved(np.array(u), w, z, a, right=right)
        found = newton_cg.solve(self._system, a, start, None if warm is None else warm.kept, self._fine)
        if not found.left <= self._fine and found.preconditioner.dense:
            w, z, right = newton_dense.solve(self._system, a, start, self.tol)
            return _Solved(np.array(u), w, z, a, right=right)
        right = found.left <= max(self._fine, newton_cg.STALLED)  # written so that NaN is not
        return _Solved(np.array(u), found.w, found.z, a, found.preconditioner, right=right)

    @property
    def _fine(self) -> float:
        """The tolerance of conjugate gradients."""
        return self.tol if self.tol >= ROUGH else FINE * self.tol

    def _inverses(self, solved: _Solved) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Return the function from right-hand sides (K, [outputs,] p1), and a guess, to solutions."""
        kept = solved.kept
        if kept is not None:
            tol, at = self._fine**0.5, (self._system, solved.z, solved.a)

            def inverse(r: Tensor, guess: Tensor | None) -> Tensor:
                x, left = newton_cg.inverse_product(*at, kept, r, tol, guess)
                if not left <= tol and kept.dense:
                    return newton_dense.inverses(*at)(r)
                solved.right &= left <= max(tol, newton_cg.STALLED**0.5)
                return x

            return inverse
        invert = newton_dense.inverses(self._system, solved.z, solved.a)
        return lambda r, guess: invert(r)

    def _jacobian(self, solved: _Solved, moved: Tensor, invert: Any, rough: Any, warm: _Solved | None) -> Tensor:
        """Return the derivatives of the held-out predictions, ([outputs,] held, k); few coefficients' are kept.

        Args:
            solved: the models.
            moved: ``a w``.
            invert: the function that solves systems.
            rough: a rough inverse in its place; None for no such.
            warm: models near by.
        """
        if rough is not None and (found := self._by_entries(moved, rough)) is not None:
            return found
        size, owner, columns = self.penalties.size, self.penalties.owner.to(moved.device), []
        guesses = [None] * size if warm is None or warm.columns is None else warm.columns
        if len(guesses) != size:
            guesses = [None] * size
        if self.data.intercept:
            owner = torch.nn.functional.pad(owner, (0, 1), value=-1)
        predictions = []
        for each, guess in enumerate(guesses):
            r = moved if size == 1 else moved * (owner == each)
            column = -(invert(r, None if guess is None else -guess) if rough is None else rough(r))
            predictions.append(self._held(self._system.product(column)))
            columns.append(column)
        solved.columns = columns if size <= FEW else None
        return torch.stack(predictions, -1)

    def _by_entries(self, moved: Tensor, rough: newton_cg.Preconditioner) -> Tensor | None:
        """Return `_jacobian` by what every coefficient adds to it; None where a product for each penalty takes less."""
        data, owner, parts = self.data, self.penalties.owner.to(moved.device), []
        w, shape = -moved[..., : data.features], moved.shape[1:]
        if rough.dense:
            if self.penalties.size * len(moved) < owner.numel():
                return None
            columns = rough.inverse.reshape(-1, shape[-1], *shape)[:, : data.features].flatten(0, 1)
            z = self._system.product(columns.to(moved))  # of every coefficient: (coefficients, [outputs,] rows)
            for wk, (_, held) in zip(w, self.folds, strict=True):
                by = wk.flatten() * z[..., held].movedim(0, -1)
                parts.append(self.penalties.gather(by.unflatten(-1, owner.shape)))
            return torch.cat(parts, -2)
        if data.rows * data.features > DENSE:
            return None
        X, w = data.dense(), w * rough.inverse[..., : data.features]  # an output's coefficients change that alone
        for wk, (_, held) in zip(w, self.folds, strict=True):
            by = wk[..., None, :] * X[held]
            index = owner[..., None, :].expand(by.shape)
            parts.append(by.new_zeros(*by.shape[:-1], self.penalties.size).scatter_add_(-1, index, by))
        return torch.cat(parts, -2)

    def _turned(self, curvatures: Tensor, jacobian: Tensor) -> Tensor:
        """Return the products of the second derivatives with the Jacobian."""
        if self.penalties.outputs is None:
            return curvatures[:, None] * jacobian
        return self.loss.hessian_product(curvatures, jacobian.movedim(-1, 0)).movedim(0, -1)

    def _held(self, z: Tensor) -> Tensor:
        """Return the predictions of the rows that each fold has not seen, ([outputs,] held), from those of all rows."""
        return torch.cat([zk[..., held] for zk, (_, held) in zip(z, self.folds, strict=True)], -1)

    def _scattered(self, values: Tensor, like: Tensor) -> Tensor:
        """Return values of the held-out rows in their places of all rows, (K, [outputs,] rows), else zeros."""
        result, start = torch.zeros_like(like), 0
        for zk, (_, held) in zip(result, self.folds, strict=True):
            zk[..., held] = values[..., start : start + len(held)]
            start += len(held)
        return result
