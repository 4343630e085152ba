"""The decision rule of `Auto`: each branch, what it says about it, and that the number is that of its choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import F64, logistic_case, quadratic_case, ridge_case, tree_case

import bilevel as bl
from bilevel.hypergrad.auto import Choice

FIXED, TOL = bl.GradientDescent(0.1, steps=200), bl.GradientDescent(0.1)
KIB = 2.0**10


def optimality_map() -> bl.BilevelProblem:
    return bl.BilevelProblem.from_fixed_point(
        lambda x, u: 0.5 * x + u, lambda x, u: (x**2).sum(), torch.zeros(2, dtype=F64)
    )


def sampled() -> bl.BilevelProblem:
    X = torch.ones(8, 2, dtype=F64)
    return bl.BilevelProblem(
        lambda w, u, batch: ((batch @ w - 1) ** 2).mean() + u.exp() * (w**2).sum(),
        lambda w, u: (w**2).sum(),
        torch.zeros(2, dtype=F64),
        sampler=bl.MiniBatches(X, batch_size=4),
    )


def chosen(problem: bl.BilevelProblem, solver: bl.InnerSolver, rule: bl.Auto, count: int = 2) -> Choice:
    return rule.choose(problem, solver, torch.zeros(count, dtype=F64), problem.start())


@pytest.mark.parametrize(
    ("make", "solver", "rule", "expected", "why"),
    [
        (lambda: ridge_case("scalar").problem, FIXED, bl.Auto(), bl.ClosedForm(), "spectrum"),
        (lambda: ridge_case().problem, FIXED, bl.Auto(), bl.ClosedForm(), "quadratic"),
        (lambda: ridge_case().problem, FIXED, bl.Auto(memory_limit=100.0), bl.Implicit(bl.CG()), "do not fit"),
        (optimality_map, FIXED, bl.Auto(), bl.Implicit(bl.GMRES()), "need not be symmetric"),
        (sampled, FIXED, bl.Auto(), bl.Implicit(bl.CG()), "different batches"),
        (lambda: logistic_case().problem, bl.QuasiNewton(), bl.Auto(), bl.Implicit(bl.CG()), "QuasiNewton have no"),
        (lambda: logistic_case().problem, TOL, bl.Auto(), bl.Implicit(bl.CG()), "ends at a tolerance"),
        (lambda: logistic_case().problem, FIXED, bl.Auto(), bl.BalancedImplicit(), "shares the work"),
        (lambda: tree_case().problem, TOL, bl.Auto(), bl.BalancedImplicit(), "where the Hessian is indefinite"),
        (lambda: tree_case().problem, TOL, bl.Auto(tol=1e-3), bl.BalancedImplicit(), "shares the work"),
        (lambda: logistic_case().problem, TOL, bl.Auto(tol=1e-3), bl.Implicit(bl.CG(tol=1e-3)), "ends at a tolerance"),
        (lambda: ridge_case("scalar").problem, FIXED, bl.Auto(unroll=True), bl.Spectral(), "spectrum"),
        (lambda: ridge_case().problem, FIXED, bl.Auto(unroll=True), bl.FullUnroll(), "200 states fit"),
        (
            lambda: ridge_case().problem,
            FIXED,
            bl.Auto(unroll=True, memory_limit=4 * KIB),
            bl.FullUnroll(memory="checkpoint"),
            "200 states do not fit into memory, but checkpoints do",
        ),
        (
            lambda: ridge_case().problem,
            FIXED,
            bl.Auto(unroll=True, memory_limit=KIB),
            bl.TruncatedUnroll(tail=8),
            "of 200 states the last 8 fit",
        ),
    ],
)
def test_each_branch_of_the_rule(
    make: Any, solver: bl.InnerSolver, rule: bl.Auto, expected: bl.HypergradEstimator, why: str
) -> None:
    found = chosen(make(), solver, rule)
    assert found.estimator == expected
    assert why in found.reason
    assert str(found).startswith(f"auto chose {bl.base.describe(expected)}: ")


def network(*layers: torch.nn.Module, **options: Any) -> bl.BilevelProblem:
    X = torch.linspace(-1, 1, 16, dtype=F64).reshape(8, 2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), *layers, torch.nn.Linear(3, 1)).double()
    return bl.ModuleProblem(
        model,
        lambda net, w, u: (net(X) ** 2).mean() + u.exp().sum() * sum((leaf**2).sum() for leaf in w.values()),
        lambda net, w, u: ((net.eval()(X) - 1) ** 2).mean(),
        **options,
    )


@pytest.mark.parametrize(
    ("make", "rule", "expected", "why"),
    [
        (lambda: network(torch.nn.BatchNorm1d(3)), bl.Auto(), bl.Implicit(bl.CG()), "running statistics, which move"),
        (lambda: network(torch.nn.Dropout(), seed=0), bl.Auto(), bl.Implicit(bl.CG()), "random layers, whose steps"),
        (bl.meta.SineProblem, bl.Auto(), bl.BalancedImplicit(), "shares the work"),
        (lambda: network(torch.nn.BatchNorm1d(3)), bl.Auto(unroll=True), bl.FullUnroll(), "200 states fit"),
        (lambda: network(torch.nn.Dropout(), seed=0), bl.Auto(unroll=True), bl.FullUnroll(), "200 states fit"),
        (sampled, bl.Auto(unroll=True), bl.FullUnroll(), "200 states fit"),
    ],
    ids=["statistics", "draws", "tasks", "statistics, unrolled", "draws, unrolled", "sampler, unrolled"],
)
def test_problems_whose_steps_vary(make: Any, rule: bl.Auto, expected: bl.HypergradEstimator, why: str) -> None:
    problem = make()
    found = chosen(problem, FIXED, rule)
    assert found.estimator == expected
    assert why in found.reason
    rule.check(problem, FIXED, torch.zeros(2, dtype=F64))


DECAYED = bl.AdamW(0.01, steps=20)
TUNED = bl.SGD(step_size=lambda u: 0.1 * u.reshape(-1)[0].exp(), steps=20)


@pytest.mark.parametrize("make", [lambda: ridge_case().problem, lambda: logistic_case().problem, sampled])
@pytest.mark.parametrize(("solver", "why"), [(DECAYED, "weight_decay"), (TUNED, "step_size")], ids=["decay", "tuned"])
def test_steps_that_decide_the_result_are_unrolled_or_refused(make: Any, solver: bl.InnerSolver, why: str) -> None:
    problem = make()
    u = problem.initial_hparams(0.0) if hasattr(problem, "initial_hparams") else torch.zeros((), dtype=F64)
    refused = rf"^Auto\(\) rests on the inner solution, but `{type(solver).__name__}\.{why}` .*: use FullUnroll or"
    with pytest.raises(ValueError, match=refused):
        bl.hypergradient(problem, solver, "auto", u)
    found = bl.hypergradient(problem, solver, bl.Auto(unroll=True), u)
    same = bl.hypergradient(problem, solver, bl.FullUnroll(), u)
    assert found.verdict.detail.startswith("auto chose FullUnroll(): 20 states fit into memory")
    assert torch.equal(found.hypergradient, same.hypergradient)


def test_a_decay_of_torch_is_refused_with_its_remedy() -> None:
    case = logistic_case()
    solver = bl.TorchOptimizer(lambda params: torch.optim.AdamW(params, lr=0.01), steps=20)
    with pytest.raises(
        ValueError, match=r"^Auto\(\) rests on the inner solution, but weight_decay=0.01 of AdamW .* set"
    ):
        bl.hypergradient(case.problem, solver, "auto", case.hparams)
    with pytest.raises(ValueError, match="the steps of TorchOptimizer are not differentiated: use Implicit, or one of"):
        bl.hypergradient(case.problem, solver, bl.Auto(unroll=True), case.hparams)


@pytest.mark.parametrize(
    ("unroll", "unit", "needed", "fits", "otherwise"),
    [
        # Three matrices of 8-byte numbers; 2 sqrt(200) = 28.3 states of three vectors.
        (False, lambda size: 24 * size**2, 1, bl.ClosedForm(), bl.BalancedImplicit()),
        (True, lambda size: 24 * size, 29, bl.FullUnroll(memory="checkpoint"), bl.TruncatedUnroll(tail=28)),
    ],
)
def test_what_just_fits_into_memory_is_taken_and_what_just_does_not_is_not(
    unroll: bool, unit: Any, needed: int, fits: bl.HypergradEstimator, otherwise: bl.HypergradEstimator
) -> None:
    problem = bl.problems.RidgeProblem(*(torch.ones(60, 40, dtype=F64), torch.ones(60, dtype=F64)) * 2, "per_feature")
    limit = float(needed * unit(40))
    assert chosen(problem, FIXED, bl.Auto(unroll=unroll, memory_limit=limit)).estimator == fits
    assert chosen(problem, FIXED, bl.Auto(unroll=unroll, memory_limit=limit - 1)).estimator == otherwise


def test_one_hyperparameter_takes_forward_mode_where_states_do_not_fit() -> None:
    rule = bl.Auto(unroll=True, memory_limit=4 * KIB)
    assert chosen(logistic_case().problem, FIXED, rule, count=1).estimator == bl.FullUnroll(mode="forward")


def test_a_batch_shares_the_products_of_one_linear_solve() -> None:
    case = logistic_case()
    stacked = torch.stack([case.hparams, case.hparams + 0.1])
    found = bl.hypergradient(case.problem, TOL, "auto", stacked, batch=2)
    alone = bl.hypergradient(case.problem, TOL, bl.Implicit(), case.hparams)
    assert torch.allclose(found[0].hypergradient, alone.hypergradient, rtol=1e-6)
    assert found.verdicts[0].detail.startswith("auto chose Implicit(")


@pytest.mark.parametrize("make", [quadratic_case, logistic_case, tree_case])
def test_the_word_auto_is_the_rule_and_the_status_names_the_choice(make: Any) -> None:
    case = make()
    found = bl.hypergradient(case.problem, bl.GradientDescent(tol=1e-11), "auto", case.hparams)
    choice = bl.Auto().choose(case.problem, bl.GradientDescent(tol=1e-11), case.hparams, case.start)
    same = bl.hypergradient(case.problem, bl.GradientDescent(tol=1e-11), choice.estimator, case.hparams)
    assert found.status.ok
    assert found.verdict.detail == str(choice)
    assert "\n" not in found.verdict.detail
    assert torch.equal(found.hypergradient, same.hypergradient)
    assert torch.allclose(found.hypergradient.reshape(-1), case.hypergradient(), rtol=1e-5)


def test_a_failure_names_the_choice_and_the_fault() -> None:
    case = logistic_case()
    found = bl.hypergradient(case.problem, bl.GradientDescent(1e4, steps=50), "auto", case.hparams, on_failure="return")
    assert found.verdict.detail.startswith("auto chose BalancedImplicit(): ")
    assert "; GradientDescent" in found.verdict.detail


def test_every_front_door_takes_the_word() -> None:
    case = logistic_case()
    outer = bl.OuterOptimizer(case.problem, TOL, "auto", case.hparams)
    outer.run(2, progress=False)
    assert isinstance(outer.estimator, bl.Auto)
    assert bl.check_hypergradient(case.problem, TOL, "auto", case.hparams).ok
    u = case.hparams.clone().requires_grad_()
    bl.solution(case.problem, TOL, "auto", u).sum().backward()
    assert bool(torch.isfinite(u.grad).all())


def test_other_words_and_bad_options_are_refused() -> None:
    case = logistic_case()
    words = (
        r"got 'implicit' in the place of HypergradEstimator, whose only string is 'auto': did you mean `Implicit\(\)`\?"
    )
    with pytest.raises(ValueError, match=rf"expected \(problem, solver, estimator, hparams\), {words}"):
        bl.hypergradient(case.problem, TOL, "implicit", case.hparams)
    for options, message in (
        ({"memory_limit": 0}, "`Auto.memory_limit` must be a positive number of bytes, got 0."),
        ({"unroll": 1}, "`Auto.unroll` must be True or False, got 1."),
        ({"tol": -1.0}, "`Auto.tol` must be a positive number or None, got -1.0."),
    ):
        with pytest.raises(ValueError, match="`Auto") as caught:
            bl.Auto(**options)
        assert str(caught.value) == message
