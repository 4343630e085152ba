"""Options of every kind of wrong value: one sentence, or a value that means something; never another exception."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import re
from typing import Any

import pytest
import torch
from helpers import quadratic_case

import bilevel as bl
from bilevel import curse, hypergrad, inner, linear, outer
from bilevel.config import ConfigError
from bilevel.config.build import SOLVER, make
from bilevel.outer.stopping import StoppingRules

VALUES = (math.nan, math.inf, -math.inf, -1, -0.5, 0, True, "x", None, [], {}, torch.ones(2), object())
NEEDED = {
    bl.TruncatedUnroll: {"tail": 2},
    bl.FixedPoint: {"update": lambda params, hparams: params},
    bl.TorchOptimizer: {"optimizer": torch.optim.Adam},
    StoppingRules: {"budget": None, "tol": None, "patience": None, "min_progress": 0.0},
}
RESULTS = (
    *("Outcome", "Line", "Panel", "Claim", "Table"),
    *("Record", "OuterResult", "BatchOuterResult", "Coefficients", "Tuned"),
)
"""Dataclasses that hold what was computed: nobody gives their values."""


def owners() -> list[type]:
    """Every exported dataclass of options."""
    seen = [StoppingRules]
    for room in (inner, linear, hypergrad, outer, curse):
        for name, found in sorted(vars(room).items()):
            named = isinstance(found, type) and dataclasses.is_dataclass(found) and not inspect.isabstract(found)
            if named and not name.startswith("_") and name not in RESULTS and found not in seen:
                seen.append(found)
    return seen


def meaning(value: Any, option: str) -> bool:
    """Whether an option may take a value of the list: zero, None and True mean something to some of them."""
    return (
        value is None
        or value is True
        or (isinstance(value, int | float) and not math.isnan(value) and value == 0)
        or (option in ("start", "log_theta") and isinstance(value, int | float) and math.isfinite(value))
    )


@pytest.mark.filterwarnings("ignore:TruncatedUnroll with these options:DeprecationWarning")
@pytest.mark.parametrize("owner", owners(), ids=lambda owner: owner.__name__)
def test_a_wrong_option_is_one_sentence(owner: type) -> None:
    needed = NEEDED.get(owner, {})
    owner(**needed)
    for field in dataclasses.fields(owner):
        for value in VALUES if field.init else ():
            try:
                owner(**needed | {field.name: value})
            except ValueError as error:
                text = str(error)
                assert field.name in text, text
                assert text.endswith("."), text
                assert "\n" not in text
            else:
                assert meaning(value, field.name), f"{owner.__name__}({field.name}={value!r}) passes in silence"
                if value is True:
                    assert isinstance(getattr(owner(**needed), field.name), bool)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tol": math.nan}, "`tol` must be a positive number or None, got nan."),
        ({"tol": -1.0}, "`tol` must be a positive number or None, got -1.0."),
        ({"patience": 0}, "`patience` must be a positive int or None, got 0."),
        ({"patience": 2.5}, "`patience` must be a positive int or None, got 2.5."),
        ({"budget": -1}, "`budget` must be a positive number or None, got -1."),
        ({"budget": "x"}, "`budget` must be a positive number or None, got 'x'."),
        ({"min_progress": math.nan}, "`min_progress` must be a number that is not negative, got nan."),
    ],
)
@pytest.mark.parametrize("batch", [None, 2])
def test_rules_of_stopping_are_looked_at_before_the_first_step(options: Any, text: str, batch: int | None) -> None:
    case = quadratic_case()
    hparams = case.hparams if batch is None else torch.stack([case.hparams] * batch)
    loop = bl.OuterOptimizer(case.problem, bl.GradientDescent(), bl.Implicit(), hparams, batch=batch)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        loop.run(2, progress=False, **options)
    assert loop.steps_taken == 0


OTHER = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"warm_start": "x"}, "`warm_start` must be True, False or a WarmStart, got 'x'."),
        ({"certify": "yes"}, "`certify` must be True or False, got 'yes'."),
        (
            {"optimizer": lambda tensors: torch.optim.SGD([OTHER], lr=0.1)},
            "`optimizer` made SGD over other tensors than it was given, so the hyperparameters would not move: write "
            "optimizer=lambda tensors: torch.optim.SGD(tensors, ...).",
        ),
        (
            {"optimizer": lambda tensors: torch.optim.Adam([*tensors, OTHER])},
            "`optimizer` made Adam over other tensors than it was given",
        ),
        (
            {"optimizer": lambda tensors: torch.optim.Adam([tensor.clone().detach() for tensor in tensors])},
            "`optimizer` made Adam over other tensors than it was given",
        ),
        (
            {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([OTHER], lr=0.1), 1)},
            "`scheduler` made one of another optimizer than it was given: write scheduler=lambda optimizer: ",
        ),
        ({"scheduler": lambda optimizer: 3}, "`scheduler` must make a torch scheduler from an optimizer, got 3: write"),
    ],
)
@pytest.mark.parametrize("batch", [None, 2])
def test_makers_that_make_something_else(options: Any, text: str, batch: int | None) -> None:
    case = quadratic_case()
    hparams = case.hparams if batch is None else torch.stack([case.hparams] * batch)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        bl.OuterOptimizer(case.problem, bl.GradientDescent(), bl.Implicit(), hparams, batch=batch, **options)


def test_a_warm_start_takes_bools_alone() -> None:
    with pytest.raises(ValueError, match=r"`WarmStart.state` must be True or False, got 'x'\."):
        bl.WarmStart("x")  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", [bl.SGD, bl.Adam, bl.AdamW, bl.RMSprop])
def test_lr_is_the_step_size_of_the_optimizers_with_names_of_torch(solver: Any) -> None:
    made = solver(lr=0.1, steps=5)
    assert made == solver(step_size=0.1, steps=5)
    assert "step_size=0.1" in repr(made)
    assert "lr" not in repr(made)
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    assert dataclasses.replace(made, step_size=0.2) == solver(lr=0.2, steps=5)
    assert make({"class": solver.__name__, "lr": 0.1, "steps": 5}, SOLVER, "solver") == made
    both = f"`{solver.__name__}` takes `step_size` or `lr`, which are the same, not both."
    for arguments, options in (((), {"step_size": 0.1}), ((0.1,), {})):
        with pytest.raises(ValueError, match=f"^{re.escape(both)}$"):
            solver(*arguments, lr=0.1, **options)
    with pytest.raises(ConfigError, match="not both"):
        make({"class": solver.__name__, "lr": 0.1, "step_size": 0.1}, SOLVER, "solver")
    with pytest.raises(ValueError, match=rf"`{solver.__name__}.step_size` must be a positive number .*, got nan"):
        solver(lr=math.nan)
