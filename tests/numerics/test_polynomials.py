"""Polynomials: coefficients against the literal formulas in 60 digits, optimality against dense least squares."""

# ruff: noqa: E741

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import numpy as np
import pytest
from mpmath import mpf

import bilevel as bl
from bilevel.numerics.polynomials import (
    asymptotic_coefficients,
    gegenbauer_coefficients,
    optimal_factor,
    sobolev_coefficients,
)
from bilevel.theory import residual_polynomial


@pytest.fixture(autouse=True)
def sixty_digits() -> Any:
    with mpmath.workdps(60):
        yield


# The literal formulas, in the order in which the paper derives them --------------------------------------------------


def monic_gegenbauer(x: Any, alpha: Any, count: int) -> list[Any]:
    """pi_n(x), n = 0..count, by the textbook three-term recurrence."""
    values = [mpf(1), x]
    for n in range(1, count):
        gamma = 1 / (2 * (1 + alpha)) if n == 1 else n * (n + 2 * alpha - 1) / (4 * (n + alpha) * (n + alpha - 1))
        values.append(x * values[n] - gamma * values[n - 1])
    return values


def literal_sobolev(l: float, L: float, alpha: float, eta: float, count: int) -> dict[str, list[Any]]:
    """h, m, tau, A_{t-1}/A_t, a_t/A_t by forming S_n(0) and ||S_n||^2 themselves."""
    l, L, alpha, eta = mpf(l), mpf(L), mpf(alpha), mpf(eta)
    sigma, x0 = 2 / (L - l), -(L + l) / (L - l)
    gamma = [mpf(0), 1 / (2 * (1 + alpha))]
    gamma += [n * (n + 2 * alpha - 1) / (4 * (n + alpha) * (n + alpha - 1)) for n in range(2, count + 1)]
    pi = monic_gegenbauer(x0, alpha, count)
    H = [mpf(1)]
    for n in range(1, count + 1):
        H.append(H[-1] * gamma[n])
    etab = eta * sigma**2
    eps = [mpf(0)] * 3 + [n * (n - 1) / (4 * (alpha + n - 1) * (alpha + n - 2)) for n in range(3, count + 1)]
    S, norm = [mpf(1)], [mpf(1)]
    for n in range(1, count + 1):
        # <U_n, U_n> = H_n + eps_n^2 H_{n-2} + etab n^2 H_{n-1}; <U_n, S_{n-2}> = -eps_n H_{n-2} for n >= 3.
        inner = H[n] + etab * n**2 * H[n - 1]
        value = pi[n]
        if n >= 3:
            coupling = eps[n] * H[n - 2]
            inner += eps[n] ** 2 * H[n - 2] - coupling**2 / norm[n - 2]
            value += -eps[n] * pi[n - 2] + coupling / norm[n - 2] * S[n - 2]
        S.append(value)
        norm.append(inner)
    A = list(itertools.accumulate(s**2 / n for s, n in zip(S, norm, strict=True)))
    steps = range(1, count + 1)
    return {
        "h": [-sigma * pi[n - 1] / pi[n] for n in steps],
        "m": [mpf(0)] + [gamma[n - 1] * pi[n - 2] / pi[n] for n in range(2, count + 1)],
        "tau": [S[n] / pi[n] for n in steps],
        "d": [norm[n] / H[n] for n in steps],
        "keep": [A[n - 1] / A[n] for n in steps],
        "weight": [1 - A[n - 1] / A[n] for n in steps],
        "log_A": [mpmath.log(A[n]) for n in steps],
    }


@pytest.mark.parametrize("kappa", [1e-6, 1e-3, 0.1])
def test_chebyshev_coefficients_equal_the_literal_formula(kappa: float) -> None:
    count, L = 400, 3.0
    l = kappa * L
    s = (mpf(L) + mpf(l)) / (mpf(L) - mpf(l))
    r = [1 / s]
    for _ in range(count - 1):
        r.append(1 / (2 * s - r[-1]))
    h = [2 / (mpf(L) + mpf(l))] + [4 * value / (mpf(L) - mpf(l)) for value in r[1:]]
    m = [mpf(0)] + [r[t] * r[t - 1] for t in range(1, count)]
    got = gegenbauer_coefficients(l, L, count, alpha=0.0)
    np.testing.assert_allclose(got[0], np.array(h, dtype=float), rtol=1e-13)
    np.testing.assert_allclose(got[1], np.array(m, dtype=float), rtol=1e-13)


GRID = [
    *itertools.product([1e-6, 1e-3, 0.1], [0.5, 1.0, 3.0], [1e-6, 1.0, 1e6]),
    *itertools.product([1e-3, 0.1], [0.0, -0.3, -0.49], [1e-3, 1.0, 10.0]),
]


@pytest.mark.parametrize(("kappa", "alpha", "eta"), GRID)
def test_sobolev_coefficients_equal_the_literal_formula(kappa: float, alpha: float, eta: float) -> None:
    count = 120
    expected = literal_sobolev(kappa, 1.0, alpha, eta, count)
    got = sobolev_coefficients(kappa, 1.0, count, alpha, eta)
    for name, values in expected.items():
        # Near a zero of tau (possible below alpha = 1/2) only its absolute accuracy can be asked for.
        atol = 1e-12 if name in ("tau", "weight") and alpha < 0.5 else 1e-14
        np.testing.assert_allclose(getattr(got, name), np.array(values, dtype=float), rtol=1e-12, atol=atol)
    np.testing.assert_allclose(got.keep + got.weight, 1.0, rtol=1e-12)


def test_long_runs_of_coefficients_stay_accurate() -> None:
    for kappa, alpha in ((1e-6, 1.0), (0.1, 0.5), (1e-6, -0.4)):
        expected = literal_sobolev(kappa, 1.0, alpha, 1.0, 2000)
        got = sobolev_coefficients(kappa, 1.0, 2000, alpha, 1.0)
        for name, atol in (("h", 0.0), ("m", 0.0), ("keep", 0.0), ("weight", 1e-12), ("log_A", 1e-9)):
            value = np.array(expected[name], dtype=float)
            np.testing.assert_allclose(getattr(got, name), value, rtol=1e-12, atol=atol, err_msg=name)


def test_tau_changes_its_sign_where_the_theory_says_so() -> None:
    assert sobolev_coefficients(0.01, 1.0, 3, 0.0, 10.0).tau[2] == pytest.approx(-1.5478, abs=5e-5)
    assert sobolev_coefficients(0.01, 1.0, 3, 0.0, 1e-12).tau[2] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_coefficients_converge_to_the_asymptotic_method(alpha: float) -> None:
    l, L = 0.05, 1.0
    h, m = asymptotic_coefficients(l, L)
    assert h == pytest.approx(2.67162949, abs=5e-9)
    assert m == pytest.approx(0.6345**2, rel=1e-3)
    assert optimal_factor(l, L) == pytest.approx(math.sqrt(m), rel=1e-14)
    last = sobolev_coefficients(l, L, 4000, alpha, 1.0)
    # In the paper's form z_t = c1 z_{t-2} + c2 y_t - c3 y_{t-2}.
    c1, c2, c3 = last.q[-1] * last.tau[-3] / last.tau[-1], 1 / last.tau[-1], last.p[-1] / last.tau[-1]
    assert c1 + c2 - c3 == pytest.approx(1.0, abs=1e-12)
    assert c1 < 1e-8
    for got, limit in (
        (last.h[-1], h),
        (last.m[-1], m),
        (last.keep[-1], m),
        (c2, 1 / (1 - m)),
        (c3, m / (1 - m)),
    ):
        assert got == pytest.approx(limit, rel=3e-3 if alpha > 1 else 1e-3)


def test_an_interval_of_one_point_gives_the_exact_step() -> None:
    h, m = gegenbauer_coefficients(2.0, 2.0, 5, alpha=0.0)
    assert h.tolist() == [0.5] * 5
    assert m.tolist() == [0.0] * 5
    table = sobolev_coefficients(2.0, 2.0, 5, 1.0, 4.0)
    assert np.isfinite(table.gain).all()
    # At t = 1 the minimiser of P(l)^2 + eta P'(l)^2 is known: P = 1 - a lam, a = l / (l^2 + eta).
    _, slope = residual_polynomial(bl.Sobolev(2.0, 2.0, eta=4.0), 1, 2.0)
    assert -slope == pytest.approx(2.0 / 8.0, rel=1e-8)


# Optimality ----------------------------------------------------------------------------------------------------------


def quadrature(l: float, L: float, alpha: float, count: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Gegenbauer nodes on [l, L] with weights that sum to one, by Golub-Welsch."""
    n = np.arange(1, count)
    gamma = n * (n + 2 * alpha - 1) / (4 * (n + alpha) * np.where(n > 1, n + alpha - 1, 1.0))
    gamma[0] = 1 / (2 * (1 + alpha))
    off = np.sqrt(gamma)
    nodes, vectors = np.linalg.eigh(np.diag(off, 1) + np.diag(off, -1))
    return (L + l) / 2 + (L - l) / 2 * nodes, vectors[0] ** 2


def least_squares(
    l: float, L: float, alpha: float, eta: float, degree: int, lam: np.ndarray
) -> tuple[np.ndarray, float]:
    """(P*(lam), squared norm) by a dense QR in Chebyshev's basis: no recurrence of the package."""
    nodes, weights = quadrature(l, L, alpha)

    def basis(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = (2 * at - L - l) / (L - l)
        values = np.polynomial.chebyshev.chebvander(x, degree)
        slopes = values[:, :degree] @ np.polynomial.chebyshev.chebder(np.eye(degree + 1))
        return values, slopes * 2 / (L - l)

    values, slopes = basis(nodes)
    stacked = np.concatenate([np.sqrt(weights)[:, None] * values, np.sqrt(eta * weights)[:, None] * slopes])
    R = np.linalg.qr(stacked, mode="r")
    start, _ = basis(np.zeros(1))
    u = np.linalg.solve(R.T, start[0])
    coefficients = np.linalg.solve(R, u) / (u @ u)
    return basis(lam)[0] @ coefficients, 1 / (u @ u)


@pytest.mark.crossed
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 12, 40])
@pytest.mark.parametrize(("alpha", "eta"), [(1.0, 1.0), (0.5, 0.1), (0.0, 1.0), (2.0, 10.0), (-0.3, 1.0), (0.0, 10.0)])
def test_the_sobolev_polynomial_is_the_dense_minimiser(degree: int, alpha: float, eta: float) -> None:
    l, L = 0.01, 1.0
    lam = np.linspace(l, L, 50)
    expected, norm = least_squares(l, L, alpha, eta, degree, lam)
    got, _ = residual_polynomial(bl.Sobolev(l, L, alpha, eta), degree, lam)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-12)
    assert sobolev_coefficients(l, L, degree, alpha, eta).log_A[-1] == pytest.approx(-math.log(norm), abs=1e-9)


@pytest.mark.parametrize("degree", [2, 9, 30])
def test_it_beats_every_other_method_in_its_norm(degree: int) -> None:
    l, L, alpha, eta = 0.02, 1.0, 1.0, 1.0
    nodes, weights = quadrature(l, L, alpha)

    def norm(method: Any) -> float:
        values, slopes = residual_polynomial(method, degree, nodes)
        return float(weights @ (values**2 + eta * slopes**2))

    best = norm(bl.Sobolev(l, L, alpha, eta))
    assert best <= 1.0
    assert best == pytest.approx(math.exp(-sobolev_coefficients(l, L, degree, alpha, eta).log_A[-1]), rel=1e-10)
    for other in (
        bl.Chebyshev(l, L),
        bl.AsymptoticSobolev(l, L),
        bl.Sobolev(l, L, 0.0, eta),
        bl.Sobolev(l, L, alpha, 2.0),
        bl.GradientDescent(1 / L),
        bl.GradientDescent(2 / (L + l)),
        bl.HeavyBall(*asymptotic_coefficients(l, L), first_step="half"),
        bl.Nesterov(1 / L, 0.7),
    ):
        assert norm(other) > best * (1 + 1e-9), other


# Residual polynomials with a closed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1, 2, 5, 40])
def test_residual_polynomials_equal_their_closed_forms(t: int) -> None:
    l, L = 0.05, 2.0
    lam = np.linspace(l, L, 31)
    P, slope = residual_polynomial(bl.GradientDescent(0.7), t, lam)
    np.testing.assert_allclose(P, (1 - 0.7 * lam) ** t, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(slope, -0.7 * t * (1 - 0.7 * lam) ** max(t - 1, 0), rtol=1e-12, atol=1e-15)
    x, x0 = (2 * lam - L - l) / (L - l), -(L + l) / (L - l)
    basis = np.polynomial.Chebyshev.basis(t)
    P, slope = residual_polynomial(bl.Chebyshev(l, L), t, lam)
    np.testing.assert_allclose(P, basis(x) / basis(x0), rtol=0, atol=1e-13)
    np.testing.assert_allclose(slope, basis.deriv()(x) / basis(x0) * 2 / (L - l), rtol=0, atol=1e-11)


METHODS = [
    bl.GradientDescent(0.6),
    bl.HeavyBall(0.6, 0.5),
    bl.HeavyBall(0.6, 0.5, first_step="half"),
    bl.Nesterov(0.4, 0.6),
    bl.Chebyshev(0.1, 2.0),
    bl.Sobolev(0.1, 2.0),
    bl.Sobolev(0.1, 2.0, alpha=-0.2, eta=7.0),
    bl.AsymptoticSobolev(0.1, 2.0),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("t", [1, 2, 3, 4, 9])
def test_they_are_polynomials_of_degree_t_that_are_one_at_zero_with_the_right_derivative(method: Any, t: int) -> None:
    P, slope = residual_polynomial(method, t, 0.0)
    assert P.shape == ()
    assert pytest.approx(1.0, abs=1e-14) == P
    nodes = 1.05 + 0.95 * np.cos(np.pi * (np.arange(t + 1) + 0.5) / (t + 1))
    fit = np.polynomial.Chebyshev.fit(nodes, residual_polynomial(method, t, nodes)[0], t, domain=[0.1, 2.0])
    lam = np.linspace(0.0, 2.2, 13)
    P, slope = residual_polynomial(method, t, lam)
    np.testing.assert_allclose(P, fit(lam), rtol=0, atol=1e-10)
    np.testing.assert_allclose(slope, fit.deriv()(lam), rtol=0, atol=1e-9)
