"""Batches of every kind, their members one by one, and how far both may differ."""

from __future__ import annotations

from typing import Any

import torch
from helpers import normal

import bilevel as bl
from bilevel.problems import LogisticProblem, QuadraticProblem, RidgeProblem, SoftmaxProblem

F64 = torch.float64
SIZE = 4


def regression(seed: int, kind: str = "ridge", rows: int = 14, features: int = 3, **options: Any) -> bl.BilevelProblem:
    X, X_val, w = normal(seed, rows, features), normal(seed + 100, 9, features), normal(seed + 200, features)
    z, z_val = X @ w + 0.3 * normal(seed + 300, rows), X_val @ w
    if kind == "ridge":
        return RidgeProblem(X, z, X_val, z_val, **options)
    if kind == "logistic":
        return LogisticProblem(X, (z > 0).long(), X_val, (z_val > 0).long(), **options)

    def labels(t: torch.Tensor) -> torch.Tensor:
        # Every class occurs in every draw, so that shapes agree.
        y = (t > -0.4).long() + (t > 0.4).long()
        y[:3] = torch.arange(3)
        return y

    return SoftmaxProblem(X, labels(z), X_val, labels(z_val), **options)


def inner_of_data(params: Any, hparams: Any, data: Any) -> torch.Tensor:
    A, y = data
    left = A @ params["w"] + params["b"] - y
    bent = (0.3 * left.cosh().log()).sum() + 0.5 * left.square().mean()
    return (
        bent
        + hparams["penalty"].exp() * (params["w"].square().sum() + params["b"] ** 2)
        + hparams["shift"].sum() * params["b"]
    )


def outer_of_data(params: Any, hparams: Any, data: Any) -> torch.Tensor:
    return (
        0.5 * (params["w"] - data[1][:2]).square().sum()
        + params["b"] * hparams["shift"].sum()
        + hparams["penalty"] ** 2
    )


def general(seed: int) -> bl.BilevelProblem:
    return bl.BilevelProblem(
        inner_of_data,
        outer_of_data,
        {"w": normal(seed + 5, 2), "b": normal(seed + 6, 1)[0]},
        data=(normal(seed, 5, 2), normal(seed + 1, 5)),
    )


def case(kind: str, shared: bool) -> tuple[list[bl.BilevelProblem], bl.BilevelProblem, Any]:
    """Members, their batch, and hyperparameters that differ by member."""
    shift = torch.linspace(-0.6, 0.6, SIZE, dtype=F64)
    seeds = [7] * SIZE if shared else [7, 8, 9, 10]
    hparams: Any
    if kind == "quadratic":
        single = [QuadraticProblem.random(5, 2, condition=6.0, seed=seed) for seed in seeds]
        hparams = torch.stack([0.2 * shift, shift.flip(0)], 1)
    elif kind == "general":
        single = [general(seed) for seed in seeds]
        hparams = {"penalty": shift, "shift": torch.stack([shift, 0.5 * shift], 1)}
    else:
        name, _, option = kind.partition("-")
        options = {"penalty": option} if option else {}
        rows = 2 if name == "wide" else 14
        single = [regression(seed, "ridge" if name == "wide" else name, rows, **options) for seed in seeds]
        start = single[0].initial_hparams(-1.0)
        hparams = (
            start + shift.reshape(-1, *[1] * start.dim()) + 0.1 * normal(3, *start.shape or (1,)).reshape(start.shape)
        )
    batch = single[0].batched(SIZE) if shared else bl.stack(single)
    return ([single[0]] * SIZE if shared else single), batch, hparams


def row(value: Any, index: int) -> Any:
    return bl.tree.tree_map(lambda leaf: leaf[index], value)


def close(a: Any, b: Any, rtol: float = 1e-12) -> None:
    for x, y in zip(bl.tree.leaves(a), bl.tree.leaves(b), strict=True):
        assert float((x - y).norm()) <= rtol * max(float(y.norm()), 1e-3)
