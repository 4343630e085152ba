"""What the outer loop refuses, in whole sentences, and that nothing has moved then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import F64, ridge_case
from torch.distributions import constraints

import bilevel as bl

CASE = ridge_case()
TRY = "try optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1)."


def make(**options: Any) -> bl.OuterOptimizer:
    solver = options.pop("solver", bl.Adam(steps=3))
    return bl.OuterOptimizer(CASE.problem, solver, bl.FullUnroll(), options.pop("hparams", CASE.hparams), **options)


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
    "this state is of another outer optimizer, whose options this one does not have.": lambda: state(
        optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1)
    ),
}


@pytest.mark.parametrize("sentence", STATES)
def test_a_state_of_something_else_is_refused_and_nothing_is_loaded(sentence: str) -> None:
    outer = make()
    outer.run(1, progress=False)
    given = STATES[sentence]
    before = outer.hparams
    said(sentence, outer.load_state_dict, given() if callable(given) else given)
    assert torch.equal(outer.hparams, before)
    assert len(outer.history) == 1


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
