"""One problem in many threads: the numbers of a single thread, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from bilevel.networks.replicas import Replicas, replicable
from bilevel.problems import LogisticProblem, RidgeProblem

D = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(48, 4, generator=G, dtype=D)
y = X.sum(1) + 0.1 * torch.randn(48, generator=G, dtype=D)


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    """Let Python change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *more, nn.Tanh(), nn.Linear(5, 1)).double()


def of_module(module: nn.Module, seed: int | None = None) -> bl.BilevelProblem:
    return bl.ModuleProblem(
        module,
        lambda m, p, u: (m(X)[:, 0] - y).square().mean() + u.exp() * sum(v.square().sum() for v in p.values()),
        lambda m, p, u: (m(X)[:, 0] - y).square().mean(),
        seed=seed,
    )


def sampled(sampler: Any, outer: Any = None) -> bl.BilevelProblem:
    return bl.BilevelProblem(
        lambda w, u, b: ((b[0] @ w - b[1]) ** 2).mean() + u.exp() * (w**2).sum(),
        (lambda w, u: ((X @ w - y) ** 2).mean())
        if outer is None
        else (lambda w, u, b: ((b[0] @ w - b[1]) ** 2).mean()),
        torch.zeros(4, dtype=D),
        sampler=sampler,
        outer_sampler=outer,
    )


def with_hook() -> nn.Module:
    """A module that a replica would not run rightly: its hook reaches it by a closure."""
    module = network()
    module[0].register_forward_hook(lambda layer, inputs, output: output + module[-1].bias)
    return module


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, y), batch_size=8, shuffle=True)


PROBLEMS: dict[str, Callable[[], bl.BilevelProblem]] = {
    "mini-batches": lambda: sampled(bl.MiniBatches((X, y), batch_size=8, seed=0)),
    "DataLoader": lambda: sampled(loader(), loader()),
    "module": lambda: of_module(network()),
    "module that runs itself": lambda: of_module(with_hook()),
    "dropout": lambda: of_module(network(nn.Dropout(0.2)), seed=0),
    "statistics": lambda: of_module(network(nn.BatchNorm1d(5))),
    "traced": lambda: bl.trace(of_module(network())),
}


def value(problem: bl.BilevelProblem, u: float) -> tuple[float, float]:
    found = bl.hypergradient(problem, bl.SGD(step_size=0.05, steps=4), bl.FullUnroll(), torch.tensor(u, dtype=D))
    return found.outer_loss, float(found.hypergradient)


@pytest.mark.parametrize("name", PROBLEMS)
def test_eight_threads_find_the_numbers_of_one(name: str) -> None:
    problem, us = PROBLEMS[name](), [-3.0 + 0.2 * i for i in range(8)]
    alone = [value(problem, u) for u in us]
    problem = PROBLEMS[name]()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda u: value(problem, u), us)) == alone


def test_problems_made_in_threads_from_one_module_share_nothing() -> None:
    module, us = network(), [-3.0 + 0.2 * i for i in range(12)]
    before = [p.detach().clone() for p in module.parameters()]
    alone = [value(of_module(module), u) for u in us]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda u: value(of_module(module), u), us)) == alone
    assert all(map(torch.equal, before, module.parameters()))


def test_checkpointed_layers_are_run_again_at_the_parameters_of_their_own_call() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Any:
            return self.layers[2](checkpoint(self.layers[:2], x, use_reentrant=False))

    assert value(of_module(Checkpointed()), -1.0) == pytest.approx(value(of_module(network()), -1.0), rel=1e-12)


def test_losses_may_read_what_forward_leaves_in_the_module() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Any:
            self.hidden = self.layers[0](x)
            return self.layers[1:](self.hidden)

    def loss(m: Any, p: Any, u: Tensor) -> Tensor:
        return (m(X)[:, 0] - y).square().mean() + u.exp() * module.hidden.square().mean()

    def written_out(m: Any, p: Any, u: Tensor) -> Tensor:
        hidden = nn.functional.linear(X, p["layers.0.weight"], p["layers.0.bias"])
        return (m(X)[:, 0] - y).square().mean() + u.exp() * hidden.square().mean()

    module = Leaves()
    one, other = (value(bl.ModuleProblem(module, each, each), -1.0) for each in (loss, written_out))
    assert one == pytest.approx(other, rel=1e-12)


def test_replicas_have_containers_of_their_own() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child, self.seen = nn.Linear(2, 2), [nn.Identity()]
            self.child.__dict__["parent"] = [self]
            self.alias, self.call = self.child, self.child.forward

    module = Parent()
    parts = Replicas(module).make()
    root: Any = parts[0]
    assert replicable(module)
    assert root.child is root.alias is parts[1]
    assert root.child is not module.child
    assert root.child.parent[0] is root
    assert root.call.__self__ is root.child
    assert root.child.weight is module.child.weight
    assert root.seen is not module.seen


def test_modules_that_functions_reach_are_not_replicated() -> None:
    module = network()
    assert replicable(module)
    assert not replicable(with_hook())
    module[0].forward = lambda x: x @ module[0].weight.T
    assert not replicable(module)
    assert not replicable(torch.compile(network(), backend="eager"))


def wide(kind: Callable[..., bl.BilevelProblem]) -> bl.BilevelProblem:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(2000, 12, generator=generator, dtype=D)
    y = (X.sum(1) + torch.randn(2000, generator=generator, dtype=D)).sign()
    return kind(X, y, X[:500], y[:500])


@pytest.mark.parametrize(("kind", "estimator"), [(LogisticProblem, bl.Implicit()), (RidgeProblem, bl.ClosedForm())])
def test_solves_by_arrays_share_no_place_that_they_write_to(kind: Any, estimator: bl.HypergradEstimator) -> None:
    def value(problem: bl.BilevelProblem, u: float) -> Any:
        found = bl.hypergradient(problem, bl.QuasiNewton(tol=1e-10), estimator, torch.tensor(u, dtype=D))
        return found.outer_loss, float(found.hypergradient)

    us = [-5.0 + 0.2 * i for i in range(30)]
    alone = [value(wide(kind), u) for u in us]
    problem = wide(kind)
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(pool.map(lambda u: value(problem, u), us), alone, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
