"""Adaptive truncation: extrapolated, budgeted and balanced hypergradients against exact ones at equal cost."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import quadratic_case

import bilevel as bl
from bilevel.core.options import describe
from bilevel.hypergrad.extrapolation import OMEGA, reduced_rank
from bilevel.numerics.conjugate_gradients import conjugate_gradients
from bilevel.problems import RidgeProblem

F64 = torch.float64
BUDGET, K = 400, 100
TAILS = range(46, 101, 6)


class LinearOuter(RidgeProblem):
    """Ridge with the outer loss v'w: the hypergradient is one VJP of the solution map."""

    def outer_loss(self, params: Any, hparams: Any) -> Any:
        return self.v @ params

    def outer_value_and_grads(self, params: Any, hparams: Any) -> Any:
        return self.v @ params, self.v, torch.zeros_like(hparams)


class Case:
    """The Gaussian problem: A of 200 x size, b, x_0 and v normal, penalties one, f = |Ax - b|^2 / 2 + u x^2 / 2."""

    def __init__(self, size: int, seed: int, best_step: bool, dtype: torch.dtype = F64) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g, dtype=F64)

        A, b, self.start, v = normal(200, size), normal(200), normal(size), normal(size)
        H = A.T @ A + torch.eye(size, dtype=F64)
        ends = torch.linalg.eigvalsh(H)
        low, high = float(ends[0]), float(ends[-1])
        self.step = 2 / (low + high) if best_step else 1 / high
        self.rho = 1 - self.step * low
        self.truth = -torch.linalg.solve(H, A.T @ b) * torch.linalg.solve(H, v)
        A, b, self.start = A.to(dtype), b.to(dtype), self.start.to(dtype)
        self.problem = LinearOuter(A, b, A, b, "per_feature", loss="sum", parametrization="direct")
        self.problem.v = v.to(dtype)
        self.u = torch.ones(size, dtype=dtype)
        self.solver = bl.GradientDescent(self.step, steps=K)

    def estimate(self, estimator: bl.HypergradEstimator, solver: Any = None, **options: Any) -> bl.Estimate:
        return bl.hypergradient(self.problem, solver or self.solver, estimator, self.u, self.start, **options)

    def error(self, estimate: bl.Estimate) -> float:
        return float(torch.linalg.vector_norm(estimate.hypergradient - self.truth) / self.truth.norm())

    def best_fixed_tail(self) -> float:
        return min(self.error(self.estimate(bl.AdaptiveUnroll(budget=BUDGET, tail=n), check=False)) for n in TAILS)


CASES = [(size, seed, best) for size in (60, 100, 170) for best in (False, True) for seed in (1,)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{'best' if c[2] else '1/L'}")
def case(request: pytest.FixtureRequest) -> Case:
    found = Case(*request.param)
    found.oracle = found.best_fixed_tail()
    return found


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_extrapolation_is_exact_where_the_differences_have_low_rank(rank: int) -> None:
    g = torch.Generator().manual_seed(rank)
    modes = torch.linalg.qr(torch.randn(20, rank, generator=g, dtype=F64))[0]
    rates = torch.linspace(-0.9, 0.97, rank, dtype=F64)
    limit = torch.randn(20, generator=g, dtype=F64)
    sequence = [limit + modes @ rates**i for i in range(rank + 4)]
    found = reduced_rank(sequence, (rank,))[0]
    assert float((found.vector - limit).norm()) < 1e-4 * float((sequence[-1] - limit).norm())
    assert found.order == rank


def test_extrapolation_of_a_sequence_that_stands_still_is_its_last_vector() -> None:
    z = [torch.ones(3, dtype=F64)] * 5
    assert reduced_rank(z, (2, 4))[0].vector is not None
    assert torch.equal(reduced_rank(z, (2, 4))[0].vector, z[0])


def test_cg_reports_the_ends_of_the_spectrum_and_stops_at_negative_curvature() -> None:
    values = torch.tensor([0.5, 1.0, 4.0], dtype=F64)
    b = torch.ones(3, dtype=F64)
    found = conjugate_gradients(lambda v: values * v, torch.zeros(3, dtype=F64), b, lambda run: run.steps == 3)
    assert found.spectrum() == pytest.approx((0.5, 4.0))
    torch.testing.assert_close(found.x, b / values)
    values[0] = -0.5
    found = conjugate_gradients(lambda v: values * v, torch.zeros(3, dtype=F64), b, lambda run: run.steps == 3)
    assert found.negative is not None
    assert found.negative < 0


# At equal cost -------------------------------------------------------------------------------------------------------


def test_automatic_tail_is_within_three_of_the_best_fixed_one(case: Case) -> None:
    estimate = case.estimate(bl.AdaptiveUnroll(budget=BUDGET))
    assert case.error(estimate) <= 3 * case.oracle
    assert estimate.cost.gradient_equivalents <= BUDGET + OMEGA


def test_extrapolated_sweep_is_ten_times_better_below_rate_98(case: Case) -> None:
    estimate = case.estimate(bl.AdaptiveUnroll(budget=BUDGET, extrapolate=True))
    assert case.error(estimate) <= (0.1 if case.rho <= 0.98 else 1.0) * case.oracle
    assert estimate.cost.gradient_equivalents <= BUDGET + OMEGA


def test_balanced_run_is_ten_times_better_and_knows_its_error(case: Case) -> None:
    estimate = case.estimate(bl.BalancedImplicit(budget=BUDGET))
    if -K * torch.log(torch.tensor(case.rho)) >= 2:
        assert case.error(estimate) <= 0.1 * case.oracle
    assert estimate.cost.gradient_equivalents <= BUDGET + OMEGA
    assert estimate.certificate.error_kind == "estimate"
    effectivity = estimate.certificate.error / (case.error(estimate) * float(case.truth.norm()))
    assert 0.7 < effectivity < 20


@pytest.mark.crossed
@pytest.mark.parametrize("budget", [30, 57, 100, 1001])
@pytest.mark.parametrize("solver", [bl.GradientDescent(), bl.Nesterov(momentum="auto"), bl.Adam(0.1)], ids=repr)
def test_no_budget_is_exceeded(solver: bl.InnerSolver, budget: float) -> None:
    case = Case(30, 3, True)
    estimators = [bl.AdaptiveUnroll(budget=budget), bl.AdaptiveUnroll(budget=budget, tail=0.5)]
    estimators.append(bl.BalancedImplicit(budget=budget))
    for estimator in estimators:
        # A small budget of Adam's steps ends far from the solution, and its own estimate says so.
        estimate = case.estimate(estimator, solver, on_failure="return")
        assert estimate.status.usable
        assert estimate.cost.gradient_equivalents <= budget + OMEGA, estimator


def test_budget_reallocates_what_the_tail_saves() -> None:
    case = Case(30, 3, True)
    # K = 100, N = 20, omega = 3: K(N) = 160 steps, 80 of them differentiated.
    estimate = case.estimate(bl.AdaptiveUnroll(budget=BUDGET, tail=80))
    assert (estimate.certificate.inner_steps, estimate.certificate.adjoint_steps) == (160, 80)
    same = case.estimate(bl.AdaptiveUnroll(budget=BUDGET, tail=0.8))
    plain = case.estimate(bl.TruncatedUnroll(80), bl.GradientDescent(case.step, steps=160))
    torch.testing.assert_close(estimate.hypergradient, plain.hypergradient, rtol=1e-12, atol=0)
    torch.testing.assert_close(same.hypergradient, plain.hypergradient, rtol=1e-12, atol=0)


def test_tail_is_chosen_among_the_stored_iterates_without_a_budget() -> None:
    case = Case(100, 4, True)
    fixed = [case.error(case.estimate(bl.TruncatedUnroll(n))) for n in range(5, K + 1, 5)]
    estimate = case.estimate(bl.AdaptiveUnroll())
    assert estimate.certificate.inner_steps == K
    assert case.error(estimate) <= 3 * min(fixed)


def test_tail_is_chosen_after_a_run_that_stopped_by_tolerance() -> None:
    case = Case(60, 5, False)
    for solver in (bl.GradientDescent(case.step, tol=1e-6), bl.GradientDescent(case.step, tol=1e30)):
        estimate = case.estimate(bl.AdaptiveUnroll(), solver)
        assert estimate.status.ok
        assert estimate.certificate.adjoint_steps >= 20
    precise = case.estimate(bl.AdaptiveUnroll(budget=3000), bl.GradientDescent(case.step, tol=1e-9))
    assert precise.certificate.inner_steps <= 3000 / (1 + OMEGA)
    assert case.error(precise) < 1e-9


def test_balanced_without_a_budget_follows_the_inner_tolerance() -> None:
    case = Case(60, 6, False)
    errors = []
    for tol in (1e-1, 1e-4, 1e-8):
        estimate = case.estimate(bl.BalancedImplicit(), bl.GradientDescent(case.step, tol=tol))
        errors.append(case.error(estimate))
        assert estimate.certificate.error is not None
    assert errors[2] < errors[1] < errors[0] < 0.1
    # At a loose tolerance CG stops as early as the forward run deserves.
    loose = case.estimate(bl.BalancedImplicit(), bl.GradientDescent(case.step, tol=1.0))
    assert loose.certificate.adjoint_steps < estimate.certificate.adjoint_steps


# Where it must not be trusted ----------------------------------------------------------------------------------------


def double_well(params: Any, u: Any) -> Any:
    x = params["x"]
    return (x**4 / 4 - x**2 / 2).sum() + (u * x).sum()


def well_problem(size: int = 6) -> bl.BilevelProblem:
    start = {"x": 0.02 + 0.01 * torch.arange(size, dtype=F64)}
    return bl.BilevelProblem(double_well, lambda params, u: params["x"].sum(), start)


U = torch.full((6,), -1e-3, dtype=F64)


def test_negative_curvature_falls_back_to_the_truncated_tail() -> None:
    estimate = bl.hypergradient(well_problem(), bl.GradientDescent(0.01), bl.BalancedImplicit(budget=200), U)
    assert "curvature" in estimate.certificate.error_note
    assert estimate.certificate.error is None
    assert estimate.certificate.adjoint_residual is None
    assert estimate.cost.gradient_equivalents <= 200 + OMEGA
    steps, tail = estimate.certificate.inner_steps, estimate.certificate.adjoint_steps
    assert tail > 10
    plain = bl.hypergradient(well_problem(), bl.GradientDescent(0.01, steps=steps), bl.TruncatedUnroll(tail), U)
    torch.testing.assert_close(estimate.hypergradient, plain.hypergradient)


def test_curvature_that_becomes_positive_on_the_way_is_used() -> None:
    estimate = bl.hypergradient(well_problem(), bl.GradientDescent(0.05), bl.BalancedImplicit(budget=600), U)
    exact = bl.hypergradient(well_problem(), bl.Newton(), bl.Implicit(), U, params=estimate.params)
    torch.testing.assert_close(estimate.hypergradient, exact.hypergradient, rtol=1e-4, atol=1e-6)
    assert estimate.certificate.adjoint_residual is not None


def test_extrapolation_says_why_it_did_not_happen() -> None:
    estimate = bl.hypergradient(
        well_problem(), bl.GradientDescent(0.01, steps=12), bl.AdaptiveUnroll(tail=3, extrapolate=True), U
    )
    plain = bl.hypergradient(well_problem(), bl.GradientDescent(0.01, steps=12), bl.TruncatedUnroll(3), U)
    if "no extrapolation" in estimate.certificate.error_note:
        torch.testing.assert_close(estimate.hypergradient, plain.hypergradient)
    short = bl.hypergradient(
        well_problem(), bl.GradientDescent(0.01, steps=2), bl.AdaptiveUnroll(tail=1, extrapolate=True), U
    )
    assert "no extrapolation: the run is too short" in short.certificate.error_note
    assert short.certificate.adjoint_steps == 1


@pytest.mark.parametrize(
    ("far", "steps", "reason"),
    [(1.0, 2000, "the inner gradient"), (1e10, 300, "it would raise the adjoint residual")],
    ids=["iterate", "adjoint"],
)
def test_what_extrapolation_does_not_improve_stays_the_plain_tail(far: float, steps: int, reason: str) -> None:
    case = quadratic_case()
    taken = (case.problem, bl.GradientDescent(steps=steps))
    start = far * torch.ones(6, dtype=F64)
    found, plain = (
        bl.hypergradient(*taken, bl.AdaptiveUnroll(tail=steps, extrapolate=extrapolate), case.hparams, start)
        for extrapolate in (True, False)
    )
    assert found.certificate.error_note.startswith(f"no extrapolation: {reason}")
    assert found.certificate.inner_residual <= plain.certificate.inner_residual
    assert found.certificate.adjoint_residual is None
    if far == 1.0:
        assert torch.equal(found.hypergradient, plain.hypergradient)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: bl.TruncatedUnroll("some"), "`TruncatedUnroll.tail` must be a positive int"),
        (lambda: bl.AdaptiveUnroll(budget=3), "`AdaptiveUnroll.budget` must be at least 4 gradient-equiv"),
        (lambda: bl.AdaptiveUnroll(budget=-1.0, tail=5), "`AdaptiveUnroll.budget` must be a positive number or None"),
        (
            lambda: bl.AdaptiveUnroll(budget=400, tail=120),
            "is 120, but the budget 400 pays for 100 differentiated steps",
        ),
        (lambda: bl.AdaptiveUnroll(tail=5, extrapolate=1), "`AdaptiveUnroll.extrapolate` must be True or False"),
        (lambda: bl.Implicit(balance="yes"), "`Implicit.balance` must be 'auto' or None, got 'yes'"),
        (lambda: bl.Implicit(budget=100), "`Implicit.budget` must be None: BalancedImplicit takes a budget, got 100"),
        (
            lambda: bl.BalancedImplicit(max_steps=0),
            "`BalancedImplicit.max_steps` must be a positive int or None, got 0",
        ),
        (lambda: bl.BalancedImplicit(budget=8), "`BalancedImplicit.budget` must be at least 25 gradient-equivalents"),
        (
            lambda: bl.Implicit(bl.GMRES(), balance="auto"),
            "`Implicit.linear_solver` must be CG, without `steps`, where balance='auto'",
        ),
    ],
)
def test_options_that_cannot_work_are_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"must be|pays for") as caught:
        make()
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_extrapolation_is_refused_for_heavy_ball_and_for_solvers_without_a_linear_sweep() -> None:
    case = Case(20, 1, True)
    estimator = bl.AdaptiveUnroll(budget=BUDGET, extrapolate=True)
    with pytest.raises(ValueError, match="refused for HeavyBall"):
        case.estimate(estimator, bl.HeavyBall(0.001, momentum=0.5, steps=50))
    with pytest.raises(ValueError, match="linear multistep solver"):
        case.estimate(estimator, bl.Adam(0.1, steps=50))


def test_a_budget_that_the_measured_step_size_uses_up_is_one_sentence() -> None:
    problem = bl.BilevelProblem(
        lambda x, u: (x - u).square().sum() / 2 + (x[0] - x[1]) ** 2, lambda x, u: x.sum(), torch.zeros(8, dtype=F64)
    )
    u = torch.ones(8, dtype=F64)
    with pytest.raises(ValueError, match="too few for one derivative step"):
        bl.hypergradient(problem, bl.GradientDescent(), bl.AdaptiveUnroll(budget=5, tail=1), u)


# Everywhere else it must just work -----------------------------------------------------------------------------------

ESTIMATORS = [
    bl.AdaptiveUnroll(budget=600),
    bl.AdaptiveUnroll(),
    bl.AdaptiveUnroll(budget=600, extrapolate=True),
    bl.AdaptiveUnroll(tail=60, extrapolate=True),
    bl.BalancedImplicit(budget=600),
    bl.BalancedImplicit(),
]


def dict_problem(dtype: torch.dtype) -> tuple[bl.BilevelProblem, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 5, generator=g, dtype=F64).to(dtype), torch.randn(40, generator=g, dtype=F64).to(dtype)

    def inner(p: Any, u: Any) -> Any:
        return (
            ((X @ p["w"] + p["b"] - y) ** 2).mean() / 2 + (u["log"].exp() * p["w"] ** 2).sum() / 2 + 0.1 * p["b"] ** 2
        )

    def outer(p: Any, u: Any) -> Any:
        return ((X[:10] @ p["w"] + p["b"]) ** 2).mean()

    start = {"w": torch.zeros(5, dtype=dtype), "b": torch.zeros((), dtype=dtype)}
    return bl.BilevelProblem(inner, outer, start), {"log": torch.full((5,), -1.0, dtype=dtype)}


@pytest.mark.parametrize(
    ("solver", "dtype"),
    [
        (bl.GradientDescent(0.3, steps=150), torch.float64),
        (bl.Nesterov(0.3, momentum=0.5, steps=150), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_trees_dtypes_and_warm_starts(estimator: Any, solver: Any, dtype: torch.dtype) -> None:
    problem, u = dict_problem(dtype)
    exact = bl.hypergradient(problem, bl.Newton(), bl.Implicit(bl.Direct()), u).hypergradient["log"]
    first = bl.hypergradient(problem, solver, estimator, u)
    second = bl.hypergradient(problem, solver, estimator, u, carry=first.carry)
    rtol = 1e-6 if dtype == F64 else 2e-3
    for estimate in (first, second):
        torch.testing.assert_close(estimate.hypergradient["log"], exact, rtol=rtol, atol=rtol * float(exact.norm()))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_the_layer_takes_any_cotangent(estimator: Any) -> None:
    problem, u = dict_problem(F64)
    u = {"log": u["log"].requires_grad_()}
    layer = bl.solution(problem, bl.GradientDescent(0.3, steps=150), estimator, u)
    layer["w"][0].backward()
    found = u["log"].grad.clone()
    u["log"].grad = None
    bl.solution(problem, bl.Newton(), bl.Implicit(bl.Direct()), u)["w"][0].backward()
    torch.testing.assert_close(found, u["log"].grad, rtol=1e-6, atol=1e-7)


def test_the_outer_loop_runs_with_a_budget() -> None:
    problem, u = dict_problem(F64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outer = bl.OuterOptimizer(
            problem,
            bl.GradientDescent(0.3),
            bl.BalancedImplicit(budget=60),
            u,
            optimizer=lambda leaves: torch.optim.Adam(leaves, lr=0.1),
        )
        result = outer.run(5)
    assert result is not None


# Old options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "new", "said"),
    [
        (bl.TruncatedUnroll, {"tail": "auto"}, bl.AdaptiveUnroll(), "AdaptiveUnroll()"),
        (
            bl.TruncatedUnroll,
            {"tail": "auto", "budget": 100, "extrapolate": True},
            bl.AdaptiveUnroll(100, extrapolate=True),
            "AdaptiveUnroll(budget=100, extrapolate=True)",
        ),
        (bl.TruncatedUnroll, {"tail": 9, "budget": 90}, bl.AdaptiveUnroll(90, 9), "AdaptiveUnroll(budget=90, tail=9)"),
        (bl.Implicit, {"balance": "auto"}, bl.BalancedImplicit(), "BalancedImplicit()"),
        (
            bl.Implicit,
            {"linear_solver": bl.CG(max_steps=5), "damping": 0.1, "balance": "auto", "budget": 200},
            bl.BalancedImplicit(200, damping=0.1, max_steps=5),
            "BalancedImplicit(budget=200, damping=0.1, max_steps=5)",
        ),
    ],
)
def test_old_options_forward_to_the_same_numbers(cls: Any, options: Any, new: Any, said: str) -> None:
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        old = cls(**options)
    assert str(caught[0].message) == f"{cls.__name__} with these options is now {said}."
    assert caught[0].filename == __file__
    assert isinstance(old, cls)
    assert all(f"{name}={value!r}" in describe(old) for name, value in options.items() if isinstance(value, str | int))
    assert old.one_by_one(bl.GradientDescent())
    assert (old.differentiates_steps, old.resumes) == (new.differentiates_steps, new.resumes)
    problem, u = dict_problem(F64)
    first, second = (bl.hypergradient(problem, bl.GradientDescent(0.3, steps=60), each, u) for each in (old, new))
    assert torch.equal(first.hypergradient["log"], second.hypergradient["log"])
    assert first.cost.counts == second.cost.counts
    if not getattr(new, "budget", None):
        assert old.at_tolerance(1e-3) == new.at_tolerance(1e-3)
