"""Modules as inner problems: BatchNorm's running statistics, random layers, tied and frozen parameters, autocast."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import F64, normal
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, mse_loss

import bilevel as bl
from bilevel.core import tree
from bilevel.networks.batch_norm import BatchNormLayers
from bilevel.oracles.inner_problem import InnerProblem

X, Y, V, Z = normal(1, 12, 3), normal(2, 12, 1), normal(3, 5, 3), normal(4, 5, 1)
U = torch.tensor(-1.0, dtype=F64)
STEP, STEPS = 0.1, 7
DIFFERENCES = bl.FiniteDifference()
SGD = bl.GradientDescent(STEP, steps=STEPS)
UNROLLS = [
    bl.FullUnroll(),
    bl.FullUnroll(memory="checkpoint"),
    bl.FullUnroll(memory="graph"),
    bl.FullUnroll(mode="forward"),
    bl.TruncatedUnroll(tail=STEPS),
]


def decayed(X: Tensor = X, Y: Tensor = Y) -> Callable[..., Tensor]:
    def loss(model: Any, params: Any, u: Tensor, batch: Any = None) -> Tensor:
        inputs, targets = (X, Y) if batch is None else batch
        return mse_loss(model(inputs), targets) + 0.1 * u.exp() * sum(p.square().sum() for p in params.values())

    return loss


def evaluated(model: Any, params: Any, u: Any) -> Tensor:
    return mse_loss(model.eval()(V), Z)


def net(momentum: float | None = 0.3, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Tanh(), nn.Linear(4, 1))
    return made.double()


def normalised(**options: Any) -> bl.BilevelProblem:
    return bl.ModuleProblem(net(), decayed(), evaluated, **options)


def value(estimate: bl.Estimate) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(estimate.hypergradient)])


def hypergradient(problem: bl.BilevelProblem, solver: Any, estimator: Any, u: Any = U, **options: Any) -> Tensor:
    return value(bl.hypergradient(problem, solver, estimator, u, **options))


def close(ours: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(ours.reshape(-1), expected.detach().reshape(-1), rtol=rtol, atol=rtol)


def _grads(loss: Tensor, at: Any) -> Any:
    return torch.autograd.grad(loss, at, create_graph=True)


def by_hand(u: Tensor, momentum: float = 0.3, first: int = 0) -> Tensor:
    """The outer loss of `normalised` after the steps, of which those before `first` are constants."""
    W, c, gamma, beta, A, a = (p.detach().clone().requires_grad_() for p in net().parameters())
    mean, variance = torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)
    for k in range(STEPS):
        h = X @ W.t() + c
        m, s = h.mean(0), h.var(0, unbiased=False)
        prediction = torch.tanh((h - m) / (s + 1e-5).sqrt() * gamma + beta) @ A.t() + a
        weights = (W, c, gamma, beta, A, a)
        loss = (prediction - Y).square().mean() + 0.1 * u.exp() * sum(p.square().sum() for p in weights)
        moved = [p - STEP * g for p, g in zip(weights, _grads(loss, weights), strict=True)]
        mean, variance = (1 - momentum) * mean + momentum * m, (1 - momentum) * variance + momentum * s * 12 / 11
        if k < first:
            moved, mean, variance = [p.detach().requires_grad_() for p in moved], mean.detach(), variance.detach()
        W, c, gamma, beta, A, a = moved
    h = (V @ W.t() + c - mean) / (variance + 1e-5).sqrt() * gamma + beta
    return (torch.tanh(h) @ A.t() + a - Z).square().mean()


# BatchNorm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", UNROLLS, ids=str)
def test_the_unrolled_hypergradient_of_running_statistics_is_that_of_a_loop_by_hand(estimator: Any) -> None:
    u = U.clone().requires_grad_()
    loss = by_hand(u)
    estimate = bl.hypergradient(normalised(), SGD, estimator, U)
    assert estimate.outer_loss == pytest.approx(float(loss.detach()), rel=1e-12)
    close(value(estimate), torch.autograd.grad(loss, u)[0])


def test_a_truncated_tail_takes_the_statistics_before_it_for_constants() -> None:
    u = U.clone().requires_grad_()
    ours = hypergradient(normalised(), SGD, bl.TruncatedUnroll(tail=3))
    close(ours, torch.autograd.grad(by_hand(u, first=STEPS - 3), u)[0])


@pytest.mark.parametrize(
    "solver",
    [
        bl.Nesterov(STEP, 0.9, steps=STEPS),
        bl.HeavyBall(STEP, 0.9, steps=STEPS),
        bl.Adam(0.02, steps=STEPS),
        bl.GradientDescent("auto", steps=STEPS),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_central_differences_of_the_whole_run_agree_for_every_solver(solver: Any) -> None:
    problem = normalised()
    differences = hypergradient(problem, solver, DIFFERENCES)
    close(hypergradient(problem, solver, bl.FullUnroll()), differences, 1e-7)
    assert abs(float(differences)) > 1e-4


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False)])
def test_third_derivatives_that_are_wrong_in_torch_are_refused(norm: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 1)).double()
    problem = bl.ModuleProblem(module, decayed(), flipped)
    with pytest.raises(ValueError, match=r"third derivatives, which torch has wrong for the normalising layer '1'"):
        bl.hypergradient(problem, bl.Newton(damping=1e3, steps=2), bl.FullUnroll(), U)
    assert bl.hypergradient(scaled(), bl.Newton(), bl.Implicit(), PAIR).status.ok


class Convolutional(nn.Module):
    """Two normalised convolutions, the second of which is called twice."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(2, momentum=momentum), nn.BatchNorm2d(2, momentum=momentum, affine=False)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(input=self.first(x)))
        for _ in range(2):
            x = torch.tanh(self.two(self.second(x)))
        return self.head(x.mean((2, 3)))


IMAGES = normal(5, 12, 1, 5, 5)


def convolutional(momentum: float | None = 0.2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Convolutional(momentum).double()


@pytest.mark.parametrize("momentum", [0.2, 1.0, None])
@pytest.mark.parametrize("batched", [False, True])
def test_the_statistics_are_those_of_torchs_own_training_loop(momentum: float | None, batched: bool) -> None:
    module, loss = convolutional(momentum), decayed(IMAGES, Y)
    sampler = bl.MiniBatches((IMAGES, Y), batch_size=4, seed=0) if batched else None
    problem = bl.ModuleProblem(module, loss, lambda model, p, u: mse_loss(model(IMAGES), Y), sampler=sampler)
    params = bl.hypergradient(problem, SGD, bl.TruncatedUnroll(tail=1), U).params
    optimizer = torch.optim.SGD(module.parameters(), lr=STEP)
    for k in range(STEPS):
        optimizer.zero_grad()
        loss(module, dict(module.named_parameters()), U, sampler(k) if sampler else None).backward()
        optimizer.step()
    for name, expected in module.state_dict().items():
        torch.testing.assert_close(params[name], expected.to(F64), rtol=1e-12, atol=1e-12, msg=name)
    convolutional().load_state_dict(params)


@pytest.mark.parametrize("momentum", [0.2, None])
def test_a_layer_called_twice_and_mini_batches_are_differentiated_exactly(momentum: float | None) -> None:
    def outer(model: Any, params: Any, u: Any) -> Tensor:
        return mse_loss(model.eval()(IMAGES[:3]), Y[:3])

    problem = bl.ModuleProblem(
        convolutional(momentum), decayed(), outer, sampler=bl.MiniBatches((IMAGES, Y), batch_size=4, seed=0)
    )
    differences = hypergradient(problem, SGD, DIFFERENCES)
    for estimator in (bl.FullUnroll(), bl.FullUnroll(memory="graph"), bl.FullUnroll(mode="forward")):
        close(hypergradient(problem, SGD, estimator), differences, 1e-7)
    if momentum is not None:  # the average over all batches is a number that torch reads from its counter
        close(hypergradient(bl.trace(problem), SGD, bl.FullUnroll()), differences, 1e-7)


def scaled(outer: Callable[..., Tensor] = evaluated, **options: Any) -> bl.BilevelProblem:
    """A convex enough problem, whose hyperparameters also scale the inputs: statistics depend on them at once."""
    module = net()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}

    def inner(model: Any, params: Any, u: Tensor) -> Tensor:
        pull = sum((p - start[name]).square().sum() for name, p in params.items())
        return mse_loss(model(X * u[1]), Y) + u[0].exp() * pull

    return bl.ModuleProblem(module, inner, outer, **options)


PAIR = torch.tensor([3.0, 0.7], dtype=F64)


@pytest.fixture(scope="module")
def long_runs() -> list[Tensor]:
    """Hypergradients of a run so long that the running statistics have come to rest, unrolled and by differences."""
    solver = bl.GradientDescent("auto", steps=150)
    return [hypergradient(scaled(), solver, estimator, PAIR) for estimator in (bl.FullUnroll(), bl.FiniteDifference())]


@pytest.mark.parametrize("linear", [bl.CG(tol=1e-13), bl.Direct(), bl.GMRES(tol=1e-13)], ids=lambda x: type(x).__name__)
def test_implicit_differentiation_takes_the_statistics_for_a_function_of_the_solution(
    linear: Any, long_runs: list[Tensor]
) -> None:
    problem, solver = scaled(), bl.GradientDescent("auto", tol=1e-12)
    estimate = bl.hypergradient(problem, solver, bl.Implicit(linear), PAIR, certify=True)
    # The running statistics of a long run end where Implicit says they are.
    unrolled, differences = long_runs
    close(value(estimate), unrolled, 1e-8)
    close(value(estimate), differences, 1e-6)
    hidden = X * PAIR[1] @ estimate.params["0.weight"].t() + estimate.params["0.bias"]
    close(estimate.params["1.running_mean"], hidden.mean(0))
    close(estimate.params["1.running_var"], hidden.var(0))
    assert estimate.certificate.error_kind == "estimate"
    assert estimate.certificate.error < 1e-8


def test_what_never_moves_is_a_constant_of_implicit_differentiation() -> None:
    module = net(momentum=0.0)
    problem = bl.ModuleProblem(module, decayed(), evaluated)
    frozen = bl.ModuleProblem(
        module, decayed(), lambda model, p, u: mse_loss(torch.tanh(_fixed(p, V)) @ p["3.weight"].t() + p["3.bias"], Z)
    )
    solver, estimator = bl.GradientDescent("auto", steps=50), bl.Implicit(damping=5.0)
    close(hypergradient(problem, solver, estimator), hypergradient(frozen, solver, estimator), 1e-9)


def _fixed(p: Any, inputs: Tensor) -> Tensor:
    scale = (1 + 1e-5) ** -0.5
    return (inputs @ p["0.weight"].t() + p["0.bias"]) * scale * p["1.weight"] + p["1.bias"]


def test_a_warm_start_continues_the_statistics() -> None:
    problem = normalised()
    first = bl.hypergradient(problem, bl.GradientDescent(STEP, steps=3), bl.FullUnroll(), U)
    second = bl.hypergradient(problem, bl.GradientDescent(STEP, steps=4), bl.FullUnroll(), U, carry=first.carry)
    whole = bl.hypergradient(problem, SGD, bl.FullUnroll(), U)
    assert all(torch.equal(second.params[name], each) for name, each in whole.params.items())


@pytest.mark.parametrize("estimator", [bl.FullUnroll(memory="checkpoint"), bl.Implicit(damping=10.0)], ids=str)
def test_a_run_that_resumes_continues_bit_for_bit(estimator: Any) -> None:
    def made() -> bl.OuterOptimizer:
        module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), *list(net())[1:]).double()
        module[0].load_state_dict(net()[0].state_dict())
        problem = bl.ModuleProblem(
            module, decayed(), evaluated, sampler=bl.MiniBatches((X, Y), batch_size=4, seed=0), seed=3
        )
        return bl.OuterOptimizer(problem, SGD, estimator, U)

    whole, part, again = made(), made(), made()
    whole.run(4, progress=False)
    part.run(2, progress=False)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    again.run(2, progress=False)
    assert torch.equal(again.hparams, whole.hparams)
    for name, each in whole.carry.state.params.items():
        assert torch.equal(again.carry.state.params[name], each), name


def test_a_start_may_leave_the_statistics_to_the_module() -> None:
    problem = normalised()
    start = {name: p.detach() for name, p in net(seed=4).named_parameters()}
    params = bl.hypergradient(problem, SGD, bl.FullUnroll(), U, params=start).params
    assert list(params) == list(problem.params)
    with pytest.raises(ValueError, match=r"`params` lacks the parameter '0.bias' of the module\."):
        problem.start({"0.weight": start["0.weight"]})


def test_the_layer_differentiates_the_statistics() -> None:
    u = U.clone().requires_grad_()
    found = bl.solution(normalised(), SGD, bl.FullUnroll(), u)
    (ours,) = torch.autograd.grad(found["1.running_var"].sum(), u)
    ends = [bl.solution(normalised(), SGD, bl.FullUnroll(), U + h)["1.running_var"].sum() for h in (1e-5, -1e-5)]
    close(ours, (ends[0] - ends[1]) / 2e-5, 1e-7)


def test_statistics_that_the_outer_loss_does_not_read_cost_nothing() -> None:
    problem = bl.ModuleProblem(net(), decayed(), lambda model, p, u: mse_loss(model(V), Z))
    estimate = bl.hypergradient(problem, SGD, bl.FullUnroll(), U)
    assert estimate.cost.counts == {"gradient": STEPS + 2, "outer": 1, "vjp": STEPS}
    close(value(estimate), hypergradient(problem, SGD, DIFFERENCES), 1e-7)


@pytest.mark.parametrize("solver", [bl.Newton(tol=1e-30), bl.QuasiNewton(tol=1e-30)], ids=lambda x: type(x).__name__)
def test_a_solver_at_the_rounding_floor_still_ends(solver: Any) -> None:
    estimate = bl.hypergradient(scaled(), solver, bl.Implicit(), PAIR, on_failure="return")
    assert estimate.certificate.inner_steps < 200
    assert estimate.certificate.inner_residual < 1e-12


def test_without_moving_statistics_the_problem_is_as_plain_as_ever() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).double()
    for module in (net().eval(), plain):
        problem = bl.ModuleProblem(module, decayed(), evaluated)
        assert set(problem.params) == {name for name, _ in module.named_parameters()}
        assert type(problem.bind(U)) is InnerProblem
        assert problem.statistics is None
    # In evaluation mode a layer without statistics still normalises by the batch.
    model = plain.eval()
    close(evaluated(model, None, None), problem.outer_loss(problem.params, U))


def test_evaluation_mode_is_that_of_torch_and_the_module_stays_as_it_is() -> None:
    module = net()
    module[0].eval()
    before = copy.deepcopy(module.state_dict())
    problem = bl.ModuleProblem(module, decayed(), evaluated)
    estimate = bl.hypergradient(problem, SGD, bl.FullUnroll(), U)
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    assert [part.training for part in module] == [False, True, True, True]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    module.load_state_dict(estimate.params)
    assert float(evaluated(module, None, None).detach()) == pytest.approx(estimate.outer_loss, rel=1e-13)


def test_what_running_statistics_do_not_go_with_is_refused() -> None:
    problem = normalised()
    for estimator in (bl.AdaptiveUnroll(), bl.AdaptiveUnroll(budget=100, tail=3), bl.BalancedImplicit()):
        with pytest.raises(
            ValueError, match="has running statistics, which move besides the parameters: use TruncatedUnroll"
        ):
            bl.hypergradient(problem, SGD, estimator, U)
    with pytest.raises(ValueError, match=r"running statistics.* does not run in batches"):
        bl.hypergradient(problem, SGD, bl.FullUnroll(), U.expand(2), batch=2)
    reads = bl.ModuleProblem(net(), lambda model, p, u: mse_loss(model.eval()(X), Y) * u, evaluated)
    with pytest.raises(ValueError, match=r"`model.eval\(\)` in the inner loss would read running statistics"):
        bl.hypergradient(reads, SGD, bl.FullUnroll(), U)


def test_a_batch_of_one_row_is_refused_with_the_layers_name() -> None:
    problem = bl.ModuleProblem(net(), decayed(), evaluated, sampler=bl.MiniBatches((X, Y), batch_size=1, seed=0))
    sentence = r"BatchNorm layer '1' is in train mode and got one value per channel.*\(1, 4\).*at least two rows"
    with pytest.raises(ValueError, match=sentence):
        bl.hypergradient(problem, SGD, bl.FullUnroll(), U)
    one = bl.ModuleProblem(net(), decayed(), lambda model, p, u: mse_loss(model(V[:1]), Z[:1]))
    with pytest.raises(ValueError, match=r"in the outer loss: call model.eval\(\)"):
        bl.hypergradient(one, SGD, bl.FullUnroll(), U)
    bl.hypergradient(bl.ModuleProblem(net().eval(), decayed(X[:1], Y[:1]), evaluated), SGD, UNROLLS[0], U)


# Random layers -------------------------------------------------------------------------------------------------------


def dropped(seed: int | None = 3, outer: Callable[..., Tensor] = evaluated) -> bl.BilevelProblem:
    module = nn.Sequential(*list(net())[:2], nn.Dropout(0.4), *list(net())[2:])
    return bl.ModuleProblem(module, decayed(), outer, seed=seed)


@pytest.mark.parametrize("estimator", UNROLLS, ids=str)
def test_every_pass_sees_the_masks_of_its_step_again(estimator: Any) -> None:
    before = torch.get_rng_state()
    ours = hypergradient(dropped(), SGD, estimator)
    close(ours, hypergradient(dropped(), SGD, DIFFERENCES), 1e-7)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.allclose(ours, hypergradient(dropped(seed=4), SGD, estimator))


def test_steps_have_different_masks_and_what_is_no_step_has_one_of_its_own() -> None:
    inner = dropped().bind(U)
    problems = [inner, *(inner.on_step(k) for k in range(3))]
    start = dropped().params
    losses = [float(each.value(start)) for each in problems]
    assert len(set(losses)) == 4
    assert losses == [float(each.value(start)) for each in problems]
    assert float(inner.on_step(1).value(start)) == losses[2]
    residual = bl.hypergradient(dropped(), SGD, bl.FullUnroll(), U)
    gradient = tree.norm(inner.grad(residual.params))
    assert residual.certificate.inner_residual == pytest.approx(float(gradient), rel=1e-12)


def test_a_warm_start_goes_on_to_the_next_masks() -> None:
    first = bl.hypergradient(dropped(), bl.GradientDescent(STEP, steps=3), bl.FullUnroll(), U)
    solver = bl.GradientDescent(STEP, steps=4)
    second = bl.hypergradient(dropped(), solver, bl.FullUnroll(), U, carry=first.carry)
    whole = bl.hypergradient(dropped(), SGD, bl.FullUnroll(), U)
    assert all(torch.equal(second.params[name], each) for name, each in whole.params.items())


def test_implicit_differentiation_uses_one_fixed_draw() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Linear(4, 1)).double()

    def problem(seed: int) -> bl.BilevelProblem:
        return bl.ModuleProblem(module, decayed(), evaluated, seed=seed)

    solver, estimator = bl.GradientDescent(STEP, steps=3), bl.Implicit(bl.Direct(), damping=10.0)
    one, again = (hypergradient(problem(5), solver, estimator) for _ in range(2))
    assert torch.equal(one, again)
    inner = problem(5).bind(U)
    dense = inner.linearize(problem(5).params).dense_hessian()
    close(dense, inner.linearize(problem(5).params).dense_hessian(), 0.0)


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(3, 3, num_layers=2, dropout=0.5), nn.MultiheadAttention(3, 1, dropout=0.1), nn.RReLU(), nn.Dropout(0.2)],
    ids=lambda layer: type(layer).__name__,
)
def test_random_layers_without_a_seed_are_refused_by_name(layer: nn.Module) -> None:
    module = nn.ModuleDict({"body": nn.Linear(3, 3), "random": layer})
    with pytest.raises(ValueError, match=r"random layer 'random'.*give `seed=` to fix its draws"):
        bl.ModuleProblem(module, decayed(), evaluated)
    bl.ModuleProblem(module, decayed(), evaluated, seed=0)
    bl.ModuleProblem(module.eval(), decayed(), evaluated)


def test_random_numbers_that_no_layer_shows_are_noticed() -> None:
    def noisy(model: Any, params: Any, u: Tensor) -> Tensor:
        return mse_loss(dropout(model(X), 0.3), Y) + u.exp() * params["0.weight"].square().sum()

    problem = bl.ModuleProblem(net(), noisy, evaluated)
    with pytest.raises(ValueError, match=r"`inner_loss` draws random numbers.*ModuleProblem\(..., seed=...\)"):
        bl.hypergradient(problem, SGD, bl.FullUnroll(), U)
    seeded = bl.ModuleProblem(net(), noisy, evaluated, seed=0)
    close(hypergradient(seeded, SGD, bl.FullUnroll()), hypergradient(seeded, SGD, DIFFERENCES), 1e-7)


def test_what_random_layers_do_not_go_with_is_refused() -> None:
    for seed in (-1, True, "0"):
        with pytest.raises(ValueError, match=r"`ModuleProblem.seed` must be an int that is not negative or None, got"):
            dropped(seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`seed` for random layers cannot be traced"):
        bl.trace(dropped())
    with pytest.raises(ValueError, match="has random layers, whose steps see different draws: use TruncatedUnroll"):
        bl.hypergradient(dropped(), SGD, bl.AdaptiveUnroll(), U)
    with pytest.raises(ValueError, match=r"random layers.* does not run in batches"):
        bl.hypergradient(dropped(), SGD, bl.FullUnroll(), U.expand(2), batch=2)


# Any module ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Tied weights, a frozen layer, a constant buffer, and a submodule that appears twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.again = self.encode
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]))
        self.register_buffer("positions", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(torch.tanh(self.encode(x)) * self.scale) + self.positions
        return self.frozen(torch.tanh(self.decode(h))).sum(1, keepdim=True)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(3, 4, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.reshape(4, -1, 3))[0]).reshape(-1, 1)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.head(self.layer(self.lift(x.reshape(4, -1, 3)))).reshape(-1, 1)


MODULES = {
    "tied": Tied,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "transformer": Attentive,
    "orthogonal": lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Linear(3, 3), "weight", "cayley"), nn.Linear(3, 1)
    ),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.GELU(), nn.Linear(4, 1)),
}


def plain_unroll(module: nn.Module, dtype: Any = None) -> Tensor:
    """The hypergradient by plain torch: steps of `torch.func.functional_call` in one graph."""

    def cast() -> Any:
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)

    u = U.to(next(module.parameters()).dtype).requires_grad_()
    params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}
    like = next(iter(params.values()))
    for _ in range(STEPS):
        with cast():
            # A copy each time: functional_call does not restore a submodule that has two names.
            prediction = torch.func.functional_call(copy.deepcopy(module), params, X.to(like))
        loss = mse_loss(prediction.to(like), Y.to(like))
        loss = loss + 0.1 * u.exp() * sum(p.square().sum() for p in params.values())
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: p - STEP * g for (name, p), g in zip(params.items(), gradients, strict=True)}
    with cast():
        prediction = torch.func.functional_call(copy.deepcopy(module), params, X.flip(0).to(like))
    return torch.autograd.grad(mse_loss(prediction.to(like), Y.to(like)), u)[0]


def flipped(model: Any, params: Any, u: Any) -> Tensor:
    return mse_loss(model(X.flip(0)), Y)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_any_shape_has_the_hypergradient_of_plain_torch(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MODULES[name]().double()
    problem = bl.ModuleProblem(module, decayed(), flipped)
    expected = plain_unroll(module)
    for estimator in UNROLLS:
        close(hypergradient(problem, SGD, estimator), expected, 1e-10)
    inner = problem.bind(U)
    point, v = inner.linearize(problem.params), problem.params
    ends = [inner._grad(tree.add(problem.params, v, h)) for h in (1e-5, -1e-5)]
    for ours, up, down in zip(*map(tree.leaves, (point.hvp(v), *ends)), strict=True):
        close(ours, (up - down) / 2e-5, 1e-6)


def test_a_module_with_shared_parts_is_left_as_it_was() -> None:
    module = Tied().double()
    before = dict(module.named_parameters(remove_duplicate=False))
    problem = bl.ModuleProblem(module, decayed(), flipped)
    bl.hypergradient(problem, SGD, bl.FullUnroll(), U)
    after = dict(module.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())
    assert set(problem.params) == {"encode.weight", "encode.bias", "decode.bias"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weight_norm_whose_second_derivatives_are_wrong_in_torch_is_refused() -> None:
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        module = nn.Sequential(norm(nn.Linear(3, 4)), nn.Linear(4, 1))
        with pytest.raises(
            ValueError, match=r"torch's weight norm of the layer '0' has wrong second derivatives: remove it"
        ):
            bl.ModuleProblem(module, decayed(), evaluated)


@pytest.mark.parametrize("around", [False, True], ids=["inside the loss", "around the call"])
@pytest.mark.parametrize("memory", ["iterates", "graph"])
def test_autocast_gives_what_plain_torch_gives_under_it(around: bool, memory: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def cast(here: bool) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=here)

    def loss(inputs: Tensor, weight: float) -> Callable[..., Tensor]:
        def at(model: Any, params: Any, u: Tensor) -> Tensor:
            with nullcontext() if around else cast(True):
                prediction = model(inputs.float())
            penalty = sum(p.square().sum() for p in params.values())
            return mse_loss(prediction.float(), Y.float()) + weight * u.exp() * penalty

        return at

    problem = bl.ModuleProblem(module, loss(X, 0.1), loss(X.flip(0), 0.0))
    with cast(around):
        ours = hypergradient(problem, SGD, bl.FullUnroll(memory=memory), U.float())
        point = problem.bind(U.float()).linearize(problem.params)
        product = point.hvp(problem.params)
    assert ours.dtype == torch.float32
    close(ours, plain_unroll(module, torch.bfloat16), 1e-5 if memory == "graph" else 1e-3)
    assert abs(float(ours - plain_unroll(module))) > 1e-6
    exact = bl.ModuleProblem(module, decayed(X.float(), Y.float()), flipped).bind(U.float())
    expected = exact.linearize(problem.params).hvp(problem.params)
    for name, leaf in product.items():
        close(leaf, expected[name], 3e-2)


def test_batch_norm_keeps_its_statistics_in_full_precision_under_autocast() -> None:
    module = net().float()

    def loss(model: Any, params: Any, u: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = model(X.float())
        return mse_loss(prediction.float(), Y.float()) + u.exp() * params["0.weight"].square().sum()

    problem = bl.ModuleProblem(module, loss, lambda model, p, u: mse_loss(model.eval()(V.float()), Z.float()))
    estimate = bl.hypergradient(problem, SGD, bl.FullUnroll(), U.float())
    optimizer = torch.optim.SGD(module.parameters(), lr=STEP)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(module, dict(module.named_parameters()), U).backward()
        optimizer.step()
    assert estimate.params["1.running_var"].dtype == torch.float32
    close(estimate.params["1.running_var"], module[1].running_var, 1e-3)


def test_one_image_of_several_pixels_has_a_variance() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(18, 1)).double()
    image = torch.linspace(-1.0, 1.0, 18, dtype=torch.float64).reshape(1, 2, 3, 3)
    problem = bl.ModuleProblem(
        module,
        lambda model, params, u: (model(image) - 1.0).square().mean() + u.exp() * params["2.weight"].square().sum(),
        lambda model, params, u: model.eval()(image).square().mean(),
    )
    u = torch.tensor(0.0, dtype=torch.float64)
    estimate = bl.hypergradient(problem, bl.GradientDescent(0.01, steps=2), bl.FullUnroll(), u)
    assert bool(torch.isfinite(estimate.hypergradient))


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_statistics_at_rest_are_where_repeated_batches_end(momentum: float | None) -> None:
    layers = BatchNormLayers(torch.nn.Sequential(torch.nn.BatchNorm1d(2, momentum=momentum).double()))
    draw = torch.Generator().manual_seed(0)
    batches = torch.randn(3, 2, 2, generator=draw, dtype=torch.float64).square()
    tape = [("0", mean, variance) for mean, variance in batches]  # a layer that is called three times
    statistics = layers.start()
    # An average over all batches has nothing to forget: it is there after one round.
    for _ in range(1 if momentum is None else 400):
        statistics = layers.moved(statistics, tape)
    rest = layers.equilibrium(layers.start(), tape)
    for name in ("0.running_mean", "0.running_var"):
        torch.testing.assert_close(rest[name], statistics[name], rtol=1e-12, atol=1e-14)
