"""The default Adam beside torch's: the same bits, files that either goes on from, and no compiler."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers import ridge_case
from torch.optim.lr_scheduler import StepLR

import bilevel as bl
from bilevel.outer.adam import Adam

CASE = ridge_case()


def made(kind: Any, dtype: torch.dtype, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((), (3, 2), (5,))]
    optimizer = kind(leaves, lr=0.1, **options)
    return leaves, optimizer, StepLR(optimizer, 40, 0.5)


def step(run: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for leaf in run[0]:
        size = 10.0 ** (4 * torch.rand((), generator=generator) - 2)
        leaf.grad = size.to(leaf) * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
    run[1].step()
    run[2].step()


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9), "eps": 1e-3}, {"maximize": True}, {"amsgrad": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_adam_is_that_of_torch_to_the_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    ours, theirs = made(Adam, dtype, **options), made(torch.optim.Adam, dtype, **options)
    for seed in range(200):
        if seed == 100:  # each goes on from what the other has saved
            saved, given = ours[1].state_dict(), theirs[1].state_dict()
            assert str(saved) == str(given)
            ours[1].load_state_dict(given)
            theirs[1].load_state_dict(saved)
        step(ours, seed)
        step(theirs, seed)
        assert all(torch.equal(x, y) for x, y in zip(ours[0], theirs[0], strict=True))


def loop(optimizer: Any) -> bl.OuterOptimizer:
    return bl.OuterOptimizer(CASE.problem, bl.GradientDescent(steps=5), bl.Implicit(), CASE.hparams, optimizer)


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
def test_a_run_goes_on_from_a_state_of_torchs_adam_and_back() -> None:
    theirs, ours = loop(lambda tensors: torch.optim.Adam(tensors, lr=0.1)), loop(None)
    for _ in range(3):
        theirs.step()
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        ours.step()
        theirs.step()
    assert torch.equal(ours.hparams, theirs.hparams)  # type: ignore[arg-type]
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
def test_the_default_adam_imports_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    for name in ("add_param_group", "state_dict", "load_state_dict"):
        function: Any = getattr(torch.optim.Optimizer, name).__wrapped__
        monkeypatch.delattr(function, "__dynamo_disable", raising=False)
    with pytest.raises(ImportError):
        torch.optim.Adam([torch.zeros(2)])
    ours = loop(None)
    ours.step()
    ours.load_state_dict(ours.state_dict())
    ours.step()


def test_hooks_of_a_step_run_once_where_torchs_step_is_taken() -> None:
    torch.optim.Adam([torch.zeros(2)])  # torch puts the hooks around a class's step when it is first made
    leaf = torch.zeros(2, requires_grad=True)
    optimizer = Adam([leaf], lr=0.1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    for _ in range(3):
        leaf.grad = torch.ones(2)
        optimizer.step()
    assert len(calls) == 3
