"""What a subclass does in its own way is what every way to a hypergradient does, the fast ones included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import F64, normal
from torch import Tensor

import bilevel as bl
from bilevel.inner.coefficients import Coefficients

X = normal(0, 25, 5)
Y = X @ normal(1, 5) + normal(2, 25)
LABELS = (Y > 0).double()
RIDGE = bl.problems.RidgeProblem(X, Y, X + 0.1, Y)
WIDE = bl.problems.RidgeProblem(X[:3], Y[:3], X + 0.1, Y)
LOGISTIC = bl.problems.LogisticProblem(X, LABELS, X + 0.1, LABELS)
U = torch.tensor(-0.5, dtype=F64)
USED: list[str] = []


def watched(base: type[Any], name: str, mixed: bool) -> type[Any]:
    """Return a subclass that notes where one of its methods is used: its own, or that of a mix-in."""

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        USED.append(name)
        return getattr(base, name)(self, *arguments, **options)

    if mixed:
        return type("Mixed", (type("Mixin", (), {name: method}), base), {})
    return type("Own", (base,), {name: method})


UNROLLS = {
    "doubled": (RIDGE, bl.FullUnroll()),
    "flat": (LOGISTIC, bl.FullUnroll()),
    "wide": (WIDE, bl.FullUnroll()),
    "rows": (RIDGE.batched(2), bl.FullUnroll()),
    "run": (RIDGE, bl.Implicit()),
    "eigenbasis": (RIDGE, bl.Spectral()),
    "auto": (RIDGE, bl.Auto(unroll=True)),
}
CASES = [
    *((bl.GradientDescent, "step", *each, {"step_size": "auto", "steps": 12}) for each in UNROLLS.values()),
    *((bl.GradientDescent, "step_vjp", *UNROLLS[name], {"steps": 9}) for name in ("doubled", "flat", "eigenbasis")),
    (bl.GradientDescent, "step_jvp", RIDGE, bl.FullUnroll(mode="forward"), {"steps": 9}),
    (bl.GradientDescent, "init", RIDGE, bl.Spectral(), {"step_size": 0.1, "steps": 9}),
    (bl.GradientDescent, "params", RIDGE, bl.Spectral(), {"step_size": 0.1, "steps": 9}),
    (bl.HeavyBall, "step", RIDGE, bl.FullUnroll(), {"steps": 30}),
    (bl.Nesterov, "step", LOGISTIC, bl.FullUnroll(), {"tol": 1e-2}),
    (bl.Newton, "step", LOGISTIC, bl.Implicit(), {}),
    (bl.QuasiNewton, "step", LOGISTIC, bl.Implicit(), {}),
]


@pytest.mark.parametrize("mixed", [False, True], ids=["own", "mix-in"])
@pytest.mark.parametrize(("base", "name", "problem", "estimator", "options"), CASES)
def test_a_method_of_a_solver_is_used_or_refused(
    base: Any, name: str, problem: Any, estimator: Any, options: Any, mixed: bool
) -> None:
    solver = watched(base, name, mixed)(**options)
    u = U if problem.batch is None else U.expand(problem.batch)
    USED.clear()
    if isinstance(estimator, bl.Spectral) and name != "init":
        with pytest.raises(ValueError, match="needs a linear multistep solver"):
            bl.hypergradient(problem, solver, estimator, u)
        return
    bl.hypergradient(problem, solver, estimator, u, on_failure="return")
    assert USED


@pytest.mark.parametrize("mixed", [False, True], ids=["own", "mix-in"])
@pytest.mark.parametrize(
    ("base", "problem", "solver"),
    [
        (bl.ClosedForm, RIDGE, bl.QuasiNewton()),
        (bl.Implicit, LOGISTIC, bl.QuasiNewton()),
        (bl.Spectral, RIDGE, bl.GradientDescent(0.1, steps=9)),
        (bl.FullUnroll, RIDGE, bl.GradientDescent(0.1, steps=9)),
        (bl.Auto, RIDGE, bl.QuasiNewton()),
    ],
)
def test_a_solve_of_an_estimator_is_used(base: Any, problem: Any, solver: Any, mixed: bool) -> None:
    USED.clear()
    assert bl.hypergradient(problem, solver, watched(base, "solve", mixed)(), U).status.usable
    assert USED


class Twice(bl.problems.losses.Squared):
    """A loss that is twice as large, with derivatives that are not."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return 2.0 * super().value(z, y)


class OwnGlm:
    """That loss in the place of another."""

    glm = Twice()


class FromOnes:
    """A start elsewhere."""

    def start(self, params: Any = None) -> Tensor:
        return torch.ones(5, dtype=F64)


class OwnLosses:
    """Losses with a further term, of which the closed form knows nothing."""

    def inner_loss(self, params: Any, hparams: Any) -> Tensor:
        loss: Tensor = super().inner_loss(params, hparams) + 0.3 * (params**4).sum()  # type: ignore[misc]
        return loss


class OwnOuter:
    """The same of the outer loss."""

    def outer_loss(self, params: Any, hparams: Any) -> Tensor:
        loss: Tensor = super().outer_loss(params, hparams) + 0.3 * (params**4).sum()  # type: ignore[misc]
        return loss


DESCENT = bl.GradientDescent(0.1, steps=9)


@pytest.mark.parametrize("changed", [OwnGlm, OwnLosses, OwnOuter])
@pytest.mark.parametrize(
    ("base", "y", "solver", "estimator"),
    [
        (bl.problems.RidgeProblem, Y, bl.QuasiNewton(), bl.ClosedForm()),
        (bl.problems.RidgeProblem, Y, DESCENT, bl.Spectral()),
        (bl.problems.RidgeProblem, Y, DESCENT, bl.FullUnroll()),
        (bl.problems.LogisticProblem, LABELS, bl.QuasiNewton(), bl.Implicit()),
    ],
)
def test_losses_that_oracles_know_nothing_of_are_told(
    base: Any, y: Tensor, solver: Any, estimator: Any, changed: Any
) -> None:
    if changed is OwnGlm and base is bl.problems.LogisticProblem:
        changed = OwnLosses
    problem = type("Own", (changed, base), {})(X, y, X + 0.1, y)
    for _ in range(2):  # the second solve has another way
        assert not bl.hypergradient(problem, solver, estimator, U, on_failure="return").status.usable


class Decaying:
    """Step sizes that fall."""

    def coefficients(self, state: Any) -> Coefficients:
        return Coefficients(read=(1.0,), mix=((1.0,),), write=(-0.1 / (1.0 + state.steps),))


def test_the_spectrum_sees_starts_and_step_sizes_of_a_subclass() -> None:
    moved: Any = type("Own", (FromOnes, bl.problems.RidgeProblem), {})(X, Y, X + 0.1, Y)
    decaying: Any = type("Own", (Decaying, bl.GradientDescent), {})(steps=9)
    for problem, each in ((moved, DESCENT), (RIDGE, decaying)):
        one, other = (
            bl.hypergradient(problem, each, estimator, U, check=False).hypergradient
            for estimator in (bl.Spectral(), bl.FullUnroll(memory="graph"))
        )
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


class OwnGradient:
    """The graph of another gradient."""

    def gradient_graph(self, params: Any, hparams: Any) -> Any:
        return super().gradient_graph(params, hparams) + 0.3 * params**3  # type: ignore[misc]


def test_a_gradient_that_oracles_do_not_read_is_refused_or_told() -> None:
    for base in (bl.problems.RidgeProblem, bl.problems.LogisticProblem):
        with pytest.raises(ValueError, match="`gradient_graph` of its own"):
            type("Own", (OwnGradient, base), {})
    own: Any = type("Own", (OwnGradient, bl.BilevelProblem), {})
    problem = own(lambda w, u: (X @ w - Y).square().mean() + u.exp() * w @ w, lambda w, u: w.sum(), X[0])
    for steps in (9, 300):
        estimate = bl.hypergradient(
            problem, bl.GradientDescent(0.05, steps=steps), bl.FullUnroll(), U, on_failure="return"
        )
        assert estimate.status is bl.Status.WRONG_DERIVATIVE


def later(self: Any, state: Any) -> Coefficients:
    """Step sizes that depend on the iterate from the third step on."""
    h = 0.05 / (1.0 + (float(state.params.detach().norm()) if state.steps > 1 else 0.0))
    return Coefficients(read=(1.0,), mix=((1.0,),), write=(-h,))


def test_step_sizes_that_read_the_iterate_have_no_spectrum_and_are_those_of_its_steps() -> None:
    solver: Any = type("Later", (bl.GradientDescent,), {"coefficients": later})(steps=5)
    with pytest.raises(ValueError, match="fails without an iterate"):
        bl.hypergradient(RIDGE, solver, bl.Spectral(), U)
    one, other = (bl.hypergradient(RIDGE, solver, bl.FullUnroll(memory=memory), U) for memory in ("iterates", "graph"))
    assert one.certificate.form == "step by step"
    torch.testing.assert_close(one.hypergradient, other.hypergradient, rtol=1e-12, atol=0)
