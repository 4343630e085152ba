"""MAML in plain PyTorch, one task after the other: what `bilevel.meta` is compared with. It uses nothing of bilevel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
Task = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class PlainMAML:
    """Model-agnostic meta-learning (Finn, Abbeel & Levine 2017, algorithm 1).

    Args:
        module: the model, which is moved by `step`.
        loss: ``(outputs, targets) -> scalar``.
        step_size: of the adaptation.
        steps: of the adaptation.
        lr: of Adam, which moves the weights.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[[Any, Any], Tensor], step_size: float, steps: int, lr: float = 1e-3
    ) -> None:
        self.module, self.loss, self.step_size, self.steps = module, loss, step_size, steps
        self.optimizer = torch.optim.Adam(module.parameters(), lr=lr)

    def at(self, weights: Weights, data: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss at given weights."""
        return self.loss(torch.func.functional_call(self.module, weights, (data[0],)), data[1])

    def adapted(self, support: tuple[Tensor, Tensor], steps: int, create_graph: bool) -> Weights:
        """Return the weights after some gradient steps on a support set."""
        weights = dict(self.module.named_parameters())
        for _ in range(steps):
            gradients = torch.autograd.grad(
                self.at(weights, support), list(weights.values()), create_graph=create_graph
            )
            weights = {
                name: value - self.step_size * gradient
                for (name, value), gradient in zip(weights.items(), gradients, strict=True)
            }
        return weights

    def meta_loss(self, tasks: Iterable[Task]) -> Tensor:
        """Return the mean query loss after adaptation, with its graph back to the module's parameters."""
        losses = [self.at(self.adapted(support, self.steps, True), query) for support, query in tasks]
        return torch.stack(losses).mean()

    def step(self, tasks: Iterable[Task]) -> float:
        """Take one step on a meta-batch and return its loss."""
        self.optimizer.zero_grad()
        loss = self.meta_loss(tasks)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def evaluate(self, tasks: Iterable[Task], steps: int) -> dict[str, float]:
        """Return the mean query loss, and the accuracy of int targets, after some gradient steps."""
        losses, hits = [], []
        for support, query in tasks:
            weights = self.adapted(support, steps, False)
            with torch.no_grad():
                losses.append(float(self.at(weights, query)))
                if not query[1].is_floating_point():
                    outputs = torch.func.functional_call(self.module, weights, (query[0],))
                    hits.append(float((outputs.argmax(-1) == query[1]).double().mean()))
        found = {"loss": sum(losses) / len(losses)}
        return found | ({"accuracy": sum(hits) / len(hits)} if hits else {})
