"""`Estimate` and `BatchEstimate`: hypergradients with their evidence; `Solution`, `Pullback`, `Carry`: their parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, overload

from torch import Tensor

from bilevel.base.inner_solver import InnerState
from bilevel.core import rows, tree
from bilevel.core.cost import Cost
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree


@dataclass(frozen=True)
class Carry:
    """What one hypergradient leaves for the next: the warm start.

    Attributes:
        state: the inner state.
        adjoint: the adjoint vector, shaped as params.
        solver: the name of the inner solver that left the state, where it is known.
        ongoing: the hyperparameters are still the same: the inner run goes on as if it had not paused.
    """

    state: InnerState | None = None
    adjoint: Tree = None
    solver: str = ""
    ongoing: bool = False

    def copied(self) -> Carry:
        """Return the warm start with copies of the tensors that a loss is given."""
        if (state := self.state) is not None:
            state = replace(state, params=tree.copied(state.params), memory=tree.copied(state.memory))
        return replace(self, state=state, adjoint=tree.copied(self.adjoint))

    def row(self, index: int) -> Carry:
        """Return the warm start of one member of a batch."""
        state = None if self.state is None else self.state.row(index)
        return Carry(state, None if self.adjoint is None else rows.row(self.adjoint, index), self.solver)


@dataclass(frozen=True)
class Pullback:
    """The VJP of the solution map at one cotangent, with its evidence; of rows, with a sequence of each figure.

    Attributes:
        hparams: the cotangent of the hyperparameters.
        adjoint: the adjoint vector, where the estimator has one: approximates ``H^-1 cotangent``.
        residual: relative adjoint residual, where there is one.
        steps: iterations of the linear solver, or differentiated steps.
        verdict: status of this half.
        error: the estimator's own estimate of the distance to the exact hypergradient, where it makes one.
        error_note: how it was obtained, or why there is none.
        value_error: ``a' g``, with the adjoint vector a and the inner gradient g, a 0-d tensor: to first order the
            distance of the outer loss to that at the inner solution; None where there is no adjoint vector. Of rows, of
            shape (rows,).
        counts: of rows, the oracle calls that each took part in.
    """

    hparams: Tree
    adjoint: Tree = None
    residual: Any = None
    steps: Any = 0
    verdict: Any = GOOD
    error: float | None = None
    error_note: str = ""
    value_error: Any = None
    counts: Sequence[Counter[str]] = ()

    def row(self, index: int) -> Pullback:
        """Return what is said of one row."""
        residual, steps, verdict = (rows.figure(each, index) for each in (self.residual, self.steps, self.verdict))
        adjoint = None if self.adjoint is None else rows.row(self.adjoint, index)
        error = None if self.value_error is None else self.value_error[index]
        hparams = rows.row(self.hparams, index)
        return Pullback(hparams, adjoint, residual, steps, verdict, error_note=self.error_note, value_error=error)


@dataclass(frozen=True)
class Solution:
    """An approximate inner solution that can be differentiated; of rows, with a sequence of each figure.

    Attributes:
        params: the approximate solution; the residual was computed at exactly these.
        state: the inner state, for a warm start.
        pullback: cotangent of params -> `Pullback`; may be called more than once.
        residual: norm of the inner gradient at `params`.
        steps: inner steps taken.
        verdict: status of the inner solve.
        counts: of rows, the oracle calls that each took part in.
        form: how the inner problem was solved, as in `Certificate`.
    """

    params: Tree
    state: InnerState
    pullback: Callable[[Tree], Pullback]
    residual: Any
    steps: Any
    verdict: Any = GOOD
    counts: Sequence[Counter[str]] = ()
    form: str = "step by step"

    def row(self, index: int) -> Solution:
        """Return the solution of one row; its pullback is that of all."""
        residual, steps, verdict = (rows.figure(each, index) for each in (self.residual, self.steps, self.verdict))
        params = rows.row(self.params, index)
        return Solution(params, self.state.row(index), self.pullback, residual, steps, verdict, form=self.form)


ErrorKind: TypeAlias = Literal["bound", "estimate", "none"]


@dataclass(frozen=True)
class Certificate:
    """The evidence that travels with a hypergradient.

    Attributes:
        inner_residual: norm of the inner gradient at the returned params.
        adjoint_residual: relative residual of the adjoint system, None where the estimator solves none.
        inner_steps: inner steps taken.
        adjoint_steps: iterations of the linear solver, or differentiated steps.
        error: distance to the exact hypergradient, of the kind that `error_kind` says; None for "none".
        error_kind: "bound" (proved), "estimate" or "none".
        error_note: why there is no figure, or how it was obtained.
        error_lower: for a bound: the error is proved to be at least this.
        components: for a bound: one for every component, shaped as the hyperparameters.
        corrected: for a bound: a hypergradient that is more accurate as a rule, from the work that the bound took.
        corrected_error: for a bound: the distance of `corrected` to the exact hypergradient is at most this.
        signs: for a bound: signs of the exact hypergradient's components, 0 where they are not certain.
        value_error: ``a' g`` with the adjoint vector a and the inner gradient g: to first order by how much the outer
            loss is larger than at the inner solution; None where there is no adjoint vector.
        measured: numbers that the inner solver measured, such as its step size; of a batch under "rows" why its members
            ran one after the other, where nobody asked for it; under "tasks" how many there were, and how many at once.
        form: how the inner problem was solved: "step by step", as the solver's class says, or, in less time and to the
            same numbers but for rounding, by steps on "flat" vectors, those of a loss that is "recorded", "doubled", in
            the "eigenbasis" or in "closed form"; or by steps of another kind, "dense Newton", to the same tolerance and
            another iterate within it; empty where nothing says it.
    """

    inner_residual: float
    adjoint_residual: float | None
    inner_steps: int
    adjoint_steps: int
    error: float | None = None
    error_kind: ErrorKind = "none"
    error_note: str = "ask with certify=True"
    error_lower: float | None = None
    components: Tree = None
    corrected: Tree = None
    corrected_error: float | None = None
    signs: Tree = None
    value_error: float | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    form: str = ""


@dataclass(frozen=True)
class Estimate:
    """A hypergradient and its evidence.

    Attributes:
        outer_loss: the outer loss at `params`.
        hypergradient: shaped as the hyperparameters; NaN where the status is not usable.
        params: the inner solution that was used.
        certificate: residuals and error estimate.
        cost: counted oracle calls, seconds, peak memory.
        verdict: status with the sentence about it.
        carry: the warm start for the next call.
    """

    outer_loss: float
    hypergradient: Tree
    params: Tree
    certificate: Certificate
    cost: Cost
    verdict: Verdict
    carry: Carry

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def status(self) -> Status:
        """The status alone."""
        return self.verdict.status

    def __str__(self) -> str:
        c = self.certificate
        error = f"none ({c.error_note})" if c.error is None else f"{c.error:.2e} ({c.error_kind})"
        adjoint = "" if c.adjoint_residual is None else f", adjoint residual {c.adjoint_residual:.2e}"
        return (
            f"outer loss {self.outer_loss:.6g}, |hypergradient| {float(tree.norm(self.hypergradient)):.4g}, "
            f"error {error}, inner residual {c.inner_residual:.2e} after {c.inner_steps} steps{adjoint}, "
            f"cost {self.cost.gradient_equivalents:.0f} gradient-equivalents, status {self.status.name}"
        )


def made_later(later: Mapping[str, Callable[[], Any]], **given: Any) -> Estimate:
    """Return an estimate of which a part is made when it is first read; copies and pickles hold all of it.

    Args:
        later: makes certificate, params or carry.
        given: the other attributes.
    """
    estimate = object.__new__(Estimate)
    vars(estimate).update(given, _later=later)
    return estimate


def _when_read(name: str) -> None:
    part: Any = cached_property(lambda self: vars(self)["_later"][name]())
    part.__doc__ = f"The {name}, made when it is first read."
    part.__set_name__(Estimate, name)
    setattr(Estimate, name, part)


for _name in ("certificate", "params", "carry"):
    _when_read(_name)


@dataclass(frozen=True, eq=False)
class BatchEstimate(Sequence[Estimate]):
    """Hypergradients of a batch and their evidence: ``estimates[i]`` is the `Estimate` of member i.

    Attributes:
        outer_loss: the outer losses, of shape (members,); NaN for a member whose inner solve failed.
        hypergradient: stacked; NaN rows where the verdict is not usable.
        params: the inner solutions, stacked.
        certificates: residuals and error estimate of every member.
        costs: what each member took part in; its seconds are an equal share of all.
        cost: of all members together: counts are summed over members, so that they compare with a loop.
        verdicts: status of every member, with the sentence about it.
        carry: the warm start of all members for the next call; a failed member keeps what it had.
    """

    outer_loss: Tensor
    hypergradient: Tree
    params: Tree
    certificates: Sequence[Certificate] = field(repr=False)
    costs: Sequence[Cost] = field(repr=False)
    cost: Cost
    verdicts: Sequence[Verdict] = field(repr=False)
    carry: Carry = field(repr=False)

    def __len__(self) -> int:
        return len(self.verdicts)

    @overload
    def __getitem__(self, index: int) -> Estimate: ...
    @overload
    def __getitem__(self, index: slice) -> list[Estimate]: ...
    def __getitem__(self, index: int | slice) -> Estimate | list[Estimate]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"member {index} of {len(self)}")
        index %= len(self)
        return Estimate(
            float(self.outer_loss[index]),
            rows.row(self.hypergradient, index),
            rows.row(self.params, index),
            self.certificates[index],
            self.costs[index],
            self.verdicts[index],
            self.carry.row(index),
        )

    def __iter__(self) -> Iterator[Estimate]:
        return (self[index] for index in range(len(self)))

    @property
    def verdict(self) -> Verdict:
        """One verdict about all members; it names those that failed, or else those in doubt."""
        return verdict_of(self.verdicts)

    @property
    def status(self) -> Status:
        """The status of the member in the worst state."""
        return self.verdict.status

    def __str__(self) -> str:
        usable = sum(verdict.status.usable for verdict in self.verdicts)
        return (
            f"{len(self)} members, {usable} usable, outer loss {float(self.outer_loss.nanmean()):.6g} on average, "
            f"cost {self.cost.gradient_equivalents:.0f} gradient-equivalents, status {self.status.name}"
        )


def verdict_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Return one verdict about members of a batch: "3 of 64 members failed: member 5: GradientDescent diverges ..."."""
    failed = [index for index, verdict in enumerate(verdicts) if not verdict.status.usable]
    if not (chosen := failed or [index for index, verdict in enumerate(verdicts) if not verdict.status.ok]):
        return GOOD
    what = "failed" if failed else "are in doubt"
    named = [f"member {index}: {verdicts[index].detail}" for index in chosen[:3]] + ["..."] * (len(chosen) > 3)
    detail = f"{len(chosen)} of {len(verdicts)} members {what}: {'; '.join(named)}"
    return Verdict(verdicts[chosen[0]].status, detail)
