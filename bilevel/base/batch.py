"""What a batch returns: a solution with a pullback for all members, and `BatchEstimate`, a sequence of estimates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from torch import Tensor

from bilevel.base.estimate import Carry, Certificate, Estimate
from bilevel.core import rows
from bilevel.core.cost import Cost
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree

NAMED = 3
"""Failed members that a message names."""


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
            member_carry(self.carry, index),
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
    """Return one verdict about the members of a batch, which names the first of those in the worst state.

    Args:
        verdicts: one for each member.

    Returns:
        Such as "3 of 64 members failed: member 5: GradientDescent diverges ...".
    """
    failed = [index for index, verdict in enumerate(verdicts) if not verdict.status.usable]
    chosen = failed or [index for index, verdict in enumerate(verdicts) if not verdict.status.ok]
    if not chosen:
        return GOOD
    what = "failed" if failed else "are in doubt"
    named = [f"member {index}: {verdicts[index].detail}" for index in chosen[:NAMED]]
    if len(chosen) > NAMED:
        named.append("...")
    detail = f"{len(chosen)} of {len(verdicts)} members {what}: {'; '.join(named)}"
    return Verdict(verdicts[chosen[0]].status, detail)


def member_carry(carry: Carry, index: int) -> Carry:
    """Return the warm start of one member."""
    return Carry(
        None if carry.state is None else carry.state.row(index),
        None if carry.adjoint is None else rows.row(carry.adjoint, index),
        carry.solver,
    )
