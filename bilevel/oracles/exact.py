"""`Exact`: a hypergradient that a problem gives at once, with its evidence, by arrays on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.core.tree import Tree


class Exact(NamedTuple):
    """A hypergradient by a closed form on the host, of one tensor of params and one of hparams, with its evidence.

    Attributes:
        params: the inner solution.
        adjoint: ``H^-1 f_w`` there, with the gradient f_w of the outer loss.
        outer_loss: the outer loss there.
        hypergradient: its derivative by the hyperparameters.
        residual: norm of the inner gradient at `params`, computed from them.
        adjoint_residual: ``|f_w - H adjoint| / |f_w|``, computed from `adjoint`.
        counts: the oracle calls that the work stands for.
        steps: inner steps taken.
        adjoint_steps: iterations of the linear solver, or differentiated steps.
        value_error: ``a' g`` with the adjoint a and the inner gradient g, where params are not all but exact.
        form: how it was found, as in `Certificate`.
        detail: what the verdict says.
        cache: curvature to begin with at other hyperparameters, as in `InnerState`.
    """

    params: Tensor
    adjoint: Tensor | None
    outer_loss: float
    hypergradient: Tensor
    residual: float
    adjoint_residual: float | None
    counts: Mapping[str, int]
    steps: int = 0
    adjoint_steps: int = 0
    value_error: float | None = None
    form: str = "closed form"
    detail: str = ""
    cache: Tree = None

    def to(self, dtype: torch.dtype) -> Exact:
        """Return it with tensors of a dtype."""
        adjoint = None if self.adjoint is None else self.adjoint.to(dtype)
        return self._replace(params=self.params.to(dtype), adjoint=adjoint, hypergradient=self.hypergradient.to(dtype))


class AtOnce:
    """What a problem may give at once; by default, nothing."""

    @property
    def in_double(self) -> Any:
        """This problem in float64, of the same numbers, where closed forms are computed there; default: itself."""
        return self

    def exact(self, hparams: Tree) -> Exact | None:
        """Return solution, hypergradient and evidence by a closed form that is quicker than tensors; default: None.

        A problem returns None, too, where something is to be said of the result: `ClosedForm` then says it.
        """
        return None

    def stepped(self, hparams: Tree, start: Tree, numbers: tuple[float, ...], steps: int) -> Exact | None:
        """Return what `exact` does after equal steps of one vector, by (mix, read, write); default: None."""
        return None

    def newton(self, hparams: Tree, start: Tree, most: int, tol: float, cache: Tree = None) -> Exact | None:
        """Return what `exact` does by at most so many dense Newton steps from a start to a tolerance; default: None.

        The tolerance is that of a run of inner steps (`bilevel.engine.tolerance`); `cache` is an earlier result's.
        """
        return None

    def directions(self, size: int, seed: int) -> Any:
        """Return the `bilevel.oracles.directions.Directions` of its rows by closed forms, in batches; default: None.

        Args:
            size: rows in a batch.
            seed: of the order of the rows.
        """
        return None
