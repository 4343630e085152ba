"""Outer searches: the trust region, coordinates, hyper-Hessians, true endings, and runs that go on bit for bit."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine

import bilevel as bl
from bilevel import oracles, problems
from bilevel.outer.coordinates import Coordinates, Shrinkage, Softplus
from bilevel.outer.hyper_lbfgs import cubic, two_loop
from bilevel.outer.search import Answer
from bilevel.outer.trust_region import ball_step, box_step

F64 = torch.float64


# Independent arithmetic: ridge regression with a log penalty for each feature, by numpy -------------------------------


class Ridge:
    """h(u), its gradient, and its Gauss-Newton and exact second derivatives, from ``w = (G + diag e^u)^-1 b``."""

    def __init__(self, seed: int, rows: int = 60, features: int = 6) -> None:
        rng = np.random.default_rng(seed)
        self.parts = []
        truth = rng.standard_normal(features) * (rng.random(features) < 0.6)
        for _ in range(2):
            X = rng.standard_normal((rows, features)) * np.logspace(0, 1, features)
            self.parts += [X, X @ (truth / np.logspace(0, 1, features)) + rng.standard_normal(rows)]
        X, y, Xv, yv = self.parts
        self.G, self.b, self.Gv, self.bv = X.T @ X / rows, X.T @ y / rows, Xv.T @ Xv / rows, Xv.T @ yv / rows
        self.c = yv @ yv / rows
        self.centre = np.log(np.diag(self.G))

    def at(self, u: np.ndarray) -> Answer:
        p = np.exp(u)
        H = self.G + np.diag(p)
        w = np.linalg.solve(H, self.b)
        a = np.linalg.solve(H, self.Gv @ w - self.bv)
        J = -np.linalg.solve(H, np.diag(p * w))
        gauss_newton = J.T @ self.Gv @ J
        mixed = np.diag(p * a) @ J
        exact = gauss_newton - mixed - mixed.T - np.diag(p * w * a)
        value = 0.5 * (w @ self.Gv @ w - 2 * self.bv @ w + self.c)
        return Answer(value, -p * w * a, 0.0, (gauss_newton, exact))

    def coordinates(self, kind: type[Coordinates] = Shrinkage) -> Coordinates:
        return kind(self.centre, self.centre - 28.0, self.centre + 10.0)

    def starts(self, count: int) -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        return [self.centre + rng.uniform(-6, 4) + 1.5 * rng.standard_normal(len(self.b)) for _ in range(count)]

    def problem(self, **options) -> bl.BilevelProblem:
        return bl.problems.RidgeProblem(*map(torch.from_numpy, self.parts), "per_feature", **options)


def searched(rule, ridge, u, change=lambda count, answer: answer, most=100):
    """Run a search by ask and tell; returns its last state and all values, as they were told."""
    state, values = rule.init(u, ridge.coordinates()), []
    while True:
        state = rule.propose(state)
        if state.trial is None and not state.stopped:  # second derivatives are wanted, and there are none
            accepted = replace(state.accepted, answer=replace(state.accepted.answer, second=()))
            state = rule.propose(replace(state, accepted=accepted))
        if state.stopped or len(values) == most:
            return state, values
        answer = change(len(values) + 1, ridge.at(state.trial.u))
        values.append(math.nan if answer is None else answer.value)
        state = rule.tell(state, answer)


SCAN = {"start": "scan"}


# The parts -----------------------------------------------------------------------------------------------------------


def test_steps_in_a_ball_satisfy_the_conditions_of_a_global_minimiser():
    rng = np.random.default_rng(0)
    for trial in range(400):
        k = int(rng.integers(1, 9))
        A = rng.standard_normal((k, k))
        B = (A @ A.T if trial % 3 == 0 else A + A.T) * 10.0 ** rng.uniform(-5, 5)
        g = rng.standard_normal(k) * 10.0 ** rng.uniform(-5, 5)
        values, vectors = np.linalg.eigh(B)
        if trial % 5 == 0 and k > 1:  # the hard case: no slope along the lowest eigenvector
            g = vectors[:, 1:] @ rng.standard_normal(k - 1)
        radius = 10.0 ** rng.uniform(-3, 3)
        s = ball_step(g, B, radius)
        length, size = float(np.linalg.norm(s)), float(np.abs(values).max())
        assert length <= radius * (1 + 1e-9)
        shift = max(0.0, -float(s @ (B @ s + g)) / length**2)
        assert np.linalg.norm(B @ s + shift * s + g) <= 1e-9 * (np.linalg.norm(g) + size * length)
        assert values[0] + shift >= -1e-6 * size
        assert shift <= 1e-8 * size or length >= (1 - 1e-4) * radius


def test_steps_in_a_box_stay_in_it_and_no_small_change_is_better():
    rng = np.random.default_rng(0)
    for trial in range(100):
        k = int(rng.integers(1, 7))
        A = rng.standard_normal((k, k))
        B, g = (A @ A.T if trial % 2 else A + A.T), rng.standard_normal(k)
        lower, upper = -rng.random(k) * (rng.random(k) < 0.7), rng.random(k) * (rng.random(k) < 0.7)
        radius = float(rng.uniform(0.1, 2))
        s, decrease = box_step(g, B, radius, lower, upper)

        def model(x, g=g, B=B):
            return float(g @ x + 0.5 * x @ B @ x)

        assert np.all((s >= lower - 1e-12) & (s <= upper + 1e-12))
        assert np.linalg.norm(s) <= radius * (1 + 1e-9)
        assert decrease == pytest.approx(-model(s), abs=1e-12)
        around = np.clip(s + 0.01 * rng.standard_normal((200, k)), lower, upper)
        inside = around[np.linalg.norm(around, axis=1) <= radius]
        if trial % 2 and len(inside):  # convex: what is better nearby is better by little
            assert min(map(model, inside)) >= -decrease - 2e-3 * max(decrease, 1e-3)


@pytest.mark.parametrize("kind", [Coordinates, Shrinkage, Softplus])
def test_coordinates_have_the_derivatives_that_differences_see(kind):
    c = np.array([0.3, -2.0, 5.0])
    coordinates = kind(c, c - 28.0, c + 10.0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        u, e = c + rng.uniform(-6, 6, 3), 1e-5
        v = coordinates.of(u)
        np.testing.assert_allclose(coordinates.back(v), u, rtol=0, atol=1e-9)
        numeric = (coordinates.of(u + e) - coordinates.of(u - e)) / (2 * e)
        np.testing.assert_allclose(coordinates.slope(u), numeric, rtol=1e-6)
        h = 1e-4 * np.abs(coordinates.slope(u))
        bend = (coordinates.back(v + h) - 2 * u + coordinates.back(v - h)) / h**2
        np.testing.assert_allclose(coordinates.bend(u), bend, rtol=1e-3, atol=1e-6)
        lower, upper = coordinates.room(u)
        assert np.all(lower <= 0)
        assert np.all(upper >= 0)
        ends = sorted([coordinates.back(v + lower)[0], coordinates.back(v + upper)[0]])
        np.testing.assert_allclose(ends, [c[0] - 28.0, c[0] + 10.0], atol=1e-2)


def test_second_derivatives_in_shrinkage_are_those_of_differences():
    ridge = Ridge(0)
    at, u = ridge.coordinates(), ridge.starts(1)[0]
    answer = ridge.at(u)
    t, slopes = at.of(u), answer.gradient / at.slope(u)
    _, (_, model) = at.models(u, answer.gradient, answer.second)
    e = 1e-6
    for j in range(len(u)):
        sides = []
        for sign in (1, -1):
            moved = t.copy()
            moved[j] += sign * e * t[j] * (1 - t[j])
            back = ridge.centre - np.log(moved / (1 - moved))
            sides.append(ridge.at(back).gradient / at.slope(back))
        numeric = (sides[0] - sides[1]) / (2 * e * t[j] * (1 - t[j]))
        np.testing.assert_allclose(model[:, j], numeric, rtol=1e-4, atol=1e-4 * np.abs(model).max())
    assert np.all(np.isfinite(slopes))


def test_the_cubic_through_two_points_has_its_minimum_where_it_is_flat():
    f = np.polynomial.Polynomial([1.0, -2.0, 0.5, 3.0])
    flat = [r.real for r in f.deriv().roots() if f.deriv(2)(r.real) > 0]
    assert cubic(f(0), f.deriv()(0), f(1), f.deriv()(1)) == pytest.approx(flat[0])
    assert cubic(0.0, -1.0, math.nan, 1.0) == 0.5


def test_two_loop_inverts_a_quadratic_on_the_free_variables():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((4, 4))
    B = A @ A.T + np.eye(4)
    free = np.array([True, True, False, True])
    F = B[np.ix_(free, free)]
    # Conjugate steps on the free variables make L-BFGS exact.
    pairs, basis = [], np.linalg.inv(np.linalg.cholesky(F)).T
    for column in basis.T:
        s = np.zeros(4)
        s[free] = column
        y = np.zeros(4)
        y[free] = F @ column
        pairs.append((s, y))
    g = rng.standard_normal(4)
    d = two_loop(g, free, tuple(pairs))
    np.testing.assert_allclose(d[free], -np.linalg.solve(F, g[free]), rtol=1e-9)
    assert d[2] == 0.0


# Hyper-Hessians ------------------------------------------------------------------------------------------------------


def data(kind, seed, rows=40, features=4):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, features, generator=generator, dtype=F64)
    z = X @ torch.linspace(-1, 1, features, dtype=F64) + 0.5 * torch.randn(rows, generator=generator, dtype=F64)
    if kind == "SoftmaxProblem":
        return X, (z > -0.5).long() + (z > 0.5).long()
    if kind == "PoissonProblem":
        return X, torch.poisson(z.mul(0.3).exp(), generator=generator)
    return X, z if kind in ("RidgeProblem", "HuberProblem") else (z > 0).long()


FAMILIES = {
    "RidgeProblem": ("scalar", "per_feature"),
    "LogisticProblem": ("scalar", "per_feature"),
    "SoftmaxProblem": ("per_class", "per_weight"),
    "PoissonProblem": ("per_feature",),
    "HuberProblem": ("per_feature",),
    "SquaredHingeProblem": ("per_feature",),
}


@pytest.mark.parametrize("parametrization", ["log", "direct"])
@pytest.mark.parametrize(("family", "penalty"), [(f, p) for f, each in FAMILIES.items() for p in each])
def test_hyper_hessians_are_the_differences_of_hypergradients(family, penalty, parametrization):
    problem = getattr(bl.problems, family)(*data(family, 0), *data(family, 1), penalty, parametrization=parametrization)
    u = problem.initial_hparams(-1.5 if parametrization == "log" else 0.2)
    u = u + 0.1 * torch.rand(u.shape, generator=torch.Generator().manual_seed(0), dtype=F64)

    def estimate(u):
        return bl.hypergradient(problem, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct()), u)

    here = estimate(u)
    gauss_newton, exact = problem.hyper_hessians(u, here.params, here.carry.adjoint)
    along, e = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=F64), 1e-5
    numeric = (estimate(u + e * along).hypergradient - estimate(u - e * along).hypergradient).reshape(-1) / (2 * e)
    torch.testing.assert_close(exact @ along.reshape(-1), numeric, rtol=1e-6, atol=1e-8)
    # The form for any loss, by autograd, knows nothing of linear models.
    for mine, other in zip(
        (gauss_newton, exact),
        bl.BilevelProblem.hyper_hessians(problem, u, here.params, here.carry.adjoint),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("family", ["RidgeProblem", "SoftmaxProblem"])
def test_hyper_hessians_of_many_inner_variables_are_solved_for_column_by_column(family, monkeypatch):
    problem = getattr(bl.problems, family)(*data(family, 0), *data(family, 1), "per_feature")
    u = problem.initial_hparams(-1.5)
    here = bl.hypergradient(problem, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct()), u)
    factored = problem.hyper_hessians(u, here.params, here.carry.adjoint)
    for module in (oracles.hyper_hessian, problems.hyper_hessian):
        monkeypatch.setattr(module, "MAX_PARAMS", 3)
    for form in (problem.hyper_hessians, partial(bl.BilevelProblem.hyper_hessians, problem)):
        for mine, other in zip(form(u, here.params, here.carry.adjoint), factored, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-9)
    for module in (oracles.hyper_hessian, problems.hyper_hessian):
        monkeypatch.setattr(module, "MAX_TANGENTS", 3)
    assert problem.hyper_hessians(u, here.params, here.carry.adjoint) is None
    assert bl.BilevelProblem.hyper_hessians(problem, u, here.params, here.carry.adjoint) is None
    # Where H is not positive definite there is no minimum to differentiate.
    assert oracles.hyper_hessian.solved(lambda v: -v, torch.ones(2, 1, dtype=F64)) is None


def tree_problem():
    def inner(w, u):
        a, b = w["a"], w["b"]
        fits = ((a - u["m"]) ** 4).sum() + (u["s"].exp() * b**2).sum() + (b - 1).pow(2).sum()
        return fits + 0.1 * (a @ b) ** 2 + (a**2).sum()

    def outer(w, u):
        return w["a"].sin().sum() + (w["b"] - u["m"]).pow(2).sum() + u["s"].pow(3)

    return bl.BilevelProblem(inner, outer, params={"a": torch.ones(3, dtype=F64), "b": torch.zeros(3, dtype=F64)})


def test_hyper_hessians_of_dicts_and_of_outer_losses_that_see_the_hyperparameters():
    problem = tree_problem()
    u = {"m": torch.tensor([0.3, 0.1, -0.2], dtype=F64), "s": torch.tensor(0.4, dtype=F64)}

    def estimate(shift):
        moved = {"m": u["m"] + shift[:3], "s": u["s"] + shift[3]}
        return bl.hypergradient(problem, bl.Newton(tol=1e-13), bl.Implicit(bl.Direct()), moved)

    here = estimate(torch.zeros(4, dtype=F64))
    _, exact = problem.hyper_hessians(u, here.params, here.carry.adjoint)
    for j in range(4):
        e = torch.zeros(4, dtype=F64)
        e[j] = 1e-5
        up, down = (torch.cat([x.hypergradient["m"], x.hypergradient["s"][None]]) for x in (estimate(e), estimate(-e)))
        torch.testing.assert_close(exact[:, j], (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


# HyperNewton by ask and tell ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_newton_reaches_the_minimum_from_every_start_and_says_what_is_left(seed):
    ridge = Ridge(seed)
    ends = [searched(bl.HyperNewton(**SCAN), ridge, u) for u in ridge.starts(6)]
    best = min(searched(bl.HyperNewton(tol=1e-13, **SCAN), ridge, u)[0].accepted.answer.value for u in ridge.starts(6))
    for state, values in ends:
        assert state.stopped.startswith("converged to a local minimum")
        assert state.accepted.answer.value <= best * (1 + 3e-6)
        assert len(values) <= 25


@pytest.mark.parametrize("kind", [bl.HyperNewton, bl.HyperLBFGS])
def test_converged_is_true_at_every_tolerance(kind):
    for seed in range(4):
        ridge = Ridge(seed, rows=30, features=4)
        for u in ridge.starts(3):
            for tol in (1e-4, 1e-6, 1e-8):
                state, _ = searched(kind(tol, "given"), ridge, u)
                assert state.stopped.startswith("converged"), state.stopped
                rule = bl.HyperNewton(1e-14, "given")
                further, _ = searched(rule, ridge, state.accepted.u, most=60)
                value = state.accepted.answer.value
                assert value - further.accepted.answer.value <= 3 * tol * value


def test_a_rejected_step_towards_strong_penalties_does_not_shorten_the_way_to_weak_ones():
    ridge = Ridge(0)
    rule, u = bl.HyperNewton(start="given"), ridge.centre.copy()
    state = rule.propose(rule.init(u, ridge.coordinates()))
    first = rule.propose(rule.tell(state, ridge.at(u)))
    for change, reach in ((0.2, first.reach), (-0.2, first.reach), (-3.0, 0.3 * 3.0)):
        trial = replace(first.trial, u=u + change)
        told = rule.tell(replace(first, trial=trial), replace(ridge.at(u), value=1e3))
        assert told.reach == pytest.approx(reach)
        assert told.radius < first.radius


def test_a_rejected_step_at_the_weak_end_is_followed_by_a_shorter_one():
    ridge = Ridge(0, features=1)
    rule, u = bl.HyperNewton(start="given"), ridge.centre - 20.0
    answer = Answer(1.0, np.ones(1), 0.0, (np.zeros((1, 1)), np.zeros((1, 1))))
    first = rule.propose(rule.tell(rule.propose(rule.init(u, ridge.coordinates())), answer))
    assert 0 < first.trial.length < 1e-8  # in shrinkages near one
    told = rule.propose(rule.tell(first, replace(answer, value=2.0)))
    assert told.trial.kind == "step"
    assert 0 < told.trial.length < first.trial.length


WRONG = {
    "sign of one slope": lambda k, a, r: replace(a, gradient=a.gradient * np.where(np.arange(6) == 2, -1, 1)),
    "bias": lambda k, a, r: replace(a, gradient=0.5 * a.gradient + 0.05 * np.abs(a.gradient).max()),
    "noise": lambda k, a, r: replace(a, value=a.value * (1 + 1e-4 * r.standard_normal())),
    "renewed data": lambda k, a, r: replace(
        a, value=a.value * (1 + 0.02 * r.standard_normal()), gradient=a.gradient * (1 + 0.3 * r.standard_normal(6))
    ),
    "second derivatives": lambda k, a, r: replace(a, second=tuple(0.2 * each for each in a.second)),
}


@pytest.mark.parametrize("kind", [bl.HyperNewton, bl.HyperLBFGS])
@pytest.mark.parametrize("fault", WRONG)
def test_converged_is_never_said_of_wrong_numbers(fault, kind):
    for seed in range(3):
        ridge, rng = Ridge(seed), np.random.default_rng(seed)
        for u in ridge.starts(2):
            state, _ = searched(kind(**SCAN), ridge, u, lambda k, a, rng=rng: WRONG[fault](k, a, rng))
            assert "converged" not in state.stopped
            if kind is bl.HyperNewton and fault in ("noise", "renewed data"):
                assert state.stopped.startswith("the outer loss is no function of the hyperparameters")


def test_noise_that_is_known_ends_at_the_accuracy_of_the_inner_solver():
    ridge, rng = Ridge(0), np.random.default_rng(0)

    def noisy(k, a):
        return replace(a, value=a.value * (1 + 1e-4 * rng.standard_normal()), error=1e-4 * a.value)

    state, _ = searched(bl.HyperNewton(**SCAN), ridge, ridge.starts(1)[0], noisy)
    assert state.stopped.startswith("at the accuracy of the inner solver")
    assert "lower the inner tolerance" in state.stopped


def test_failed_evaluations_are_rejected_trials():
    ridge = Ridge(1)
    u = ridge.starts(1)[0]
    clean, _ = searched(bl.HyperNewton(**SCAN), ridge, u)
    broken, values = searched(bl.HyperNewton(**SCAN), ridge, u, lambda k, a: None if k in (1, 4, 8, 11) else a)
    assert math.isnan(values[3])
    assert broken.accepted.answer.value == pytest.approx(clean.accepted.answer.value, rel=1e-5)
    assert broken.stopped.startswith("converged")
    nothing, _ = searched(bl.HyperNewton(**SCAN), ridge, u, lambda k, a: None)
    assert nothing.stopped == "every point of the scan failed"
    given, _ = searched(bl.HyperNewton(start="given"), ridge, u, lambda k, a: None)
    assert given.stopped == "the first hypergradient failed"


@pytest.mark.parametrize("rule", [bl.HyperNewton(**SCAN), bl.HyperLBFGS(**SCAN)], ids=repr)
def test_a_search_whose_evaluations_fail_from_some_point_on_says_so(rule):
    ridge = Ridge(1)
    state, values = searched(rule, ridge, ridge.starts(1)[0], lambda k, a: a if k < 9 else None)
    assert state.stopped.startswith("not converged: hypergradients around the best point fail")
    assert state.accepted.answer.value == min(values[:8])


def test_lbfgs_without_second_derivatives_descends_and_never_says_converged():
    for seed in range(3):
        ridge = Ridge(seed)
        best = searched(bl.HyperNewton(tol=1e-12, **SCAN), ridge, ridge.starts(1)[0])[0].accepted.answer.value
        for u in ridge.starts(3):
            state, _ = searched(bl.HyperLBFGS(**SCAN), ridge, u, lambda k, a: replace(a, second=None))
            assert state.accepted.answer.value <= best * 1.01
            assert state.stopped.startswith("no further step is foreseen")
            assert "cannot prove" in state.stopped


def test_a_slope_of_the_wrong_sign_shows_at_the_end_without_second_derivatives():
    for seed in range(3):
        for index, u in enumerate(Ridge(seed).starts(6)):
            signs = np.where(np.arange(6) == index, -1.0, 1.0)
            state, _ = searched(
                bl.HyperLBFGS(**SCAN),
                Ridge(seed),
                u,
                lambda k, a, signs=signs: replace(a, gradient=a.gradient * signs, second=None),
            )
            assert not state.stopped.startswith("no further step is foreseen"), (seed, index)


def test_lbfgs_outruns_adam_where_the_best_penalties_lie_far_out_at_the_weak_end():
    X, y = load_wine(return_X_y=True)
    X, y = torch.from_numpy((X - X.mean(0)) / X.std(0)), torch.from_numpy(y)
    problem = bl.problems.SoftmaxProblem(X[::4], y[::4], X[1::4], y[1::4], "per_weight")
    u = problem.initial_hparams(-3.0)
    ours = outer_of(problem, u, bl.HyperLBFGS())
    assert type(ours.search.each[0].state.coordinates) is Softplus
    adam = outer_of(problem, u, lambda tensors: torch.optim.Adam(tensors, lr=1.0))
    losses = [outer.run(30, progress=False).best_loss for outer in (ours, adam)]
    assert losses[0] < 0.1 * losses[1]
    quadratic = outer_of(Ridge(0).problem(), torch.from_numpy(Ridge(0).centre), bl.HyperLBFGS())
    assert type(quadratic.search.each[0].state.coordinates) is Shrinkage


# In the outer loop ---------------------------------------------------------------------------------------------------


def outer_of(problem, u, rule=None, **options):
    return bl.OuterOptimizer(problem, bl.QuasiNewton(), bl.Implicit(), u, rule or bl.HyperNewton(), **options)


def test_the_loop_finds_what_numpy_finds():
    ridge = Ridge(0)
    u = torch.from_numpy(ridge.starts(1)[0])
    state, values = searched(bl.HyperNewton(**SCAN), ridge, u.numpy())
    problem = ridge.problem()
    torch.testing.assert_close(problem.penalty_scales(u), torch.from_numpy(ridge.centre).exp())
    result = outer_of(problem, u).run(50, progress=False)
    assert result.stopped.startswith("converged to a local minimum: about ")
    assert len(result.history) == len(values)
    np.testing.assert_allclose([record.outer_loss for record in result.history], values, rtol=1e-8)
    torch.testing.assert_close(result.hparams.exp(), torch.from_numpy(state.accepted.u).exp(), rtol=1e-4, atol=1e-6)
    assert torch.equal(result.hparams, result.best_hparams)
    assert result.best_loss == min(record.outer_loss for record in result.history)
    assert {record.phase for record in result.history} == {"scan", "step", "probe"}
    assert [record.accepted for record in result.history][-1] is False
    assert result.history[-2].predicted > 0


@pytest.mark.parametrize("rule", [bl.HyperNewton(), bl.HyperLBFGS()], ids=repr)
def test_a_run_that_is_saved_after_any_evaluation_goes_on_bit_for_bit(rule):
    problem = Ridge(2).problem()
    u = torch.from_numpy(Ridge(2).starts(1)[0])
    whole = outer_of(problem, u, rule)
    result = whole.run(12, progress=False)
    state = None
    for _ in result.history:
        part = outer_of(problem, u, rule)
        if state is not None:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            part.load_state_dict(torch.load(file, weights_only=True))
        part.step()
        state = part.state_dict()
    assert [record.outer_loss for record in part.history] == [record.outer_loss for record in result.history]
    assert torch.equal(part.hparams, result.hparams)


def test_rows_are_searched_each_with_its_own_phase_and_end():
    problem, starts = Ridge(1).problem(), Ridge(1).starts(3)
    u = torch.from_numpy(np.stack(starts))
    together = outer_of(problem, u, batch=3).run(40, progress=False)
    alone = [outer_of(problem, torch.from_numpy(start)).run(40, progress=False) for start in starts]
    assert len({len(history) for history in together.history}) > 1
    for i, single in enumerate(alone):
        assert together.stopped[i].startswith("converged")
        assert len(together.history[i]) == len(single.history)
        losses = [[record.outer_loss for record in each] for each in (together.history[i], single.history)]
        np.testing.assert_allclose(*losses, rtol=1e-7)
        torch.testing.assert_close(together[i].hparams.exp(), single.hparams.exp(), rtol=1e-4, atol=1e-6)
    parts, state = outer_of(problem, u, batch=3), None
    for _ in range(5):
        parts = outer_of(problem, u, batch=3)
        if state is not None:
            parts.load_state_dict(state)
        parts.step()
        state = parts.state_dict()
    again = outer_of(problem, u, batch=3).run(5, progress=False)
    assert [[r.outer_loss for r in h] for h in parts.history] == [[r.outer_loss for r in h] for h in again.history]


def test_a_target_error_certifies_the_end_of_a_search():
    problem = Ridge(0).problem()
    outer = outer_of(problem, torch.from_numpy(Ridge(0).starts(1)[0]), target_error=1e-4)
    result = outer.run(50, progress=False)
    *search, last = result.history
    assert result.stopped.startswith("converged")
    assert {record.error_kind for record in search} == {"none"}
    assert (last.phase, last.error_kind, last.status) == ("certified", "bound", "OK")
    assert last.error <= 1e-4 / (1 + 1e-4) * last.hypergradient_norm * (1 + 1e-9)
    assert len(outer.run(50, progress=False).history) == len(result.history)


def test_a_run_that_is_cut_off_says_how_much_may_be_left():
    problem = Ridge(0).problem()
    u = torch.from_numpy(Ridge(0).starts(1)[0])
    result = outer_of(problem, u).run(8, progress=False)
    assert "took 8 steps, not converged: about " in result.stopped
    assert "% of the outer loss may be left" in result.stopped
    assert "nothing is foreseen yet" in outer_of(problem, u).run(2, progress=False).stopped


def test_an_end_names_the_penalties_at_their_limits_though_shrinkages_near_one_are_rounded():
    ridge = Ridge(0)
    result = outer_of(ridge.problem(), torch.from_numpy(ridge.starts(1)[0])).run(50, progress=False)
    shifts = result.hparams.numpy() - ridge.centre
    dead, free = int((shifts > 9.99).sum()), int((shifts < -21.0).sum())
    assert dead
    assert free > 1
    assert result.stopped.endswith(
        f"; {dead} of 6 at the upper limit (weights shrunk to zero); {free} of 6 at the lower limit "
        "(weights without a penalty)"
    )


def test_a_search_that_has_ended_stays_where_it_is():
    problem = Ridge(0).problem()
    outer = outer_of(problem, torch.from_numpy(Ridge(0).starts(1)[0]))
    result = outer.run(50, progress=False)
    again = outer.run(50, progress=False)
    assert (again.stopped, len(again.history)) == (result.stopped, len(result.history))
    estimate = outer.step()
    assert estimate.outer_loss == pytest.approx(result.best_loss, rel=1e-8)
    assert len(outer.history) == len(result.history)
    assert torch.equal(outer.hparams, result.hparams)
    assert outer.run(50, progress=False).stopped == result.stopped


def test_general_losses_in_a_dict_converge():
    problem = tree_problem()
    u = {"m": torch.zeros(3, dtype=F64), "s": torch.zeros((), dtype=F64)}
    limits = {"s": torch.distributions.constraints.interval(-1.0, 1.0)}
    outer = bl.OuterOptimizer(
        problem, bl.Newton(), bl.Implicit(bl.Direct()), u, bl.HyperNewton(tol=1e-9), constraints=limits
    )
    result = outer.run(60, progress=False)
    assert result.stopped.startswith("converged"), result.stopped
    assert -1.0 <= float(result.hparams["s"]) <= 1.0
    here = bl.hypergradient(problem, bl.Newton(), bl.Implicit(bl.Direct()), result.hparams).hypergradient
    assert float(here["m"].norm()) < 1e-3


def test_values_are_corrected_to_those_at_the_inner_solution():
    ridge = Ridge(0)
    u = torch.from_numpy(ridge.centre)
    exact = ridge.at(u.numpy()).value
    estimate = bl.hypergradient(ridge.problem(), bl.GradientDescent(steps=200), bl.Implicit(), u)
    raw, corrected = estimate.outer_loss, estimate.outer_loss - estimate.certificate.value_error
    assert abs(corrected - exact) < 0.2 * abs(raw - exact)
    outer = bl.OuterOptimizer(
        ridge.problem(), bl.GradientDescent(steps=200), bl.Implicit(), u, bl.HyperNewton(start="given")
    )
    outer.step()
    if outer.search.each[0].state.accepted is not None:
        assert outer.search.each[0].state.accepted.answer.value == pytest.approx(corrected)


def test_an_inner_run_that_did_not_converge_is_never_accepted():
    ridge = Ridge(0)
    u = torch.from_numpy(ridge.centre - 8.0)
    solver = bl.GradientDescent(steps=3, tol=1e-10)
    outer = bl.OuterOptimizer(
        ridge.problem(), solver, bl.Implicit(), u, bl.HyperNewton(start="given"), on_failure="return"
    )
    estimate = outer.step()
    assert estimate.status is bl.Status.INNER_NOT_CONVERGED
    assert [record.accepted for record in outer.history] == [False]
    assert outer.best[0] == math.inf


def test_a_rejected_trial_leaves_no_warm_start():
    ridge = Ridge(1)
    outer = outer_of(ridge.problem(), torch.from_numpy(ridge.starts(1)[0]))
    for _ in range(14):
        before = outer.carry
        outer.step()
        assert (outer.carry is before) == (not outer.history[-1].accepted)
    assert {record.accepted for record in outer.history} == {True, False}


def test_weights_of_rows_are_bounded_and_tuned_without_a_scan():
    X, y = data("SoftmaxProblem", 0, rows=12)
    problem = bl.problems.SampleWeightProblem(X, y, *data("SoftmaxProblem", 1), penalty=0.1)
    result = outer_of(problem, problem.initial_hparams()).run(6, progress=False)
    assert result.history[0].phase == "step"
    assert result.best_loss < result.history[0].outer_loss


REFUSED = {
    r"HyperNewton compares outer losses, but those of FullUnroll\(.*\) depend on where the inner solver starts: "
    r"use warm_start=False, or Implicit\(\).": lambda p, u: bl.OuterOptimizer(
        p, bl.GradientDescent(steps=5), bl.FullUnroll(), u, bl.HyperNewton()
    ),
    r"HyperNewton needs an adjoint vector, but FullUnroll\(.*\) has none: use HyperLBFGS.": lambda p, u: (
        bl.OuterOptimizer(p, bl.GradientDescent(tol=1e-8), bl.FullUnroll(), u, bl.HyperNewton(), warm_start=False)
    ),
    "HyperNewton needs hypergradients without bias: `Implicit.damping` 1 biases": lambda p, u: bl.OuterOptimizer(
        p, bl.QuasiNewton(), bl.Implicit(damping=1.0), u, bl.HyperNewton()
    ),
    "HyperLBFGS needs hypergradients without bias": lambda p, u: bl.OuterOptimizer(
        p, bl.QuasiNewton(), bl.FirstOrder(), u, bl.HyperLBFGS()
    ),
    "`HyperNewton.start` 'scan' is for log penalties, which these hyperparameters are not": lambda p, u: outer_of(
        Ridge(0).problem(parametrization="direct"), u.exp(), bl.HyperNewton(start="scan")
    ),
    r"hyperparameter 0 starts at 100, outside its limits .* start inside, or give `limits`.": lambda p, u: outer_of(
        p, torch.full_like(u, 100.0)
    ),
    "`constraints` holds Simplex.*, but an outer search keeps to bounds alone": lambda p, u: outer_of(
        p, torch.full_like(u, 1 / 6), constraints=torch.distributions.constraints.simplex
    ),
    "`HyperNewton.tol` must be a positive number": lambda p, u: bl.HyperNewton(tol=0.0),
    "`HyperNewton.start` must be 'scan', 'given' or None": lambda p, u: bl.HyperNewton(start="here"),
    "`HyperNewton.limits` must be two numbers, the smaller one first, or None": lambda p, u: bl.HyperNewton(
        limits=(3.0, 1.0)
    ),
    "`HyperLBFGS.memory` must be a positive int": lambda p, u: bl.HyperLBFGS(memory=0),
}


def test_a_schedule_is_refused_by_a_search_that_was_asked_for():
    ridge = Ridge(0)
    with (
        pytest.warns(DeprecationWarning, match="choose their own accuracies"),
        pytest.raises(ValueError, match=r"HyperNewton chooses its own steps and accuracies: leave out `schedule`\."),
    ):
        outer_of(ridge.problem(), torch.from_numpy(ridge.centre).clone(), schedule="quadratic")


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_a_search_cannot_take_is_one_sentence(sentence):
    ridge = Ridge(0)
    with pytest.raises(ValueError, match=sentence) as caught:
        REFUSED[sentence](ridge.problem(), torch.from_numpy(ridge.centre).clone())
    assert "\n" not in str(caught.value)


def test_mini_batches_are_refused_because_their_losses_do_not_compare():
    X, y = torch.randn(20, 2, dtype=F64), torch.randn(20, dtype=F64)
    problem = bl.BilevelProblem(
        lambda w, u, batch: ((batch[0] @ w - batch[1]) ** 2).mean() + u.exp() * (w @ w),
        lambda w, u: ((X @ w - y) ** 2).mean(),
        params=torch.zeros(2, dtype=F64),
        sampler=bl.MiniBatches((X, y), batch_size=5),
    )
    with pytest.raises(ValueError, match="those of mini-batches or new data do not compare: use Adam"):
        bl.OuterOptimizer(problem, bl.SGD(0.1, steps=5), bl.Implicit(), torch.zeros((), dtype=F64), bl.HyperNewton())
