"""Inputs that the problem classes refuse, each in one sentence that says what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from problem_cases import data

from bilevel.problems import (
    LogisticProblem,
    MLPProblem,
    QuadraticProblem,
    RidgeProblem,
    SampleWeightProblem,
    SoftmaxProblem,
)

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
            lambda X, y: (X, torch.stack([y, y], 1)),
            r"and y_{part} shape \(rows,\) with as many rows, got \(\d+, 4\) and \(\d+, 2\): several targets are a "
            r"problem each, which bilevel\.stack runs side by side",
        ),
        (lambda X, y: (X, y[1:]), r"X_{part} must have shape .* with as many rows, got"),
        (lambda X, y: (X[:0], y[:0]), r"X_{part} is empty, of shape \(0, 4\)"),
        (lambda X, y: (X[:, :0], y), r"X_{part} is empty, of shape \(\d+, 0\)"),
        (lambda X, y: (X * 1j, y), r"X_{part} must hold real numbers, got torch\.complex128"),
        (
            lambda X, y: (with_first(X, NAN), y),
            r"X_{part} holds NaN or infinite values \(1 of \d+\), the first in row 1, column 1: drop or fill those",
        ),
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
    with pytest.raises(ValueError, match=f"X_{part} has 3 features, but X_train has 4"):
        family(**splits, **{f"X_{part}": X[:, :3]})
    other = family(**splits, **{f"X_{part}": X.float()})
    assert torch.equal(other.splits[part].X, X.float().double().t())


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


class Table:
    """As much of a DataFrame as the problems look at."""

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = list(columns)
        self.values = np.array(list(columns.values()), dtype=object).T

    def __array__(self, dtype=None, copy=None):
        return self.values


X = np.random.default_rng(0).standard_normal((12, 2))
Y = X @ [1.0, -2.0] + np.arange(12) % 3
SEALED = X.copy()
SEALED.flags.writeable = False


@pytest.mark.parametrize(
    ("inputs", "y", "dtype"),
    [
        (X.tolist(), Y.tolist(), torch.float64),
        (SEALED, Y[:, None], torch.float64),
        (X[::-1][::-1], Y[::-1][::-1], torch.float64),
        (np.asfortranarray(X), Y.astype(object), torch.float64),
        (X.astype(">f8"), Y.astype(np.longdouble), torch.float64),
        (Table({"a": X[:, 0].tolist(), "b": X[:, 1].tolist()}), Y, torch.float64),
        (torch.tensor(X, requires_grad=True), Y[:, None].tolist(), torch.float64),
        (X.astype(np.float32), Y, torch.float32),
        (X.astype(np.float16), Y.astype(np.float32), torch.float32),
        (torch.tensor(X).bfloat16(), Y, torch.float32),
    ],
)
def test_inputs_of_every_form_make_the_same_problem(inputs, y, dtype):
    problem = RidgeProblem(inputs, y, inputs, y)
    want = np.linalg.solve(X.T @ X / 12 + np.eye(2), X.T @ Y / 12)
    tol = 1e-12 if dtype == torch.float64 else 2e-6 if getattr(inputs, "dtype", None) == np.float32 else 3e-2
    np.testing.assert_allclose(problem.solve(torch.zeros((), dtype=dtype)).numpy(), want, rtol=tol)


def test_integers_are_inputs_in_double_precision():
    counts, y = np.arange(12).reshape(6, 2) % 5, np.arange(6)
    problem = RidgeProblem(counts, y, counts.astype(np.uint16), y)
    assert problem.train.X.dtype == problem.val.X.dtype == problem.train.y.dtype == torch.float64
    assert torch.equal(problem.val.X.t(), torch.tensor(counts).double())


YES = np.where(np.arange(12) % 3 == 0, "no", "yes")


@pytest.mark.parametrize(
    "labels",
    [
        YES,
        YES.tolist(),
        YES.astype(object),
        YES[:, None],
        YES.astype("S"),
        YES == "yes",
        (YES == "yes").tolist(),
        np.where(YES == "yes", 1, -1),
        np.where(YES == "yes", 1.0, -1.0).astype(np.float32),
        (YES == "yes").astype(np.uint8),
        (YES == "yes").astype(object),
    ],
)
@pytest.mark.parametrize("family", [LogisticProblem, SoftmaxProblem, MLPProblem, SampleWeightProblem])
def test_labels_of_every_form_are_the_same_classes(family, labels):
    problem = family(X, labels, X, labels)
    least = -1 if family is LogisticProblem else 0
    assert problem.train.y.tolist() == [1 if label == "yes" else least for label in YES]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_val": ["maybe", *YES[1:]]}, "y_val holds the label 'maybe', which y_train does not"),
        ({"y_val": YES == "yes"}, "y_train holds strings, but y_val numbers: give all labels in one form"),
        ({"y_train": [1, *YES[1:]]}, "y_train must hold numbers or strings, all of one kind, got int, str"),
        ({"y_train": [None, *YES[1:]]}, r"y_train has no value in row 1 \(None\): drop such rows first"),
        ({"y_train": [NAN, *YES[1:]]}, r"y_train has no value in row 1 \(nan\): drop such rows first"),
        ({"y_train": ["a"] * 12, "y_val": ["a"] * 12}, r"y_train holds one class only \('a'\): there is nothing to"),
    ],
)
def test_strings_that_are_no_labels(change, message):
    with pytest.raises(ValueError, match=message):
        LogisticProblem(**{"X_train": X, "y_train": YES, "X_val": X, "y_val": YES} | change)


A, B = X.T.tolist()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            Table({"a": A, "city": ["Rome"] * 12}),
            "column 'city' of X_train holds 'Rome' in row 1, which is no number: en",
        ),
        (Table({"a": A, "b": [1.0, None, *B[2:]]}), r"\(1 of 24\), the first in row 2, column 'b': drop or fill those"),
        (
            Table({"Unnamed: 0": [*range(12)], "b": B}),
            "X_train has the column 'Unnamed: 0', the index that pandas wrote",
        ),
        (X.astype(str), r"column 1 of X_train holds '0\.125\S+' in row 1, which is no number: encode it"),
        (
            np.full((12, 2), np.datetime64("2020-01-01")),
            r"column 1 of X_train holds datetime64\[D\]: encode it as real",
        ),
        (np.ma.masked_greater(X, 0), "X_train has masked values: drop or fill them first"),
        ([[1.0, 2.0], [3.0]], "X_train must be an array of numbers: setting an array element with a sequence"),
        (None, r"X_train must hold numbers, got objects of shape \(\)"),
        (
            scipy.sparse.csr_matrix(X),
            r"X_train is sparse, a csr_matrix, .* give X_train\.toarray\(\), or state the los",
        ),
        (scipy.sparse.csc_array(X), r"X_train is sparse, a csc_array, .* give X_train\.toarray\(\)"),
        (scipy.sparse.coo_array(X), r"X_train is sparse, a coo_array, .* give X_train\.toarray\(\)"),
        (torch.tensor(X).to_sparse_coo(), r"X_train is a sparse tensor, torch\.sparse_coo, .* X_train\.to_dense\(\)"),
    ],
)
@pytest.mark.parametrize(("family", "y"), [(RidgeProblem, Y), (LogisticProblem, YES), (MLPProblem, YES)])
def test_inputs_that_are_no_numbers(family, y, inputs, message):
    with pytest.raises(ValueError, match=message):
        family(inputs, y, X, y)


def test_tables_with_their_columns_in_another_order():
    table, other = Table({"a": A, "b": B}), Table({"b": B, "a": A})
    with pytest.raises(
        ValueError, match="column 1 of X_val is 'b', but of X_train 'a': give both tables the same colum"
    ):
        RidgeProblem(table, Y, other, Y)


def test_strings_are_no_regression_target():
    with pytest.raises(ValueError, match="y_train holds strings, such as 'no', but this problem takes numbers: encode"):
        RidgeProblem(X, YES, X, YES)


@pytest.mark.parametrize("family", [RidgeProblem, LogisticProblem, MLPProblem, SampleWeightProblem])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("fit_intercept", "centre X and y, or add a column of ones, which is penalised as the others are"),
        ("sample_weight", "state the weighted loss by two functions in a BilevelProblem"),
        ("solver", r"its options are in help\(bilevel\.problems\.\w+\)"),
    ],
)
def test_options_that_a_problem_does_not_have(family, option, message):
    with pytest.raises(ValueError, match=f"`{option}` is no option of {family.__name__}: {message}"):
        family(X, YES == "yes", X, YES == "yes", **{option: True})


def test_a_penalty_that_is_no_name_and_one_of_zero():
    with pytest.raises(
        ValueError,
        match=r"RidgeProblem.penalty` must be one of .* \(values of penalties are hyperparameters\), got tensor",
    ):
        RidgeProblem(X, Y, X, Y, penalty=torch.tensor([0, 1]))
    problem = RidgeProblem(X, Y, X, Y)
    with pytest.raises(ValueError, match="a log penalty is -inf, which is no penalty at all: use parametrization='dir"):
        problem.check(problem.params, torch.tensor(-INF, dtype=torch.float64))


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
