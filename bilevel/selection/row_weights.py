"""`learn_row_weights`: a weight for every training row, learned on trusted rows, kept only where others confirm it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from bilevel.base import Carry
from bilevel.core.threads import short_operations
from bilevel.criteria.choose import choose_criterion
from bilevel.criteria.criterion import Array
from bilevel.criteria.data import LinearData
from bilevel.criteria.penalties import Penalties
from bilevel.hypergrad import Implicit
from bilevel.hypergrad.hypergradient import hypergradient
from bilevel.inner import Newton, QuasiNewton
from bilevel.linear import CG, Direct
from bilevel.problems.losses import GLMLoss
from bilevel.problems.sample_weights import RowWeightProblem
from bilevel.selection.folds import make_folds
from bilevel.selection.gate import Choice, choose, kappa_of, rounding_of
from bilevel.selection.honest import has_risen
from bilevel.selection.scalar import best_penalty

SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Quantiles of the losses of rows, of which a row has the weight one half."""
SHARPNESS = 2.0
"""How fast weights fall with the logarithm of the loss."""
ROUNDS = 2
"""Solves for each quantile: losses of rows under weights are those of the next weights."""
STEPS = (2, 5)
"""Steps of single rows after which there is a node."""
HIGHEST, FREE = 8.0, 3.0
"""The logit of a full weight, and the largest from which single rows move."""
RISE = 1.0
"""How far the logit of a single row may rise. Of outliers that pull against each other some help by chance."""
SMALL = 400
"""Weights of the model up to which Hessians are factored."""
INTERCEPT = 1e-8
"""The penalty of an intercept, as a part of the number of rows: with softmax only differences of them count."""


Pair = tuple[NDArray[np.intp], NDArray[np.intp]]
Judge = Callable[[Array, NDArray[np.intp], NDArray[np.intp]], Array]


class WeightNode(NamedTuple):
    """Weights of the training rows, and what they give.

    Attributes:
        name: how they were found.
        u: their logits, (rows,).
        losses: of the trusted rows, (trusted,).
        row_losses: of the training rows, (rows,).
    """

    name: str
    u: Tensor
    losses: Array
    row_losses: Array

    @property
    def weights(self) -> Array:
        """Of the training rows, from 0 to 1."""
        return torch.sigmoid(self.u).double().cpu().numpy()


@dataclass(frozen=True, eq=False)
class RowWeights:
    """Weights of the training rows, and what speaks for them.

    Attributes:
        weights: of the chosen node, (rows,), from 0 to 1; all one where no others are proved to be better.
        learned: of the best node besides equal weights, whether or not it was chosen, (rows,).
        names: of the nodes.
        fitted: mean loss of the trusted rows with the weights that were learned on them, (nodes,).
        choice: of a node, by the losses of trusted rows on which no weight was learned; None without an outer loop.
        judged: the same of the chosen node alone, by the losses of a model of the caller's; None without one, and where
            no node was chosen.
        chosen: the index of the node.
        penalty: of the model, of standardised columns and sums of losses.
        solves: fits of a model.
        seconds: processor time.
    """

    weights: Array
    learned: Array
    names: tuple[str, ...]
    fitted: Array
    choice: Choice | None
    judged: Choice | None
    chosen: int
    penalty: float
    solves: int
    seconds: float


def learn_row_weights(
    data: LinearData,
    X_trusted: Any,
    y_trusted: Tensor,
    loss: GLMLoss,
    *,
    guard: bool = True,
    folds: int = 5,
    kappa: float | None = None,
    judge: Judge | None = None,
    random_state: int = 0,
    progress: bool = False,
) -> RowWeights:
    """Return weights of the training rows with which a linear model predicts trusted rows better.

        min over s   mean loss of the trusted rows under w(s)
                     w(s) = argmin sum_i s_i loss(x_i'w + b, y_i) + 1/2 pen |w|^2,   0 <= s_i <= 1

    As many weights as rows over-fit the trusted ones. So a path goes from equal weights to weights that all follow from
    the losses of the rows by one number, ``s_i = 1 / (1 + (loss_i / t)^2)`` with t a quantile of the losses, and from
    the best of these to weights that move singly along the hypergradient of `RowWeightProblem`. An outer loop learns
    without a part of the trusted rows and takes their losses; a gate keeps equal weights unless the gain is proved.
    These losses choose the node, too, of nine at most, which flatters it a little.

    Args:
        data: the training rows, standardised by themselves; their weights are not looked at.
        X_trusted: rows whose targets are right, as they were given, (trusted, features), dense.
        y_trusted: targets as the loss takes them, (trusted,).
        loss: of a prediction.
        guard: whether there is an outer loop; without, the node that fits the trusted rows best is taken.
        folds: of the trusted rows.
        kappa: standard errors of the gain that open the gate; None: see `kappa_of`.
        judge: losses of the model that weights are meant for, which may tune penalties of its own: (weights of the
            rows, trusted rows that they were learned on, trusted rows held out) -> (held out,). Its gain, too, has to
            be proved.
        random_state: seed of the folds.
        progress: whether a line shows the folds.

    Raises:
        ValueError: in one sentence, for sparse inputs that are too large to be dense, and fewer than 2 trusted rows.

    >>> from bilevel.problems import Squared
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((80, 2))
    >>> y = X[:, 0] + 0.1 * rng.standard_normal(80)
    >>> y[:3] += 9.0
    >>> found = learn_row_weights(LinearData.of(X[:50], y[:50]), X[50:], torch.tensor(y[50:]), Squared())
    >>> sorted(found.weights.argsort()[:3].tolist())
    [0, 1, 2]
    """
    began = time.process_time()
    if len(y_trusted) < 2:
        raise ValueError(f"row weights need at least 2 trusted rows, got {len(y_trusted)}.")
    X, V = data.dense(), (torch.as_tensor(X_trusted).to(data.offset) - data.offset) / data.scale
    if data.intercept:
        X, V = (torch.cat([part, part.new_ones(len(part), 1)], 1) for part in (X, V))
    labels = y_trusted.cpu().numpy() if loss.separable else None
    with short_operations():
        penalty = _penalty(data, loss, random_state)
        every = np.arange(len(y_trusted))
        walk = _Walk(X, data.y, V, y_trusted, loss, penalty, data.intercept)
        nodes = list(walk.path(every))
        choice = judged = None
        if guard:
            pairs = make_folds(len(every), min(folds, len(every)), labels=labels, seed=random_state)
            losses = np.full((len(nodes), len(every)), np.nan)
            folds_nodes: list[list[WeightNode | None]] = []
            for learn, held in tqdm(pairs, disable=not progress, unit="fold", desc="outer loop"):
                folds_nodes.append(list(walk.path(learn)))
                for index, node in enumerate(folds_nodes[-1]):
                    losses[index, held] = np.nan if node is None else node.losses[held]
            losses[[each is None for each in nodes]] = np.nan
            kappa = kappa_of(loss, losses[0], data.rows) if kappa is None else kappa
            choice = choose(losses, kappa, "one_se", rounding_of(loss, data))
            if choice.node and judge is not None:
                weights_of = [_weights(each[choice.node]) for each in folds_nodes]
                judged = _judged(judge, pairs, weights_of, kappa, rounding_of(loss, data))
    fitted = np.array([np.nan if each is None else each.losses.mean() for each in nodes])
    best = choice.best if choice is not None and choice.best > 0 else 1 + int(np.nanargmin(fitted[1:]))
    chosen = int(np.nanargmin(fitted)) if choice is None else choice.node
    chosen = 0 if judged is not None and not judged.open else chosen
    weights = np.ones(data.rows) if chosen == 0 else _weights(nodes[chosen])
    seconds = time.process_time() - began
    learned = _weights(nodes[best])
    return RowWeights(weights, learned, walk.names, fitted, choice, judged, chosen, penalty, walk.solves, seconds)


def _weights(node: WeightNode | None) -> Array:
    """Return the weights of a node that there is."""
    assert node is not None
    return node.weights


def _judged(judge: Judge, pairs: Sequence[Pair], weights: Sequence[Array], kappa: float, rounding: float) -> Choice:
    """Return equal weights or those of the folds, by the losses of the rows that they hold out."""
    losses = np.empty((2, sum(len(held) for _, held in pairs)))
    for (learn, held), learned in zip(pairs, weights, strict=True):
        losses[0, held], losses[1, held] = judge(np.ones_like(learned), learn, held), judge(learned, learn, held)
    return choose(losses, kappa, rounding=rounding)


def _penalty(data: LinearData, loss: GLMLoss, seed: int) -> float:
    """Return the best single penalty of the training rows with equal weights."""
    penalties = Penalties.scalar(data.features, loss.outputs(data.y))
    labels = data.y.cpu().numpy() if loss.separable else None
    folds = make_folds(data.rows, min(5, data.rows), labels=labels, seed=seed)
    found = best_penalty(choose_criterion("auto", data, loss, penalties, folds=folds))
    return float(np.exp(found.u[0]))


class _Walk:
    """Paths of weights, each learned on some of the trusted rows.

    Args:
        X: standardised training rows, the last column of ones where there is an intercept.
        y: their targets.
        V: trusted rows, likewise.
        y_trusted: their targets.
        loss: of a prediction.
        penalty: of every coefficient but the intercept.
        intercept: whether there is one.
    """

    def __init__(
        self, X: Tensor, y: Tensor, V: Tensor, y_trusted: Tensor, loss: GLMLoss, penalty: float, intercept: bool
    ) -> None:
        self.X, self.y, self.V, self.y_trusted, self.loss = X, y, V, y_trusted, loss
        self.penalty = X.new_full((X.shape[1],), penalty)
        if intercept:
            self.penalty[-1] = INTERCEPT * len(X)
        small = X.shape[1] * (loss.outputs(y) or 1) <= SMALL
        self.solver = Newton(tol=1e-8) if small else QuasiNewton(tol=1e-5)
        self.estimator = Implicit(Direct() if small else CG(tol=1e-3))
        by_loss, by_row = (f"by loss, half at {share:g}" for share in SHARES), (f"by row, {n} steps" for n in STEPS)
        self.names = ("equal weights", *by_loss, *by_row)
        self.solves = 0
        self._known: list[WeightNode | None] = []
        self._carry: Carry | None = None

    def path(self, learn: NDArray[np.intp]) -> Iterator[WeightNode | None]:
        """Yield the nodes; None in place of those after the loss of the rows that it learns on has clearly risen."""
        rows = torch.from_numpy(learn)
        problem = self._problem(self.V[rows], self.y_trusted[rows])
        shared: list[WeightNode] = []
        losses: list[Array] = []
        for index in range(1 + len(SHARES)):
            node = self._shared(index) if len(shared) == len(losses) else None
            losses.append(np.full(len(learn), np.inf) if node is None else node.losses[learn])
            if node is not None and not has_risen(losses):
                shared.append(node)
            yield node
        u = min(shared, key=lambda each: float(each.losses[learn].mean())).u.clamp(-HIGHEST, FREE)
        yield from self._by_row(problem, u)

    def _problem(self, V: Tensor, t: Tensor) -> RowWeightProblem:
        return RowWeightProblem(self.X, self.y, V, t, glm=self.loss, penalty=self.penalty, loss="sum")

    def _shared(self, index: int) -> WeightNode | None:
        """Return equal weights, or those by the losses of rows; they follow from the training rows alone."""
        problem = self._problem(self.V, self.y_trusted)
        while len(self._known) <= index:
            at = len(self._known)
            node = self._known[-1] if at else None
            if at == 0:
                full = self.X.new_full((len(self.X),), HIGHEST)
                node, _, self._carry = self._solve(problem, self.names[0], full, None)
            for _ in range(ROUNDS if at else 0):
                if node is not None:
                    u = _by_loss(node.row_losses, SHARES[at - 1]).to(self.X)
                    node, _, self._carry = self._solve(problem, self.names[at], u, self._carry)
            self._known.append(node)
        return self._known[index]

    def _by_row(self, problem: RowWeightProblem, u: Tensor) -> Iterator[WeightNode | None]:
        """Yield nodes of single rows, by steps along the hypergradient whose largest entry is one."""
        names = dict(zip(STEPS, self.names[1 + len(SHARES) :], strict=True))
        failed, most, carry = False, u + RISE, self._carry
        for step in range(1 + max(STEPS, default=-1)):
            node = None
            if not failed:
                node, gradient, carry = self._solve(problem, names.get(step, ""), u, carry)
                failed = node is None
                u = (u - gradient / gradient.abs().max().clamp_min(torch.finfo(u.dtype).tiny)).minimum(most)
            if step in names:
                yield node

    def _solve(
        self, problem: RowWeightProblem, name: str, u: Tensor, carry: Carry | None
    ) -> tuple[WeightNode | None, Tensor, Carry | None]:
        """Return the node at u, its hypergradient and what the next solve starts from; None where it fails."""
        self.solves += 1
        estimate = hypergradient(problem, self.solver, self.estimator, u, carry=carry, check=False, on_failure="return")
        w = estimate.params
        assert isinstance(w, Tensor)
        assert isinstance(estimate.hypergradient, Tensor)
        if not estimate.status.usable or not bool(torch.isfinite(w).all()):
            return None, estimate.hypergradient, carry
        of_trusted, of_rows = (
            self.loss.value(X @ w if w.dim() == 1 else w @ X.T, y).double().cpu().numpy()
            for X, y in ((self.V, self.y_trusted), (self.X, self.y))
        )
        return WeightNode(name, u, of_trusted, of_rows), estimate.hypergradient, estimate.carry


def _by_loss(losses: Array, share: float) -> Tensor:
    """Return the logits of weights ``1 / (1 + (loss / t)^2)``, t the quantile of the losses."""
    logs = np.log(np.maximum(losses, 1e-9 * losses.mean() + 1e-300))
    u = SHARPNESS * (np.quantile(logs, share) - logs)
    return torch.from_numpy(np.clip(u, -HIGHEST, HIGHEST))
