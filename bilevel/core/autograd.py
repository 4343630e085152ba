"""Products with Jacobians by autograd: reverse mode, and forward mode by two reverse passes; the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def vector_jacobian(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: list[Tensor],
    cotangents: list[Tensor],
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> list[Tensor]:
    """Return ``sum_i cotangents_i' d outputs_i / d inputs``, zeros where there is no dependence."""
    pairs = zip(outputs, cotangents, strict=True)
    moving: list[tuple[Any, Tensor]] = [(o, c) for o, c in pairs if isinstance(o, GradientEdge) or o.requires_grad]
    if not moving:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(
            [o for o, _ in moving],
            inputs,
            [c for _, c in moving],
            retain_graph=retain_graph,
            create_graph=create_graph,
            materialize_grads=True,
        )
    )


def edges(outputs: Sequence[Tensor]) -> list[Tensor | GradientEdge]:
    """Return what `vector_jacobian` takes in place of outputs whose values are not needed: their graph alone."""
    return [get_gradient_edge(each) if each.requires_grad else each for each in outputs]


def graph_nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Yield every node of the autograd graph of some tensors, each once."""
    seen: set[Any] = set()
    nodes: list[Any] = [each.grad_fn for each in outputs]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
            yield node


def pushforward(outputs: list[Tensor], inputs: list[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return the JVP ``tangents -> d outputs / d inputs @ tangents``, one backward pass for each call.

    The VJP is linear in its cotangent, so differentiating it again gives the JVP. Needs reverse mode alone, so it works
    for every operation that has a double backward.
    """
    with torch.enable_grad():
        cotangents = [torch.zeros_like(tensor, requires_grad=True) for tensor in outputs]
        products = edges(vector_jacobian(outputs, inputs, cotangents, create_graph=True))
    return lambda tangents: vector_jacobian(products, cotangents, tangents)
