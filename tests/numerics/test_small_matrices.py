"""Small matrices as arrays of NumPy and as tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bilevel.numerics import small
from bilevel.numerics.dense import symmetric_product


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_arrays_and_tensors_give_what_the_inverse_does(make) -> None:
    rng = np.random.default_rng(0)
    X, a = rng.standard_normal((12, 5)), rng.random(5) + 0.1
    gram = X.T @ X
    inverse = np.linalg.inv(gram + np.diag(a))
    L = small.cholesky(make(gram), make(a))
    np.testing.assert_allclose(gram, X.T @ X)  # unchanged
    np.testing.assert_allclose(small.to_numpy(small.inverse(L)), inverse, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(small.to_numpy(small.solve(L, make(a))), inverse @ a, rtol=1e-10)
    half = small.half_solve(L, make(X).T)
    np.testing.assert_allclose(small.to_numpy(small.row_dots(half.T, half.T)), np.diag(X @ inverse @ X.T), rtol=1e-10)
    whole = small.to_numpy(small.half_solve(L, half, transposed=True))
    np.testing.assert_allclose(whole.T, X @ inverse, rtol=1e-9, atol=1e-12)
    for d in (rng.random(12), rng.standard_normal(12)):
        expected = X.T @ np.diag(d) @ X
        np.testing.assert_allclose(small.to_numpy(small.weighted_gram(make(X), make(d))), expected, atol=1e-12)
    assert small.array(small.tensor(make(a))) is not None
    values, vectors = small.eigh(torch.from_numpy(gram))
    np.testing.assert_allclose((vectors * values) @ vectors.T, gram, atol=1e-12)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_a_matrix_that_rounding_leaves_without_a_factor_gets_one(make) -> None:
    line = np.linspace(0.5, 1.5, 6)
    gram = np.outer(line, line) - 1e-15 * np.eye(6)
    L = np.tril(small.to_numpy(small.cholesky(make(gram), make(np.zeros(6)))))
    np.testing.assert_allclose(L @ L.T, gram, atol=1e-7)


@pytest.mark.parametrize("size", [3, 512, 700])
def test_a_symmetric_product_is_made_by_its_upper_blocks(size) -> None:
    rng = np.random.default_rng(1)
    X, d = rng.standard_normal((size, 4)), rng.random(4)
    product = symmetric_product(torch.from_numpy(X * d), torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(product, (X * d) @ X.T, rtol=1e-12, atol=1e-13)


def test_gram_matrices_of_outputs_are_blocks_of_one_matrix() -> None:
    X, d = torch.randn(30, 4, dtype=torch.float64), torch.rand(3, 3, 30, dtype=torch.float64)
    d = d + d.transpose(0, 1)
    pairs = small.paired(X)
    assert pairs is not None
    expected = torch.einsum("ni,abn,nj->aibj", X, d, X).reshape(12, 12)
    torch.testing.assert_close(small.block_grams(pairs, d, 4), expected)
    assert small.paired(torch.zeros(1).expand(small.PAIRS, 2)) is None
