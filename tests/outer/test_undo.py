"""A move that is interrupted, or ends at NaN, is undone bit for bit, whatever the optimizer keeps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import F64, ridge_case
from torch.distributions import constraints
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.outer import undo
from bilevel.outer.constraints import ConstraintTransform
from bilevel.outer.moves import bare_step

CASE = ridge_case()


class Own(torch.optim.Optimizer):
    """Keeps a number, a list, a nested dict, a tensor that it replaces and one that it changes in place."""

    spoil: Any = None

    def __init__(self, tensors: Any) -> None:
        super().__init__(tensors, {"lr": torch.tensor(0.1, dtype=F64), "seen": []})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                group["lr"].mul_(0.9)
                group["seen"].append(float(group["lr"]))
                for leaf in group["params"]:
                    kept = self.state[leaf]
                    kept["count"] = kept.get("count", 0) + 1
                    kept.setdefault("past", []).append(leaf.grad.clone())
                    kept.setdefault("deep", {"sum": torch.zeros_like(leaf)})["sum"].add_(leaf.grad)
                    kept.setdefault("square", torch.zeros_like(leaf)).mul_(0.5).add_(leaf.grad**2)
                    kept["mean"] = 0.5 * kept.get("mean", torch.zeros_like(leaf)) + leaf.grad
                    leaf.sub_(group["lr"] * sum(kept["past"][-2:]) / (1 + kept["square"].sqrt()) / kept["count"])
                    if self.spoil is not None:
                        self.spoil(leaf)


class OwnDict(Own):
    """Saves what it keeps outside its state, too."""

    def __init__(self, tensors: Any) -> None:
        super().__init__(tensors)
        self.rate = 1.0

    def step(self, closure: Any = None) -> None:
        self.rate *= 0.7
        self.param_groups[0]["lr"].mul_(self.rate)
        super().step()

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        return saved | {"state": saved["state"] | {"rate": self.rate}}

    def load_state_dict(self, state_dict: Any) -> None:
        state = dict(state_dict["state"])
        self.rate = state.pop("rate")
        super().load_state_dict(state_dict | {"state": state})


def interrupt(leaf: Any) -> None:
    raise KeyboardInterrupt


def to_nan(leaf: Any) -> None:
    leaf.fill_(math.nan)


def spoiling(cls: type, **options: Any) -> Any:
    """Return a maker of such an optimizer whose step can be spoiled once it is taken."""
    if issubclass(cls, Own):
        return cls

    class Spoiled(cls):  # type: ignore[misc]
        spoil: Any = None

        def step(self, closure: Any = None) -> None:
            super().step()
            if self.spoil is not None:
                with torch.no_grad():
                    for leaf in self.param_groups[0]["params"]:
                        self.spoil(leaf)

    return lambda tensors: Spoiled(tensors, **copy.deepcopy(options))


def make(optimizer: Any, **options: Any) -> Any:
    hparams = options.pop("hparams", CASE.hparams)
    arguments = CASE.problem, bl.GradientDescent(steps=5), bl.Implicit(), hparams, optimizer
    return bl.OuterOptimizer(*arguments, on_failure="return", **options)


def held(outer: Any) -> Any:
    """What a move changes."""
    state = copy.deepcopy(outer.state_dict())
    return {key: state[key] for key in ("free", "optimizer", "scheduler", "hparams")}


def same(a: Any, b: Any) -> None:
    flat, again = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert flat[1] == again[1]
    for x, y in zip(flat[0], again[0], strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


T = torch.optim
KINDS: dict[str, Any] = {
    "own": spoiling(Own),
    "own state_dict": spoiling(OwnDict),
    "momentum": spoiling(T.SGD, lr=0.1, momentum=0.5),
    **{cls.__name__: spoiling(cls) for cls in (T.Adam, T.NAdam, T.Rprop, T.ASGD, T.Adagrad, T.Adafactor)},
    "AMSGrad": spoiling(T.Adam, lr=torch.tensor(0.1), amsgrad=True),
}
SCHEDULERS: dict[str, Any] = {
    "none": None,
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [2]
    ),
    "steps": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3]),
}


@pytest.mark.crossed
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("spoil", [interrupt, to_nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_step_of_any_optimizer_leaves_no_trace(kind: str, spoil: Any, scheduler: str) -> None:
    spoiled, plain = (make(KINDS[kind], scheduler=SCHEDULERS[scheduler]) for _ in range(2))
    for _ in range(3):
        before = held(spoiled)
        spoiled.optimizer.spoil = spoil
        if spoil is interrupt:
            with pytest.raises(KeyboardInterrupt):
                spoiled.step()
            same(held(spoiled), before)
            spoiled.optimizer.spoil = None
            same(spoiled.step().hypergradient, plain.step().hypergradient)
        else:
            assert spoiled.step().status is bl.Status.NOT_FINITE
            same(held(spoiled), before)
            spoiled.optimizer.spoil = None
            # The warm start has moved on: the same gradient for both from here.
            plain.carry = spoiled.carry
            same(spoiled.step().hypergradient, plain.step().hypergradient)
        same(held(spoiled), held(plain))


@pytest.mark.parametrize("after", [0, 1, 2, 8])
def test_an_interrupt_while_copies_are_taken_spoils_no_later_undo(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, calls = make(KINDS["Adam"]), []
    outer.step()

    def interrupted(value: Any) -> bool:
        calls.append(value)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return fixed(value)

    fixed = undo._is_fixed
    monkeypatch.setattr(undo, "_is_fixed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outer.step()
    before = held(outer)
    outer.optimizer.spoil = interrupt
    with pytest.raises(KeyboardInterrupt):
        outer.step()
    same(held(outer), before)


def test_an_interrupted_step_of_the_scheduler_leaves_no_trace() -> None:
    class Late(lr_scheduler.ExponentialLR):
        armed = False

        def step(self, *arguments: Any) -> None:
            super().step(*arguments)
            if self.armed:
                raise KeyboardInterrupt

    outer = make(T.Adam, scheduler=lambda optimizer: Late(optimizer, 0.5))
    outer.run(2, progress=False)
    before = held(outer)
    outer.scheduler.armed = True
    with pytest.raises(KeyboardInterrupt):
        outer.step()
    after = held(outer)
    assert after["scheduler"].pop("armed")
    same(after, before)


def test_a_run_with_an_optimizer_of_ones_own_resumes_bit_for_bit() -> None:
    whole, half, resumed = make(Own), make(Own), make(Own)
    whole.run(5, progress=False)
    half.run(2, progress=False)
    resumed.load_state_dict(half.state_dict())
    resumed.run(3, progress=False)
    same(held(resumed), held(whole))


@pytest.mark.parametrize("kind", ["own", "own state_dict", "Adam", "momentum"])
def test_a_row_that_would_become_nan_is_put_back_and_the_others_move(kind: str) -> None:
    hparams = torch.stack([CASE.hparams + i for i in range(3)])
    outer = make(KINDS[kind], hparams=hparams, batch=3)
    outer.step()
    before = held(outer)

    def one(leaf: Any) -> None:
        leaf[1] = math.nan

    outer.optimizer.spoil = one
    assert [verdict.status.usable for verdict in outer.step().verdicts] == [True, False, True]
    leaves = [pytree.tree_leaves(state) for state in (before, held(outer))]
    rows = [(a, b) for a, b in zip(*leaves, strict=False) if isinstance(a, torch.Tensor) and a.shape == hparams.shape]
    assert len(rows) >= 3
    (free, moved), *_ = rows
    assert torch.equal(free[1], moved[1])
    assert not torch.equal(free[0], moved[0])
    moments = [outer.optimizer.state_dict()["state"][0], before["optimizer"]["state"][0]]
    for name, old in moments[1].items():
        if isinstance(old, torch.Tensor) and old.shape == hparams.shape:
            assert torch.equal(old[1], moments[0][name][1])
            assert not torch.equal(old[0], moments[0][name][0])


def test_hooks_of_a_step_are_called_and_the_profiler_sees_it() -> None:
    outer, calls = make(T.Adam), []
    assert bare_step(outer.optimizer) != outer.optimizer.step
    handles = [
        outer.optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        outer.optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_post_hook(lambda *_: calls.append("any")),
    ]
    for handle in handles:
        outer.step()
        handle.remove()
    outer.step()
    assert calls == ["before", "after", "any", "after", "any", "any"]
    with torch.profiler.profile() as profile:
        outer.step()
    assert any("Adam.step" in event.key for event in profile.key_averages())


@pytest.mark.filterwarnings("error")
def test_a_scheduler_still_counts_the_steps_of_its_optimizer() -> None:
    make(T.Adam, scheduler=lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5)).run(2, progress=False)


def test_what_has_no_constraint_is_pulled_back_as_it_is() -> None:
    hparams = {"penalty": torch.tensor(2.0, dtype=F64), "free": torch.zeros(3, dtype=F64)}
    gradient = {"penalty": torch.tensor(3.0, dtype=F64), "free": torch.ones(3, dtype=F64)}
    transform = ConstraintTransform(hparams, {"penalty": constraints.positive})
    penalty, free = transform.pull_back(transform.inverse(hparams), gradient)
    assert free is gradient["free"]
    assert float(penalty) == pytest.approx(6.0)
    plain = ConstraintTransform(hparams, None)
    assert plain.pull_back(plain.inverse(hparams), gradient)[0] is gradient["penalty"]
