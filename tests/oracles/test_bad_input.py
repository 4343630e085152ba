"""Bad input gets one clear sentence: what, where, what is allowed, what it got, and what to do."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import F64, normal, quadratic_case, ridge_case, tree_case

import bilevel as bl
from bilevel.problems import LogisticProblem, RidgeProblem, SoftmaxProblem

X, Y, LABELS = normal(1, 6, 2), normal(2, 6), torch.tensor([0, 1, 0, 1, 1, 0])
U = torch.tensor(0.3, dtype=F64)
GD = bl.GradientDescent(0.1, steps=5)


def problem(inner: Any = None, outer: Any = None, params: Any = None, **options: Any) -> bl.BilevelProblem:
    return bl.BilevelProblem(
        inner or (lambda x, u: ((x - 1.0) ** 2).sum() + u * (x * x).sum()),
        outer or (lambda x, u: (x * x).sum()),
        torch.ones(2, dtype=F64) if params is None else params,
        **options,
    )


def refused(text: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        bl.hypergradient(*arguments, **options)


# Data ----------------------------------------------------------------------------------------------------------------


def with_value(value: float) -> torch.Tensor:
    changed = X.clone()
    changed[2, 1] = value
    return changed


DATA = {
    "X_train is empty, of shape (0, 2).": (RidgeProblem, X[:0], Y[:0], X, Y),
    "X_val is empty, of shape (0, 2).": (RidgeProblem, X, Y, X[:0], Y[:0]),
    "X_train holds NaN or infinite values (1 of 12), the first in row 3, column 2: drop or fill": (
        RidgeProblem,
        with_value(float("nan")),
        Y,
        X,
        Y,
    ),
    "X_val holds NaN or infinite values (1 of 12), the first in row 3, column 2: drop or fill": (
        RidgeProblem,
        X,
        Y,
        with_value(float("inf")),
        Y,
    ),
    "y_train holds NaN or infinite values": (RidgeProblem, X, with_value(float("nan"))[:, 1], X, Y),
    "with as many rows, got (6, 2) and (5,).": (RidgeProblem, X, Y[:5], X, Y),
    "must have shape (rows, features) and y_train shape (rows,)": (RidgeProblem, X[:, 0], Y, X, Y),
    "X_val has 1 features, but X_train has 2.": (RidgeProblem, X, Y, X[:, :1], Y),
    "y_train holds one class only (1): there is nothing to separate.": (
        LogisticProblem,
        X,
        torch.ones(6, dtype=torch.int64),
        X,
        LABELS,
    ),
    "y_train holds 3 classes: LogisticProblem takes two, SoftmaxProblem any number.": (
        LogisticProblem,
        X,
        torch.arange(6) % 3,
        X,
        LABELS,
    ),
    "y_val holds the label 2, which y_train does not.": (SoftmaxProblem, X, LABELS, X, 2 * LABELS),
    "y_train holds labels that are not whole numbers: a regression target?": (LogisticProblem, X, Y, X, LABELS),
    "`RidgeProblem.penalty` must be one of 'scalar', 'per_feature', got 'per_class'.": (
        RidgeProblem,
        X,
        Y,
        X,
        Y,
        "per_class",
    ),
}


@pytest.mark.parametrize("text", DATA)
def test_data_that_cannot_work_are_refused(text: str) -> None:
    cls, *arguments = DATA[text]
    with pytest.raises(ValueError, match=re.escape(text)):
        cls(*arguments)


# Inputs of a hypergradient -------------------------------------------------------------------------------------------


def test_arguments_in_the_wrong_order_are_named() -> None:
    expected = "expected (problem, solver, estimator, hparams), got"
    refused(f"{expected} GradientDescent in the place of BilevelProblem.", GD, problem(), bl.Implicit(), U)
    refused(f"{expected} Implicit in the place of InnerSolver.", problem(), bl.Implicit(), GD, U)
    refused(f"{expected} Tensor in the place of HypergradEstimator.", problem(), GD, U, bl.Implicit())


def test_a_missing_start_is_named() -> None:
    empty = bl.BilevelProblem(lambda x, u: (u * x * x).sum(), lambda x, u: x.sum())
    refused(
        "no start for the inner variable: give `params=` to the problem or to this call.", empty, GD, bl.Implicit(), U
    )


def test_a_problem_needs_one_inner_statement_and_an_outer_loss() -> None:
    loss = lambda x, u: x.sum()  # noqa: E731
    for arguments in ({}, {"inner_loss": loss, "optimality": loss}):
        with pytest.raises(ValueError, match="needs exactly one of `inner_loss` and `optimality`"):
            bl.BilevelProblem(outer_loss=loss, **arguments)
    with pytest.raises(ValueError, match=r"needs an `outer_loss`, a function \(params, hparams\) -> scalar Tensor"):
        bl.BilevelProblem(inner_loss=loss)


TREES = {
    "`hparams` must be a Tensor, got float: torch.as_tensor makes one.": ({}, 0.3),
    "`hparams` must be a Tensor, got ndarray: torch.as_tensor makes one.": ({}, np.ones(2)),
    "`hparams['a']` must be a Tensor, got str.": ({}, {"a": "b"}),
    "`hparams` must have a floating dtype, got torch.int64.": ({}, torch.tensor(1)),
    "`hparams['a']` holds NaN or infinite values.": ({}, {"a": torch.tensor(float("nan"), dtype=F64)}),
    "`params` holds NaN or infinite values.": ({"params": torch.tensor([1.0, float("inf")], dtype=F64)}, U),
    "`hparams` is torch.float32 on cpu, but params are torch.float64 on cpu: params and hparams must share dtype": (
        {},
        U.float(),
    ),
    "`params['b']` is torch.float32 on cpu, but params are torch.float64 on cpu": (
        {"params": {"a": torch.ones(2, dtype=F64), "b": torch.ones(2)}},
        U,
    ),
    "`hparams` is torch.float64 on meta, but params are torch.float64 on cpu: params and hparams must share": (
        {},
        U.to("meta"),
    ),
    "`hparams` holds no tensors.": ({}, {}),
}


@pytest.mark.parametrize("text", TREES)
def test_trees_that_cannot_be_worked_on_are_refused(text: str) -> None:
    options, hparams = TREES[text]
    refused(text, problem(**options), GD, bl.Implicit(), hparams)


@pytest.mark.parametrize("device", ["params", "hparams"])
def test_structured_problems_name_a_tensor_on_another_dtype_or_device(device: str) -> None:
    case = ridge_case()
    for convert in (lambda t: t.float(), lambda t: t.to("meta")):
        start, u = case.start, case.hparams
        start, u = (convert(start), u) if device == "params" else (start, convert(u))
        with pytest.raises(ValueError, match="share dtype and device"):
            bl.hypergradient(case.problem, GD, bl.Implicit(), u, start)


def test_a_shape_that_does_not_fit_is_named_with_the_expected_one() -> None:
    case = ridge_case()
    text = "`hparams` of RidgeProblem(penalty='per_feature') must be a Tensor of shape (5,), got ()."
    refused(text, case.problem, GD, bl.Implicit(), U)
    text = "`params` of QuadraticProblem must be a Tensor of shape (6,), got (5,)."
    refused(text, quadratic_case().problem, GD, bl.Implicit(), quadratic_case().hparams, case.start)


def test_a_negative_penalty_is_refused_with_two_ways_out() -> None:
    direct = RidgeProblem(X, Y, X, Y, parametrization="direct")
    text = "a penalty is negative (-0.3): declare a positive constraint, or use parametrization='log'."
    refused(text, direct, GD, bl.Implicit(), -U)


SILENT = {
    "not at all": (lambda x, u: ((x - 1.0) ** 2).sum(), U, ""),
    "detached": (lambda x, u: (u.detach() * x * x).sum() + (x**2).sum(), U, ""),
    "added": (lambda x, u: (x * x).sum() + u, U, ""),
    "one key": (lambda x, u: (u["a"] * x * x).sum(), {"a": U, "b": U}, "['b']"),
    "one key detached": (lambda x, u: (u["a"].detach() * u["b"] * x * x).sum(), {"a": U, "b": U}, "['a']"),
}


@pytest.mark.parametrize("how", SILENT)
def test_hyperparameters_without_influence_are_refused_instead_of_a_silent_zero(how: str) -> None:
    inner, hparams, name = SILENT[how]
    for estimator in (bl.Implicit(), bl.FullUnroll()):
        text = f"the gradient of `inner_loss` does not depend on `hparams{name}`: its hypergradient would be a silent"
        refused(text, problem(inner), GD, estimator, hparams)


def test_a_key_that_acts_on_the_outer_loss_alone_is_accepted() -> None:
    both = problem(lambda x, u: (u["a"] * x * x - x).sum(), lambda x, u: (u["b"] * x).sum())
    estimate = bl.hypergradient(both, GD, bl.Implicit(), {"a": U, "b": U})
    torch.testing.assert_close(estimate.hypergradient["b"], estimate.params.sum())


LOSSES = {
    "`outer_loss` must return a scalar Tensor (shape ()), got a Tensor of shape (2,).": {"outer": lambda x, u: x},
    "`outer_loss` must return a scalar Tensor (shape ()), got a Tensor of shape (1,).": {"outer": lambda x, u: x[:1]},
    "`outer_loss` must return a scalar Tensor (shape ()), got float.": {"outer": lambda x, u: 1.0},
    "`inner_loss` must return a scalar Tensor (shape ()), got NoneType.": {"inner": lambda x, u: None},
    "`inner_loss` is nan at the start: `sqrt` made the first value that is not finite": {
        "inner": lambda x, u: (u * x - 9.0).sqrt().sum()
    },
    "`inner_loss` does not depend on `params`: is the computation detached?": {
        "inner": lambda x, u: u * x.detach().sum()
    },
    "`outer_loss` does not depend on `params` nor on `hparams`: is the computation detached?": {
        "outer": lambda x, u: x.detach().sum()
    },
    "`inner_loss` fails at the start, with params of torch.float64 on cpu:": {
        "inner": lambda x, u: (torch.ones(3, 3, dtype=F64) @ x).sum() * u
    },
    "(do its data have the same dtype and device, and shapes that fit?)": {
        "inner": lambda x, u: (torch.ones(2, 2) @ x).sum() * u
    },
}


@pytest.mark.parametrize("text", LOSSES)
def test_losses_that_cannot_work_are_refused(text: str) -> None:
    refused(text, problem(**LOSSES[text]), GD, bl.Implicit(), U)


def test_an_optimality_map_of_another_structure_is_refused() -> None:
    wrong = bl.BilevelProblem(
        outer_loss=lambda x, u: x.sum(), params=torch.ones(2, dtype=F64), optimality=lambda x, u: u * x.sum()
    )
    text = "`optimality` must return a tree of the structure and shapes of `params`."
    refused(text, wrong, bl.FixedPoint(lambda x, u: x, steps=1), bl.Implicit(bl.GMRES()), U)
    refused(
        "`FixedPoint.update` must return a tree of the structure and shapes of `params`.",
        problem(),
        bl.FixedPoint(lambda x, u: x.sum(), steps=1),
        bl.Implicit(),
        U,
    )


# Options -------------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[type, dict[str, Any], str]] = [
    (
        bl.GradientDescent,
        {"step_size": -0.1},
        "`GradientDescent.step_size` must be a positive number or 'auto', got -0.1.",
    ),
    (bl.GradientDescent, {"step_size": "fast"}, "must be a positive number or 'auto', got 'fast'."),
    (bl.GradientDescent, {"step_size": float("nan")}, "must be a positive number or 'auto', got nan."),
    (bl.GradientDescent, {"steps": 0}, "`GradientDescent.steps` must be a positive int or None, got 0."),
    (bl.GradientDescent, {"steps": 2.5}, "`GradientDescent.steps` must be a positive int or None, got 2.5."),
    (bl.GradientDescent, {"steps": True}, "must be a positive int or None, got True."),
    (bl.GradientDescent, {"tol": -1e-3}, "`GradientDescent.tol` must be a positive number or None, got -0.001."),
    (bl.HeavyBall, {"momentum": 1.0}, "`HeavyBall.momentum` must be a number in [0, 1) or 'auto', got 1.0."),
    (bl.HeavyBall, {"momentum": "auto", "step_size": 0.1}, "`HeavyBall.step_size` must be 'auto' where `momentum` is"),
    (bl.Nesterov, {"momentum": -0.1}, "`Nesterov.momentum` must be a number in [0, 1) or 'auto', got -0.1."),
    (bl.Newton, {"damping": -1.0}, "`Newton.damping` must be a number that is not negative, got -1.0."),
    (bl.Newton, {"linear_solver": "CG"}, "`Newton.linear_solver` must be a LinearSolver or None, got 'CG'."),
    (
        bl.Adam,
        {"step_size": "auto"},
        "`Adam.step_size` must be a positive number or a function of the hyperparameters, got 'auto'.",
    ),
    (
        bl.Adam,
        {"betas": (0.9, 1.0)},
        "`Adam.betas[1]` must be a number in [0, 1) or a function of the hyperparameters, got 1.0.",
    ),
    (
        bl.Adam,
        {"betas": 0.9},
        "`Adam.betas` must be two numbers in [0, 1) or functions of the hyperparameters, got 0.9.",
    ),
    (bl.Adam, {"eps": 0.0}, "`Adam.eps` must be a positive number, got 0.0."),
    (bl.Adam, {"amsgrad": 1}, "`Adam.amsgrad` must be a bool, got 1."),
    (
        bl.AdamW,
        {"weight_decay": -0.1},
        "`AdamW.weight_decay` must be a number that is not negative or a function of the hyperparameters, got -0.1.",
    ),
    (
        bl.SGD,
        {"momentum": 1.0},
        "`SGD.momentum` must be a number in [0, 1) or a function of the hyperparameters, got 1.0.",
    ),
    (bl.SGD, {"dampening": 2.0}, "`SGD.dampening` must be a number in [0, 1], got 2.0."),
    (
        bl.SGD,
        {"nesterov": True},
        "`SGD.nesterov` must be a bool, and False without momentum or with dampening, got True.",
    ),
    (
        bl.SGD,
        {"step_size": lambda a, b, c: a},
        "`SGD.step_size` must be a function of (hparams, step), got one of (a, b, c).",
    ),
    (bl.RMSprop, {"eps": 0}, "`RMSprop.eps` must be a positive number, got 0."),
    (bl.RMSprop, {"centered": "yes"}, "`RMSprop.centered` must be a bool, got 'yes'."),
    (
        bl.TorchOptimizer,
        {"optimizer": "Adam"},
        "`TorchOptimizer.optimizer` must be a function of (params), got 'Adam'.",
    ),
    (bl.FixedPoint, {"update": 3}, "`FixedPoint.update` must be a function of (params, hparams), got 3."),
    (bl.CG, {"max_steps": -3}, "`CG.max_steps` must be a positive int or None, got -3."),
    (bl.CG, {"tol": 0}, "`CG.tol` must be a positive number or None, got 0."),
    (bl.CG, {"check_every": 0}, "`CG.check_every` must be a positive int or None, got 0."),
    (bl.CG, {"steps": 0}, "`CG.steps` must be a positive int or None, got 0."),
    (bl.CG, {"steps": 5, "tol": 0.1}, "`CG.steps` must be None where `tol` or `max_steps` is given, got 5."),
    (bl.Nystrom, {"rank": 0}, "`Nystrom.rank` must be a positive int, got 0."),
    (bl.Nystrom, {"seed": -1}, "`Nystrom.seed` must be an int that is not negative, got -1."),
    (bl.GMRES, {"restart": 0}, "`GMRES.restart` must be a positive int, got 0."),
    (bl.Neumann, {"steps": None}, "`Neumann.steps` must be a positive int, got None."),
    (bl.Neumann, {"step_size": 0.0}, "`Neumann.step_size` must be a positive number or 'auto', got 0.0."),
    (bl.FixedPointIteration, {"max_steps": 1.5}, "`FixedPointIteration.max_steps` must be a positive int, got 1.5."),
    (bl.Direct, {"max_size": "big"}, "`Direct.max_size` must be a positive int, got 'big'."),
    (bl.FullUnroll, {"mode": "backward"}, "`FullUnroll.mode` must be 'reverse' or 'forward', got 'backward'."),
    (bl.FullUnroll, {"memory": "none"}, "`FullUnroll.memory` must be 'iterates', 'checkpoint' or 'graph', got 'none'."),
    (bl.TruncatedUnroll, {"tail": 0}, "must be a positive int (steps) or a float in (0, 1] (fraction), got 0."),
    (bl.TruncatedUnroll, {"tail": 1.5}, "must be a positive int (steps) or a float in (0, 1] (fraction), got 1.5."),
    (bl.AdaptiveUnroll, {"tail": 1.5}, "must be 'auto', a positive int (steps) or a float in (0, 1] (fraction), got 1"),
    (
        bl.Implicit,
        {"linear_solver": bl.CG},
        "`Implicit.linear_solver` must be a LinearSolver, such as CG(), got the class CG: write CG().",
    ),
    (bl.Implicit, {"damping": float("inf")}, "`Implicit.damping` must be a number that is not negative, got inf."),
    (bl.FiniteDifference, {"step": "small"}, "`FiniteDifference.step` must be a positive number or None, got 'small'."),
]


@pytest.mark.parametrize(("cls", "options", "text"), OPTIONS, ids=lambda value: getattr(value, "__name__", None))
def test_an_option_of_the_wrong_kind_is_refused_in_the_one_sentence(cls: type, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        cls(**options)


def test_a_tail_longer_than_the_run_is_refused() -> None:
    text = "`TruncatedUnroll.tail` is 6, but the inner solver takes 5 steps: the tail must be at most 5."
    refused(text, problem(), GD, bl.TruncatedUnroll(tail=6), U)
    bl.hypergradient(problem(), GD, bl.TruncatedUnroll(tail=5), U)


@pytest.mark.parametrize(("on_failure", "end"), [("ignore", "."), (None, "."), ("Raise", ": did you mean `raise`?")])
def test_an_unknown_on_failure_is_refused(on_failure: Any, end: str) -> None:
    text = f"`on_failure` must be 'raise', 'warn' or 'return', got {on_failure!r}{end}"
    refused(text, problem(), GD, bl.Implicit(), U, on_failure=on_failure)
    with pytest.raises(ValueError, match=re.escape(text)):
        bl.OuterOptimizer(problem(), GD, bl.Implicit(), U, on_failure=on_failure)


def test_a_symmetric_linear_solver_is_refused_for_an_optimality_map() -> None:
    update = lambda x, u: 0.5 * x * u  # noqa: E731
    fixed = bl.BilevelProblem.from_fixed_point(update, lambda x, u: x.sum(), torch.ones(2, dtype=F64))
    for solver in (bl.CG(), bl.Nystrom()):
        text = f"{type(solver).__name__} needs a symmetric matrix, but this problem is stated by an optimality map"
        refused(text, fixed, bl.FixedPoint(update), bl.Implicit(solver), U)


# Runs that fail ------------------------------------------------------------------------------------------------------


def failed(text: str, *arguments: Any, **options: Any) -> bl.HypergradientError:
    with pytest.raises(bl.HypergradientError, match=text) as caught:
        bl.hypergradient(*arguments, **options)
    assert caught.value.verdict.status.remedy in str(caught.value)
    return caught.value


@pytest.mark.parametrize("estimator", [bl.Implicit(), bl.FullUnroll(), bl.TruncatedUnroll(3)], ids=repr)
@pytest.mark.parametrize("steps", [40, 6000])
def test_a_diverging_solver_names_its_step_and_suggests_a_step_size_that_works(estimator: Any, steps: int) -> None:
    case = quadratic_case()
    solver = bl.GradientDescent(0.3, steps=steps)
    text = r"GradientDescent diverges: .*at step \d+|GradientDescent diverges: .* by step 40"
    error = failed(text, case.problem, solver, estimator, case.hparams, case.start)
    assert error.verdict.status is bl.Status.DIVERGED
    found = re.search(
        r"stability limit (\S+) for the largest curvature (\S+) .*: try step_size=(\S+) or 'auto'", str(error)
    )
    assert found, error
    largest = float(torch.linalg.eigvalsh(case.hessian(case.start, case.hparams))[-1])
    assert float(found[2]) == pytest.approx(largest, rel=0.02)
    assert float(found[1]) == pytest.approx(2 / largest, rel=0.02)
    better = bl.GradientDescent(float(found[3]), tol=1e-8)
    assert bl.hypergradient(case.problem, better, estimator, case.hparams).status.ok


def test_nan_names_the_step_and_the_tensor() -> None:
    made = problem(
        lambda x, u: (u * x["a"]).sum() - (x["b"] - 0.25).sqrt().sum() + (x["a"] ** 2).sum() + 3 * u * x["b"].sum(),
        lambda x, u: x["a"].sum() + x["b"].sum(),
        {"a": torch.ones(2, dtype=F64), "b": torch.ones(2, dtype=F64)},
    )
    error = failed(
        r"GradientDescent failed: the inner gradient of params\['b'\] is not finite at step 1 ",
        made,
        bl.GradientDescent(0.5, steps=300),
        bl.FullUnroll(),
        torch.tensor(1.0, dtype=F64),
    )
    assert error.verdict.status is bl.Status.NOT_FINITE


def saddle() -> bl.BilevelProblem:
    diagonal = torch.tensor([2.0, -0.5], dtype=F64)
    return problem(lambda x, u: 0.5 * (diagonal * x * x).sum() + u * x.sum(), lambda x, u: (x - 3.0).square().sum())


@pytest.mark.parametrize("solver", [bl.CG(), bl.Direct()], ids=repr)
def test_an_indefinite_hessian_gives_its_curvature_and_a_damping_that_works(solver: Any) -> None:
    error = failed(r"-0\.\d+.*a damping above (\S+) would lift it", saddle(), GD, bl.Implicit(solver), U)
    assert error.verdict.status is bl.Status.NEGATIVE_CURVATURE
    assert "`Implicit(damping=...)`" in str(error)
    # The steps do not lead to the saddle, so that the number, which there is, is one in doubt.
    damped = bl.hypergradient(saddle(), GD, bl.Implicit(solver, damping=0.51), U, on_failure="return")
    assert damped.status is bl.Status.INACCURATE


@pytest.mark.parametrize("linear_solver", [None, bl.CG(), bl.Direct()], ids=repr)
def test_newton_on_an_indefinite_hessian_gives_its_curvature_and_a_damping(linear_solver: Any) -> None:
    error = failed(r"^Newton at step 1: [^:]*-0\.\d+", saddle(), bl.Newton(linear_solver), bl.Implicit(), U)
    assert error.verdict.status is bl.Status.NEGATIVE_CURVATURE
    assert "damping" in str(error)


def test_cg_that_did_not_converge_gives_residual_and_steps() -> None:
    case = tree_case()
    error = failed(
        r"CG stopped after 2 steps at the relative residual \d\.\d+e-\d+, above tol=3.7e-11",
        case.problem,
        bl.Newton(),
        bl.Implicit(bl.CG(max_steps=2)),
        case.hparams,
    )
    assert f"{error.estimate.certificate.adjoint_residual:.2e}" in str(error)
    assert "raise its `max_steps`" in str(error)


def test_a_solver_short_of_its_tolerance_warns_and_still_gives_the_number() -> None:
    case = tree_case()
    solver = bl.GradientDescent(steps=3, tol=1e-12)
    with pytest.warns(bl.BilevelWarning, match=r"stopped after 3 steps at the inner residual .* above tol=1.0e-12"):
        estimate = bl.hypergradient(case.problem, solver, bl.Implicit(), case.hparams)
    assert torch.isfinite(estimate.hypergradient).all()


def test_an_automatic_step_size_without_curvature_is_refused() -> None:
    concave = problem(lambda x, u: -(x * x).sum() * u)
    text = (
        "GradientDescent(step_size='auto') measured a largest curvature of -0.6 at the start, so no step size follows"
    )
    refused(text, concave, bl.GradientDescent(), bl.Implicit(), U)


def test_a_nan_in_the_outer_loss_is_reported() -> None:
    made = problem(outer=lambda x, u: (x - 0.9).sqrt().sum())
    error = failed("the outer loss is nan at the inner solution", made, bl.Newton(), bl.Implicit(), U)
    assert torch.isnan(error.estimate.hypergradient)


def test_newton_refuses_an_optimality_map() -> None:
    fixed = bl.BilevelProblem.from_fixed_point(
        lambda x, u: 0.5 * x + u, lambda x, u: x.square().sum(), torch.zeros(2, dtype=torch.float64)
    )
    refused("the linear solvers of Newton need an inner loss", fixed, bl.Newton(bl.CG()), bl.Implicit(bl.GMRES()), U)


@pytest.mark.parametrize("linear_solver", [bl.Neumann(), bl.FixedPointIteration(), bl.CG()])
def test_a_linear_solver_for_symmetric_matrices_refuses_an_optimality_map(linear_solver: bl.LinearSolver) -> None:
    def update(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + u

    fixed = bl.BilevelProblem.from_fixed_point(
        update, lambda x, u: x.square().sum(), torch.zeros(2, dtype=torch.float64)
    )
    refused("needs a symmetric matrix", fixed, bl.FixedPoint(update), bl.Implicit(linear_solver), U)


def test_dicts_in_another_order_are_matched_by_key_and_other_trees_refused() -> None:
    start = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}

    def swapped(x: dict[str, torch.Tensor], u: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"b": 0.5 * x["b"] + 2 * u, "a": 0.5 * x["a"] + u}

    fixed = bl.BilevelProblem.from_fixed_point(swapped, lambda x, u: (x["a"] * x["b"]).sum(), start)
    # a* = 2 u and b* = 4 u in both components, so the outer loss is 16 u^2.
    for estimator in (bl.FullUnroll(), bl.Implicit(bl.GMRES())):
        estimate = bl.hypergradient(fixed, bl.FixedPoint(swapped), estimator, U)
        torch.testing.assert_close(estimate.hypergradient, 32 * U)
    wrong = bl.FixedPoint(lambda x, u: {"a": x["a"]}, steps=3)
    refused("`FixedPoint.update` must return a tree of the structure", fixed, wrong, bl.FullUnroll(), U)


@pytest.mark.parametrize(
    ("hparams", "constraint", "text"),
    [
        (torch.tensor([1.0, 0.0]), torch.distributions.constraints.simplex, "lies on the boundary of its constraint"),
        (torch.tensor([1.0, -2.0]), torch.distributions.constraints.positive, "it goes from -2 to 1"),
    ],
)
def test_a_start_that_a_constraint_does_not_allow(hparams: torch.Tensor, constraint: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bl.OuterOptimizer(problem(), GD, bl.Implicit(), hparams.double(), constraints=constraint)


def test_a_warm_start_that_is_no_switch() -> None:
    with pytest.raises(ValueError, match="`warm_start` must be True, False or a WarmStart, got 'yes'"):
        bl.OuterOptimizer(problem(), GD, bl.Implicit(), U, warm_start="yes")


def test_a_run_that_diverges_along_negative_curvature_names_the_eigenvalue() -> None:
    saddle = problem(inner=lambda x, u: 0.5 * (x[0] ** 2 - 0.5 * x[1] ** 2) * u.exp(), params=torch.ones(2, dtype=F64))
    with pytest.raises(
        bl.HypergradientError, match=r"has the eigenvalue -0\.675 at the start, so the inner loss is not"
    ):
        bl.hypergradient(saddle, bl.GradientDescent(steps=200), bl.Implicit(), U)


def test_a_penalty_that_overflows_is_refused_in_words() -> None:
    ridge = RidgeProblem(X, Y, X, Y)
    refused(
        "a penalty is not finite: hyperparameters go up to 1000",
        ridge,
        GD,
        bl.Implicit(),
        ridge.initial_hparams(1000.0),
    )


# What is given in the place of something else ------------------------------------------------------------------------


def said(sentence: str, function: Any, *arguments: Any, **options: Any) -> None:
    """Check the whole sentence."""
    with pytest.raises(ValueError, match=r".") as caught:
        function(*arguments, **options)
    assert str(caught.value) == sentence


def test_a_class_in_the_place_of_its_instance_is_told_how_to_make_one() -> None:
    expected = "expected (problem, solver, estimator, hparams), got the class"
    said(
        f"{expected} Newton in the place of InnerSolver: write Newton().",
        *(bl.hypergradient, problem(), bl.Newton, bl.Implicit(), U),
    )
    tail = f"{expected} TruncatedUnroll in the place of HypergradEstimator: write TruncatedUnroll(...)."
    said(tail, bl.hypergradient, problem(), GD, bl.TruncatedUnroll, U)
    said(tail, bl.OuterOptimizer, problem(), GD, bl.TruncatedUnroll, U)
    said(f"{expected} RidgeProblem in the place of BilevelProblem.", bl.hypergradient, RidgeProblem, GD, None, U)
    said(
        "`Implicit.linear_solver` must be a LinearSolver, such as CG(), got the class CG: write CG().",
        *(bl.Implicit, bl.CG),
    )
    said(
        "`Newton.linear_solver` must be a LinearSolver or None, got the class Direct: write Direct().",
        *(bl.Newton, bl.Direct),
    )


STARTS = {
    "`params[0]` must be a Tensor, got float: torch.as_tensor makes one.": [0.0, 0.0],
    "`params` must be a Tensor, got ndarray: torch.as_tensor makes one.": np.zeros(2),
    "`params['w']` must be a Tensor, got NoneType.": {"w": None},
    "`params` holds no tensors.": {},
}


@pytest.mark.parametrize("sentence", STARTS)
def test_a_start_that_is_no_tensor_is_refused_where_it_is_given(sentence: str) -> None:
    said(sentence, problem, params=STARTS[sentence])
    said(sentence, bl.hypergradient, problem(), GD, bl.Implicit(), U, STARTS[sentence])


def test_hyperparameters_that_are_no_tensors_are_refused_by_the_outer_loop() -> None:
    sentence = "`hparams` must be a Tensor, got ndarray: torch.as_tensor makes one."
    said(sentence, bl.OuterOptimizer, problem(), GD, bl.Implicit(), np.zeros(2))


def test_a_function_of_other_arguments_is_refused_where_it_is_given() -> None:
    def two(x: Any, u: Any) -> Any:
        return x

    said("`inner_loss` must be a function of (params, hparams), got one of (w).", bl.BilevelProblem, lambda w: w, two)
    said("`outer_loss` must be a function of (params, hparams), got one of (w).", bl.BilevelProblem, two, lambda w: w)
    said(
        "`optimality` must be a function of (params, hparams), got one of (a, b, c).",
        *(bl.BilevelProblem, None, two),
        optimality=lambda a, b, c: a,
    )
    said("`inner_loss` must be a function of (params, hparams), got 3.", bl.BilevelProblem, 3, two)
    said(
        "`update` must be a function of (params, hparams), got one of (x).",
        *(bl.BilevelProblem.from_fixed_point, lambda x: x, two),
    )
    said("`FixedPoint.update` must be a function of (params, hparams), got one of (x).", bl.FixedPoint, lambda x: x)
    said(
        "`inner_loss` must be a function of (model, params, hparams), got one of (x, u).",
        *(bl.ModuleProblem, torch.nn.Linear(1, 1), two, two),
    )


@pytest.mark.parametrize(
    "loss",
    [lambda *both: both[0].sum(), lambda x, u, scale=1.0: x.sum(), torch.dot],
    ids=["any number", "a third with a default", "written in C"],
)
def test_functions_that_can_be_called_with_two_arguments_are_accepted(loss: Any) -> None:
    bl.BilevelProblem(loss, loss)


def test_forward_mode_keeps_no_graph() -> None:
    said(
        "`FullUnroll.memory` must be 'iterates' (the default) where mode='forward', got 'graph'.",
        *(bl.FullUnroll, "forward", "graph"),
    )


def test_an_automatic_step_size_at_an_indefinite_start_suggests_a_penalty_that_works() -> None:
    made = saddle()
    error = failed(
        r"eigenvalue -0\.5 at the start, so the inner loss is not convex there: add a penalty c/2 \|params\|\^2 with c "
        r"above 0\.5, take Newton with such a `damping`, or start elsewhere",
        *(made, bl.GradientDescent(steps=300), bl.FullUnroll(), U),
    )
    assert "or add a penalty where the inner loss is not convex" in str(error)
    better = problem(lambda x, u: made.inner_loss(x, u) + 0.5 * 0.6 * (x * x).sum(), made.outer_loss)
    assert bl.hypergradient(better, bl.GradientDescent(), bl.FullUnroll(), U).status.ok


# Warm starts ---------------------------------------------------------------------------------------------------------


def test_a_warm_start_of_something_else_is_recognised() -> None:
    carry = bl.hypergradient(problem(), bl.Adam(steps=3), bl.FullUnroll(), U).carry
    said(
        "this carry is of the inner solver Adam, whose memory Newton cannot go on with: start with "
        "params=estimate.params instead.",
        *(bl.hypergradient, problem(), bl.Newton(), bl.Implicit(), U),
        carry=carry,
    )
    larger = problem(params=torch.ones(3, dtype=F64))
    said(
        "this carry is of another problem: it holds a Tensor of shape (2,), the params here are a Tensor of shape "
        "(3,).",
        *(bl.hypergradient, larger, bl.Adam(steps=3), bl.FullUnroll(), U),
        carry=carry,
    )
    named = problem(lambda x, u: u * (x["a"] ** 2).sum(), lambda x, u: x["a"].sum(), {"a": torch.ones(3, dtype=F64)})
    said(
        "this carry is of another problem: it holds a Tensor of shape (2,), the params here are ['a'] of shape (3,).",
        *(bl.hypergradient, named, bl.Adam(steps=3), bl.FullUnroll(), U),
        carry=bl.Carry(adjoint=torch.ones(2, dtype=F64)),
    )
    said(
        "`carry` must be the `carry` of an estimate, got {}.",
        *(bl.hypergradient, problem(), GD, bl.Implicit(), U),
        carry={},
    )
