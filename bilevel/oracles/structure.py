"""`Structure`: what a problem declares of itself, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.core.declared import given_after, with_old_names
from bilevel.oracles.inner_problem import InnerProblem


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


class QuadraticForm(NamedTuple):
    """The inner loss ``1/2 x' H x + b' x`` at fixed hyperparameters, with the derivatives of H and b.

    Attributes:
        hessian: H, of shape (d, d).
        linear: b, of shape (d,).
        hessian_derivatives: dH/du_j, of shape (p, d, d), or their diagonals, (p, d), where they have nothing else.
        linear_derivatives: db/du_j, of shape (p, d).
    """

    hessian: Tensor
    linear: Tensor
    hessian_derivatives: Tensor
    linear_derivatives: Tensor


RENAMED = {"quadratic": "quadratic", "one_solution": "unique_solution", "renewed": "resampled"}


def declared(cls: type[Any], structure: Structure) -> Structure:
    """Return the structure of a problem's class, with attributes by their old names, for one release.

    Raises:
        ValueError: for a class with a graph of the gradient that its oracles do not read.
    """
    oracles = cls.inner_problem
    if given_after(cls, ("gradient_graph",), "inner_problem") and oracles._grad is not InnerProblem._grad:
        raise ValueError(
            f"{cls.__name__} has a `gradient_graph` of its own, which the oracles of {oracles.__name__} do not read: "
            "give it an `inner_problem` of its own, too."
        )
    return with_old_names(cls, "structure", structure, RENAMED)
