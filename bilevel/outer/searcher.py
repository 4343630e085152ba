"""`Searcher`: an outer search on a problem, with its hyperparameters as one vector and estimates as its answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.base import Estimate
from bilevel.core import tree
from bilevel.core.status import Status
from bilevel.core.tree import Tree
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.accuracy import Accuracy
from bilevel.outer.constraints import bounds
from bilevel.outer.coordinates import Coordinates, Shrinkage, Softplus
from bilevel.outer.hyper_lbfgs import LBFGSState, SearchTrial
from bilevel.outer.hyper_newton import KNOWN, HyperNewton, NewtonState, NewtonTrial
from bilevel.outer.search import TOP, Accepted, Answer, OuterSearch, Trial
from bilevel.outer.trust_region import EDGE

MATRIX = 400
"""Up to this many hyperparameters their matrix of second derivatives is held, unless a `HyperNewton` is asked for."""
CHECKED = 1000
"""Up to this many hyperparameters the end of another search is examined by one: it costs many evaluations."""
LIMITS = {torch.float32: (-12.0, 10.0)}
"""Distances of a log penalty to the logarithm of its scale, by dtype; elsewhere (-28, 10)."""
NEAR = 1e-6
"""A hyperparameter this close to a limit is at it, apart from rounding in the coordinates."""
COUNTED = ("failure", "tol", "residual", "retries", "evaluations")
"""Numbers of a searcher that go on with a saved run."""
RETRIES = 3
"""Evaluations of one trial, each with a smaller inner residual, before it is rejected."""
VALUE = 0.3
"""The share of its correction by which a corrected outer loss may still be off."""
VALUES = Coordinates, Shrinkage, Softplus, NewtonState, NewtonTrial, LBFGSState, SearchTrial, Accepted, Answer, Trial
SAVED = {each.__name__: each for each in VALUES}


class OutsideLimits(ValueError):
    """A start that the limits of a search exclude."""


class Searcher:
    """A search on one problem: its hyperparameters as one vector, and estimates as its answers.

    The arguments are those of `OuterOptimizer`; `chooses`: it chooses accuracies, see `chooses_accuracy`. A scan of
    what is no log penalty is refused, and a start outside its bounds.
    """

    def __init__(
        self,
        search: OuterSearch[Any],
        problem: BilevelProblem,
        hparams: Tree,
        params: Tree,
        constraints: Any,
        chooses: bool = False,
    ) -> None:
        self.accuracy = Accuracy(search) if chooses else None
        self.optimizer, self.problem, self._params = search, problem, params
        self._raveler = tree.Raveler(hparams)
        (self._like, *_) = tree.leaves(hparams)
        u, scales = self._vector(hparams), problem.penalty_scales(hparams)
        lower, upper = (self._vector(each) for each in bounds(hparams, constraints))
        centre = np.zeros_like(u) if scales is None else np.log(self._vector(scales))
        kind = Coordinates if scales is None else search.coordinates(problem.structure.quadratic)
        if scales is None and search.start == "scan":
            raise ValueError(
                f"`{type(search).__name__}.start` 'scan' is for log penalties, which these hyperparameters are not: "
                "use start='given'."
            )
        if scales is not None:
            low, high = search.limits or LIMITS.get(self._like.dtype, (-28.0, 10.0))
            lower, upper = np.maximum(lower, centre + low), np.minimum(upper, centre + high)
        if np.any((u < lower) | (u > upper)):
            index = int(np.argmax((u < lower) | (u > upper)))
            raise OutsideLimits(
                f"hyperparameter {index} starts at {u[index]:.4g}, outside its limits {lower[index]:.4g} to "
                f"{upper[index]:.4g}: start inside, or give `limits`."
            )
        self.state = search.init(u, kind(centre, lower, upper))
        if scales is not None and search.start is None:
            self.state = replace(self.state, shift=TOP)
        self.state = replace(self.state, kinks=problem.nonsmooth is not None)
        self.start = self._tree(self.state.u)
        self._solution: tuple[Tree, Tree] | None = None
        self.tol: float | None = None
        self.failure = ""
        self.residual, self.retries, self.evaluations = math.nan, 0, 0

    def _vector(self, hparams: Tree) -> Any:
        return self._raveler.ravel(hparams).detach().double().cpu().numpy()

    def _tree(self, u: Any) -> Tree:
        return self._raveler.unravel(torch.from_numpy(u).to(self._like))

    @property
    def stopped(self) -> str:
        """How the search ended, and which hyperparameters are at their limits; empty while it goes on."""
        stopped, at, accepted = str(self.state.stopped), self.state.coordinates, self.state.accepted
        if not stopped or accepted is None:
            return f"{stopped}: {self.failure}" if stopped and self.failure else stopped
        # In the coordinates: near a shrinkage of one, rounding moves a log penalty by 1e-4 and more.
        v, high, low = (at.of(u) for u in (accepted.u, at.upper, at.lower))
        near = EDGE * np.minimum(np.abs(high - low), 1.0) + NEAR * np.abs(at.slope(accepted.u))
        penalties = at.of_penalties
        for end, meaning in (
            (high, "upper limit" + " (weights shrunk to zero)" * penalties),
            (low, "lower limit" + " (weights without a penalty)" * penalties),
        ):
            if count := int((np.abs(v - end) <= near).sum()):
                stopped += f"; {count} of {len(v)} at the {meaning}"
        return stopped

    def end(self, steps: int | None) -> str:
        """Return how the search ended, or that it took as many steps as it may; empty while it goes on."""
        if self.stopped or steps is None or self.evaluations < steps:
            return self.stopped
        return f"took {steps} steps, not converged: {self.foreseen()}"

    def clipped(self, hparams: Tree) -> Tree:
        """Return hyperparameters within the limits."""
        return self._tree(self.state.coordinates.clipped(self._vector(hparams)))

    def accepted(self) -> Tree | None:
        """Return the accepted hyperparameters, None before there are some."""
        return None if self.state.accepted is None else self._tree(self.state.accepted.u)

    def propose(self) -> Tree:
        """Return where the next hypergradient is wanted; once the search has ended, the accepted hyperparameters."""
        if self.accuracy is not None:
            self.state = self.accuracy.proposed(self._proposed, self.state)
        else:
            self.state = self._proposed(self.state)
            self._tighten()
        trial = self.state.trial or self.state.accepted
        return self._tree(self.state.u if trial is None else trial.u)

    def _proposed(self, state: Any) -> Any:
        """Return what the search proposes, with the second derivatives that it needs."""
        proposed = self.optimizer.propose(state)
        if proposed.trial is None and not proposed.stopped:
            proposed = self.optimizer.propose(self._completed(proposed))
        return proposed

    def _tighten(self) -> None:
        """Ask for a smaller inner residual where the value of the accepted point is to be known better."""
        trial, accepted = self.state.trial, self.state.accepted
        if trial is None or accepted is None or trial.kind != "again":
            return
        if not (trial.predicted > 0 and self.residual > 0):
            return
        wanted = KNOWN * trial.predicted / accepted.answer.error
        self.tol = self.residual * min(max(0.5 * wanted, 1e-3), 0.3)

    def _completed(self, state: Any) -> Any:
        """Return the state with the second derivatives at its accepted point, or with none where there are none."""
        accepted, second = state.accepted, None
        assert self._solution is not None
        params, adjoint = self._solution
        if adjoint is not None and self._differentiable(state):
            try:
                second = self.problem.hyper_hessians(self._tree(accepted.u), params, adjoint)
            except RuntimeError:
                # Some operation has no third derivative, or none for many vectors at once: a first-order search has
                # never needed one, and goes without.
                if isinstance(self.optimizer, HyperNewton):
                    raise
        found = () if second is None else tuple(each.double().cpu().numpy() for each in second)
        return replace(state, accepted=replace(accepted, answer=replace(accepted.answer, second=found)))

    def _differentiable(self, state: Any) -> bool:
        """Whether second derivatives are right here, and worth their price at the end of a search without them."""
        if isinstance(self.optimizer, HyperNewton):
            return True
        problem = self.problem
        known = (
            problem.optimality is None
            and problem.nonsmooth is None
            and not problem.variation
            and problem.wrong_third is None
        )
        return known and len(state.u) <= CHECKED

    def tell(self, estimate: Estimate) -> bool:
        """Take the hypergradient at the proposed point; returns whether it is the accepted point now."""
        self.evaluations += 1
        accuracy, cost = self.accuracy, estimate.cost.gradient_equivalents
        usable = estimate.status.ok if accuracy is None else accuracy.usable(estimate)
        self.failure = "" if usable else str(estimate.verdict)
        before, far = self.state.accepted, estimate.certificate.value_error
        if accuracy is not None:
            if accuracy.goes_on(self.state, estimate):
                return False
            cost = accuracy.spent
        elif estimate.status is Status.INACCURATE and far is not None and self.retries < RETRIES:
            # The value is far from that at the inner solution: the same point once more, with a smaller residual.
            self.tol, self.retries = 0.03 * estimate.certificate.inner_residual, self.retries + 1
            return False
        self.retries = 0
        answer = self._answer(estimate) if usable else None
        if accuracy is not None and accuracy.sharpening:
            self.state = replace(self.state, trial=None)
            if before is not None and answer is not None:
                self.state = replace(self.state, accepted=replace(before, answer=answer))
        else:
            self.state = self.optimizer.tell(self.state, answer, cost)
        taken = self.state.accepted is not before and self.state.accepted is not None
        if accuracy is not None:
            accuracy.told(taken)
        if taken:
            self._solution = (estimate.params, estimate.carry.adjoint)
            self.residual = estimate.certificate.inner_residual
        return taken

    def _answer(self, estimate: Estimate) -> Answer:
        """Return an estimate as an answer.

        With an adjoint vector a and the inner gradient g, ``f - a'g`` is the outer loss at the inner solution but for
        terms of second order.
        """
        correction = estimate.certificate.value_error or 0.0
        rounding = 4.0 * torch.finfo(self._like.dtype).eps * abs(estimate.outer_loss)
        value, error = estimate.outer_loss - correction, VALUE * abs(correction) + rounding
        if self.accuracy is not None:
            error += self.accuracy.bend * estimate.certificate.inner_residual**2
        return Answer(value, self._vector(estimate.hypergradient), error)

    def trial(self) -> tuple[str, float | None]:
        """Return the phase of the evaluation to come, and by how much the outer loss is to fall."""
        trial = self.state.trial
        predicted = trial.predicted if math.isfinite(trial.predicted) else None
        return ("scan" if self.state.shift is not None else trial.kind), predicted

    def foreseen(self) -> str:
        """Return what the search foresees, for the end of a run that was cut off."""
        trial, accepted = self.state.trial, self.state.accepted
        predicted = self.state.predicted if trial is None or not trial.predicted > 0 else trial.predicted
        if accepted is None or not math.isfinite(predicted) or accepted.answer.value == 0:
            return "nothing is foreseen yet"
        if self.state.kinks:
            return "the outer loss has kinks, and no bound of what may be left is known"
        return f"about {100 * predicted / abs(accepted.answer.value):.2g} % of the outer loss may be left"

    def saved(self) -> dict[str, Any]:
        """Return the state in plain containers and tensors."""
        solution = None if self._solution is None else [[*map(torch.clone, tree.leaves(x))] for x in self._solution]
        accuracy = None if self.accuracy is None else self.accuracy.saved()
        own = {name: getattr(self, name) for name in COUNTED}
        return {"state": _plain(self.state), "solution": solution, "accuracy": accuracy} | own

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take back what `saved` returned."""
        self.state, solution = _object(saved["state"]), saved["solution"]
        if solution is not None:
            params, adjoint = solution
            like = self.problem.trainable(self._params)
            self._solution = tree.rebuild(self._params, params), tree.rebuild(like, adjoint)
        else:
            self._solution = None
        for name in COUNTED:
            setattr(self, name, saved[name])
        if self.accuracy is not None:
            self.accuracy.restore(saved["accuracy"])


def _plain(value: Any) -> Any:
    """Return a state as containers, tensors and numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _object(value: Any) -> Any:
    """Return what `_plain` was given."""
    if isinstance(value, Mapping):
        return SAVED[value["class"]](**{name: _object(each) for name, each in value.items() if name != "class"})
    if isinstance(value, Tensor):
        return value.numpy().copy()
    return tuple(_object(each) for each in value) if isinstance(value, list | tuple) else value
