"""`solution` under vmap, grad and jacrev in any order, against the closed form of a quadratic."""

import pytest
import torch

import bilevel as bl

ESTIMATORS = [bl.Implicit(), bl.FullUnroll(), bl.FullUnroll(mode="forward"), bl.TruncatedUnroll(tail=0.9)]
SOLVER = bl.HeavyBall(momentum="auto", tol=1e-13)


@pytest.fixture
def problem():
    return bl.QuadraticProblem.random(size=4, hyperparameters=2, condition=10.0, seed=3)


@pytest.fixture
def points():
    return 0.1 * torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer(problem, estimator):
    return lambda u: bl.solution(problem, SOLVER, estimator, u)


def close(a, b):
    return torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_jacrev_of_the_layer_is_the_exact_jacobian(problem, points, estimator):
    close(torch.func.jacrev(layer(problem, estimator))(points[0]), problem.exact_jacobian(points[0]))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_vmap_over_hyperparameters_gives_each_member_its_own_solution_and_gradient(problem, points, estimator):
    solve = layer(problem, estimator)
    close(torch.func.vmap(solve)(points), torch.stack([problem.solve(u) for u in points]))
    exact = torch.stack([2 * problem.exact_jacobian(u).t() @ problem.solve(u) for u in points])
    close(torch.func.vmap(torch.func.grad(lambda u: solve(u).square().sum()))(points), exact)
    batch = points.clone().requires_grad_()
    torch.func.vmap(solve)(batch).square().sum().backward()
    close(batch.grad, exact)


def test_vmap_of_jacrev_keeps_members_and_cotangents_apart(problem, points):
    # As many members as outputs: a rule that mixed up the two batch dimensions would not be seen by its shapes.
    jacobians = torch.func.vmap(torch.func.jacrev(layer(problem, bl.Implicit())))(points[:4])
    close(jacobians, torch.stack([problem.exact_jacobian(u) for u in points[:4]]))


def test_a_dict_of_hyperparameters_with_one_batched_leaf(points):
    problem = bl.BilevelProblem(
        inner_loss=lambda x, u: 0.5 * u["scale"].exp() * x.square().sum() - (u["pull"] * x).sum(),
        outer_loss=lambda x, u: x.square().sum(),
        params=torch.zeros(2, dtype=torch.float64),
    )
    scale = torch.tensor(0.3, dtype=torch.float64)
    solved = torch.func.vmap(lambda pull: bl.solution(problem, SOLVER, bl.Implicit(), {"scale": scale, "pull": pull}))(
        points
    )
    close(solved, points / scale.exp())
