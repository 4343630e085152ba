"""Proved error bounds against extended precision, brute force, and the theorem's parts written out in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import F64, flat, logistic_case, normal, quadratic_case, ridge_case, softmax_case, spd, tree_case
from paths import study

import bilevel as bl
from bilevel.certify import ErrorEstimate, bound_error, bounds, certify_error
from bilevel.certify.bounds import bound_pair
from bilevel.certify.certificate import Metrics
from bilevel.certify.evaluation import evaluate
from bilevel.certify.instance import Instance
from bilevel.certify.metrics import Cholesky, Diagonal, transport
from bilevel.certify.nystrom import Nystrom, sketch
from bilevel.oracles.error_model import Rows, blocked_product, gamma, roundings, top_eigenvalue

longdouble = study("longdouble")
LONG = np.longdouble
METRICS = ("diagonal", "nystrom", "cholesky")
FAMILIES = ("ridge", "logistic", "softmax", "weights")


def random_problem(family: str, rng: np.random.Generator) -> tuple[Any, torch.Tensor, Any]:
    """A random problem with random options, hyperparameters for it, and its model in extended precision."""
    d, n, m, C = (int(rng.integers(low, high)) for low, high in ((1, 7), (6, 40), (2, 25), (2, 5)))
    scales = 10 ** rng.uniform(-1, 1, d) if rng.random() < 0.3 else np.ones(d)
    X, V = rng.standard_normal((n, d)) * scales, rng.standard_normal((m, d)) * scales
    loss, kind = ("mean", "sum")[rng.integers(2)], ("log", "direct")[rng.integers(2)]
    if family == "weights":
        kind = ("sigmoid", "direct")[rng.integers(2)]
        penalty = 10 ** rng.uniform(-4, 1)
        y, t = np.arange(n) % C, rng.integers(0, C, m)
        problem = bl.problems.SampleWeightProblem(X, y, V, t, penalty=penalty, parametrization=kind, loss=loss)
        u = 2 * rng.standard_normal(n) if kind == "sigmoid" else rng.uniform(0, 1, n) * (rng.random(n) < 0.8)
        long = u.astype(LONG)
        weights = 1 / (1 + np.exp(-long)) if kind == "sigmoid" else long
        slopes = weights * (1 - weights) if kind == "sigmoid" else np.ones_like(weights)
        zero = np.zeros((C, d), LONG)
        c, pen = LONG(problem.scale), zero + LONG(penalty)
        A, B = X.astype(LONG), V.astype(LONG)
        rows = np.arange(n)
        model = longdouble.Model("softmax", A, y, B, t, pen, zero, zero.astype(int), c * weights, c * slopes, rows)
        return problem, torch.tensor(u), model
    names = ["scalar", "per_feature", "per_class", "per_weight"][: 4 if family == "softmax" else 2]
    options = {"penalty": names[rng.integers(len(names))], "loss": loss, "parametrization": kind}
    if family == "ridge":
        problem = bl.problems.RidgeProblem(X, 3 * rng.standard_normal(n), V, rng.standard_normal(m), **options)
    elif family == "logistic":
        problem = bl.problems.LogisticProblem(X, np.arange(n) % 2, V, rng.integers(0, 2, m), **options)
    else:
        problem = bl.problems.SoftmaxProblem(X, np.arange(n) % C, V, rng.integers(0, C, m), **options)
    spread = rng.uniform(-1, 1, problem.hparams_shape()) * rng.choice([0, 1, 3])
    pen = 10 ** rng.uniform(-5, 2.5) * np.exp(spread)
    u = torch.tensor(np.log(pen) if kind == "log" else pen)
    return problem, u, longdouble.model_of(problem, u)


def random_pair(truth: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A pair (x, w) at any distance from the exact one: from 1e-12 to 30 times its size."""
    x, w = truth.x.astype(float), truth.w.astype(float)
    for_x, for_w = 10 ** rng.uniform(-12, 1.5, 2) * (rng.random(2) < 0.85)
    return (
        x + for_x * max(np.linalg.norm(x), 1e-3) * rng.standard_normal(x.shape) / math.sqrt(x.size),
        w + for_w * max(np.linalg.norm(w), 1e-6) * rng.standard_normal(x.shape) / math.sqrt(x.size),
    )


@pytest.mark.crossed
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_proved_holds_for_random_problems_and_pairs(family: str, seed: int) -> None:
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    problem, u, model = random_problem(family, rng)
    truth = model.solve()
    for _ in range(3):
        x, w = random_pair(truth, rng)
        p = model.hypergradient(x.astype(LONG), w.astype(LONG)).astype(float)
        if rng.random() < 0.3:
            p = p * (1 + 1e-3 * rng.standard_normal(p.shape))
        errors = np.abs(p - truth.hypergradient)
        true = np.sqrt((errors**2).sum())
        shape = problem.params_shape()
        params, adjoint = torch.tensor(x.reshape(shape)), torch.tensor(w.reshape(shape))
        for metric in METRICS:
            for found in (
                bound_error(problem, u, params, torch.tensor(p).reshape(u.shape), adjoint, metric),
                certify_error(problem, u, params, torch.tensor(p).reshape(u.shape), adjoint, metric=metric),
            ):
                assert found.kind == "bound"
                assert found.lower * (1 - 1e-12) <= true <= found.value
                assert (errors <= found.components.numpy().ravel()).all()
                corrected = found.corrected.numpy().ravel() - truth.hypergradient
                assert np.sqrt((corrected**2).sum()) <= found.corrected_error
                signs = found.signs.numpy().ravel()
                assert ((signs == 0) | (signs == np.sign(truth.hypergradient.astype(float)))).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_bound_the_errors_of_solution_and_adjoint(family: str, metric: str) -> None:
    for seed in range(6):
        rng = np.random.default_rng([100 + seed, FAMILIES.index(family)])
        problem, u, model = random_problem(family, rng)
        truth = model.solve()
        x, w = random_pair(truth, rng)
        instance = Instance(problem.certifiable(), u)
        at = evaluate(instance, torch.tensor(x.reshape(instance.shape)), torch.tensor(w.reshape(instance.shape)))
        found = bound_pair(at, Metrics(instance, metric).at(at.z))
        e, dw = (x - truth.x).astype(float).ravel(), (w - truth.w).astype(float).ravel()
        hessian = model.hessian(x) if found.theorem == "local" else np.diag(model.pen.astype(float).ravel())
        assert math.sqrt(e @ hessian @ e) <= found.solution * (1 + 1e-9)
        assert math.sqrt(dw @ hessian @ dw) <= found.adjoint * (1 + 1e-9)


@pytest.mark.parametrize("distance", [1e-3, 0.1, 3.0])
def test_both_theorems_are_their_formulas(distance: float) -> None:
    """Logistic regression, one penalty for each feature, the metric of the penalties; all in numpy."""
    case = logistic_case()
    problem: Any = case.problem
    A, B = problem.train.X.t().numpy(), problem.val.X.t().numpy()
    n, pen, y = len(A), case.hparams.exp().numpy(), problem.train.y.numpy()
    x, w = (case.solution() + distance * normal(71, 5)).numpy(), normal(72, 5).numpy()
    sigma = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    K = sigma(A @ x) * sigma(-A @ x)
    s = A.T @ (-y * sigma(-y * (A @ x))) / n + pen * x
    outer = B.T @ (-problem.val.y.numpy() * sigma(-problem.val.y.numpy() * (B @ x))) / len(B)
    r = A.T @ (K * (A @ w)) / n + pen * w - outer
    N, residual = np.sqrt((s**2 / pen).sum()), np.sqrt((r**2 / pen).sum())
    rho = np.sqrt((A**2 / pen).sum(1))
    t = rho.max() * N
    t = min(t, -math.log1p(-t)) if t < 1 else t
    E = N * t / (1 - math.exp(-t))
    moves = np.minimum(rho * E, rho * N)
    change = min(
        math.sqrt((np.expm1(np.minimum(moves, t)) ** 2 * K * (A @ w) ** 2).sum() / n),
        math.expm1(t) / t * np.abs(A @ w).max() * E,
    )
    instance = Instance(problem.certifiable(), case.hparams)
    metric = Diagonal(instance)
    # The largest eigenvalue is taken from above, by at most 5 %; with the same figure all else agrees to rounding.
    exact = 0.25 * np.linalg.eigvalsh(B.T @ B / len(B) / np.sqrt(np.outer(pen, pen)))[-1]
    top = metric.outer_curvature
    assert exact <= top <= 1.05 * exact
    assert instance.outer_curvature == pytest.approx(top, rel=1e-12)
    W = math.exp(t) * (residual + top * E + change)
    third = np.minimum(0.25 * np.abs(A @ w), np.abs(A @ w) * rho * N / (6 * math.sqrt(3)))
    far = math.sqrt((pen * w**2).sum()) + math.sqrt((outer**2 / pen).sum())
    W_far = top * N + min(residual + (rho * third).sum() / n, far)

    chi = lambda v: np.sqrt(pen) * np.abs(v)  # noqa: E731
    errors = {"local": (min(E, N), W), "global": (N, W_far)}
    values = {name: chi(w).max() * e + chi(x).max() * dw + e * dw for name, (e, dw) in errors.items()}
    components = np.minimum(*[chi(w) * e + chi(x) * dw + e * dw for e, dw in errors.values()])
    at = evaluate(instance, torch.tensor(x), torch.tensor(w))
    found = bound_pair(at, metric)
    assert found.value == pytest.approx(min(*values.values(), np.linalg.norm(components)), rel=1e-8)
    np.testing.assert_allclose(found.components.numpy(), components, rtol=1e-8)
    # The smaller of the two hides the larger: look at each with the other switched off.
    for theorem, other, solution in (("local", "_global", E), ("global", "_local", N)):
        with pytest.MonkeyPatch.context() as without:
            without.setattr(bounds, other, lambda at, *rest: bounds._none(at))
            alone = bound_pair(at, metric)
        assert alone.theorem == theorem
        assert alone.solution == pytest.approx(solution, rel=1e-8)
        assert alone.adjoint == pytest.approx(errors[theorem][1], rel=1e-8)


def test_the_ridge_bound_is_its_formula() -> None:
    case = ridge_case("scalar")
    problem: Any = case.problem
    X, y, t, pen = problem.train.X, problem.train.y, problem.val.y, float(case.hparams.exp())
    hessian = X @ X.t() / X.shape[1] + pen * torch.eye(5, dtype=F64)
    x, w = normal(73, 5), normal(74, 5)
    s = hessian @ x - X @ y / X.shape[1]
    outer = problem.val.X @ (problem.val.X.t() @ x - t) / len(t)
    r = hessian @ w - outer
    inverse = torch.linalg.inv(hessian)
    norm = lambda v: float((v @ inverse @ v).sqrt())  # noqa: E731
    V = problem.val.X
    root = torch.linalg.cholesky(inverse)
    top = float(torch.linalg.eigvalsh(root.t() @ (V @ V.t() / V.shape[1]) @ root)[-1])
    E = norm(s)
    W = norm(r) + top * E
    expected = pen * (norm(w) * E + norm(x) * W) + min(1.0, pen * float(torch.linalg.eigvalsh(inverse)[-1])) * E * W
    instance = Instance(problem.certifiable(), case.hparams)
    at = evaluate(instance, x, w)
    found = bound_pair(at, Cholesky(instance, at.z))
    assert found.solution == pytest.approx(E, rel=1e-8)
    assert W * (1 - 1e-8) <= found.adjoint <= 1.06 * W
    assert expected * 0.9 <= found.value <= 1.3 * expected


# The parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 33, 257, 1000])
def test_blocked_products_round_less_than_proved(length: int) -> None:
    A, B = normal(1, 3, length), normal(2, length, 4)
    exact = A.numpy().astype(LONG) @ B.numpy().astype(LONG)
    size = np.abs(A.numpy()) @ np.abs(B.numpy())
    assert (np.abs(blocked_product(A, B).numpy() - exact) <= gamma(roundings(length)) * size).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rounding_of_residuals_is_below_its_bound(family: str) -> None:
    for seed in range(8):
        rng = np.random.default_rng([200 + seed, FAMILIES.index(family)])
        problem, u, model = random_problem(family, rng)
        x, w = (10 ** rng.uniform(-2, 2) * rng.standard_normal(model.pen.shape) for _ in range(2))
        instance = Instance(problem.certifiable(), u)
        at = evaluate(instance, torch.tensor(x.reshape(instance.shape)), torch.tensor(w.reshape(instance.shape)))
        long = x.astype(LONG), w.astype(LONG)
        for computed, bound, exact in (
            (at.s, at.s_rounding, model.gradient(long[0])),
            (at.r, at.r_rounding, model.product(*long) - model.outer_gradient(long[0])),
            (at.p, at.p_rounding, model.hypergradient(*long)),
        ):
            error = np.abs(computed.numpy().reshape(exact.shape) - exact)
            assert (error <= bound.numpy().reshape(exact.shape)).all()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e12])
def test_the_top_eigenvalue_is_bounded_from_above_and_closely(condition: float) -> None:
    for seed in range(5):
        matrix = spd(seed, 12, condition)
        top = float(torch.linalg.eigvalsh(matrix)[-1])
        assert top <= top_eigenvalue(matrix) <= 1.31 * top
    assert top_eigenvalue(torch.zeros(3, 3, dtype=F64)) == 0.0


@pytest.mark.parametrize("features", [300, 301])
@pytest.mark.parametrize("spread", [1.5, 50.0, 1e4])
def test_the_scaled_gram_matrix_is_bounded_from_above_and_as_closely_as_stated(features: int, spread: float) -> None:
    rows = Rows(normal(77, features, 400), normal(78, 400))
    half = torch.logspace(0, 0.5 * math.log10(spread), features, dtype=F64)
    top = float(torch.linalg.eigvalsh(half[:, None] * rows.gram * half)[-1])
    bound = rows.scaled_gram_top(half)
    assert top <= bound <= 1.31 * top * (spread if spread < (2 if features == 300 else 100) else 1.0)


@pytest.mark.parametrize("length", [1, 127, 128, 300, 500])
def test_products_on_the_gram_matrix_round_less_than_proved(length: int) -> None:
    rows, W = Rows(normal(1, length, 90), normal(2, 90)), normal(3, 2, length)
    X = rows.X.numpy().astype(LONG)
    product, rounding = rows.on_gram(W)
    exact = W.numpy().astype(LONG) @ (X @ X.T) / 90
    assert (np.abs(product.numpy() - exact) <= rounding.numpy()).all()


@pytest.mark.parametrize("make", [ridge_case, logistic_case, softmax_case])
def test_metrics_are_below_the_hessian_where_they_are_made_and_where_they_are_moved_to(make: Any) -> None:
    case = make()
    instance = Instance(case.problem.certifiable(), case.hparams)
    x0 = case.solution().reshape(instance.shape)
    z0 = instance.predict(instance.model.train, x0)
    low_rank = sketch(instance, z0, 2)
    for distance in (0.0, 0.1, 1.0):
        x = x0 + distance * normal(75, *instance.shape)
        z = instance.predict(instance.model.train, x)
        inverse = torch.linalg.inv(case.hessian(x.reshape(-1), flat(case.hparams)))
        for metric in (Diagonal(instance), Nystrom(instance, low_rank, z), Cholesky(instance, z0).at(z)):
            for seed in range(5):
                v = normal(80 + seed, *instance.shape)
                true = float((v.reshape(-1) @ inverse @ v.reshape(-1)).sqrt())
                assert true <= metric.norm(v) * (1 + 1e-12)
        if distance == 0:
            assert Cholesky(instance, z0).norm(v) == pytest.approx(true, rel=1e-6)
            assert Nystrom(instance, low_rank, z0).norm(v) <= Diagonal(instance).norm(v)
    assert transport(instance, z0, z0) == 0.0


def test_a_sketch_serves_other_penalties() -> None:
    case = logistic_case()
    instance = Instance(case.problem.certifiable(), case.hparams)
    low_rank = sketch(instance, instance.predict(instance.model.train, case.solution()), 3)
    products = instance.products
    other = Instance(case.problem.certifiable(), case.hparams + 2.0)
    metric = Nystrom(other, low_rank, low_rank.z)
    inverse = torch.linalg.inv(case.hessian(case.solution(), case.hparams + 2.0))
    v = normal(76, 5)
    assert float((v @ inverse @ v).sqrt()) <= metric.norm(v) * (1 + 1e-12)
    assert (products, other.products) == (3, 0)


# Through the front door ----------------------------------------------------------------------------------------------

SETTINGS = {
    "implicit": (bl.GradientDescent(tol=1e-4), bl.Implicit(bl.CG(tol=1e-3))),
    "unrolled": (bl.GradientDescent(steps=30), bl.FullUnroll()),
    "truncated": (bl.Nesterov(steps=60), bl.TruncatedUnroll(tail=10)),
    "damped": (bl.Newton(tol=1e-11), bl.Implicit(bl.Direct(), damping=0.01)),
    "one step": (bl.GradientDescent(steps=1), bl.FullUnroll()),
    "differences": (bl.Newton(tol=1e-11), bl.FiniteDifference()),
}


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["ridge", "logistic", "softmax"])
def test_a_certificate_is_sharp_for_every_estimator_in_both_precisions(
    family: str, setting: str, dtype: torch.dtype
) -> None:
    case = {"ridge": ridge_case, "logistic": logistic_case, "softmax": softmax_case}[family]()
    parts = {}
    for name, split in case.problem.splits.items():
        y = split.y.to(dtype) if split.y.is_floating_point() else split.y
        parts |= {f"X_{name}": split.X.t().to(dtype), f"y_{name}": y}
    problem = type(case.problem)(**parts, penalty=case.problem.penalty)
    u = case.hparams.to(dtype)
    solver, estimator = SETTINGS[setting]
    if dtype == torch.float32:
        solver = type(solver)(steps=solver.steps or 40)
    estimate = bl.hypergradient(problem, solver, estimator, u, certify=True, on_failure="return")
    exact = longdouble.model_of(problem, u).solve().hypergradient
    errors = np.abs(estimate.hypergradient.double().numpy().ravel() - exact)
    true, c = float(np.sqrt((errors**2).sum())), estimate.certificate
    assert c.error_kind == "bound"
    assert c.error_lower <= true <= c.error
    assert (errors <= c.components.numpy().ravel()).all()
    assert "proved" in c.error_note
    assert c.corrected.dtype == c.signs.dtype == dtype
    if true > 1e-9 * np.linalg.norm(exact.astype(float)):
        assert c.error <= 3 * true
        assert np.abs(c.corrected.double().numpy().ravel() - exact).max() <= 3e-6 + 0.5 * true


def test_tuned_weights_of_training_rows_get_a_sharp_bound_from_the_front_door() -> None:
    problem, u, model = random_problem("weights", np.random.default_rng(7))
    estimate = bl.hypergradient(problem, bl.GradientDescent(steps=50), bl.FullUnroll(), u, certify=True)
    true = float(np.sqrt(((estimate.hypergradient.numpy() - model.solve().hypergradient) ** 2).sum()))
    c = estimate.certificate
    assert c.error_lower <= true <= c.error <= 3 * true


def test_a_converged_hypergradient_stops_at_the_rounding_floor_and_says_so() -> None:
    case = ridge_case()
    estimate = bl.hypergradient(case.problem, bl.Newton(), bl.Implicit(bl.Direct()), case.hparams, certify=True)
    c = estimate.certificate
    assert c.error < 1e-11 * float(case.hypergradient().norm())
    assert c.error_lower == 0.0
    assert "1 correction," in c.error_note
    assert "at the rounding floor of float64 for these penalties" in c.error_note


def test_an_iterate_far_away_gets_a_sharp_bound_too() -> None:
    case = logistic_case()
    for seed in range(4):
        x = 100.0 * normal(90 + seed, 5)
        found = certify_error(case.problem, case.hparams, x, torch.ones(5, dtype=F64))
        true = float((torch.ones(5, dtype=F64) - case.hypergradient()).norm())
        assert found.lower <= true <= found.value <= 3 * true


def test_unpenalised_weights_need_the_whole_hessian() -> None:
    case = ridge_case()
    problem: Any = case.problem
    parts = problem.train.X.t(), problem.train.y, problem.val.X.t(), problem.val.y
    problem = bl.problems.RidgeProblem(*parts, penalty="per_feature", parametrization="direct")
    u = torch.tensor([0.0, 0.3, 0.0, 1.0, 0.1], dtype=F64)
    exact = longdouble.model_of(problem, u).solve().hypergradient
    x, w = normal(91, 5), normal(92, 5)
    p = torch.zeros(5, dtype=F64)
    found = certify_error(problem, u, x, p, w)
    true = float(np.sqrt((exact**2).sum()))
    assert found.lower <= true <= found.value <= 3 * true
    assert (np.abs(exact) <= found.components.numpy()).all()
    cheap = bound_error(problem, u, x, p, w)
    assert (cheap.kind, cheap.value) == ("none", None)
    assert cheap.note == "an unpenalised weight or a singular Hessian leaves nothing to bound the error with"
    assert bound_error(problem, u, x, p, w, "cholesky").kind == "bound"
    with pytest.raises(ValueError, match="the metric 'nystrom' needs penalties above zero: use 'cholesky' for unpen"):
        certify_error(problem, u, x, p, w, metric="nystrom")


def test_a_singular_problem_gets_no_bound() -> None:
    X, y = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    problem = bl.problems.RidgeProblem(X, y, X, y, parametrization="direct")
    u, x = torch.zeros((), dtype=F64), torch.zeros(2, dtype=F64)
    found = certify_error(problem, u, x, torch.zeros((), dtype=F64))
    assert found.kind != "bound"
    assert found.note.startswith("an unpenalised weight or a singular Hessian leaves nothing to bound the error with; ")


def test_the_proved_effectivity_is_the_one_asked_for() -> None:
    case = softmax_case()
    x = case.start
    p = case.hypergradient() + 1e-3
    for asked in (1.1, 3.0, 20.0):
        found = certify_error(case.problem, case.hparams, x, p, effectivity=asked)
        assert found.value / found.lower <= asked * (1 + 1e-6)
    with pytest.raises(ValueError, match=r"`effectivity` must be above 1, got 1\."):
        certify_error(case.problem, case.hparams, x, p, effectivity=1.0)
    with pytest.raises(
        ValueError, match="`metric` must be one of 'auto', 'cheap', 'diagonal', 'nystrom', 'cholesky', got 'no'"
    ):
        certify_error(case.problem, case.hparams, x, p, metric="no")


@pytest.mark.parametrize("make", [quadratic_case, tree_case])
def test_other_problems_get_the_estimate(make: Any) -> None:
    case = make()
    assert case.problem.certifiable() is None
    estimate = bl.hypergradient(case.problem, bl.GradientDescent(tol=1e-6), bl.Implicit(), case.hparams, certify=True)
    c = estimate.certificate
    assert (c.error_kind, c.error_lower, c.components, c.corrected, c.signs) == ("estimate", None, None, None, None)
    found = bound_error(case.problem, case.hparams, case.start, case.hparams, case.start)
    assert found.note == "no bound is known for this problem: use certify=True for an estimate"


def test_certain_signs_are_those_of_the_exact_hypergradient_and_the_others_zero() -> None:
    case = logistic_case()
    exact = case.hypergradient()
    rough = bound_error(case.problem, case.hparams, case.start, exact, torch.zeros(5, dtype=F64))
    fine = certify_error(case.problem, case.hparams, case.solution(), exact)
    assert torch.equal(fine.signs, exact.sign())
    assert torch.equal(rough.signs, torch.zeros(5, dtype=F64))


def test_a_part_of_the_effectivity_study_meets_its_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    effectivity = study("effectivity")
    monkeypatch.setattr(effectivity, "problems", lambda quick, every=effectivity.problems: list(every(quick))[2:3])
    cases = effectivity.run(quick=True)
    assert len(cases) > 20
    assert not any(case.violated for case in cases)
    assert all(effectivity.bars(cases).values())
    assert effectivity.table(cases).count("\n") == 22


def test_the_effectivity_study_sees_a_wrong_component_and_a_wrong_sign() -> None:
    holds, exact = study("effectivity").holds, np.array([1.0, -2.0])

    def found(components: list[float], signs: list[float]) -> Any:
        tensors = {"components": torch.tensor(components), "signs": torch.tensor(signs)}
        return ErrorEstimate(1.0, "bound", "", **tensors)

    errors = np.array([0.1, -0.2])
    assert holds(found([0.11, 0.21], [0.0, -1.0]), errors, exact)
    assert not holds(found([0.11, 0.19], [0.0, -1.0]), errors, exact)
    assert not holds(found([0.11, 0.21], [0.0, 1.0]), errors, exact)
    assert holds(ErrorEstimate(1.0, "estimate", ""), errors, exact)
