"""`MetaProblem`: a model that learns new tasks from few examples, as a bilevel problem.

The hyperparameters hold the weights ``w`` from which every task starts, the inner variable the offsets ``d_t`` of the
tasks of one meta-batch, side by side and at first zero:

    inner   sum_t  L(w + d_t; support_t) + c/2 |d_t|^2
    outer   mean_t L(w + d_t; query_t)

No task sees another's offset, so one gradient step on the inner loss is one gradient step of every task, and the
Hessian is block-diagonal. What is called a meta-learning method is then a solver, an estimator and a choice of offsets:

    MAML               GradientDescent(step_size, steps) + FullUnroll()             (Finn, Abbeel & Levine 2017)
    iMAML              proximity=c, a solver of many steps + Implicit(CG())         (Rajeswaran et al. 2019)
    ANIL               adapt=["head.*"]: the other weights have no offset           (Raghu et al. 2020)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.base import InnerSolver
from bilevel.core import rows, tree
from bilevel.core.declared import given_after
from bilevel.core.options import is_int, is_number, require, require_arguments
from bilevel.core.tree import Tree
from bilevel.meta.evaluation import evaluate
from bilevel.meta.tasks import Tasks, draw
from bilevel.networks.functional import FunctionalModule
from bilevel.oracles.batching import NotSideBySide, vectorised
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.random_layers import random_layer
from bilevel.oracles.recording import signature
from bilevel.oracles.separate import Separate
from bilevel.oracles.structure import Structure


class MetaProblem(BilevelProblem):
    """Few-shot learning: tune the weights from which a model adapts to each task.

    Outer step i sees the tasks ``i b, ..., i b + b - 1`` (b the batch size), whichever run asks. Each outer step starts
    at offsets of zero: there is no warm start. Hyperparameters are ``{"init": {name: tensor}}`` and whatever else a
    subclass or a solver reads from them; params are ``{name: tensor of shape (tasks, ...)}``.

    A new method overrides `adapted` (how weights follow from offsets), `support_loss` (what a task minimises) or
    `query_loss` (what is wanted of the adapted weights); each is written for one task and vectorised over tasks.

    Args:
        module: the model; its trainable parameters are the initial weights, all else is constant. It is not modified.
        loss: ``(outputs, targets) -> scalar``, such as ``torch.nn.functional.mse_loss``.
        tasks: ``index -> (support, query)``, both ``(inputs, targets)``; equal for equal indices. As many run side by
            side as is quickest; those of different shapes, and those of a model that torch cannot vectorise
            (recurrent layers), run one after the other.
        batch_size: tasks in a meta-batch.
        adapt: patterns of the names of the parameters that tasks adapt, such as ``["head.*"]``; the others are shared.
        proximity: c, the weight of ``|d|^2 / 2`` in the inner loss.
        held_out: other tasks, on which `metrics` evaluates.
        evaluated_tasks: how many of them.
        evaluated_steps: after how many inner steps.

    Raises:
        ValueError: for options out of range, a pattern that fits no parameter, and a BatchNorm layer that would update
            its statistics.

    >>> def task(index):
    ...     X = torch.randn(8, 1, generator=torch.Generator().manual_seed(index))
    ...     return (X[:4], index * X[:4]), (X[4:], index * X[4:])
    >>> problem = MetaProblem(nn.Linear(1, 1), nn.functional.mse_loss, task, batch_size=3)
    >>> {name: tuple(offset.shape) for name, offset in problem.params.items()}
    {'weight': (3, 1, 1), 'bias': (3, 1)}
    """

    structure = Structure(resampled=True)
    unit = "initial weight"
    _in_weights = False
    """Whether params are the adapted weights ``w + d`` themselves, and no offsets."""
    _of_weights = True
    """Whether the losses see offsets in these weights alone, but for the proximity."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if given_after(cls, ("adapted", "support_loss", "query_loss"), "_of_weights"):
            cls._of_weights = False

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        tasks: Tasks,
        batch_size: int,
        *,
        adapt: Sequence[str] = ("*",),
        proximity: float = 0.0,
        held_out: Tasks | None = None,
        evaluated_tasks: int = 100,
        evaluated_steps: Sequence[int] = (1, 5),
    ) -> None:
        require_arguments("loss", loss, "outputs", "targets")
        require_arguments("tasks", tasks, "index")
        self.module, self.loss, self.tasks, self.held_out = module, loss, tasks, held_out
        self.batch_size, self.proximity, self.evaluated_tasks = batch_size, proximity, evaluated_tasks
        self.evaluated_steps = tuple(evaluated_steps)
        require(self, "batch_size", "a positive int", is_int(batch_size))
        require(self, "proximity", "a number that is not negative", is_number(proximity) and proximity >= 0)
        require(self, "evaluated_tasks", "an int of at least 2", is_int(evaluated_tasks, 2))
        counted = len(self.evaluated_steps) > 0 and all(is_int(each, 0) for each in self.evaluated_steps)
        require(self, "evaluated_steps", "numbers of steps, such as (1, 5)", counted)
        _check_layers(module)
        functional = FunctionalModule(module)
        self._init, self.model_at = functional.params, functional.at
        self.adapt = _chosen(self._init, adapt)
        self._zeros = self._offsets(batch_size)
        super().__init__(params=self._zeros)
        self._vectorises = [True]  # in a list, which views share
        self._nbytes: dict[Any, int] = {}
        self.support, self.query, self._alike = self._drawn(tasks, range(batch_size))

    def initial_hparams(self, **further: Tree) -> dict[str, Tree]:
        """Return the module's weights as ``{"init": {name: tensor}}``, and further hyperparameters by name."""
        return {"init": tree.tree_map(torch.clone, self._init), **further}

    # One task: what a new method overrides -------------------------------------------------------------------------

    def adapted(self, offset: Tree, hparams: Tree) -> Tree:
        """Return the weights of one task, ``w + d``."""
        if self._in_weights:
            return {**hparams["init"], **offset}
        return {name: start + offset[name] if name in offset else start for name, start in hparams["init"].items()}

    def support_loss(self, offset: Tree, hparams: Tree, support: Tree) -> Tensor:
        """Return what one task minimises over its offset: ``L(w + d; support) + c/2 |d|^2``."""
        loss = self.task_loss(self.adapted(offset, hparams), support)
        if not self.proximity:
            return loss
        if self._in_weights:
            offset = {name: weights - hparams["init"][name] for name, weights in offset.items()}
        return loss + 0.5 * self.proximity * squared_norm(offset)

    def query_loss(self, offset: Tree, hparams: Tree, query: Tree) -> Tensor:
        """Return what is wanted of one adapted task to be small: ``L(w + d; query)``."""
        return self.task_loss(self.adapted(offset, hparams), query)

    def task_loss(self, weights: Tree, data: Tree) -> Tensor:
        """Return the loss of the model at given weights on ``(inputs, targets)``."""
        inputs, targets = data
        return self.loss(self.model_at(weights)(inputs), targets)

    def scores(self, offset: Tree, hparams: Tree, query: Tree) -> dict[str, Tensor]:
        """Return the figures of merit of one adapted task: the loss and, where targets are ints, the accuracy."""
        inputs, targets = query
        outputs = self.model_at(self.adapted(offset, hparams))(inputs)
        result = {"loss": self.loss(outputs, targets)}
        if not targets.is_floating_point():
            result["accuracy"] = (outputs.argmax(-1) == targets).to(outputs.dtype).mean()
        return result

    # All tasks of a meta-batch --------------------------------------------------------------------------------------

    def inner_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the sum over tasks of the support losses."""
        return self._losses(self.support_loss, params, hparams, self.support).sum()

    def outer_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the mean over tasks of the query losses."""
        return self._losses(self.query_loss, params, hparams, self.query).mean()

    def task_scores(self, params: Tree, hparams: Tree) -> dict[str, Tensor]:
        """Return the figures of merit of every task, each of shape (tasks,)."""
        result: dict[str, Tensor] = self._for_tasks(
            lambda offset, query: self.scores(offset, hparams, query), params, self.query
        )
        return result

    def _losses(self, loss: Callable[..., Tensor], params: Tree, hparams: Tree, data: Tree) -> Tensor:
        losses: Tensor = self._for_tasks(lambda offset, each: loss(offset, hparams, each), params, data)
        if losses.dim() != 1:
            raise ValueError(
                f"`loss` must return a scalar Tensor for a task, got one of shape {tuple(losses.shape[1:])}."
            )
        return losses

    def _for_tasks(self, function: Callable[[Tree, Tree], Tree], params: Tree, data: Tree) -> Tree:
        """Apply a function of one task's offset and data to all tasks: side by side, or else one after the other."""
        count = len(tree.leaves(params)[0])
        if count == 1:  # a view and not an entry, whose derivative would be a tensor of all
            only = tree.tree_map(lambda leaf: leaf.squeeze(0), params)
            result = function(only, rows.row(data, 0) if self._alike else data[0])
            return tree.tree_map(lambda leaf: leaf.unsqueeze(0), result)
        if self._alike and self._vectorises[0]:
            try:
                return vectorised(function)(params, data)
            except NotSideBySide:
                self._vectorises[0] = False
        each = [rows.row(data, index) for index in range(count)] if self._alike else data
        return rows.stack([function(rows.row(params, index), each[index]) for index in range(count)])

    # Which tasks ----------------------------------------------------------------------------------------------------

    def on_tasks(self, tasks: Tasks, indices: Iterable[int]) -> MetaProblem:
        """Return this problem on other tasks."""
        view = copy.copy(self)
        indices = list(indices)
        view.params = view._zeros = self._offsets(len(indices))
        view.support, view.query, view._alike = self._drawn(tasks, indices)
        return view

    def separate(self) -> Separate | None:
        if (size := len(tree.leaves(self.params)[0])) == 1:
            return None
        alike = self._alike and self._vectorises[0]
        moving = self._moving if self._of_weights and self.params is self._zeros else None
        return Separate(size, self._some, self._bytes_of_one(), alike, moving)

    def _some(self, low: int, high: int) -> MetaProblem:
        view = copy.copy(self)
        view.params = tree.tree_map(lambda leaf: leaf[low:high], self.params)
        view.support, view.query = (
            tree.tree_map(lambda leaf: leaf[low:high], data) if self._alike else data[low:high]
            for data in (self.support, self.query)
        )
        return view

    def _moving(self, index: int) -> MetaProblem:
        view = self._some(index, index + 1)
        view._in_weights = True
        return view

    def moving_start(self, hparams: Tree) -> Tree | None:
        return {name: hparams["init"][name].unsqueeze(0) for name in self.adapt} if self._in_weights else None

    def _bytes_of_one(self) -> int:
        """Return what a step of the first task holds: its offset, and what autograd keeps besides weights and data."""
        support = rows.row(self.support, 0) if self._alike else self.support[0]
        key = signature(support)
        if key not in self._nbytes:
            weights = tree.attach(self._init)
            known = {leaf.untyped_storage()._cdata for leaf in tree.leaves([weights, support])}
            kept: dict[int, int] = {}

            def keep(saved: Tensor) -> Tensor:
                if saved.untyped_storage()._cdata not in known:
                    kept[saved.data_ptr()] = saved.nbytes
                return saved

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
                loss = self.task_loss(weights, support)
            del loss
            self._nbytes[key] = sum(kept.values()) + sum(self._init[name].nbytes for name in self.adapt)
        return self._nbytes[key]

    @property
    def minibatch(self) -> Tree:
        return self.support

    def on_batch(self, batch: Tree) -> MetaProblem:
        view = copy.copy(self)
        view.support = batch
        return view

    def sources(self) -> list[tuple[str, Callable[[int], Tree]]]:
        return [("function `tasks`", self.tasks)]

    def on_outer_step(self, index: int) -> BilevelProblem:
        return self.on_tasks(self.tasks, range(index * self.batch_size, (index + 1) * self.batch_size))

    def metrics(self, params: Tree, hparams: Tree = None, solver: InnerSolver | None = None) -> dict[str, float]:
        """Return the scores on held-out tasks after some inner steps, each with half its 95 % confidence interval."""
        if self.held_out is None or solver is None:
            return {}
        result = evaluate(self, solver, hparams, self.held_out, self.evaluated_tasks, self.evaluated_steps)
        return result.flat("val")

    def batched(self, size: int, data: Tree = None) -> BilevelProblem:
        """Refuse: the tasks are side by side already."""
        raise ValueError(f"{type(self).__name__} runs its tasks side by side already: raise `batch_size` instead.")

    def stacked(self, problems: Sequence[BilevelProblem]) -> BilevelProblem:
        return self.batched(len(problems))

    def _offsets(self, count: int) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(self._init[name]).expand(count, *self._init[name].shape).clone()
            for name in self.adapt
        }

    def _drawn(self, tasks: Tasks, indices: Iterable[int]) -> tuple[Tree, Tree, bool]:
        like = next(iter(self._init.values()))

        def moved(leaf: Tensor) -> Tensor:
            return leaf.to(like) if leaf.is_floating_point() else leaf.to(like.device)

        support, query, alike = draw(tasks, indices)
        return tree.tree_map(moved, support), tree.tree_map(moved, query), alike


def squared_norm(offset: Tree) -> Tensor:
    """Return ``|d|^2``, a 0-d tensor."""
    return torch.stack([leaf.square().sum() for leaf in tree.leaves(offset)]).sum()


def _chosen(weights: dict[str, Tensor], adapt: Any) -> list[str]:
    """Return the names that fit one of the patterns, in the order of the module."""
    if isinstance(adapt, str) or not isinstance(adapt, Sequence) or not adapt:
        raise ValueError(f"`MetaProblem.adapt` must be a list of patterns, such as ['head.*'], got {adapt!r}.")
    for pattern in adapt:
        if not any(fnmatchcase(name, pattern) for name in weights):
            raise ValueError(
                f"`MetaProblem.adapt` has the pattern {pattern!r}, which fits no parameter ({', '.join(weights)})."
            )
    return [name for name in weights if any(fnmatchcase(name, pattern) for pattern in adapt)]


def _check_layers(module: nn.Module) -> None:
    """Refuse random layers, and running statistics that tasks side by side would have to share."""
    if (random := random_layer(module)) is not None:
        what = f"the module's random layer {random!r} (dropout) is active, so the losses of tasks are random"
        raise ValueError(f"{what}: call module.eval() first.")
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training and part.track_running_stats:
            raise ValueError(
                f"the module's BatchNorm layer {name!r} is in train mode and keeps running statistics, which tasks "
                "side by side cannot share: make it with track_running_stats=False (statistics of the task's own "
                "batch), or call module.eval()."
            )
