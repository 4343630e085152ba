"""`SingleLoop`: params, adjoint and hyperparameters move together, each step on a batch, with evidence now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from bilevel.base import Estimate, describe
from bilevel.core import tree
from bilevel.core.options import require_value
from bilevel.core.status import GOOD, OnFailure, Status, Verdict, check_on_failure, report
from bilevel.core.tree import Tree
from bilevel.oracles.directions import Array, Directions, LossDirections, Rule, on_all_data
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.checks import check_callbacks, check_start, check_steps, check_stochastic, check_switches, start_of
from bilevel.outer.constraints import bounds
from bilevel.outer.records import OuterResult, Record, record_of, shown_record
from bilevel.outer.single_loop_evidence import evaluated
from bilevel.outer.single_loop_rates import followed, measured
from bilevel.outer.single_loop_state import State, load, saved
from bilevel.outer.stochastic import APART, CAP, LEAST, RENEWED, SAFE, SETTLED, Averages, StochasticMethod, drawn
from bilevel.outer.stopping import StoppingRules, columns, failure, with_remark

Callback: TypeAlias = "Callable[[SingleLoop, Estimate], bool | None]"
LOOK = 64
"""Steps between two looks at whether all numbers are finite."""
GROWN = 1e6
"""A norm of (w, v) beyond which a run has diverged."""
BATCH = 64


class SingleLoop:
    """A stochastic single loop: each step moves params w, adjoint v and hyperparameters u at once, on two batches.

    An inner solve is never waited for. Every `method.every` steps a `Record` is made on all data: outer loss and
    hypergradient ``f_u + C' v`` at the present (w, v, u), the residuals of w and v, and with `certify` the distance to
    the hypergradient at the inner solution, which a solve from w finds.

    Linear models take steps by closed forms, in which the penalty is exact; its step is implicit or, where features are
    few, preconditioned. All other problems take steps of their losses, recorded as one graph; their batches are those
    of ``sampler=MiniBatches(...)`` and ``outer_sampler=``, or all data where they have none.

    Args:
        problem: the problem.
        method: `SOBA` or `SABA`, with batch size, step sizes and seed.
        hparams: where to start; None for the problem's own ``initial_hparams()``.
        constraints: bounds of ``torch.distributions.constraints``, or a dict of them by key; steps end at them.
        params: where w starts; default: the problem's start. v starts at zero.
        certify: compare each record with a hypergradient at the inner solution, which takes an inner solve each.
        on_failure: "raise" (default), "warn" or "return", for a run that is not finite or diverges; it stays where it
            last was finite.
        callbacks: called as ``callback(loop, estimate)`` after each record; a True return stops `run`.

    Raises:
        ValueError: in one sentence, for a problem that has no such steps, and options that do not fit.

    >>> import torch
    >>> from bilevel.outer.stochastic import SABA
    >>> from bilevel.problems import LogisticProblem
    >>> X = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> y = (X[:, 0] > 0).double()
    >>> loop = SingleLoop(LogisticProblem(X[:100], y[:100], X[100:], y[100:]), SABA(batch_size=20, every=500))
    >>> result = loop.run(2000, progress=False)
    >>> [record.step for record in result.history], result.history[-1].outer_loss < result.history[0].outer_loss
    ([500, 1000, 1500, 2000], True)
    """

    search, size, choice, scheduler = None, None, "", None

    def __init__(
        self,
        problem: BilevelProblem,
        method: StochasticMethod,
        hparams: Tree = None,
        *,
        constraints: Any = None,
        params: Tree = None,
        certify: bool = True,
        on_failure: OnFailure = "raise",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        require_value("problem", problem, "a BilevelProblem", isinstance(problem, BilevelProblem))
        require_value("method", method, "a method such as SABA()", isinstance(method, StochasticMethod))
        check_on_failure(on_failure)
        check_switches(certify, True)
        hparams = start_of(problem) if hparams is None else hparams
        check_start(hparams)
        check_stochastic(problem)
        self.problem, self.method, self.certify, self.on_failure = problem, method, certify, on_failure
        self.callbacks, self.all_data = check_callbacks(callbacks), on_all_data(problem)
        w = problem.start(params)
        self.all_data.check(w, hparams)
        leaves = [*tree.leaves(w), *tree.leaves(hparams)]
        if len({(leaf.dtype, leaf.device) for leaf in leaves}) > 1:
            raise ValueError("SingleLoop takes params and hyperparameters of one dtype on one device.")
        self._of_params, self._of_hparams = tree.Raveler(w), tree.Raveler(hparams)
        self.directions = self._made(w, hparams)
        ends = (self._of_hparams.ravel(each) for each in bounds(hparams, constraints))
        self._bounds = None if constraints is None else [self.directions.array(end.to(leaves[0])) for end in ends]
        flat = self._of_params.ravel(tree.copied(w))
        z = self.directions.array(torch.cat([flat, torch.zeros_like(flat)]))
        u = self.directions.array(self._of_hparams.ravel(tree.copied(hparams)))
        made = self._preconditioner(u)
        rate, least = measured(method, self.directions, z, u) if made is None else (SAFE / made[1], 0.0)
        tiny = leaves[0].new_full((u.shape[0],), torch.finfo(leaves[0].dtype).tiny ** 0.5)
        memories = method.memories(self.directions, z, u)
        self.state = State(0, z, u, self.directions.array(tiny), memories, rate, least, made and made[0], u, 1)
        self._follows = made is None and self.directions.varies and isinstance(method.inner_step, str)
        self.state = followed(method, self.directions, self.state) if self._follows else self.state
        settled = math.ceil(SETTLED / (SAFE if made is None else rate))
        self.freeze = settled if method.freeze == "auto" else int(method.freeze)
        usual = 0.3 if made is None else 1.0
        self.length = usual if isinstance(method.outer_step, str) else float(method.outer_step)
        self.histories: list[list[Record]] = [[]]
        self.best: tuple[float, Tree] = (math.inf, self.hparams)

    def _made(self, params: Tree, hparams: Tree) -> Directions:
        method, problem = self.method, self.problem
        made: Directions | None = None
        if problem._sampling is None and problem.nonsmooth is None:
            made = problem.directions(method.batch_size or BATCH, method.seed)
        if made is None and method.batch_size is not None:
            raise ValueError(
                f"`{type(method).__name__}.batch_size` is for linear models: {type(problem).__name__} has the batches "
                "of its samplers, such as sampler=MiniBatches((X, y), batch_size=64)."
            )
        made = LossDirections(problem, params, hparams) if made is None else made
        if method.fixed and None in made.parts:
            raise ValueError(
                f"{type(method).__name__} keeps a direction for every batch, so batches must stay the same and hold "
                "all rows: take MiniBatches with a batch_size that divides the rows, or SOBA."
            )
        return made

    def _preconditioner(self, u: Array) -> tuple[Array, float] | None:
        asked = self.method.preconditioner == "auto" == self.method.inner_step
        return self.directions.preconditioner(u) if asked else None

    def _renewed(self, u: Array, anchor: Array, metric: Array, rate: float) -> tuple[Array, Array, float, int]:
        """Return hyperparameters and the preconditioner there, its rate, and in how many steps to look again."""
        far = float(abs(u - anchor).max())
        if far > RENEWED and (made := self._preconditioner(u)) is not None:
            metric, rate, anchor, far = made[0], SAFE / made[1], u, 0.0
        most = CAP * LEAST * rate if self.method.scaling == "adagrad" else math.inf
        steps = (APART - far) / most
        return anchor, metric, rate, int(steps) if steps > 1.0 else 1

    def __repr__(self) -> str:
        parts = f"{type(self.problem).__name__}, {describe(self.method)}, {self.directions.form}"
        return f"SingleLoop({parts}: {self.steps_taken} steps taken)"

    @property
    def hparams(self) -> Tree:
        """The present hyperparameters."""
        return self._of_hparams.unravel(self.directions.tensor(self.state.u).clone())

    current = evaluated = hparams
    """As outer loops call them."""

    @property
    def params(self) -> Tree:
        """The present params."""
        return self._of_params.unravel(self.directions.tensor(self.state.z)[: self.directions.size].clone())

    @property
    def adjoint(self) -> Tree:
        """The present v, shaped as params; approximates ``-H^-1 f_w``."""
        return self._of_params.unravel(self.directions.tensor(self.state.z)[self.directions.size :].clone())

    @property
    def history(self) -> list[Record]:
        """One `Record` for every `method.every` steps."""
        return self.histories[0]

    @property
    def steps_taken(self) -> int:
        """Steps so far, those before a resume included."""
        return self.state.step

    def step(self) -> Estimate:
        """Take steps up to the next record, and make it.

        Returns:
            The `Estimate` at the hyperparameters after these steps, on all data.

        Raises:
            HypergradientError: with ``on_failure="raise"``, for a run that is not finite or diverges; the message names
                the step.
        """
        every = self.method.every
        return self._advance(every - self.steps_taken % every)

    def hold(self, index: int) -> None:
        """Do nothing: rows stand still in loops of rows."""

    def run(
        self,
        steps: int,
        *,
        budget: float | None = None,
        tol: float | None = None,
        patience: int | None = None,
        min_progress: float = 0.0,
        progress: bool = True,
    ) -> OuterResult:
        """Take up to `steps` more steps; the rules are looked at where records are made, the last of them at the end.

        Arguments are those of `OuterOptimizer.run`; batches cost their share of the rows.

        Returns:
            The result; a second call continues. With `certify` the best loss is that at the inner solution.
        """
        check_steps(steps)
        rules, end = StoppingRules(budget, tol, patience, min_progress), self.steps_taken + steps
        reason = failure(self.history) or rules.reason(self.history)
        estimate: Estimate | None = None
        with tqdm(total=steps, disable=not progress, unit="step") as line:
            while not reason and self.steps_taken < end:
                before = self.steps_taken
                every = self.method.every
                estimate = self._advance(min(every - before % every, end - before))
                line.set_postfix_str(shown_record(self.history[-1]), refresh=False)
                line.update(self.steps_taken - before)
                answers = [callback(self, estimate) for callback in self.callbacks]
                reason = failure(self.history, estimate.verdict) or rules.reason(self.history)
                reason = reason or ("a callback asked to stop" if any(each is True for each in answers) else "")
        taken = f"took {steps} steps"
        reason = reason or rules.end(taken, *columns(self.history), True, [each.step for each in self.history])
        if estimate is not None and not failure(self.history):
            reason = with_remark(reason, self.problem, estimate.params, self.hparams)
        return OuterResult(self.hparams, tree.copied(self.best[1]), self.best[0], tuple(self.history), reason)

    def _advance(self, count: int) -> Estimate:
        """Take so many steps and make a record of where they end."""
        began, last = time.perf_counter(), self.history[-1].step if self.history else 0
        verdict = GOOD
        # A callback may have replaced what losses refer to.
        directions = self.directions = self.directions.begin(self.state.z, self.state.u)
        while count > 0 and verdict.status.usable:
            block = min(count, LOOK)
            state, verdict = self._block(self.state, block), GOOD
            if not self._is_finite(state):
                state, verdict = self._named(self.state, block)
            self.state, count = state, count - block
        state = self.state
        if verdict.status.ok:
            ((i, j),) = zip(*drawn(self.method.seed, state.step - 1, 1, directions.parts), strict=True)
            if not directions.held(i, j, state.z, state.u):
                raise ValueError(
                    "the losses give other numbers than where these steps began, as what they refer to has changed in "
                    "between: make them functions of their arguments alone."
                )
        estimate, value = evaluated(self, verdict, state.step - last, began)
        self.history.append(record_of(state.step, estimate))
        if estimate.status.usable and value < self.best[0]:
            self.best = (value, self.hparams)
        report(estimate.verdict, "return" if estimate.status.usable else self.on_failure, estimate)
        return estimate

    @np.errstate(all="ignore")  # what overflows is looked at, and named
    def _block(self, state: State, count: int) -> State:
        """Return the state after so many steps."""
        method, directions, bound = self.method, self.directions, self._bounds
        draws = list(zip(*drawn(method.seed, state.step, count, directions.parts), strict=True))
        factors = self._factors(state.step, count)
        if directions.static:
            cap, free = CAP if method.scaling != "none" else None, self.freeze - state.step
            rule = Rule(state.rate, self.length, cap, free, bound)
            tables = [(each.table, each.mean) for each in state.memories if isinstance(each, Averages)]
            (z, u, root), made = directions.block(state, tables, draws, factors, rule)
            memories = [each if not made else Averages(*made.pop(0)) for each in state.memories]
            return replace(state, step=state.step + count, z=z, u=u, root=root, memories=memories)
        sampled, complete, shrunk = directions.sampled, directions.complete, directions.shrunk
        z, u, root, first, d = state.z, state.u, state.root, state.step, directions.size
        inner, outer = (each.copied() for each in state.memories)
        rate, metric, anchor, until = state.rate, state.metric, state.anchor, state.until
        free, capped = self.freeze - first, method.scaling != "none"
        for k, (i, j) in enumerate(draws):
            q, f = sampled(i, j, z, u)
            direction, f = inner(i, q), outer(j, f)
            direction[d : d + f.shape[0]] += f
            of_z, of_u, penalty = complete(direction, z, u)
            at = rate * factors[k]
            if metric is None:
                z = shrunk(z - at * of_z, at, penalty)
            else:
                z = z - at * directions.turned(of_z, z, penalty, metric)
            if k >= free:
                least = None if not capped else LEAST if metric is not None else directions.least(penalty, state.least)
                cap = None if least is None else CAP * at * least
                u, root = method.moved(u, of_u, root, self.length, factors[k], cap)
                if bound is not None:
                    u = u.clip(*bound)
                if metric is not None and (until := until - 1) <= 0:
                    anchor, metric, rate, until = self._renewed(u, anchor, metric, rate)
            if self._follows and (until := until - 1) <= 0:
                now = replace(state, step=first + k + 1, z=z, u=u, anchor=anchor, rate=rate)
                state = followed(method, directions, now)
                anchor, rate, until = state.anchor, state.rate, state.until
        return State(first + count, z, u, root, [inner, outer], rate, state.least, metric, anchor, until)

    def _factors(self, first: int, count: int) -> list[float]:
        """Return by what the rates of some steps are multiplied."""
        method, parts = self.method, self.directions.parts
        after = method.decay_after or parts[0] or 1.0 / self.directions.shares[0]
        return [(1.0 + k / after) ** -method.decay for k in range(first, first + count)]

    def _is_finite(self, state: State) -> bool:
        z, u = map(self.directions.tensor, (state.z, state.u))
        return bool(torch.isfinite(z.sum() + u.sum()))

    def _named(self, state: State, count: int) -> tuple[State, Verdict]:
        """Return the last finite state of a block that ends otherwise, and what is to be said of the next step."""
        for _ in range(count):
            after = self._block(state, 1)
            if not self._is_finite(after):
                break
            state = after
        name, smaller = type(self.method).__name__, f"take a smaller inner_step than {state.rate:.3g}"
        if float(self.directions.tensor(state.z).norm()) > GROWN:
            what = f"{name} diverges: at step {state.step + 1} its numbers are infinite"
            return state, Verdict(Status.DIVERGED, f"{what}; {smaller}")
        what = f"{name} at step {state.step + 1} made its numbers NaN or infinite"
        return state, Verdict(Status.NOT_FINITE, f"{what}; if no loss is so there, {smaller}")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, in plain containers and tensors: ``torch.load(weights_only=True)`` reads it.

        A run that loads it goes on to the same numbers bit for bit.
        """
        return saved(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned for the same problem and method; it is not changed.

        Raises:
            ValueError: for something else; nothing is loaded then.
        """
        load(self, state)
