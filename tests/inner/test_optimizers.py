"""The optimizers of torch as inner solvers: step for step, with hyperparameters of their own, any other wrapped."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import F64, Case, flat, normal, tree_case
from torch import Tensor, optim

import bilevel as bl
from bilevel.inner import ElementwiseSolver
from bilevel.oracles.structure import Structure
from bilevel.problems import RidgeProblem

# Equal to torch's ----------------------------------------------------------------------------------------------------


def combinations(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


ADAM = combinations(betas=((0.9, 0.999), (0.5, 0.8)), eps=(1e-8, 1e-3), weight_decay=(0.0, 0.1), amsgrad=(False, True))
COMBINATIONS = {
    bl.SGD: [
        options
        for options in combinations(
            momentum=(0.0, 0.9), dampening=(0.0, 0.3), weight_decay=(0.0, 0.1), nesterov=(False, True)
        )
        # The others torch refuses.
        if not options["nesterov"] or (options["momentum"] and not options["dampening"])
    ],
    bl.Adam: ADAM,
    bl.AdamW: ADAM,
    bl.RMSprop: combinations(
        alpha=(0.99, 0.5), eps=(1e-8, 1e-3), weight_decay=(0.0, 0.1), momentum=(0.0, 0.9), centered=(False, True)
    ),
}
EACH = [(cls, options) for cls, many in COMBINATIONS.items() for options in many]
every_optimizer = pytest.mark.parametrize("cls", COMBINATIONS, ids=lambda cls: cls.__name__)


@pytest.mark.parametrize(("cls", "options"), EACH, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_combination_of_options_equals_torchs_optimizer_at_every_step(cls: Any, options: Any) -> None:
    case = tree_case("dict")
    solver, inner = cls(step_size=0.03, **options), case.problem.bind(case.hparams)
    state = solver.init(inner, case.start)
    x = flat(case.start).clone().requires_grad_()
    optimizer = getattr(torch.optim, cls.__name__)([x], lr=0.03, **options)
    for _ in range(30):
        # One gradient for both: at the first step that differs, so do params.
        x.grad = flat(inner.grad(state.params))
        optimizer.step()
        state = solver.step(inner, state)
        assert float((flat(state.params) - x.detach()).abs().max()) <= 1e-12


@every_optimizer
def test_the_default_options_are_torchs_and_step_size_is_its_lr(cls: Any) -> None:
    group = getattr(torch.optim, cls.__name__)([torch.zeros(1)]).param_groups[0]
    for name in COMBINATIONS[cls][0]:
        assert getattr(cls(), name) == group[name], name
    assert cls().step_size == group["lr"]


@every_optimizer
def test_moments_go_on_over_a_warm_start(cls: Any) -> None:
    case = tree_case("dict")
    options = COMBINATIONS[cls][-1] | ({"nesterov": False, "dampening": 0.3} if cls is bl.SGD else {})

    def run(steps: int, carry: bl.Carry | None = None) -> bl.Estimate:
        solver = cls(step_size=0.03, steps=steps, **options)
        return bl.hypergradient(case.problem, solver, bl.FullUnroll(), case.hparams, carry=carry)

    torch.testing.assert_close(flat(run(5, run(7).carry).params), flat(run(12).params), rtol=0, atol=0)


def test_a_warm_start_with_other_options_starts_the_vectors_that_are_new_at_zero() -> None:
    case = tree_case("dict")
    carry = bl.hypergradient(case.problem, bl.SGD(0.03, steps=4), bl.FullUnroll(), case.hparams).carry
    solver = bl.SGD(0.03, 0.9, steps=6)
    warm = bl.hypergradient(case.problem, solver, bl.FullUnroll(), case.hparams, carry=carry)
    cold = bl.hypergradient(case.problem, solver, bl.FullUnroll(), case.hparams, carry.state.params)
    torch.testing.assert_close(flat(warm.params), flat(cold.params), rtol=0, atol=0)


# Options that are functions of the hyperparameters --------------------------------------------------------------------

STEPS = 9
HYPER: dict[str, Any] = {
    "rate": torch.tensor(-3.0, dtype=F64),
    "rates": {
        "a": torch.tensor([-3.0, -2.0], dtype=F64),
        "b": {"c": torch.tensor(-3.0, dtype=F64), "d": torch.tensor([-2.5, -3.0], dtype=F64)},
    },
    "each": torch.linspace(-3.0, -2.0, STEPS, dtype=F64),
    "share": torch.tensor(0.3, dtype=F64),
    "decay": torch.tensor(-2.0, dtype=F64),
}


def exp(name: str) -> Callable[[Any], Any]:
    """The exponential of some hyperparameters, in their own structure."""
    return lambda hparams: bl.tree.tree_map(torch.exp, hparams[name])


def share(hparams: Any) -> Tensor:
    """A number in (0, 1)."""
    return hparams["share"].sigmoid()


def each(hparams: Any, step: int) -> Tensor:
    """A step size for each step."""
    return hparams["each"][step].exp()


TUNED: dict[str, tuple[bl.InnerSolver, tuple[str, ...]]] = {
    "SGD": (bl.SGD(exp("rate"), share, weight_decay=exp("decay"), steps=STEPS), ("rate", "share", "decay")),
    "SGD per leaf": (bl.SGD(exp("rates"), 0.5, nesterov=True, steps=STEPS), ("rates",)),
    "SGD per step": (bl.SGD(each, share, 0.2, steps=STEPS), ("each", "share")),
    "Adam": (bl.Adam(exp("rates"), (share, 0.9), weight_decay=exp("decay"), steps=STEPS), ("rates", "share", "decay")),
    "Adam per step": (bl.Adam(each, (0.8, share), amsgrad=True, steps=STEPS), ("each", "share")),
    "AdamW": (bl.AdamW(exp("rate"), weight_decay=exp("rates"), steps=STEPS), ("rate", "rates")),
    "RMSprop": (
        bl.RMSprop(exp("rate"), share, weight_decay=exp("decay"), momentum=0.3, centered=True, steps=STEPS),
        ("rate", "share", "decay"),
    ),
    "RMSprop per step": (bl.RMSprop(each, momentum=share, steps=STEPS), ("each", "share")),
}
every_tuned = pytest.mark.parametrize("name", TUNED)


def tuned(name: str) -> tuple[bl.BilevelProblem, bl.InnerSolver, Any]:
    """(problem, solver, hyperparameters of both): the losses see theirs alone."""
    case = tree_case("dict", "dict")
    solver, names = TUNED[name]
    return problem_of(case), solver, case.hparams | {key: HYPER[key] for key in names}


def problem_of(case: Case) -> bl.BilevelProblem:
    def own(hparams: Any) -> Any:
        return {key: hparams[key] for key in case.hparams}

    return bl.BilevelProblem(
        lambda p, h: case.problem.inner_loss(p, own(h)), lambda p, h: case.problem.outer_loss(p, own(h)), case.start
    )


def gradient_of(estimate: bl.Estimate) -> Tensor:
    return flat(estimate.hypergradient)


@every_tuned
def test_tuned_options_have_the_derivative_of_central_differences_in_every_mode(name: str) -> None:
    problem, solver, u = tuned(name)
    reference = gradient_of(bl.hypergradient(problem, solver, bl.FullUnroll(), u))
    for estimator in (
        bl.FullUnroll(memory="graph"),
        bl.FullUnroll(memory="checkpoint"),
        bl.FullUnroll(mode="forward"),
        bl.TruncatedUnroll(tail=STEPS),
    ):
        other = gradient_of(bl.hypergradient(problem, solver, estimator, u))
        torch.testing.assert_close(other, reference, rtol=1e-12, atol=1e-13)
    differences = gradient_of(bl.hypergradient(problem, solver, bl.FiniteDifference(), u))
    torch.testing.assert_close(differences, reference, rtol=1e-7, atol=1e-8)
    assert bool((flat({key: u[key] for key in TUNED[name][1]}) != 0).all())


@every_tuned
def test_a_short_tail_differentiates_its_own_steps_alone(name: str) -> None:
    problem, solver, u = tuned(name)
    estimate = bl.hypergradient(problem, solver, bl.TruncatedUnroll(tail=3), u)
    head = bl.hypergradient(problem, replace(solver, steps=STEPS), bl.FullUnroll(), u)
    assert bl.tree.size(estimate.hypergradient) == bl.tree.size(head.hypergradient)
    if "each" in u:
        assert torch.equal(estimate.hypergradient["each"] != 0, torch.arange(STEPS) >= STEPS - 3)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("SGD per leaf", bl.TruncatedUnroll(tail=4)),
        ("Adam per step", bl.FullUnroll()),
        ("RMSprop", bl.TruncatedUnroll(tail=4)),
    ],
    ids=str,
)
def test_tuned_options_run_in_batches_and_over_warm_starts(name: str, estimator: Any) -> None:
    problem, solver, u = tuned(name)
    many = bl.tree.tree_map(lambda leaf: torch.stack([leaf, leaf - 0.2]), u)
    first = bl.hypergradient(problem, solver, estimator, many, batch=2)
    second = bl.hypergradient(problem, solver, estimator, many, batch=2, carry=first.carry)
    for index in range(2):
        own = bl.tree.tree_map(lambda leaf, i=index: leaf[i], many)
        alone = bl.hypergradient(problem, solver, estimator, own)
        again = bl.hypergradient(problem, solver, estimator, own, carry=alone.carry)
        torch.testing.assert_close(gradient_of(first[index]), gradient_of(alone), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient_of(second[index]), gradient_of(again), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "solver", [bl.Adam(0.1, (0.5, 0.9), tol=0.1), bl.SGD(0.05, 0.5, 0.3, tol=0.1)], ids=lambda s: type(s).__name__
)
def test_members_that_took_different_numbers_of_steps_go_on_with_their_own_moments(solver: Any) -> None:
    case = tree_case("dict")
    starts = bl.tree.tree_map(lambda leaf: torch.stack([leaf, 0.1 * leaf]), case.start)
    many = torch.stack([case.hparams, case.hparams])
    first = bl.hypergradient(case.problem, solver, bl.Implicit(), many, starts, batch=2)
    assert first.certificates[0].inner_steps != first.certificates[1].inner_steps
    later = replace(solver, tol=None, steps=3)
    second = bl.hypergradient(case.problem, later, bl.FullUnroll(), many, batch=2, carry=first.carry)
    for index in range(2):
        start = bl.tree.tree_map(lambda leaf, i=index: leaf[i], starts)
        carry = bl.hypergradient(case.problem, solver, bl.Implicit(), case.hparams, start).carry
        alone = bl.hypergradient(case.problem, later, bl.FullUnroll(), case.hparams, carry=carry)
        torch.testing.assert_close(gradient_of(second[index]), gradient_of(alone), rtol=1e-9, atol=1e-11)


def test_steps_of_a_tuned_option_count_from_zero_in_every_solve() -> None:
    case, seen = tree_case("tensor"), []

    def rate(hparams: Any, step: int) -> Tensor:
        seen.append(step)
        return hparams[0].exp() * 0.01

    solver = bl.Adam(rate, steps=3)
    estimate = bl.hypergradient(case.problem, solver, bl.TruncatedUnroll(tail=1), case.hparams, check=False)
    bl.hypergradient(case.problem, solver, bl.FiniteDifference(), case.hparams, carry=estimate.carry, check=False)
    assert set(seen) == {0, 1, 2}


def test_a_list_of_rates_one_tensor_for_each_step_is_seen_as_read() -> None:
    case = tree_case("dict", "dict")
    u = case.hparams | {"list": [torch.tensor(-3.0, dtype=F64) for _ in range(4)]}
    solver = bl.SGD(lambda hparams, step: hparams["list"][step].exp(), steps=4)
    estimate = bl.hypergradient(problem_of(case), solver, bl.FullUnroll(), u)
    assert all(bool(rate != 0) for rate in estimate.hypergradient["list"])


def test_tuned_step_sizes_descend_in_the_outer_loop_and_resume_bit_for_bit() -> None:
    problem, solver, u = tuned("Adam")
    runs = [bl.OuterOptimizer(problem, solver, bl.FullUnroll(), u) for _ in range(2)]
    history = runs[0].run(6, progress=False).history
    assert history[-1].outer_loss < history[0].outer_loss
    runs[1].run(3, progress=False)
    saved = io.BytesIO()
    torch.save(runs[1].state_dict(), saved)
    saved.seek(0)
    resumed = bl.OuterOptimizer(problem, solver, bl.FullUnroll(), u)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(flat(resumed.run(3, progress=False).hparams), flat(runs[0].hparams))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    "estimator",
    [bl.Implicit(), bl.BalancedImplicit(), bl.AdaptiveUnroll(), bl.ClosedForm()],
    ids=repr,
)
def test_what_rests_on_the_inner_solution_refuses_tuned_options(name: str, estimator: Any) -> None:
    problem, solver, u = tuned(name)
    problem.structure = Structure(quadratic=True)
    sentence = (
        rf" rests on the inner solution, but `{name}.step_size` is a function of the hyperparameters, on which the "
        "solution does not depend: use FullUnroll or TruncatedUnroll."
    )
    with pytest.raises(ValueError, match=sentence):
        bl.hypergradient(problem, solver, estimator, u)


def test_a_weight_decay_of_the_solver_is_refused_where_the_inner_solution_is_differentiated() -> None:
    case = tree_case()
    with pytest.raises(
        ValueError, match=r"`AdamW.weight_decay` leads the steps away from the minimiser of the inner loss \(a penalty"
    ):
        bl.hypergradient(case.problem, bl.AdamW(steps=3), bl.Implicit(), case.hparams)
    with pytest.raises(ValueError, match=r"weight_decay=0.01 of AdamW leads the steps away .*: set it to 0 and put"):
        bl.hypergradient(case.problem, bl.TorchOptimizer(torch.optim.AdamW, steps=3), bl.Implicit(), case.hparams)


def test_tuned_options_are_not_certified_against_the_inner_solution() -> None:
    problem, solver, u = tuned("SGD")
    certificate = bl.hypergradient(problem, solver, bl.FullUnroll(), u, certify=True).certificate
    assert certificate.error is None
    assert "`SGD.step_size` is a function of the hyperparameters" in certificate.error_note


def test_a_hyperparameter_that_neither_losses_nor_solver_read_is_refused() -> None:
    problem, solver, u = tuned("SGD per step")
    with pytest.raises(
        ValueError, match=r"does not depend on `hparams\['idle'\]`: its hypergradient would be a silent"
    ):
        bl.hypergradient(problem, solver, bl.FullUnroll(), u | {"idle": torch.ones(2, dtype=F64)})
    # A step size that no step sees, because the solver does not ask for it.
    with pytest.raises(ValueError, match=r"does not depend on `hparams\['each'\]`"):
        bl.hypergradient(problem, bl.SGD(0.1, steps=3), bl.FullUnroll(), u)


PER_LEAF = {"a": torch.ones(3, dtype=F64), "b": {"c": torch.ones((), dtype=F64), "d": torch.ones((), dtype=F64)}}
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a number": (lambda h: 0.1, r"`SGD.step_size` must return a Tensor or a tree .*, got float"),
    "a number in a tree": (
        lambda h: bl.tree.tree_map(lambda leaf: 0.1, PER_LEAF),
        "got float: a number has no derivative by the hyperparameters.",
    ),
    "another tree": (
        lambda h: {"a": h["rate"]},
        r"shaped as params, got a tree that lacks \['b'\]\['c'\], \['b'\]\['d'\]\.",
    ),
    "a statistic": (
        lambda h: {**PER_LEAF, "running_mean": h["rate"]},
        r"shaped as params, got a tree that has \['running_mean'\], which no step moves\.",
    ),
    "another shape": (
        lambda h: bl.tree.tree_map(lambda leaf: leaf * h["rate"].exp(), PER_LEAF),
        r"returns a Tensor of shape \(3,\) for `params\['a'\]` of shape \(2,\), to which it does not broadcast.",
    ),
    "another dtype": (
        lambda h: h["rate"].exp().float(),
        r"returns torch.float32 on cpu, but `params\['a'\]` is torch.float64 on cpu: they must share dtype and device.",
    ),
    "negative": (lambda h: h["rate"], "`SGD.step_size` must not be negative, got -3 at these hyperparameters: the exp"),
    "not a number": (lambda h: h["rate"].log(), "`SGD.step_size` must not be negative, got nan at these"),
    "too few steps": (
        lambda h, step: h["rates"]["a"][step].exp(),
        "`SGD.step_size` has no value for step 4 of the solve, counted from 0: index 4 is out of bounds",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_option_must_not_return_is_refused_in_one_sentence(name: str) -> None:
    case = tree_case("dict", "dict")
    option, sentence = REFUSED[name]
    u = case.hparams | {"rate": HYPER["rate"], "rates": HYPER["rates"]}
    with pytest.raises(ValueError, match=sentence):
        bl.hypergradient(problem_of(case), bl.SGD(option, steps=5), bl.FullUnroll(), u)


def test_a_momentum_outside_of_its_range_is_refused() -> None:
    case = tree_case()
    with pytest.raises(ValueError, match=r"`SGD.momentum` must lie in \[0, 1\), got 1.49\d+ at these hyperparameters"):
        bl.hypergradient(case.problem, bl.SGD(0.1, lambda h: h[1].exp(), steps=2), bl.FullUnroll(), case.hparams)


# Solvers of one's own -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lion(bl.InnerSolver):
    """Chen et al. 2023, with a tanh for the sign; its rate is a hyperparameter."""

    sharpness: float = 3.0

    def init(self, inner: Any, params: Any) -> bl.InnerState:
        return bl.InnerState(params, bl.tree.zeros_like(params))

    def step(self, inner: Any, state: bl.InnerState) -> bl.InnerState:
        g, m, rate = inner.grad(state.params), state.memory, inner.hparams["rate"].exp()
        along = bl.tree.tree_map(lambda m, g: torch.tanh(self.sharpness * (0.9 * m + 0.1 * g)), m, g)
        params = bl.tree.tree_map(lambda x, d: x - rate * d, state.params, along)
        return state.moved(params, bl.tree.tree_map(lambda m, g: 0.99 * m + 0.01 * g, m, g))


@dataclass(frozen=True)
class Adagrad(ElementwiseSolver):
    """Its step size may be a function of the hyperparameters because it is a `ElementwiseSolver`."""

    def vectors(self) -> tuple[str, ...]:
        return ("sum",)

    def move(self, x: Any, gradient: Any, parts: Any, options: Any, index: Any) -> Any:
        total = parts["sum"] + gradient**2
        return x - options["step_size"] * gradient / (total.sqrt() + 1e-10), {"sum": total}


@pytest.mark.parametrize("solver", [Lion(steps=8), Adagrad(exp("rate"), steps=8)], ids=lambda s: type(s).__name__)
def test_a_users_solver_whose_step_reads_hyperparameters_works_with_every_unroll(solver: Any) -> None:
    case = tree_case("dict", "dict")
    problem, u = problem_of(case), case.hparams | {"rate": HYPER["rate"]}
    report = bl.check_hypergradient(problem, solver, bl.FullUnroll(), u)
    assert report.ok, report
    assert float(report.estimate.hypergradient["rate"]) != 0
    for estimator in (bl.FullUnroll(memory="graph"), bl.FullUnroll(memory="checkpoint"), bl.FullUnroll("forward")):
        other = bl.hypergradient(problem, solver, estimator, u)
        torch.testing.assert_close(gradient_of(other), gradient_of(report.estimate), rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"rests on the inner solution|does not depend on `hparams\['rate'\]`"):
        bl.hypergradient(problem, solver, bl.Implicit(), u)


# Any optimizer of torch, wrapped --------------------------------------------------------------------------------------


class Clipped(torch.optim.Optimizer):
    """An optimizer as people write them: no closure, gradients changed in place, momentum kept in its state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(0.5).add_(p.grad.clamp_(-1.0, 1.0))
                p.sub_(group["lr"] * buffer)


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware (Foret et al. 2021): moves params before it asks the closure for another gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any) -> None:  # type: ignore[override]
        leaves = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in leaves]
        for p in leaves:
            p.data.add_(p.grad, alpha=0.01)
        closure()
        for p, old in zip(leaves, before, strict=True):
            p.data.copy_(old - self.param_groups[0]["lr"] * p.grad)


WRAPPED: dict[str, tuple[Callable[..., Any], str, float]] = {
    # (maker, params, inner residual that 100 steps stay below)
    "Adagrad": (lambda p: optim.Adagrad(p, lr=0.5), "dict", 1e-4),
    "Adadelta": (lambda p: optim.Adadelta(p, lr=30.0), "dict", 5.0),
    "Rprop": (lambda p: optim.Rprop(p), "dict", 1e-4),
    "LBFGS": (lambda p: optim.LBFGS(p, line_search_fn="strong_wolfe"), "dict", 1e-4),
    "NAdam": (lambda p: optim.NAdam(p, lr=0.05), "dict", 1.0),
    "Muon": (lambda p: optim.Muon(p, lr=0.02, weight_decay=0.0), "matrix", 5.0),
    "Adafactor": (lambda p: optim.Adafactor(p, lr=0.1), "matrix", 1.0),
    "groups": (lambda p: optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.05}], lr=0.1), "dict", 1e-4),
    "Clipped": (lambda p: Clipped(p, lr=0.1), "dict", 1e-8),
    "Sharpness": (lambda p: Sharpness(p, lr=0.1), "dict", 1e-4),
}
every_wrapped = pytest.mark.parametrize("name", WRAPPED)


def driven_by_hand(make: Callable[..., Any], case: Case, steps: int) -> Tensor:
    """The params after some steps of torch's own loop."""
    leaves = [leaf.clone().requires_grad_() for leaf in bl.tree.leaves(case.start)]
    optimizer = make(leaves)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.problem.inner_loss(bl.tree.rebuild(case.start, leaves), case.hparams)
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(*(() if isinstance(optimizer, Clipped) else (closure,)))
    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves])


@every_wrapped
def test_a_wrapped_optimizer_takes_the_steps_of_torchs_own_loop(name: str) -> None:
    make, params, _ = WRAPPED[name]
    case = tree_case(params)
    start = bl.tree.tree_map(torch.clone, case.start)
    inner, solver = case.problem.bind(case.hparams), bl.TorchOptimizer(make)
    state = solver.init(inner, case.start)
    with torch.no_grad():
        for _ in range(20):
            before, state = state, solver.step(inner, state)
            again = solver.step(inner, before)
            assert torch.equal(flat(again.params), flat(state.params)), "a step changed the state that it was given"
    # NAdam keeps one number in float32, which a state that is loaded turns into the dtype of params.
    expected = driven_by_hand(make, case, 20)
    torch.testing.assert_close(flat(state.params), expected, rtol=0, atol=1e-8 if name == "NAdam" else 1e-13)
    assert torch.equal(flat(case.start), flat(start))


@every_wrapped
def test_a_wrapped_optimizer_serves_implicit_differentiation_and_the_outer_loop(name: str) -> None:
    make, params, reaches = WRAPPED[name]
    case = tree_case(params)
    estimate = bl.hypergradient(case.problem, bl.TorchOptimizer(make, steps=100), bl.Implicit(), case.hparams)
    assert estimate.certificate.inner_residual < reaches
    if reaches < 1e-3:
        torch.testing.assert_close(gradient_of(estimate), case.hypergradient(), rtol=1e-3, atol=1e-3 * reaches)
    solver = bl.TorchOptimizer(make, steps=2)
    runs = [bl.OuterOptimizer(case.problem, solver, bl.Implicit(), case.hparams) for _ in range(2)]
    whole = runs[0].run(4, progress=False)
    runs[1].run(2, progress=False)
    saved = io.BytesIO()
    torch.save(runs[1].state_dict(), saved)
    saved.seek(0)
    resumed = bl.OuterOptimizer(case.problem, solver, bl.Implicit(), case.hparams)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(resumed.run(2, progress=False).hparams, whole.hparams)


def test_an_optimizer_that_clears_its_gradients_does_not_clear_the_residual() -> None:
    class Clearing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for group in self.param_groups:
                for leaf in group["params"]:
                    leaf.grad.zero_()

    case = tree_case("dict")
    inner = case.problem.bind(case.hparams)
    gradient = flat(inner.grad(case.start)).clone()
    solver = bl.TorchOptimizer(lambda params: Clearing(params, lr=0.05))
    solver.step(inner, solver.init(inner, case.start))
    assert torch.equal(flat(inner.grad(case.start)), gradient)


def test_a_warm_start_keeps_the_moments_of_a_wrapped_optimizer() -> None:
    case = tree_case("dict")

    def run(steps: int, carry: bl.Carry | None = None) -> bl.Estimate:
        solver = bl.TorchOptimizer(lambda p: torch.optim.RAdam(p, lr=0.05), steps=steps)
        return bl.hypergradient(case.problem, solver, bl.Implicit(), case.hparams, carry=carry)

    torch.testing.assert_close(flat(run(5, run(7).carry).params), flat(run(12).params), rtol=0, atol=0)


def test_an_unchanged_gradient_is_not_computed_again_for_the_closure() -> None:
    case = tree_case("dict")
    solver = bl.TorchOptimizer(lambda p: torch.optim.Adam(p, lr=0.05), steps=10)
    estimate = bl.hypergradient(case.problem, solver, bl.Implicit(), case.hparams)
    fixed = bl.hypergradient(case.problem, bl.Adam(0.05, steps=10), bl.Implicit(), case.hparams)
    assert estimate.cost.counts["gradient"] == fixed.cost.counts["gradient"]
    assert estimate.cost.counts.get("value", 0) == 0


def test_a_wrapped_optimizer_sees_the_batch_of_its_step() -> None:
    X, y = normal(1, 12, 3), normal(2, 12)
    batches = bl.MiniBatches((X, y), batch_size=4, seed=0)
    problem = bl.BilevelProblem(
        lambda w, u, batch: ((batch[0] @ w - batch[1]) ** 2).mean() + u.exp() * (w * w).sum(),
        lambda w, u: ((X @ w - y) ** 2).mean(),
        torch.zeros(3, dtype=F64),
        sampler=batches,
    )
    u = torch.tensor(0.0, dtype=F64)
    wrapped = bl.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), steps=7)
    estimates = [bl.hypergradient(problem, solver, bl.Implicit(), u) for solver in (wrapped, bl.SGD(0.1, 0.9, steps=7))]
    torch.testing.assert_close(estimates[0].params, estimates[1].params, rtol=0, atol=1e-14)


def test_what_cannot_be_wrapped_is_refused_in_one_sentence() -> None:
    case = tree_case("dict")

    def run(make: Any, estimator: Any = None) -> None:
        bl.hypergradient(case.problem, bl.TorchOptimizer(make, steps=2), estimator or bl.Implicit(), case.hparams)

    with pytest.raises(ValueError, match=r"write TorchOptimizer\(lambda params: SGD\(params, ...\)\)."):
        bl.TorchOptimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must make a torch.optim.Optimizer of the tensors that it is given, got 3."):
        run(lambda params: 3)
    with pytest.raises(ValueError, match=r"and of all of them: write lambda params: SGD\(params\)."):
        run(lambda params: torch.optim.SGD(params[:1], lr=0.1))
    with pytest.raises(
        ValueError, match="use Implicit, or one of the solvers SGD, Adam, AdamW and RMSprop, which take"
    ):
        run(torch.optim.SGD, bl.FullUnroll())
    carry = bl.hypergradient(
        case.problem, bl.TorchOptimizer(torch.optim.SGD, steps=2), bl.Implicit(), case.hparams
    ).carry
    with pytest.raises(ValueError, match="this carry is of torch's SGD, whose state Adam cannot go on with"):
        bl.hypergradient(
            case.problem, bl.TorchOptimizer(torch.optim.Adam, steps=2), bl.Implicit(), case.hparams, carry=carry
        )
    by_map = bl.BilevelProblem.from_fixed_point(lambda x, u: 0.5 * x + u, lambda x, u: (x**2).sum(), normal(1, 2))
    with pytest.raises(ValueError, match=r"TorchOptimizer needs an inner loss, .*: use FixedPoint\(update\)."):
        bl.hypergradient(by_map, bl.TorchOptimizer(torch.optim.SGD, steps=2), bl.Implicit(bl.GMRES()), normal(2, 2))


def test_a_wrapped_optimizer_that_stands_still_ends_the_run_above_its_tolerance() -> None:
    case = tree_case("dict", "dict")
    stubborn = bl.TorchOptimizer(lambda params: optim.LBFGS(params, tolerance_grad=1.0, tolerance_change=1.0), tol=1e-9)
    estimate = bl.hypergradient(case.problem, stubborn, bl.Implicit(), case.hparams, on_failure="return")
    assert estimate.status is bl.Status.INNER_NOT_CONVERGED
    assert estimate.certificate.inner_steps < 100


def test_the_old_name_of_elementwise_solvers_forwards():
    with pytest.warns(DeprecationWarning, match="`LeafwiseSolver` is now `ElementwiseSolver`"):
        assert bl.inner.LeafwiseSolver is ElementwiseSolver


def test_states_of_older_files_are_read():
    problem = RidgeProblem(torch.eye(3), torch.ones(3), torch.eye(3), torch.ones(3))
    saved = bl.hypergradient(problem, bl.QuasiNewton(), bl.Implicit(), torch.zeros(())).carry.state.to_dict()
    older = {"kept" if name == "cache" else name: value for name, value in saved.items()}
    assert bl.InnerState.from_dict(older).to_dict() == saved
