"""Gauss-Newton products against dense matrices by torch.func, and implicit differentiation with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import F64, flat, normal, tree_case
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import bilevel as bl
from bilevel.core import tree
from bilevel.networks.gauss_newton import gauss_newton

X, X2, LABELS, TARGETS = normal(1, 12, 3), normal(2, 7, 3), torch.arange(12) % 3, normal(3, 7, 3)
DECAY = {"hidden": torch.tensor(-3.0, dtype=F64), "rest": torch.tensor(-2.0, dtype=F64)}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def penalty(params: Any, decay: Any) -> Tensor:
    return sum(
        (decay["hidden" if name.startswith("0") else "rest"].exp() * p.square()).sum() for name, p in params.items()
    )


def inner_loss(model: Any, params: Any, decay: Any) -> Tensor:
    """Cross-entropy at one call of the model, squared error at another, and penalties: convex in outputs and params."""
    fit = nn.functional.cross_entropy(model(X), LABELS) + 0.3 * (model(X2) - TARGETS).square().mean()
    return fit + penalty(params, decay)


def outer_loss(model: Any, params: Any, decay: Any) -> Tensor:
    return (model(X2) - 1.0).square().mean() + 0.0 * sum(decay.values())


def made(module: nn.Module, loss: Callable[..., Tensor] = inner_loss, **options: Any) -> bl.BilevelProblem:
    return bl.ModuleProblem(module, loss, outer_loss, **options)


def dense_products(problem: bl.BilevelProblem, params: Any) -> Tensor:
    point = problem.bind(DECAY).linearize(params)
    assert problem.module_loss is not None
    product = gauss_newton(point, problem.module_loss)
    return torch.stack([flat(product(unit)) for unit in tree.Raveler(params).units()])


def dense_gauss_newton(module: nn.Module, params: Any) -> Tensor:
    """J' H_l J by torch.func, with J the Jacobian of params -> (both outputs, params)."""
    raveler = tree.Raveler(params)

    def outputs(x: Tensor) -> Tensor:
        values = raveler.unravel(x)
        first, second = (functional_call(module, values, (data,)) for data in (X, X2))
        return torch.cat([first.reshape(-1), second.reshape(-1), x])

    def loss(z: Tensor) -> Tensor:
        first, second, x = z.split([36, 21, raveler.size])
        logits, values = first.reshape(12, 3), raveler.unravel(x)
        entropy = (logits.exp().sum(1).log() - logits.gather(1, LABELS[:, None])[:, 0]).mean()
        return entropy + 0.3 * (second.reshape(7, 3) - TARGETS).square().mean() + penalty(values, DECAY)

    x = raveler.ravel(params)
    J = jacrev(outputs)(x)
    return J.t() @ jacrev(jacrev(loss))(outputs(x)) @ J


def dense_hessian(problem: bl.BilevelProblem, params: Any) -> Tensor:
    raveler = tree.Raveler(params)
    return jacrev(jacrev(lambda x: problem.inner_loss(raveler.unravel(x), DECAY)))(raveler.ravel(params))


def test_products_equal_the_dense_gauss_newton_matrix_and_have_no_negative_curvature() -> None:
    module = network()
    problem = made(module)
    params = tree.tree_map(lambda leaf: 3.0 * leaf, problem.params)
    G, H = dense_products(problem, params), dense_hessian(problem, params)
    torch.testing.assert_close(G, dense_gauss_newton(module, params), rtol=1e-10, atol=1e-10)
    assert torch.linalg.eigvalsh(H)[0] < -1e-3
    assert torch.linalg.eigvalsh((G + G.t()) / 2)[0] >= -1e-12
    assert (G - H).norm() > 0.1 * H.norm()


def test_without_penalties_the_smallest_eigenvalue_is_zero_to_rounding() -> None:
    def loss(model: Any, params: Any, decay: Any) -> Tensor:
        return nn.functional.cross_entropy(model(X), LABELS)

    G = dense_products(made(network(), loss), made(network()).params)
    values = torch.linalg.eigvalsh((G + G.t()) / 2)
    assert -1e-12 <= values[0] <= 1e-12 < values[-1]


def test_for_a_model_that_is_linear_in_its_parameters_it_is_the_hessian() -> None:
    problem = made(nn.Linear(3, 3).double())
    torch.testing.assert_close(
        dense_products(problem, problem.params), dense_hessian(problem, problem.params), rtol=1e-11, atol=1e-12
    )


def test_it_is_the_hessian_where_the_model_fits_the_data() -> None:
    module = network()

    def loss(model: Any, params: Any, decay: Any) -> Tensor:
        return (model(X) - module(X).detach()).square().mean()

    problem = made(module, loss)
    torch.testing.assert_close(
        dense_products(problem, problem.params), dense_hessian(problem, problem.params), rtol=1e-10, atol=1e-12
    )


class Pair(nn.Module):
    """A model that returns a dict with something that has no gradient, and is applied to its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": torch.tanh(self.layer(x)), "rows": len(x), "seen": x.sum().detach()}


def test_models_may_return_trees_and_be_applied_to_their_own_outputs() -> None:
    module = Pair()

    def loss(model: Any, params: Any, decay: Any) -> Tensor:
        once = model(X)
        return model(once["out"])["out"].square().sum() / once["rows"] + penalty(params, decay)

    problem = made(module, loss)
    params, raveler = problem.params, tree.Raveler(problem.params)

    def outputs(x: Tensor) -> Tensor:
        values = raveler.unravel(x)
        once = functional_call(module, values, (X,))["out"]
        return functional_call(module, values, (once,))["out"].reshape(-1)

    J = jacrev(outputs)(raveler.ravel(params))
    expected = 2.0 / 12 * J.t() @ J + 2.0 * DECAY["rest"].exp() * torch.eye(12, dtype=F64)
    torch.testing.assert_close(dense_products(problem, params), expected, rtol=1e-11, atol=1e-12)


# Implicit differentiation with it -------------------------------------------------------------------------------------


def implicit(linear_solver: Any, **options: Any) -> bl.Implicit:
    return bl.Implicit(linear_solver, curvature="gauss-newton", **options)


SOLVERS = [
    bl.CG(tol=1e-13),
    bl.GMRES(tol=1e-12),
    bl.Direct(),
    bl.FixedPointIteration(tol=1e-10),
    bl.Nystrom(rank=40),
]


@pytest.mark.parametrize("linear_solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_every_linear_solver_solves_the_gauss_newton_system(linear_solver: Any) -> None:
    problem = made(network())
    solver = bl.GradientDescent(0.1, steps=3)
    estimate = bl.hypergradient(problem, solver, implicit(linear_solver, damping=0.05), DECAY)
    x, raveler = estimate.params, tree.Raveler(problem.params)
    G = dense_gauss_newton(network(), x) + 0.05 * torch.eye(raveler.size, dtype=F64)
    by_x = flat(torch.func.grad(problem.outer_loss)(x, DECAY))
    cross = jacrev(lambda u: flat(torch.func.grad(problem.inner_loss)(x, dict(zip(DECAY, u, strict=True)))))
    expected = -cross(torch.stack(list(DECAY.values()))).t() @ torch.linalg.solve(G, by_x)
    torch.testing.assert_close(flat(estimate.hypergradient), expected, rtol=1e-6, atol=1e-9)
    assert estimate.certificate.adjoint_residual < 1e-9


def test_cg_meets_negative_curvature_with_the_hessian_and_none_with_gauss_newton() -> None:
    problem, solver = made(network()), bl.GradientDescent(0.01, steps=1)
    start = tree.tree_map(lambda leaf: 3.0 * leaf, problem.params)
    refused = bl.hypergradient(problem, solver, bl.Implicit(bl.CG(steps=30)), DECAY, start, on_failure="return")
    assert refused.status is bl.Status.NEGATIVE_CURVATURE
    for steps in (1, 5, 30):
        estimate = bl.hypergradient(problem, solver, implicit(bl.CG(steps=steps)), DECAY, start)
        # One step from a start that is far away: the curvature is no obstacle, the distance remains.
        assert estimate.status in (bl.Status.OK, bl.Status.INACCURATE)
        assert estimate.certificate.adjoint_steps == steps
        # One more product for the residual.
        assert estimate.cost.counts["hvp"] == steps + 1


def test_products_are_those_of_the_batch_on_which_linear_systems_are_evaluated() -> None:
    def loss(model: Any, params: Any, decay: Any, batch: Any) -> Tensor:
        data, labels = batch
        return nn.functional.cross_entropy(model(data), labels) + penalty(params, decay)

    def full(model: Any, params: Any, decay: Any) -> Tensor:
        return loss(model, params, decay, (X, LABELS))

    sampled = made(network(), loss, sampler=bl.MiniBatches((X, LABELS), batch_size=4, seed=0))
    whole = made(network(), full)
    params = whole.params
    torch.testing.assert_close(dense_products(sampled, params), dense_products(whole, params), rtol=1e-12, atol=1e-13)
    solver = bl.GradientDescent(0.1, steps=3)
    for linear_solver in (bl.CG(steps=4), bl.Neumann(steps=4, step_size=0.2), bl.Nystrom(rank=4)):
        for curvature in ("hessian", "gauss-newton"):
            estimator = bl.Implicit(linear_solver, damping=1.0, curvature=curvature)
            estimate = bl.hypergradient(sampled, solver, estimator, DECAY)
            again = bl.hypergradient(whole, bl.GradientDescent(1e-12, steps=1), estimator, DECAY, estimate.params)
            torch.testing.assert_close(flat(estimate.hypergradient), flat(again.hypergradient), rtol=1e-7, atol=1e-10)


# Layers with draws and statistics, and other batches ------------------------------------------------------------------


class Residuals:
    """Least squares whose residual r is kept, so that its dense Gauss-Newton matrix is 2/n dr/dx' dr/dx + penalty."""

    def __init__(self, noise: bool = False) -> None:
        self.noise = noise
        self.seen: list[Tensor] = []

    def __call__(self, model: Any, params: Any, decay: Any, batch: Any = (X2, TARGETS)) -> Tensor:
        data, targets = batch
        outputs = model(data)
        self.seen.append((outputs * torch.rand(outputs.shape, dtype=F64) if self.noise else outputs) - targets)
        return self.seen[-1].square().mean() + penalty(params, decay)

    def dense(self, problem: bl.BilevelProblem, params: Any) -> Tensor:
        params = tree.attach(problem.trainable(params))
        problem.inner_loss(params, DECAY)
        residual = self.seen[-1].reshape(-1)
        rows = [torch.autograd.grad(r, tree.leaves(params), retain_graph=True) for r in residual]
        J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        bent = torch.cat([2.0 * DECAY[group(name)].exp().expand(p.numel()) for name, p in params.items()])
        return 2.0 / len(residual) * J.t() @ J + bent.diag()


def group(name: str) -> str:
    return "hidden" if name.startswith("0") else "rest"


def layered(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("noise", [False, True], ids=["layers draw", "the loss draws, too"])
def test_products_of_a_seeded_loss_see_the_draws_of_the_loss_and_of_its_layers(noise: bool) -> None:
    loss = Residuals(noise)
    problem = made(layered(nn.Dropout(0.4)), loss, seed=3)
    expected = loss.dense(problem, problem.params)
    torch.testing.assert_close(dense_products(problem, problem.params), expected, rtol=1e-10, atol=1e-12)


def test_with_batch_norm_the_system_is_of_the_parameters_and_the_outer_loss_reads_statistics_at_rest() -> None:
    loss = Residuals()

    def evaluated(model: Any, params: Any, decay: Any) -> Tensor:
        return (model.eval()(X) - 1.0).square().mean() + 0.0 * sum(decay.values())

    problem = bl.ModuleProblem(layered(nn.BatchNorm1d(4)), loss, evaluated)
    estimator = implicit(bl.CG(tol=1e-13), damping=0.05)
    estimate = bl.hypergradient(problem, bl.GradientDescent(0.1, steps=3), estimator, DECAY)
    x = problem.trainable(estimate.params)
    G = loss.dense(problem, x) + 0.05 * torch.eye(tree.Raveler(x).size, dtype=F64)

    def outer(x: Any) -> Tensor:
        hidden, held_out = (data @ x["0.weight"].t() + x["0.bias"] for data in (X2, X))
        scaled = (held_out - hidden.mean(0)) / (hidden.var(0) + 1e-5).sqrt() * x["1.weight"] + x["1.bias"]
        return (torch.tanh(scaled) @ x["3.weight"].t() + x["3.bias"] - 1.0).square().mean()

    adjoint = tree.Raveler(x).unravel(torch.linalg.solve(G, flat(torch.func.grad(outer)(x))))
    for name, u in DECAY.items():
        cross = sum((2.0 * u.exp() * x[key] * adjoint[key]).sum() for key in x if group(key) == name)
        torch.testing.assert_close(estimate.hypergradient[name], -cross, rtol=1e-8, atol=1e-12)


def test_with_a_batch_for_each_outer_step_products_are_those_of_its_batch_draws_and_statistics() -> None:
    loss, sampler = Residuals(noise=True), bl.MiniBatches((X2, TARGETS), batch_size=4, seed=0)
    problem = made(layered(nn.BatchNorm1d(4), nn.Dropout(0.3)), loss, sampler=sampler, fresh_batch="outer step", seed=1)
    for index in (0, 2):
        view = problem.on_outer_step(index)
        x = view.trainable(view.params)
        torch.testing.assert_close(dense_products(view, x), loss.dense(view, x), rtol=1e-9, atol=1e-11)
        assert loss.seen[-1].shape == (4, 3)
        estimator = implicit(bl.CG(tol=1e-13), damping=0.1)
        estimate = bl.hypergradient(view, bl.GradientDescent(0.1, steps=3), estimator, DECAY)
        alone = made(
            layered(nn.BatchNorm1d(4), nn.Dropout(0.3)),
            partial(loss, batch=sampler(index)),
            seed=1,
        )
        again = bl.hypergradient(alone, bl.GradientDescent(0.1, steps=3), estimator, DECAY)
        torch.testing.assert_close(flat(estimate.hypergradient), flat(again.hypergradient), rtol=1e-9, atol=1e-12)


def test_a_meta_problem_whose_loss_is_not_in_halves_is_refused() -> None:
    problem = bl.meta.SineProblem(batch_size=2, hidden=[4], proximity=1.0)
    with pytest.raises(ValueError, match=r"'gauss-newton' needs a single problem of `ModuleProblem`"):
        bl.hypergradient(problem, bl.GradientDescent(0.1, steps=1), implicit(bl.CG(steps=2)), problem.initial_hparams())


def test_a_problem_whose_model_is_not_known_is_refused_in_one_sentence() -> None:
    case = tree_case()
    sentence = r"`Implicit.curvature` 'gauss-newton' needs a single problem of `ModuleProblem`, whose loss"
    with pytest.raises(ValueError, match=sentence):
        bl.hypergradient(case.problem, bl.GradientDescent(), implicit(bl.CG()), case.hparams)
    decay = tree.tree_map(lambda leaf: leaf.expand(2), DECAY)
    with pytest.raises(ValueError, match=sentence):
        bl.hypergradient(made(network()).batched(2), bl.GradientDescent(0.1, steps=1), implicit(bl.CG()), decay)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"curvature": "fisher"}, "`Implicit.curvature` must be 'hessian' or 'gauss-newton', got 'fisher'."),
        ({"curvature": "gauss-newton", "balance": "auto"}, "must be 'hessian' where balance='auto', got"),
        ({"linear_solver": bl.CG(steps=3), "balance": "auto"}, "must be CG, without `steps`, where balance='auto'"),
    ],
)
def test_options_that_do_not_go_together_get_their_sentence(options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        bl.Implicit(**options)
