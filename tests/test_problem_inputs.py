"""Inputs that the problem classes refuse, each in one sentence that says what is wrong."""

from __future__ import annotations

import pytest
import torch
from problem_cases import data

from bilevel.problems import LogisticProblem, QuadraticProblem, RidgeProblem, SoftmaxProblem

FAMILIES = {RidgeProblem: 0, LogisticProblem: 2, SoftmaxProblem: 3}
NAN, INF = float("nan"), float("inf")


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def with_first(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y: (X[:, 0], y), r"X_{part} must have shape \(rows, features\) and y_{part} shape \(rows,\) .* got"),
        (
            lambda X, y: (X, y[:, None]),
            r"and y_{part} shape \(rows,\) with as many rows, got \(\d+, 4\) and \(\d+, 1\)",
        ),
        (lambda X, y: (X, y[1:]), r"X_{part} must have shape .* with as many rows, got"),
        (lambda X, y: (X[:0], y[:0]), r"X_{part} is empty, of shape \(0, 4\)"),
        (lambda X, y: (X[:, :0], y), r"X_{part} is empty, of shape \(\d+, 0\)"),
        (lambda X, y: (X.long(), y), r"X_{part} must have a floating dtype, got torch\.int64"),
        (lambda X, y: (with_first(X, NAN), y), "X_{part} holds NaN or infinite values: drop or fill those rows first"),
        (lambda X, y: (with_first(X, -INF), y), "X_{part} holds NaN or infinite values"),
        (lambda X, y: (X, with_first(y.double(), NAN)), "y_{part} holds NaN or infinite values"),
        (lambda X, y: (X, y.long().to("meta")), "X_{part} is on cpu but y_{part} on meta: move one of them"),
    ],
)
def test_data_that_cannot_work(family, part, change, message):
    splits = data(FAMILIES[family])
    splits[f"X_{part}"], splits[f"y_{part}"] = change(splits[f"X_{part}"], splits[f"y_{part}"])
    with pytest.raises(ValueError, match=message.replace("{part}", part)):
        family(**splits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["val", "test"])
def test_parts_that_do_not_fit_the_training_part(family, part):
    splits = data(FAMILIES[family])
    X = splits.pop(f"X_{part}")
    with pytest.raises(ValueError, match=f"X_{part} has 3 features in torch.float64, but X_train has 4 in"):
        family(**splits, **{f"X_{part}": X[:, :3]})
    with pytest.raises(
        ValueError, match=f"X_{part} has 4 features in torch.float32, but X_train has 4 in torch.float64"
    ):
        family(**splits, **{f"X_{part}": X.float()})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("missing", ["X_test", "y_test"])
def test_half_a_test_part(family, missing):
    splits = data(FAMILIES[family])
    del splits[missing]
    with pytest.raises(ValueError, match="give X_test and y_test together, or neither"):
        family(**splits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "median"}, "`{family}.loss` must be 'mean' or 'sum', got 'median'"),
        ({"parametrization": "softplus"}, "`{family}.parametrization` must be 'log' or 'direct', got 'softplus'"),
        ({"penalty": "l1"}, "`{family}.penalty` must be one of 'scalar', .*'per_feature'.*, got 'l1'"),
    ],
)
def test_unknown_options(family, options, message):
    with pytest.raises(ValueError, match=message.replace("{family}", family.__name__)):
        family(**data(FAMILIES[family]), **options)


@pytest.mark.parametrize("family", [LogisticProblem, SoftmaxProblem])
@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("label", [-1, 9, 0.5])
def test_labels_that_training_has_not_seen(family, part, label):
    splits = data(2)
    splits[f"y_{part}"] = with_first(splits[f"y_{part}"].double(), label)
    with pytest.raises(ValueError, match=f"y_{part} holds the label {label}, which y_train does not"):
        family(**splits)


@pytest.mark.parametrize("family", [LogisticProblem, SoftmaxProblem])
def test_labels_that_cannot_be_learned(family):
    splits = data(2)
    with pytest.raises(ValueError, match=r"y_train holds one class only \(1\): there is nothing to separate"):
        family(**splits | {"y_train": torch.ones_like(splits["y_train"])})
    with pytest.raises(ValueError, match="y_train holds labels that are not whole numbers: a regression target"):
        family(**splits | {"y_train": splits["y_train"] + 0.5})


def test_logistic_regression_of_three_classes():
    with pytest.raises(
        ValueError, match="y_train holds 3 classes: LogisticProblem takes two, SoftmaxProblem any number"
    ):
        LogisticProblem(**data(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_good_inputs_pass(family):
    problem = family(**data(FAMILIES[family]), penalty="per_feature")
    problem.check(problem.params, problem.initial_hparams())
    bare = family(**{key: value for key, value in data(FAMILIES[family]).items() if "test" not in key})
    assert set(bare.metrics(bare.params)) == {key for key in problem.metrics(problem.params) if "test" not in key}


@pytest.mark.parametrize(
    ("params", "hparams", "message"),
    [
        (zeros(3), zeros(4), r"`params` of RidgeProblem\(penalty='per_feature'\) must be .* shape \(4,\), got \(3,\)"),
        (zeros(4, 1), zeros(4), r"`params` of RidgeProblem.* got \(4, 1\)"),
        ({"w": zeros(4)}, zeros(4), r"`params` of RidgeProblem.* got dict"),
        (zeros(4), zeros(), r"`hparams` of RidgeProblem\(penalty='per_feature'\) must be .* shape \(4,\), got \(\)"),
        (zeros(4), [zeros(4)], r"`hparams` of RidgeProblem.* got list"),
        (zeros(4), 0.0, "`hparams` must be a Tensor, got float"),
        (zeros(4), {}, "`hparams` holds no tensors"),
        (zeros(4), zeros(0), r"`hparams` is empty, of shape \(0,\)"),
        (zeros(4), zeros(4, dtype=torch.int64), "`hparams` must have a floating dtype, got torch.int64"),
        (zeros(4), vector(0, NAN, 0, 0), "`hparams` holds NaN or infinite values"),
        (vector(0, INF, 0, 0), zeros(4), "`params` holds NaN or infinite values"),
        (zeros(4), zeros(4).float(), "`hparams` is torch.float32 on cpu, but params are torch.float64 on cpu"),
        (zeros(4).float(), zeros(4).float(), "`params` is torch.float32 on cpu, but X_train is torch.float64 on cpu"),
    ],
)
def test_points_that_do_not_fit_a_linear_model(params, hparams, message):
    problem = RidgeProblem(**data(), penalty="per_feature")
    with pytest.raises(ValueError, match=message):
        problem.check(params, hparams)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_direct_penalty(family):
    problem = family(**data(FAMILIES[family]), parametrization="direct")
    problem.check(problem.params, problem.initial_hparams(0.0))
    with pytest.raises(ValueError, match=r"a penalty is negative \(-0.25\): declare a positive constraint, or use"):
        problem.check(problem.params, problem.initial_hparams(-0.25))


EYE = torch.eye(2, dtype=torch.float64)
SKEW = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give `hessian_directions` or `linear_directions`: without them the inner problem does not depend on"),
        (
            {"hessian": zeros(2, 3), "linear_directions": zeros(1, 2)},
            r"`QuadraticProblem.hessian` .* \(2, 2\), got \(2, 3\)",
        ),
        ({"linear": zeros(3), "linear_directions": zeros(1, 3)}, r"hessian` must have shape \(3, 3\), got \(2, 2\)"),
        ({"hessian_directions": EYE}, r"hessian_directions` must have shape \(2, 2, 2\), got \(2, 2\)"),
        ({"linear_directions": zeros(1, 3)}, r"linear_directions` must have shape \(1, 2\), got \(1, 3\)"),
        (
            {"hessian_directions": EYE[None], "linear_directions": zeros(2, 2)},
            r"linear_directions` must have shape \(1, 2\), got \(2, 2\)",
        ),
        ({"linear_directions": zeros(1, 2), "target": zeros(1)}, r"target` must have shape \(2,\), got \(1,\)"),
        ({"hessian": SKEW, "linear_directions": zeros(1, 2)}, "`QuadraticProblem.hessian` must be symmetric"),
        ({"hessian_directions": SKEW[None]}, "`QuadraticProblem.hessian_directions` must be symmetric"),
    ],
)
def test_quadratics_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuadraticProblem(**{"hessian": EYE, "linear": zeros(2)} | arguments)


@pytest.mark.parametrize(
    ("params", "hparams", "message"),
    [
        (zeros(2), zeros(3), r"`params` of QuadraticProblem must be a Tensor of shape \(4,\), got \(2,\)"),
        (zeros(4), zeros(2), r"`hparams` of QuadraticProblem must be a Tensor of shape \(3,\), got \(2,\)"),
        ({"x": zeros(4)}, zeros(3), "`params` of QuadraticProblem must be a Tensor .* got dict"),
        (zeros(4), vector(0, 0, NAN), "`hparams` holds NaN or infinite values"),
        (
            zeros(4).float(),
            zeros(3).float(),
            "`params` is torch.float32 on cpu, but the problem is torch.float64 on cpu",
        ),
    ],
)
def test_points_that_do_not_fit_a_quadratic(params, hparams, message):
    problem = QuadraticProblem.random(size=4, hyperparameters=3)
    problem.check(problem.params, zeros(3))
    with pytest.raises(ValueError, match=message):
        problem.check(params, hparams)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": with_first(torch.eye(2, dtype=torch.float64), NAN)}, "hessian` holds NaN or infinite values"),
        ({"linear": vector(1.0, NAN)}, "linear` holds NaN or infinite values"),
        ({"hessian": torch.eye(2)}, "hessian` is torch.float32 on cpu, but `linear` is torch.float64 on cpu"),
        ({"linear": vector(1.0)[0]}, r"linear` must have shape \(d,\), got \(\)"),
    ],
)
def test_quadratic_coefficients_that_cannot_work(change, message):
    options = {
        "hessian": torch.eye(2, dtype=torch.float64),
        "linear": vector(1.0, 2.0),
        "linear_directions": torch.ones(1, 2, dtype=torch.float64),
    }
    with pytest.raises(ValueError, match=message):
        QuadraticProblem(**options | change)
