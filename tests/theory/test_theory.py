"""The theory: bounds hold and are attained where they should be, and the published numbers come out."""

# ruff: noqa: E741

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel import theory
from bilevel.numerics.polynomials import asymptotic_coefficients
from bilevel.oracles.differentiable import DifferentiableInner
from bilevel.problems import LogisticProblem, RidgeProblem

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ridge(seed: int, features: int = 8, rows: int = 20) -> tuple[RidgeProblem, Tensor, Tensor]:
    """The experiment of Mehmood et al.: (problem, u = 1, x_0), everything standard normal, sum of squares."""
    X, y = normal(seed, rows, features), normal(seed + 1, rows)
    problem = RidgeProblem(X, y, X, y, loss="sum", parametrization="direct")
    return problem, torch.ones((), dtype=F64), normal(seed + 2, features)


def run(
    problem: Any, solver: Any, u: Tensor, start: Tensor, steps: int, late: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Iterates, and derivatives from the step `late` on, by the plain recursion (9) in forward mode."""
    inner = problem.bind(u)
    state = solver.init(inner, start)
    tangent: Any = (torch.zeros_like(start), tuple(torch.zeros_like(start) for _ in state.memory))
    iterates, derivatives = [state.params], [tangent[0]]
    for k in range(steps):
        if k >= late:
            (tangent,) = solver.step_jvp(inner, state, [tangent], [torch.ones_like(u)])
        state = solver.step(inner, state)
        iterates.append(state.params)
        derivatives.append(tangent[0])
    return iterates, derivatives


def exact(problem: RidgeProblem, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x*, dx*/du, eigenvalues of H, by dense algebra."""
    X, y = problem.train.X.t(), problem.train.y
    H = X.t() @ X + u * torch.eye(X.shape[1], dtype=F64)
    x = torch.linalg.solve(H, X.t() @ y)
    return x, -torch.linalg.solve(H, x), torch.linalg.eigvalsh(H)


# Mehmood et al.: bounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 10, 20, 30])
@pytest.mark.parametrize("step", ["optimal", "short"])
@pytest.mark.parametrize("late", [0, 7, 30])
def test_the_bounds_hold_on_random_ridge_problems(seed: int, step: str, late: int) -> None:
    problem, u, start = ridge(seed)
    x, dx, values = exact(problem, u)
    h = float(2 / (values[0] + values[-1])) if step == "optimal" else float(1 / values[-1])
    constants = theory.contraction_constants(problem, u, h, start)
    assert constants.rho == pytest.approx(float((1 - h * values).abs().max()), rel=1e-12)
    assert pytest.approx(h, rel=1e-12) == constants.C == constants.L_u
    assert constants.L_x == 0
    assert constants.d0 == pytest.approx(float(dx.norm()), rel=1e-10)
    assert constants.e0 == pytest.approx(float((start - x).norm()), rel=1e-12)
    steps = 60
    iterates, derivatives = run(problem, bl.GradientDescent(h), u, start, steps, late)
    e = np.array([float((each - x).norm()) for each in iterates])
    k = np.arange(steps + 1)
    assert (e <= theory.iterate_bound(k, constants.rho, constants.e0) * (1 + 1e-12) + 1e-13).all()
    assert all(h * float(each.norm()) <= constants.M_u * (1 + 1e-12) for each in iterates)
    d = np.array([float((each - dx).norm()) for each in derivatives])[late + 1 :]
    K = k[late + 1 :]
    arguments = (constants.rho, constants.d0, constants.e0, constants.C)
    loose = theory.late_start_bound(K, K - late, *arguments)
    sharp = theory.late_start_bound(K, K - late, *arguments, error_at_start=e[late])
    assert (d <= sharp * (1 + 1e-12) + 1e-13).all()
    assert (sharp <= loose * (1 + 1e-12)).all()
    # With the measured errors of all iterates in place of their bounds it is sharper still.
    fed = theory.accumulated_bound(K - late, constants.rho, constants.d0, constants.C * e[late:])
    assert (d <= fed * (1 + 1e-12) + 1e-13).all()
    assert (fed <= sharp * (1 + 1e-12)).all()
    if late == 0:
        np.testing.assert_allclose(loose, theory.unroll_bound(K, *arguments), rtol=1e-13)
        again = theory.accumulated_bound(K, constants.rho, constants.d0, c=constants.C * constants.e0)
        np.testing.assert_allclose(loose, again, rtol=1e-13)


def test_the_bound_is_attained_by_one_mode_and_its_curse_peaks_at_its_place() -> None:
    # H = 1, dH = 1, x* = dx* = 0: X_k = -k h (1-h)^(k-1) x_0, with the constants rho = 1 - h, C = h, d_0 = 0.
    one = torch.ones(1, dtype=F64)
    problem = bl.QuadraticProblem(one[None], 0 * one, one[None, None])
    h = 0.05
    _, derivatives = run(problem, bl.GradientDescent(h), 0 * one, 3 * one, 80)
    bounds = theory.unroll_bound(np.arange(81), 1 - h, 0.0, 3.0, h)
    np.testing.assert_allclose([abs(float(each[0])) for each in derivatives], bounds, rtol=1e-12)
    assert abs(theory.curse_peak(bounds).index + 1 / math.log(1 - h)) <= 1


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.99])
def test_an_accumulated_bound_is_the_sum_of_what_was_fed_in(rho: float) -> None:
    fed = np.random.default_rng(0).random(12)
    sums = [rho**K * 2.0 + math.fsum(rho ** (K - 1 - i) * float(b) for i, b in enumerate(fed[:K])) for K in range(13)]
    K = np.arange(13)
    np.testing.assert_allclose(theory.accumulated_bound(K, rho, 2.0, fed), sums, rtol=1e-14)
    assert [theory.accumulated_bound(k, rho, 2.0, fed.tolist()) for k in range(13)] == pytest.approx(sums, rel=1e-14)
    tensors = torch.arange(13), torch.tensor([rho, 0.5], dtype=F64)[:, None], 2.0, torch.as_tensor(fed)
    np.testing.assert_allclose(theory.accumulated_bound(*tensors)[0], sums, rtol=1e-14)
    mixed = theory.accumulated_bound(K, rho, 2.0, torch.as_tensor(fed))
    np.testing.assert_allclose(mixed, sums, rtol=1e-14)
    # What is fed in by c rho^i gives the closed form.
    closed = theory.accumulated_bound(K, rho, 2.0, c=3.0)
    np.testing.assert_allclose(theory.accumulated_bound(K, rho, 2.0, 3.0 * rho ** np.arange(12.0)), closed, rtol=1e-13)
    # Rows of inputs are rows of bounds.
    rows = theory.accumulated_bound(12, rho, np.array([2.0, 0.0]), np.stack([fed, 0 * fed]))
    np.testing.assert_allclose(rows, [sums[-1], 0.0], rtol=1e-14)


@pytest.mark.parametrize("value", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("h", [0.05, 0.3])
def test_an_accumulated_bound_is_attained_where_errors_add_up(value: float, h: float) -> None:
    # f = (value + u) x^2 / 2 - value x at u = 0: x* = 1, X* = -1/value; from x_0 = -2 the errors -X* and -h e_k agree.
    one = torch.ones(1, dtype=F64)
    problem = bl.QuadraticProblem(value * one[None], -value * one, one[None, None])
    rho = 1 - h * value
    iterates, derivatives = run(problem, bl.GradientDescent(h), 0 * one, -2 * one, 40)
    d = [abs(float(each[0]) + 1 / value) for each in derivatives]
    e = np.array([abs(float(each[0]) - 1) for each in iterates])
    K = np.arange(41)
    np.testing.assert_allclose(d, theory.accumulated_bound(K, rho, 1 / value, h * e), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(d, theory.accumulated_bound(K, rho, 1 / value, c=3 * h), rtol=1e-11, atol=1e-14)


def test_an_accumulated_bound_holds_where_the_hessian_turns() -> None:
    # Directions that do not commute with the Hessian, several hyperparameters: no mode by itself.
    problem = bl.QuadraticProblem.random(6, 3, condition=20.0, seed=2)
    u, start = 0.1 * normal(1, 3), 50 * normal(7, 6)
    constants = theory.contraction_constants(problem, u, start=start)
    exact_params, jacobian = problem.solve(u), problem.exact_jacobian(u)
    values = torch.linalg.eigvalsh(problem.bind(u).hessian)
    solver = bl.GradientDescent(float(2 / (values[0] + values[-1])))
    inner, tangents = problem.bind(u), [(torch.zeros_like(start), ())] * 3
    state, e, d = solver.init(inner, start), [], []
    for _ in range(120):
        e.append(float((state.params - exact_params).norm()))
        X = torch.stack([tangent[0] for tangent in tangents], dim=1)
        d.append(float(torch.linalg.matrix_norm(X - jacobian)))
        tangents = solver.step_jvp(inner, state, tangents, list(torch.eye(3, dtype=F64)))
        state = solver.step(inner, state)
    K = np.arange(120)
    fed = theory.accumulated_bound(K, constants.rho, d[0], constants.C * np.array(e))
    assert (d <= fed * (1 + 1e-9) + 1e-12).all()
    assert (fed <= theory.unroll_bound(K, constants.rho, d[0], e[0], constants.C) * (1 + 1e-12)).all()
    assert max(d) > 1.1 * d[0]


def test_late_start_forward_equals_truncated_reverse_and_the_bounds_take_tensors() -> None:
    problem, u, start = ridge(3)
    _, _, values = exact(problem, u)
    h = float(2 / (values[0] + values[-1]))
    _, derivatives = run(problem, bl.GradientDescent(h), u, start, 40, late=25)
    estimate = bl.hypergradient(problem, bl.GradientDescent(h, steps=40), bl.TruncatedUnroll(tail=15), u, params=start)
    _, by_params, _ = problem.outer_value_and_grads(estimate.params, u)
    assert float(estimate.hypergradient) == pytest.approx(float(by_params @ derivatives[-1]), rel=1e-11)
    k = torch.arange(5)
    got = theory.unroll_bound(k, torch.tensor(0.5, dtype=F64), 1.0, 2.0, 3.0)
    expected = [theory.unroll_bound(int(each), 0.5, 1.0, 2.0, 3.0) for each in k]
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    assert expected[0] == 1.0


def test_constants_of_a_quadratic_bound_its_cross_derivative() -> None:
    problem = bl.QuadraticProblem.random(6, 3, condition=20.0, seed=2)
    u = 0.1 * normal(1, 3)
    constants = theory.contraction_constants(problem, u)
    assert constants.rho == pytest.approx(19 / 21, rel=0.2)
    inner = problem.bind(u)
    values = torch.linalg.eigvalsh(inner.hessian)
    h = float(2 / (values[0] + values[-1]))
    for seed in range(5):
        a, b = normal(seed, 6), normal(seed + 50, 6)
        change = problem.hessian_directions @ (a - b)
        assert h * float(change.norm()) <= constants.L_u * float((a - b).norm())
    assert constants.d0 == pytest.approx(float(problem.exact_jacobian(u).norm()), rel=1e-10)


def test_estimated_constants_approach_the_exact_ones_from_below() -> None:
    problem, u, start = ridge(5)
    _, _, values = exact(problem, u)
    h = float(1 / values[-1])
    problem.params = start
    known = theory.contraction_constants(problem, u, h, start)
    measured = theory.estimate_constants(problem, bl.GradientDescent(h), u, 400)
    assert measured.rho == pytest.approx(known.rho, rel=1e-2)
    assert measured.rho <= known.rho * (1 + 1e-6)
    assert pytest.approx(h, rel=1e-6) == measured.C  # dH = I: attained in every direction
    assert measured.e0 == pytest.approx(known.e0, rel=1e-6)
    assert measured.d0 == pytest.approx(known.d0, rel=1e-4)
    logistic = LogisticProblem(problem.train.X.t(), problem.train.y.sign(), problem.train.X.t(), problem.train.y.sign())
    nonlinear = theory.estimate_constants(logistic, bl.GradientDescent(), torch.tensor(-1.0, dtype=F64), 200)
    assert 0 < nonlinear.rho < 1
    assert nonlinear.C > 0


# Mehmood et al.: budget and truncation -------------------------------------------------------------------------------


def test_example_10_and_the_joint_convention() -> None:
    assert theory.budget(100, 20, 3) == theory.Budget(160, 80, 80, 400.0)
    assert theory.budget(100, 20, 2) == theory.Budget(140, 80, 60, 300.0)
    assert theory.budget(100, 20, 3, joint=True) == theory.budget(100, 20, 2)
    assert theory.budget(100, 0, 2.5) == theory.Budget(100, 100, 0, 350.0)
    assert theory.budget(100, 99, 0.29 * 100 / 99).steps == 129  # 0.29 * 100 is below 29 in floating point


@pytest.mark.parametrize("omega", [0.3, 1.0, 2.5, 3.7])
def test_a_reallocated_budget_never_costs_more(omega: float) -> None:
    for dropped in range(50):
        spent = theory.budget(50, dropped, omega)
        assert spent.cost <= (1 + omega) * 50 + 1e-9
        assert spent.cost > (1 + omega) * 50 - 1
        assert spent.truncation_index == spent.steps - spent.tail == dropped + math.floor(omega * dropped + 1e-9)
        split = theory.split_budget((1 + omega) * 50, spent.tail, omega)
        assert split.cost <= (1 + omega) * 50 + 1e-9
        assert split.steps >= spent.steps


TRUNCATIONS = [
    (K, rho, d0, e0, C, omega)
    for K in (5, 100, 3000)
    for rho in (0.5, 0.93, 0.993)
    for d0, e0, C in ((1.0, 1.0, 1.0), (1.0, 1e4, 0.01), (50.0, 0.1, 0.2))
    for omega in (0.5, 3.0)
]


@pytest.mark.parametrize("arguments", TRUNCATIONS, ids=repr)
def test_the_three_ways_to_the_optimal_truncation_agree(arguments: tuple[Any, ...]) -> None:
    K, rho, d0, e0, C, omega = arguments

    def log_psi(N: Any) -> Any:
        return np.logaddexp(
            np.log(d0) + (K - N) * np.log(rho), np.log(C * e0 * (K - N)) + (K + omega * N - 1) * np.log(rho)
        )

    lambert = theory.optimal_truncation(*arguments, method="lambert")
    assert lambert == pytest.approx(theory.optimal_truncation(*arguments, method="fixed_point"), rel=1e-10, abs=1e-9)
    grid = np.linspace(0, K - 1, 20001)
    assert log_psi(lambert) <= log_psi(grid).min() + 1e-10
    best = theory.optimal_truncation(*arguments)
    assert isinstance(best, int)
    assert 0 <= best <= K - 1

    def log_floored(N: int) -> float:
        spent = theory.budget(K, N, omega)
        return float(
            np.logaddexp(
                np.log(d0) + spent.tail * np.log(rho), np.log(C * e0 * spent.tail) + (spent.steps - 1) * np.log(rho)
            )
        )

    assert log_floored(best) <= min(log_floored(N) for N in range(min(K, 400))) + 1e-9
    # Rounding K(N) down moves the minimiser by little.
    assert abs(best - lambert) <= 1 + 1 / omega


def test_optimal_truncation_at_its_ends() -> None:
    assert theory.optimal_truncation(100, 0.9, d0=1.0, e0=0.0, C=1.0, omega=3.0) == 0
    assert theory.optimal_truncation(100, 0.9, d0=0.0, e0=1.0, C=1.0, omega=3.0) == 99
    assert theory.optimal_truncation(100, 0.0, d0=1.0, e0=1.0, C=1.0, omega=3.0) == 0
    # A long slow run: the argument of Lambert's W would overflow.
    big = (100_000, 0.5, 1.0, 1e6, 1.0, 3.0)
    assert theory.optimal_truncation(*big, method="lambert") == pytest.approx(theory.optimal_truncation(*big), abs=2)


# Scieur et al.: rates ------------------------------------------------------------------------------------------------

ENDS = [(1e-3, 1.0), (0.05, 2.0), (0.5, 10.0)]
STEPS: list[tuple[str, Callable[[float, float], float]]] = [
    ("short", lambda l, L: 1 / L),
    ("sqrt 2", lambda l, L: 2**0.5 / L),
    ("long", lambda l, L: 2 / (L + l)),
]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("name", "rule"), STEPS)
@pytest.mark.parametrize("G", [0.0, 0.7])
def test_theorem_2_is_the_largest_error_over_the_spectrum(
    ends: tuple[float, float], name: str, rule: Any, G: float
) -> None:
    l, L = ends
    h = rule(l, L)
    curve = theory.worst_case_curve(bl.GradientDescent(h), l, L, 60, d0=2.0, G=G)
    np.testing.assert_allclose(theory.gd_rate(np.arange(61), l, L, 2.0, G, h)[1:], curve[1:], rtol=1e-9)


@pytest.mark.parametrize("ends", ENDS)
def test_corollaries_1_and_2(ends: tuple[float, float]) -> None:
    l, L = ends
    kappa, t, G = l / L, np.arange(1, 200), 0.3
    short = (1 - kappa) ** (t - 1) * ((1 + kappa * (t - 1)) + t / L * G)
    np.testing.assert_allclose(theory.gd_rate(t, l, L, 1.0, G, 1 / L)[1:], short[1:], rtol=1e-10)
    long = ((1 - kappa) / (1 + kappa)) ** (t - 1) * ((2 * t - 1) + 2 * t / (L + l) * G)
    rate = theory.gd_rate(t, l, L, 1.0, G, 2 / (L + l))
    assert (rate <= long * (1 + 1e-12)).all()
    assert (rate >= 0.5 * long).all()
    edge = theory.gd_monotone_step_size(L)
    assert edge == pytest.approx(2**0.5 / L)
    assert (np.diff(theory.gd_rate(t, l, L, step_size=0.999 * edge)) < 0).all()
    assert theory.gd_rate(2, l, L, step_size=1.001 * edge) > theory.gd_rate(1, l, L, step_size=1.001 * edge)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("G", [0.0, 0.7])
def test_theorem_3_is_attained(ends: tuple[float, float], G: float) -> None:
    l, L = ends
    curve = theory.worst_case_curve(bl.Chebyshev(l, L), l, L, 80, G=G)
    np.testing.assert_allclose(theory.chebyshev_rate(np.arange(81), l, L, 1.0, G), curve, rtol=1e-9)
    assert (theory.lower_bound(np.arange(81), l, L) <= curve * (1 + 1e-12)).all()
    assert np.isfinite(theory.chebyshev_rate(10**6, l, L))


def test_peaks_of_the_curse_have_their_known_places_and_heights() -> None:
    for kappa in (1e-2, 1e-3, 1e-4, 1e-5):
        peak = theory.gd_peak(kappa, 1.0)
        assert abs(peak.index - (1 - kappa**2) / (2 * kappa)) <= 1
        assert peak.value * kappa == pytest.approx(math.exp(-1), rel=2 * kappa + 1e-9)
        peak = theory.chebyshev_peak(kappa, 1.0)
        assert abs(peak.index - 1.0327 / math.sqrt(kappa)) <= 1
        assert peak.value * kappa == pytest.approx(0.5322, rel=0.02)
    peak = theory.chebyshev_peak(1e-3, 1.0)
    assert (peak.index, round(peak.value, 2)) == (33, 532.08)
    for l, L in ENDS[1:]:
        for found, solver in (
            (theory.gd_peak(l, L), bl.GradientDescent(2 / (L + l))),
            (theory.gd_peak(l, L, 1.7 / L), bl.GradientDescent(1.7 / L)),
            (theory.gd_peak(l, L, 1 / L), bl.GradientDescent(1 / L)),
            (theory.chebyshev_peak(l, L), bl.Chebyshev(l, L)),
        ):
            curve = theory.worst_case_curve(solver, l, L, 80)
            assert found.value == pytest.approx(theory.curse_peak(curve).value, rel=1e-9)
    assert theory.gd_peak(0.1, 1.0, 1.41) == theory.Peak(0, 1.0, 1.0)
    assert theory.curse_peak(torch.tensor([2.0, 5.0, 1.0])) == theory.Peak(1, 5.0, 2.5)


def test_worst_case_transients_of_heavy_ball_and_sobolev() -> None:
    l, L = 0.5, 10.0
    h, m = asymptotic_coefficients(l, L)
    for first_step, bump in (("half", 9.2), ("full", 20.8)):
        curve = theory.worst_case_curve(bl.HeavyBall(h, m, first_step=first_step), l, L, 60)
        assert theory.curse_peak(curve).value == pytest.approx(bump, rel=0.01)
    for kappa, alpha, bump in (
        (1e-3, 0.0, 1.04),
        (1e-3, 1.0, 5.2),
        (1e-5, 1.0, 21.0),
        (1e-3, 0.5, 1.35),
        (1e-5, 0.5, 1.58),
    ):
        curve = theory.worst_case_curve(
            bl.Sobolev(kappa, 1.0, alpha), kappa, 1.0, 400 if kappa == 1e-3 else 1800, points=2001
        )
        assert theory.curse_peak(curve).value == pytest.approx(bump, rel=0.02), (kappa, alpha)


@pytest.mark.parametrize(("t", "factor"), [(2, 1.44), (5, 3.91), (10, 9.42), (20, 18.9), (40, 37.7)])
def test_the_minimax_error_exceeds_proposition_1_by_the_known_factor(t: int, factor: float) -> None:
    value = theory.minimax_error(t, 0.05, 1.0)
    assert value / theory.lower_bound(t, 0.05, 1.0) == pytest.approx(factor, rel=3e-3)
    for solver in (bl.Chebyshev(0.05, 1.0), bl.Sobolev(0.05, 1.0, 0.0), bl.GradientDescent(1.0)):
        assert theory.worst_case_curve(solver, 0.05, 1.0, t)[-1] >= value * (1 - 1e-3)


@pytest.mark.parametrize(
    "solver",
    [
        bl.GradientDescent(0.3),
        bl.HeavyBall(0.3, 0.4, first_step="half"),
        bl.Nesterov(0.3, 0.5),
        bl.Chebyshev(0.4, 4.0),
        bl.Sobolev(0.4, 4.0, alpha=0.0, eta=1.0),
        bl.AsymptoticSobolev(0.4, 4.0),
    ],
    ids=repr,
)
def test_the_master_identity_needs_the_total_derivative_where_the_start_moves(solver: Any) -> None:
    # x_0(u) = a + u c on ridge-like f = 1/2 x'(H + u I) x + b'x: everything commutes.
    values = torch.linspace(0.4, 4.0, 6, dtype=F64)
    b, a, c, u = normal(1, 6), normal(2, 6), normal(3, 6), torch.zeros((), dtype=F64)

    def unrolled(u: Tensor) -> Tensor:
        problem = bl.BilevelProblem(
            lambda x, v: 0.5 * (x * (values + v) * x).sum() + b @ x, lambda x, v: x.sum(), torch.zeros(6, dtype=F64)
        )
        inner = DifferentiableInner(problem.bind(u), u, graph=True)
        state = solver.init(inner, a + u * c)
        for _ in range(9):
            state = solver.step(inner, state)
        return state.params

    got = torch.autograd.functional.jacobian(unrolled, u)
    P, slope = (torch.as_tensor(part) for part in theory.residual_polynomial(solver, 9, values))
    dx = b / values**2
    total = values * c + a  # d/du [(H + u) x_0(u) + b] at u = 0
    expected = dx + (P - values * slope) * (c - dx) + slope * total
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    partial = dx + (P - values * slope) * (c - dx) + slope * a
    assert float((got - partial).norm()) > 1e-3


# Bad input -----------------------------------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: theory.iterate_bound(3, 1.0, 1.0), r"`iterate_bound.rho` must be a number in \[0, 1\).*, got 1.0\."),
    (lambda: theory.unroll_bound(3, -0.1, 1.0, 1.0, 1.0), r"`unroll_bound.rho` must be a number in \[0, 1\).*got -0.1"),
    (lambda: theory.unroll_bound(3, "x", 1.0, 1.0, 1.0), r"`unroll_bound.rho` must be a number .*got 'x'"),
    (lambda: theory.unroll_bound(-1, 0.5, 1.0, 1.0, 1.0), r"`unroll_bound.steps` must be a whole number.*got -1"),
    (lambda: theory.unroll_bound(2.5, 0.5, 1.0, 1.0, 1.0), r"`unroll_bound.steps` must be a whole number.*got 2.5"),
    (lambda: theory.unroll_bound(3, 0.5, -1.0, 1.0, 1.0), r"`unroll_bound.d0` must be a number, 0 or more.*got -1.0"),
    (
        lambda: theory.late_start_bound(5, 0, 0.5, 1.0, 1.0, 1.0),
        r"`late_start_bound.tail` must be .* in 1\.\.steps.*got 0",
    ),
    (lambda: theory.late_start_bound(5, 6, 0.5, 1.0, 1.0, 1.0), r"`late_start_bound.tail` must be .*steps=5\), got 6"),
    (
        lambda: theory.accumulated_bound(3, 1.0, 1.0, c=1.0),
        r"`accumulated_bound.rho` must be a number in \[0, 1\).*got",
    ),
    (lambda: theory.accumulated_bound(3, 0.5, -1.0, c=1.0), r"`accumulated_bound.e0` must be a number, 0 or more"),
    (lambda: theory.accumulated_bound(3, 0.5, 1.0, c=-1.0), r"`accumulated_bound.c` must be a number, 0 or more.*-1.0"),
    (
        lambda: theory.accumulated_bound(3, 0.5, 1.0),
        r"`accumulated_bound.inputs` must be given where `c` is not, and l",
    ),
    (lambda: theory.accumulated_bound(1, 0.5, 1.0, [1.0], c=1.0), r"left out where it is, got \[1.0\]"),
    (
        lambda: theory.accumulated_bound(3, 0.5, 1.0, [1.0, 2.0]),
        r"`accumulated_bound.inputs` must be an array of at least 3 numbers.*\(steps=3\), got \[1.0, 2.0\]",
    ),
    (lambda: theory.accumulated_bound(1, 0.5, 1.0, [-1.0]), r"array of at least 1 numbers.*got \[-1.0\]"),
    (lambda: theory.accumulated_bound(1, 0.5, 1.0, 2.0), r"array of at least 1 numbers.*got 2.0"),
    (lambda: theory.accumulated_bound(1, 0.5, 1.0, ["a"]), r"array of at least 1 numbers.*got \['a'\]"),
    (lambda: theory.accumulated_bound(1, 0.5, 1.0, [math.nan]), r"array of at least 1 numbers.*got \[nan\]"),
    (lambda: theory.budget(10, 10, 3.0), r"`budget.dropped` must be an int in 0\.\.9, so that one derivative step"),
    (lambda: theory.budget(10, 2, 0.0), r"`budget.omega` must be a positive number, got 0.0"),
    (lambda: theory.budget(10, 2, -1), r"`budget.omega` must be a positive number, got -1"),
    (
        lambda: theory.budget(10, 2, 1.0, joint=True),
        r"`budget.omega` must be above 1 where it is a joint cost, got 1.0",
    ),
    (lambda: theory.budget(0, 0, 1.0), r"`budget.steps` must be a positive int, got 0"),
    (lambda: theory.split_budget(3.5, 1, 3.0), r"`split_budget.total` must be at least 4, the cost of one step with"),
    (lambda: theory.split_budget(40.0, 11, 3.0), r"`split_budget.tail` must be an int in 1\.\.10 for total=40, got 11"),
    (lambda: theory.split_budget(40.0, 0, 3.0), r"`split_budget.tail` must be an int in 1\.\.10 for total=40, got 0"),
    (lambda: theory.optimal_truncation(9, 1.0, 1, 1, 1, 3), r"`optimal_truncation.rho` must be a number in \[0, 1\)"),
    (lambda: theory.optimal_truncation(9, 0.5, 1, 1, 1, 0), r"`optimal_truncation.omega` must be a positive number"),
    (lambda: theory.optimal_truncation(9, 0.5, 1, 1, 1, 3, method="best"), r"must be 'integer', 'lambert' or"),
    (lambda: theory.gd_rate(3, 2.0, 1.0), r"`gd_rate.l` must be a positive number, at most L=1, got 2.0"),
    (lambda: theory.gd_rate(3, 0.1, 1.0, step_size=2.0), r"`gd_rate.step_size` must be a number in \(0, 2/L\)"),
    (lambda: theory.chebyshev_rate(3, 0.0, 1.0), r"`chebyshev_rate.l` must be a positive number, at most L=1, got 0.0"),
    (lambda: theory.lower_bound(3, 0.1, "L"), r"`lower_bound.L` must be a positive number, got 'L'"),
    (lambda: theory.curse_peak([1.0, float("nan")]), r"`curse_peak.curve` must be one row of finite numbers"),
    (lambda: theory.minimax_error(1, 0.1, 1.0), r"`minimax_error.t` must be an int, 2 or more, got 1"),
    (lambda: theory.chebyshev_coefficients(2.0, 1.0, 3), r"`Chebyshev.l` must be at most L=1, got 2.0"),
    (lambda: theory.sobolev_coefficients(0.1, 1.0, 3, alpha=-0.5), r"`Sobolev.alpha` must be a number above -1/2"),
    (lambda: theory.sobolev_coefficients(0.1, 1.0, 0), r"`sobolev_coefficients.steps` must be a positive int, got 0"),
    (
        lambda: theory.residual_polynomial(bl.Chebyshev(), 3, 1.0),
        r"must have numbers in place of 'auto', got Chebyshev",
    ),
    (lambda: theory.residual_polynomial(bl.Adam(), 3, 1.0), r"`residual_polynomial.method` must be a linear multistep"),
    (lambda: theory.residual_polynomial(bl.GradientDescent(0.1), -1, 1.0), r"`residual_polynomial.t` must be an int"),
    (lambda: theory.contraction_constants(*ridge(0)[:2], 10.0), r"step_size=10 does not contract on a spectrum of"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_arguments_are_refused_in_one_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)
