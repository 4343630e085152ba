"""`Traits`: what an inner solver declares of its steps, in one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bilevel.core.declared import given_after, with_old_names


@dataclass(frozen=True)
class Traits:
    """What is known of the steps of an inner solver; what a solver does not say is the default.

    Attributes:
        differentiable: whether its steps have a derivative; without one only implicit differentiation applies.
        rowwise: whether `step` works on a batch: it treats rows alike and mixes none (no norm over a whole tree).
        multistep: whether it is linear multistep, with `coefficients` for each step.
        stationary_from: index of the step from which on these coefficients no longer change; None: they may always.
        oscillates: whether iterates swing about the solution: sequence extrapolation mistakes that for progress.
        superlinear: whether the residual falls faster and faster, so that a digit more costs next to nothing.
        proximal: whether it takes a nonsmooth term of the inner problem, by its proximal map.
        check_every: steps between two looks at the residual on a CPU; 1 where the next step needs the same gradient.
    """

    differentiable: bool = True
    rowwise: bool = False
    multistep: bool = False
    stationary_from: int | None = None
    oscillates: bool = False
    superlinear: bool = False
    proximal: bool = False
    check_every: int = 1


STEPS = ("step", "step_vjp", "sweep_vjp", "step_jvp", "params", "own_problem")
"""What coefficients say of a solver, unless it says so itself."""
RENAMED = {
    "unrolls": "differentiable",
    "memberwise": "rowwise",
    "settles": "stationary_from",
    "ripples": "oscillates",
    "check_every_on_cpu": "check_every",
}


def declared(cls: type[Any], traits: Traits) -> Traits:
    """Return the traits of a solver's class, given those that it inherits or says.

    Coefficients that a class gives anew may change at every step, unless it says from where they do not. A step that it
    gives anew is not that of its coefficients, and rows are taken one by one, unless it says otherwise. Attributes by
    the names that they had before `Traits` are taken for one release, with a DeprecationWarning.
    """
    if given_after(cls, ("coefficients",), "traits"):
        traits = replace(traits, stationary_from=None)
    if traits.multistep and given_after(cls, STEPS, "traits"):
        traits = replace(traits, multistep=False, rowwise=False)
    return with_old_names(cls, "traits", traits, RENAMED)
