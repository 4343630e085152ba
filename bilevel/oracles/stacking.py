"""Problems side by side as one batch: `stack`, and members that run one after the other behind the calls of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.core import rows
from bilevel.core.tree import Tree
from bilevel.oracles.batching import Rows, check_rows_option
from bilevel.oracles.problem import BilevelProblem


class RowsProblem(BilevelProblem):
    """A batch whose members run one after the other, each as it would alone, bit for bit.

    Data, samplers and modules of the members may differ, the shapes of params and hparams may not. `why` says why they
    do not run side by side; it is empty where that was asked for.

    >>> problem = BilevelProblem(lambda w, u: (w - u) ** 2, lambda w, u: w**2, torch.tensor(0.0))
    >>> RowsProblem([problem, problem]).outer_loss(torch.tensor([1.0, 2.0]), torch.zeros(2))
    tensor([1., 4.])
    """

    one_by_one = True

    def __init__(self, problems: Sequence[BilevelProblem], why: str = "") -> None:
        starts = [problem.params for problem in problems]
        super().__init__(params=None if any(start is None for start in starts) else rows.stack(starts))
        self.as_batch(problems)
        self.why = why

    def inner_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the sum over members of the inner losses."""
        losses = [p.inner_loss(rows.row(params, i), rows.row(hparams, i)) for i, p in enumerate(self._single)]
        return torch.stack(losses).sum()

    def outer_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the outer losses, of shape (members,)."""
        return torch.stack([
            problem.outer_loss(rows.row(params, index), rows.row(hparams, index))
            for index, problem in enumerate(self._single)
        ])

    def trainable(self, params: Tree) -> Tree:
        return self._single[0].trainable(params)

    def on_outer_step(self, index: int) -> RowsProblem:
        return RowsProblem([problem.on_outer_step(index) for problem in self._single], self.why)


def stack(problems: Sequence[BilevelProblem], rows: Rows = "auto") -> BilevelProblem:
    """Return problems of one kind with equal shapes and options as one batch, such as 50 seeds of a split.

    Problems with closed forms (`RidgeProblem`, ...) stack their data. A general `BilevelProblem` must have been given
    its data by ``data=``, and all must share the same loss functions. ``member(i)`` of the result is ``problems[i]``.

    Args:
        problems: at least one.
        rows: "auto" for members side by side; "loop" for members one after the other, whose data and kinds may differ.

    Raises:
        ValueError: for problems that cannot be stacked, with the first difference.

    >>> from bilevel.problems import RidgeProblem
    >>> def draw(seed):
    ...     X = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ...     return RidgeProblem(X[:4], X[:4, 0], X[4:], X[4:, 0])
    >>> batch = stack([draw(0), draw(1), draw(2)])
    >>> batch.batch, batch.params.shape
    (3, torch.Size([3, 2]))
    """
    if not problems:
        raise ValueError("`stack` needs at least one problem.")
    first = problems[0]
    if check_rows_option(rows) == "loop":
        return RowsProblem(problems)
    for index, problem in enumerate(problems):
        if type(problem) is not type(first):
            raise ValueError(
                f"`stack` takes problems of one kind, but problem 0 is a {type(first).__name__} and problem {index} "
                f"a {type(problem).__name__}."
            )
        if problem.batch is not None:
            raise ValueError(f"`stack` takes single problems, but problem {index} is a batch of {problem.batch}.")
    return first.stacked(problems)
