"""`Structure`: what a problem declares of itself, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bilevel.core.deprecated import with_old_names


@dataclass(frozen=True)
class Structure:
    """What is known of a problem; what a problem does not say is the default.

    Attributes:
        quadratic: whether the inner loss is quadratic in params for every hparams, so that one linear solve gives its
            minimiser.
        unique_solution: whether the inner problem has one solution, so that a tight solve from anywhere is a referee.
        resampled: whether each outer step has an inner variable of its own (`BilevelProblem.on_outer_step`), as where
            tasks are drawn anew. Then no warm start is handed on, outer losses of different steps do not compare (the
            last hyperparameters are the best), and comparisons have no referee.
    """

    quadratic: bool = False
    unique_solution: bool = True
    resampled: bool = False


RENAMED = {"quadratic": "quadratic", "one_solution": "unique_solution", "renewed": "resampled"}


def declared(cls: type[Any], structure: Structure) -> Structure:
    """Return the structure of a problem's class, with attributes by their old names, for one release.

    Args:
        cls: the class; its old attributes are taken away.
        structure: that of its body, or else of its parent.
    """
    result: Structure = with_old_names(cls, "structure", structure, RENAMED)
    return result
