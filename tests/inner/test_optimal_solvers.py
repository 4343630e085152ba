"""Chebyshev, Sobolev and the asymptotic method as inner solvers of bilevel runs."""

# ruff: noqa: E741

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import bilevel as bl
from bilevel.base import Carry
from bilevel.engine.loop import run_inner
from bilevel.numerics.polynomials import asymptotic_coefficients
from bilevel.oracles.differentiable import DifferentiableInner
from bilevel.problems import LogisticProblem, RidgeProblem
from bilevel.theory import residual_polynomial

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def quadratic(eigenvalues: Tensor, seed: int = 0) -> tuple[bl.QuadraticProblem, Tensor]:
    """(H(u) = H_0 + u I with the given spectrum at u = 0, eigenvectors); every dH commutes with H."""
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(normal(seed, n, n))
    hessian = basis @ torch.diag(eigenvalues) @ basis.t()
    problem = bl.QuadraticProblem(
        (hessian + hessian.t()) / 2,
        normal(seed + 1, n),
        torch.eye(n, dtype=F64)[None],
        target=normal(seed + 2, n),
        params=normal(seed + 3, n),
    )
    return problem, basis


METHODS: dict[str, Callable[[float, float], bl.InnerSolver]] = {
    "chebyshev": lambda l, L: bl.Chebyshev(l, L, steps=1),
    "sobolev": lambda l, L: bl.Sobolev(l, L, steps=1),
    "sobolev 0": lambda l, L: bl.Sobolev(l, L, alpha=0.0, eta=10.0, steps=1),
    "sobolev -.4": lambda l, L: bl.Sobolev(l, L, alpha=-0.4, eta=0.3, steps=1),
    "asymptotic": lambda l, L: bl.AsymptoticSobolev(l, L, steps=1),
    "half asymptotic": lambda l, L: bl.AsymptoticSobolev(l, L, first_step="half", steps=1),
    "half heavy ball": lambda l, L: bl.HeavyBall(1.5 / L, 0.4, first_step="half", steps=1),
}
every_method = pytest.mark.parametrize("name", METHODS)


def with_steps(name: str, l: float, L: float, steps: int) -> Any:
    solver: Any = METHODS[name](l, L)
    return type(solver)(**{**vars(solver), "steps": steps})


def run(problem: bl.BilevelProblem, solver: bl.InnerSolver, u: Tensor) -> Tensor:
    inner = problem.bind(u)
    result = run_inner(inner, solver, solver.init(inner, problem.params))
    assert result.verdict.status.ok, result.verdict
    return result.state.params


@every_method
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 40])
def test_the_run_is_its_residual_polynomial_of_the_hessian(name: str, steps: int) -> None:
    eigenvalues = torch.linspace(0.05, 2.0, 12, dtype=F64)
    problem, basis = quadratic(eigenvalues)
    u = torch.zeros(1, dtype=F64)
    solver = with_steps(name, 0.05, 2.0, steps)
    P, _ = residual_polynomial(solver, steps, eigenvalues)
    x = problem.solve(u)
    expected = x + basis @ (torch.as_tensor(P) * (basis.t() @ (problem.params - x)))
    torch.testing.assert_close(run(problem, solver, u), expected, rtol=0, atol=1e-12)


@pytest.mark.crossed
@every_method
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
@pytest.mark.parametrize(
    "estimator", [bl.FullUnroll(), bl.FullUnroll(memory="graph"), bl.FullUnroll(mode="forward")], ids=repr
)
def test_the_unrolled_hypergradient_is_the_master_identity(name: str, steps: int, estimator: Any) -> None:
    eigenvalues = torch.linspace(0.1, 3.0, 9, dtype=F64)
    problem, basis = quadratic(eigenvalues, seed=5)
    u = torch.zeros(1, dtype=F64)
    solver = with_steps(name, 0.1, 3.0, steps)
    P, slope = (torch.as_tensor(part) for part in residual_polynomial(solver, steps, eigenvalues))
    x, dx = problem.solve(u), problem.exact_jacobian(u)[:, 0]
    start = basis.t() @ (problem.params - x)
    derivative = dx + basis @ (P * (basis.t() @ -dx) + slope * start)  # dH = I, x_0 does not depend on u
    last = x + basis @ (P * start)
    estimate = bl.hypergradient(problem, solver, estimator, u)
    expected = derivative @ (last - problem.target)
    assert float(estimate.hypergradient[0]) == pytest.approx(float(expected), rel=1e-10, abs=1e-10)


@every_method
@pytest.mark.parametrize("tail", [1, 4, 11])
def test_a_truncated_tail_freezes_the_whole_state(name: str, tail: int) -> None:
    problem = bl.QuadraticProblem.random(6, 2, condition=8.0, seed=3)
    u, steps = torch.zeros(2, dtype=F64), 11
    solver = with_steps(name, 0.9, 9.0, steps)
    got = bl.hypergradient(problem, solver, bl.TruncatedUnroll(tail=tail), u)
    inner = problem.bind(u)
    state = solver.init(inner, problem.params)
    for _ in range(steps - tail):
        state = solver.step(inner, state)
    moving = u.clone().requires_grad_()
    late = DifferentiableInner(inner, moving, graph=True)
    for _ in range(tail):
        state = solver.step(late, state)
    (expected,) = torch.autograd.grad(problem.outer_loss(state.params, moving), moving)
    torch.testing.assert_close(got.hypergradient, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["chebyshev", "sobolev", "sobolev 0", "sobolev -.4", "asymptotic"])
def test_two_thousand_steps_at_condition_one_million_stay_finite_and_accurate(name: str) -> None:
    eigenvalues = torch.logspace(-6, 0, 25, dtype=F64)
    problem = bl.QuadraticProblem(
        torch.diag(eigenvalues),
        torch.zeros(25, dtype=F64),
        torch.eye(25, dtype=F64)[None],
        target=torch.ones(25, dtype=F64),
        params=torch.ones(25, dtype=F64),
    )
    u = torch.zeros(1, dtype=F64)
    solver = with_steps(name, 1e-6, 1.0, 2000)
    P, slope = residual_polynomial(solver, 2000, eigenvalues)
    np.testing.assert_allclose(run(problem, solver, u).numpy(), P, rtol=0, atol=5e-12)
    if name == "chebyshev":
        x, beyond = 2 * eigenvalues - 1 - 1e-6, 1e-6 / (1 - 1e-6)  # T_n(1 + 2 b) = cosh(2 n asinh(sqrt b))
        exact = torch.cos(2000 * torch.acos((x / (1 - 1e-6)).clamp(-1, 1))) / np.cosh(4000 * np.arcsinh(beyond**0.5))
        np.testing.assert_allclose(P, exact, rtol=0, atol=1e-10)
    if name.startswith("sobolev"):
        assert np.abs(P).max() < 1.0
    estimate = bl.hypergradient(problem, solver, bl.FullUnroll(), u)
    # x* = 0 and dx* = 0, so the derivative is P'(lam) x_0; compare against the sum of its terms' sizes.
    expected = slope * (P - 1.0)
    assert float(estimate.hypergradient[0]) == pytest.approx(expected.sum(), abs=1e-11 * np.abs(expected).sum())


def breast_cancer() -> tuple[RidgeProblem, Tensor, float, float]:
    """Ridge regression as Scieur et al. run it: (problem started at ones, penalty, l, L)."""
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    scale = np.linalg.norm(X, 2)
    X, y = torch.as_tensor(X / scale, dtype=F64), torch.as_tensor((2.0 * y - 1) / scale, dtype=F64)
    problem = RidgeProblem(X, y, X, y, loss="sum", parametrization="direct")
    u = torch.tensor(1e-3, dtype=F64)
    spectrum = problem.bind(u).curvature(torch.zeros(30, dtype=F64))
    return problem, u, spectrum.smallest, spectrum.largest


def jacobian_error(problem: RidgeProblem, u: Tensor, solver: Any, steps: int) -> np.ndarray:
    """|dx_t - dx*| / |dx*|, t = 1..steps, by the solver's forward mode from ones."""
    inner = problem.bind(u)
    state = solver.init(inner, torch.ones(30, dtype=F64))
    tangent: Any = (torch.zeros(30, dtype=F64), tuple(torch.zeros(30, dtype=F64) for _ in state.memory))
    exact = -torch.linalg.solve(inner.linearize(state.params).dense_hessian(), problem.solve(u))
    errors = []
    for _ in range(steps):
        (tangent,) = solver.step_jvp(inner, state, [tangent], [torch.ones((), dtype=F64)])
        state = solver.step(inner, state)
        errors.append(float((tangent[0] - exact).norm() / exact.norm()))
    return np.array(errors)


def test_the_breast_cancer_curves_of_the_derivative_have_their_known_peaks() -> None:
    problem, u, l, L = breast_cancer()
    assert l / L == pytest.approx(1.009e-3, rel=1e-3)
    h, m = asymptotic_coefficients(l, L)
    cases: list[tuple[Any, float, int | None]] = [
        (bl.Chebyshev(l, L), 10.56, 32),
        (bl.HeavyBall(h, m, first_step="half"), 9.33, 38),
        (bl.Sobolev(l, L, 1.0, 1.0), 1.0002, None),
        (bl.AsymptoticSobolev(l, L, first_step="half"), 1.23, None),
        (bl.GradientDescent(1 / L), 1.002, None),
        (bl.GradientDescent(2**0.5 / L), 1.002, None),
    ]
    for solver, peak, at in cases:
        errors = jacobian_error(problem, u, solver, 150)
        assert errors.max() == pytest.approx(peak, rel=1e-3), solver
        assert at is None or abs(int(errors.argmax()) + 1 - at) <= 1


def test_at_150_steps_sobolev_is_10_times_below_chebyshev_and_100_times_below_gradient_descent() -> None:
    problem, u, l, L = breast_cancer()
    solvers: list[Any] = [bl.Sobolev(l, L, steps=150), bl.Chebyshev(l, L, steps=150)]
    solvers.append(bl.GradientDescent(2 / (L + l), steps=150))
    sobolev, chebyshev, descent = (jacobian_error(problem, u, solver, 150)[-1] for solver in solvers)
    assert 10 * sobolev < chebyshev
    assert 100 * sobolev < descent
    # The same order in the hypergradient of a bilevel run.
    start, exact = torch.ones(30, dtype=F64), problem.exact_hypergradient(u)
    errors = [
        abs(float(bl.hypergradient(problem, solver, bl.FullUnroll(), u, params=start).hypergradient - exact))
        for solver in solvers
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("make", [bl.Chebyshev, bl.Sobolev, bl.AsymptoticSobolev])
@pytest.mark.parametrize("kind", ["quadratic", "ridge", "logistic", "autograd"])
def test_automatic_ends_enclose_the_spectrum_and_are_shown(make: Any, kind: str) -> None:
    X, y = normal(1, 30, 5), normal(2, 30)
    u = torch.tensor(-2.0, dtype=F64)
    w = torch.zeros(5, dtype=F64)
    if kind == "quadratic":
        problem: bl.BilevelProblem = bl.QuadraticProblem.random(6, 2, condition=50.0, seed=1)
        u, low, high = torch.zeros(2, dtype=F64), 1.0, 50.0
    elif kind == "logistic":
        problem = LogisticProblem(X, y.sign(), X, y.sign())
        values = torch.linalg.eigvalsh(X.t() @ X / 4 / 30)
        low, high = float(u.exp()), float(values[-1] + u.exp())
    else:
        problem = RidgeProblem(X, y, X, y)
        if kind == "autograd":
            problem = bl.BilevelProblem(problem.inner_loss, problem.outer_loss, w)
        values = torch.linalg.eigvalsh(X.t() @ X / 30) + u.exp()
        low, high = float(values[0]), float(values[-1])
    estimate = bl.hypergradient(problem, make(tol=1e-9), bl.Implicit(), u)
    assert estimate.status.ok
    measured = estimate.certificate.measured
    assert {"l", "L", "smallest_curvature", "largest_curvature"} == set(measured)
    assert measured["l"] <= low * 1.001
    assert measured["l"] == pytest.approx(measured["smallest_curvature"] / 1.02)
    assert high <= measured["L"] <= 1.03 * high


@pytest.mark.parametrize("make", [bl.Chebyshev, bl.Sobolev, bl.AsymptoticSobolev])
def test_a_given_end_is_kept_and_the_other_measured(make: Any) -> None:
    problem = bl.QuadraticProblem.random(6, 2, condition=50.0, seed=1)
    u = torch.zeros(2, dtype=F64)
    measured = bl.hypergradient(problem, make(l=0.5, steps=60), bl.Implicit(), u).certificate.measured
    assert measured["l"] == 0.5
    assert measured["L"] == pytest.approx(51.0, rel=1e-6)
    with pytest.raises(ValueError, match=r"measured a spectrum of \[1, 50\] .* makes l=0.98 larger than L=0.5"):
        bl.hypergradient(problem, make(L=0.5, steps=60), bl.Implicit(), u)


@pytest.mark.parametrize("make", [bl.Chebyshev, bl.Sobolev, bl.AsymptoticSobolev])
@pytest.mark.parametrize("steps", [40, 5000])
def test_an_eigenvalue_above_L_is_named_with_the_interval(make: Any, steps: int) -> None:
    problem, _ = quadratic(torch.linspace(0.1, 3.0, 9, dtype=F64))
    with pytest.raises(
        bl.HypergradientError, match=r"diverges: .*has the eigenvalue 3, outside \[l, L\] = \[0.1, 2\]: try L=3.06"
    ):
        bl.hypergradient(problem, make(0.1, 2.0, steps=steps), bl.FullUnroll(), torch.zeros(1, dtype=F64))


@pytest.mark.parametrize("make", [bl.Chebyshev, bl.Sobolev, bl.AsymptoticSobolev])
def test_a_negative_eigenvalue_is_named_or_refused(make: Any) -> None:
    problem, _ = quadratic(torch.linspace(-0.5, 3.0, 9, dtype=F64))
    u = torch.zeros(1, dtype=F64)
    with pytest.raises(bl.HypergradientError, match=r"eigenvalue -0.5, outside \[l, L\] = \[0.1, 3\]"):
        bl.hypergradient(problem, make(0.1, 3.0, steps=100), bl.FullUnroll(), u)
    with pytest.raises(ValueError, match=r"measured a spectrum of \[-0.5, 3\] .*needs a positive definite Hessian"):
        bl.hypergradient(problem, make(steps=100), bl.FullUnroll(), u)


def test_eigenvalues_below_l_only_slow_the_run_down() -> None:
    problem, _ = quadratic(torch.linspace(0.01, 3.0, 9, dtype=F64))
    estimate = bl.hypergradient(problem, bl.Sobolev(0.5, 3.0, tol=1e-8), bl.Implicit(), torch.zeros(1, dtype=F64))
    assert estimate.status.ok


@pytest.mark.parametrize("name", ["chebyshev", "sobolev", "asymptotic"])
def test_a_warm_start_begins_the_sequence_anew_at_the_iterate(name: str) -> None:
    problem = bl.QuadraticProblem.random(6, 2, condition=8.0, seed=3)
    u = torch.zeros(2, dtype=F64)
    solver = with_steps(name, 0.9, 9.0, 7)
    first = bl.hypergradient(problem, solver, bl.FullUnroll(), u)
    warm = bl.hypergradient(problem, solver, bl.FullUnroll(), u, carry=Carry(first.carry.state))
    cold = bl.hypergradient(problem, solver, bl.FullUnroll(), u, params=first.params)
    torch.testing.assert_close(warm.hypergradient, cold.hypergradient, rtol=0, atol=0)


def test_it_runs_in_the_outer_loop_on_trees() -> None:
    problem = bl.BilevelProblem(
        lambda w, u: 0.5 * (w["a"] - 1).square().sum() + 2 * (w["b"] @ w["b"]) + u.exp() * (w["a"] @ w["a"]),
        lambda w, u: (w["a"] - 0.3).square().sum(),
        {"a": torch.zeros(3, dtype=F64), "b": torch.ones(2, dtype=F64)},
    )
    for solver in (bl.Sobolev(steps=30), bl.Chebyshev(steps=30), bl.AsymptoticSobolev(steps=30)):
        outer = bl.OuterOptimizer(problem, solver, bl.FullUnroll(), torch.zeros((), dtype=F64))
        history = outer.run(3, progress=False).history
        assert history[-1].outer_loss < history[0].outer_loss


# Bad input -----------------------------------------------------------------------------------------------------------

BAD: list[tuple[Any, dict[str, Any], str]] = [
    (bl.Chebyshev, {"l": 2.0, "L": 1.0}, "`Chebyshev.l` must be at most L=1, got 2.0."),
    (bl.Sobolev, {"l": 2.0, "L": 1.0}, "`Sobolev.l` must be at most L=1, got 2.0."),
    (bl.AsymptoticSobolev, {"l": 2, "L": 1}, "`AsymptoticSobolev.l` must be at most L=1, got 2."),
    (bl.Chebyshev, {"l": 0.0, "L": 1.0}, "`Chebyshev.l` must be a positive number or 'auto', got 0.0."),
    (bl.Sobolev, {"l": -1.0, "L": 1.0}, "`Sobolev.l` must be a positive number or 'auto', got -1.0."),
    (bl.Chebyshev, {"l": 1.0, "L": float("inf")}, "`Chebyshev.L` must be a positive number or 'auto', got inf."),
    (bl.Chebyshev, {"l": 1.0, "L": float("nan")}, "`Chebyshev.L` must be a positive number or 'auto', got nan."),
    (bl.Chebyshev, {"l": "big", "L": 1.0}, "`Chebyshev.l` must be a positive number or 'auto', got 'big'."),
    (bl.Chebyshev, {"l": None, "L": 1.0}, "`Chebyshev.l` must be a positive number or 'auto', got None."),
    (bl.Chebyshev, {"l": True, "L": 1.0}, "`Chebyshev.l` must be a positive number or 'auto', got True."),
    (bl.Sobolev, {"alpha": -0.5}, "`Sobolev.alpha` must be a number above -1/2, got -0.5."),
    (bl.Sobolev, {"alpha": "one"}, "`Sobolev.alpha` must be a number above -1/2, got 'one'."),
    (bl.Sobolev, {"eta": 0.0}, "`Sobolev.eta` must be a positive number or 'auto', got 0.0."),
    (bl.Sobolev, {"eta": [1.0]}, "`Sobolev.eta` must be a positive number or 'auto', got [1.0]."),
    (bl.HeavyBall, {"first_step": "third"}, "`HeavyBall.first_step` must be 'full' or 'half', got 'third'."),
]


@pytest.mark.parametrize(("cls", "options", "sentence"), BAD)
def test_bad_options_are_refused_in_one_sentence(cls: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        cls(**options)
    assert str(caught.value) == sentence
