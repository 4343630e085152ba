"""Traced problems against autograd on the losses as they are written."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import F64, flat, normal, ridge_case, tree_case
from torch import Tensor, nn

import bilevel as bl
from bilevel.core import tree
from bilevel.oracles.graph import Part, Recorder, record

X, Y, LABELS = normal(1, 30, 5), normal(2, 30), normal(3, 30, 3).argmax(1)


def ridge_like(w: Tensor, u: Tensor) -> Tensor:
    return (X @ w - Y).square().mean() + (u.exp() * w.square()).sum()


def network(p: Any, u: Any) -> Tensor:
    logits = torch.relu(X @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]
    return nn.functional.cross_entropy(logits, LABELS) + sum(u[k].exp() * p[k].square().sum() for k in p)


def partly_linear(p: Any, u: Any) -> Tensor:
    """Leaves that enter linearly or not at all, whose gradients are constants or broadcast numbers."""
    return (p["a"] ** 4).sum() * u["a"] + p["b"].sum() + (p["d"] * u["a"]).sum() + 0.0 * X.sum()


def in_place(w: Tensor, u: Tensor) -> Tensor:
    z = X @ w
    z.mul_(2.0).sub_(Y)
    copy = w.clone()
    copy += 1.0
    return z.square().mean() + (w.clone() * copy.square() * u.exp()).sum()


def penalised(w: Tensor, u: Tensor) -> Tensor:
    """Powers and products that the clean-up must keep apart: w ** 1, 1 * w, w + 0 and broadcast ones."""
    return (
        ((1.0 * w + 0) ** 1).square().sum() * u.exp().sum()
        + (w * u.exp().sum()).sum()
        + (w * torch.ones(3, 1, dtype=F64)).pow(3).sum()
    )


NETWORK = {"W1": 0.3 * normal(4, 5, 7), "b1": 0.1 * normal(5, 7), "W2": 0.3 * normal(6, 7, 3), "b2": normal(7, 3)}
LOSSES: dict[str, tuple[Any, Any, Any]] = {
    "ridge-like": (ridge_like, normal(8, 5), normal(9, 5)),
    "network": (network, NETWORK, {key: torch.tensor(-1.0 - i, dtype=F64) for i, key in enumerate(NETWORK)}),
    "partly linear": (
        partly_linear,
        {"a": normal(10, 3), "b": normal(11, 2), "c": normal(12, 2), "d": normal(17, 3)},
        {"a": torch.tensor(0.5, dtype=F64), "c": torch.tensor(1.0, dtype=F64)},
    ),
    "in place": (in_place, normal(13, 5), torch.tensor(-0.5, dtype=F64)),
    "penalised": (penalised, normal(14, 4), normal(15, 2)),
    "float32": (lambda w, u: (w.pow(3) * u.exp()).sum() + w.mean(), normal(16, 4).float(), torch.tensor(0.3)),
}


def agree(one: Any, other: Any, tol: float = 1e-12) -> None:
    torch.testing.assert_close(flat(one), flat(other), rtol=tol, atol=tol)


@pytest.mark.parametrize("name", LOSSES)
def test_traced_oracles_are_those_of_autograd(name: str) -> None:
    loss, params, hparams = LOSSES[name]
    x, u, v = tree.attach(params), tree.attach(hparams), tree.tree_map(lambda leaf: leaf.cos(), params)
    roots = tree.leaves(x) + tree.leaves(u)
    gradient = torch.autograd.grad(loss(x, u), tree.leaves(x), create_graph=True, materialize_grads=True)
    moving = [(g, c) for g, c in zip(gradient, tree.leaves(v), strict=True) if g.requires_grad]
    products = torch.autograd.grad([g for g, _ in moving], roots, [c for _, c in moving], materialize_grads=True)
    inner = bl.trace(bl.BilevelProblem(loss, loss)).bind(hparams)
    tol = 1e-6 if name == "float32" else 1e-12
    for at in (params, tree.tree_map(torch.clone, params)):  # the second pass replays
        agree(inner.grad(at), list(gradient), tol)
        by_params, by_hparams = inner.linearize(at).vjp(v)
        agree(tree.leaves(by_params) + tree.leaves(by_hparams), list(products), tol)
        agree(inner.linearize(at).hvp(v), by_params, tol)
        agree(inner.linearize(at).cross(v), by_hparams, tol)
    assert inner.counts == {"gradient": 2, "vjp": 2, "hvp": 2, "cross": 2}


@pytest.mark.parametrize(
    ("params", "solver", "estimator"),
    [
        *((params, bl.HeavyBall(0.1, 0.5, steps=8), bl.FullUnroll()) for params in ("tensor", "0-d", "dict")),
        ("dict", bl.Adam(0.05, steps=8), bl.FullUnroll(memory="checkpoint")),
        ("dict", bl.Nesterov(0.1, 0.5, steps=8), bl.FullUnroll(memory="graph")),
        ("0-d", bl.Newton(tol=1e-12), bl.Implicit(bl.CG(tol=1e-12))),
        ("dict", bl.Newton(tol=1e-12), bl.Implicit(bl.CG(tol=1e-12))),
        ("tensor", bl.GradientDescent(0.1, steps=8), bl.TruncatedUnroll(tail=3)),
        ("dict", bl.GradientDescent(0.1, steps=8), bl.FullUnroll(mode="forward")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_traced_problems_have_the_same_hypergradients_on_every_tree(params: str, solver: Any, estimator: Any) -> None:
    case = tree_case(params, "dict")
    ours, eager = (
        bl.hypergradient(problem, solver, estimator, case.hparams) for problem in (bl.trace(case.problem), case.problem)
    )
    agree(ours.hypergradient, eager.hypergradient, 1e-11)
    assert ours.cost.counts == eager.cost.counts


def test_another_shape_dtype_or_structure_is_traced_anew() -> None:
    problem = bl.BilevelProblem(lambda p, u: sum((x**3).sum() * u[k] for k, x in p.items()), lambda p, u: u["a"])
    problem = bl.trace(problem)

    def gradient(p: Any, u: Any) -> Any:
        return problem.bind(u).grad(p)

    one, two = torch.tensor(1.0, dtype=F64), torch.tensor(2.0, dtype=F64)
    for size, dtype in ((2, F64), (3, F64), (3, torch.float32)):
        x = torch.ones(size, dtype=dtype)
        assert torch.equal(gradient({"a": x}, {"a": one.to(dtype)})["a"], 3 * x)
    # The same shapes under other names: leaves in another order must not be taken for each other.
    x = torch.ones(2, dtype=F64)
    for u in ({"a": one, "b": two}, {"b": two, "a": one}):
        assert torch.equal(gradient({"a": x, "b": x}, u)["b"], 6 * x)


def test_values_of_captured_tensors_may_change_in_place() -> None:
    scale = torch.ones(2, dtype=F64)
    inner = bl.trace(bl.BilevelProblem(lambda w, u: (scale * w**2).sum() * u, lambda w, u: u)).bind(torch.ones(()))
    w = torch.ones(2, dtype=F64)
    assert torch.equal(inner.grad(w), 2 * w)
    scale.mul_(3.0)
    assert torch.equal(inner.grad(w.clone()), 6 * w)


def test_optimality_maps_are_traced_too() -> None:
    M, c = 0.3 * normal(20, 4, 4), normal(21, 4)

    def update(x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(M @ x + u * c)

    problem = bl.BilevelProblem.from_fixed_point(update, lambda x, u: x.square().sum(), torch.zeros(4, dtype=F64))
    u = torch.tensor(0.5, dtype=F64)
    solver, estimator = bl.FixedPoint(update, tol=1e-13), bl.Implicit(bl.GMRES(tol=1e-13))
    ours, eager = (bl.hypergradient(p, solver, estimator, u) for p in (bl.trace(problem), problem))
    agree(ours.hypergradient, eager.hypergradient)


def test_modules_are_traced_too() -> None:
    model = nn.Sequential(
        nn.Linear(5, 6, dtype=F64), nn.BatchNorm1d(6, dtype=F64), nn.Tanh(), nn.Linear(6, 3, dtype=F64)
    )

    def loss(model: Any, p: Any, u: Any) -> Tensor:
        return nn.functional.cross_entropy(model(X), LABELS) + u.exp() * flat(p).square().sum()

    problem = bl.ModuleProblem(model, loss, loss)
    u = torch.tensor(-2.0, dtype=F64)
    solver = bl.GradientDescent(0.05, steps=5)
    ours, eager = (bl.hypergradient(p, solver, bl.FullUnroll(), u) for p in (bl.trace(problem), problem))
    agree(ours.hypergradient, eager.hypergradient)


def test_a_traced_problem_travels_to_another_process() -> None:
    problem = bl.trace(bl.BilevelProblem(ridge_like, ridge_like, normal(8, 5)))
    problem.bind(normal(9, 5)).grad(problem.params)
    again = pickle.loads(pickle.dumps(problem))
    agree(again.bind(normal(9, 5)).grad(problem.params), problem.bind(normal(9, 5)).grad(problem.params), 0.0)


def test_tracing_leaves_the_problem_itself_alone() -> None:
    problem = bl.BilevelProblem(ridge_like, ridge_like, normal(8, 5))
    bl.trace(problem)
    assert type(problem.bind(normal(9, 5))) is bl.BilevelProblem.inner_problem
    assert not problem.traces.made


def test_the_cleaned_graph_is_shorter_and_computes_no_loss() -> None:
    def gradient(*leaves: Tensor) -> Any:
        x = tree.attach(dict(zip(NETWORK, leaves, strict=True)))
        u = {key: torch.tensor(1.0, dtype=F64) for key in NETWORK}
        return torch.autograd.grad(network(x, u), tree.leaves(x))

    leaves = list(NETWORK.values())
    with Recorder(leaves) as all_of_it:
        expected = gradient(*leaves)
    module = record(gradient, leaves)
    agree(list(module(*leaves)), list(expected), 0.0)
    targets = [node.target for node in module.graph.nodes]
    assert len(targets) < 0.7 * len(all_of_it.graph.nodes)
    assert torch.ops.aten.detach.default not in targets
    assert torch.ops.aten.pow.Tensor_Scalar not in targets


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, u: (w if w.sum() > 0 else 2 * w).sum() * u,
        lambda w, u: (w**2).sum() * u * float(w.sum()),
        lambda w, u: (w**2).sum() * u * float(np.sign(w.detach().numpy()).sum()),
        lambda w, u: (w**2).sum() * u * float(np.sign(np.asarray(w.detach())).sum()),
        lambda w, u: (w**2).sum() * u * len([each for each in w.tolist() if each > 0]),
        lambda w, u: (w**2).sum() * u * torch.rand((), generator=torch.Generator()),
    ],
)
def test_python_that_depends_on_values_is_refused_with_the_remedy(loss: Any) -> None:
    inner = bl.trace(bl.BilevelProblem(loss, loss)).bind(torch.ones(()))
    with pytest.raises(ValueError, match=r"cannot be traced: .*use torch.where in place of `if`.*leave out `trace`"):
        inner.grad(torch.ones(3))


def test_recordings_have_the_builtins_that_imports_inside_of_torch_take() -> None:
    module = record(lambda w: [w * 2.0], [torch.ones(3)])
    nodes = list(module.graph.nodes)
    names = Part(module, [], nodes[:1], nodes[1:2]).function().__globals__
    assert vars(names["__builtins__"])["__import__"] is __import__


SAME, SHARED = torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64)
ALIASES: dict[str, tuple[Any, Any, Any]] = {
    "start and hyperparameters": (ridge_like, SAME, SAME),
    "views of one number": (ridge_like, torch.zeros(1, dtype=F64).expand(5), SAME[:1].expand(5)),
    "two leaves": (lambda w, u: ridge_like(w, u["a"] + 2 * u["b"]), SAME, {"a": SAME, "b": SAME}),
    "a tensor that the loss holds": (lambda w, u: ridge_like(w - SAME, u + SAME), SAME, SAME),
    "leaves that share their numbers": (
        lambda w, u: ridge_like(torch.cat([w["a"], w["b"][1:]]), u),
        {"a": SHARED[:3], "b": SHARED[1:4]},
        SHARED[:5],
    ),
    "another layout": (
        lambda w, u: (X @ w).square().mean() + (u.reshape(-1).exp() * (w.reshape(-1) - 1).square()).sum(),
        torch.zeros(5, 2, dtype=F64),
        torch.zeros(2, 5, dtype=F64).T,
    ),
}


@pytest.mark.parametrize("name", ALIASES)
def test_arguments_that_are_one_tensor_at_first_stay_two(name: str) -> None:
    loss, start, u = ALIASES[name]
    problem = bl.BilevelProblem(loss, lambda w, u: (flat(w) - 0.1).square().sum(), start)
    fast = bl.trace(problem)
    fast.bind(u).linearize(start).vjp(start)
    point, along, moved = (
        tree.tree_map(lambda leaf: leaf + 0.1, each) for each in (start, fast.bind(u).grad(start), u)
    )
    ours, eager = (p.bind(moved).linearize(point).vjp(along) for p in (fast, problem))
    agree(ours, eager)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w, u: torch.where(w > 0, w, 0.2 * w)[w > u].square().sum(), "boolean mask"),
        (lambda w, u: w.square().masked_select(w > u).sum(), r"aten.masked_select.default gives depends on the values"),
        (lambda w, u: random.random() * (w * u).square().sum(), "must not compute numbers that change from call to"),
        (lambda w, u: torch.rand(()) * (w * u).square().sum(), "must not compute numbers that change from call to"),
    ],
)
def test_recordings_that_hold_at_one_point_alone_are_refused(loss: Any, message: str) -> None:
    inner = bl.trace(bl.BilevelProblem(loss, loss)).bind(torch.full((), 0.5))
    with pytest.raises(ValueError, match=rf"^the inner loss cannot be traced: .*{message}.*leave out `trace`"):
        inner.grad(torch.ones(3))


def test_masks_of_the_data_and_positions_are_traced() -> None:
    def loss(w: Tensor, u: Tensor) -> Tensor:
        residual = X @ w - Y
        return residual[Y > 0].square().mean() + residual[[1, 2]].square().mean() + (u.exp() * w.square()).sum()

    u, v = normal(9, 5), normal(8, 5)
    one, other = (
        p.bind(u).linearize(v).vjp(v) for p in (bl.trace(bl.BilevelProblem(loss, loss)), bl.BilevelProblem(loss, loss))
    )
    agree(one, other)


def test_tasks_of_another_outer_step_are_no_constants() -> None:
    def task(index: int) -> Any:
        x = normal(20 + index, 8, 1)
        return (x[:4], index * x[:4]), (x[4:], index * x[4:])

    problem = bl.meta.MetaProblem(nn.Linear(1, 1, dtype=F64), nn.functional.mse_loss, task, batch_size=2)
    traced_one, solver, u = bl.trace(problem), bl.GradientDescent(0.1, steps=2), problem.initial_hparams()
    for step in (0, 1):
        views = (each.on_outer_step(step) for each in (traced_one, problem))
        ours, eager = (bl.hypergradient(view, solver, bl.FullUnroll(), u) for view in views)
        agree(ours.hypergradient, eager.hypergradient)


def test_an_error_of_the_loss_itself_is_raised_as_it_is() -> None:
    inner = bl.trace(bl.BilevelProblem(lambda w, u: w @ torch.ones(2), lambda w, u: w.sum())).bind(torch.ones(()))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        inner.grad(torch.ones(3))


def test_modes_and_problems_that_cannot_be_traced_are_refused() -> None:
    problem = bl.BilevelProblem(ridge_like, ridge_like)
    with pytest.raises(ValueError, match=r"`trace` takes the mode 'fx', got 'jit'."):
        bl.trace(problem, "jit")
    with pytest.raises(ValueError, match="RidgeProblem has closed-form oracles, which are faster than traced ones"):
        bl.trace(ridge_case().problem)
    with pytest.warns(DeprecationWarning, match=r"trace\(problem, 'inductor'\) is now trace\(problem\)."):
        bl.trace(problem, "inductor")
