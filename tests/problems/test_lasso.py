"""Lasso and elastic net: scikit-learn's coefficients, and hypergradients by every way there is."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet
from torch import Tensor

import bilevel as bl
from bilevel.problems import ElasticNetProblem, LassoProblem

F64 = torch.float64


def splits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    X = torch.tensor(rng.standard_normal((90, 15)))
    y = X[:, :4] @ torch.tensor([2.0, -1.0, 0.7, 1.5], dtype=F64) + torch.tensor(rng.standard_normal(90))
    return X[:60], y[:60], X[60:], y[60:]


DATA = splits()
CASES: dict[str, tuple[bl.BilevelProblem, Tensor]] = {
    "lasso": (LassoProblem(*DATA), torch.tensor(-2.0, dtype=F64)),
    "mixture": (LassoProblem(*DATA, l1_ratio=0.6), torch.tensor(-1.8, dtype=F64)),
    "per feature": (LassoProblem(*DATA, "per_feature"), torch.linspace(-3.0, -1.0, 15, dtype=F64)),
    "elastic net": (ElasticNetProblem(*DATA), torch.tensor([-2.0, -1.0], dtype=F64)),
    "elastic net per feature": (
        ElasticNetProblem(*DATA, "per_feature"),
        torch.linspace(-3.0, -1.0, 30, dtype=F64).reshape(2, 15),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize("solver", [bl.FISTA(tol=1e-12), bl.ProximalGradient(tol=1e-12), bl.CoordinateDescent()])
def test_coefficients_are_those_of_scikit_learn(solver: bl.InnerSolver) -> None:
    X, y = DATA[0].numpy(), DATA[1].numpy()
    for name, ratio in (("lasso", 1.0), ("mixture", 0.6)):
        problem, u = CASES[name]
        model = ElasticNet(float(u.exp()), l1_ratio=ratio, fit_intercept=False, tol=1e-13, max_iter=100_000)
        estimate = bl.hypergradient(problem, solver, bl.Implicit(), u)
        assert estimate.status.ok
        np.testing.assert_allclose(estimate.params.numpy(), model.fit(X, y).coef_, rtol=0, atol=1e-8)


@every_case
def test_hypergradients_agree_with_differences_and_with_dense_algebra(name: str) -> None:
    problem, u = CASES[name]
    estimate = bl.hypergradient(problem, bl.FISTA(tol=1e-13), bl.Implicit(bl.CG(tol=1e-13)), u)
    assert estimate.status.ok
    assert 0 < int((estimate.params == 0).sum()) < 15
    exact = problem.exact_hypergradient(u)
    torch.testing.assert_close(estimate.hypergradient, exact, rtol=0, atol=2e-11)
    h = 1e-5
    for index in range(u.numel()):
        unit = torch.zeros(u.numel(), dtype=F64)
        unit[index] = h
        ends = [problem.outer_loss(problem.solve(u + s * unit.reshape(u.shape)), u) for s in (1, -1)]  # type: ignore[attr-defined]
        torch.testing.assert_close(exact.reshape(-1)[index], (ends[0] - ends[1]) / (2 * h), rtol=0, atol=1e-8)


def test_derivatives_are_the_formulas_of_the_support() -> None:
    """With H = X_S'X_S/n + alpha (1 - r): dw/dalpha = -H^-1 (r s + (1 - r) w), dw/dlog om_j = -alpha r s_j H^-1 e_j."""
    X = DATA[0]
    problem, u = CASES["mixture"]
    w = problem.solve(u)  # type: ignore[attr-defined]
    inside, alpha, r = w != 0, u.exp(), 0.6
    H = X[:, inside].T @ X[:, inside] / len(X) + alpha * (1 - r) * torch.eye(int(inside.sum()), dtype=F64)
    by_alpha = -torch.linalg.solve(H, r * w[inside].sign() + (1 - r) * w[inside])
    _, by_params, _ = problem.outer_value_and_grads(w, u)
    got = bl.hypergradient(problem, bl.FISTA(tol=1e-14), bl.Implicit(bl.CG(tol=1e-14)), u).hypergradient
    torch.testing.assert_close(got, alpha * by_alpha @ by_params[inside], rtol=0, atol=2e-11)
    features, v = LassoProblem(*DATA, "per_feature"), u.expand(15).contiguous()
    w = features.solve(v)
    inside = w != 0
    H = X[:, inside].T @ X[:, inside] / len(X)
    _, by_params, _ = features.outer_value_and_grads(w, v)
    expected = torch.zeros(15, dtype=F64)
    expected[inside] = -alpha * w[inside].sign() * torch.linalg.solve(H, by_params[inside])
    got = bl.hypergradient(features, bl.FISTA(tol=1e-14), bl.Implicit(bl.CG(tol=1e-14)), v).hypergradient
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-11)


@every_case
def test_rows_are_what_each_problem_is_alone(name: str) -> None:
    problem, u = CASES[name]
    batch, points = problem.batched(2), torch.stack([u, u + 0.5])
    together = bl.hypergradient(batch, bl.FISTA(tol=1e-12), bl.Implicit(), points)
    other = bl.stack([problem, type(problem)(*splits(1), problem.penalty)])  # type: ignore[attr-defined,call-arg]
    assert other.batch == 2
    for index in range(2):
        alone = bl.hypergradient(problem, bl.FISTA(tol=1e-12), bl.Implicit(), points[index])
        torch.testing.assert_close(together[index].hypergradient, alone.hypergradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("solver", [bl.CoordinateDescent(), bl.FISTA()])
def test_an_outer_loop_tunes_both_penalties_to_a_lower_loss(solver: bl.InnerSolver) -> None:
    problem, u = CASES["elastic net"]
    outer = bl.OuterOptimizer(problem, solver, bl.Implicit(), u)
    result = outer.run(40)
    grid = [torch.tensor([a, b], dtype=F64) for a in np.linspace(-5, 0, 11) for b in np.linspace(-6, 0, 7)]
    best = min(float(problem.outer_loss(problem.solve(v), v)) for v in grid)  # type: ignore[attr-defined]
    assert result.best_loss <= best * 1.005


def test_what_does_not_fit_is_refused() -> None:
    for options, sentence in (
        ({"l1_ratio": 0.0}, "l1_ratio"),
        ({"parametrization": "direct"}, "parametrization"),
        ({"penalty": "per_class"}, "penalty"),
    ):
        arguments: Any = options
        with pytest.raises(ValueError, match=sentence):
            LassoProblem(*DATA, **arguments)
    problem, u = CASES["lasso"]
    with pytest.raises(ValueError, match="ClosedForm needs a quadratic"):
        bl.hypergradient(problem, bl.FISTA(), bl.ClosedForm(), u)
    with pytest.raises(ValueError, match="HyperNewton needs a smooth inner loss"):
        bl.OuterOptimizer(problem, bl.FISTA(), bl.Implicit(), u, bl.HyperNewton())
    assert str(bl.hypergradient(problem, bl.FISTA(), "auto", u).status.name) == "OK"


def test_tune_takes_a_proximal_solver_and_says_so() -> None:
    problem, _ = CASES["lasso"]
    tuned = bl.tune(problem)
    assert tuned.choices[0] == (
        "inner solver FISTA(): it takes the nonsmooth term L1 by its proximal map, and needs no step size"
    )
    grid = [float(problem.outer_loss(problem.solve(u), u)) for u in torch.linspace(-6, 1, 50, dtype=F64)]  # type: ignore[attr-defined]
    assert tuned.outer_loss <= min(grid) * 1.01


@pytest.mark.parametrize("solver", [bl.FISTA(), bl.CoordinateDescent()], ids=repr)
def test_a_start_at_which_all_weights_are_zero_and_exact_is_an_end(solver: bl.InnerSolver) -> None:
    problem, _ = CASES["lasso"]
    u = torch.tensor(2.0, dtype=F64)
    tuned = bl.tune(problem, u, solver=solver, optimizer=bl.HyperLBFGS(1e-3, start="given"))
    assert not tuned.params.any()
    assert tuned.outer_loss == pytest.approx(float(DATA[3].square().mean() / 2))
    assert "-0.0e" not in str(tuned)


@pytest.mark.parametrize("seed", [1, 2])
def test_tune_leaves_the_dead_zone_and_says_no_number_that_kinks_forbid(seed: int) -> None:
    data = splits(seed)
    problem = LassoProblem(*data)
    grid = [float(problem.outer_loss(problem.solve(u), u)) for u in torch.linspace(-6, 1, 200, dtype=F64)]
    one = bl.tune(problem, solver=bl.CoordinateDescent())
    assert one.outer_loss <= min(grid) * 1.001
    # From penalties of one, where weights are dead and their slopes zero.
    each = bl.tune(LassoProblem(*data, "per_feature"))
    assert each.outer_loss < min(grid)
    for tuned in (one, each):
        assert "; the outer loss has kinks, and no bound of what may be left is known" in tuned.stopped
        assert re.search(r"[0-9]e-[0-9]", tuned.stopped) is None
    cut = bl.tune(problem, steps=8)
    assert (
        cut.stopped
        == "took 8 steps, not converged: the outer loss has kinks, and no bound of what may be left is known"
    )


def test_the_scale_of_a_penalty_is_the_least_one_at_which_all_weights_are_zero() -> None:
    for name in ("lasso", "mixture"):
        problem, u = CASES[name]
        edge = problem.penalty_scales(u).log()  # type: ignore[union-attr]
        assert not problem.solve(edge + 1e-6).any()  # type: ignore[attr-defined]
        assert int((problem.solve(edge - 1e-3) != 0).sum()) == 1  # type: ignore[attr-defined]
    X, y = DATA[:2]
    largest = float((X.T @ y).abs().max() / len(y))
    for name in ("elastic net", "elastic net per feature"):
        problem, u = CASES[name]
        first, second = problem.penalty_scales(u)  # type: ignore[misc]
        curvature = (X**2).mean(0)
        torch.testing.assert_close(first, torch.full(first.shape, largest, dtype=F64))
        torch.testing.assert_close(second, curvature if first.dim() else curvature.mean())
