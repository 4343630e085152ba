"""Rows of linear models: standardised by themselves, sparse or dense, and the sentences about what is none."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from criteria_cases import standardised

from bilevel.criteria import LinearData, Penalties, RidgeLeaveOneOut
from bilevel.problems import Logistic, Poisson, Softmax

RNG = np.random.default_rng(0)
X = scipy.sparse.random(30, 8, 0.4, format="csr", random_state=0)
Y, WEIGHTS = RNG.standard_normal(30), RNG.random(30) + 0.1
SOME = [1, 4, 5, 7, 8, 20, 21, 29]


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("intercept", [True, False])
def test_parts_are_standardised_by_themselves_sparse_as_dense(intercept: bool, standardize: bool) -> None:
    options: Any = {"intercept": intercept, "standardize": standardize}
    dense, sparse = (LinearData.of(given, Y, WEIGHTS, **options) for given in (X.toarray(), X))
    part, direct = dense.take(SOME), LinearData.of(X.toarray()[SOME], Y[SOME], WEIGHTS[SOME], **options)
    torch.testing.assert_close(part.X, direct.X)
    torch.testing.assert_close(part.weights, direct.weights)
    w, r = torch.from_numpy(RNG.standard_normal((3, 8))), torch.from_numpy(RNG.standard_normal((3, 8)))
    for one, two in ((dense, sparse), (part, sparse.take(SOME))):
        assert two.sparse
        torch.testing.assert_close(one.offset, two.offset)
        torch.testing.assert_close(one.scale, two.scale)
        torch.testing.assert_close(one.product(w), two.product(w))
        d = torch.rand(one.rows, dtype=torch.float64)
        torch.testing.assert_close(one.collect(d), two.collect(d))
        torch.testing.assert_close(one.gram(d), two.gram(d))
        torch.testing.assert_close(one.row_gram(), two.row_gram())
        torch.testing.assert_close(one.dense(), two.dense())
        torch.testing.assert_close(one.moments(d), two.moments(d))
    torch.testing.assert_close(part.collect(r), r @ part.X)
    if intercept and standardize:
        mean, scale = standardised(X.toarray()[SOME], WEIGHTS[SOME])
        np.testing.assert_allclose(part.offset, mean, atol=1e-14)
        np.testing.assert_allclose(part.scale, scale, atol=1e-14)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_constant_column_has_coefficient_zero(sparse: bool) -> None:
    given = RNG.standard_normal((20, 3))
    given[:, 1] = 0.1
    data = LinearData.of(scipy.sparse.csr_matrix(given) if sparse else given, Y[:20], WEIGHTS[:20])
    assert float(data.scale[1]) == 1.0
    fit = RidgeLeaveOneOut(data, Penalties.feature(3)).refit(np.full(3, -9.0))
    assert abs(float(fit.coef[1])) < 1e-10


@pytest.mark.parametrize("sparse", [True, False])
def test_columns_that_are_constant_without_a_fold_have_deviation_zero_in_the_others(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    given = np.zeros((600, 40))
    given[7] = rng.random(40) + 0.5  # standardised, zeros are a number that rounds
    given[:, 0] = rng.standard_normal(600)
    weights = torch.ones(600, dtype=torch.float64)
    weights[5:200] = 0.0
    _, deviation = LinearData.of(scipy.sparse.csr_matrix(given) if sparse else given, np.arange(600.0)).moments(weights)
    assert float(deviation[0]) > 0.5
    assert not deviation[1:].any()


def repeated(kind: str) -> Any:
    """Return X with every entry stored as two halves, in no order."""
    full = X.tocoo()
    order = np.random.default_rng(1).permutation(2 * full.nnz)
    rows, columns, values = (np.tile(part, 2)[order] for part in (full.row, full.col, full.data / 2.0))
    by_row = np.argsort(rows, kind="stable")
    ends = np.concatenate([[0], np.bincount(rows, minlength=30).cumsum()])
    parts = (ends, columns[by_row], values[by_row])
    if kind == "scipy":
        return scipy.sparse.csr_matrix(parts[::-1], shape=X.shape)
    if kind == "csr":
        return torch.sparse_csr_tensor(*map(torch.as_tensor, parts), X.shape)
    return torch.sparse_coo_tensor(np.stack([rows, columns]), values, X.shape)


@pytest.mark.parametrize("kind", ["scipy", "csr", "coo"])
def test_entries_of_one_place_are_summed_up(kind: str) -> None:
    given = repeated(kind)
    data, plain = LinearData.of(given, Y), LinearData.of(X.toarray(), Y)
    torch.testing.assert_close(data.scale, plain.scale)
    torch.testing.assert_close(data.X.to_dense(), torch.from_numpy(X.toarray()))
    assert len(data.X.values()) == X.nnz
    if kind == "scipy":
        assert given.nnz == 2 * X.nnz  # what was given stays as it is


def test_targets_are_encoded_by_the_loss() -> None:
    assert LinearData.of(X, [3, 5] * 15, loss=Logistic()).y.tolist() == [-1.0, 1.0] * 15
    assert LinearData.of(X, [3, 5, 9] * 10, loss=Softmax()).y.tolist() == [0, 1, 2] * 10
    assert LinearData.of(X, [3, 5, 9] * 10, loss=Poisson()).y.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LinearData.of(X, Y[:5]), r"y must have shape \(30,\), one target for each row of X, got \(5,\)"),
        (lambda: LinearData.of(Y, Y), r"X must have shape \(rows, features\), got \(30,\)"),
        (lambda: LinearData.of(X * np.nan, Y), "X holds NaN or infinite values"),
        (lambda: LinearData.of(X, Y * np.inf), "y holds NaN or infinite values"),
        (lambda: LinearData.of(X, ["a"] * 30), "y holds strings: encode them"),
        (lambda: LinearData.of(X, [1] * 30, loss=Logistic()), r"y holds one class only \(1\)"),
        (lambda: LinearData.of(X, Y, -WEIGHTS), r"weights must have shape \(30,\), one for each row, none negative"),
        (lambda: LinearData.of(X, Y, WEIGHTS * 0), "none negative and not all zero"),
        (lambda: Penalties.scalar(2).spread(np.zeros(2)), r"u must hold 1 finite log penalties, of shape \(1,\)"),
        (lambda: RidgeLeaveOneOut(LinearData.of(X, Y), Penalties.groups([0, 1])), "cover 2 features, but X has 8"),
        (lambda: RidgeLeaveOneOut(LinearData.of(X, Y), Penalties.scalar(8, 2)), "of 2 outputs, but the data have one"),
    ],
)
def test_what_is_no_data_is_refused_in_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        make()
    assert str(caught.value).endswith(".")


def test_sparse_data_travel_to_other_processes_in_parts() -> None:
    # Torch would remark in each of them that CSR tensors are a beta.
    data = LinearData.of(X, Y)
    expected = data.collect(data.y)
    assert not any(torch.is_tensor(each) and each.layout == torch.sparse_csr for each in data.__getstate__().values())
    again = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(again.collect(again.y), expected, rtol=1e-14, atol=0)
