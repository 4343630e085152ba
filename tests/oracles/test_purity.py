"""What losses and modules do besides returning a number: refused by name, and the caller's tensors stay its own."""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import random
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import F64, normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import bilevel as bl
from bilevel.core import tree
from bilevel.oracles import contents, purity, ranks

X, Y, V, Z = normal(1, 12, 3), normal(2, 12, 1), normal(3, 8, 3), normal(4, 8, 1)
U = torch.tensor(-3.0, dtype=F64)
GD = bl.GradientDescent(0.1, steps=12)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def fit(model: Any, params: Any, u: Tensor) -> Tensor:
    return (model(X) - Y).square().mean() + u.exp() * sum(p.square().sum() for p in params.values())


def validate(model: Any, params: Any, u: Tensor) -> Tensor:
    return (model(V) - Z).square().mean()


def torch_loop(module: nn.Module, u: Tensor, steps: int = 12) -> tuple[nn.Module, float]:
    """Plain gradient descent on the module itself: where it ends, and its validation loss."""
    own = copy.deepcopy(module)
    for _ in range(steps):
        own.zero_grad()
        fit(own, dict(own.named_parameters()), u).backward()
        with torch.no_grad():
            for p in own.parameters():
                p -= 0.1 * p.grad
    return own, float(validate(own, None, u).detach())


def equals_torch(module: nn.Module) -> None:
    """Params are those of torch's loop, and the hypergradient is the central difference of its validation loss."""
    problem = bl.ModuleProblem(module, fit, validate)
    estimate = bl.hypergradient(problem, GD, bl.FullUnroll(), U)
    for name, p in torch_loop(module, U)[0].named_parameters():
        torch.testing.assert_close(estimate.params[name], p.detach(), rtol=1e-10, atol=1e-12)
    h = 1e-4
    slope = (torch_loop(module, U + h)[1] - torch_loop(module, U - h)[1]) / (2 * h)
    assert float(estimate.hypergradient) == pytest.approx(slope, rel=1e-6)


# Modules whose training is more than a function of their parameters ---------------------------------------------------


def refused_module(text: str, module: nn.Module) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        bl.ModuleProblem(module, fit, validate)


def test_spectral_norm_is_refused_while_its_vectors_move_and_right_in_evaluation_mode() -> None:
    module = network()
    parametrizations.spectral_norm(module[0])
    refused_module("the spectral norm of the layer '0' moves its vectors", module)
    module[0].eval()
    equals_torch(module)
    parametrize.remove_parametrizations(module[0], "weight")
    equals_torch(module)


@pytest.mark.filterwarnings("ignore:.*norm.*is deprecated")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_old_norms_are_refused_with_a_remedy_that_works(kind: str) -> None:
    module = network()
    getattr(nn.utils, kind)(module[0])
    with pytest.raises(ValueError, match=r"norm of the layer '0'.*\(torch\.nn\.utils\.(\w+)\(layer\)\)") as refusal:
        bl.ModuleProblem(module, fit, validate)
    remedy = re.search(r"torch\.nn\.utils\.(\w+)\(layer\)", str(refusal.value))
    assert remedy
    getattr(nn.utils, remedy[1])(module[0])
    equals_torch(module)


class Masked(nn.Module):
    """Rows of a weight that stay where they are, by a parametrization."""

    mask = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=F64)

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", w.detach().clone())

    def forward(self, w: Tensor) -> Tensor:
        return self.mask * w + (1 - self.mask) * self.start


def test_hooks_on_gradients_are_refused_and_a_parametrization_freezes_rows() -> None:
    module = network()
    for register in (module[0].weight.register_hook, module[0].weight.register_post_accumulate_grad_hook):
        handle = register(lambda g: None)
        refused_module("parameter '0.weight' has a hook on its gradient", module)
        handle.remove()
    handle = module[2].register_full_backward_hook(lambda *given: None)
    refused_module("the module's part '2' (Linear) has a backward hook", module)
    handle.remove()
    parametrize.register_parametrization(module[0], "weight", Masked(module[0].weight))
    problem = bl.ModuleProblem(module, lambda m, p, u: fit(m, {"": m(X)}, u), validate)
    estimate = bl.hypergradient(problem, GD, bl.FullUnroll(), U)
    moved = estimate.params["0.parametrizations.weight.original"] - module[0].parametrizations.weight.original
    assert torch.equal(moved[:2], torch.zeros(2, 3, dtype=F64))
    assert float(moved[2:].detach().norm()) > 1e-3


def test_wrappers_over_ranks_and_layers_without_parameters_are_refused() -> None:
    wrapper = type("DistributedDataParallel", (nn.Sequential,), {})(network())
    refused_module("the module is a DistributedDataParallel, which averages gradients", wrapper)
    refused_module("the module's part '0' is a DistributedDataParallel", nn.Sequential(wrapper))
    refused_module("parameter 'weight' has no shape yet: run the module on one batch", nn.LazyLinear(2))


# The caller's tensors -------------------------------------------------------------------------------------------------


def storages(value: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(value)}


ESTIMATORS: dict[str, tuple[bl.InnerSolver, bl.HypergradEstimator]] = {
    "unroll": (GD, bl.FullUnroll()),
    "graph": (GD, bl.FullUnroll(memory="graph")),
    "truncated": (GD, bl.TruncatedUnroll(tail=3)),
    "implicit": (bl.Newton(), bl.Implicit()),
    "quasi-Newton": (bl.QuasiNewton(), bl.Implicit(bl.CG())),
}


@pytest.mark.parametrize(("name", "rows"), [*((name, None) for name in ESTIMATORS), ("unroll", 2), ("truncated", 2)])
def test_results_share_storage_with_nothing(name: str, rows: int | None) -> None:
    solver, estimator = ESTIMATORS[name]
    start = {"a": normal(5, 2), "b": normal(6, 2)}
    hparams = {"u": torch.zeros(2, dtype=F64), "v": torch.zeros(2, dtype=F64)}
    problem = bl.BilevelProblem(
        lambda x, u: (x["a"] - u["u"]).square().sum() + (x["b"] - x["a"]).square().sum() + (x["b"] * u["v"]).sum(),
        lambda x, u: x["a"].sum() + x["b"].square().sum() + u["u"].sum(),
        start,
    )
    if rows is not None:
        problem = problem.batched(rows)
        hparams = {key: leaf.expand(rows, -1).clone() for key, leaf in hparams.items()}
    before = tree.copied((problem.params, hparams))
    first = bl.hypergradient(problem, solver, estimator, hparams, on_failure="return")
    second = bl.hypergradient(problem, solver, estimator, hparams, carry=first.carry, on_failure="return")
    for estimate, given in ((first, second.carry), (second, first.carry)):
        for leaf in (*tree.leaves(estimate.params), *tree.leaves(estimate.hypergradient)):
            leaf.fill_(float("nan"))
        assert not storages(estimate.params) & storages(estimate.hypergradient)
        assert all(bool(torch.isfinite(leaf).all()) for leaf in tree.leaves((given.state.params, given.adjoint or ())))
    assert all(map(torch.equal, tree.leaves(before), tree.leaves((problem.params, hparams))))
    again = bl.hypergradient(problem, solver, estimator, hparams, carry=first.carry, on_failure="return")
    assert all(bool(torch.isfinite(leaf).all()) for leaf in tree.leaves((again.params, again.hypergradient)))


# Losses that are no functions of their arguments ----------------------------------------------------------------------

TARGET = torch.tensor([1.0, -0.5, 2.0], dtype=F64)


def inner(w: Tensor, u: Tensor) -> Tensor:
    return (w - TARGET).square().sum() + u.exp() * w.square().sum()


def outer(w: Tensor, u: Tensor) -> Tensor:
    return (w - 0.5).square().sum()


def with_change(change: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(w: Tensor, u: Tensor) -> Tensor:
        change(w, u)
        return inner(w, u)

    return loss


def in_no_grad(w: Tensor, u: Tensor) -> None:
    with torch.no_grad():
        u.mul_(1.01)


def set_data(w: Tensor, u: Tensor) -> None:
    w.data = w.data.clamp(min=0)


WRITES: dict[str, tuple[str, Callable[[Tensor, Tensor], Any]]] = {
    ".data": ("`params` (clamp_)", lambda w, u: w.data.clamp_(min=0)),
    "no_grad": ("`hparams` (mul_)", in_no_grad),
    "detached, where nothing changes": ("`params` (clamp_)", lambda w, u: w.detach().clamp_(-100, 100)),
    "set_": ("`params` (set_)", lambda w, u: w.data.set_(w.data.clone())),
    "new data": ("`params`", set_data),
    "out": ("`params` (neg)", lambda w, u: torch.neg(w.detach(), out=w.data)),
    "numpy": ("`params`", lambda w, u: np.clip(w.detach().numpy(), -1, 1, out=w.detach().numpy())),
}


def refused(text: str, problem: bl.BilevelProblem, hparams: Tensor = U, **options: Any) -> None:
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for estimator in (bl.FullUnroll(), bl.Implicit(bl.CG())):
        with pytest.raises(ValueError, match=re.escape(text)):
            bl.hypergradient(problem, GD, estimator, hparams, **options)
    assert torch.equal(generators[0], torch.get_rng_state())
    assert (generators[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert generators[2] == random.getstate()


@pytest.mark.parametrize("name", WRITES)
def test_losses_that_write_into_their_arguments_are_refused_and_the_callers_stay(name: str) -> None:
    text, change = WRITES[name]
    start, u = torch.zeros(3, dtype=F64), torch.tensor(-1.0, dtype=F64)
    refused(f"`inner_loss` writes into its argument {text}", bl.BilevelProblem(with_change(change), outer, start), u)
    refused(f"`outer_loss` writes into its argument {text}", bl.BilevelProblem(inner, with_change(change), start), u)
    assert torch.equal(start, torch.zeros(3, dtype=F64))
    assert float(u) == -1.0


def test_writes_into_leaves_data_rows_and_batches_are_named_and_undone() -> None:
    data = {"X": normal(7, 2, 6, 3), "y": normal(8, 2, 6)}
    before = tree.copied(data)

    def fitted(w: Any, u: Tensor, rows: Any) -> Tensor:
        rows["y"].detach().mul_(0.5)
        return (rows["X"] @ w["a"] - rows["y"]).square().sum() + u.exp() * w["a"].square().sum()

    def measured(w: Any, u: Tensor, *rows: Any) -> Tensor:
        return w["a"].square().sum()

    start = {"a": torch.zeros(3, dtype=F64)}
    one = bl.BilevelProblem(fitted, measured, start, data=tree.tree_map(lambda leaf: leaf[0], data))
    refused("`inner_loss` writes into its argument `data['y']` (mul_)", one)
    refused("writes into its argument `data['y']` (mul_)", one.batched(2, data), U.expand(2))
    sampled = bl.BilevelProblem(fitted, measured, start, sampler=bl.MiniBatches(data, 1))
    refused("writes into its argument `batch['y']` (mul_)", sampled)

    def leaf(w: Any, u: Tensor) -> Tensor:
        w["a"].data.clamp_(min=0)
        return w["a"].square().sum() * u.exp()

    refused("writes into its argument `params['a']` (clamp_)", bl.BilevelProblem(leaf, measured, start))
    assert all(map(torch.equal, tree.leaves(before), tree.leaves(data)))


class Holder:
    """Losses as methods, with a state."""

    def __init__(self) -> None:
        self.X, self.array, self.calls, self.mean, self.log = normal(9, 3, 3), np.ones(3), 0, 0.0, [0.0]
        self.cache: dict[str, Tensor] = {}
        self.large = torch.ones(2**20, dtype=F64)

    def centred(self, w: Tensor, u: Tensor) -> Tensor:
        self.X -= self.X.mean()
        return inner(w, u)

    def scaled(self, w: Tensor, u: Tensor) -> Tensor:
        self.array *= 0.5
        return inner(w, u)

    def in_large(self, w: Tensor, u: Tensor) -> Tensor:
        self.large.numpy()[77] += 1
        return inner(w, u)

    def scheduled(self, w: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        return inner(w, u) * (1 if self.calls < 5_000 else 2)

    def averaged(self, w: Tensor, u: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * float(w.detach().sum())
        return inner(w, u) + self.mean * w.sum()

    def previous(self, w: Tensor, u: Tensor) -> Tensor:
        before = self.cache.get("w", w.detach())
        self.cache["w"] = w.detach()
        return inner(w, u) + (w - before).square().sum()

    def stale(self, w: Tensor, u: Tensor) -> Tensor:
        self.cache.setdefault("penalty", u.detach().exp())
        return inner(w, u) + self.cache["penalty"] * w.sum()

    def logging(self, w: Tensor, u: Tensor) -> Tensor:
        """Right: what moves decides nothing."""
        self.calls += 1
        self.log.append(float(inner(w, u).detach()))
        self.cache["last"] = w.detach()
        squares = self.cache.setdefault("squares", TARGET.square())
        return inner(w, u) + 0.0 * squares.sum()


STATES = {
    "centred": "`inner_loss` writes into `self.X` (sub_), which it refers to",
    "scaled": "`inner_loss` writes into `self.array`, which it refers to",
    "in_large": "`inner_loss` writes into `self.large`, which it refers to",
    "scheduled": "it depends on `self.calls`, which moves from call to call",
    "averaged": "it depends on `self.mean`, which moves from call to call",
    "previous": "it depends on `self.cache.w`, which moves from call to call",
    "stale": "it depends on `self.cache.penalty`, which moves from call to call",
}


@pytest.mark.parametrize("name", STATES)
def test_losses_with_a_state_are_refused_by_the_name_of_what_moves(name: str) -> None:
    holder = Holder()
    refused(STATES[name], bl.BilevelProblem(getattr(holder, name), outer, torch.zeros(3, dtype=F64)))
    assert torch.equal(holder.X, normal(9, 3, 3))
    assert (holder.array == 1).all()


def test_logs_and_caches_that_decide_nothing_are_no_fault() -> None:
    start = torch.zeros(3, dtype=F64)
    plain = bl.hypergradient(bl.BilevelProblem(inner, outer, start), GD, bl.FullUnroll(), U)
    logged = bl.hypergradient(bl.BilevelProblem(Holder().logging, outer, start), GD, bl.FullUnroll(), U)
    assert torch.equal(plain.hypergradient, logged.hypergradient)


COUNT = 0


def test_states_in_closures_globals_and_defaults_and_slow_ones_are_found() -> None:
    start = torch.zeros(3, dtype=F64)
    count, hidden = 0, itertools.count()

    def closed(w: Tensor, u: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return inner(w, u) * (1 + (count > 999))

    def named(w: Tensor, u: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return inner(w, u) * (1 + (COUNT > 999))

    def kept(w: Tensor, u: Tensor, memory: list[int] = [0]) -> Tensor:  # noqa: B006
        memory[0] += 1
        return inner(w, u) * (1 + (memory[0] > 999))

    for name, loss in (("count", closed), ("COUNT", named), ("[0].0", kept)):
        refused(f"it depends on `{name}`, which moves from call to call", bl.BilevelProblem(loss, outer, start))
    for turns in (2, 3):
        cycle = itertools.cycle(range(turns))
        turning = bl.BilevelProblem(partial(lambda each, w, u: inner(w, u) * (1 + next(each)), cycle), outer, start)
        for call in (lambda p: purity.look(p, start, U), lambda p: bl.hypergradient(p, GD, bl.FullUnroll(), U)):
            with pytest.raises(ValueError, match=r"`inner_loss` gives other numbers when it is called again"):
                call(turning)
    slow = bl.BilevelProblem(partial(lambda each, w, u: inner(w, u) * (1 + (next(each) > 20)), hidden), outer, start)
    with pytest.raises(ValueError, match=r"`inner_loss` gives other numbers when it is called again .*1.0e\+00"):
        bl.hypergradient(slow, GD, bl.FullUnroll(), U)


def test_values_of_equal_calls_may_differ_by_rounding_and_by_nothing_else() -> None:
    one, nan = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([math.nan, 2.0], dtype=F64)
    assert contents.apart([one, None, nan], [one * (1 + 1e-14), None, nan.clone()]) == 0
    assert contents.apart([one], [one * (1 + 1e-10)]) == pytest.approx(1e-10, rel=1e-4)
    for other in ([nan], [None], [one[:1]], [one, one]):
        assert contents.apart([torch.tensor([0.0, 2.0], dtype=F64)], other) == math.inf


def test_a_sampler_that_returns_another_batch_for_the_same_step_is_refused() -> None:
    rows = {"X": normal(7, 6, 3), "y": normal(8, 6)}
    calls = itertools.count()

    class Wandering(bl.MiniBatches):
        def __call__(self, step: int) -> Any:
            return {**super().__call__(step), "y": torch.full((2,), float(next(calls)), dtype=F64)}

    problem = bl.BilevelProblem(
        lambda w, u, batch: (batch["X"] @ w - batch["y"]).square().sum() + u.exp() * w.square().sum(),
        outer,
        torch.zeros(3, dtype=F64),
        sampler=Wandering(rows, 2),
    )
    with pytest.raises(ValueError, match="returns another batch when a step is asked for again"):
        bl.hypergradient(problem, GD, bl.FullUnroll(), U)


DRAW = torch.Generator().manual_seed(0)
OF_NUMPY = np.random.default_rng(0)
RANDOM: dict[str, tuple[str, Callable[[], float]]] = {
    "torch": ("torch's global generator", lambda: float(torch.rand(()))),
    "a rare event": ("torch's global generator", lambda: float(torch.rand(()) < 1e-9)),
    "a generator": ("the generator `draw.DRAW`", lambda: float(torch.rand((), generator=DRAW))),
    "numpy": ("numpy's global generator", lambda: float(np.random.rand() < 1e-9)),  # noqa: NPY002
    "numpy's generator": ("the generator `draw.OF_NUMPY`", lambda: OF_NUMPY.random()),
    "Python": ("Python's `random`", lambda: random.random()),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_of_any_source_are_refused_in_both_losses(name: str) -> None:
    source, draw = RANDOM[name]
    start = torch.zeros(3, dtype=F64)
    noisy = lambda w, u: inner(w, u) + draw() * w.sum()  # noqa: E731
    for what, problem in (
        ("inner_loss", bl.BilevelProblem(noisy, outer, start)),
        ("outer_loss", bl.BilevelProblem(inner, noisy, start)),
    ):
        refused(f"`{what}` draws random numbers from {source}", problem)
        refused(f"`{what}` draws random numbers from {source}", problem, U.expand(2), batch=2)


def test_the_clock_is_noticed_and_a_loss_that_seeds_itself_is_a_function() -> None:
    start = torch.zeros(3, dtype=F64)
    refused(
        "other numbers when it is called again",
        bl.BilevelProblem(lambda w, u: inner(w, u) + 1e-9 * time.time() * w.sum(), outer, start),
    )

    def seeded(w: Tensor, u: Tensor) -> Tensor:
        return inner(w, u) + (torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=F64) * w).sum()

    assert bl.hypergradient(bl.BilevelProblem(seeded, outer, start), GD, bl.FullUnroll(), U).status.ok


def test_a_subclass_of_a_structured_problem_and_an_update_are_looked_at_too() -> None:
    class Noisy(bl.problems.RidgeProblem):
        def outer_loss(self, params: Tensor, hparams: Tensor) -> Tensor:
            return super().outer_loss(params, hparams) * (1 + torch.rand((), dtype=F64))

    x, y = normal(10, 9, 3), normal(11, 9)
    refused("`outer_loss` draws random numbers from torch's global", Noisy(x, y, x, y), torch.tensor(0.0, dtype=F64))

    def update(w: Tensor, u: Tensor) -> Tensor:
        w.data.clamp_(min=0)
        return 0.5 * w + u

    problem = bl.BilevelProblem.from_fixed_point(update, outer, torch.zeros(3, dtype=F64))
    with pytest.raises(ValueError, match=re.escape("`optimality` writes into its argument `params` (clamp_)")):
        bl.hypergradient(problem, bl.FixedPoint(update, steps=5), bl.FullUnroll(), U)


# Modules with a state -------------------------------------------------------------------------------------------------


class Average(nn.Module):
    """A layer that keeps an average, which evaluation mode subtracts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.average, self.calls = how, 0.0, 0
        self.register_buffer("mean", torch.zeros(4, dtype=F64))
        self.vector = torch.zeros(4, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.mean - self.average - self.vector
        now = x.detach().mean(0)
        if self.how == "in place":
            self.mean.lerp_(now, 0.1)
        elif self.how == "assigned":
            self.mean = 0.9 * self.mean + 0.1 * now
        elif self.how == "data":
            self.mean.data.copy_(now)
        elif self.how == "a number":
            self.average = 0.9 * self.average + 0.1 * float(now.sum())
        elif self.how == "no buffer":
            self.vector.lerp_(now, 0.1)
        elif self.how == "schedule":
            self.calls += 1
            return x * (1 + (self.calls > 999))
        return x


LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "in place": ("changes its buffer '1.mean' in every forward pass", lambda: Average("in place")),
    "assigned": ("changes its buffer '1.mean' in every forward pass", lambda: Average("assigned")),
    "data": ("changes its buffer '1.mean' in every forward pass", lambda: Average("data")),
    "a number": ("it depends on `module.1.average`, which moves", lambda: Average("a number")),
    "no buffer": ("writes into `module.1.vector` (lerp_)", lambda: Average("no buffer")),
    "schedule": ("it depends on `module.1.calls`, which moves", lambda: Average("schedule")),
    "instance norm": (
        "changes its buffer '1.1.running_mean' in every forward pass",
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True).double(), nn.Flatten()
        ),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_state_that_forward_moves_is_refused_by_name_and_the_module_stays(name: str) -> None:
    text, make = LAYERS[name]
    module = nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 1)).double()
    before = copy.deepcopy(module.state_dict())
    read = lambda model, params, u: (model.eval()(V) - Z).square().mean()  # noqa: E731
    refused(text, bl.ModuleProblem(module, fit, read))
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before.items())
    assert all(part.training for part in module.modules())
    module[1].eval()
    assert bl.hypergradient(bl.ModuleProblem(module, fit, read), GD, bl.FullUnroll(), U).status.ok


def test_hooks_that_keep_a_state_and_layers_made_in_forward_are_refused() -> None:
    module, state = network(), {"mean": 0.0}

    def centre(layer: Any, given: Any, out: Tensor) -> Tensor:
        state["mean"] = 0.9 * state["mean"] + 0.1 * float(out.detach().mean())
        return out - state["mean"]

    handle = module[1].register_forward_hook(centre)
    refused("it depends on `module.1.hook.state.mean`", bl.ModuleProblem(module, fit, validate))
    handle.remove()
    module[1].register_forward_hook(lambda layer, given, out: state.update(out=out))
    assert bl.hypergradient(bl.ModuleProblem(module, fit, validate), GD, bl.FullUnroll(), U).status.ok

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4).double(), None

        def forward(self, x: Tensor) -> Tensor:
            self.second = self.second or nn.Linear(4, 1).double()
            return self.second(self.first(x))

    late = Late()
    refused("makes its parameter 'second.weight' in forward", bl.ModuleProblem(late, fit, validate))
    late(X)
    equals_torch(late)


# Ranks of a process group ---------------------------------------------------------------------------------------------


def test_numbers_of_ranks_are_equal_but_for_rounding() -> None:
    values = [normal(1, 5), None, torch.arange(3)]

    def gap(*others: Any) -> float:
        return ranks._apart(ranks._numbers(values), ranks._numbers(others))

    assert gap(values[0] * (1 + 1e-12), None, torch.arange(3)) == 0
    assert gap(values[0].flip(0), None, torch.arange(3)) > 0.01
    assert gap(values[0], None, torch.tensor([0, 2, 1])) > 0.01
    assert gap(values[0], values[0], torch.arange(3)) == gap(values[0]) == math.inf


def ranks_of_two(rank: int, path: str, said: Any) -> None:
    """What each of two processes sees of problems that are the same, differ, fail on one, or are on one alone."""
    warnings.simplefilter("ignore")
    ranks.WAIT = 2.0
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    half = slice(6 * rank, 6 * rank + 6)

    def problem(rows: slice, reduced: Any = None) -> bl.BilevelProblem:
        def loss(w: Tensor, u: Tensor) -> Tensor:
            value = (X[rows] @ w - Y[rows, 0]).square().sum() + u.exp() * w.square().sum()
            return value if reduced is None else reduced(value)

        return bl.BilevelProblem(loss, outer, torch.zeros(3, dtype=F64))

    def summed(value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return value + total - value.detach()

    def late(value: Tensor) -> Tensor:
        if rank:
            raise RuntimeError("no memory")
        return summed(value)

    def hypergradient(made: bl.BilevelProblem, u: float = -3.0) -> str:
        try:
            return str(float(bl.hypergradient(made, GD, bl.FullUnroll(), torch.tensor(u, dtype=F64)).hypergradient))
        except ValueError as error:
            return str(error)

    found = {
        "same": hypergradient(problem(slice(0, 12))),
        "halves": hypergradient(problem(half)),
        "own class": hypergradient(bl.problems.RidgeProblem(X[half], Y[half, 0], V, Z[:, 0])),
        "hparams": hypergradient(problem(slice(0, 12)), -3.0 - rank),
        "reduced": hypergradient(problem(half, summed)),
        "NaN on one": hypergradient(problem(slice(0, 12), summed), float("nan") if rank else 0.0),
        "fails on one": hypergradient(problem(slice(0, 12), late)),
    }
    ranks.WAIT = 0.2
    found["alone"] = hypergradient(problem(slice(0, 12))) if rank == 0 else ""
    said.put(found)
    dist.destroy_process_group()


def test_ranks_that_differ_all_refuse_and_none_waits_for_ever(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")  # a new interpreter would take seconds to load torch
    said = forked.Queue()
    processes = [forked.Process(target=ranks_of_two, args=(rank, str(tmp_path / "store"), said)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        first, second = said.get(timeout=60), said.get(timeout=60)
    finally:
        for process in processes:
            process.kill()
    for each in (first, second):
        assert float(each["same"]) == float(first["same"])
        for name in ("halves", "own class", "hparams", "reduced"):
            assert "other numbers on other ranks of the process group" in each[name] or "refuses this" in each[name]
        assert "`hparams` holds NaN" in each["NaN on one"]
        assert "no memory" in each["fails on one"]
    assert first["alone"] + second["alone"] == first["same"]
