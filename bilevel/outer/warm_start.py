"""`WarmStart`: what one outer step hands to the next."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.base import Carry
from bilevel.core.options import require


@dataclass(frozen=True)
class WarmStart:
    """Which parts one outer step hands to the next.

    Args:
        state: the inner state (iterate, momentum, moments).
        adjoint: the adjoint vector, the start of the linear solver.
    """

    state: bool = True
    adjoint: bool = True

    def __post_init__(self) -> None:
        for name in ("state", "adjoint"):
            require(self, name, "True or False", isinstance(getattr(self, name), bool))

    def part_of(self, carry: Carry) -> Carry:
        """Return what the next step gets of what one has left."""
        return Carry(carry.state if self.state else None, carry.adjoint if self.adjoint else None, carry.solver)
