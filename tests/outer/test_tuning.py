"""`tune`: all choices made, said, and borne out."""

from __future__ import annotations

import re

import pytest
import torch
from sklearn.datasets import load_breast_cancer

import bilevel as bl

F64 = torch.float64


def logistic(dtype: torch.dtype = F64) -> bl.BilevelProblem:
    X, y = (torch.as_tensor(each) for each in load_breast_cancer(return_X_y=True))
    X = ((X - X.mean(0)) / X.std(0))[:, :8].to(dtype)
    return bl.problems.LogisticProblem(X[:300], y[:300], X[300:], y[300:], "per_feature")


def norms(dtype: torch.dtype = F64, **options) -> bl.BilevelProblem:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 3, generator=generator, dtype=dtype)
    y = X @ torch.tensor([1.0, 0.0, -1.0], dtype=dtype) + 0.3 * torch.randn(30, generator=generator, dtype=dtype)
    return bl.BilevelProblem(
        lambda w, u: ((X[:15] @ w - y[:15]) ** 2).mean() + (u.exp() * w**2).sum(),
        lambda w, u: ((X[15:] @ w - y[15:]) ** 2).mean(),
        params=torch.zeros(3, dtype=dtype),
        **options,
    )


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_one_line_tunes_and_says_what_it_chose(dtype):
    problem = logistic(dtype)
    tuned = bl.tune(problem)
    assert tuned.stopped.startswith("converged to a local minimum")
    assert tuned.estimate.status.ok
    assert tuned.outer_loss == pytest.approx(float(problem.outer_loss(tuned.params, tuned.hparams)), rel=1e-4)
    # No single penalty of a grid is better.
    grid = [bl.hypergradient(problem, bl.QuasiNewton(), bl.Implicit(), torch.full((8,), u, dtype=dtype)).outer_loss
            for u in range(-10, 3)]  # fmt: skip
    assert tuned.outer_loss < min(grid)
    text = str(tuned)
    assert all(len(line) < 80 for line in text.splitlines())
    assert len(text.splitlines()) < 24
    text = text.replace("\n  ", " ")
    for said in (
        "outer loss ",
        "ended: converged",
        "evidence: ",
        "inner solver QuasiNewton()",
        "HyperNewton(tol=0.001)",
    ):
        assert said in text
    assert tuned.plot().axes[0].get_xlabel() == "evaluation"


def test_further_starts_report_how_far_apart_they_end():
    tuned = bl.tune(logistic(), accuracy=1e-4, multi_start=3)
    assert len(tuned.ends) == 3
    assert tuned.outer_loss == min(tuned.ends)
    assert f"3 starts ended at {min(tuned.ends):.6g} to {max(tuned.ends):.6g}" in str(tuned).replace("\n  ", " ")


def test_general_losses_need_a_start_and_get_no_scan():
    tuned = bl.tune(norms(), torch.zeros(3, dtype=F64), accuracy=1e-6)
    assert tuned.stopped.startswith("converged")
    assert {record.phase for record in tuned.history} == {"step", "probe"}
    assert "Implicit" in tuned.choices[1]
    with pytest.raises(ValueError, match="BilevelProblem has no hyperparameters to start from: give `hparams`"):
        bl.tune(norms())


def test_what_is_given_is_kept_and_adam_is_taken_where_losses_do_not_compare():
    u = torch.zeros(3, dtype=F64)
    solver = bl.GradientDescent(0.1, steps=30)
    tuned = bl.tune(norms(), u, solver=solver, estimator=bl.FullUnroll(), steps=4)
    assert "inner solver GradientDescent(steps=30, step_size=0.1): given" in tuned.choices[0]
    assert "Adam" in tuned.choices[2]
    assert "depend on where the inner solver starts" in tuned.choices[2]
    tuned = bl.tune(norms(), u, optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1), steps=3)
    assert len(tuned.history) == 3
    assert "outer search of torch: given" in tuned.choices[2]


def test_auto_says_which_search_and_why():
    outer = bl.OuterOptimizer(norms(), bl.Newton(), bl.Implicit(), torch.zeros(3, dtype=F64))
    assert outer.choice == (
        "auto chose HyperNewton(): 3 inner variables and 3 hyperparameters have dense second derivatives"
    )
    unrolled = bl.OuterOptimizer(
        norms(), bl.GradientDescent(0.1, steps=50), bl.FullUnroll(), torch.zeros(3, dtype=F64), warm_start=False
    )
    assert unrolled.choice.startswith("auto chose HyperLBFGS(): HyperNewton needs an adjoint vector")
    result = unrolled.run(25, progress=False)
    assert result.best_loss < result.history[0].outer_loss
    scheduled = bl.OuterOptimizer(
        norms(),
        bl.Newton(),
        bl.Implicit(),
        torch.zeros(3, dtype=F64),
        scheduler=lambda adam: torch.optim.lr_scheduler.ExponentialLR(adam, 0.9),
    )
    assert scheduled.choice.startswith("auto chose Adam: HyperLBFGS chooses its own steps and accuracies")
    simplex = bl.OuterOptimizer(
        norms(),
        bl.Newton(),
        bl.Implicit(),
        torch.full((3,), 1 / 3, dtype=F64),
        constraints=torch.distributions.constraints.simplex,
    )
    assert simplex.choice.startswith("auto chose Adam: `constraints` holds Simplex()")


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("search", ["auto", bl.HyperNewton(), bl.HyperLBFGS()], ids=repr)
def test_a_start_of_the_inner_variable_that_the_problem_has_not(search, batch):
    problem, other = norms(), torch.ones(3, dtype=F64)
    problem = bl.BilevelProblem(problem.inner_loss, problem.outer_loss)
    u = torch.zeros(3, dtype=F64) if batch is None else torch.zeros(2, 3, dtype=F64)

    def begun():
        return bl.OuterOptimizer(problem, bl.Newton(), bl.Implicit(), u, search, params=other, batch=batch)

    first, second, whole = begun(), begun(), begun()
    first.run(2, progress=False)
    second.load_state_dict(first.state_dict())
    ends = [outer.run(steps, progress=False) for outer, steps in ((second, 3), (whole, 5))]
    assert torch.equal(ends[0].hparams, ends[1].hparams)


def test_auto_takes_adam_where_inner_runs_may_end_before_they_converge():
    far = bl.OuterOptimizer(norms(), bl.GradientDescent(1e-3, steps=3), bl.Implicit(), torch.zeros(3, dtype=F64))
    assert "Adam: GradientDescent(steps=3, step_size=0.001) may end before it converges" in far.choice
    capped = bl.OuterOptimizer(norms(), bl.Newton(steps=50, tol=1e-8), bl.Implicit(), torch.zeros(3, dtype=F64))
    assert capped.choice.startswith("auto chose Adam")
    with pytest.warns(bl.BilevelWarning):
        assert far.run(2, progress=False).best_loss < float("inf")


def test_networks_with_running_statistics_have_no_second_derivatives_of_the_search():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).to(F64)
    X, y = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=F64), torch.ones(12, 1, dtype=F64)

    def inner(model, params, u):
        return ((model(X[0]) - y) ** 2).mean() + u.exp() * sum((p**2).sum() for p in params.values())

    problem = bl.ModuleProblem(model, inner, lambda model, params, u: ((model(X[1]) - y) ** 2).mean())
    u = torch.tensor(-2.0, dtype=F64)
    with pytest.raises(ValueError, match="HyperNewton needs one inner loss, but this problem has running statistics"):
        bl.OuterOptimizer(problem, bl.QuasiNewton(), bl.Implicit(), u, bl.HyperNewton())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accuracy": 0.0}, "`accuracy` must be a positive number, got 0.0."),
        ({"multi_start": 0}, "`multi_start` must be a positive int, got 0."),
        ({"accuracy": "high"}, "`accuracy` must be a positive number, got 'high'."),
        ({"steps": 0}, "`steps` must be a positive int, got 0."),
        ({"optimizer": "Newton"}, "`optimizer` must make a torch.optim.Optimizer"),
        ({"optimizer": "HyperNewton"}, "`optimizer` takes a search as an object: write optimizer=HyperNewton()."),
        ({"optimizer": bl.HyperLBFGS}, "`optimizer` takes a search as an object: write optimizer=HyperLBFGS()."),
        ({"solver": "GD"}, "got 'GD' in the place of InnerSolver, of which none is a string."),
        ({"estimator": "best"}, "got 'best' in the place of HypergradEstimator, whose only string is 'auto'."),
        ({"problem": "ridge"}, "`problem` must be a BilevelProblem, got 'ridge'."),
        ({"problem": bl.problems.RidgeProblem}, "`problem` must be a BilevelProblem, got the class RidgeProblem"),
        ({"problem": bl.stack([logistic(), logistic()])}, "`tune` takes one problem at a time, but this is a batch"),
        ({"hparams": [0.0, 0.0, 0.0]}, "`hparams[0]` must be a Tensor, got float: torch.as_tensor makes one."),
        ({"hparams": 1e-3}, "`hparams` must be a Tensor, got float: torch.as_tensor makes one."),
        ({"hparams": torch.full((3,), torch.nan, dtype=F64)}, "`hparams` holds NaN or infinite values."),
        ({"hparams": torch.zeros(3)}, "`hparams` is torch.float32 on cpu, but params are torch.float64 on cpu"),
        ({"hparams": torch.zeros(3, dtype=torch.int64)}, "`hparams` must hold floating-point numbers, got torch.int64"),
        ({"problem": logistic(), "hparams": torch.full((8,), 99.0, dtype=F64)}, "starts at 99, outside its limits"),
    ],
)
def test_a_wrong_argument_is_one_sentence(options, words):
    given = {"problem": norms(), "hparams": torch.zeros(3, dtype=F64)} | options
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        bl.tune(**given)
    assert "\n" not in str(caught.value)


def test_random_layers_leave_a_search_no_inner_solution():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5), torch.nn.Linear(2, 1)).to(F64)
    X, y = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=F64), torch.ones(12, 1, dtype=F64)

    def inner(model, params, u):
        return ((model(X[0]) - y) ** 2).mean() + u.exp() * sum((p**2).sum() for p in params.values())

    problem = bl.ModuleProblem(model, inner, lambda model, params, u: ((model(X[1]) - y) ** 2).mean(), seed=1)
    u, solver = torch.tensor(-2.0, dtype=F64), bl.GradientDescent(0.1, steps=20)
    for search in (bl.HyperNewton(), bl.HyperLBFGS()):
        with pytest.raises(ValueError, match=r"with random layers each inner step has another one: use FullUnroll\(\)"):
            bl.OuterOptimizer(problem, bl.QuasiNewton(), bl.Implicit(), u, search)
    assert "auto chose Adam: " in repr(bl.OuterOptimizer(problem, bl.QuasiNewton(), bl.Implicit(), u))
    # A cold unroll is a function of the hyperparameters: the same draws at each step.
    cold = bl.OuterOptimizer(problem, solver, bl.FullUnroll(), u, warm_start=False)
    assert cold.choice.startswith("auto chose HyperLBFGS()")
    result = cold.run(12, progress=False)
    assert result.best_loss < result.history[0].outer_loss
    again = bl.hypergradient(problem, solver, bl.FullUnroll(), result.hparams)
    assert again.outer_loss == pytest.approx(result.best_loss, rel=1e-12)
