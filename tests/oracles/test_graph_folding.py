"""Recordings with their operations folded give the numbers that they gave before, by fewer operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import F64, normal
from torch import Tensor
from torch.nn import functional

from bilevel.oracles.graph import record
from bilevel.oracles.graph_folding import fold

X, S, C = normal(1, 6, 4), normal(2, 6).sign(), normal(3, 4)
M = 2.0 * torch.eye(4, dtype=F64)

# What is left of each function of x, v and u that depends on v: it changes most often, and u least.
CASES: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "factors": (lambda x, v, u: ((v * u) * C * (2.0 * x)) * -u, ["mul"]),
    "signs": (lambda x, v, u: -((-(v * u)).neg()), ["mul"]),
    "scaled rows": (lambda x, v, u: S * (X @ v), ["mv"]),
    "scaled columns": (lambda x, v, u: X @ (C * v), ["mv"]),
    "targets": (lambda x, v, u: X @ v - S, ["addmv"]),
    "twice": (lambda x, v, u: (x + v * u) + v * u, ["addcmul"]),
    "one factor": (lambda x, v, u: v * u + v * C, ["mul"]),
    "bias": (lambda x, v, u: (X @ torch.outer(v, u)) + u, ["view", "mul", "addmm"]),
    "product and sum": (lambda x, v, u: x + M @ v, ["addmv"]),
    "slope": (lambda x, v, u: torch.ops.aten.sigmoid_backward(v * u, torch.sigmoid(x)) * C, ["mul"]),
    "used elsewhere": (lambda x, v, u: (v * x).exp() + (v * x) * u, ["mul", "exp", "addcmul"]),
    "of one level": (lambda x, v, u: v * v.sin() - v.cos(), ["sin", "mul", "cos", "sub"]),
    "whole numbers": (lambda x, v, u: v * (torch.arange(4) * 2 + 1), ["mul"]),
    "dot": (lambda x, v, u: (v * (2.0 * x)).sum() * u, ["dot", "mul"]),
    "dot of matrices": (lambda x, v, u: (v.view(2, 2) * x.view(2, 2)).sum() * u, ["view", "view", "dot", "mul"]),
    "no dot of a transpose": (
        lambda x, v, u: (v.view(2, 2).t() * x.view(2, 2)).sum() * u,
        ["view", "t", "mul", "sum", "mul"],
    ),
    "other shapes": (lambda x, v, u: (v.sum() * u) * x[:, None] + C, ["sum", "addcmul"]),
}


@pytest.mark.parametrize("name", CASES)
def test_folded_operations_give_the_same_numbers(name: str) -> None:
    function, expected = CASES[name]
    module = record(lambda *xs: [function(*xs)], [normal(seed, 4) for seed in (4, 5, 6)])
    others = [normal(seed, 4) for seed in (7, 8, 9)]
    (before,) = module(*others)
    nodes: Any = iter(module.graph.nodes)
    x, v, u = (next(nodes) for _ in range(3))
    levels = {x: 1, v: 2, u: 0}
    for node in module.graph.nodes:
        levels.setdefault(node, max((levels[each] for each in node.all_input_nodes), default=0))
    fold(module.graph, levels)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*others)[0], before, rtol=1e-14, atol=1e-14)
    moving = [node for node in module.graph.nodes if node.op == "call_function" and levels[node] == 2]
    assert Counter(node.target._schema.name[6:] for node in moving) == Counter(expected)


def test_matrices_that_are_large_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.oracles.graph_folding.LARGEST", 10)
    module = record(lambda v: [functional.softplus(S * (X @ v))], [normal(4, 4)])
    levels = {node: 0 if node.op == "get_attr" else 2 for node in module.graph.nodes}
    fold(module.graph, levels)
    assert not any(node.target is torch.ops.aten.unsqueeze.default for node in module.graph.nodes)
