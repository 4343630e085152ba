"""The measured ends of a spectrum, and the closed-form bounds that stand in for them."""

import pytest
import torch

from bilevel.numerics.lanczos import lanczos
from bilevel.problems import LogisticProblem, RidgeProblem, SoftmaxProblem


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_steps_give_both_ends_exactly():
    matrix = normal(1, 12, 12)
    matrix = matrix + matrix.t()
    spectrum = lanczos(lambda v: matrix @ v, matrix[0], steps=12, rtol=0.0)
    values = torch.linalg.eigvalsh(matrix)
    assert spectrum.exact
    assert spectrum.smallest == pytest.approx(float(values[0]), rel=1e-12)
    assert spectrum.largest == pytest.approx(float(values[-1]), rel=1e-12)


def test_few_steps_stay_inside_the_spectrum_and_are_not_called_exact():
    values = torch.linspace(1.0, 1000.0, 200, dtype=torch.float64)
    spectrum = lanczos(lambda v: values * v, values, steps=8)
    assert not spectrum.exact
    assert 1.0 <= spectrum.smallest <= spectrum.largest <= 1000.0
    assert spectrum.largest > 900.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_start_is_not_the_first_row_of_a_data_set_drawn_from_a_small_seed(seed):
    # With fewer rows than features a start inside the row space would never see the penalty.
    X = normal(seed, 3, 4)
    problem = RidgeProblem(X, X[:, 0], X, X[:, 0])
    spectrum = problem.bind(problem.initial_hparams(-5.0)).curvature(problem.params)
    assert spectrum.smallest == pytest.approx(float(torch.tensor(-5.0, dtype=torch.float64).exp()), rel=1e-9)
    found = lanczos(lambda v: X.t() @ (X @ v), X[0], rtol=0.0)
    assert found.smallest < 1e-9 * found.largest


def test_a_nan_product_gives_nan_and_nothing_exact():
    spectrum = lanczos(lambda v: v * float("nan"), normal(1, 3))
    assert spectrum.largest != spectrum.largest
    assert not spectrum.exact


def test_wide_ridge_beyond_the_dense_limit_has_a_proven_lower_end():
    X = normal(4, 20, 400)
    problem = RidgeProblem(X, X[:, 0], X, X[:, 0])
    spectrum = problem.bind(problem.initial_hparams(0.5)).curvature(problem.params)
    assert spectrum.smallest == pytest.approx(float(torch.tensor(0.5, dtype=torch.float64).exp()))


def test_axes_of_size_one_stay_in_the_shape_of_the_hyperparameters():
    X = normal(5, 6, 1)
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    assert LogisticProblem(X, y, X, y, "per_feature").initial_hparams().shape == (1,)
    assert SoftmaxProblem(X, y, X, y, "per_weight").initial_hparams().shape == (2, 1)
    assert SoftmaxProblem(X, y, X, y, "per_feature").initial_hparams().shape == (1,)


def test_boolean_labels_are_two_classes():
    X = normal(6, 6, 2)
    y = torch.tensor([0, 1, 0, 1, 1, 1])
    numbers = LogisticProblem(X, y, X, y)
    assert torch.equal(LogisticProblem(X, y.bool(), X, y.bool()).train.y, numbers.train.y)


def test_a_singular_ridge_problem_has_no_solution_to_give():
    X = normal(8, 3, 5)
    problem = RidgeProblem(X, X[:, 0], X, X[:, 0], parametrization="direct")
    with pytest.raises(ValueError, match="singular at these penalties"):
        problem.solve(torch.zeros((), dtype=torch.float64))
