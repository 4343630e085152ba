"""What losses and modules do besides returning a number: refused by name, and the caller's tensors stay its own."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from helpers import F64, normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import bilevel as bl
from bilevel import tree

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
    problem = bl.BilevelProblem.from_module(module, fit, validate)
    estimate = bl.hypergradient(problem, GD, bl.FullUnroll(), U)
    for name, p in torch_loop(module, U)[0].named_parameters():
        torch.testing.assert_close(estimate.params[name], p.detach(), rtol=1e-10, atol=1e-12)
    h = 1e-4
    slope = (torch_loop(module, U + h)[1] - torch_loop(module, U - h)[1]) / (2 * h)
    assert float(estimate.hypergradient) == pytest.approx(slope, rel=1e-6)


# Modules whose training is more than a function of their parameters ---------------------------------------------------


def refused_module(text: str, module: nn.Module) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        bl.BilevelProblem.from_module(module, fit, validate)


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
        bl.BilevelProblem.from_module(module, fit, validate)
    remedy = re.search(r"torch\.nn\.utils\.(\w+)\(layer\)", str(refusal.value))
    assert remedy
    getattr(nn.utils, remedy[1])(module[0])
    equals_torch(module)


class Masked(nn.Module):
    """Rows of a weight that stay where they are, by a parametrization."""

    mask = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=F64)

    def forward(self, w: Tensor) -> Tensor:
        return self.mask * w + (1 - self.mask) * w.detach()


def test_hooks_on_gradients_are_refused_and_a_parametrization_freezes_rows() -> None:
    module = network()
    for register in (module[0].weight.register_hook, module[0].weight.register_post_accumulate_grad_hook):
        handle = register(lambda g: None)
        refused_module("parameter '0.weight' has a hook on its gradient", module)
        handle.remove()
    handle = module[2].register_full_backward_hook(lambda *given: None)
    refused_module("the module's part '2' (Linear) has a backward hook", module)
    handle.remove()
    parametrize.register_parametrization(module[0], "weight", Masked())
    problem = bl.BilevelProblem.from_module(module, lambda m, p, u: fit(m, {"": m(X)}, u), validate)
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
