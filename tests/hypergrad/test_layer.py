"""The differentiable layer, problems over modules, and what a hypergradient costs in calls and memory."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from helpers import (
    ESTIMATORS,
    F64,
    LINEAR_SOLVERS,
    MOMENTUM,
    SOLVERS,
    STEP,
    UNROLLED,
    flat,
    normal,
    quadratic_case,
    ridge_case,
    shaped,
    tree_case,
)
from torch import Tensor, nn

import bilevel as bl
from bilevel.core import tree

every_estimator = pytest.mark.parametrize(
    "estimator", ESTIMATORS.values(), ids=lambda estimator: type(estimator).__name__
)

# solution ------------------------------------------------------------------------------------------------------------


@every_estimator
def test_gradients_through_a_torch_graph_equal_the_chain_rule(estimator: Any) -> None:
    case = tree_case("dict", "dict")
    leaf = normal(1, 2).requires_grad_()
    u = 0.3 * leaf.tanh()
    x = bl.solution(case.problem, bl.Newton(tol=1e-12), estimator, shaped(u, case.hparams), case.start)
    (flat(x).square().sum() + leaf.sum()).backward()
    at = replace(case, hparams=shaped(u.detach(), case.hparams))
    solved = at.solution()
    H, C = case.hessian(solved, u.detach()), case.cross(solved, u.detach())
    by_u = -C.t() @ torch.linalg.solve(H, 2 * solved)
    expected = 1.0 + 0.3 * (1 - leaf.detach().tanh() ** 2) * by_u
    torch.testing.assert_close(flat(x).detach(), solved, rtol=0, atol=1e-11)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cls", UNROLLED, ids=lambda cls: cls.__name__)
def test_gradcheck_accepts_the_layer_with_every_inner_solver_unrolled(cls: type) -> None:
    case = tree_case("dict", "tensor")
    solver = SOLVERS[cls].make(case.problem, steps=2)

    def layer(u: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree.leaves(bl.solution(case.problem, solver, bl.FullUnroll(), u, case.start)))

    assert torch.autograd.gradcheck(layer, (case.hparams.clone().requires_grad_(),))


@pytest.mark.parametrize("linear_solver", LINEAR_SOLVERS.values(), ids=lambda solver: type(solver).__name__)
def test_gradcheck_accepts_the_implicit_layer_with_every_linear_solver(linear_solver: Any) -> None:
    case = quadratic_case()

    def layer(u: Tensor) -> Tensor:
        return bl.solution(case.problem, bl.Newton(tol=1e-12), bl.Implicit(linear_solver), u)

    assert torch.autograd.gradcheck(layer, (case.hparams.clone().requires_grad_(),))


def test_the_layer_maps_over_a_batch_of_hyperparameters() -> None:
    case = quadratic_case()
    problem: Any = case.problem
    batch = 0.3 * normal(2, 4, 3)

    def layer(u: Tensor) -> Tensor:
        return bl.solution(problem, bl.Newton(tol=1e-12), bl.Implicit(), u, check=False)

    values = torch.func.vmap(layer)(batch)
    jacobians = torch.func.vmap(torch.func.jacrev(layer))(batch)
    for u, x, jacobian in zip(batch, values, jacobians, strict=True):
        torch.testing.assert_close(x, problem.solve(u), rtol=0, atol=1e-10)
        torch.testing.assert_close(jacobian, problem.exact_jacobian(u), rtol=0, atol=1e-8)


def test_a_solution_that_is_changed_in_place_is_differentiated_where_it_was() -> None:
    case = tree_case("dict", "tensor")
    solver = bl.Newton(tol=1e-12)
    gradients = []
    for change in (lambda leaf: leaf * 3.0, lambda leaf: leaf.mul_(3.0)):
        u = case.hparams.clone().requires_grad_()
        moved = [change(leaf) for leaf in tree.leaves(bl.solution(case.problem, solver, bl.Implicit(), u, case.start))]
        torch.cat([leaf.reshape(-1) for leaf in moved]).sum().backward()
        gradients.append(u.grad)
    solved = case.solution()
    H, C = case.hessian(solved, case.hparams), case.cross(solved, case.hparams)
    expected = -3.0 * C.t() @ torch.linalg.solve(H, torch.ones_like(solved))
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)


def test_a_layer_whose_pullback_fails_raises_in_the_backward_pass() -> None:
    case = quadratic_case()
    u = case.hparams.clone().requires_grad_()
    x = bl.solution(case.problem, bl.Newton(tol=1e-12), bl.Implicit(bl.CG(max_steps=1)), u)
    with pytest.raises(bl.HypergradientError, match="CG stopped after 1 steps"):
        x.sum().backward()


def doubled(u: Tensor) -> Tensor:
    """The solution ``sin u`` of a problem whose cotangent below does not depend on u."""
    problem = bl.BilevelProblem(
        lambda w, u: (w - u.sin()).square().sum(), lambda w, u: w.sum(), torch.zeros(2, dtype=F64)
    )
    return bl.solution(problem, bl.Newton(), bl.Implicit(), u).sum()


def gradient_penalty(u: Tensor) -> None:
    u = u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(doubled(u) + u.square().sum(), u, create_graph=True)
    slope.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode calls it
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (gradient_penalty, "can be differentiated once"),
        (lambda u: torch.autograd.functional.hessian(doubled, u), "can be differentiated once"),
        (lambda u: torch.func.jacrev(torch.func.jacrev(doubled))(u), "can be differentiated once"),
        (lambda u: torch.func.hessian(doubled)(u), "no derivative in forward mode: use torch.func.jacrev"),
        (lambda u: torch.func.jvp(doubled, (u,), (u,)), "no derivative in forward mode: use torch.func.jacrev"),
        (
            lambda u: torch.autograd.functional.jacobian(doubled, u, vectorize=True, strategy="forward-mode"),
            "no derivative in forward mode: use torch.func.jacrev",
        ),
        (
            lambda u: torch.autograd.functional.jacobian(lambda u: doubled(u) * u, u, vectorize=True),
            "one cotangent at a time: use torch.func.jacrev",
        ),
    ],
)
def test_derivatives_that_the_layer_does_not_have_are_refused_with_another_way(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^bilevel.solution .*{message}"):
        call(torch.tensor([0.3, 0.7], dtype=F64))


def test_hyperparameters_that_move_before_the_backward_pass_are_seen_by_torch() -> None:
    leaf = torch.tensor([0.3, 0.7], dtype=F64, requires_grad=True)
    for u in (leaf, leaf * 1.0):
        x = doubled(u)
        with torch.no_grad():
            u.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            x.backward()


def test_a_start_that_moves_before_the_backward_pass_changes_nothing() -> None:
    problem = bl.BilevelProblem(lambda w, u: (w.sin() - u).square().sum(), lambda w, u: w.sum())
    found = []
    for shift in (0.0, 1.0):
        u, start = torch.ones(2, dtype=F64, requires_grad=True), torch.zeros(2, dtype=F64)
        x = bl.solution(problem, bl.GradientDescent(0.1, steps=3), bl.FullUnroll(), u, start)
        start.add_(shift)
        x.sum().backward()
        found.append(u.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)


ENCODER = nn.Linear(3, 3, dtype=F64)
FEATURES, RATIO = ENCODER(normal(40, 6, 3)), normal(41, 6)


def fit(X: Tensor, w: Tensor, u: Tensor) -> Tensor:
    return (X @ w - RATIO).square().mean() + u.exp() * w.square().sum()


def of_losses(inner: Any, **more: Any) -> bl.BilevelProblem:
    return bl.BilevelProblem(inner, lambda w, u, *_: w.sum(), torch.zeros(3, dtype=F64), **more)


HOLDING: dict[str, tuple[Any, str]] = {
    "FEATURES": (lambda: of_losses(lambda w, u: fit(FEATURES, w, u)), "`FEATURES`"),
    "ENCODER": (lambda: of_losses(lambda w, u: fit(ENCODER(FEATURES.detach()), w, u)), "`ENCODER.weight`"),
    "data": (lambda: of_losses(lambda w, u, d: fit(d["X"], w, u), data={"X": FEATURES}), r"`data\['X'\]`"),
    "sampler": (
        lambda: of_losses(lambda w, u, d: fit(d, w, u), sampler=bl.MiniBatches(FEATURES, 6)),
        r"a tensor of shape \(3, 3\)",
    ),
    "optimality": (
        lambda: bl.BilevelProblem.from_fixed_point(
            lambda w, u: 0.1 * FEATURES.T @ (FEATURES @ w) + u, lambda w, u: w.sum(), torch.zeros(3, dtype=F64)
        ),
        "`FEATURES`",
    ),
    "ridge": (lambda: bl.problems.RidgeProblem(FEATURES, RATIO, FEATURES, RATIO), "`X_train`"),
}


@pytest.mark.parametrize("name", HOLDING)
def test_tensors_that_would_get_no_gradient_are_refused_by_name(name: str) -> None:
    make, named = HOLDING[name]
    u = torch.tensor(-1.0, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=rf"holds {named}, which requires gradients.* as a hyperparameter, or detach"):
        bl.solution(make(), bl.Newton(), bl.Implicit(bl.Direct()), u)
    with torch.no_grad():
        bl.solution(of_losses(lambda w, u: fit(FEATURES, w, u)), bl.Newton(), bl.Implicit(), u)


def test_a_start_that_would_get_no_gradient_is_refused() -> None:
    u = torch.tensor(-1.0, dtype=F64, requires_grad=True)
    problem, start = of_losses(lambda w, u: fit(FEATURES.detach(), w, u)), torch.zeros(3, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"`params` requires gradients, but .* make the start a hyperparameter"):
        bl.solution(problem, bl.GradientDescent(steps=2), bl.FullUnroll(), u, start)
    bl.solution(problem, bl.Newton(), bl.Implicit(), u, start).sum().backward()


def test_a_loss_may_make_leaves_of_its_own() -> None:
    def inner(w: Tensor, u: Tensor) -> Tensor:
        t = torch.linspace(0.0, 1.0, 5, dtype=F64).requires_grad_()
        (slope,) = torch.autograd.grad((w[0] * t + w[1] * t**2).sum(), t, create_graph=True)
        return (slope - u * t).square().mean()

    u = torch.tensor(2.0, dtype=F64, requires_grad=True)
    problem = bl.BilevelProblem(inner, lambda w, u: w.sum(), torch.zeros(2, dtype=F64))
    x = bl.solution(problem, bl.Newton(), bl.Implicit(bl.Direct()), u)
    (by_u,) = torch.autograd.grad(x[1], u)
    assert float(by_u) == pytest.approx(0.5, rel=1e-9)  # the slope w_0 + 2 w_1 t is u t


def test_inference_mode_is_refused_and_its_tensors_are_copied() -> None:
    with torch.inference_mode():
        u = torch.tensor([0.3, 0.7], dtype=F64)
        with pytest.raises(ValueError, match=r"torch.inference_mode\(\) is on.* use torch.no_grad\(\) there"):
            doubled(u)
    assert float(doubled(u)) == pytest.approx(float(u.sin().sum()), rel=1e-12)


# modules -------------------------------------------------------------------------------------------------------------


def regression(module: nn.Module, X: Tensor, y: Tensor) -> bl.BilevelProblem:
    def inner(model: Any, params: Any, decay: Tensor) -> Tensor:
        return ((model(X) - y) ** 2).mean() + decay.exp() * sum((p * p).sum() for p in params.values())

    def outer(model: Any, params: Any, decay: Tensor) -> Tensor:
        return ((model(X.flip(0)) - y) ** 2).mean()

    return bl.ModuleProblem(module, inner, outer)


def test_a_linear_module_gives_the_hypergradient_of_ridge_regression() -> None:
    X, y = normal(3, 20, 4), normal(4, 20, 1)
    module = nn.Linear(4, 1, bias=False, dtype=F64)
    u = torch.tensor(-1.0, dtype=F64)
    problem = regression(module, X, y)
    estimate = bl.hypergradient(problem, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct()), u)
    H = 2 * X.t() @ X / 20 + 2 * u.exp() * torch.eye(4, dtype=F64)
    w = torch.linalg.solve(H, 2 * X.t() @ y[:, 0] / 20)
    by_w = 2 * X.flip(0).t() @ (X.flip(0) @ w - y[:, 0]) / 20
    expected = -(2 * u.exp() * w) @ torch.linalg.solve(H, by_w)
    torch.testing.assert_close(estimate.hypergradient, expected, rtol=1e-11, atol=1e-12)


def small_net() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, dtype=F64), nn.BatchNorm1d(3, dtype=F64), nn.Tanh(), nn.Linear(3, 1, dtype=F64))
    return net, normal(5, 12, 4), normal(6, 12, 1)


def test_batch_norm_in_train_mode_normalises_by_the_batch_and_leaves_the_module_alone() -> None:
    net, X, y = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    problem = regression(net, X, y)
    u, solver = torch.tensor(-2.0, dtype=F64), bl.GradientDescent(0.05, steps=8)
    unrolled, differences = (
        bl.hypergradient(problem, solver, estimator, u).hypergradient
        for estimator in (bl.FullUnroll(), bl.FiniteDifference())
    )
    torch.testing.assert_close(unrolled, differences, rtol=1e-7, atol=1e-9)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in net.parameters())
    other = regression(net.eval(), X, y)
    assert not torch.allclose(bl.hypergradient(other, solver, bl.FullUnroll(), u).hypergradient, unrolled)


class Drifting(nn.Module):
    """A layer that changes a buffer in every call, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, dtype=F64))
        self.register_buffer("scale", torch.ones((), dtype=F64))

    def forward(self, X: Tensor) -> Tensor:
        self.scale.mul_(1.1)
        return X @ self.weight * self.scale


def test_a_layer_that_changes_its_buffers_in_place_is_refused_and_left_as_it_was() -> None:
    module = Drifting()
    problem = regression(module, normal(5, 12, 4), normal(6, 12, 1))
    u, solver = torch.tensor(-2.0, dtype=F64), bl.GradientDescent(0.05, steps=5)
    with pytest.raises(ValueError, match="the module of `outer_loss` changes its buffer 'scale' in every forward pass"):
        bl.hypergradient(problem, solver, bl.FullUnroll(), u)
    assert float(module.scale) == 1.0


def test_frozen_parameters_are_constants_and_tied_ones_are_counted_once() -> None:
    net, X, y = small_net()
    net[0].weight.requires_grad_(False)
    net[3] = nn.Linear(3, 3, dtype=F64)
    net.append(nn.Linear(3, 3, dtype=F64))
    net[4].weight = net[3].weight
    problem = regression(net, X, y)
    assert set(problem.trainable(problem.params)) == {"0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.bias"}
    u, solver = torch.tensor(-2.0, dtype=F64), bl.GradientDescent(0.05, steps=5)
    unrolled, differences = (
        bl.hypergradient(problem, solver, estimator, u).hypergradient
        for estimator in (bl.FullUnroll(), bl.FiniteDifference())
    )
    torch.testing.assert_close(unrolled, differences, rtol=1e-7, atol=1e-9)


def test_active_dropout_and_a_module_without_parameters_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"random layer '1' .* is active.*give `seed=`.*module.eval\(\) first"):
        regression(net, normal(5, 3, 4), normal(6, 3, 1))
    regression(net.eval(), normal(5, 3, 4).float(), normal(6, 3, 1).float())
    with pytest.raises(ValueError, match="the module has no parameters that require gradients"):
        regression(nn.Tanh(), normal(5, 3, 4), normal(6, 3, 1))


# cost ----------------------------------------------------------------------------------------------------------------


def counted(estimator: Any, solver: Any, **options: Any) -> dict[str, int]:
    case = ridge_case()
    return dict(bl.hypergradient(case.problem, solver, estimator, case.hparams, **options).cost.counts)


def test_oracle_calls_are_those_counted_by_hand() -> None:
    # Beside K steps: the residual at the end, and that of the start, which the divergence guard compares it with.
    steps = {"gradient": 10 + 2, "outer": 1}
    solver = bl.GradientDescent(STEP, steps=10)
    assert counted(bl.FullUnroll(), solver) == steps | {"vjp": 10}
    assert counted(bl.TruncatedUnroll(tail=3), solver) == steps | {"vjp": 3}
    assert counted(bl.FullUnroll(mode="forward"), solver) == steps | {"jvp": 10 * 5}
    # Five unknowns: the product for each of the CG steps, one for the true residual.
    case = ridge_case()
    estimate = bl.hypergradient(case.problem, solver, bl.Implicit(bl.CG(tol=1e-13)), case.hparams)
    cg = estimate.certificate.adjoint_steps
    assert cg <= 6
    assert dict(estimate.cost.counts) == steps | {"hvp": cg + 1, "cross": 1}
    assert estimate.cost.gradient_equivalents == 12 + 1 + 2 * (cg + 1) + 1


def test_with_a_tolerance_each_iterate_costs_one_gradient_whether_looked_at_or_stepped_from() -> None:
    case = ridge_case()
    estimate = bl.hypergradient(case.problem, bl.GradientDescent(STEP, tol=1e-6), bl.TruncatedUnroll(5), case.hparams)
    assert estimate.cost.counts["gradient"] == estimate.certificate.inner_steps + 1
    assert estimate.cost.counts["vjp"] == 5


def test_certifying_adds_nothing_to_the_cost_of_the_estimate() -> None:
    solver = bl.GradientDescent(STEP, steps=10)
    assert counted(bl.Implicit(), solver, certify=True) == counted(bl.Implicit(), solver)


class Watched(bl.GradientDescent):
    """Gradient descent that notes its iterates without keeping them."""

    seen: ClassVar[list[Any]] = []

    def step(self, inner: Any, state: Any) -> Any:
        new = super().step(inner, state)
        self.seen.append(weakref.ref(new.params))
        return new


@pytest.mark.parametrize(
    ("estimator", "kept"),
    [
        (bl.FullUnroll(), 40),
        (bl.TruncatedUnroll(tail=7), 7),
        (bl.TruncatedUnroll(tail=0.25), 10),
        (bl.Implicit(), 0),
        (bl.FullUnroll(mode="forward"), 0),
    ],
    ids=repr,
)
def test_only_the_iterates_that_the_derivative_needs_stay_alive(estimator: Any, kept: int) -> None:
    case = ridge_case()
    solver = Watched(STEP, steps=40)
    Watched.seen.clear()
    solved = estimator.solve(bl.Run(case.problem, solver, case.hparams, case.problem.params))
    gc.collect()
    alive = sum(ref() is not None for ref in Watched.seen)
    # The start is no product of a step; the last iterate and what the oracle keeps of it belong to the solution.
    assert kept - 1 <= alive <= kept + 2
    del solved


def test_a_full_unroll_takes_one_params_a_step_and_no_graph() -> None:
    size = 20_000
    data = normal(7, size)
    problem = bl.BilevelProblem(
        lambda w, u: 0.5 * ((w - data) ** 2).sum() + 0.5 * u * (w * w).sum(),
        lambda w, u: w.sum(),
        torch.zeros(size, dtype=F64),
    )
    peaks = {}
    for steps in (50, 100):
        solver = bl.GradientDescent(0.3, steps=steps)
        cost = bl.hypergradient(problem, solver, bl.FullUnroll(), torch.tensor(0.1, dtype=F64)).cost
        peaks[steps] = cost.peak_memory
    if peaks[50] is not None:
        growth = (peaks[100] - peaks[50]) / 50 / (8 * size)
        assert 0.9 < growth < 1.2


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
def test_momentum_zero_is_gradient_descent(momentum: float) -> None:
    case = ridge_case()
    plain = bl.hypergradient(case.problem, bl.GradientDescent(STEP, steps=9), bl.FullUnroll(), case.hparams)
    for cls in (bl.HeavyBall, bl.Nesterov):
        other = bl.hypergradient(case.problem, cls(STEP, momentum, steps=9), bl.FullUnroll(), case.hparams)
        assert torch.allclose(other.hypergradient, plain.hypergradient, rtol=1e-13, atol=0) == (momentum == 0.0)


@pytest.mark.parametrize("call", [bl.solution, bl.check_hypergradient])
def test_arguments_in_the_wrong_order_are_refused(call: Any) -> None:
    case = ridge_case()
    with pytest.raises(ValueError, match=r"^expected \(problem, solver, estimator, hparams\), got GradientDescent in"):
        call(bl.GradientDescent(), case.problem, bl.Implicit(), case.hparams)


def test_results_that_are_kept_do_not_hold_their_runs() -> None:
    runs = []

    class Seen(bl.FullUnroll):
        def solve(self, run):
            solved = super().solve(run)
            runs.extend((weakref.ref(run), weakref.ref(solved.pullback)))
            return solved

    case, solver = ridge_case(), bl.GradientDescent(steps=9)
    estimators = [Seen(memory=memory) for memory in ("iterates", "checkpoint", "graph")]
    kept = [bl.hypergradient(case.problem, solver, each, case.hparams) for each in estimators for _ in range(2)]
    gc.collect()
    assert len(runs) == 2 * len(kept)
    assert all(each() is None for each in runs)
