"""`ModuleProblem`: a bilevel problem over the parameters of an ``nn.Module``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from bilevel.base import InnerSolver
from bilevel.core import tree
from bilevel.core.options import require_arguments
from bilevel.core.tree import Tree
from bilevel.networks.functional import FunctionalModule, ModuleLoss, normalising_layer
from bilevel.networks.running_statistics import (
    MovingStatistics,
    RunningStatistics,
    StatisticsInner,
    TracedStatisticsInner,
)
from bilevel.oracles.batching import with_last
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.random_layers import DropoutRNG, random_layer
from bilevel.oracles.samplers import Sampler
from bilevel.oracles.sampling import FreshBatch


class ModuleProblem(BilevelProblem):
    """A bilevel problem over the parameters of an ``nn.Module``.

    Both losses are given ``model``: ``model(*inputs)`` runs the module at the present parameters, each layer in the
    mode that it has now, and ``model.eval()(*inputs)`` in evaluation mode. BatchNorm layers in train mode normalise
    by the batch and move their running statistics with every inner step, as torch does; these statistics are then
    among the problem's params, and the outer loss reads them by ``model.eval()``. docs/networks.md says how they
    are differentiated. Params are ``{name: tensor}`` of the trainable parameters, then of the running statistics that
    move.

    Args:
        module: the model; it is not modified. Parameters with ``requires_grad=False`` and all buffers but the
            statistics above are constants at their present values.
        inner_loss: ``(model, params, hparams) -> scalar``, with a sampler ``(model, params, hparams, batch)``;
            params are the trainable parameters, ``{name: tensor}``.
        outer_loss: ``(model, params, hparams) -> scalar``, with an outer sampler a batch, too.
        sampler: the batches of the inner loss.
        fresh_batch: when the inner loss sees another batch: "inner step", "outer step", or "never".
        outer_sampler: the batches of the outer loss, another one each outer step.
        seed: for layers that draw random numbers (dropout): inner step k draws them from (seed, k), and whatever is
            no step (residual, linear systems, outer loss) from the seed alone. Global generators are left alone.

    Raises:
        ValueError: for a module without trainable parameters, with random layers and no seed, with hooks on
            gradients, weight norm or spectral norm in train mode, or losses that do not take three arguments.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Linear(2, 1)
    >>> X, y = torch.ones(3, 2), torch.ones(3, 1)
    >>> problem = ModuleProblem(
    ...     model,
    ...     inner_loss=lambda model, params, decay: ((model(X) - y) ** 2).mean() + decay * params["weight"].norm(),
    ...     outer_loss=lambda model, params, decay: ((model(X) - y) ** 2).mean(),
    ... )
    >>> sorted(problem.params)
    ['bias', 'weight']
    """

    statistics: RunningStatistics | None = None
    """The running statistics that params hold besides what inner solvers move; None: nothing besides."""

    def __init__(
        self,
        module: nn.Module,
        inner_loss: Callable[..., Tensor],
        outer_loss: Callable[..., Tensor],
        *,
        sampler: Sampler | DataLoader[Any] | None = None,
        fresh_batch: FreshBatch = "inner step",
        outer_sampler: Sampler | DataLoader[Any] | None = None,
        seed: int | None = None,
    ) -> None:
        for what, loss, batches in (("inner_loss", inner_loss, sampler), ("outer_loss", outer_loss, outer_sampler)):
            require_arguments(what, loss, "model", "params", "hparams", *([] if batches is None else ["batch"]))
        functional, random = FunctionalModule(module), random_layer(module)
        if seed is None and random is not None:
            raise ValueError(
                f"the module's random layer {random!r} (dropout) is active, so the inner loss is random and has no "
                "hypergradient: give `seed=` to fix its draws at each inner step, or call module.eval() first."
            )
        self.dropout_rng = None if seed is None else DropoutRNG(seed, tree.leaves(functional.params)[0].device)
        """The random numbers of the losses; None: they draw none."""
        self._module_loss = ModuleLoss(inner_loss, functional, False, self.dropout_rng)
        super().__init__(
            self._module_loss,
            ModuleLoss(outer_loss, functional, True, self.dropout_rng),
            functional.params | functional.statistics,
            sampler=sampler,
            fresh_batch=fresh_batch,
            outer_sampler=outer_sampler,
        )
        self.wrong_third = normalising_layer(module)
        if functional.statistics:
            self.statistics, self.inner_problem = RunningStatistics(functional), StatisticsInner

    @property
    def traced_inner(self) -> type[InnerProblem] | None:  # type: ignore[override]
        if self.dropout_rng is not None:
            raise ValueError("a problem with a `seed` for random layers cannot be traced: leave out `trace`.")
        return super().traced_inner if self.statistics is None else TracedStatisticsInner

    def augmented(self, solver: InnerSolver) -> InnerSolver:  # type: ignore[override]
        if self.statistics is None:
            return solver
        return MovingStatistics(solver=solver, steps=solver.steps, tol=solver.tol)

    @property
    def module_loss(self) -> ModuleLoss:  # type: ignore[override]
        """The inner loss on the present batch in two halves, model and loss of its outputs."""
        loss = self._module_loss
        if self._sampling is None or self._sampling.sampler is None:
            return loss
        return replace(loss, loss=with_last(loss.loss, self.minibatch))

    @property
    def variation(self) -> str:
        if super().variation:
            return super().variation
        if self.dropout_rng is not None:
            return "random layers, whose steps see different draws"
        return "" if self.statistics is None else "running statistics, which move besides the parameters"

    def on_step(self, index: int) -> BilevelProblem:
        view = super().on_step(index)
        if self.dropout_rng is None:
            return view
        view = copy.copy(view)
        view.inner_loss = self.dropout_rng.seeded(view.inner_loss, index)
        return view

    def trainable(self, params: Tree) -> Tree:
        return params if self.statistics is None else self.statistics.trainable(params)

    def deterministic(self) -> ModuleProblem:
        """Return this problem without `variation`, over the trainable part alone.

        Random layers have the draws of what is no step. Running statistics are those of the batch at the params.
        """
        view = copy.copy(self)
        view.sampler, view.dropout_rng = None, None  # the losses draw by themselves
        if (statistics := self.statistics) is not None:

            def outer(x: Tree, hparams: Tree) -> Tensor:
                return self.outer_loss(statistics.equilibrium(self, x, hparams), hparams)

            view.params, view.outer_loss, view.statistics = self.trainable(self.params), outer, None
            view.inner_problem = InnerProblem
        return view

    def start(self, params: Tree = None) -> Tree:
        """Return where the inner solver starts; running statistics that are not given are the module's own."""
        params = super().start(params)
        return params if self.statistics is None else self.statistics.completed(params)

    def batched(self, size: int, data: Tree = None) -> BilevelProblem:
        if self.dropout_rng is not None or self.statistics is not None:
            raise ValueError(
                f"a problem with {self.variation} does not run in batches: run its members one after the other "
                "by rows='loop', or put the module in evaluation mode before `ModuleProblem`."
            )
        return super().batched(size, data)
