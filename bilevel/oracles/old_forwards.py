"""Constructors and views of a problem by their old names, for one release."""

from __future__ import annotations

from typing import Any

from bilevel.core.status import warn
from bilevel.oracles.tracing import trace


class OldForwards:
    """Methods that forward with a DeprecationWarning."""

    def traced(self, mode: str = "fx") -> Any:
        """Forward to `bilevel.trace`, with a DeprecationWarning."""
        warn("BilevelProblem.traced is now bilevel.trace(problem).", DeprecationWarning)
        problem: Any = self
        return trace(problem, mode)

    @classmethod
    def from_module(cls, *arguments: Any, **options: Any) -> Any:
        """Forward to `bilevel.ModuleProblem`, with a DeprecationWarning."""
        import bilevel  # the class stands above this one; the call goes with the next release

        warn("BilevelProblem.from_module is now bilevel.ModuleProblem.", DeprecationWarning)
        return bilevel.ModuleProblem(*arguments, **options)
