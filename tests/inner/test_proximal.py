"""Nonsmooth inner problems: proximal steps, their residual, and derivatives of the solution on its support."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

import bilevel as bl
from bilevel.check.nonsmooth import proximal_map
from bilevel.check.report import Finding
from bilevel.check.subject import Subject

F64 = torch.float64
ROWS, FEATURES = 60, 20


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation data with five relevant features of twenty."""
    rng = np.random.default_rng(seed)
    X = torch.tensor(rng.standard_normal((100, FEATURES)))
    w = torch.zeros(FEATURES, dtype=F64)
    w[:5] = torch.tensor([2.0, -1.5, 1.0, 0.8, -2.5], dtype=F64)
    y = X @ w + torch.tensor(rng.standard_normal(100))
    return X[:ROWS], y[:ROWS], X[ROWS:], y[ROWS:]


X, Y, XV, YV = data()
U = torch.tensor(-1.5, dtype=F64)
GROUPS = torch.arange(FEATURES) // 4


def squared(w: Tensor, u: Tensor) -> Tensor:
    return 0.5 * ((X @ w - Y) ** 2).mean()


def ridge(w: Tensor, u: Tensor) -> Tensor:
    return squared(w, u) + 0.5 * u.exp() * (w**2).sum()


def held_out(w: Tensor, u: Tensor) -> Tensor:
    return 0.5 * ((XV @ w - YV) ** 2).mean()


TERMS: dict[str, tuple[Any, bl.Nonsmooth]] = {
    "L1": (squared, bl.L1(lambda u: u.exp())),
    "ElasticNet": (squared, bl.ElasticNet(lambda u: u.exp(), lambda u: 0.3 * u.exp())),
    "GroupLasso": (squared, bl.GroupLasso(GROUPS, lambda u: 2.0 * u.exp())),
    "NonNegative": (ridge, bl.NonNegative()),
}
every_term = pytest.mark.parametrize("name", TERMS)


def problem_of(name: str) -> bl.BilevelProblem:
    loss, term = TERMS[name]
    return bl.BilevelProblem(loss, held_out, torch.zeros(FEATURES, dtype=F64), nonsmooth=term)


def solved(name: str, u: Tensor = U, solver: bl.InnerSolver | None = None, **options: Any) -> bl.Estimate:
    return bl.hypergradient(problem_of(name), solver or bl.FISTA(tol=1e-13), bl.Implicit(), u, **options)


@every_term
def test_the_prox_is_the_minimiser_that_defines_it(name: str) -> None:
    _, term = TERMS[name]
    v, step = 2.0 * torch.randn(FEATURES, dtype=F64, generator=torch.Generator().manual_seed(1)), torch.tensor(0.7)
    u = torch.tensor(0.3, dtype=F64)
    best = term.prox(v, step, u)

    def objective(x: Tensor) -> float:
        return float(term.value(x, u) + ((x - v) ** 2).sum() / (2 * step))

    generator = torch.Generator().manual_seed(2)
    for size in (1e-3, 0.1, 1.0):
        other = best + size * torch.randn(FEATURES, dtype=F64, generator=generator)
        other = other.clamp_min(0.0) if name == "NonNegative" else other
        assert objective(best) < objective(other)


@every_term
def test_hypergradients_on_the_support_are_those_of_differences_and_of_the_unrolled_steps(name: str) -> None:
    estimate = solved(name, certify=True)
    assert estimate.status.ok
    certificate = estimate.certificate
    assert certificate.error_kind == "estimate"  # no proof covers a kink
    assert certificate.error is not None
    assert certificate.error < 1e-11
    h = 1e-4
    problem, solver = problem_of(name), bl.FISTA(tol=1e-13)
    ends = [bl.Run(problem, solver, U + sign * h, problem.start()).solve() for sign in (1, -1)]
    up, down = (float(held_out(end.state.params, U)) for end in ends)
    assert float(estimate.hypergradient) == pytest.approx((up - down) / (2 * h), rel=1e-7)
    unrolled = bl.hypergradient(problem, bl.FISTA(steps=80), bl.FullUnroll(), U).hypergradient
    assert float(unrolled) == pytest.approx(float(estimate.hypergradient), rel=1e-8)
    assert 0 < int((estimate.params != 0).sum()) < FEATURES


def test_group_lasso_meets_its_conditions() -> None:
    w, weight = solved("GroupLasso").params, 2.0 * U.exp()
    gradient = X.T @ (X @ w - Y) / ROWS
    zero = 0
    for g in range(5):
        inside = g == GROUPS
        norm = w[inside].norm()
        if norm > 0:
            torch.testing.assert_close(gradient[inside], -weight * w[inside] / norm, rtol=0, atol=1e-12)
        else:
            zero += 1
            assert gradient[inside].norm() <= weight
    assert 0 < zero < 5


def test_nonnegative_least_squares_are_those_of_scipy() -> None:
    problem = bl.BilevelProblem(squared, held_out, torch.zeros(FEATURES, dtype=F64), nonsmooth=bl.NonNegative())
    expected, _ = nnls(X.numpy(), Y.numpy())
    inner = problem.bind(U)
    for solver in (bl.FISTA(tol=1e-12), bl.CoordinateDescent(tol=1e-12)):
        run = bl.Run(problem, solver, U, problem.start()).solve()
        assert run.verdict.status.ok
        np.testing.assert_allclose(run.state.params.numpy(), expected, rtol=0, atol=1e-10)
    assert float(inner.grad(torch.tensor(expected)).norm()) < 1e-12


@every_term
def test_unrolled_steps_are_differentiated_as_autograd_does(name: str) -> None:
    loss, term = TERMS[name]
    step = 0.2
    for solver in (bl.ProximalGradient(step, steps=7), bl.FISTA(step, steps=7)):
        u = U.clone().requires_grad_()
        x = before = torch.zeros(FEATURES, dtype=F64)
        t = 1.0
        for _ in range(7):
            after = (1 + (1 + 4 * t**2) ** 0.5) / 2 if isinstance(solver, bl.FISTA) else 1.0
            y = x + (t - 1) / after * (x - before)
            slope = X.T @ (X @ y - Y) / ROWS + (u.exp() * y if loss is ridge else 0.0)
            new = term.prox(y - step * slope, torch.tensor(step, dtype=F64), u)
            after = 1.0 if bool((y - new) @ (new - x) > 0) else after
            x, before, t = new, x, after
        (expected,) = torch.autograd.grad(held_out(x, u), u)
        for estimator in (bl.FullUnroll(), bl.FullUnroll(memory="graph"), bl.FullUnroll(mode="forward")):
            got = bl.hypergradient(problem_of(name), solver, estimator, U)
            torch.testing.assert_close(got.params, x.detach(), rtol=0, atol=1e-13)
            torch.testing.assert_close(got.hypergradient, expected, rtol=1e-11, atol=1e-13)


@every_term
def test_rows_are_what_each_problem_is_alone(name: str) -> None:
    single, u = problem_of(name), torch.tensor([-2.5, -1.5, -0.5], dtype=F64)
    batch = single.batched(3)
    for solver, estimator in (
        (bl.FISTA(tol=1e-9), bl.Implicit()),
        (bl.ProximalGradient(steps=12), bl.TruncatedUnroll(4)),
    ):
        together = bl.hypergradient(batch, solver, estimator, u)
        for index in range(3):
            alone = bl.hypergradient(single, solver, estimator, u[index])
            torch.testing.assert_close(together[index].params, alone.params, rtol=0, atol=1e-11)
            torch.testing.assert_close(together[index].hypergradient, alone.hypergradient, rtol=1e-8, atol=1e-9)


def test_the_residual_is_that_of_the_fixed_point() -> None:
    inner = problem_of("L1").bind(U)
    w = torch.randn(FEATURES, dtype=F64, generator=torch.Generator().manual_seed(3))
    step = 1.0 / float(torch.linalg.eigvalsh(X.T @ X / ROWS)[-1])
    gradient = X.T @ (X @ w - Y) / ROWS
    moved = w - step * gradient
    expected = (w - moved.sign() * (moved.abs() - step * U.exp()).clamp_min(0)) / step
    # The step of the residual is that of the measured curvature, with its margin.
    torch.testing.assert_close(inner.grad(w), expected, rtol=0.05, atol=0.05)
    assert float(inner.grad(solved("L1").params).norm()) <= 1e-13


def test_logistic_regression_with_l1_by_every_solver() -> None:
    labels = (Y > 0).to(F64)

    def loss(w: Tensor, u: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(X @ w, labels)

    term = bl.L1(lambda u: u.exp())
    problem = bl.BilevelProblem(loss, held_out, torch.zeros(FEATURES, dtype=F64), nonsmooth=term)
    u = torch.tensor(-3.0, dtype=F64)
    first, second = (
        bl.hypergradient(problem, solver, bl.Implicit(), u)
        for solver in (bl.FISTA(tol=1e-11), bl.CoordinateDescent(tol=1e-11))
    )
    assert first.status.ok
    assert second.status.ok
    assert second.certificate.inner_steps < 12
    torch.testing.assert_close(first.params, second.params, rtol=0, atol=1e-8)
    torch.testing.assert_close(first.hypergradient, second.hypergradient, rtol=1e-6, atol=1e-9)


def test_what_needs_a_smooth_loss_is_refused_in_one_sentence() -> None:
    problem = problem_of("GroupLasso")
    cases: list[tuple[bl.InnerSolver, bl.HypergradEstimator, str]] = [
        (bl.QuasiNewton(), bl.Implicit(), "QuasiNewton needs a smooth inner loss, .* term GroupLasso"),
        (bl.FISTA(), bl.BalancedImplicit(), "BalancedImplicit needs a smooth inner loss"),
        (bl.FISTA(steps=9), bl.AdaptiveUnroll(), "AdaptiveUnroll needs a smooth inner loss"),
        (bl.CoordinateDescent(), bl.Implicit(), "this problem has GroupLasso: use ProximalGradient"),
        (bl.CoordinateDescent(), bl.FullUnroll(), "steps of CoordinateDescent are not differentiated"),
    ]
    for solver, estimator, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            bl.hypergradient(problem, solver, estimator, U)
    with pytest.raises(ValueError, match="must be a Nonsmooth, such as L1"):
        bl.BilevelProblem(squared, held_out, problem.params, nonsmooth=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="put the proximal step into the map"):
        bl.BilevelProblem(None, held_out, problem.params, optimality=lambda w, u: w, nonsmooth=bl.L1(1.0))
    with pytest.raises(ValueError, match="groups"):
        bl.GroupLasso(torch.tensor([0, 2]), 1.0)
    with pytest.raises(ValueError, match="not negative"):
        bl.L1(-1.0)


def test_the_check_of_a_problem_names_a_solution_near_a_kink() -> None:
    problem = problem_of("L1")
    report = bl.check_problem(problem, U, bl.FISTA(tol=1e-10))
    assert report.ok
    # There is a kink where the first variable enters: at the largest slope of zero weights.
    kink = float((X.T @ Y / ROWS).abs().max().log())
    near = bl.check_problem(problem, torch.tensor(kink - 1e-4, dtype=F64), bl.FISTA(tol=1e-10))
    (finding,) = [each for each in near.findings if each.check == "kinks"]
    assert finding.verdict == "note"
    assert "the solution stands at a kink of L1, or near one: 1 of 20 variables" in finding.sentence


WRONG: list[tuple[bl.Nonsmooth, str]] = [
    (bl.L1(torch.full((FEATURES,), -0.5, dtype=F64)), "`L1.weights` must not be negative, but the least is -0.5: "),
    (bl.L1(lambda u: u), "`L1.weights` must not be negative, but the least is -1.5: "),
    (bl.L1(lambda u: None), "`L1.weights` must be a number or a Tensor that broadcasts to (20,), or one for each leaf"),
    (bl.L1(torch.ones(FEATURES, 1, dtype=F64)), "leaf of params, got (20, 1)."),
    (bl.L1(lambda u: {}), "leaf of params, got none."),
    (bl.ElasticNet(lambda u: u.exp(), lambda u: u), "`ElasticNet.l2` must not be negative, but the least is -1.5: "),
    (bl.GroupLasso(GROUPS, torch.ones(FEATURES, dtype=F64)), "`GroupLasso.weights` must be a number or a Tensor that"),
]


@pytest.mark.parametrize(("term", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_weights_of_a_term_that_do_not_fit_are_refused(term: bl.Nonsmooth, sentence: str) -> None:
    problem = bl.BilevelProblem(ridge, held_out, torch.zeros(FEATURES, dtype=F64), nonsmooth=term)
    solver: bl.InnerSolver
    for solver in (bl.FISTA(steps=5), bl.ProximalGradient(0.01, steps=5), bl.CoordinateDescent()):
        # Later steps of an outer loop look at the losses no more, and see the sign of weights nevertheless.
        for check in (True, False) if "negative" in sentence else (True,):
            with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
                bl.hypergradient(problem, solver, bl.Implicit(), U, check=check)
            assert "\n" not in str(caught.value)


class TooStrong(bl.L1):
    def prox(self, v: Any, step: Tensor, hparams: Any) -> Any:
        return super().prox(v, 2.0 * step, hparams)


def test_the_check_of_a_problem_names_a_proximal_map_of_another_term() -> None:
    def found(term: bl.Nonsmooth, loss: Any = squared) -> Finding:
        problem = bl.BilevelProblem(loss, held_out, torch.zeros(FEATURES, dtype=F64), nonsmooth=term)
        solver = bl.FISTA(steps=200)
        params = bl.hypergradient(problem, solver, bl.Implicit(), U, on_failure="return").params
        return proximal_map(Subject(problem, solver, U, problem.start(), 0), params)

    wrong = found(TooStrong(lambda u: u.exp()))
    assert wrong.verdict == "fault"
    assert "`TooStrong.prox` is not the proximal map of `TooStrong.value`" in wrong.sentence
    for loss, term in TERMS.values():
        assert found(term, loss).verdict == "ok"
