"""`LoaderBatches`: a ``torch.utils.data.DataLoader`` as a sampler, whose batches can be asked for again.

A DataLoader is an iterator: what it yields next follows from generators that move on. Here the indices of epoch e are
drawn under generators that are seeded by (seed, e), and the examples of step k are fetched under generators that are
seeded by (seed, k), so that random augmentation is the same whenever step k is taken. The generators of the process
are put back.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bilevel.core import tree
from bilevel.core.options import is_int, require_value
from bilevel.core.threads import PROCESS_STATE
from bilevel.core.tree import Tree
from bilevel.oracles.samplers import ALL, EVALUATION, EXAMPLES, ORDER, check_options, seed_of


class LoaderBatches:
    """The batches of a DataLoader, step by step, as a pure function of the step.

    With n batches in an epoch, step k takes batch ``k mod n`` of epoch ``floor(k / n)``. Dataset, order, batch size,
    `drop_last` and `collate_fn` are the loader's. Batches are fetched in this process, when they are asked for:
    `num_workers`, `prefetch_factor` and `pin_memory` have no effect.

    Args:
        loader: a DataLoader over a dataset with an index, with a length.
        seed: an int that is not negative; with the loader it fixes the batches, whatever ``torch.manual_seed`` says.
        evaluation_size: examples in the batch on which everything that is no inner step is evaluated (residuals,
            measured step sizes, linear systems): drawn anew for each outer step, the same throughout it. Default: all
            examples of an epoch, collated at once.
        device: where the tensors of a batch are moved; default: they stay where the loader puts them.
        kept: number of batches that are held for a reverse sweep or the next cold start, the last ones used.

    Raises:
        ValueError: for what is no such DataLoader, a loader that yields nothing, and a sampler of the loader whose
            order does not follow from the generators of torch, numpy and Python.

    >>> from torch.utils.data import TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2, shuffle=True)
    >>> batches = LoaderBatches(loader, seed=0)
    >>> sorted(torch.cat([batches(k)[0] for k in (0, 1, 2)]).tolist())
    [0, 1, 2, 3, 4]
    >>> torch.equal(batches(7)[0], batches(7)[0])
    True
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int = 0,
        *,
        evaluation_size: int | None = None,
        device: torch.device | str | None = None,
        kept: int = 16,
    ) -> None:
        self._length = _checked_length(loader)
        self._loader, self._seed, self._size, self._device = loader, seed, evaluation_size, device
        check_options("LoaderBatches", seed, None, 0)
        require_value("LoaderBatches.kept", kept, "a positive int", is_int(kept))
        self._epochs, self._batches = _Kept(2, self._draw_epoch), _Kept(kept, self.fetched)
        first = self._epochs(0)
        if first != self._draw_epoch(0):
            raise ValueError(
                f"the order of the DataLoader's {type(_order(loader)).__name__} cannot be drawn again, as it does not "
                "follow from the generators of torch, numpy or Python: use shuffle=True, or a sampler that does."
            )
        # A batch may leave out what is left over; the order that batches are cut from does not.
        drawn = _order(loader) if hasattr(loader.batch_sampler, "sampler") else [i for batch in first for i in batch]
        with _seeded(_generators(loader), seed_of(ORDER, seed)):
            self._examples = list(dict.fromkeys(drawn))
        check_options("LoaderBatches", seed, evaluation_size, len(self._examples))
        self._evaluations = _Kept(1, self._fetch_evaluation)

    def __call__(self, step: int) -> Tree:
        return self._batches(step)

    def full(self) -> Tree:
        """Return all examples that an epoch goes through, collated as one batch."""
        return self._evaluations(None)

    def between_steps(self, outer_step: int) -> Tree:
        """Return the batch of everything that is not an inner step, in a given outer step."""
        return self._evaluations(None if self._size is None else outer_step)

    def _fetch_evaluation(self, outer_step: int | None) -> Tree:
        if outer_step is None:
            return self._fetch(self._examples, seed_of(ALL, self._seed))
        seed = seed_of(EVALUATION, self._seed, outer_step)
        order = torch.randperm(len(self._examples), generator=torch.Generator().manual_seed(seed))
        return self._fetch([self._examples[i] for i in order[: self._size].tolist()], seed)

    def fetched(self, step: int) -> Tree:
        """Return the batch of a step from the dataset, even where it is held."""
        epoch, position = divmod(step, self._length)
        return self._fetch(self._epochs(epoch)[position], seed_of(EXAMPLES, self._seed, step))

    def _draw_epoch(self, epoch: int) -> list[list[Any]]:
        with _seeded(_generators(self._loader), seed_of(ORDER, self._seed, epoch)):
            for part in (self._loader.batch_sampler, _order(self._loader)):
                # A sampler for several processes orders by (its own seed, epoch).
                getattr(part, "set_epoch", lambda epoch: None)(epoch)
            batches = [list(batch) for batch in islice(self._loader.batch_sampler or (), self._length)]
        if len(batches) != self._length:
            raise ValueError(
                f"the DataLoader yields {len(batches)} batches in epoch {epoch}, but its length is {self._length}: "
                "every epoch must have as many batches."
            )
        return batches

    def _fetch(self, indices: list[Any], seed: int) -> Tree:
        dataset: Any = self._loader.dataset
        with _seeded([], seed):
            together = getattr(dataset, "__getitems__", None)
            examples = together(indices) if together else [dataset[index] for index in indices]
            batch = self._loader.collate_fn(examples)
        if self._device is None:
            return batch
        return tree.tree_map(lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, batch)


class _Kept:
    """A function that remembers its last results; unlike one of functools' it can be pickled with its owner."""

    def __init__(self, size: int, function: Callable[[Any], Any]) -> None:
        self._size, self._function = size, function
        self._results: OrderedDict[Hashable, Any] = OrderedDict()

    def __call__(self, argument: Hashable) -> Any:
        with PROCESS_STATE:
            if argument not in self._results:
                self._results[argument] = self._function(argument)
                if len(self._results) > self._size:
                    self._results.popitem(last=False)
            self._results.move_to_end(argument)
            return self._results[argument]


def _checked_length(loader: Any) -> int:
    """Return the number of batches of an epoch; ValueError for what has none, or none that can be asked for again."""
    if not isinstance(loader, DataLoader):
        raise ValueError(f"`LoaderBatches.loader` must be a torch.utils.data.DataLoader, got {type(loader).__name__}.")
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"the dataset {type(loader.dataset).__name__} has no index, so its batches cannot be asked for again: use "
            "DataLoader(list(dataset), ...), which holds its examples."
        )
    if loader.batch_sampler is None:
        raise ValueError("the DataLoader has batch_size=None: give it a batch_size, so that it makes batches.")
    try:
        length = len(loader)
    except TypeError:
        raise ValueError("the DataLoader's sampler has no length: give it a __len__.") from None
    if length == 0:
        dataset: Any = loader.dataset
        why = (
            f"drop_last=True leaves out the only batch, of {len(dataset)} examples instead of {loader.batch_size}"
            if loader.drop_last and len(dataset)
            else "its dataset is empty"
        )
        raise ValueError(f"the DataLoader yields nothing: {why}.")
    return length


def _order(loader: DataLoader[Any]) -> Any:
    """Return what orders the examples: the sampler that batches are cut from, else the batch sampler itself."""
    return getattr(loader.batch_sampler, "sampler", loader.batch_sampler)


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    parts = (loader, loader.batch_sampler, _order(loader))
    result = [getattr(part, "generator", None) for part in parts]
    return [each for each in result if isinstance(each, torch.Generator)]


@contextmanager
def _seeded(generators: list[torch.Generator], seed: int) -> Iterator[None]:
    """Seed the CPU's generators of torch, numpy and Python, and the given ones; put all of them back at the end."""
    generators = list({id(each): each for each in (torch.default_generator, *generators)}.values())
    with PROCESS_STATE:
        states = [each.get_state() for each in generators]
        # Datasets augment by numpy's global generator, too.
        of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
        try:
            for each in generators:
                each.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            for each, state in zip(generators, states, strict=True):
                each.set_state(state)
            np.random.set_state(of_numpy)  # noqa: NPY002
            random.setstate(of_python)
