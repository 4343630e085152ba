"""Constructors and views of a problem by their old names, for one release."""

from __future__ import annotations

import warnings
from typing import Any

from bilevel.oracles.tracing import trace


class OldForwards:
    """Methods that forward with a DeprecationWarning."""

    def traced(self, mode: str = "fx") -> Any:
        """Forward to `bilevel.trace`, with a DeprecationWarning."""
        warnings.warn("BilevelProblem.traced is now bilevel.trace(problem).", DeprecationWarning, stacklevel=2)
        problem: Any = self
        return trace(problem, mode)

    @classmethod
    def from_module(cls, *arguments: Any, **options: Any) -> Any:
        """Forward to `bilevel.ModuleProblem`, with a DeprecationWarning."""
        import bilevel  # the class stands above this one; the call goes with the next release

        warnings.warn("BilevelProblem.from_module is now bilevel.ModuleProblem.", DeprecationWarning, stacklevel=2)
        return bilevel.ModuleProblem(*arguments, **options)
