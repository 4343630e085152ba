"""`InnerSolver`: an algorithm whose steps approximate the inner solution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from bilevel.base.traits import Traits, declared
from bilevel.core import rows, tree
from bilevel.core.autograd import pushforward
from bilevel.core.options import Relative, check_fields, default_tolerance, is_int, is_positive, require
from bilevel.core.status import warn
from bilevel.core.tree import Tree
from bilevel.numerics.lanczos import Spectrum
from bilevel.oracles.differentiable import DifferentiableInner
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.problem import BilevelProblem

Variables: TypeAlias = tuple[Tree, Tree]
"""The differentiable part of an inner state: (params, memory)."""


@dataclass(frozen=True, slots=True)
class InnerState:
    """What changes while an inner solver runs.

    Attributes:
        params: the iterate.
        memory: further vectors that the next step needs (previous iterate, moments): a tree, differentiated together
            with `params`; of a solver without derivatives, plain containers of whatever it needs.
        steps: steps taken since `init`; of a batch whose members took different numbers, a tensor of shape (members,).
        measured: numbers measured for this solve (step size, largest curvature): constants of the differentiation. Of a
            batch, tuples of them.
        cache: curvature to use again in later solves, a tree of tensors that a checkpoint stores.
        point: the linearization at `params`, where the solver has one, so that the next solve need not take its data
            pass again; a checkpoint leaves it out.
        earlier: steps of the solves that a warm start goes on from, which `steps` no longer counts.
    """

    params: Tree
    memory: Tree = ()
    steps: Any = 0
    measured: Mapping[str, Any] = field(default_factory=dict)
    cache: Tree = None
    point: Linearization | None = field(default=None, repr=False, compare=False)
    earlier: Any = 0

    @property
    def index(self) -> Any:
        """The index of the next step in the whole run, warm starts included: it decides which batch the step sees."""
        return self.earlier + self.steps

    @property
    def variables(self) -> Variables:
        """The differentiable part."""
        return self.params, self.memory

    def moved(self, params: Tree, memory: Tree = ()) -> InnerState:
        """Return the state after one more step."""
        return InnerState(params, memory, self.steps + 1, self.measured, earlier=self.earlier)

    def row(self, index: int) -> InnerState:
        """Return the state of one member of a batch."""
        steps, earlier = (int(n[index]) if isinstance(n, Tensor) else n for n in (self.steps, self.earlier))
        return InnerState(
            rows.row(self.params, index),
            rows.row(self.memory, index),
            steps,
            {name: value[index] if isinstance(value, tuple) else value for name, value in self.measured.items()},
            None if self.cache is None else rows.row(self.cache, index),
            earlier=earlier,
        )

    @staticmethod
    def stack(states: Sequence[InnerState]) -> InnerState:
        """Return the state of a batch, of which ``row(i)`` is the i-th of `states`."""
        first = states[0]
        (like, *_) = tree.leaves(first.params)

        def counts(numbers: list[int]) -> Any:
            equal = len(set(numbers)) == 1
            return numbers[0] if equal else torch.tensor(numbers, dtype=torch.float64, device=like.device)

        return InnerState(
            rows.stack([state.params for state in states]),
            rows.stack([state.memory for state in states]),
            counts([state.steps for state in states]),
            {name: tuple(state.measured[name] for state in states) for name in first.measured},
            None if first.cache is None else rows.stack([state.cache for state in states]),
            earlier=counts([state.earlier for state in states]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the state in plain containers, from which `from_dict` makes it again."""
        return {name: getattr(self, name) for name in SAVED} | {"measured": dict(self.measured)}

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> InnerState:
        """Return the state that `to_dict` saved; what an older version did not save has its default.

        Raises:
            ValueError: for a dict of something else.
        """
        saved = {"cache" if name == "kept" else name: value for name, value in saved.items()}  # as older files have it
        if not {"params"} <= set(saved) <= set(SAVED):
            raise ValueError(f"an inner state holds {', '.join(SAVED)}, got {', '.join(map(str, saved)) or 'nothing'}.")
        return InnerState(**saved)


SAVED = tuple(each.name for each in fields(InnerState) if each.name != "point")
"""What a checkpoint holds of an inner state: all but what can be computed again."""


@dataclass(frozen=True)
class InnerSolver(ABC):
    """An algorithm whose steps approximate the inner solution; one step is a map A(state, hparams).

    A subclass is a frozen dataclass with a `step`. It may override `init` (further vectors, measured step sizes),
    `warm_start`, and, where autograd through its step is not good enough, `step_vjp` and `step_jvp`.

    Args:
        steps: number of steps; with `tol`, the most steps. Default: exactly as many as `tol` needs, at most 100,000.
        tol: stop once the norm of the inner gradient is at most this; it has the unit of the gradient. Default: none
            where `steps` is given (exactly `steps` steps are taken), else the share ``eps ** (2/3)`` (3.7e-11 in
            float64, 2.4e-5 in float32) of the size of the parts that cancel in the gradient at a solution, which has no
            unit (see `bilevel.engine.tolerance`).
    """

    steps: int | None = field(default=None, kw_only=True)
    tol: float | None = field(default=None, kw_only=True)

    default_max_steps = 100_000
    traits: ClassVar[Traits] = Traits()
    """What is declared of the steps."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.traits = declared(cls, cls.traits)
        if "off_solution" in vars(cls):
            warn(f"{cls.__name__}.off_solution is now bias_reason.", DeprecationWarning)
            cls.bias_reason = vars(cls)["off_solution"]  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "steps", "a positive int or None", self.steps is None or is_int(self.steps))
        require(self, "tol", "a positive number or None", self.tol is None or is_positive(self.tol))

    @property
    def title(self) -> str:
        """How messages call the solver."""
        return type(self).__name__

    @property
    def dense_newton(self) -> bool:
        """Whether dense Newton steps to the tolerance may stand for its own where they are quicker; default: no."""
        return False

    @property
    def follows_coefficients(self) -> bool:
        """Whether its steps are those of a linear multistep solver's `coefficients`, so that others may take them."""
        return False

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        """Return the state before the first step."""
        return InnerState(params)

    def cold_state(self, inner: InnerProblem, params: Tree) -> InnerState:
        """Return a state at `params` for a later `warm_start`; a solver whose `init` measures leaves that out here."""
        return self.init(inner, params)

    @abstractmethod
    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Return the state after one step.

        It must not modify what it is given, and must compute from `inner` (`inner.grad`, `inner.hparams`) and `state`
        alone, in operations that autograd can follow.
        """

    def params(self, state: InnerState) -> Tree:
        """Return the approximate solution that a state stands for."""
        return state.params

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Return the state to start from, now that the hyperparameters have moved.

        The default goes on with the iterate, the memory and the step count, and renews what `init` measures.
        """
        return replace(state, measured=self.init(inner, state.params).measured)

    def own_problem(self, inner: InnerProblem) -> InnerProblem:
        """Return the problem whose residual ends a run: `inner`, unless the steps have a residual of their own.

        It serves for the steps as well, with the hyperparameters of `inner`.
        """
        return inner

    def misses(self, inner: InnerProblem, state: InnerState, residual: float) -> str:
        """Return why the end of a run is no inner solution although its residual is small; empty: nothing says so."""
        return ""

    def for_rows(self, state: InnerState) -> InnerSolver:
        """Return the solver that takes the steps of a batch; itself, unless measured numbers differ by member."""
        return self

    def max_step_size(self, state: InnerState, curvature: float) -> float | None:
        """Return the largest stable step size for a given largest curvature, or None where no rule is known."""
        return None

    def advice(self, state: InnerState, spectrum: Spectrum) -> str:
        """Return a clause about the option that a measured spectrum forbids, or an empty string where none is known.

        The default compares a numeric `step_size` with `max_step_size`, and names negative curvature.
        """
        step_size = getattr(self, "step_size", None)
        limit = self.max_step_size(state, spectrum.largest) if spectrum.largest > 0 else None
        if spectrum.smallest < -1e-6 * abs(spectrum.largest):
            return (
                f"the inner Hessian has the eigenvalue {spectrum.smallest:.3g} at the start, so the inner loss is not "
                f"convex there: add a penalty c/2 |params|^2 with c above {-spectrum.smallest:.3g}, take Newton with "
                "such a `damping`, or start elsewhere"
            )
        if limit is None or not isinstance(step_size, int | float) or step_size <= limit:
            return ""
        return (
            f"step_size={step_size:.3g} is above the stability limit {limit:.3g} for the largest curvature "
            f"{spectrum.largest:.3g} at the start: try step_size={limit / 2:.3g} or 'auto'"
        )

    def limits(self, dtype: torch.dtype) -> tuple[int, float | None]:
        """Return (most steps, tolerance or None); the default tolerance is a `Relative` one."""
        if self.steps is None:
            return self.default_max_steps, self.tol or Relative(default_tolerance(dtype))
        return self.steps, self.tol

    def check_unrolls(self) -> None:
        """Refuse, by a ValueError that says what to use instead, a solver whose steps are not differentiated."""
        if not self.traits.differentiable:
            raise ValueError(f"the steps of {type(self).__name__} are not differentiated: use Implicit.")

    def bias_reason(self, problem: BilevelProblem) -> str:
        """Return why the steps, and not the inner solution alone, decide the hypergradient; empty where they do not.

        An estimator that does not differentiate the steps is refused with this clause.
        """
        return ""

    def _recorded(
        self, inner: InnerProblem, state: InnerState, graph: bool = False
    ) -> tuple[Variables, Tree, Variables]:
        """Return the variables before a step, the hyperparameters, and the variables after it with their graph."""
        self.check_unrolls()
        params, memory = tree.attach(state.variables)
        hparams = tree.attach(inner.hparams)
        with torch.enable_grad():
            after = self.step(DifferentiableInner(inner, hparams, graph), replace(state, params=params, memory=memory))
        return (params, memory), hparams, after.variables

    def step_vjp(self, inner: InnerProblem, state: InnerState, cotangent: Variables) -> tuple[Variables, Tree]:
        """Return the VJP of the step from `state`: cotangents of (params, memory) before it and of hyperparameters.

        `cotangent` is that of (params, memory) after it. The default differentiates `step` by autograd, with the inner
        gradient as one node (`vjp` in its backward).
        """
        before, hparams, after = self._recorded(inner, state)
        roots = tree.leaves(before) + tree.leaves(hparams)
        pairs = zip(tree.leaves(after), tree.leaves(cotangent), strict=True)
        moving = [(a, c) for a, c in pairs if a.requires_grad]
        products = torch.autograd.grad([a for a, _ in moving], roots, [c for _, c in moving], materialize_grads=True)
        cut = len(tree.leaves(before))
        return tree.rebuild(before, products[:cut]), tree.rebuild(hparams, products[cut:])

    def sweep_vjp(
        self, inner: InnerProblem, states: Sequence[InnerState], cotangent: Variables
    ) -> tuple[Variables, Tree]:
        """Return the VJP of the steps that started from `states`: one `step_vjp` for each, from the last back."""
        total = tree.zeros_like(inner.hparams)
        for before in reversed(states):
            cotangent, part = self.step_vjp(inner.on_step(before.index), before, cotangent)
            total = tree.add(total, part)
        return cotangent, total

    def step_jvp(
        self, inner: InnerProblem, state: InnerState, tangents: Sequence[Variables], hparams_tangents: Sequence[Tree]
    ) -> list[Variables]:
        """Return the JVPs of the step from `state`: of (params, memory) after it, for each direction.

        A direction is a tangent of (params, memory) before it and one of the hyperparameters.
        """
        before, hparams, after = self._recorded(inner, state, graph=True)
        push = pushforward(tree.leaves(after), tree.leaves(before) + tree.leaves(hparams))
        return [
            tree.rebuild(before, push(tree.leaves(x) + tree.leaves(u)))
            for x, u in zip(tangents, hparams_tangents, strict=True)
        ]
