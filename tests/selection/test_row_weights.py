"""Weights of training rows: derivatives, what is found, what never leaks, and when equal weights are kept."""

import numpy as np
import pytest
import torch

import bilevel as bl
from bilevel.criteria import LinearData
from bilevel.problems import Logistic, Softmax, Squared
from bilevel.problems.sample_weights import RowWeightProblem
from bilevel.selection import learn_row_weights
from bilevel.selection.row_weights import _Walk


@pytest.fixture
def short(monkeypatch):
    """Paths of one node by the losses of rows, and of one step of single rows."""
    monkeypatch.setattr("bilevel.selection.row_weights.SHARES", (0.8,))
    monkeypatch.setattr("bilevel.selection.row_weights.STEPS", (1,))


def rows(loss, count, seed=0, share=0.0, features=3):
    """Standard normal rows with targets as the loss takes them, of which a share is wrong; which ones is returned."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((count, features))
    z = 3.0 * X[:, 0] - 2.0 * X[:, 1]
    wrong = rng.random(count) < share
    if isinstance(loss, Squared):
        y = z + 0.5 * rng.standard_normal(count) + 9.0 * wrong
    elif isinstance(loss, Logistic):
        y = np.where(z + rng.logistic(size=count) > 0, 1.0, -1.0) * np.where(wrong, -1.0, 1.0)
    else:
        y = np.argmax(np.column_stack([z, X[:, 1], X[:, 2]]) + rng.gumbel(size=(count, 3)), 1)
        y = np.where(wrong, (y + 1) % 3, y)
    return X, torch.from_numpy(y), wrong


@pytest.mark.parametrize("loss", [Squared(), Logistic(), Softmax()], ids=lambda loss: type(loss).__name__)
def test_the_hypergradient_of_every_loss_is_that_of_differences(loss):
    X, y, _ = rows(loss, 7)
    V, t, _ = rows(loss, 6, seed=1)
    penalty = torch.tensor([0.5, 0.3, 0.2])
    problem = RowWeightProblem(X, y, V, t, glm=loss, penalty=penalty, loss="sum")
    u = torch.linspace(-1.0, 1.0, 7, dtype=torch.float64)
    solver, rule = bl.Newton(tol=1e-12), bl.Implicit(bl.Direct())

    def value(u):
        return torch.tensor(bl.hypergradient(problem, solver, rule, u).outer_loss, dtype=u.dtype)

    steps = 1e-5 * torch.eye(7, dtype=torch.float64)
    expected = torch.stack([(value(u + step) - value(u - step)) / 2e-5 for step in steps])
    found = bl.hypergradient(problem, solver, rule, u).hypergradient
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(bl.hypergradient(problem, solver, bl.Implicit(bl.CG(tol=1e-12)), u).hypergradient, found)


@pytest.mark.parametrize("loss", [Squared(), Logistic(), Softmax()], ids=lambda loss: type(loss).__name__)
def test_wrong_rows_have_small_weights_and_are_proved_to_be_wrong(loss):
    X, y, wrong = rows(loss, 120, share=0.2)
    V, t, _ = rows(loss, 80, seed=1)
    found = learn_row_weights(LinearData.of(X, y), V, t, loss, folds=3)
    assert found.choice.open
    assert found.chosen > 0
    low = np.argsort(found.learned)[: wrong.sum()]
    assert wrong[low].mean() > (0.5 if isinstance(loss, Softmax) else 0.6)
    assert 0 <= found.weights.min() < found.weights.max() <= 1


def test_weights_of_right_rows_are_equal():
    X, y, _ = rows(Squared(), 120)
    V, t, _ = rows(Squared(), 40, seed=1)
    found = learn_row_weights(LinearData.of(X, y), V, t, Squared(), folds=3)
    assert found.chosen == 0
    assert (found.weights == 1).all()
    assert found.learned.std() > 0


def test_rows_that_are_held_out_have_no_say(short):
    X, y, _ = rows(Logistic(), 60, share=0.2)
    V, t, _ = rows(Logistic(), 30, seed=1)
    learn, other = np.arange(20), torch.cat([t[:20], -t[20:]])
    data = LinearData.of(X, y)
    paths = [
        list(_Walk(data.X, y, torch.from_numpy(V), each, Logistic(), 1.0, intercept=False).path(learn))
        for each in (t, other)
    ]
    for one, two in zip(*paths, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert torch.equal(one.u, two.u)


def test_units_of_columns_and_targets_change_no_weight(short):
    X, y, _ = rows(Squared(), 60, share=0.1)
    V, t, _ = rows(Squared(), 40, seed=1)
    one = learn_row_weights(LinearData.of(X, y), V, t, Squared(), guard=False)
    scale = np.array([10.0, 0.1, 3.0])
    two = learn_row_weights(
        LinearData.of(X * scale + 1.0, 5.0 * y - 2.0), V * scale + 1.0, 5.0 * t - 2.0, Squared(), guard=False
    )
    np.testing.assert_allclose(two.weights, one.weights, atol=1e-4)
    assert one.choice is None


def test_a_single_trusted_row_is_refused():
    X, y, _ = rows(Squared(), 20)
    with pytest.raises(ValueError, match="row weights need at least 2 trusted rows, got 1"):
        learn_row_weights(LinearData.of(X, y), X[:1], y[:1], Squared())


@pytest.mark.parametrize("better", [True, False])
def test_a_gain_has_to_be_one_of_the_model_that_weights_are_for(better, short):
    X, y, _ = rows(Squared(), 60, share=0.2)
    V, t, _ = rows(Squared(), 40, seed=1)
    asked = []

    def judge(weights, learn, held):
        asked.append((weights.std() > 0, *learn, *held))
        noise = np.linspace(0.0, 1.0, len(held))
        return noise - (0.5 + 0.1 * noise) * (better and weights.std() > 0)

    found = learn_row_weights(LinearData.of(X, y), V, t, Squared(), judge=judge)
    assert found.choice.open
    assert found.judged.open is better
    assert (found.chosen > 0) is better
    assert bool(found.weights.std() > 0) is better
    assert len(asked) == 10
    assert all(sorted(rest) == list(range(40)) for _, *rest in asked)
