"""A small multilayer perceptron whose weight decay is tuned: one for all, for each layer, or for each weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.core.options import is_int, require
from bilevel.core.tree import Tree
from bilevel.networks.module_problem import ModuleProblem
from bilevel.oracles.purity import look
from bilevel.oracles.structure import Structure
from bilevel.oracles.validation import Reads, check_tensor, check_trees
from bilevel.problems.data_problem import DataProblem
from bilevel.problems.splits import Split, class_labels, training_classes


class MLPProblem(DataProblem, ModuleProblem):
    """Classification by a multilayer perceptron with tanh units and tuned weight decay.

        inner   1/n sum_i l(net(x_i), y_i) + 1/2 sum_j exp(u_j) w_j^2,   l = cross-entropy
        outer   1/m sum_i l(net(x_i), y_i) over the validation rows

    where j runs over all weights and biases. Hyperparameters u, logarithms of decays:

        decay="shared"       shape ()              one decay
        decay="per_layer"    shape (layers,)       one for the weights and biases of each linear layer
        decay="per_weight"   a dict as params      one for each weight and bias

    The inner loss is not convex: which solution is found depends on the start, so there is no referee, and `Implicit`
    may need damping. Weights start as Gaussians of variance 1/inputs of their layer, biases at zero.

    The data are those of `LinearModelProblem`; `hidden` is the number of units of each hidden layer, and the start
    follows from `seed`.

    Raises:
        ValueError: for an option out of range, and for data that are none.

    >>> X = torch.eye(3, dtype=torch.float64)
    >>> problem = MLPProblem(X, torch.tensor([0, 1, 2]), X, torch.tensor([0, 1, 2]), hidden=[4])
    >>> {name: tuple(value.shape) for name, value in problem.params.items()}
    {'0.weight': (4, 3), '0.bias': (4,), '2.weight': (3, 4), '2.bias': (3,)}
    >>> problem.initial_hparams(-2.0)
    tensor([-2., -2.], dtype=torch.float64)
    """

    task = "classification"
    structure = Structure(unique_solution=False)

    # The data's arguments are written out in each class: configs read names and defaults off a signature.
    def __init__(
        self,
        X_train: Any,
        y_train: Any,
        X_val: Any,
        y_val: Any,
        hidden: Sequence[int] = (32,),
        decay: str = "per_layer",
        *,
        X_test: Any = None,
        y_test: Any = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        self.refuse_options(unknown)
        self.hidden, self.decay, self.seed = hidden, decay, seed
        units = isinstance(hidden, Sequence) and bool(hidden) and all(map(is_int, hidden))
        require(self, "hidden", "a list of positive ints, one for each hidden layer", units)
        allowed = ("shared", "per_layer", "per_weight")
        require(self, "decay", " or ".join(map(repr, allowed)), decay in allowed)
        require(self, "seed", "an int that is not negative", is_int(seed, at_least=0))
        self.take_splits(X_train, y_train, X_val, y_val, X_test, y_test)
        classes = training_classes(self.train)
        for split in self.splits.values():
            split.y = class_labels(split, classes)
        self.module = self._perceptron(self.train.X, [self.train.X.shape[0], *hidden, len(classes)])
        super().__init__(self.module, self._inner, self._outer)

    def _perceptron(self, like: Tensor, sizes: Sequence[int]) -> nn.Sequential:
        """Return the network, of the dtype and on the device of the data, at its start."""
        generator = torch.Generator().manual_seed(self.seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            # On the meta device first: nothing is drawn from the global generator.
            layer = nn.Linear(inputs, outputs, dtype=like.dtype, device="meta").to_empty(device=like.device)
            start = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
            with torch.no_grad():
                layer.weight.copy_(start)
                layer.bias.zero_()
            layers += [layer, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def _inner(self, model: Any, params: dict[str, Tensor], hparams: Tree) -> Tensor:
        squares = ((self.decays(hparams)[name] * value * value).sum() for name, value in params.items())
        return _loss(model, self.train) + 0.5 * sum(squares)

    def _outer(self, model: Any, params: dict[str, Tensor], hparams: Tree) -> Tensor:
        return _loss(model, self.val)

    def decays(self, hparams: Tree) -> dict[str, Tensor]:
        """Return the decay of every parameter by its name, broadcastable to the parameter."""
        names = list(self.params)
        if self.decay == "per_weight":
            return {name: hparams[name].exp() for name in names}
        of_layers = hparams.exp().expand(len(self.hidden) + 1)
        # Every layer has a weight and a bias.
        return {name: of_layers[index // 2] for index, name in enumerate(names)}

    @property
    def unit(self) -> str:
        return "log decay"

    def labels(self, features: Sequence[str]) -> list[str]:
        if self.decay == "shared":
            return ["all weights"]
        if self.decay == "per_layer":
            return [f"layer {index + 1}" for index in range(len(self.hidden) + 1)]
        return [
            f"{name}[{','.join(map(str, index))}]"
            for name, value in self.params.items()
            for index in itertools.product(*map(range, value.shape))
        ]

    def initial_hparams(self, value: float = 0.0) -> Tree:
        if self.decay == "per_weight":
            return {name: torch.full_like(each, value) for name, each in self.params.items()}
        return self.train.X.new_full(() if self.decay == "shared" else (len(self.hidden) + 1,), value)

    def row_losses(self, params: Tree, split: Split) -> Tensor | None:
        with torch.no_grad():
            z = torch.func.functional_call(self.module, params, (split.X.t(),))
            return nn.functional.cross_entropy(z, split.y, reduction="none")

    def constant_loss(self, split: Split) -> float | None:
        shares = torch.bincount(self.train.y).to(self.train.X.dtype) / self.train.rows
        return float(nn.functional.nll_loss(shares.log().expand(split.rows, -1), split.y))

    def metrics(self, params: Tree, hparams: Tree = None, solver: Any = None) -> dict[str, float]:
        figures = {}
        with torch.no_grad():
            for name, split in self.splits.items():
                z = self.module_loss.functional.at(params)(split.X.t())
                figures[f"{name}_loss"] = float(nn.functional.cross_entropy(z, split.y))
                figures[f"{name}_accuracy"] = float((z.argmax(1) == split.y).double().mean())
        return figures

    def check(self, params: Tree, hparams: Tree, reads: Reads | None = None) -> None:
        check_trees(params, hparams)
        for what, value, wanted in (("params", params, self.params), ("hparams", hparams, self.initial_hparams())):
            _check_like(what, value, wanted, f"MLPProblem(decay={self.decay!r})", self.train.X)
        look(self, params, hparams)


def _loss(model: Any, split: Split) -> Tensor:
    return nn.functional.cross_entropy(model(split.X.t()), split.y)


def _check_like(what: str, value: Tree, wanted: Tree, owner: str, like: Tensor) -> None:
    if isinstance(wanted, Tensor):
        return check_tensor(what, value, tuple(wanted.shape), like, owner, "X_train")
    if not isinstance(value, dict) or set(value) != set(wanted):
        got = f"the keys {', '.join(map(repr, value))}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"`{what}` of {owner} must be a dict with the keys {', '.join(wanted)}, got {got}.")
    for name in wanted:
        check_tensor(f"{what}['{name}']", value[name], tuple(wanted[name].shape), like, owner, "X_train")
