"""What the outer loop refuses, in whole sentences, and that nothing has moved then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import F64, ridge_case
from torch.distributions import constraints
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.outer.state import restore_generators

CASE = ridge_case()
TRY = "try optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1)."


def make(**options: Any) -> bl.OuterOptimizer:
    parts = {"problem": CASE.problem, "solver": bl.Adam(steps=3), "estimator": bl.FullUnroll(), "hparams": CASE.hparams}
    return bl.OuterOptimizer(**(parts | options))


def said(sentence: str, function: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        function(*arguments, **options)
    assert str(caught.value) == sentence


OPTIONS = {
    f"`optimizer` must make a torch.optim.Optimizer from a list of tensors, got 'Adam': {TRY}": {"optimizer": "Adam"},
    "`scheduler` must make a torch scheduler from an optimizer, got 'StepLR': "
    "try scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=10).": {
        "scheduler": "StepLR"
    },
    "`callbacks` must be a list of functions (outer, estimate) -> bool or None, got print: write callbacks=[print].": {
        "callbacks": print
    },
    "`callbacks` must be a list of functions (outer, estimate) -> bool or None, got 3 in it.": {"callbacks": [3]},
    "`callbacks` must be a list of functions (outer, estimate) -> bool or None, got 'print'.": {"callbacks": "print"},
    "`constraints` must be a constraint of torch.distributions.constraints, such as constraints.positive, or a dict of "
    "them by key, got 'positive'.": {"constraints": "positive"},
    "`constraints` must be a constraint of torch.distributions.constraints, such as constraints.positive, or a dict of "
    "them by key, got the class _Interval.": {"constraints": constraints.interval},
    "`constraints` holds Boolean(), for which torch.distributions has no transform.": {
        "constraints": constraints.boolean
    },
}


@pytest.mark.parametrize("sentence", OPTIONS)
def test_an_option_of_another_kind_is_refused(sentence: str) -> None:
    said(sentence, make, **OPTIONS[sentence])


def test_an_optimizer_that_was_made_already_is_refused() -> None:
    adam = torch.optim.Adam([CASE.hparams.clone()])
    with pytest.raises(ValueError, match=r"`optimizer` must make a torch.optim.Optimizer .* got Adam \("):
        make(optimizer=adam)


@pytest.mark.parametrize("steps", [-1, 2.5, "3", True, None])
def test_a_number_of_steps_is_an_int_that_is_not_negative(steps: Any) -> None:
    outer = make()
    said(f"`steps` must be an int that is not negative, got {steps!r}.", outer.run, steps)
    assert outer.history == []
    assert outer.run(0, progress=False).stopped == "took 0 steps"


STATE = "`state` must be what `OuterOptimizer.state_dict` returned"


def state(**options: Any) -> dict[str, Any]:
    outer = make(**options)
    outer.run(2, progress=False)
    return outer.state_dict()


STATES: dict[str, Any] = {
    f"{STATE}, got None.": None,
    f"{STATE}, got a dict with the keys weight, bias.": {"weight": 1, "bias": 2},
    f"{STATE}, got a dict with the keys (none).": {},
    f"{STATE}, but it lacks best_hparams, best_loss.": lambda: {
        key: value for key, value in state().items() if not key.startswith("best")
    },
    "this state is of the inner solver Newton, whose memory Adam cannot go on with: start with params=estimate.params "
    "instead.": lambda: state(solver=bl.Newton()),
    "this state is of a run with the outer optimizer SGD, this run has Adam: load it into a run like that one.": (
        lambda: state(optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1))
    ),
    "this state is of a run with the scheduler ExponentialLR, this run has none: load it into a run like that one.": (
        lambda: state(scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    ),
    "this state is of a run with the estimator Implicit, this run has FullUnroll: load it into a run like that one.": (
        lambda: state(estimator=bl.Implicit())
    ),
    "this state is of a run with the problem BilevelProblem, this run has RidgeProblem: load it into a run like that "
    "one.": lambda: state(problem=bl.BilevelProblem(CASE.problem.inner_loss, CASE.problem.outer_loss, CASE.start)),
    "this state has hyperparameters of dtype float32, this run has float64.": lambda: changed(
        "free", [torch.zeros(CASE.hparams.shape, dtype=torch.float32)]
    ),
    f"{STATE}, but its 'hparams' is no list of tensors.": lambda: changed("hparams", [1.0]),
    f"{STATE}, but its 'history' is not that of one run.": lambda: changed("history", [{"step": 1}]),
    f"{STATE}, but its 'best_loss' is no number.": lambda: changed("best_loss", "small"),
    f"{STATE}, but its 'rng' is no state of a random generator.": lambda: changed("rng", 3),
    "an inner state holds params, memory, steps, measured, cache, earlier, got params, colour.": lambda: changed(
        "inner_state", {"params": 1, "colour": 2}
    ),
    "this state cannot be loaded, and nothing of it was: Expected a CPUGeneratorImplState of size 5056 but found the "
    "input RNG state size to be 3.": lambda: changed("rng", torch.zeros(3, dtype=torch.uint8)),
    f"this state is of another outer optimizer: its 'exp_avg' has the shape (9,), here {tuple(CASE.hparams.shape)}.": (
        lambda: moments_of_another_shape()
    ),
    "this state is of another outer optimizer, whose options this one does not have.": lambda: without(
        state(optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1)), "of"
    ),
}


def changed(key: str, value: Any) -> dict[str, Any]:
    return state() | {key: value}


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: each for name, each in value.items() if name != key}


def moments_of_another_shape() -> dict[str, Any]:
    saved = state()
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(9, dtype=F64)
    return saved


def unchanged(outer: bl.OuterOptimizer, before: dict[str, Any]) -> None:
    """Bit for bit, the random generator of torch included."""
    flat, again = pytree.tree_flatten(before), pytree.tree_flatten(outer.state_dict())
    assert flat[1] == again[1]
    for a, b in zip(flat[0], again[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("sentence", STATES)
def test_a_state_of_something_else_is_refused_and_nothing_is_loaded(sentence: str) -> None:
    outer = make()
    outer.run(1, progress=False)
    given = STATES[sentence]
    given = given() if callable(given) else given
    before, carry = outer.state_dict(), outer.carry
    said(sentence, outer.load_state_dict, given)
    unchanged(outer, before)
    assert outer.carry is carry


def test_an_interrupted_load_leaves_the_run_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    saved, outer, calls = state(), make(), []
    outer.run(1, progress=False)
    torch.manual_seed(6)
    before = outer.state_dict()

    def interrupted(generators: Any) -> None:
        restore_generators(generators)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("bilevel.outer.state.restore_generators", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outer.load_state_dict(saved)
    unchanged(outer, before)


def test_two_runs_that_load_one_state_do_not_share_it() -> None:
    saved, steps = state(), []
    for _ in range(2):
        outer = make()
        outer.load_state_dict(saved)
        outer.run(2, progress=False)
        steps.append(outer.hparams)
    assert torch.equal(*steps)
    assert float(saved["optimizer"]["state"][0]["step"]) == 2


def test_a_batch_refuses_the_state_of_one_run_and_the_other_way_round() -> None:
    alone, together = make(), make(batch=1, hparams=CASE.hparams[None])
    with pytest.raises(ValueError, match=r"this state has hyperparameters of shapes \[\(1, \d\)\], this run has"):
        alone.load_state_dict(together.state_dict())
    # The shapes of the hyperparameters agree here.
    problem = bl.BilevelProblem(
        lambda x, u: (x - u.sum()).square().sum(), lambda x, u: x.square().sum(), torch.ones(1, dtype=F64)
    )
    one, four = torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64)
    alone, together = make(problem=problem, hparams=one), make(problem=problem, hparams=four, batch=4)
    for saved, run, whose in ((together, alone, "one run"), (alone, together, "4 members")):
        said(f"{STATE}, but its 'history' is not that of {whose}.", run.load_state_dict, saved.state_dict())


def test_a_state_of_another_problem_is_refused() -> None:
    def outer(size: int) -> bl.OuterOptimizer:
        problem = bl.BilevelProblem(
            lambda x, u: (x - u).square().sum(), lambda x, u: x.square().sum(), torch.zeros(size, dtype=F64)
        )
        return bl.OuterOptimizer(problem, bl.GradientDescent(), bl.Implicit(), torch.tensor(1.0, dtype=F64))

    run = outer(2)
    run.step()
    sentence = "this state is of another problem, with params of shapes [(2,)], here [(3,)]."
    said(sentence, outer(3).load_state_dict, run.state_dict())


def test_a_state_that_does_not_name_its_solver_is_accepted() -> None:
    saved = state()
    del saved["solver"]
    outer = make()
    outer.load_state_dict(saved)
    assert len(outer.history) == 2
