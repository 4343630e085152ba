"""The outer loop: optimizers, constraints, warm starts, stopping, resuming."""

from __future__ import annotations

import io
import itertools
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import F64, SOLVERS, flat, normal, quadratic_case, ridge_case, tree_case
from sklearn.metrics import log_loss
from torch.distributions import constraints

import bilevel as bl
from bilevel.compare.cells import stop_reason
from bilevel.core import tree
from bilevel.outer import OuterOptions, Record, StoppingRules, not_converged
from bilevel.problems import LogisticProblem, MLPProblem, RidgeProblem, SoftmaxProblem

OPTIMIZERS = {
    "SGD": lambda tensors: torch.optim.SGD(tensors, lr=0.2),
    "momentum": lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.7),
    "Adam": lambda tensors: torch.optim.Adam(tensors, lr=0.05),
    "RMSprop": lambda tensors: torch.optim.RMSprop(tensors, lr=0.02),
    "AdamW": lambda tensors: torch.optim.AdamW(tensors, lr=0.05),
}


def make(optimizer: str = "SGD", solver: Any = None, estimator: Any = None, case: Any = None, **options: Any) -> Any:
    case = case or ridge_case()
    return bl.OuterOptimizer(
        case.problem,
        solver or bl.GradientDescent(),
        estimator or bl.Implicit(),
        options.pop("hparams", case.hparams),
        OPTIMIZERS[optimizer],
        **options,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_moves_as_the_torch_optimizer_does_on_exact_hypergradients(optimizer: str) -> None:
    case = ridge_case()
    outer = make(optimizer, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct()))
    u = case.hparams.clone().requires_grad_()
    plain = OPTIMIZERS[optimizer]([u])
    losses = []
    for _ in range(6):
        u.grad = case.problem.exact_hypergradient(u)
        losses.append(float(case.problem.outer_loss(case.problem.solve(u.detach()), u.detach())))
        plain.step()
        outer.step()
        torch.testing.assert_close(outer.hparams, u.detach(), rtol=0, atol=1e-10)
    assert [record.outer_loss for record in outer.history] == pytest.approx(losses, rel=1e-10)


class DriftingRidge(bl.BilevelProblem):
    """A ridge problem whose targets are another column in every outer step."""

    def __init__(self, target: int = 0) -> None:
        X, Y = normal(1, 12, 3), normal(2, 12, 4)
        super().__init__(
            lambda w, u: ((X @ w - Y[:, target]) ** 2).mean() + u.exp() * w.square().sum(),
            lambda w, u: ((X @ w - Y.mean(dim=1)) ** 2).mean(),
            torch.zeros(3, dtype=F64),
        )

    def on_outer_step(self, index: int) -> bl.BilevelProblem:
        return DriftingRidge(index % 4)


class DriftingBatch(DriftingRidge):
    """Two of them side by side."""

    def on_outer_step(self, index: int) -> bl.BilevelProblem:
        return DriftingRidge(index % 4).batched(2)


@pytest.mark.parametrize("size", [(), (2,)])
def test_each_outer_step_sees_its_own_problem_also_after_a_resume(size: tuple[int, ...]) -> None:
    solver, estimator = bl.GradientDescent(step_size=0.1, steps=30), bl.FullUnroll()
    start = torch.zeros(size, dtype=F64)

    def make_outer() -> bl.OuterOptimizer:
        problem = DriftingBatch().batched(2) if size else DriftingRidge()
        if size:
            problem.on_outer_step = DriftingBatch().on_outer_step  # type: ignore[method-assign]
        return bl.OuterOptimizer(problem, solver, estimator, start)

    whole, carry = make_outer(), bl.Carry()
    for index in range(6):
        problem = DriftingBatch().on_outer_step(index) if size else DriftingRidge(index % 4)
        expected = bl.hypergradient(problem, solver, estimator, whole.hparams, carry=carry)
        carry = expected.carry
        torch.testing.assert_close(whole.step().hypergradient, expected.hypergradient, rtol=0, atol=1e-14)
    half, resumed = make_outer(), make_outer()
    half.run(3, progress=False)
    resumed.load_state_dict(half.state_dict())
    resumed.run(3, progress=False)
    assert torch.equal(resumed.hparams, whole.hparams)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, factor=0.5),
    ],
    ids=["exponential", "step", "plateau"],
)
def test_a_scheduler_is_stepped_once_an_outer_step(scheduler: Any) -> None:
    outer = make(scheduler=scheduler)
    expected = {0.5: [0.2, 0.1, 0.05, 0.025], 0.1: [0.2, 0.2, 0.02, 0.02]}
    rates, moves = [], []
    for _ in range(4):
        rates.append(outer.optimizer.param_groups[0]["lr"])
        before = outer.hparams
        estimate = outer.step()
        moves.append(float((before - outer.hparams).norm() / estimate.hypergradient.norm()))
    assert moves == pytest.approx(rates, rel=1e-6)
    if not isinstance(outer.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        assert rates in [pytest.approx(value) for value in expected.values()]
    else:
        assert rates[-1] < rates[0]


def test_an_optimizer_that_needs_a_closure_and_no_optimizer_at_all_are_refused() -> None:
    case = ridge_case()
    arguments = case.problem, bl.GradientDescent(), bl.Implicit(), case.hparams
    with pytest.raises(ValueError, match=r"`LBFGS` evaluates the loss several times in one step.*torch.optim.Adam"):
        bl.OuterOptimizer(*arguments, lambda tensors: torch.optim.LBFGS(tensors))
    with pytest.raises(
        ValueError, match=r"`optimizer` must make a torch.optim.Optimizer from a list of tensors, got f"
    ):
        bl.OuterOptimizer(*arguments, lambda tensors: 0.1)


SIMPLEX = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
CONSTRAINTS = {
    "positive": (constraints.positive, SIMPLEX),
    "interval": (constraints.interval(-1.0, 2.0), SIMPLEX),
    "simplex": (constraints.simplex, SIMPLEX),
    "dict": ({"penalty": constraints.positive}, {"penalty": SIMPLEX[0], "free": SIMPLEX[1:]}),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_chain_rule_through_a_constraint_equals_finite_differences_in_the_free_variable(name: str) -> None:
    constraint, hparams = CONSTRAINTS[name]
    case = quadratic_case()
    problem = bl.BilevelProblem(
        lambda x, u: case.problem.inner_loss(x, flat(u)), lambda x, u: case.problem.outer_loss(x, flat(u)), case.start
    )
    outer = bl.OuterOptimizer(
        problem, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct()), hparams, OPTIMIZERS["SGD"], constraints=constraint
    )
    free = [leaf.detach().clone() for leaf in outer.optimizer.param_groups[0]["params"]]
    outer.step()
    gradient = torch.cat([leaf.grad.reshape(-1) for leaf in outer.optimizer.param_groups[0]["params"]])

    def value(z: Any) -> float:
        parts = z.split([leaf.numel() for leaf in free])
        given = constraint if isinstance(constraint, dict) else {}
        names = list(hparams) if isinstance(hparams, dict) else [None]
        rules = [given.get(n) if n else constraint for n in names]
        moved = [
            part.reshape(leaf.shape)
            if rule is None
            else torch.distributions.transform_to(rule)(part.reshape(leaf.shape))
            for part, leaf, rule in zip(parts, free, rules, strict=True)
        ]
        u = torch.cat([m.reshape(-1) for m in moved])
        x = case.problem.solve(u)  # type: ignore[operator]
        return float(case.problem.outer_loss(x, u))

    z = torch.cat([leaf.reshape(-1) for leaf in free])
    for j, step in enumerate(1e-5 * torch.eye(len(z), dtype=F64)):
        assert float(gradient[j]) == pytest.approx((value(z + step) - value(z - step)) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", ["positive", "interval", "simplex"])
def test_constrained_hyperparameters_start_where_they_were_put_and_stay_inside(name: str) -> None:
    constraint, hparams = CONSTRAINTS[name]
    outer = make("Adam", case=quadratic_case(), hparams=hparams, constraints=constraint)
    assert torch.equal(outer.hparams, hparams)
    for _ in range(15):
        outer.step()
        assert bool(constraint.check(outer.hparams).all())
    assert not torch.allclose(outer.hparams, hparams)


def test_hyperparameters_outside_their_constraint_and_unknown_keys_are_refused() -> None:
    case = tree_case("tensor", "dict")
    with pytest.raises(ValueError, match=r"`hparams\['penalty'\]` does not satisfy its constraint GreaterThan"):
        make(case=case, constraints={"penalty": constraints.positive})
    with pytest.raises(ValueError, match=r"`constraints` names \['typo'\], but hparams has \['penalty', 'shift'\]"):
        make(case=case, constraints={"typo": constraints.positive})
    with pytest.raises(ValueError, match="`constraints` is a dict, but the hyperparameters are not"):
        make(constraints={"penalty": constraints.positive})


def work(part: str, **options: Any) -> int:
    outer = make("SGD", bl.GradientDescent(tol=1e-8), bl.Implicit(bl.CG(tol=1e-8)), quadratic_case(30), **options)
    outer.optimizer.param_groups[0]["lr"] = 1e-3
    outer.run(6, progress=False)
    return sum(getattr(record, part) for record in outer.history[1:])


def test_each_part_of_the_warm_start_saves_its_own_steps() -> None:
    case = quadratic_case(30)
    assert case.problem.params is not None
    cold = {part: work(part, warm_start=False) for part in ("inner_steps", "adjoint_steps")}
    state = {part: work(part, warm_start=bl.WarmStart(adjoint=False)) for part in cold}
    adjoint = {part: work(part, warm_start=bl.WarmStart(state=False)) for part in cold}
    both = {part: work(part, warm_start=True) for part in cold}
    assert both["inner_steps"] <= state["inner_steps"] < 0.8 * cold["inner_steps"] == 0.8 * adjoint["inner_steps"]
    assert adjoint["adjoint_steps"] < 0.9 * cold["adjoint_steps"]
    assert both["adjoint_steps"] < 0.9 * state["adjoint_steps"]


def test_the_run_stops_for_the_reason_that_it_names() -> None:
    steps = make().run(3, progress=False)
    first, last = steps.history[0], steps.history[-1]
    assert len(steps.history) == 3
    assert steps.stopped == (
        f"took 3 steps, not converged: |hypergradient| = {last.hypergradient_norm:.1e}, "
        f"was {first.hypergradient_norm:.1e}, outer loss still falling by "
        f"{(first.outer_loss - last.outer_loss) / 2:.1e} a step"
    )
    tol = make("Adam").run(300, tol=1e-2, progress=False)
    assert tol.stopped == "the hypergradient norm reached 0.01"
    assert tol.history[-1].hypergradient_norm <= 1e-2 < tol.history[-2].hypergradient_norm
    patience = make().run(50, patience=4, min_progress=1e9, progress=False)
    assert patience.stopped == "no progress for 4 steps"
    assert len(patience.history) == 5
    budget = make().run(50, budget=900.0, progress=False)
    spent = [record.gradient_equivalents for record in budget.history]
    assert budget.stopped.startswith("the budget of 900 gradient-equivalents is used, not converged: |hypergradient| =")
    assert sum(spent) >= 900 > sum(spent[:-1])


@pytest.mark.parametrize(
    ("norms", "losses", "tol", "end"),
    [
        (
            [4.0, 2.0],
            [3.0, 2.5],
            None,
            ", not converged: |hypergradient| = 2.0e+00, was 4.0e+00, outer loss still falling",
        ),
        ([4.0, 2.0], [2.5, 3.0], None, ", not converged: |hypergradient| = 2.0e+00, was 4.0e+00, outer loss no longer"),
        ([4.0, 1e-3], [3.0, 2.5], None, ": |hypergradient| = 1.0e-03, was 4.0e+00"),
        (
            [4.0, 1e-3],
            [3.0, 2.5],
            1e-4,
            ", not converged: |hypergradient| = 1.0e-03, was 4.0e+00, outer loss still falling",
        ),
        ([1.0, 4.0], [3.0, 9.0], None, ", not converged: |hypergradient| = 4.0e+00, was 1.0e+00, outer loss no longer"),
        ([1.0, 1e4, 5.0], [3.0, 9.0, 2.0], None, ": |hypergradient| = 5.0e+00, was 1.0e+00"),
        (
            [4.0] * 8,
            [99.0, 9.0, 8.5, 8.0, 7.5, 7.0, 6.5, 6.0],
            None,
            ", not converged: |hypergradient| = 4.0e+00, was 4.0e+00, outer loss still falling by 5.0e-01 a step",
        ),
        (
            [4.0, 2.0],
            [1.0 + 1e-12, 1.0],
            None,
            ", not converged: |hypergradient| = 2.0e+00, was 4.0e+00, outer loss no longer falling",
        ),
        ([4.0], [3.0], None, ", not converged: |hypergradient| = 4.0e+00, was 4.0e+00"),
        ([4.0, math.nan], [3.0, 2.5], None, ""),
        ([], [], None, ""),
    ],
)
def test_a_run_that_took_all_its_steps_says_how_far_it_is(norms, losses, tol, end) -> None:
    text = not_converged("took 2 steps", norms, losses, tol)
    assert text.startswith("took 2 steps" + end)
    assert end or text == "took 2 steps"


def regression(y_val: torch.Tensor) -> RidgeProblem:
    X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return RidgeProblem(X, X @ torch.tensor([1.0, -2.0], dtype=torch.float64), X, y_val)


@pytest.mark.parametrize("batch", [None, 2])
def test_a_run_says_where_a_constant_predicts_better_and_where_one_row_makes_the_loss(batch: int | None) -> None:
    X = regression(torch.zeros(40, dtype=torch.float64)).train.X.t()
    right = X @ torch.tensor([1.0, -2.0], dtype=torch.float64)
    outlier = right.clone()
    outlier[6] = 100.0
    opposite = "; the outer loss .* is above .*, that of a constant prediction"
    alone = "; row 7 of X_val alone makes 100% of the outer loss"
    for y_val, remark in ((-right, opposite), (outlier, alone), (right, "a step$")):
        hparams = torch.full(() if batch is None else (batch,), -3.0, dtype=torch.float64)
        outer = bl.OuterOptimizer(regression(y_val), bl.GradientDescent(), bl.Implicit(), hparams, None, batch=batch)
        stopped = outer.run(2, progress=False).stopped
        for text in [stopped] if batch is None else stopped:
            assert re.search(remark, text), text
            assert (";" in text) == (y_val is not right)


@pytest.mark.parametrize("family", [LogisticProblem, SoftmaxProblem, MLPProblem])
def test_the_losses_of_rows_and_of_a_constant_are_those_of_scikit_learn(family: Any) -> None:
    X = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, y_val = torch.arange(30) % 2 * (torch.arange(30) % 3 > 0), torch.arange(30) % 2
    problem = family(X, y, X, y_val)
    hparams = problem.initial_hparams(-1.0)
    losses = problem.row_losses(problem.params, problem.val)
    assert float(losses.mean()) == pytest.approx(float(problem.outer_loss(problem.params, hparams)))
    share = float(y.double().mean())
    assert problem.constant_loss(problem.val) == pytest.approx(log_loss(y_val, [share] * 30, labels=[0, 1]))


def test_every_callback_is_called_and_any_of_them_can_stop_the_run() -> None:
    seen: list[tuple[str, int, float]] = []

    def one(outer: Any, estimate: bl.Estimate) -> bool:
        seen.append(("one", len(outer.history), estimate.outer_loss))
        return len(outer.history) == 3

    def two(outer: Any, estimate: bl.Estimate) -> None:
        seen.append(("two", len(outer.history), estimate.outer_loss))

    result = make(callbacks=(one, two)).run(10, progress=False)
    assert result.stopped == "a callback asked to stop"
    losses = [record.outer_loss for record in result.history]
    assert seen == [(name, step, losses[step - 1]) for step in (1, 2, 3) for name in ("one", "two")]
    ended = make(callbacks=(one,)).run(10, budget=1.0, progress=False)
    assert ended.stopped.startswith("the budget of 1 gradient-equivalents is used")
    both = make(callbacks=(lambda outer, estimate: True,)).run(10, budget=1.0, progress=False)
    assert both.stopped == ended.stopped  # a rule that is met says more than the callback


def test_the_best_hyperparameters_are_those_of_the_smallest_loss_and_do_not_move_on() -> None:
    case = ridge_case()
    outer = make("SGD")
    visited = []
    for step in range(6):
        outer.optimizer.param_groups[0]["lr"] = 0.5 if step < 3 else -2.0  # down, then up again
        visited.append(outer.hparams)
        outer.step()
    losses = [record.outer_loss for record in outer.history]
    best = min(range(6), key=losses.__getitem__)
    assert best != 5
    result = outer.run(1, progress=False)
    assert result.best_loss == min([*losses, result.history[-1].outer_loss])
    assert torch.equal(result.best_hparams, visited[best])
    assert torch.equal(case.hparams, visited[0])


def test_a_tensor_that_the_caller_moves_later_does_not_move_the_run() -> None:
    given = ridge_case().hparams.clone()
    outer = make(hparams=given)
    given += 5.0
    assert torch.equal(outer.hparams, ridge_case().hparams)
    assert outer.step().outer_loss == make().step().outer_loss


def test_the_callers_tensor_is_not_moved() -> None:
    u = ridge_case().hparams
    before = u.clone()
    outer = make(hparams=u)
    outer.run(2, progress=False)
    assert torch.equal(u, before)
    u.fill_(0.0)
    assert outer.hparams.any()


def same(a: Any, b: Any) -> None:
    assert torch.equal(flat(a.hparams), flat(b.hparams))
    keys = ("outer_loss", "hypergradient_norm", "inner_residual", "adjoint_residual", "inner_steps", "adjoint_steps")
    for x, y in zip(a.history, b.history, strict=True):
        assert [getattr(x, key) for key in keys] == [getattr(y, key) for key in keys]
    assert (a.best[0], flat(a.best[1]).tolist()) == (b.best[0], flat(b.best[1]).tolist())
    for x, y in zip(tree.leaves(a.optimizer.state_dict()), tree.leaves(b.optimizer.state_dict()), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize(
    ("cls", "optimizer"),
    [
        *zip(SOLVERS, itertools.cycle(["momentum", "Adam"]), strict=False),
        *((bl.GradientDescent, optimizer) for optimizer in OPTIMIZERS),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_run_resumed_from_a_file_continues_bit_for_bit(cls: type, optimizer: str) -> None:
    case = tree_case("dict", "dict")

    def fresh() -> Any:
        solver = SOLVERS[cls].make(case.problem, steps=4)
        off = solver.bias_reason(case.problem)  # AdamW's decay: its steps decide the hypergradient
        estimator = bl.TruncatedUnroll(tail=3) if off or cls is bl.Adam else bl.Implicit()
        scheduler = lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)  # noqa: E731
        return make(optimizer, solver, estimator, case, scheduler=scheduler)

    whole, first, second = fresh(), fresh(), fresh()
    whole.run(4, progress=False)
    first.run(2, progress=False)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.run(2, progress=False)
    same(whole, second)


class PretendCuda:
    """The random generators of CUDA devices, kept in a list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
        self.states = [torch.tensor([index], dtype=torch.uint8) for index in range(devices)]
        for name, value in {
            "is_initialized": lambda: devices > 0,
            "is_available": lambda: devices > 0,
            "device_count": lambda: devices,
            "get_rng_state_all": lambda: [state.clone() for state in self.states],
            "set_rng_state": lambda state, index: self.states.__setitem__(index, state),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("devices", [0, 1, 2, 3])
def test_the_generators_of_cuda_devices_are_saved_and_restored_where_there_are_such_devices(
    devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    PretendCuda(monkeypatch, 2).states[1][0] = 77
    file = io.BytesIO()
    torch.save(make().state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    there = PretendCuda(monkeypatch, devices)
    make().load_state_dict(state)
    assert [int(value) for value in there.states] == [0, 77, 2][:devices]


def test_a_state_without_generators_of_cuda_devices_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make().state_dict()
    assert state["cuda_rng"] == []
    del state["cuda_rng"]
    PretendCuda(monkeypatch, 1)
    make().load_state_dict(state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_random_numbers_of_the_gpu_go_on_where_the_state_was_saved() -> None:
    torch.zeros(1, device="cuda")
    outer = make()
    state = outer.state_dict()
    first = torch.rand(3, device="cuda")
    outer.load_state_dict(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)


def test_a_state_dict_is_a_snapshot_that_the_run_does_not_change() -> None:
    whole, first, second = make("Adam"), make("Adam"), make("Adam")
    whole.run(6, progress=False)
    first.run(3, progress=False)
    state = first.state_dict()
    first.run(4, progress=False)
    second.load_state_dict(state)
    second.run(3, progress=False)
    same(whole, second)


def test_a_state_of_another_format_or_other_hyperparameters_is_refused() -> None:
    state = make().state_dict()
    with pytest.raises(ValueError, match="this state has the format 99, this version reads 1"):
        make().load_state_dict(state | {"format": 99})
    with pytest.raises(
        ValueError, match=r"this state has hyperparameters of shapes \[\(5,\)\], this run has \[\(3,\)\]"
    ):
        make(case=quadratic_case()).load_state_dict(state)


@pytest.mark.parametrize("where", ["inner loss", "outer loss", "callback", "scheduler"])
def test_an_interrupt_leaves_a_state_from_which_the_run_continues_to_the_same_numbers(where: str) -> None:
    case = ridge_case()
    armed = {"in": -1}

    def countdown(place: str) -> None:
        if place == where and armed["in"] >= 0:
            armed["in"] -= 1
            if armed["in"] < 0:
                raise KeyboardInterrupt

    def loss(name: str) -> Any:
        def evaluate(x: Any, u: Any) -> Any:
            countdown(name.replace("_", " "))
            return getattr(case.problem, name)(x, u)

        return evaluate

    class Scheduler(torch.optim.lr_scheduler.ExponentialLR):
        def step(self, *args: Any) -> None:
            countdown("scheduler")
            super().step(*args)

    def fresh() -> Any:
        problem = bl.BilevelProblem(loss("inner_loss"), loss("outer_loss"), case.problem.params)
        return bl.OuterOptimizer(
            problem,
            bl.GradientDescent(0.1, steps=20),
            bl.Implicit(),
            case.hparams,
            OPTIMIZERS["Adam"],
            scheduler=lambda optimizer: Scheduler(optimizer, 0.9),
            callbacks=(lambda outer, estimate: countdown("callback"),),
        )

    whole, cut = fresh(), fresh()
    whole.run(5, progress=False)
    cut.run(2, progress=False)
    armed["in"] = 0 if where != "inner loss" else 13
    with pytest.raises(KeyboardInterrupt):
        cut.run(3, progress=False)
    cut.run(5 - len(cut.history), progress=False)
    same(whole, cut)


def test_a_failed_hypergradient_moves_nothing_and_is_recorded_when_it_does_not_raise() -> None:
    case = ridge_case()
    outer = make(estimator=bl.Implicit(bl.CG(max_steps=1)))
    with pytest.raises(bl.HypergradientError, match="CG stopped after 1 steps") as caught:
        outer.step()
    assert caught.value.estimate.certificate.adjoint_steps == 1
    assert torch.equal(outer.hparams, case.hparams)
    assert outer.history == []
    quiet = make(estimator=bl.Implicit(bl.CG(max_steps=1)), on_failure="return")
    result = quiet.run(5, progress=False)
    assert torch.equal(quiet.hparams, case.hparams)
    assert [record.status for record in result.history] == ["LINEAR_NOT_CONVERGED"]
    assert result.stopped.startswith("a hypergradient failed: CG stopped after 1 steps")
    with pytest.warns(bl.BilevelWarning, match="CG stopped after 1 steps"):
        make(estimator=bl.Implicit(bl.CG(max_steps=1)), on_failure="warn").step()


@pytest.mark.parametrize("optimizer", ["Adam", "momentum"])
def test_a_step_to_nan_leaves_no_trace_in_what_follows(optimizer: str) -> None:
    spoiled, plain = make(optimizer, on_failure="return"), make(optimizer, on_failure="return")
    for outer in (spoiled, plain):
        outer.step()
    (group,) = spoiled.optimizer.param_groups
    usual, group["lr"] = group["lr"], math.nan
    assert spoiled.step().status is bl.Status.NOT_FINITE
    assert torch.equal(spoiled.hparams, plain.hparams)
    (group,) = spoiled.optimizer.param_groups
    group["lr"] = usual
    for outer in (spoiled, plain):
        outer.step()
    assert torch.equal(spoiled.hparams, plain.hparams)
    assert bool(torch.isfinite(plain.hparams).all())


def test_the_history_holds_what_the_estimates_said() -> None:
    outer = make(certify=True)
    estimates = [outer.step() for _ in range(3)]
    for step, (record, estimate) in enumerate(zip(outer.history, estimates, strict=True), start=1):
        assert (record.step, record.outer_loss) == (step, estimate.outer_loss)
        assert record.hypergradient_norm == pytest.approx(float(estimate.hypergradient.norm()))
        assert record.error == estimate.certificate.error is not None
        assert record.gradient_equivalents == estimate.cost.gradient_equivalents
    assert outer.gradient_equivalents == sum(record.gradient_equivalents for record in outer.history)


def test_the_progress_line_shows_loss_norm_residual_and_error(capsys: pytest.CaptureFixture[str]) -> None:
    make(certify=True).run(2)
    line = capsys.readouterr().err
    assert all(word in line for word in ("loss ", "|hypergradient| ", "inner residual ", "error "))
    make().run(1, progress=False)
    assert capsys.readouterr().err == ""


def test_dict_hyperparameters_descend() -> None:
    outer = make("Adam", case=tree_case("dict", "dict"))
    result = outer.run(20, progress=False)
    assert result.history[-1].outer_loss < result.history[0].outer_loss
    assert set(result.hparams) == {"penalty", "shift"}
    assert normal(1, 1).dtype == result.hparams["shift"].dtype


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    ("status", "error", "norms", "losses", "said"),
    [
        ("TARGET_NOT_REACHED", 2e-3, [1.0, 1e-3], [2.0, 1.0], "no certain descent"),
        ("OK", None, [1.0, 1e-3], [2.0, 1.0], "the hypergradient norm reached"),
        ("OK", None, [1.0, 0.5, 0.5], [1.0, 2.0, 3.0], "no progress for 2 steps"),
        ("OK", None, [1.0, 0.5], [2.0, 1.0], ""),
    ],
)
def test_runs_and_cells_of_comparisons_end_by_the_same_rules_in_any_unit(
    scale: float, status: str, error: float | None, norms: list[float], losses: list[float], said: str
) -> None:
    rules = {"tol": 1e-2 * scale, "patience": 2, "min_progress": 0.0}
    plan = SimpleNamespace(outer=OuterOptions(**rules, steps=10), budget=None)
    keys = ("hypergradient_norm", "outer_loss", "status", "error_estimate", "message")
    scaled = [
        (scale * norm, scale * loss, status, error and scale * error) for norm, loss in zip(norms, losses, strict=True)
    ]
    rows = [dict(zip(keys, (*each, ""), strict=True)) for each in scaled]
    history = [
        Record(i, loss, norm, 0.0, 0.0, err, "estimate", state, 1, 1, 1.0, 0.0, None)
        for i, (norm, loss, state, err) in enumerate(scaled)
    ]
    reason = StoppingRules(None, **rules).reason(history)
    assert reason.startswith(said)
    assert bool(reason) == bool(said)
    assert stop_reason(plan, rows) == reason  # type: ignore[arg-type]


# Inner runs that have not converged -----------------------------------------------------------------------------------


def stopped_early(seeds: tuple[int, ...], tol: float) -> bl.OuterOptimizer:
    """Return loops whose first inner runs end early, where the outer loss is lower than at the inner solution."""
    made = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(40, 10, generator=generator, dtype=torch.float64)
        y = 2.0 * torch.randn(40, generator=generator, dtype=torch.float64)
        made.append(bl.problems.RidgeProblem(X[:15], y[:15], X[15:], y[15:], penalty="scalar"))
    u = torch.full((len(seeds),), -4.0, dtype=torch.float64)
    return bl.OuterOptimizer(
        made[0] if len(made) == 1 else bl.stack(made),
        bl.GradientDescent(steps=50, tol=tol),
        bl.Implicit(),
        u[0] if len(made) == 1 else u,
        lambda tensors: torch.optim.SGD(tensors, lr=1e-6),
        on_failure="return",
    )


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=str)
def test_an_inner_run_that_has_not_converged_is_no_best_point_where_others_have(seeds: tuple[int, ...]) -> None:
    outer = stopped_early(seeds, 1e-6)
    first = outer.run(5, progress=False)
    again = stopped_early(seeds, 1e-6)
    again.load_state_dict(outer.state_dict())
    for each in first:
        assert {record.status for record in each.history} == {"INNER_NOT_CONVERGED"}
        assert each.best_loss == pytest.approx(min(record.outer_loss for record in each.history), rel=1e-12)
        assert "every outer loss is doubtful (INNER_NOT_CONVERGED), the best one, too" in each.stopped
    for run in (outer, again):
        for each in run.run(70, progress=False):
            sure = [record.outer_loss for record in each.history if record.status == "OK"]
            assert 0 < len(sure) < 75
            assert each.best_loss == pytest.approx(min(sure), rel=1e-12)
            assert each.best_loss > 1.01 * min(record.outer_loss for record in each.history)
            assert "doubtful" not in each.stopped


def test_a_loop_says_what_it_is_made_of_and_what_auto_chose() -> None:
    assert repr(stopped_early((0,), 1e-6)) == (
        "OuterOptimizer(RidgeProblem, GradientDescent(steps=50, tol=1e-06), Implicit(linear_solver=CG()), SGD: "
        "0 steps taken)"
    )
    case = ridge_case()
    outer = bl.OuterOptimizer(case.problem, bl.QuasiNewton(), bl.Implicit(), case.hparams)
    assert re.fullmatch(r"OuterOptimizer\(RidgeProblem, .*HyperNewton\(\): 0 steps taken; auto chose .*\)", repr(outer))
