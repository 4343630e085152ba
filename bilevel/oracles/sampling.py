"""Which batches the losses of a problem see: another one each inner step, another one each outer step, or all data.

Inner step k sees the batch ``sampler(k)``: unrolling differentiates exactly those steps. Whatever is no step (the
residual in the certificate, a measured step size, the linear systems of `Implicit`) is evaluated on ``sampler.full()``,
or on the batch that a sampler draws for it. A cold start begins at batch 0, so the outer objective is one fixed
function of the hyperparameters; a warm start goes on to the batches after those of the carried state. Costs count
calls, whatever the size of a batch. With ``fresh_batch="outer step"`` all of outer step i is evaluated on
``sampler(i)``, as if there were no other data. With an outer sampler outer step i sees
``outer_loss(params, hparams, outer_sampler(i))``. A single call sees what outer step 0 of an `OuterOptimizer` sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor
from torch.utils.data import DataLoader

from bilevel.core.options import require_value
from bilevel.core.tree import Tree
from bilevel.oracles.loaders import LoaderBatches
from bilevel.oracles.samplers import Sampler

FreshBatch: TypeAlias = Literal["inner step", "outer step", "never"]
"""When the inner loss of a problem sees another batch."""


@dataclass(frozen=True)
class Sampling:
    """Which batches the losses, functions of (params, hparams, batch), see, and when: see above."""

    sampler: Sampler | None
    fresh_batch: FreshBatch
    inner_loss: Callable[..., Tensor]
    outer_sampler: Sampler | None
    outer_loss: Callable[..., Tensor]

    def minibatch(self, outer_step: int) -> Tree:
        """Return what the inner loss sees in an outer step, but for inner steps that see batches of their own."""
        assert self.sampler is not None
        if self.fresh_batch == "inner step":
            own = getattr(self.sampler, "between_steps", None)
            return self.sampler.full() if own is None else own(outer_step)
        return self.sampler(outer_step) if self.fresh_batch == "outer step" else self.sampler.full()


def sampling(sampler: Any, fresh_batch: Any, inner_loss: Any, outer_sampler: Any, outer_loss: Any) -> Sampling | None:
    """Return the sampling of a problem, with DataLoaders as samplers; None for a problem without batches."""
    require_value(
        "fresh_batch", fresh_batch, "'inner step', 'outer step' or 'never'", fresh_batch in get_args(FreshBatch)
    )
    if fresh_batch != "inner step" and sampler is None:
        raise ValueError(f"`fresh_batch` is {fresh_batch!r}, but there is no `sampler` to take batches from.")
    made = []
    for level, given, loss in (("inner", sampler, inner_loss), ("outer", outer_sampler, outer_loss)):
        if given is not None and (loss is None or not isinstance(given, DataLoader | Sampler)):
            what = "sampler" if level == "inner" else "outer_sampler"
            raise ValueError(
                f"`{what}` needs an `{level}_loss` (params, hparams, batch), and must be a function of the step with a "
                "method `full()`, such as MiniBatches((X, y), batch_size=64), or a DataLoader."
            )
        made.append(LoaderBatches(given) if isinstance(given, DataLoader) else given)
    if sampler is None and outer_sampler is None:
        return None
    return Sampling(made[0], fresh_batch, inner_loss, made[1], outer_loss)
