"""``lr`` beside ``step_size`` for the optimizers that bear torch's names."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

from bilevel.inner.elementwise import ElementwiseSolver

Solver = TypeVar("Solver", bound=type[ElementwiseSolver])


def accepts_lr(solver: Solver) -> Solver:
    """Let the constructor of a solver take ``lr`` in place of ``step_size``; fields, repr and pickles stay as they are.

    Args:
        solver: a dataclass.

    Returns:
        The same class.
    """
    made = solver.__init__

    @functools.wraps(made)
    def __init__(self: Any, *arguments: Any, lr: Any = None, **options: Any) -> None:
        if lr is not None:
            if arguments or "step_size" in options:
                raise ValueError(f"`{type(self).__name__}` takes `step_size` or `lr`, which are the same, not both.")
            options["step_size"] = lr
        made(self, *arguments, **options)

    signature = inspect.signature(made)
    word = inspect.Parameter("lr", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), word])  # type: ignore[attr-defined]
    solver.__init__ = __init__  # type: ignore[method-assign]
    return solver
