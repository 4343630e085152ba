"""`OuterOptimizer`: descend hypergradients with any torch optimizer, warm starts, constraints and a resumable state."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel import tree
from bilevel.base import Carry, Estimate, HypergradEstimator, InnerSolver, InnerState
from bilevel.constraints import ConstraintTransform
from bilevel.hypergrad import hypergradient
from bilevel.hypergrad.arguments import check_roles
from bilevel.inputs import check_tensors
from bilevel.outer_checks import check_callbacks, check_makers, check_state, check_steps
from bilevel.problem import BilevelProblem
from bilevel.status import OnFailure, report
from bilevel.tree import Tree

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]
MakeScheduler: TypeAlias = Callable[[torch.optim.Optimizer], Any]
Callback: TypeAlias = "Callable[[OuterOptimizer, Estimate], bool | None]"

FORMAT = 1


@dataclass(frozen=True)
class WarmStart:
    """Which parts one outer step hands to the next.

    Args:
        state: the inner state (iterate, momentum, moments).
        adjoint: the adjoint vector, the start of the linear solver.
    """

    state: bool = True
    adjoint: bool = True


@dataclass(frozen=True)
class Record:
    """One outer step, as numbers; the hypergradient was taken before the step moved the hyperparameters."""

    step: int
    outer_loss: float
    hypergradient_norm: float
    inner_residual: float
    adjoint_residual: float | None
    error: float | None
    error_kind: str
    status: str
    inner_steps: int
    adjoint_steps: int
    gradient_equivalents: float
    seconds: float
    peak_memory: int | None


@dataclass(frozen=True)
class OuterResult:
    """How an outer run ended.

    Attributes:
        hparams: the hyperparameters after the last step.
        best_hparams: those with the smallest outer loss seen.
        best_loss: that loss.
        history: one `Record` for each step.
        stopped: why the run ended, in words.
    """

    hparams: Tree
    best_hparams: Tree
    best_loss: float
    history: Sequence[Record] = field(repr=False)
    stopped: str


def steps_without_progress(losses: Iterable[float], min_progress: float) -> int:
    """Return how many of the last losses came without one below the best before them by more than `min_progress`.

    >>> steps_without_progress([3.0, 1.0, 2.0, 1.0], 0.0)
    2
    """
    best, waited = math.inf, 0
    for loss in losses:
        waited += 1
        if loss < best - min_progress:
            best, waited = loss, 0
    return waited


@dataclass(frozen=True)
class StoppingRules:
    """When a run ends; a function of its history alone. The attributes are the options of `OuterOptimizer.run`."""

    budget: float | None
    tol: float | None
    patience: int | None
    min_progress: float

    def reason(self, history: Sequence[Record]) -> str:
        """Return why a run with this history ends, or an empty string."""
        if self.tol is not None and history and history[-1].hypergradient_norm <= self.tol:
            return f"the hypergradient norm reached {self.tol:g}"
        waited = steps_without_progress((record.outer_loss for record in history), self.min_progress)
        if self.patience is not None and waited >= self.patience:
            return f"no progress for {self.patience} steps"
        if self.budget is not None and sum(record.gradient_equivalents for record in history) >= self.budget:
            return f"the budget of {self.budget:g} gradient-equivalents is used"
        return ""


class OuterOptimizer:
    """The outer loop: hypergradient, optimizer step, warm start.

    Each `step` takes the hypergradient at the present hyperparameters and moves them. With constraints, the torch
    optimizer moves free variables z and ``hparams = transform(z)``; the hypergradient is pulled back by the chain rule.

    Args:
        problem: the problem.
        solver: the inner solver.
        estimator: the hypergradient estimator.
        hparams: where to start; must satisfy the constraints.
        optimizer: makes a torch optimizer from the list of free tensors; default ``Adam(lr=0.1)``.
        scheduler: makes a torch scheduler from the optimizer; stepped once an outer step.
        constraints: a ``torch.distributions.constraints`` object for all hyperparameters, or a dict of them by key for
            dict hyperparameters (missing keys are free): positive, interval(a, b), simplex, ...
        warm_start: True, False, or a `WarmStart` that switches each part.
        params: where the inner solver starts; default: the problem's start.
        certify: estimate the error of every hypergradient; costs a refinement round each.
        on_failure: "raise" (default), "warn" or "return"; after a failed hypergradient the hyperparameters do not move.
        callbacks: called as ``callback(outer, estimate)`` after each step; a True return stops `run`.
        batch: number of members whose hyperparameters are tuned side by side, each with its own history and its own
            end: the object is then a `BatchOuterOptimizer`. A problem that is a batch already needs none.

    >>> from bilevel import GradientDescent, Implicit, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> outer = OuterOptimizer(
    ...     problem, GradientDescent(), Implicit(), torch.zeros(2, dtype=torch.float64),
    ...     optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
    ... )
    >>> result = outer.run(5, progress=False)
    >>> [record.step for record in result.history]
    [1, 2, 3, 4, 5]
    """

    def __new__(
        cls, problem: BilevelProblem | None = None, *args: Any, batch: int | None = None, **options: Any
    ) -> OuterOptimizer:
        """Choose the class of the loop: one problem, or a batch."""
        if cls is OuterOptimizer and (batch is not None or getattr(problem, "batch", None) is not None):
            from bilevel.batch_outer import BatchOuterOptimizer

            cls = BatchOuterOptimizer
        return super().__new__(cls)

    def __init__(
        self,
        problem: BilevelProblem,
        solver: InnerSolver,
        estimator: HypergradEstimator,
        hparams: Tree,
        optimizer: MakeOptimizer | None = None,
        *,
        scheduler: MakeScheduler | None = None,
        constraints: Any = None,
        warm_start: bool | WarmStart = True,
        params: Tree = None,
        certify: bool = False,
        on_failure: OnFailure = "raise",
        callbacks: Sequence[Callback] = (),
        batch: int | None = None,
    ) -> None:
        if on_failure not in ("raise", "warn", "return"):
            raise ValueError(f"`on_failure` must be 'raise', 'warn' or 'return', got {on_failure!r}.")
        if not isinstance(warm_start, bool | WarmStart):
            raise ValueError(f"`warm_start` must be True, False or a WarmStart, got {warm_start!r}.")
        check_roles(problem, solver, estimator)
        check_tensors("hparams", hparams)
        check_makers(optimizer, scheduler)
        self.problem, self.solver, self.estimator = problem, solver, estimator
        self.warm_start = warm_start if isinstance(warm_start, WarmStart) else WarmStart(warm_start, warm_start)
        self.certify, self.on_failure, self.callbacks = certify, on_failure, check_callbacks(callbacks)
        self.params = params
        self._transform = ConstraintTransform(hparams, constraints)
        self._free = self._transform.inverse(hparams)
        # The first step starts exactly where the user said, not where the transform's rounding puts it.
        self._hparams = tree.tree_map(torch.clone, tree.detach(hparams))
        make = optimizer or (lambda tensors: torch.optim.Adam(tensors, lr=0.1))
        self.optimizer = make(tree.leaves(self._free))
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ValueError(
                "`optimizer` must make a torch.optim.Optimizer from a list of tensors, "
                f"got {type(self.optimizer).__name__}: try optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1)."
            )
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"`{type(self.optimizer).__name__}` evaluates the loss several times in one step, but an outer step "
                "takes one hypergradient: use a first-order optimizer, such as torch.optim.Adam or SGD."
            )
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        self.carry = Carry()
        self.history: list[Record] = []
        self.best: tuple[float, Tree] = (math.inf, self._hparams)
        self._checked = False

    @property
    def hparams(self) -> Tree:
        """The present hyperparameters, detached."""
        return tree.tree_map(torch.clone, self._hparams)

    @property
    def gradient_equivalents(self) -> float:
        """The cost of all steps so far."""
        return sum(record.gradient_equivalents for record in self.history)

    def step(self) -> Estimate:
        """Take one hypergradient at the present hyperparameters, then move them.

        Returns:
            The estimate, whose hypergradient and loss belong to the hyperparameters before the move.

        Raises:
            HypergradientError: for an unusable hypergradient with ``on_failure="raise"``; nothing has moved then.
        """
        estimate = hypergradient(
            self.problem,
            self.solver,
            self.estimator,
            self._hparams,
            self.params,
            carry=self.carry,
            certify=self.certify,
            check=not self._checked,
            on_failure="return",
        )
        verdict = estimate.verdict
        report(verdict, self.on_failure, estimate)
        self._checked = True
        if verdict.status.usable:
            if estimate.outer_loss < self.best[0]:
                self.best = (estimate.outer_loss, self._hparams)
            self._move(estimate.hypergradient, estimate.outer_loss)
            self.carry = Carry(
                estimate.carry.state if self.warm_start.state else None,
                estimate.carry.adjoint if self.warm_start.adjoint else None,
                estimate.carry.solver,
            )
        self.history.append(record_of(len(self.history) + 1, estimate))
        return estimate

    def _move(self, gradient: Tree, loss: float) -> None:
        """Hand the pulled-back gradient to the optimizer and step; an interrupt in between takes the step back."""
        before = self._movable()
        try:
            pairs = zip(tree.leaves(self._free), self._transform.pull_back(self._free, gradient), strict=True)
            for leaf, part in pairs:
                leaf.grad = part
            self.optimizer.step()
            if self.scheduler is not None:
                plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                self.scheduler.step(*([loss] if plateau else []))
            # A copy: the identity transform returns the free tensors themselves, which the optimizer moves in place.
            self._hparams = tree.tree_map(torch.clone, tree.detach(self._transform(self._free)))
        except BaseException:
            self._restore(before)
            raise

    def _movable(self) -> dict[str, Any]:
        """Return copies of what a move changes, besides the hyperparameters themselves."""
        return {
            "free": [leaf.detach().clone() for leaf in tree.leaves(self._free)],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `_movable` returned."""
        with torch.no_grad():
            for leaf, value in zip(tree.leaves(self._free), state["free"], strict=True):
                leaf.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

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
        """Take up to `steps` more steps.

        On a CPU, many short steps are quicker inside ``with bilevel.threads.short_operations():``, which the commands
        use and this method does not, as it would change the threads of your process.

        Args:
            steps: most steps.
            budget: stop once the cost of the whole history, in gradient-equivalents, has reached this.
            tol: stop once the norm of the hypergradient is at most this.
            patience: stop after this many steps without a lower outer loss.
            min_progress: by how much the outer loss has to fall to count as progress.
            progress: show a progress line.

        Returns:
            The result; a second call continues.

        Raises:
            ValueError: for `steps` that are not an int, or negative.
        """
        check_steps(steps)
        stopped = f"took {steps} steps"
        rules = StoppingRules(budget, tol, patience, min_progress)
        with tqdm(total=steps, disable=not progress, unit="step") as line:
            for _ in range(steps):
                estimate = self.step()
                line.set_postfix_str(_postfix(self.history[-1]), refresh=False)
                line.update()
                # A list, so that every callback is called.
                asked = [callback(self, estimate) for callback in self.callbacks]
                failed = "" if estimate.status.usable else f"a hypergradient failed: {estimate.verdict}"
                reason = failed or rules.reason(self.history)
                if any(answer is True for answer in asked):
                    reason = "a callback asked to stop"
                if reason:
                    stopped = reason
                    break
        return OuterResult(self.hparams, self.best[1], self.best[0], tuple(self.history), stopped)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, in plain containers and tensors: ``torch.load(weights_only=True)`` reads it.

        A run that loads it continues to the same numbers bit for bit (same machine, same numbers of threads and
        workers). It holds the generators of all CUDA devices where CUDA was used; a machine without them loads it too.
        """
        state = self.carry.state
        return {
            "format": FORMAT,
            **self._movable(),
            "hparams": [leaf.clone() for leaf in tree.leaves(self._hparams)],
            "inner_state": None
            if state is None
            else {
                "params": state.params,
                "memory": state.memory,
                "steps": state.steps,
                "measured": dict(state.measured),
                "kept": state.kept,
                "earlier": state.earlier,
            },
            "adjoint": self.carry.adjoint,
            "solver": type(self.solver).__name__,
            "history": self._saved_history(),
            "best_loss": self.best[0],
            "best_hparams": [leaf.clone() for leaf in tree.leaves(self.best[1])],
            "rng": torch.get_rng_state(),
            "cuda_rng": _cuda_generators(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Args:
            state: what `state_dict` returned, for the same problem, solver and estimator.

        Raises:
            ValueError: for something else, another format, problem, inner solver or optimizer; nothing is loaded then.
        """
        start, groups = self.problem.start(self.params), self.optimizer.param_groups
        check_state(state, FORMAT, self._hparams, start, self.solver, groups)
        self._restore(state)
        self._hparams = tree.rebuild(self._hparams, [value.clone() for value in state["hparams"]])
        inner = state["inner_state"]
        self.carry = Carry(None if inner is None else InnerState(**inner), state["adjoint"], type(self.solver).__name__)
        self._load_history(state["history"])
        best = tree.rebuild(self._hparams, [value.clone() for value in state["best_hparams"]])
        self.best = (state["best_loss"], best)
        # Back on the CPU, where `torch.load(map_location="cuda")` may have taken them from.
        torch.set_rng_state(state["rng"].cpu())
        known = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index, value in enumerate(state.get("cuda_rng", ())[:known]):
            torch.cuda.set_rng_state(value.cpu(), index)

    def _saved_history(self) -> list[Any]:
        return [asdict(record) for record in self.history]

    def _load_history(self, saved: Sequence[Any]) -> None:
        self.history = [Record(**record) for record in saved]


def record_of(step: int, estimate: Estimate) -> Record:
    """Return an outer step as numbers."""
    c = estimate.certificate
    return Record(
        step=step,
        outer_loss=estimate.outer_loss,
        hypergradient_norm=float(tree.norm(estimate.hypergradient)),
        inner_residual=c.inner_residual,
        adjoint_residual=c.adjoint_residual,
        error=c.error,
        error_kind=c.error_kind,
        status=estimate.status.name,
        inner_steps=c.inner_steps,
        adjoint_steps=c.adjoint_steps,
        gradient_equivalents=estimate.cost.gradient_equivalents,
        seconds=estimate.cost.seconds,
        peak_memory=estimate.cost.peak_memory,
    )


def _postfix(record: Record) -> str:
    error = "-" if record.error is None else f"{record.error:.1e}"
    return (
        f"loss {record.outer_loss:.5g}, |hypergradient| {record.hypergradient_norm:.2e}, "
        f"inner residual {record.inner_residual:.1e}, error {error}"
    )


def _cuda_generators() -> list[Tensor]:
    """Return one state for each CUDA device; none where CUDA was not used, which asking would start."""
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if used else []
