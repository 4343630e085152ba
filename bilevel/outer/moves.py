"""How the hyperparameters move: free variables, the torch optimizer that moves them, and what undoes a move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from bilevel.core import rows, tree
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.outer.adam import Adam
from bilevel.outer.checks import check_made, check_makers, check_rowwise, check_scheduler
from bilevel.outer.constraints import ConstraintTransform
from bilevel.outer.state import restore_optimizer
from bilevel.outer.undo import Undo

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]
MakeScheduler: TypeAlias = Callable[[torch.optim.Optimizer], Any]


def where(chosen: Sequence[int], size: int | None, x: Tree, y: Tree | float) -> Tree:
    """Return the chosen rows of x, and those of y elsewhere; one problem (size None) is chosen or not."""
    return (x if chosen else y) if size is None else rows.where(_mask(chosen, size, x), x, y)


def _mask(chosen: Sequence[int], size: int, like: Tree) -> Tensor:
    (leaf, *_), picked = tree.leaves(like), set(chosen)
    return torch.tensor([index in picked for index in range(size)], device=leaf.device)


def bare_step(optimizer: Any) -> Callable[[], Any]:
    """Return the step of an optimizer, without what torch wraps around it for hooks and profiles where there are none.

    That takes as long as a third of Adam's step.
    """
    step = type(optimizer).step
    if (
        not getattr(step, "hooked", False)
        or "step" in vars(optimizer)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiler_enabled()
    ):
        return cast(Callable[[], Any], optimizer.step)
    return partial(step.__wrapped__, optimizer)


class Mover:
    """Moves free variables z by a torch optimizer; ``hparams = transform(z)``. `size` counts rows, None for one."""

    def __init__(
        self,
        hparams: Tree,
        optimizer: Any,
        scheduler: MakeScheduler | None,
        constraints: Any,
        size: int | None,
    ) -> None:
        check_makers(optimizer, scheduler)
        self.size, self._transform = size, ConstraintTransform(hparams, constraints)
        self._free = self._transform.inverse(hparams)
        self._leaves = tree.leaves(self._free)
        make = optimizer or (lambda tensors: Adam(tensors, lr=0.1))
        self.optimizer = make(list(self._leaves))
        check_made(self.optimizer, self._leaves)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        check_scheduler(self.scheduler, self.optimizer)
        if size is not None:
            check_rowwise(self.optimizer, self.scheduler)
        self._undo = Undo(self._leaves, self.optimizer, self.scheduler)

    def move(
        self, hparams: Tree, estimate: Any, descent: Sequence[int], step: int, all_or_none: bool
    ) -> tuple[Tree, list[Verdict]]:
        """Return where the rows are after a step of those in `descent`, and a verdict on each.

        A step to NaN is undone, which its verdict says, and so is an interrupted one; with `all_or_none` no row moves
        then. One problem is row 0.
        """
        before = self._undo
        before.take()
        try:
            moved = self._moved(where(descent, self.size, estimate.hypergradient, 0.0), estimate.outer_loss)
            judged = self._judged(moved, step)
            good = [index for index in descent if judged[index].status.usable]
            if not good or (all_or_none and len(good) < len(descent)):
                before.all()
                moved = hparams
            elif self.size is not None and len(good) < self.size:
                before.rows(_mask(good, self.size, hparams))
                moved = where(good, self.size, moved, hparams)
        except BaseException:
            before.all()
            raise
        return moved, [verdict if index in descent else GOOD for index, verdict in enumerate(judged)]

    def _moved(self, gradient: Tree, loss: float) -> Tree:
        """Hand the pulled-back gradient to the optimizer, step, and return the new hyperparameters."""
        for leaf, part in zip(self._leaves, self._transform.pull_back(self._free, gradient), strict=True):
            leaf.grad = part
        bare_step(self.optimizer)()
        if self.scheduler is not None:
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([loss] if plateau else []))
        # A copy: without constraints these are the free tensors themselves, which the optimizer moves in place.
        return tree.copied(self._transform(self._free))

    def _judged(self, hparams: Tree, step: int) -> list[Verdict]:
        """Return what is to be said of the hyperparameters to which the optimizer moved, of each row."""
        name = type(self.optimizer).__name__
        if self.size is not None:
            parts = [torch.isfinite(leaf).reshape(self.size, -1).all(dim=1) for leaf in tree.leaves(hparams)]
            gone = Verdict(Status.NOT_FINITE, f"{name} made its hyperparameters NaN or infinite, so it was not moved")
            return [GOOD if finite else gone for finite in torch.stack(parts).all(dim=0).tolist()]
        lost = [index for index, leaf in enumerate(tree.leaves(hparams)) if not tree.is_finite(leaf)]
        if not lost:
            return [GOOD]
        detail = (
            f"{name} at outer step {step} made `hparams{tree.names(hparams)[lost[0]]}` NaN or infinite, so it was not "
            "moved: use a smaller learning rate or constraints"
        )
        return [Verdict(Status.NOT_FINITE, detail)]

    def saved(self) -> dict[str, Any]:
        """Return copies of what a move changes, besides the hyperparameters themselves."""
        return {
            "free": [leaf.detach().clone() for leaf in self._leaves],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `saved` returned."""
        with torch.no_grad():
            for leaf, value in zip(self._leaves, state["free"], strict=True):
                leaf.copy_(value)
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
