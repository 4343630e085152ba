"""Evidence does not rest on the operator that it judges: derivatives against differences, kinks, NaN by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import F64, normal
from torch import Tensor

import bilevel as bl
from bilevel.core.status import GOOD
from bilevel.engine.derivatives import check_derivatives
from bilevel.engine.kinks import Seen

F32 = torch.float32
DESCENT = bl.GradientDescent(step_size=0.1, steps=50)


def function(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Any:
    """A custom autograd.Function with a given slope."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return forward(x.detach())

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent * backward(ctx.saved_tensors[0])

    return Custom.apply


CUBE = function(lambda x: x**3, lambda x: 3 * x**2)
CONSTANT = function(lambda x: x**3, lambda x: 3 * x.detach() ** 2)
NUMPY = function(lambda x: torch.as_tensor(x.numpy() ** 3), lambda x: torch.as_tensor(3 * x.detach().numpy() ** 2))
HALF = function(lambda x: x**2, lambda x: x)
ROUNDED = function(lambda x: (4 * x).round() / 4, lambda x: torch.ones_like(x))


def no_grad(w: Tensor) -> Tensor:
    with torch.no_grad():
        size = w.abs()
    return (size * w.abs()).sum()


def square(w: Any, u: Any) -> Tensor:
    return w.square().sum()  # type: ignore[no-any-return]


PENALTIES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a constant on ctx": (lambda w, u: u.exp() * (CONSTANT(w) * w).sum() / 4, "by `params`"),
    "numpy in a backward": (lambda w, u: u.exp() * (NUMPY(w) * w).sum() / 4, "by `params`"),
    "a detached weight": (lambda w, u: u.exp() * (w.detach().abs() * w.abs()).sum(), "by `params`"),
    "a weight under no_grad": (lambda w, u: u.exp() * no_grad(w), "by `params`"),
    "straight through": (lambda w, u: u.exp() * (w + (w.tanh() - w).detach()).square().sum(), "by `params`"),
    "a wrong backward": (lambda w, u: u.exp() * HALF(w).sum(), "the gradient of the inner loss by `params`"),
    "half detached hparams": (lambda w, u: (u.exp() * u.detach().exp()) * square(w, u), "by `hparams`"),
    "hparams as a number": (lambda w, u: u.exp() * (1 + float(u.detach()) ** 2) * square(w, u), "by `hparams`"),
    "rounded hparams": (lambda w, u: ROUNDED(u + 0.07).exp() * square(w, u), "by `hparams`"),
}


def problem_of(
    penalty: Callable[..., Tensor], dtype: torch.dtype = F64, outer: Callable[..., Tensor] = square
) -> tuple[bl.BilevelProblem, Tensor]:
    target = torch.tensor([1.0, 2.0, -1.5], dtype=dtype)
    problem = bl.BilevelProblem(
        lambda w, u: (w - target).square().sum() + penalty(w, u), outer, torch.full((3,), 0.1, dtype=dtype)
    )
    return problem, torch.tensor(-0.5, dtype=dtype)


def status_of(problem: bl.BilevelProblem, u: Any, estimator: Any, solver: Any = DESCENT, **options: Any) -> bl.Estimate:
    return bl.hypergradient(problem, solver, estimator, u, on_failure="return", **options)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_a_derivative_that_is_not_that_of_the_values_is_named(kind: str, dtype: torch.dtype) -> None:
    penalty, leaf = PENALTIES[kind]
    problem, u = problem_of(penalty, dtype)
    estimate = status_of(problem, u, bl.Implicit())
    assert estimate.status is bl.Status.WRONG_DERIVATIVE
    assert leaf in estimate.verdict.detail
    assert "differs from differences of" in estimate.verdict.detail
    assert bool(estimate.hypergradient.isnan())


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_the_same_loss_in_torch_operations_is_right(dtype: torch.dtype) -> None:
    for cube in (CUBE, lambda w: w**3):
        problem, u = problem_of(lambda w, u, c=cube: u.exp() * (c(w) * w).sum() / 4, dtype)
        estimate = status_of(problem, u, bl.Implicit(), bl.Newton())
        # At the solution 2 (w - a) + e^u w^3 = 0, so dw/du = -e^u w^3 / (2 + 3 e^u w^2).
        w, weight = estimate.params.double(), float(u.exp())
        exact = (2 * w * -weight * w**3 / (2 + 3 * weight * w**2)).sum()
        assert estimate.status.ok
        assert float(estimate.hypergradient) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize(
    "estimator",
    [bl.FullUnroll(), bl.FullUnroll(mode="forward"), bl.FullUnroll(memory="graph"), bl.TruncatedUnroll(tail=5), "auto"],
    ids=str,
)
def test_every_estimator_of_second_derivatives_fails_and_the_others_are_not_judged(estimator: Any) -> None:
    problem, u = problem_of(PENALTIES["a constant on ctx"][0])
    assert status_of(problem, u, estimator).status is bl.Status.WRONG_DERIVATIVE
    assert status_of(problem, u, bl.FiniteDifference()).status.ok
    # A certificate compares it with the wrong derivative, and finds it far off.
    assert status_of(problem, u, bl.FiniteDifference(), certify=True).status is bl.Status.INACCURATE


def test_the_leaf_is_named_also_where_its_part_is_small() -> None:
    def inner(w: Any, u: Any) -> Tensor:
        small = 1e-4 * u["q"].exp() * u["q"].detach() * w["b"].square()
        return (w["a"] - 1).square().sum() + (w["b"] - 2).square() + u["p"].exp() * w["a"].square().sum() + small  # type: ignore[no-any-return]

    params = {"a": torch.zeros(3, dtype=F64), "b": torch.zeros((), dtype=F64)}
    u = {name: torch.tensor(-0.5, dtype=F64) for name in "pq"}
    estimate = status_of(bl.BilevelProblem(inner, lambda w, u: w["a"].sum() * w["b"], params), u, bl.Implicit())
    assert "`hparams['q']`" in estimate.verdict.detail


def test_one_leaf_is_named_where_directions_move_several_at_once() -> None:
    names = "abcdefghij"

    def penalty(w: Tensor, u: Any) -> Tensor:
        weights = [u[name].exp() * (u[name].detach() if name == "i" else 1.0) for name in names]
        return torch.stack(weights).sum() * square(w, u)

    problem = bl.BilevelProblem(lambda w, u: (w - 1.0).square().sum() + penalty(w, u), square, torch.ones(3, dtype=F64))
    u = {name: torch.tensor(-0.5, dtype=F64) for name in names}
    detail = check_derivatives(problem, u, torch.full((3,), 0.2, dtype=F64)).detail
    assert detail.startswith("the derivative of the inner gradient by `hparams['i']` differs from differences")


@pytest.mark.parametrize(
    ("outer", "words"),
    [
        (lambda w, u: HALF(w - 1.0).sum(), "the gradient of the outer loss by `params`"),
        (lambda w, u: (w - 1.0).square().sum() + HALF(u), "the gradient of the outer loss by `hparams`"),
        (lambda w, u: ((w - 1.0) * (w - 1.0).detach()).sum(), "the gradient of the outer loss by `params`"),
    ],
)
def test_a_wrong_outer_gradient_is_named(outer: Any, words: str) -> None:
    problem, u = problem_of(lambda w, u: u.exp() * square(w, u), outer=outer)
    assert words in status_of(problem, u, bl.Implicit()).verdict.detail


class WrongProduct(bl.Linearization):
    """Closed forms of (x - u)^2 + c x^2, one of which is off by a factor."""

    wrong = ""

    def _hvp(self, v: Tensor) -> Tensor:
        return (2.5 if self.wrong == "hvp" else 3.0) * v

    def _cross(self, v: Tensor) -> Tensor:
        return (-1.0 if self.wrong == "cross" else -2.0) * v

    def _cross_jvp(self, v: Tensor) -> Tensor:
        return (-1.0 if self.wrong == "jvp" else -2.0) * v


@pytest.mark.parametrize(("wrong", "leaf"), [("hvp", "params"), ("cross", "hparams"), ("jvp", "hparams"), ("", "")])
def test_wrong_products_of_a_structured_problem_are_named(wrong: str, leaf: str) -> None:
    kind = type("Kind", (WrongProduct,), {"wrong": wrong})

    class Inner(bl.InnerProblem):
        linearization = kind

    class Problem(bl.BilevelProblem):
        inner_problem = Inner

    problem = Problem(lambda x, u: (x - u).square().sum() + 0.5 * square(x, u), square, torch.zeros(3, dtype=F64))
    estimate = status_of(problem, torch.ones(3, dtype=F64), bl.Implicit())
    assert (estimate.status is bl.Status.WRONG_DERIVATIVE) == bool(wrong)
    assert f"`{leaf}`" in estimate.verdict.detail or not wrong


def test_optimality_maps_are_judged_by_their_own_jacobian() -> None:
    target, u = normal(1, 3), torch.tensor(-0.5, dtype=F64)
    turn = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 2.0, 0.5], [0.3, 0.0, 2.0]], dtype=F64)
    for detach, leaf in (("", ""), ("w", "params"), ("u", "hparams")):

        def zero(w: Tensor, u: Tensor, which: str = detach) -> Tensor:
            cubed = (w.detach() if which == "w" else w) ** 3
            return turn @ w + cubed - u.exp() * (u.detach() if which == "u" else u) * target

        problem = bl.BilevelProblem(optimality=zero, outer_loss=square, params=torch.zeros(3, dtype=F64))
        estimate = status_of(problem, u, bl.Implicit(bl.GMRES()))
        assert (estimate.status is bl.Status.WRONG_DERIVATIVE) == bool(detach), estimate.verdict
        assert f"`{leaf}`" in estimate.verdict.detail or not detach


def test_solution_batches_and_the_outer_loop_refuse_it_too() -> None:
    problem, u = problem_of(PENALTIES["half detached hparams"][0])
    leaf = u.clone().requires_grad_()
    solved = bl.solution(problem, DESCENT, bl.Implicit(), leaf)
    with pytest.raises(bl.HypergradientError, match="by `hparams` differs from differences of that"):
        square(solved, leaf).backward()
    batch = bl.hypergradient(problem, DESCENT, bl.Implicit(), u.expand(2), batch=2, on_failure="return")
    assert [member.status for member in batch] == [bl.Status.WRONG_DERIVATIVE] * 2
    outer = bl.OuterOptimizer(problem, DESCENT, bl.Implicit(), u)
    with pytest.raises(bl.HypergradientError, match="WRONG_DERIVATIVE"):
        outer.run(2, progress=False)
    assert float(outer.hparams) == float(u)


def test_a_problem_is_looked_at_once_and_again_under_certify() -> None:
    calls = 0

    def penalty(w: Tensor, u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return u.exp() * square(w, u)

    problem, u = problem_of(penalty)

    def taken(**options: Any) -> int:
        nonlocal calls
        calls = 0
        assert status_of(
            problem, u, bl.OneStep(), bl.GradientDescent(0.1, steps=3), check=False, **options
        ).status.usable
        return calls

    first, second = taken(), taken()
    assert first - second == 8  # A product, two ends of each of three lines, and the gradient for the third.
    assert taken(certify=True) > second + 8
    counted = []
    for again in (False, True):
        calls = 0
        assert check_derivatives(problem, u, problem.params, again=again).status.ok
        counted.append(calls)
    assert counted == [0, 8]


# No false alarm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("unit", [1e-15, 1e-5, 1.0, 1e5, 1e15])
def test_units_of_losses_targets_and_inputs_raise_no_alarm(unit: float, dtype: torch.dtype) -> None:
    X, y = normal(1, 30, 4).to(dtype), normal(2, 30).to(dtype)
    start, u = torch.zeros(4, dtype=dtype), torch.tensor(-2.0, dtype=dtype)
    for scale, y_unit, x_unit in ((unit, 1.0, 1.0), (1.0, unit, 1.0), (1.0, 1.0, unit)):
        A, t = X * x_unit, y * y_unit

        def inner(w: Tensor, u: Tensor, A: Tensor = A, t: Tensor = t, c: float = scale, x: float = x_unit) -> Tensor:
            return c * ((A @ w - t).square().mean() + u.exp() * (x * w).square().sum())

        problem = bl.BilevelProblem(inner, lambda w, u, A=A, t=t: (A @ w - 1.1 * t).square().mean(), start)
        solved = torch.linalg.lstsq(A.double(), t.double()[:, None]).solution[:, 0].to(dtype)
        for params in (start, 0.9 * solved):
            assert check_derivatives(problem, u, params, again=True).status.ok


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda w: w.abs().sum(),
    "one-sided square": lambda w: w.relu().square().sum(),
    "clamp": lambda w: w.clamp(-0.1, 0.1).square().sum(),
    "maximum": lambda w: w.max(),
    "hinge": lambda w: (1 - 3 * w).relu().square().sum(),
    "median": lambda w: w.median(),
    "power": lambda w: w.abs().pow(1.5).sum(),
}


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINKS)
def test_a_kink_near_or_at_the_point_is_no_wrong_derivative(kind: str, dtype: torch.dtype) -> None:
    problem, u = problem_of(lambda w, u: u.exp() * KINKS[kind](w), dtype)
    for point in ([0.0, 0.0, 0.0], [2.0, 1e-9, -1e-13], [0.1, 1 / 3, 3e-3], [0.5, 0.5, -0.5]):
        verdict = check_derivatives(problem, u, torch.tensor(point, dtype=dtype), again=True)
        assert verdict.status.ok, verdict


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_networks_of_relus_with_very_many_kinks_raise_no_alarm(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(5, 40), torch.nn.BatchNorm1d(40), torch.nn.ReLU(), torch.nn.Dropout(0.2)]
        module = torch.nn.Sequential(*layers, torch.nn.Linear(40, 1)).to(dtype)
    X, y = normal(1, 2000, 5).to(dtype), normal(2, 2000, 1).to(dtype)
    problem = bl.ModuleProblem(
        module,
        lambda net, p, u: (net(X) - y).square().mean() + sum(u[k].exp() * v.square().sum() for k, v in p.items()),
        lambda net, p, u: (net.eval()(X) - 1.1 * y).square().mean(),
        seed=0,
    )
    u = {name: torch.tensor(-3.0, dtype=dtype) for name in problem.trainable(problem.params)}
    assert check_derivatives(problem, u, problem.params).status.ok


# Kinks ---------------------------------------------------------------------------------------------------------------

Z = torch.tensor([3.0, 0.5, -2.0, 0.1], dtype=F64)
NEAR = torch.tensor([2.5, 1.0, -1.5, 0.0], dtype=F64)


def lasso() -> bl.BilevelProblem:
    """Separable: w* = soft(z, e^u), so that smooth steps chatter around zero in the second and the last component."""
    return bl.BilevelProblem(
        lambda w, u: 0.5 * (w - Z).square().sum() + u.exp() * w.abs().sum(),
        lambda w, u: (w - NEAR).square().sum(),
        torch.zeros(4, dtype=F64),
    )


@pytest.mark.parametrize("estimator", [bl.Implicit(), bl.FullUnroll(), "auto"], ids=str)
@pytest.mark.parametrize(
    "solver",
    [bl.GradientDescent(0.1, steps=100), bl.Nesterov(steps=60), bl.QuasiNewton()],
    ids=lambda solver: solver.title,
)
def test_a_run_that_ends_at_a_kink_is_not_ok(solver: bl.InnerSolver, estimator: Any) -> None:
    if not solver.traits.differentiable and isinstance(estimator, bl.FullUnroll):
        return
    estimate = status_of(lasso(), torch.tensor(0.0, dtype=F64), estimator, solver)
    assert estimate.status is bl.Status.NOT_SMOOTH, estimate.verdict
    assert "cross kinks of the inner loss" in estimate.verdict.detail


@pytest.mark.parametrize("solver", [bl.GradientDescent(0.1, steps=150), bl.Adam(0.05, steps=150)], ids=str)
@pytest.mark.parametrize("kink", [lambda w: w.max(), lambda w: -w.median()], ids=["maximum", "median"])
def test_a_matrix_that_ends_where_its_entries_tie_is_not_ok(kink: Callable[[Tensor], Tensor], solver: Any) -> None:
    M = normal(3, 3, 4)
    problem = bl.BilevelProblem(
        lambda w, u: 0.5 * (w - M).square().sum() + u.exp() * kink(w),
        lambda w, u: (w - 1).square().sum(),
        torch.zeros(3, 4, dtype=F64),
    )
    status = {u: status_of(problem, torch.tensor(u, dtype=F64), bl.Implicit(), solver).status for u in (-9.0, 0.5)}
    # The first is e^-9 away from M, whose entries do not tie; and a problem that was smooth is looked at again.
    assert status == {-9.0: bl.Status.OK, 0.5: bl.Status.NOT_SMOOTH}


def test_a_short_run_of_a_problem_that_was_smooth_is_looked_at_again() -> None:
    problem, solver = lasso(), bl.GradientDescent(0.1, steps=150)
    assert status_of(problem, torch.tensor(-9.0, dtype=F64), bl.Implicit(), solver).status.ok
    problem.outer_loss = lambda w, u: 1e3 + w.sum()
    assert status_of(problem, torch.tensor(0.0, dtype=F64), bl.Implicit(), solver).status is bl.Status.NOT_SMOOTH


def test_where_evidence_is_asked_for_and_after_longer_runs_a_smooth_problem_is_looked_at_again() -> None:
    problem, solver, u = lasso(), bl.GradientDescent(0.1, steps=150), torch.tensor(0.0, dtype=F64)
    problem.outer_loss = lambda w, u: 1e3 + w.sum()
    for steps, certify, status in ((150, False, "OK"), (150, True, "NOT_SMOOTH"), (149, False, "NOT_SMOOTH")):
        # Runs that ended much further away; one of them was shorter.
        problem.derivatives_seen["kinks"] = Seen(GOOD, 1e9, steps)
        assert status_of(problem, u, bl.Implicit(), solver, certify=certify).status.name == status


def test_the_same_problem_by_its_proximal_step_is_right() -> None:
    def step(w: Tensor, u: Tensor) -> Tensor:
        moved = w - 0.5 * (w - Z)
        return moved.sign() * (moved.abs() - 0.5 * u.exp()).relu()

    problem = bl.BilevelProblem.from_fixed_point(
        step, lambda w, u: (w - NEAR).square().sum(), torch.zeros(4, dtype=F64)
    )
    for estimator in (bl.Implicit(bl.GMRES()), bl.FullUnroll()):
        estimate = status_of(problem, torch.tensor(0.0, dtype=F64), estimator, bl.FixedPoint(step, steps=80))
        # w* = (2, 0, -1, 0), dw/du = -sign(w): 2 (2 - 2.5) (-1) + 2 (-1 + 1.5) (1) = 2.
        assert estimate.status.ok
        assert float(estimate.hypergradient) == pytest.approx(2.0)


def test_solution_and_batches_say_so_too_and_a_target_ends() -> None:
    u, solver = torch.tensor(0.0, dtype=F64, requires_grad=True), bl.GradientDescent(0.1, steps=150)
    with pytest.warns(bl.BilevelWarning, match="cross kinks"):
        bl.solution(lasso(), solver, bl.Implicit(), u)
    batch = bl.hypergradient(lasso(), solver, bl.Implicit(), torch.zeros(2, dtype=F64), batch=2, on_failure="return")
    assert [member.status for member in batch] == [bl.Status.NOT_SMOOTH] * 2
    # Towards a tolerance, rows end as soon as each would alone.
    alone, solver = status_of(lasso(), u.detach(), bl.Implicit(), bl.GradientDescent(0.1)), bl.GradientDescent(0.1)
    batch = bl.hypergradient(lasso(), solver, bl.Implicit(), torch.zeros(2, dtype=F64), batch=2, on_failure="return")
    assert [member.verdict for member in batch] == [alone.verdict] * 2
    assert [member.certificate.inner_steps for member in batch] == [alone.certificate.inner_steps] * 2
    found = status_of(lasso(), u.detach(), bl.Implicit(), bl.GradientDescent(0.1), target_error=1e-3)
    assert found.status is bl.Status.NOT_SMOOTH
    assert found.certificate.inner_steps <= 4000


@pytest.mark.parametrize(
    "inner",
    [
        lambda w, u: 0.5 * (torch.tensor([1e3, 1.0, 1e-3, 1e-5], dtype=F64) * (w - Z).square()).sum() + u * w.sum(),
        lambda w, u: (20 * w).tanh().sum() + 0.5 * u.exp() * (w - Z).square().sum(),
        lambda w, u: 0.5 * (w - 3 - Z.abs()).square().sum() + u.exp() * w.abs().sum(),
    ],
    ids=["ill-conditioned", "steep", "a kink elsewhere"],
)
@pytest.mark.parametrize("steps", [3, 400])
def test_smooth_runs_that_oscillate_or_stand_at_rounding_are_no_kinks(inner: Any, steps: int) -> None:
    problem = bl.BilevelProblem(inner, square, torch.zeros(4, dtype=F64))
    for rate in (1e-3, 1.99e-3):
        estimate = status_of(problem, torch.tensor(0.0, dtype=F64), bl.OneStep(), bl.GradientDescent(rate, steps=steps))
        assert estimate.status is not bl.Status.NOT_SMOOTH, estimate.verdict


def test_an_unrolled_network_of_relus_stays_ok() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).double()
    X, y = normal(1, 100, 3), normal(2, 100, 1)
    problem = bl.ModuleProblem(
        module,
        lambda net, p, u: (net(X) - y).square().mean() + u.exp() * sum(v.square().sum() for v in p.values()),
        lambda net, p, u: (net(X) - 1.1 * y).square().mean(),
    )
    for solver in (bl.GradientDescent(0.1, steps=100), bl.SGD(0.1, momentum=0.9, steps=60)):
        assert status_of(problem, torch.tensor(-4.0, dtype=F64), bl.FullUnroll(), solver).status.ok


def test_check_problem_calls_a_kink_a_kink() -> None:
    u = torch.tensor(0.0, dtype=F64)
    found = bl.check_problem(lasso(), u, bl.GradientDescent(0.1, steps=150))["kinks"]
    assert (found.verdict, found.status) == ("fault", bl.Status.NOT_SMOOTH)
    away = bl.BilevelProblem(
        lambda w, u: 0.5 * (w - 4.0).square().sum() + u.exp() * (w - 1.0).abs().sum(), square, torch.zeros(4, dtype=F64)
    )
    found = bl.check_problem(away, u, bl.GradientDescent(0.1, steps=400))["kinks"]
    assert found.verdict == "note"
    assert found.measured == pytest.approx(2 * 4**0.5, rel=1e-3)
    assert "has a kink on the way of the run" in found.sentence


def test_a_certificate_without_a_figure_prints_its_reason() -> None:
    estimate = status_of(
        lasso(), torch.tensor(0.0, dtype=F64), bl.Implicit(), bl.GradientDescent(0.1, steps=150), certify=True
    )
    assert estimate.certificate.error is None
    assert f"error none ({estimate.certificate.error_note})" in str(estimate)
    assert "not asked for" not in str(estimate)


# Second derivatives that are not finite ------------------------------------------------------------------------------

CENTER = torch.tensor([0.3, -0.2], dtype=F64)


@pytest.mark.parametrize(
    ("inner", "operation"),
    [
        (lambda w, u: -torch.exp(-(torch.linalg.norm(w - u) ** 2)), "linalg_vector_norm"),
        (lambda w, u: (w - u).square().sum() + (w - u).abs().pow(1.5).sum(), "pow"),
    ],
)
def test_a_second_derivative_that_is_not_finite_names_its_operation(inner: Any, operation: str) -> None:
    problem = bl.BilevelProblem(inner, lambda w, u: (w * CENTER).sum(), CENTER.clone())
    for estimator in (bl.Implicit(), bl.FullUnroll(), bl.FullUnroll(mode="forward"), bl.TruncatedUnroll(tail=3)):
        estimate = status_of(problem, CENTER, estimator, bl.GradientDescent(0.25, steps=10))
        assert estimate.status is bl.Status.NOT_FINITE
        assert f"the second derivative of `{operation}` is not finite there" in estimate.verdict.detail
    leaf = CENTER.clone().requires_grad_()
    solved = bl.solution(problem, bl.GradientDescent(0.25, steps=10), bl.FullUnroll(), leaf)
    with pytest.raises(bl.HypergradientError, match=operation):
        solved.sum().backward()
    report = bl.check_problem(problem, CENTER, bl.GradientDescent(0.25, steps=10))
    assert f"the second derivative of `{operation}` is not finite at the start" in report["second derivatives"].sentence


def test_newton_solves_a_nonsymmetric_indefinite_optimality_map() -> None:
    def kkt(p: Any, b: Tensor) -> Any:
        c = torch.stack([torch.ones_like(b), b])
        return {"x": -(c - 0.5 * (p["x"].log() + 1)) + p["nu"], "nu": p["x"].sum() - 1}

    start = {"x": torch.full((2,), 0.5, dtype=F64), "nu": torch.tensor(0.0, dtype=F64)}
    problem = bl.BilevelProblem(optimality=kkt, outer_loss=lambda p, b: p["x"][0], params=start)
    b = torch.tensor(0.3, dtype=F64)
    # The maximiser of c'x - x'log(x) / 2 on the simplex is s = softmax(2 c), with ds_0/db = -2 s_0 s_1.
    s = torch.softmax(torch.tensor([2.0, 0.6], dtype=F64), 0)
    for estimator in (bl.Implicit(bl.GMRES()), "auto"):
        estimate = status_of(problem, b, estimator, bl.Newton())
        assert estimate.status.ok
        assert float(estimate.hypergradient) == pytest.approx(float(-2 * s[0] * s[1]), rel=1e-9)
    for solver, remedy in ((bl.Newton(bl.CG()), "use Newton() without one"), (bl.QuasiNewton(), "Newton")):
        with pytest.raises(ValueError, match=remedy.replace("(", r"\(").replace(")", r"\)")):
            bl.hypergradient(problem, solver, "auto", b)
    with pytest.raises(ValueError, match="use Implicit"):
        bl.hypergradient(problem, bl.Newton(), bl.FullUnroll(), b)
